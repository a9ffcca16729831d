"""Who sandboxes may be: what a namespace's mappings and the owner of the settings say."""

import pytest

from sandbox_svc.backends.identity import outside, refusal

HOST = "         0          0 4294967295\n"
RANGE = "0 1000 1\n1 100000 65536\n"
WITH_ROOT = "0 1000 1\n101000 0 65536\n"


@pytest.mark.parametrize(
    ("inside", "mapping", "found"),
    [
        (0, HOST, 0),
        (101_000, HOST, 101_000),
        (0, RANGE, 1000),
        (65_536, RANGE, 165_535),
        (65_537, RANGE, None),
        (101_001, WITH_ROOT, 1),
        (5, "", None),
    ],
)
def test_an_id_is_what_the_mapping_makes_of_it(inside, mapping, found):
    assert outside(inside, mapping) == found


@pytest.mark.parametrize(
    ("user", "group", "users", "groups", "owner", "why"),
    [
        (101_000, 101_000, HOST, HOST, 0, ""),
        (1000, 0, HOST, HOST, 0, ""),
        (1000, 1000, "1000 0 1", "1000 0 1", 1000, "user 1000 here, which is root of the host"),
        (101_000, 101_000, WITH_ROOT, HOST, None, "user 101000 here, which is root of the host"),
        # two namespaces deep: the parent calls it 7, and the settings tell all the same
        (1000, 1000, "1000 7 1", "1000 7 1", 1000, "user 1000 here, which is root of the host"),
        (101_000, 101_000, "0 0 1", HOST, 0, "this user namespace has no user 101000"),
        (101_000, 101_000, HOST, "0 0 1", 0, "this user namespace has no group 101000"),
        (1000, 1000, "1000 7 1", "1000 7 1", None, ""),
    ],
)
def test_who_would_be_root_or_nobody_is_refused(user, group, users, groups, owner, why):
    told = refusal(user, group, users, groups, owner)
    assert why in told
    assert bool(why) == bool(told)
