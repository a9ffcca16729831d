"""What a State's verdicts stand on: its test files, and where Python looks for what they import.

- Learned at preparation, from the files of the repository and from the run of its untouched tests.
- A test in a file that a fix may change, a doctest of a module, decides nothing: it could be
  edited away. A spec that asks for one is refused.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regreen.lockfile import normalize
from regreen.rpc.errors import InfraError, InvalidArgument
from regreen.testpaths import CONFTEST
from sandbox_svc.backends.base import Box, Command
from sandbox_svc.builders.base import REPO
from sandbox_svc.builders.modules import (
    CODE,
    SOURCE_FOLDERS,
    folders_of,
    given,
    module_of,
    top_modules,
)
from sandbox_svc.builders.protect import EXACTLY, by_name, plain_path

_LISTING_BYTES = 64 << 20
_SHOWN = 3
_USUAL = ("", *SOURCE_FOLDERS)


@dataclass(frozen=True, slots=True)
class Where:
    """Where the untouched run has its tests from, as the runner told it."""

    places: tuple[str, ...] = ()
    """Its path of modules."""
    files: tuple[str, ...] = ()
    """Files of tests, those that could not be collected too."""
    others: tuple[tuple[str, str], ...] = ()
    """What else was collected of a module, a doctest for example: id and file."""
    roots: tuple[str, ...] = ()
    """What pytest was told to look through, by arguments or settings."""
    plugins: tuple[str, ...] = ()
    """Files of plugins that it loaded by name, not as part of an installed package."""
    rewritten: tuple[str, ...] = ()
    """Names of files that pytest loads itself, from their source."""
    rootdir: str = ""
    """What ids are relative to."""
    whole: bool = False
    """Whether it came to the end of collecting."""


async def module_files(box: Box) -> list[str]:
    """Paths in the repository that could be imported.

    Raises:
        InvalidArgument: there are more than anyone can keep.
        InfraError: the listing cannot be had.
    """
    either = " -o ".join(f"-name '*{suffix}'" for suffix in CODE)
    find = rf"find . -name .git -prune -o \( -type l -o {either} \) -printf '%P\0'"
    command = Command(("sh", "-c", find), cwd=REPO, output_bytes=_LISTING_BYTES)
    listing = await box.run(command)
    if listing.stdout.truncated:
        raise InvalidArgument("spec.source", "has too many files", "leave some out")
    if not listing.ok:
        raise InfraError(f"modules cannot be listed: {listing.stderr.text[-500:]}")
    return sorted(path for path in listing.stdout.text.split("\0") if path)


def own_modules(
    files: Iterable[str], foreign: Collection[str], places: Iterable[str] = _USUAL
) -> set[str]:
    """Paths of the top-level modules of a repository, in the places where Python usually looks."""
    held = tuple(files)
    return {
        f"{place}/{name}" if place else name
        for place in places
        for name in top_modules(place, held, foreign)
    }


def own_names(files: Iterable[str]) -> set[str]:
    """All its modules by their whole names, from each of those places."""
    held = tuple(files)
    starts = ("", *(f"{folder}/" for folder in SOURCE_FOLDERS))
    inside = (path[len(start) :] for start in starts for path in held if path.startswith(start))
    return set(map(module_of, inside)) - {""}


def learned(facts: Mapping[str, Any], where: Where, files: Iterable[str]) -> dict[str, Any]:
    """The facts, with what its files and the untouched run say of a State's tests."""
    held = frozenset(files)
    told = (*filter(None, map(inside, where.files)), *_of_tests(where.roots, held))
    # of a repository that breaks before it has collected, the run tells nothing
    asked = frozenset(facts["spec"]["test"]["fail_to_pass"])
    unseen = {
        id for id in asked if file_of(id) not in {file_of(other) for other, _ in where.others}
    }
    examples = {id for id in unseen if _is_example(id)}
    wanted = {path for id in unseen - examples for path in _files_of(id, held)}
    asked_for = {root for root in facts["protected"] if not _is_source(root, facts["spec"])}
    named = frozenset((*asked_for, *told, *wanted))
    tests = [
        path
        for path in {*held, *named}
        if path.endswith(".py") and by_name(path, named) in ("test", "validation-configuration")
    ]
    folders = {path.rpartition("/")[0] for path in tests} - {""}
    twins = {EXACTLY + twin for folder in folders for twin in _twins(folder, held)}
    twins |= {EXACTLY + f for path in tests if (f := _above(path, held)) not in held}
    own_places = {place for place in map(inside, where.places) if place}
    modules = own_modules(held, frozenset(facts["foreign"]), own_places)
    plugins = filter(None, map(inside, where.plugins))
    protected = frozenset((*named, *twins, *plugins))
    others = [(id, inside(path)) for id, path in where.others]
    others += [(id, file_of(id)) for id in examples]
    loose = {id for id, path in others if path and not by_name(path, protected)}
    return {
        **facts,
        "protected": sorted(protected),
        "modules": sorted({*facts["modules"], *modules}),
        "places": sorted({*where.places}),
        "folders": sorted(folders),
        "stems": sorted(
            _stems(tests, folders, held, protected, own_places if where.whole else None)
        ),
        "files": sorted(filter(None, map(inside, where.files))),
        "rewritten": list(where.rewritten),
        "loose": sorted(loose),
    }


