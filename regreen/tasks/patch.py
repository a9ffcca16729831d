"""Turns what a rollout changed into a patch of the project as it lies on disk.

- A change of `requirements.lock` is the sandbox's way to move pins; it goes where the project keeps
  its pins, line by line, so that comments, markers and order survive.
- Pins of a project that keeps none on disk as text become a new `requirements.lock`.
- Nothing is written outside the project, and nothing through a link.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from packaging.version import InvalidVersion, Version

from regreen.common.v1 import (
    CHANGE_KIND_ADD,
    CHANGE_KIND_DELETE,
    CHANGE_KIND_MODIFY,
    ChangeKind,
    FileChange,
)
from regreen.lockfile import LockChange, lock_change, lock_of, normalize, parse_lock
from regreen.rpc.errors import FailedPrecondition, InvalidArgument

LOCK_NAME = "requirements.lock"
_LINE = re.compile(
    r"^(\s*)([A-Za-z0-9][A-Za-z0-9._-]*)(\s*\[[^\]]*\])?"
    r"(\s*===?\s*)?((?(4)[^\s;,#\\]+|[^;#@\\]*?))(\s*(?:[;#\\].*)?)$"
)
"""Indent, name, extras, `==` and version or else any other specifiers, and the rest."""


def moved_pins(pins: Sequence[str], changes: Iterable[FileChange]) -> LockChange:
    """Which pins the changes move, seen from `pins`; empty when they leave the lock alone."""
    before = lock_of(list(pins))
    for change in changes:
        if change.path == LOCK_NAME and change.kind != CHANGE_KIND_DELETE:
            try:
                return lock_change(before, parse_lock(change.content))
            except InvalidArgument:
                break  # refused by the validator as well, so it moved nothing
    return lock_change(before, before)


def describe_pins(pins: Sequence[str], moved: LockChange) -> tuple[str, ...]:
    """One phrase per moved pin, for people."""
    before: Mapping[str, str] = lock_of(list(pins)).pins
    set_to = (f"{n} {before.get(n, 'none')} -> {v}" for n, v in sorted(moved.installed.items()))
    return (*set_to, *(f"{name} removed" for name in moved.removed))


def onto_project(
    root: Path, pin_files: Sequence[str], pins: Sequence[str], changes: Sequence[FileChange]
) -> tuple[FileChange, ...]:
    """The changes as they apply to the project: a moved pin goes to the file that holds it.

    The first of `pin_files` takes new ones; where it is empty, they become a file of their own.
    """
    moved = moved_pins(pins, changes)
    before = lock_of(list(pins)).pins
    placed = [change for change in changes if change.path != LOCK_NAME]
    main = pin_files[0] if pin_files and (root / pin_files[0]).is_file() else ""
    new = dict(moved.installed)
    edited: dict[str, str] = {}
    for name in filter(None, pin_files):
        if not moved.empty and (root / name).is_file():
            old = (root / name).read_text("utf-8")
            edited[name], found = edit_pins(old, moved, before)
            new = {n: v for n, v in new.items() if n not in found}
    if main in edited:
        edited[main] += "".join(f"{name}=={version}\n" for name, version in sorted(new.items()))
    for name, text in edited.items():
        if text != (root / name).read_text("utf-8"):
            placed.append(_modified(name, text.encode()))
    if not main:
        placed += [change for change in changes if change.path == LOCK_NAME]
    return tuple(_as_on_disk(root, change) for change in sorted(placed, key=lambda c: c.path))


def edit_pins(
    text: str, moved: LockChange, before: Mapping[str, str]
) -> tuple[str, frozenset[str]]:
    """A requirements file with some pins moved, and the names that it holds; everything else stays
    as it was written.

    A pin of another version than the one `before` is for other systems and stays, too.
    """
    lines, done = [], set()
    rest_of_changed = False
    for line in text.splitlines():
        if rest_of_changed:  # hashes of the old file would refuse the new one
            rest_of_changed = line.rstrip().endswith("\\")
            continue
        found = _LINE.match(line)
        name = normalize(found.group(2)) if found else ""
        if found and _in_force(found, before.get(name, "")):
            rest_of_changed = line.rstrip().endswith("\\") and (
                name in moved.removed or name in moved.installed
            )
            if name in moved.removed:
                continue
            if name in moved.installed:
                done.add(name)
                head = "".join(part or "" for part in found.groups()[:3])
                rest = found.group(6).partition("--hash")[0].rstrip().rstrip("\\").rstrip()
                line = f"{head}{found.group(4) or '=='}{moved.installed[name]}{rest}"
        lines.append(line)
    return "\n".join([*lines, ""]), frozenset(done)


def _in_force(line: re.Match[str], version: str) -> bool:
    """Whether a line speaks of the installed version: any range does, a pin if it is that one."""
    if not line.group(4) or line.group(5).endswith(".*"):
        return True
    try:
        return Version(line.group(5)) == Version(version)
    except InvalidVersion:
        return line.group(5) == version


def unified(root: Path, changes: Iterable[FileChange]) -> str:
    """The changes as one unified diff that `git apply` and `patch -p1` take."""
    return "".join(_diff(root, change) for change in changes)


def unified_from(before: Mapping[str, bytes], changes: Iterable[FileChange]) -> str:
    """`unified`, against files at hand; a path that is not among them is a new file."""
    placed = []
    for change in changes:
        if change.path not in before and change.kind != CHANGE_KIND_DELETE:
            change = FileChange(
                path=change.path, kind=CHANGE_KIND_ADD, content=change.content, mode=change.mode
            )
        if before.get(change.path) != change.content or change.kind == CHANGE_KIND_DELETE:
            placed.append(change)
    return "".join(_difference(change, before.get(change.path, b"")) for change in placed)


def apply(root: Path, changes: Iterable[FileChange]) -> None:
    """Write the changes into the project.

    Raises:
        FailedPrecondition: a path leaves the project or is a link; nothing was written.
    """
    planned = [(change, _target(root, change.path)) for change in changes]
    for change, target in planned:
        if change.kind == CHANGE_KIND_DELETE:
            target.unlink(missing_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(change.content)
        if change.mode and change.kind == CHANGE_KIND_ADD:
            target.chmod(change.mode & 0o777)


def _target(root: Path, path: str) -> Path:
    parts = Path(path).parts
    base = root.resolve()
    target = base / path
    inside = not Path(path).is_absolute() and ".." not in parts and ".git" not in parts
    if not inside or target.is_symlink() or not target.parent.resolve().is_relative_to(base):
        raise FailedPrecondition(f"{path} leads out of the project; apply the patch by hand")
    return target


def _modified(path: str, content: bytes) -> FileChange:
    return FileChange(path=path, kind=CHANGE_KIND_MODIFY, content=content)


def _as_on_disk(root: Path, change: FileChange) -> FileChange:
    """The kind as seen from the disk: the sandbox made files that the project may lack."""
    if change.kind == CHANGE_KIND_DELETE:
        return change
    kind: ChangeKind.ValueType = (
        CHANGE_KIND_MODIFY if (root / change.path).is_file() else CHANGE_KIND_ADD
    )
    return FileChange(path=change.path, kind=kind, content=change.content, mode=change.mode)


def _diff(root: Path, change: FileChange) -> str:
    before = b"" if change.kind == CHANGE_KIND_ADD else _read(root / change.path)
    return _difference(change, before)


def _difference(change: FileChange, before: bytes) -> str:
    path = change.path
    after = b"" if change.kind == CHANGE_KIND_DELETE else change.content
    header = [f"diff --git a/{path} b/{path}"]
    if change.kind == CHANGE_KIND_ADD:
        header.append(f"new file mode 100{'755' if change.mode & 0o111 else '644'}")
    if change.kind == CHANGE_KIND_DELETE:
        header.append("deleted file mode 100644")
    old = "/dev/null" if change.kind == CHANGE_KIND_ADD else f"a/{path}"
    new = "/dev/null" if change.kind == CHANGE_KIND_DELETE else f"b/{path}"
    try:
        left, right = _lines(before.decode("utf-8")), _lines(after.decode("utf-8"))
    except UnicodeDecodeError:
        return "\n".join([*header, f"Binary files {old} and {new} differ", ""])
    lines = list(difflib.unified_diff(left, right, old, new))
    ended = [
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    ]
    return "\n".join([*header, ""]) + "".join(ended)


def _lines(text: str) -> list[str]:
    """Lines with their ends; only a line feed ends one, as for patch."""
    parts = text.split("\n")
    return [f"{part}\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(path.name, str(error), "make it readable") from error
