"""The curated list, and where it says to look."""

from datetime import date

from regreen.lockfile import normalize
from regreen.mine.culprits import EARLIEST, parse_culprits, shipped_culprits, upgrade_candidates

LIST = """
{"name": "Web.Kit", "breaks": [["2.0", "2020-01-01", "x"], ["3.0", "2023-06-01"]], \
"dependents": "one two"}
{"name": "db", "breaks": [["1.4", "2023-08-01"], ["2.0", "2025-01-01"]], "dependents": "two"}
"""


def test_the_list_that_ships_is_in_order() -> None:
    found = shipped_culprits()
    assert len(found) >= 60
    assert len({culprit.name for culprit in found}) == len(found)
    for culprit in found:
        assert culprit.breaks, culprit.name
        assert culprit.dependents, culprit.name
        assert culprit.name not in culprit.dependents
        names = [*culprit.dependents, culprit.name]
        assert names == [normalize(name) for name in names]
        assert len(set(culprit.dependents)) == len(culprit.dependents)


def test_a_package_is_looked_at_on_days_that_are_apart() -> None:
    found = upgrade_candidates(parse_culprits(LIST))
    assert [(c.package, c.day) for c in found] == [
        ("one", date(2023, 6, 1)),
        ("two", date(2023, 6, 1)),
        ("two", date(2025, 1, 1)),
    ]


def test_what_breaks_next_is_known_by_day() -> None:
    one, first, second = upgrade_candidates(parse_culprits(LIST))
    assert one.hints == (("web-kit", "3.0"),)
    assert first.hints == (("web-kit", "3.0"), ("db", "1.4"))
    assert second.hints == (("db", "2.0"),)


def test_what_only_broke_long_ago_is_looked_at_on_the_earliest_day() -> None:
    row = '{"name": "a", "breaks": [["1", "2020-01-01"], ["2", "2021-01-01"]], "dependents": "p"}'
    (found,) = upgrade_candidates(parse_culprits(row))
    assert (found.day, found.hints) == (EARLIEST, (("a", "1"),))


def test_what_a_wide_break_is_ahead_of_comes_first() -> None:
    rows = """
{"name": "a", "breaks": [["1", "2024-01-01"]], "dependents": "p q"}
{"name": "b", "wide": ["2"], "breaks": [["1", "2023-05-01"], ["2", "2024-06-01"]], \
"dependents": "q"}
"""
    found = upgrade_candidates(parse_culprits(rows))
    assert [(c.package, c.day, c.hints) for c in found] == [
        ("q", date(2024, 6, 1), (("b", "2"),)),
        ("q", date(2023, 5, 1), (("b", "2"), ("a", "1"))),
        ("p", date(2024, 1, 1), (("a", "1"),)),
    ]


def test_only_the_packages_that_are_asked_for() -> None:
    assert {c.package for c in upgrade_candidates(parse_culprits(LIST), packages=["Two"])} == {
        "two"
    }


def test_each_culprit_in_turn() -> None:
    rows = "".join(
        f'{{"name": "{name}", "breaks": [["1", "2024-01-01"]], "dependents": "{others}"}}\n'
        for name, others in (("a", "p1 p2 p3"), ("b", "q1 q2"))
    )
    found = [c.package for c in upgrade_candidates(parse_culprits(rows))]
    assert found == ["p1", "q1", "p2", "q2", "p3"]
