"""Which other releases a project's environment may move to.

- The last release of a minor series stands for the series; the nearest ones on both sides count.
- Wheels for the interpreter are preferred; a release that must be built is offered only where no
  earlier wheel exists, since old libraries often predate the interpreter's wheels.
- Pre-releases and yanked releases are never offered.
"""

from packaging.version import InvalidVersion, Version

from regreen.pkgindex import PackageIndex, interpreter_tags, python_allowed, wheel_fits

BEFORE, AFTER, BUILT = 5, 5, 2
MAX_BYTES = 24 << 20
"""Larger files are not offered: each offer is fetched before the repair starts."""


async def neighbours(index: PackageIndex, pin: str, python: str) -> list[str]:
    """Releases of `pin`'s package near it, as `name==version`.

    Raises:
        NotFound: the index does not know the package.
        Unavailable: the index cannot be reached.
    """
    name, _, text = pin.partition("==")
    here = Version(text)
    wheels, sources = await _series(index, name, python)
    before = sorted(v for v in wheels.values() if v < here)[-BEFORE:]
    after = sorted(v for v in wheels.values() if v > here)[:AFTER]
    chosen = [*before, *after]
    if not any(v.release[:2] != here.release[:2] for v in before):
        older = sorted(v for key, v in sources.items() if key not in wheels and v < here)
        chosen += older[-BUILT:]
    return [f"{name}=={version}" for version in sorted(chosen)]


async def _series(
    index: PackageIndex, name: str, python: str
) -> tuple[dict[tuple[int, ...], Version], dict[tuple[int, ...], Version]]:
    """The last release of each minor series: with a fitting wheel, and with a source archive."""
    tags = interpreter_tags(python)
    wheels: dict[tuple[int, ...], Version] = {}
    sources: dict[tuple[int, ...], Version] = {}
    for entry in await index.files(name):
        try:
            version = Version(entry.version)
        except InvalidVersion:
            continue
        unfit = version.is_prerelease or entry.yanked or entry.size_bytes > MAX_BYTES
        if unfit or not python_allowed(entry.requires_python, python):
            continue
        if entry.is_wheel and not wheel_fits(entry.filename, tags):
            continue
        found = wheels if entry.is_wheel else sources
        key = version.release[:2]
        found[key] = max(version, found.get(key, version))
    return wheels, sources
