"""Where an episode is, told turn by turn to whoever runs it.

- Telling changes nothing: an episode is the same with and without a listener.
- What takes long is told when it begins; what a validation or the grading found, when it ends.
"""

from collections.abc import Callable
from dataclasses import dataclass

Show = Callable[[str, float, float, str], None]
"""Called with stage, done, total and a line of text."""
_CHECKS = {"validate_and_build": "validate", "grade": "grade"}


@dataclass(frozen=True, slots=True)
class TurnProgress:
    """What an episode does now."""

    turn: int
    """From 1."""
    turns: int
    """Most that the episode may take."""
    doing: str
    """"generate", the key of a tool, "no usable call", or "grade"."""
    found: str = ""
    """What a validation or the grading found; empty until it has ended."""

    def __str__(self) -> str:
        text = f"turn {self.turn} of {self.turns}: {self.doing}"
        return f"{text}: {self.found}" if self.found else text


TurnListener = Callable[[TurnProgress], None]


def ignore(_: TurnProgress) -> None:
    """A listener that does nothing."""


def show_turns(show: Show, stage: str, done: int, total: int, where: str) -> TurnListener:
    """A listener that shows turns in `stage`, and each validation and the grading as one more."""

    def listen(progress: TurnProgress) -> None:
        text = f"{where}, {progress}"
        check = _CHECKS.get(progress.doing)
        if check:
            show(check, float(bool(progress.found)), 1, text)
        else:
            show(stage, done, total, text)

    return listen
