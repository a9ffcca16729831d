"""Labels of sandboxes and states: few and short, so that lists of them can be sent."""

from collections.abc import Mapping

from regreen.rpc.errors import InvalidArgument

_MOST, _NAME_BYTES, _VALUE_BYTES, _ALL_BYTES = 64, 256, 4096, 32 << 10


def check_labels(labels: Mapping[str, str], field: str = "labels") -> Mapping[str, str]:
    """The labels, if there are not too many and none is too long.

    Raises:
        InvalidArgument: names the field, and the label where it is one.
    """
    if len(labels) > _MOST:
        raise InvalidArgument(field, f"has {len(labels)} entries", f"give at most {_MOST}")
    whole = 0
    for name, value in labels.items():
        key, size = len(name.encode()), len(value.encode())
        if not name:
            raise InvalidArgument(field, "has an empty name", "name every label")
        if key > _NAME_BYTES:
            problem = f"has a name of {key} bytes, {name[:40]!r}..."
            raise InvalidArgument(field, problem, f"give at most {_NAME_BYTES}")
        if size > _VALUE_BYTES:
            where = f"{field}[{name[:40]!r}]"
            raise InvalidArgument(where, f"has {size} bytes", f"give at most {_VALUE_BYTES}")
        whole += key + size
    if whole > _ALL_BYTES:
        problem = f"has {whole} bytes together"
        raise InvalidArgument(field, problem, f"give at most {_ALL_BYTES}")
    return labels
