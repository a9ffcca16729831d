"""The adjacent pair of releases."""

from regreen.mine.bisect import between, bisect, release_before, spread
from regreen.pkgindex import IndexFile


def wheel(version: str, **more) -> IndexFile:
    return IndexFile(f"web-{version}-py3-none-any.whl", "", "0" * 64, **more)


FILES = [
    wheel(v) for v in ("0.9", "1.0", "1.1", "1.2", "2.0rc1", "2.0", "2.1", "3.0")
] + [wheel("1.3", yanked=True), wheel("1.4", requires_python=">=3.99")]  # fmt: skip


def test_releases_that_can_be_installed() -> None:
    assert between(FILES, "3.11", "1.0", "3.0") == ["1.1", "1.2", "2.0", "2.1"]


def test_versions_are_spread_evenly() -> None:
    versions = [str(n) for n in range(100)]
    assert spread(versions, 4) == ["12", "37", "62", "87"]
    assert spread(versions, 100) == versions
    assert spread([], 4) == []


async def test_the_first_bad_release_is_found() -> None:
    tried: list[str] = []

    async def probe(version: str) -> tuple[bool, str]:
        tried.append(version)
        return version < "1.6", version

    versions = [f"1.{n}" for n in range(1, 10)]
    assert await bisect(versions, "1.0", "2.0", probe) == ("1.5", "1.6")
    assert len(tried) <= 4


async def test_releases_that_cannot_be_tried_are_left_out() -> None:
    async def probe(version: str) -> tuple[bool, str] | None:
        return None if version in ("1.4", "1.5", "1.6") else (version < "1.5", version)

    versions = [f"1.{n}" for n in range(1, 10)]
    assert await bisect(versions, "1.0", "2.0", probe) == ("1.3", "1.7")
    assert await bisect([], "1.0", "2.0", probe) == ("1.0", "2.0")


def test_the_release_of_a_day() -> None:
    def sdist(version: str, day: str, **more) -> IndexFile:
        return IndexFile(f"web-{version}.tar.gz", "", "0" * 64, uploaded=f"{day}T10:00:00Z", **more)

    files = [
        sdist("1.0", "2020-01-01"),
        sdist("1.1", "2021-01-01"),
        sdist("1.2", "2021-02-01", yanked=True),
        sdist("2.0b1", "2021-03-01"),
        sdist("0.9.9", "2021-03-02"),
        sdist("2.0", "2022-01-01"),
        wheel("1.9", uploaded="2021-04-01T00:00:00Z"),
    ]
    found = release_before(files, "2022-01-01")
    assert found is not None
    assert found.version == "1.1"
    assert release_before(files, "2019-01-01") is None
