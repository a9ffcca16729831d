"""Chat messages to token ids and back, exactly, for ChatML models.

- Text of a message never becomes a control token: `<|im_end|>` in a tool's output is plain text.
- `continue_turns` yields only the ids to append after a sampled turn, so that sampled ids are
  never decoded and encoded again: turn n stays a bit-exact prefix of turn n+1.
- For messages without control tokens in them, `render` equals the model's own chat template;
  a model whose template is not ChatML is refused at load.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from regreen.rpc.errors import FailedPrecondition, InvalidArgument

ROLES = ("system", "user", "assistant")
_START, _END = "<|im_start|>", "<|im_end|>"
_SYSTEM_LINE = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    content: str


class Tokenizer:
    """Encodes and decodes with a folder's `tokenizer.json`; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FailedPrecondition(f"{path} is missing; give a model folder with a tokenizer")
        self._plain = tokenizers.Tokenizer.from_file(str(path))
        self._plain.encode_special_tokens = True
        self._control = tokenizers.Tokenizer.from_file(str(path))
        self.size: int = self._plain.get_vocab_size()

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Return the ids of a text; with `control`, control tokens written out in it count."""
        tokenizer = self._control if control else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
        """Return the text of ids; control tokens show only with `control`."""
        text: str = self._plain.decode(list(ids), skip_special_tokens=not control)
        return text

    def control_id(self, token: str) -> int:
        """Return the id of a control token. Raises: FailedPrecondition when there is none."""
        found: int | None = self._control.token_to_id(token)
        if found is None:
            raise FailedPrecondition(f"the tokenizer has no {token}; only ChatML models are served")
        return found


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells a tokenizer's file from another in its place."""
    try:
        found = (folder / "tokenizer.json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=2)
def _tokenizer(folder: Path, _: tuple[int, int] | None) -> Tokenizer:
    """Reading one takes half a second of processor: it is shared by all of a process."""
    return Tokenizer(folder)


class ChatMl:
    """Renders ChatML for one tokenizer; `default_system` is added when no system message leads."""

    def __init__(self, tokenizer: Tokenizer, default_system: str | None) -> None:
        self.tokenizer, self.default_system = tokenizer, default_system
        self.start_id = tokenizer.control_id(_START)
        self.end_id = tokenizer.control_id(_END)
        self._newline = tokenizer.encode("\n")
        self._opening = [self.start_id, *tokenizer.encode("assistant\n")]

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatMl":
        """Read tokenizer and template of a model folder.

        Raises:
            FailedPrecondition: the model's template is not ChatML.
        """
        template = _template(folder)
        default = None
        if template is not None:
            # The last turn is a user's, as whenever the policy is asked: some templates (Qwen3)
            # write an assistant's last turn otherwise, which is never rendered here.
            turns = [Message("user", "x"), Message("assistant", "y"), Message("user", "z")]
            probe = [{"role": turn.role, "content": turn.content} for turn in turns]
            shown = template_text(template, probe, opening=True)
            lead = _SYSTEM_LINE.match(shown)
            default = lead.group(1) if lead else None
            if shown != f"{plain_text(turns, default)}{_START}assistant\n":
                raise FailedPrecondition(
                    f"the chat template of {folder} is not ChatML: it renders {shown[:300]!r}"
                )
        return cls(_tokenizer(folder, _stamp(folder)), default)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a whole conversation, ending where the assistant's turn begins.

        Raises:
            InvalidArgument: no message, or an unknown role.
        """
        _check(messages)
        if messages[0].role != "system" and self.default_system is not None:
            messages = [Message("system", self.default_system), *messages]
        return [*self._turns(messages), *self._opening]

    def continue_turns(self, messages: Sequence[Message], last_token_id: int) -> list[int]:
        """Return the ids to append after a sampled turn whose last id is `last_token_id`.

        The turn is closed first when its end marker was not sampled.

        Raises:
            InvalidArgument: no message, an unknown role, or an assistant message.
        """
        _check(messages)
        for at, message in enumerate(messages):
            if message.role == "assistant":
                raise InvalidArgument(
                    f"messages[{at}].role",
                    "is 'assistant' in a continuation",
                    "keep the sampled ids and send only what follows them",
                )
        closing = [] if last_token_id == self.end_id else [self.end_id]
        return [*closing, *self._newline, *self._turns(messages), *self._opening]

    def text(self, ids: Sequence[int]) -> str:
        """Return ids as text, control tokens shown."""
        return self.tokenizer.decode(ids, control=True)

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids.append(self.start_id)
            ids += self.tokenizer.encode(f"{message.role}\n{message.content}")
            ids.append(self.end_id)
            ids += self._newline
        return ids


def plain_text(messages: Sequence[Message], default_system: str | None) -> str:
    """Return closed ChatML turns as text."""
    turns = list(messages)
    if default_system is not None and turns[0].role != "system":
        turns.insert(0, Message("system", default_system))
    return "".join(f"{_START}{turn.role}\n{turn.content}{_END}\n" for turn in turns)


def template_text(
    template: str, messages: Sequence[dict[str, str]], *, opening: bool = False
) -> str:
    """Render a Hugging Face chat template in a sandboxed environment."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=opening
    )


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = json.loads(config.read_bytes()).get("chat_template")
    return template if isinstance(template, str) else None


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidArgument("messages", "is empty", "give at least one message")
    for at, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidArgument(
                f"messages[{at}].role",
                f"{message.role[:40]!r} is unknown",
                f"use one of {', '.join(ROLES)}",
            )
