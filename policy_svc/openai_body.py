"""The body of a chat completion request, checked before anything is done for it.

- Every value has its type and a bound, or `InvalidArgument` names the field: no body of a client
  makes the endpoint fail, or work out of proportion to the body's size.
- Unknown fields are ignored, as OpenAI clients expect; fields that would change the answer and
  cannot be honoured (`tools`, penalties) are refused by name.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from policy_svc.chat import Message
from policy_svc.engines.base import Sampling
from regreen.rpc.errors import InvalidArgument

MAX_BODY_BYTES = 8 << 20
_REFUSED = {
    "tools": "is not rendered by this policy",
    "functions": "is not rendered by this policy",
    "logit_bias": "is not applied here",
    "presence_penalty": "is not applied here",
    "frequency_penalty": "is not applied here",
    "top_logprobs": "is not given here",
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"tool": "user", "function": "user"}
_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed request."""

    messages: tuple[Message, ...]
    sampling: Sampling
    n: int
    stream: bool
    usage_in_stream: bool
    logprobs: bool
    session_id: str


def parse(body: dict[str, Any], header_session: str, max_samples: int) -> Asked:
    """Check a request body.

    Raises:
        InvalidArgument: names the field.
    """
    for name, problem in _REFUSED.items():
        if body.get(name):
            raise InvalidArgument(name, problem, "leave it out")
    stream, logprobs = _flag(body, "stream"), _flag(body, "logprobs")
    if stream and logprobs:
        raise InvalidArgument("logprobs", "are not sent in a stream", "leave one of them out")
    seed = _whole(body, "seed", -_SEEDS, _SEEDS - 1)
    budget = _whole(body, "max_completion_tokens", 0) or _whole(body, "max_tokens", 0) or 256
    return Asked(
        messages=_messages(body.get("messages")),
        sampling=Sampling(
            temperature=_number(body, "temperature", 1.0),
            top_p=_number(body, "top_p", 1.0),
            max_new_tokens=budget,
            seed=secrets.randbits(31) if seed is None else seed % _SEEDS,
            stop=_stops(body.get("stop")),
            regex=_text(body.get("regex") or "", "regex"),
            json_schema=_json_schema(_object(body, "response_format")),
        ),
        n=_whole(body, "n", 1, max_samples) or 1,
        stream=stream,
        usage_in_stream=_flag(_object(body, "stream_options"), "include_usage"),
        logprobs=logprobs,
        session_id=_session(body, header_session),
    )


def _json_schema(response_format: dict[str, Any]) -> str:
    """The schema that answers have to be instances of; empty where any text will do."""
    match response_format.get("type", "text"):
        case "text":
            return ""
        case "json_object":
            return '{"type": "object"}'
        case "json_schema":
            asked = _object(response_format, "json_schema", "response_format.")
            schema = asked.get("schema")
            if isinstance(schema, dict):
                return json.dumps(schema)
            field = "response_format.json_schema.schema"
            raise InvalidArgument(field, "is no object", "give a JSON Schema")
    raise InvalidArgument(
        "response_format.type", "is unknown", "use text, json_object or json_schema"
    )


def _session(body: dict[str, Any], header: str) -> str:
    given = _object(body, "metadata").get("session_id")
    return (
        header
        or (_text(given, "metadata.session_id") if given is not None else "")
        or (_text(body["user"], "user") if body.get("user") is not None else "")
    )


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidArgument("messages", "is empty or no list", "give at least one message")
    messages = []
    for at, item in enumerate(value):
        role = item.get("role") if isinstance(item, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidArgument(
                f"messages[{at}].role", "is missing or unknown", f"use one of {', '.join(_ROLES)}"
            )
        messages.append(Message(_ROLES[role], _content(item.get("content"), at)))
    return tuple(messages)


def _content(value: Any, at: int) -> str:
    name = f"messages[{at}].content"
    if value is None:
        return ""
    if isinstance(value, str):
        return _text(value, name)
    parts: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise InvalidArgument(name, "is not text", "give text only")
    return "".join(_text(part.get("text"), name) for part in parts)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = value if isinstance(value, list) else [value]
    return tuple(_text(item, "stop") for item in given)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(name, "is no text", "give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            name, "holds half of a surrogate pair", "send whole characters"
        ) from error
    return value


def _object(body: dict[str, Any], name: str, within: str = "") -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{within}{name}", "is no object", "give an object, or leave it out")
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument(name, "is neither true nor false", "give true or false")
    return bool(value)


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgument(name, "is no number", "give a number")
    try:
        return float(value)
    except OverflowError as error:
        raise InvalidArgument(name, "is too large", "give a smaller one") from error


def _whole(body: dict[str, Any], name: str, lowest: int, highest: int = 2**31 - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(name, "is no whole number", "give a whole number")
    if not lowest <= value <= highest:
        raise InvalidArgument(name, "is out of range", f"use {lowest} to {highest}")
    return value
