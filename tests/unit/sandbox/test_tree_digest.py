"""The digest of a layer: what counts, what does not, and that holes cost nothing."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_svc.backends.tree_digest import tree_digest

_MIB = 1 << 20


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory with one file of a size, and bytes at some places of it."""
    numbers = iter(range(1000))

    def made(size: int, *parts: tuple[int, bytes], name: str = "f") -> Path:
        top = tmp_path / str(next(numbers))
        top.mkdir()
        with (top / name).open("wb") as target:
            target.truncate(size)
            for place, data in parts:
                target.seek(place)
                target.write(data)
        return top

    return made


def test_a_hole_is_what_stored_zeros_are(make: Callable[..., Path]) -> None:
    holes = make(8 * _MIB, (5 * _MIB + 7, b"x"))
    stored = make(8 * _MIB, (0, bytes(5 * _MIB + 7) + b"x" + bytes(3 * _MIB - 8)))
    assert (holes / "f").stat().st_blocks < (stored / "f").stat().st_blocks
    assert tree_digest(holes) == tree_digest(stored)
    assert tree_digest(make(8 * _MIB)) == tree_digest(make(8 * _MIB, (0, bytes(8 * _MIB))))


def test_a_terabyte_of_nothing_takes_no_time(make: Callable[..., Path]) -> None:
    top = make(1 << 40, (1 << 39, b"x"))
    began = time.monotonic()
    found = tree_digest(top)
    assert time.monotonic() - began < 1.0
    assert found != tree_digest(make(1 << 40, ((1 << 39) + _MIB, b"x")))


def test_content_place_and_size_count(make: Callable[..., Path]) -> None:
    tops = [
        make(4 * _MIB),
        make(4 * _MIB + 1),
        make(4 * _MIB, (0, b"x")),
        make(4 * _MIB, (0, b"y")),
        make(4 * _MIB, (1, b"x")),
        make(4 * _MIB, (_MIB, b"x")),
        make(4 * _MIB, (2 * _MIB, b"x")),
        make(4 * _MIB, (0, b"x"), (_MIB, b"x")),
        make(4 * _MIB, (4 * _MIB - 1, b"x")),
        make(4 * _MIB, (0, b"x"), name="g"),
        make(0),
    ]
    assert len({tree_digest(top) for top in tops}) == len(tops)


def test_names_modes_and_links_count_and_times_do_not(tmp_path: Path) -> None:
    seen = set()
    for change in (
        lambda top: None,
        lambda top: (top / "a").chmod(0o600),
        lambda top: (top / "l").symlink_to("a"),
        lambda top: (top / "l").symlink_to("b"),
        lambda top: (top / "d").mkdir(),
        lambda top: os.mkfifo(top / "d"),
        lambda top: (top / "a\nb").touch(),
    ):
        top = tmp_path / str(len(seen))
        top.mkdir()
        (top / "a").write_text("x")
        change(top)
        seen.add(tree_digest(top))
        os.utime(top / "a", (1, 1))
        assert tree_digest(top) in seen
    assert len(seen) == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_an_error(make: Callable[..., Path]) -> None:
    top = make(1)
    (top / "f").chmod(0)
    with pytest.raises(PermissionError):
        tree_digest(top)
