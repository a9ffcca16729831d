"""Tool calls in model text: `<tool>{"name": ..., "arguments": {...}}</tool>`, one per turn.

- Model text is hostile: any input gives a `Call` or a `CallError`, never another exception.
- A `Call` names a tool of the tool set and carries only arguments of its schema, all encodable
  as UTF-8; a `CallError` tells the format in a sentence that fits an observation.
- Forgiving only where no meaning is guessed: text around the call, a code fence around the JSON,
  raw line breaks inside strings, a missing closing tag at the very end.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regreen.rollout.toolset import ToolSet, ToolSpec

MAX_CALL_CHARS = 256 * 1024
_MAX_ECHO = 60


@dataclass(frozen=True, slots=True)
class Call:
    """A well-formed call; `key` and argument names are those of the code, not of the prompt."""

    key: str
    name: str
    arguments: Mapping[str, str | int] = field(default_factory=dict)

    def text(self, key: str, default: str = "") -> str:
        """A string argument."""
        value = self.arguments.get(key, default)
        return value if isinstance(value, str) else str(value)

    @property
    def arguments_json(self) -> str:
        """Arguments by key as JSON."""
        return json.dumps(dict(self.arguments), ensure_ascii=False, sort_keys=True)


class CallError(ValueError):
    """The text holds no usable call; the message is what the policy is told."""


def parse_call(text: str, tools: ToolSet) -> Call:
    """The one call in `text`.

    Raises:
        CallError: there is none, more than one, or it does not fit the schema.
    """
    body = _body(text, tools)
    data = _json(body)
    if not isinstance(data, dict):
        raise CallError(f"the call must be a JSON object. {_format(tools)}")
    unknown = sorted(set(data) - {"name", "arguments"})
    if unknown:
        raise CallError(f"unknown key {_echo(unknown[0])}. {_format(tools)}")
    name = data.get("name")
    spec = tools.find(name) if isinstance(name, str) else None
    if spec is None:
        raise CallError(f"no tool {_echo(name)}; tools: {', '.join(t.name for t in tools.tools)}")
    arguments = data.get("arguments", {})
    if not isinstance(arguments, dict):
        raise CallError(f"arguments must be an object: {spec.usage}")
    return Call(spec.key, spec.name, _arguments(arguments, spec))


def _body(text: str, tools: ToolSet) -> str:
    start = text.find(tools.call_open)
    if start < 0:
        raise CallError(f"no tool call found. {_format(tools)}")
    start += len(tools.call_open)
    end = text.find(tools.call_close, start)
    rest = text[end + len(tools.call_close) :] if end >= 0 else ""
    if tools.call_open in rest:
        raise CallError("more than one call; write one call per turn")
    body = (text[start:end] if end >= 0 else text[start:]).strip()
    if len(body) > MAX_CALL_CHARS:
        raise CallError(f"the call is too long; keep it under {MAX_CALL_CHARS} characters")
    if body.startswith("```") and body.endswith("```") and len(body) >= 6:
        body = body.removeprefix("```").removesuffix("```").removeprefix("json").strip()
    return body


def _json(body: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CallError(f"the key {_echo(key)} comes twice")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise CallError(f"{name} is not JSON")

    try:
        # strict=False takes raw line breaks inside strings, which small models write often.
        return json.JSONDecoder(
            strict=False, object_pairs_hook=unique, parse_constant=constant
        ).decode(body)
    except json.JSONDecodeError as error:
        raise CallError(f"not valid JSON at character {error.pos}: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, CallError):
            raise
        raise CallError("the JSON is nested too deeply or holds an absurd number") from error


def _arguments(given: Mapping[str, Any], spec: ToolSpec) -> dict[str, str | int]:
    known = {argument.name: argument for argument in spec.arguments}
    result: dict[str, str | int] = {}
    for name, value in given.items():
        argument = known.get(name)
        if argument is None:
            raise CallError(f"no argument {_echo(name)}: {spec.usage}")
        if value is None and not argument.required:
            continue
        if argument.type == "integer":
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**31 - 1:
                raise CallError(f"{name} must be a whole number: {spec.usage}")
            result[argument.key] = value
            continue
        if not isinstance(value, str):
            raise CallError(f'{name} must be a text in "quotes": {spec.usage}')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CallError(f"{name} is not valid Unicode") from error
        result[argument.key] = value
    missing = [a.name for a in spec.arguments if a.required and a.key not in result]
    if missing:
        raise CallError(f"{missing[0]} is missing: {spec.usage}")
    return result


def _format(tools: ToolSet) -> str:
    return f'Write {tools.call_open}{{"name": "...", "arguments": {{...}}}}{tools.call_close}'


def _echo(value: object) -> str:
    text = (
        json.dumps(value, ensure_ascii=True, default=str) if value is not None else "without name"
    )
    return text if len(text) <= _MAX_ECHO else text[: _MAX_ECHO - 3] + "..."
