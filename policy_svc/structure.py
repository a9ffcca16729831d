"""What a sample may have to be, and how large that is for who has to follow it token by token.

A grammar's states are copied for each repetition, so that `(.{1,500}\\n){1,500}` has 250,000 places
where a sample can be, and takes minutes to prepare; a schema's bounds are such repetitions.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from regreen.rpc.errors import InvalidArgument

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
_LOOKS = (_constants.ASSERT, _constants.ASSERT_NOT)
_HEX = re.compile(r"\\x[0-9a-fA-F]{3}")
_DEPTH = 32
_PASSED_OVER = {
    *("not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains"),
    *("maxContains", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
    *("$dynamicRef", "$recursiveRef"),
}
"""Keywords that a grammar does not have; a sample would be no instance."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_OF_ONE = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems")
_BOUNDS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


class Kind(StrEnum):
    """How it is said; the name of the field that says it."""

    REGEX = "regex"
    JSON_SCHEMA = "json_schema"


@dataclass(frozen=True, slots=True)
class Structure:
    """What a sample has to match, or be an instance of."""

    kind: Kind
    text: str

    @property
    def field(self) -> str:
        """The field of a request."""
        return f"sampling.{self.kind}"

    def check(self, characters: int, places: int) -> None:
        """See that it can be read and is of at most that size.

        Raises:
            InvalidArgument: it cannot, or is too large.
        """
        if len(self.text) > characters:
            found = f"has {len(self.text)} characters"
            raise InvalidArgument(self.field, found, f"use up to {characters}")
        try:
            size = _places(self.text) if self.kind is Kind.REGEX else _schema_places(self.text)
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            problem = f"cannot be followed: {error}"
            raise InvalidArgument(self.field, problem, "write it in other words") from error
        if size > places:
            found = f"has {size} places with all its repetitions"
            raise InvalidArgument(self.field, found, f"repeat less, up to {places}")


def _places(regex: str) -> int:
    """Characters of the longest way through, where what has no bound is passed once.

    Raises:
        re.error, ValueError: it is none, or grammars would read it otherwise.
    """
    tree = _parser.parse(regex)
    if found := _HEX.search(regex):
        raise ValueError(f"a hex digit follows {found[0][:4]}; write \\u00{found[0][2:4]}")
    edges = list(tree)
    if edges and edges[0][0] is _constants.AT and edges[0][1] is _constants.AT_BEGINNING:
        edges.pop(0)
    if edges and edges[-1][0] is _constants.AT and edges[-1][1] is _constants.AT_END:
        edges.pop()
    return _longest(edges)


def _longest(tree: Any) -> int:
    found = 0
    for operation, value in tree:
        if operation in _REPEATS:
            least, most, repeated = value
            times = least + 1 if most == _constants.MAXREPEAT else most
            found += max(1, times) * _longest(repeated)
        elif operation is _constants.SUBPATTERN:
            found += _longest(value[3])
        elif operation is _constants.BRANCH:
            found += sum(map(_longest, value[1]))
        elif operation in _LOOKS:
            found += _longest(value[1])
        elif operation is _constants.ATOMIC_GROUP:
            found += _longest(value)
        elif operation is _constants.GROUPREF_EXISTS:
            found += sum(_longest(part) for part in value[1:] if part)
        else:
            _check_characters(operation, value)
            found += 1
    return found


def _check_characters(operation: Any, value: Any) -> None:
    """See that a grammar takes the same characters."""
    if operation is _constants.AT:
        raise ValueError("^ and $ stand at the ends alone, and there is no other anchor")
    members = value if operation is _constants.IN else [(operation, value)]
    negated = operation is _constants.NOT_LITERAL or members[0][0] is _constants.NEGATE
    for kind, member in members:
        if kind in (_constants.LITERAL, _constants.NOT_LITERAL):
            largest = member
        elif kind is _constants.RANGE:
            largest = member[1]
        elif kind is _constants.CATEGORY and negated and "NOT" in str(member):
            raise ValueError("a negated class holds a negated one")
        else:
            continue
        if not largest:
            raise ValueError("NUL is no text")
        if negated and largest > 127:
            raise ValueError("a negated class holds characters beyond ASCII")


def _schema_places(text: str) -> int:
    """Keywords of a schema, each as often as what is around it may repeat.

    Raises:
        ValueError: it is none, or samples would be no instances of it.
    """
    schema = json.loads(text, parse_constant=_no_number)
    if not isinstance(schema, dict):
        raise ValueError("it is no JSON object")
    if schema.get("$ref") == "#":
        raise ValueError("it refers to nothing but itself")
    return _size(schema, 0)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _size(schema: Any, depth: int) -> int:
    if isinstance(schema, bool):
        return 1
    if not isinstance(schema, dict):
        raise ValueError(f"{json.dumps(schema)[:40]} is no schema")
    if depth == _DEPTH:
        raise ValueError(f"it is nested more than {_DEPTH} deep")
    _check_keywords(schema)
    found = 1 + len(schema.get("enum", ()))
    for name in _OF_NAMES:
        for key, part in schema.get(name, {}).items():
            found += _size(part, depth + 1)
            found += _places(key) if name == "patternProperties" else 1
    found += sum(_size(part, depth + 1) for name in _OF_MANY for part in schema.get(name, ()))
    found += sum(_size(schema[name], depth + 1) for name in _OF_ONE if name in schema)
    if "pattern" in schema:
        found += _places(schema["pattern"])
    times: int = max(1, *(schema.get(name, 1) for name in _BOUNDS))
    return times * found


def _check_keywords(schema: dict[str, Any]) -> None:
    """See that the keywords of one schema have their types, and that a grammar has them."""
    if found := sorted(_PASSED_OVER & schema.keys()):
        raise ValueError(f"{found[0]} is not enforced")
    types: list[tuple[tuple[str, ...], type]] = [
        (_OF_NAMES, dict),
        ((*_OF_MANY, "enum", "required"), list),
        (_BOUNDS, int),
        (("pattern",), str),
    ]
    for names, wanted in types:
        for name in names:
            if name in schema and type(schema[name]) is not wanted:
                raise ValueError(f"{name} is no {wanted.__name__}")
    if len(schema.get("allOf", ())) > 1:
        raise ValueError("allOf of several schemas is not enforced")
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        raise ValueError("pattern beside a length is not enforced")
    if missing := [n for n in schema.get("required", ()) if n not in schema.get("properties", {})]:
        raise ValueError(f"required names {json.dumps(missing[0])[:60]}, which is no property")
