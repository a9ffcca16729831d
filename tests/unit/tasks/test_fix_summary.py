"""How `regreen fix` counts what still fails."""

import pytest

from regreen.fix import _still


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("abc", "ab", "2 of 3 failing tests still fail"),
        ("abc", "abdef", "2 of 3 failing tests still fail, and 3 others"),
        ("a", "d", "0 of 1 failing tests still fail, and 1 other"),
    ],
)
def test_tests_that_passed_before_are_counted_apart(before: str, after: str, said: str) -> None:
    assert _still(set(before), set(after)) == said
