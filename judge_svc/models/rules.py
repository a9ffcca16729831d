"""The absence of a language model: rules decide alone.

- Asking it is an error that says how to configure one.
"""

from regreen.rpc.errors import Unavailable

_REMEDY = "no language model is configured; set `model` to openai or policy"


class NoModel:
    """A model that never answers."""

    async def name(self) -> str:
        """Always empty."""
        return ""

    async def complete(self, system: str, user: str, *, timeout_s: float) -> str:
        """Never an answer.

        Raises:
            Unavailable: always.
        """
        raise Unavailable(_REMEDY)

    async def close(self) -> None:
        """Nothing to give back."""
