"""Finds the release that breaks: the last that works and the next one, which does not.

- One break is one task: a jump over several releases may hold several.
- A release that cannot be tried (no wheel, no set with it) is left out, and another is tried.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from packaging.version import InvalidVersion, Version

from regreen.pkgindex import IndexFile, interpreter_tags, python_allowed, wheel_fits

T = TypeVar("T")
MOST_BYTES = 24 << 20


def between(files: Iterable[IndexFile], python: str, good: str, bad: str) -> list[str]:
    """Releases between two that can be installed, oldest first, the two left out."""
    low, high = Version(good), Version(bad)
    tags = interpreter_tags(python)
    found: dict[Version, str] = {}
    for entry in files:
        try:
            version = Version(entry.version)
        except InvalidVersion:
            continue
        unfit = version.is_prerelease or entry.yanked or entry.size_bytes > MOST_BYTES
        if unfit or not low < version < high or not entry.is_wheel:
            continue
        if wheel_fits(entry.filename, tags) and python_allowed(entry.requires_python, python):
            found[version] = entry.version
    return [found[version] for version in sorted(found)]


async def bisect(
    versions: Sequence[str],
    good: T,
    bad: T,
    probe: Callable[[str], Awaitable[tuple[bool, T] | None]],
) -> tuple[T, T]:
    """The adjacent pair at which `probe` turns from fine to broken.

    `probe` tells whether a version is fine and what was seen, or None where it cannot be tried.
    """
    low, high = good, bad
    left = list(versions)
    while left:
        middle = len(left) // 2
        seen = await probe(left[middle])
        if seen is None:
            del left[middle]
        elif seen[0]:
            low, left = seen[1], left[middle + 1 :]
        else:
            high, left = seen[1], left[:middle]
    return low, high


def spread(versions: Sequence[str], most: int) -> list[str]:
    """At most so many of them, evenly."""
    if len(versions) <= most:
        return list(versions)
    return [versions[(2 * n + 1) * len(versions) // (2 * most)] for n in range(most)]


def release_before(files: Iterable[IndexFile], day: str) -> IndexFile | None:
    """The newest final release with a source archive that was there before `day`."""
    best: tuple[Version, IndexFile] | None = None
    for entry in files:
        if entry.is_wheel or entry.yanked or not entry.filename.endswith(".tar.gz"):
            continue
        if not entry.uploaded or entry.uploaded[:10] >= day:
            continue
        try:
            version = Version(entry.version)
        except InvalidVersion:
            continue
        if not version.is_prerelease and (best is None or version > best[0]):
            best = (version, entry)
    return best[1] if best else None
