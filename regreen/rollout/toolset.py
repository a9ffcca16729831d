"""Tool schemas as data, so that names, arguments and formats can be varied without code.

- A `ToolSet` has exactly the tools of its data; every tool has one visible name and one key.
- Visible names are unique, and so are the visible argument names of one tool.
- `ToolSet.varied` depends on its seed alone; keys never change, so the code behind is the same.
"""

import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

from regreen.rpc.errors import InvalidArgument

ArgumentType = Literal["string", "integer"]
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True, slots=True)
class ArgumentSpec:
    """One argument: what the code calls it, what the policy calls it, and its type."""

    key: str
    name: str
    type: ArgumentType
    required: bool = False
    hint: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool as the policy sees it."""

    key: str
    name: str
    description: str
    arguments: tuple[ArgumentSpec, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """`name(required, optional?)`."""
        inner = ", ".join(a.name + ("" if a.required else "?") for a in self.arguments)
        return f"{self.name}({inner})"


@dataclass(frozen=True, slots=True)
class ToolSet:
    """The tools of an episode and the formats of calls and results."""

    tools: tuple[ToolSpec, ...]
    call_open: str = "<tool>"
    call_close: str = "</tool>"
    result_formats: tuple[str, ...] = ('<result tool="{tool}">{text}</result>',)
    result_format: int = 0

    def find(self, name: str) -> ToolSpec | None:
        """The tool of that visible name."""
        return next((tool for tool in self.tools if tool.name == name), None)

    def by_key(self, key: str) -> ToolSpec:
        """The tool of that key.

        Raises:
            InvalidArgument: this set has no such tool.
        """
        for tool in self.tools:
            if tool.key == key:
                return tool
        raise InvalidArgument("tool", f"{key!r} is not in this tool set")

    def render_call(self, key: str, arguments: Mapping[str, object]) -> str:
        """The text of a call, as a policy would write it; `arguments` by key."""
        import json

        tool = self.by_key(key)
        names = {argument.key: argument.name for argument in tool.arguments}
        body = {"name": tool.name, "arguments": {names[k]: v for k, v in arguments.items()}}
        return f"{self.call_open}{json.dumps(body, ensure_ascii=False)}{self.call_close}"

    def render_result(self, name: str, text: str) -> str:
        """The user message that carries an observation."""
        template = self.result_formats[self.result_format]
        return template.replace("{tool}", name).replace("{text}", text, 1)

    def varied(self, seed: int) -> "ToolSet":
        """Another naming, order and result format; the same tools by key.

        Harness randomisation as in KAT-Coder-V2.5 and Qwen3-Coder-Next: policies trained on one
        schema break when the schema changes.
        """
        rng = random.Random(seed)
        used: set[str] = set()
        tools: list[ToolSpec] = []
        for tool in self.tools:
            name = _pick(rng, tool.name, tool.aliases, used)
            taken: set[str] = set()
            arguments = tuple(
                replace(a, name=_pick(rng, a.name, a.aliases, taken)) for a in tool.arguments
            )
            tools.append(replace(tool, name=name, arguments=arguments))
        rng.shuffle(tools)
        return replace(
            self, tools=tuple(tools), result_format=rng.randrange(len(self.result_formats))
        )


def _pick(rng: random.Random, name: str, aliases: tuple[str, ...], used: set[str]) -> str:
    free = [choice for choice in (name, *aliases) if choice not in used]
    if not free:
        raise InvalidArgument("aliases", f"no free name is left for {name!r}", "add an alias")
    chosen = rng.choice(free)
    used.add(chosen)
    return chosen


def load_toolset(text: str | None = None) -> ToolSet:
    """The tool set of a TOML text; None means the one that ships with the package.

    Raises:
        InvalidArgument: the data is malformed; names the field.
    """
    if text is None:
        text = (resources.files(__package__) / "schema" / "tools.toml").read_text("utf-8")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument("tools.toml", f"is not TOML: {error}") from error
    tools = tuple(_tool(entry, f"tool[{i}]") for i, entry in enumerate(data.get("tool", [])))
    names = [tool.name for tool in tools]
    if not tools or len(set(names)) != len(names):
        raise InvalidArgument("tool", "is empty or has a name twice", "give unique names")
    formats = tuple(data.get("result_formats", ()))
    if not formats or any(not isinstance(f, str) or "{text}" not in f for f in formats):
        raise InvalidArgument("result_formats", "needs texts with {text} in them")
    return ToolSet(
        tools,
        str(data.get("call_open", "<tool>")),
        str(data.get("call_close", "</tool>")),
        formats,
    )


def _tool(entry: Mapping[str, Any], where: str) -> ToolSpec:
    key = _name(entry.get("key"), f"{where}.key")
    arguments = []
    for index, raw in enumerate(entry.get("argument", ())):
        at = f"{where}.argument[{index}]"
        kind = raw.get("type", "string")
        if kind not in ("string", "integer"):
            raise InvalidArgument(f"{at}.type", f"{kind!r} is unknown", "use string or integer")
        argument_key = _name(raw.get("key"), f"{at}.key")
        arguments.append(
            ArgumentSpec(
                argument_key,
                _name(raw.get("name", argument_key), f"{at}.name"),
                kind,
                bool(raw.get("required", False)),
                str(raw.get("hint", "")),
                tuple(_name(a, f"{at}.aliases") for a in raw.get("aliases", ())),
            )
        )
    return ToolSpec(
        key,
        _name(entry.get("name", key), f"{where}.name"),
        str(entry.get("description", "")),
        tuple(arguments),
        tuple(_name(a, f"{where}.aliases") for a in entry.get("aliases", ())),
    )


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidArgument(where, f"{value!r} is no name", "use lower case, digits, _")
    return value