def file_of(id: str) -> str:
    """The file that the id of a test names."""
    return id.partition("::")[0]


def _files_of(id: str, held: frozenset[str]) -> Iterable[str]:
    """The file of an id; where it is not there, ids may be relative to another folder."""
    path = file_of(id)
    if path in held or not path:
        return [path] if path else []
    return [path, *(other for other in held if other.endswith("/" + path))]


def is_loose(id: str, loose: Collection[str]) -> bool:
    """Whether a fix may edit a test away; of a module that cannot be read all are like it."""
    return id in loose or file_of(id) in loose


def refuse_loose(ids: Iterable[str], facts: Mapping[str, Any], field: str) -> None:
    """Refuse to require a test that a fix may edit away.

    Raises:
        InvalidArgument: names the tests.
    """
    loose = frozenset(facts["loose"])
    found = sorted(id for id in ids if is_loose(id, loose))
    if found:
        shown = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        raise InvalidArgument(
            field,
            f"names tests in files that a fix may change: {shown}",
            "leave them out, or name the files in test.protected_paths",
        )


def _is_example(id: str) -> bool:
    """Whether an id is a doctest's in a module: it has the module's whole name, with its points."""
    file, _, name = id.partition("::")
    return file.endswith(".py") and "::" not in name and "." in name.partition("[")[0]


def _is_source(root: str, spec: Mapping[str, Any]) -> bool:
    """Whether a folder that arguments name is the project's own package, with tests beside code."""
    own = normalize(root.rpartition("/")[2]) == normalize(spec["package"])
    return (own or root in SOURCE_FOLDERS) and root not in map(
        plain_path, spec["test"]["protected_paths"]
    )


def _above(path: str, held: frozenset[str]) -> str:
    """What would make the folder around the package of a test one too, and name the test anew."""
    folder = path.rpartition("/")[0]
    while folder and f"{folder}/__init__.py" in held:
        folder = folder.rpartition("/")[0]
    return f"{folder}/__init__.py" if folder else "__init__.py"


def inside(path: str) -> str | None:
    """A path relative to the repository; None outside of it."""
    if path == REPO:
        return ""
    return path[len(REPO) + 1 :] if path.startswith(REPO + "/") else None


def _of_tests(roots: Iterable[str], held: frozenset[str]) -> Iterable[str]:
    """Folders that settings name for tests: those that are no package of the project's."""
    for root in filter(None, map(inside, roots)):
        if f"{root}/__init__.py" not in held and root not in SOURCE_FOLDERS:
            yield root


def _is_bare(folder: str, held: frozenset[str], places: Collection[str] | None) -> bool:
    return places is None or folder in places or f"{folder}/__init__.py" not in held


def _twins(folder: str, held: frozenset[str]) -> Iterable[str]:
    """What would stand for a folder of tests that is no package."""
    made = {f"{folder}/__init__.py", f"{folder}.py"}
    return () if made & held else made


def _stems(
    tests: list[str],
    folders: set[str],
    held: frozenset[str],
    roots: frozenset[str],
    places: Collection[str] | None,
) -> set[str]:
    """Names by which tests and what lies beside them are imported.

    In a package only where it is a place of modules too; `places` is None where that is not known.
    """
    names = {CONFTEST.partition(".")[0]}
    names |= {found[1] for found in map(given, tests) if found and _is_bare(found[0], held, places)}
    around = {outer for folder in folders for outer in (folder, *folders_of(folder))} - {""}
    bare = {folder for folder in folders if f"{folder}/__init__.py" not in held}
    mine = bare | {folder for folder in around if by_name(f"{folder}/x", roots)}
    return names | {folder.rpartition("/")[2] for folder in mine}
