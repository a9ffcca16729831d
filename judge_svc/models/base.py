"""What the rubric needs of a language model.

- A model answers text with text; it knows nothing of verdicts.
- Every call is bounded by `timeout_s`; what goes wrong on the way is `Unavailable`.
"""

from typing import Protocol


class Model(Protocol):
    """A chat model."""

    async def name(self) -> str:
        """Model and version, as stored in verdicts and cache keys; may ask the endpoint.

        Raises:
            Unavailable: the endpoint does not answer.
        """
        ...

    async def complete(self, system: str, user: str, *, timeout_s: float) -> str:
        """The answer to one system and one user message.

        Raises:
            Unavailable: no answer within `timeout_s`.
        """
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...
