"""Bad requests made from good ones: every field of a message, at every depth, one at a time.

- A mutant differs from the good request in one place, so that it gets past the other checks.
- The values are those that programs get wrong: unknown enum values, the ends of number ranges,
  numbers that are none, huge and negative durations, long, empty and odd texts, random bytes.
- The same message and seed give the same mutants.
"""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

Mutant = tuple[str, Message]
Change = Callable[[Any], None]

_DEEPEST = 7
_LEVELS = 32
"""Of a struct: one more and protobuf itself refuses to build it."""
_MANY = 1001
_FEW = 3
"""Texts and reals that are tried far inside a message, where there are many fields."""
_TEXTS = (
    "",
    "é" * 20_000,
    "a\0b",
    "x" * 300,
    "../../etc/passwd",
    "/" * 5000,
    "-rf",
    "\u202e\ufffe\U0001f600 \r\n\t'\";$(true)",
    "99999999999999999999",
)
_REALS = (math.inf, -math.inf, math.nan, -1.0, 1e300, 5e-324)
_SECONDS = (2**62, -(2**62), 2**63 - 1, 400_000_000_000, -1)
_NANOS = (2**31 - 1, -(2**31))
_ENUMS = (99, -1, 2**31 - 1)
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (2**31 - 1, -(2**31), -1, 0),
    FieldDescriptor.TYPE_INT64: (2**63 - 1, -(2**63), -1, 0),
    FieldDescriptor.TYPE_UINT32: (2**32 - 1, 0),
    FieldDescriptor.TYPE_UINT64: (2**64 - 1, 0),
}


def mutants(good: Message, *, seed: int = 0, shallow: bool = False) -> Iterator[Mutant]:
    """Every bad form of `good`, with the path of what is bad in it; `shallow` stays at its top."""
    chance = random.Random(seed)
    for path, change in _changes(good, "", chance, _DEEPEST if shallow else 0):
        bad = type(good)()
        bad.CopyFrom(good)
        change(bad)
        yield path, bad


def _changes(
    message: Message, path: str, chance: random.Random, depth: int
) -> Iterator[tuple[str, Change]]:
    """Changes of a copy of `message`."""
    if isinstance(message, Duration | Timestamp):
        yield from _moments(path)
        return
    if isinstance(message, Struct):
        yield from _structs(path)
        return
    for field in message.DESCRIPTOR.fields:
        yield from _field_changes(message, field, f"{path}.{field.name}".strip("."), chance, depth)


def _field_changes(
    message: Message, field: FieldDescriptor, path: str, chance: random.Random, depth: int
) -> Iterator[tuple[str, Change]]:
    name = field.name
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        yield from _map_changes(field, path, chance, depth)
    elif field.is_repeated:
        yield f"{path} empty", lambda m: m.ClearField(name)
        yield from _repeated_changes(message, field, path, chance, depth)
    elif field.message_type is not None:
        yield f"{path} absent", lambda m: m.ClearField(name)
        yield f"{path} blank", lambda m: getattr(m, name).CopyFrom(type(getattr(m, name))())
        if depth < _DEEPEST:
            for where, change in _changes(getattr(message, name), path, chance, depth + 1):
                yield where, lambda m, change=change: change(getattr(m, name))
    else:
        for value in _scalars(field, chance, depth):
            yield _said(path, value), lambda m, value=value: setattr(m, name, value)


def _repeated_changes(
    message: Message, field: FieldDescriptor, path: str, chance: random.Random, depth: int
) -> Iterator[tuple[str, Change]]:
    name = field.name
    if field.message_type is None:
        for value in _scalars(field, chance, depth):
            yield (
                f"{_said(path, value)} added",
                lambda m, value=value: getattr(m, name).append(value),
            )
        some = next(iter(_scalars(field, chance, depth)))
        yield f"{path} many", lambda m: getattr(m, name).extend([some] * _MANY)
        return
    yield f"{path} blank added", lambda m: getattr(m, name).add()
    yield f"{path} twice", lambda m: getattr(m, name).extend(list(getattr(m, name)))
    if depth >= _DEEPEST:
        return
    items = getattr(message, name)
    first = items[0] if items else type(message)().__getattribute__(name).add()
    for where, change in _changes(first, f"{path}[0]", chance, depth + 1):
        yield where, lambda m, change=change: change(_first(getattr(m, name)))


def _first(items: Any) -> Any:
    return items[0] if items else items.add()


def _map_changes(
    field: FieldDescriptor, path: str, chance: random.Random, depth: int
) -> Iterator[tuple[str, Change]]:
    name = field.name
    key, value = field.message_type.fields
    yield f"{path} empty", lambda m: m.ClearField(name)
    keys, values = list(_scalars(key, chance, depth)), list(_scalars(value, chance, depth))
    for odd in keys:
        yield _said(f"{path} key", odd), lambda m, odd=odd: _put(m, name, odd, values[-1])
    for odd in values:
        yield _said(f"{path} value", odd), lambda m, odd=odd: _put(m, name, "key", odd)


def _put(message: Message, name: str, key: Any, value: Any) -> None:
    getattr(message, name)[key] = value


def _moments(path: str) -> Iterator[tuple[str, Change]]:
    for seconds in _SECONDS:
        yield f"{path}.seconds {seconds}", lambda m, s=seconds: setattr(m, "seconds", s)
    for nanos in _NANOS:
        yield f"{path}.nanos {nanos}", lambda m, n=nanos: setattr(m, "nanos", n)


def _structs(path: str) -> Iterator[tuple[str, Change]]:
    deep: dict[str, Any] = {}
    for _ in range(_LEVELS):
        deep = {"a": deep}
    nested = ParseDict(deep, Struct())
    yield f"{path} {_LEVELS} deep", lambda m: m.CopyFrom(nested)
    for number in (math.nan, math.inf, 1e300):
        yield f"{path} {number}", lambda m, n=number: m.update({"a": 1}) or _number(m, n)
    yield f"{path} valueless", lambda m: m.fields["a"].Clear()
    yield f"{path} odd", lambda m: m.update({"a\0": ["b\0"], "": None, "é" * 20_000: True})


def _number(message: Struct, number: float) -> None:
    message.fields["a"].number_value = number


def _scalars(field: FieldDescriptor, chance: random.Random, depth: int) -> Iterator[Any]:
    kind, most = field.type, _FEW if depth > 1 else None
    if kind == FieldDescriptor.TYPE_ENUM:
        yield from _ENUMS
    elif kind == FieldDescriptor.TYPE_STRING:
        yield from _TEXTS[:most]
    elif kind == FieldDescriptor.TYPE_BYTES:
        yield from (b"", chance.randbytes(70), b"\0" * 20_000)
    elif kind == FieldDescriptor.TYPE_BOOL:
        yield from (True, False)
    elif kind in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        yield from _REALS[:most]
    elif kind in _INTEGERS:
        yield from _INTEGERS[kind]
    else:
        raise AssertionError(f"{field.full_name}: no bad values of type {kind}")


def _said(path: str, value: Any) -> str:
    text = repr(value)
    return f"{path} {text if len(text) <= 40 else text[:36] + '...'}"
