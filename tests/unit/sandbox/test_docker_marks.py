"""The names that commands in a container run under."""

from sandbox_svc.backends.docker_marks import COUNT, Marks


def test_a_name_comes_back_only_when_no_process_has_its_group():
    marks = Marks()
    taken = [marks.take() for _ in range(COUNT)]
    assert len({mark.gid for mark in taken} | {mark.user for mark in taken}) == 2 * COUNT
    assert marks.take() is None
    marks.give_back(taken[3], empty=False)
    marks.give_back(taken[5], empty=False)
    assert marks.take() is None
    marks.renew([taken[3].gid, "1000"])
    assert marks.take() is taken[5]
    assert marks.take() is None
    marks.give_back(taken[9], empty=True)
    assert marks.take() is taken[9]


def test_a_name_of_a_container_that_was_left_is_not_taken_back():
    old, new = Marks(), Marks()
    before, now = old.take(), new.take()
    assert before.gid == now.gid
    new.give_back(before, empty=True)
    new.renew([])
    rest = [new.take() for _ in range(COUNT - 1)]
    assert now.gid not in {mark.gid for mark in rest}
    assert new.take() is None
