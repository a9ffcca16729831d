"""Refuses specs of Python environments that cannot be followed, before anything is fetched."""

from collections.abc import Sequence

from regreen.lockfile import check_pin, normalize, parse_lock
from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import EnvironmentSpec, check_overlay
from sandbox_svc.builders.interpreters import check_version

MAX_PYTHONS = 8


def check_spec(spec: EnvironmentSpec) -> None:
    """Refuse a spec that cannot be followed.

    Raises:
        InvalidArgument: names the field.
    """
    if (spec.source is None) == (not spec.source_tree):
        problem = (
            "is absent, and source_tree too"
            if spec.source is None
            else "and source_tree are both given"
        )
        raise InvalidArgument("spec.source", problem, "give one of the two")
    if spec.python not in spec.allowed_pythons:
        raise InvalidArgument("spec.pythons", f"lacks {spec.python}", "add the spec's own python")
    if len(spec.allowed_pythons) > MAX_PYTHONS:
        raise InvalidArgument(
            "spec.pythons", f"has {len(spec.pythons)} entries", f"give at most {MAX_PYTHONS}"
        )
    for version in spec.allowed_pythons:
        check_version(version)
    if spec.install_mode not in ("editable", "path", "none"):
        raise InvalidArgument(
            "spec.install_mode", f"is {spec.install_mode[:80]!r}", "use editable, path, none"
        )
    _check_pins(spec)
    _check_arguments(spec.test.arguments)
    check_overlay(spec)


def _check_pins(spec: EnvironmentSpec) -> None:
    """Refuse pins that name no release, and installed ones that cannot be there together.

    Raises:
        InvalidArgument: names the pin by its place in the request.
    """
    for field in ("pins", "wheelhouse", "build_pins"):
        for number, pin in enumerate(getattr(spec, field)):
            check_pin(str(pin), f"spec.{field}[{number}]")
    seen: set[str] = set()
    for number, pin in enumerate(spec.pins):
        if not pin.files:
            raise InvalidArgument(
                f"spec.pins[{number}].files", f"of {pin} is empty", "name a file with its sha256"
            )
        if (name := normalize(pin.name)) in seen:
            raise InvalidArgument(f"spec.pins[{number}].name", f"pins {name} again", "keep one pin")
        seen.add(name)
    parse_lock("\n".join(str(pin) for pin in spec.pins), "spec.pins")


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse to spread the tests over processes: the runner sees its own process only.

    Raises:
        InvalidArgument: names the option.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in ("--dist", "--numprocesses", "--tx") or option.startswith("-n"):
            raise InvalidArgument(
                "spec.test.arguments", f"has {argument!r}", "leave it out: tests run in one process"
            )
