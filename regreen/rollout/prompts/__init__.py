"""The first prompt: templates as data, filled with what a developer sees.

- An undefined name in a template is an error, never an empty text.
- Nothing of the task's fix, culprit, moves or good versions goes in, unless `hint="fix"`.
- Text of the task (logs, names) is data: it cannot open or close a tool call.
- The parts that matter most stay when room is short: rules and error, then the packages that the
  error points at, then declared ones, then the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Self

from jinja2 import Environment, FunctionLoader, StrictUndefined

from regreen.common.v1 import MODE_KEEP_NEW, Mode
from regreen.policy.v1 import ChatMessage
from regreen.rollout.facts import Facts
from regreen.rollout.logs import PrimaryError
from regreen.rollout.tools import error_text
from regreen.rollout.toolset import ToolSet

_RULES = {
    "any": "Any fix counts: move packages or edit the source.",
    "keep": "Package versions must stay new: edit the source.",
}


@dataclass(frozen=True, slots=True)
class Room:
    """Characters that each part of the first message may take."""

    error: int = 320
    declared: int = 160
    installed: int = 340
    hint: int = 240
    frames: int = 3
    log: int = 0
    """End of the log; a long context can hold what a short one must leave out."""

    @classmethod
    def of(cls, chars: int) -> Self:
        """The room that `chars` characters give: less than usual shrinks each part alike, of what
        is more half goes to the log."""
        usual = cls()
        most = usual.error + usual.declared + usual.installed + usual.hint
        share = min(1.0, chars / most)
        more = max(0, chars - most)
        return cls(
            error=max(1, int(usual.error * share)) + more // 16,
            declared=int(usual.declared * share) + more // 8,
            installed=int(usual.installed * share) + more // 4,
            hint=int(usual.hint * share) + more // 16,
            frames=usual.frames + min(more // 500, 12),
            log=more // 2,
        )


def first_messages(
    facts: Facts,
    tools: ToolSet,
    *,
    mode: Mode.ValueType,
    error: PrimaryError | None = None,
    hint: str = "",
    attempt: str = "",
    room: Room | None = None,
    versions: Mapping[str, str] | None = None,
    log: str | None = None,
) -> list[ChatMessage]:
    """System and user message of a fresh context.

    `error` is the error to repair (None: that of `facts`); `versions` what is installed now;
    `log` the log that it is in (None: that of `facts`).
    """
    room = room or Room()
    error = error or facts.error
    installed = versions if versions is not None else facts.lock.pins
    example = tools.by_key("dependency_upgrade")
    name, version = example.arguments[0].name, example.arguments[1].name
    system = _render(
        "system.j2",
        call_open=tools.call_open,
        call_close=tools.call_close,
        example={"name": example.name, "arguments": f'"{name}": "lib", "{version}": "1.2"'},
        tools=[
            {
                "usage": tool.usage,
                "description": tool.description,
                "hints": [f"{a.name}: {a.hint}" for a in tool.arguments if a.hint],
            }
            for tool in tools.tools
        ],
        finish=tools.by_key("validate_and_build").name,
        give_up=tools.by_key("give_up").name,
    )
    log = (facts.log if log is None else log).strip()
    log_end = log[-(room.error + room.log) :]
    user = _render(
        "task.j2",
        project=f"{facts.package} {facts.version}",
        python=facts.python,
        rule=_RULES["keep" if mode == MODE_KEEP_NEW else "any"],
        stage=error.stage if error else "log",
        error=error_text(error, frames=room.frames, chars=room.error) if error else log_end,
        log=log[-room.log :] if room.log and error else "",
        declared=_fit([d.replace(" ", "") for d in facts.declared], room.declared),
        installed=_fit(_ordered(facts, error, installed), room.installed),
        look_at=", ".join(facts.to_look_at(error)),
        attempt=attempt,
        hint=hint[: room.hint],
    )
    return [
        ChatMessage(role="system", content=system),
        ChatMessage(role="user", content=harmless(user, tools)),
    ]


def harmless(text: str, tools: ToolSet) -> str:
    """Text of the task with the marks of a tool call and of chat turns taken out."""
    for mark in (tools.call_open, tools.call_close):
        text = text.replace(mark, mark.replace("<", "<\u200b"))
    return without_turns(text)


def without_turns(text: str) -> str:
    """Text with the marks of chat turns taken out."""
    for mark in ("<|im_start|>", "<|im_end|>"):
        text = text.replace(mark, mark.replace("<", "<\u200b"))
    return text


def _ordered(facts: Facts, error: PrimaryError | None, installed: Mapping[str, str]) -> list[str]:
    names: dict[str, None] = dict.fromkeys(facts.suspects(error)[:4])
    names.update(dict.fromkeys(facts.direct))
    names.update(dict.fromkeys(sorted(installed)))
    return [f"{name} {installed[name]}" for name in names if name in installed]


def _fit(items: Sequence[str], chars: int) -> str:
    kept: list[str] = []
    for item in items:
        if sum(map(len, kept)) + 2 * len(kept) + len(item) > chars:
            break
        kept.append(item)
    more = len(items) - len(kept)
    return ", ".join(kept) + (f" and {more} more" if more and kept else "")


@cache
def _environment() -> Environment:
    def load(name: str) -> str:
        return (resources.files(__package__) / name).read_text("utf-8")

    return Environment(
        loader=FunctionLoader(load),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=False,
    )


def _render(name: str, **values: object) -> str:
    return _environment().get_template(name).render(**values).strip()
