"""Which patch releases are bug fixes, told from two archives and two runs."""

import pytest

from regreen.mine.bugfix import Change, Pair, compare, hopeless, release_pairs, turned_green
from regreen.mine.candidate import Rejected
from regreen.mine.culprits import bugfix_candidates, in_turn, parse_culprits
from regreen.mine.facts import Run
from regreen.pkgindex import IndexFile

BEFORE = {
    "shop/__init__.py": b"__version__ = '1.0.0'\nfrom shop.cart import Cart\n",
    "shop/cart.py": b"class Cart:\n    def total(self):\n        return 0\n",
    "tests/test_cart.py": b"def test_total():\n    pass\n",
    "setup.py": b"setup(version='1.0.0')\n",
    "CHANGES.txt": b"",
}
AFTER = {
    **BEFORE,
    "shop/__init__.py": b"__version__ = '1.0.1'\nfrom shop.cart import Cart\n",
    "shop/cart.py": b"class Cart:\n    def total(self):\n        return sum(self)\n",
    "tests/test_cart.py": b"def test_total():\n    pass\n\ndef test_sum():\n    pass\n",
    "setup.py": b"setup(version='1.0.1')\n",
    "CHANGES.txt": b"Fixed the total.",
}
A, B, C = (f"tests/test_cart.py::test_{name}" for name in "abc")


MANY = [f"tests/test_a.py::test_{n}" for n in range(50)]


def run(passed=(), failed=()) -> Run:
    return Run(frozenset(passed), frozenset(failed), frozenset({*passed, *failed}))


def test_versions_and_changelogs_are_no_change_of_source() -> None:
    found = compare(BEFORE, AFTER, ["tests"])
    assert found == Change(("shop/cart.py",), ("tests/test_cart.py",), 1, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shop/cart.py": BEFORE["shop/cart.py"]}, "no source differs"),
        ({"tests/test_cart.py": BEFORE["tests/test_cart.py"]}, "no test differs"),
        ({"shop/more.py": b"x = 1\n"}, "files come or go"),
        ({"shop/cart.py": b"x = 1\n" * 300}, "too much differs"),
    ],
)
def test_what_is_no_bug_fix_by_size_or_content(changes, reason) -> None:
    with pytest.raises(Rejected) as caught:
        compare(BEFORE, {**AFTER, **changes}, ["tests"])
    assert caught.value.reason == reason


def test_what_a_fix_turns_green() -> None:
    assert turned_green(run([A], [B]), run([A, B, C])) == {B, C}


@pytest.mark.parametrize(
    ("broken", "fixed", "reason"),
    [
        (run([A], [B]), run([A], [B]), "no test turns green"),
        (run([A]), run([A, B]), "no test fails before"),
        (run([A], [B]), run([B], [A]), "breaks other tests"),
        (run([B], [A, C]), run([A, B], [C]), "too many tests fail"),
        (run([], MANY), run(MANY), "too many tests turn green"),
    ],
)  # fmt: skip
def test_what_is_no_fix(broken, fixed, reason) -> None:
    with pytest.raises(Rejected) as caught:
        turned_green(broken, fixed)
    assert caught.value.reason == reason


def _sdist(version: str, day: str = "2023-05-01", **more) -> IndexFile:
    return IndexFile(f"web-{version}.tar.gz", "", "0" * 64, uploaded=f"{day}T1", **more)


def test_patch_releases_come_first_and_the_newest_of_them() -> None:
    files = [
        _sdist("0.9", "2017-01-01"), _sdist("0.9.1", "2017-02-01"), _sdist("1.0.0", "2018-03-01"),
        _sdist("1.0.1"), _sdist("1.1.0"), _sdist("1.1.1", "2020-01-01"), _sdist("1.1.2rc1"),
        _sdist("1.1.2"), _sdist("1.1.3", yanked=True), _sdist("2.0"),
    ]  # fmt: skip
    found = [
        (p.turn, p.before.version, p.after.version) for p in release_pairs(files, "2022-12-01")
    ]
    assert found == [
        (0, "1.1.1", "1.1.2"), (0, "1.0.0", "1.0.1"),
        (1, "1.1.2", "2.0"), (1, "1.0.1", "1.1.0"),
        (2, "1.1.0", "1.1.1"),
        (3, "0.9.1", "1.0.0"),
    ]  # fmt: skip


def test_of_each_turn_no_more_than_some_pairs() -> None:
    found = release_pairs([_sdist(f"1.0.{n}") for n in range(40)], "2022-12-01")
    assert [pair.after.version for pair in found] == [f"1.0.{n}" for n in range(39, 27, -1)]


def test_kinds_come_in_turn() -> None:
    rows = '{"name": "web", "breaks": [["1", "2024-01-01"]], "dependents": "a b"}\n'
    fixes = bugfix_candidates(parse_culprits(rows))
    assert [c.package for c in fixes] == ["web", "a", "b"]
    assert [c.key for c in bugfix_candidates(parse_culprits(rows), packages=["B"])] == [
        "release-bugfix:b:2022-12-01"
    ]
    mine = bugfix_candidates(parse_culprits(rows), packages=["of.ours", "A"])
    assert [c.package for c in mine] == ["a", "of-ours"], "what is in no list comes too, last"
    assert in_turn(fixes[:1], fixes[1:]) == fixes


@pytest.mark.parametrize(
    ("refused", "turn", "ends"),
    [
        ([("compare", "too much differs")] * 5, 0, False),
        ([("base", "too few tests pass")], 0, False),
        ([("base", "too few tests pass"), ("fix", "no test turns green")], 0, False),
        ([("base", "too few tests pass"), ("base", "does not resolve")], 0, True),
        ([("base", "too few tests pass"), ("base", "does not resolve")], 1, False),
        ([("base", "times out")], 0, True),
        ([("base", "times out")], 2, True),
        ([("screen", "code to compile")], 1, True),
        ([("screen", "no tests in the source archive")], 0, True),
        ([("screen", "no tests in the source archive")], 2, False),
    ],
)
def test_older_releases_are_left_alone_where_newer_ones_tell(refused, turn, ends) -> None:
    tried = Pair(_sdist("1.0.1"), _sdist("1.0.2"), 0)
    pair = Pair(_sdist("1.0.0"), _sdist("1.0.1"), turn)
    assert hopeless(pair, [(tried, Rejected(*one)) for one in refused]) == ends
