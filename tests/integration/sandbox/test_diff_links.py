"""A diff follows no link, names what it leaves out, and is applied through no link."""

import pytest

from regreen.common.v1 import CHANGE_KIND_ADD, CHANGE_KIND_DELETE, CHANGE_KIND_MODIFY
from sandbox_svc.backends.base import Command, Limits, NotAFile, Odd
from sandbox_svc.builders.base import FileChange
from sandbox_svc.plans import apply
from sandbox_svc.verdicts import Plan, ValidationOptions
from tests.integration.sandbox.overlay import prepared
from tests.integration.sandbox.test_actions import running

_LINK, _OTHER, _EMPTY = "a symbolic link", "a pipe, a socket or a device", "an empty directory"
_MAKES = r"""
ln -s a rel; ln -s /etc/passwd abs; ln -s nowhere dangling; mkdir d; ln -s d dl; mkfifo p
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("s")'
ln a hard; mkdir -p e/mpty full; echo x > full/x; rm -r gone; ln -s /etc gone
rm link; echo now > link; rm -r was; ln -s a was; echo "$(printf 'bad\377')" > "$(printf 'bad\377')"
ln -sfn b moved; rm unlinked; touch -h same; mkdir __pycache__; ln -s a __pycache__/l
"""


async def _base(place) -> str:
    """A State with files, links and a directory."""
    files = {"a": "a", "gone/passwd": "mine", "was": "a file"}
    state = (await prepared(place.states, **files)).id
    box = (await place.sandboxes.create_sandbox(state)).id
    links = "ln -s a link; ln -s a moved; ln -s a unlinked; ln -s a same"
    await place.sandboxes.run(box, ["sh", "-c", links])
    return (await place.sandboxes.snapshot_sandbox(box)).id


async def test_a_diff_follows_no_link_and_names_what_it_leaves_out(tmp_path):
    async with running(tmp_path) as place:
        base = await _base(place)
        box = (await place.sandboxes.create_sandbox(base)).id
        done = await place.sandboxes.run(box, ["sh", "-ec", _MAKES])
        assert done.exit_code == 0, done.stderr.head
        for again in range(2):  # the same from the upper and from a layer
            found = await place.sandboxes.diff(box, base_state_id=base)
            told = {change.path: (change.kind, change.content) for change in found.changes}
            assert told == {
                "full/x": (CHANGE_KIND_ADD, b"x\n"),
                "gone/passwd": (CHANGE_KIND_DELETE, b""),
                "hard": (CHANGE_KIND_ADD, b"a"),
                "link": (CHANGE_KIND_ADD, b"now\n"),
                "was": (CHANGE_KIND_DELETE, b""),
            }
            left = {change.path: change.reason for change in found.left_out}
            assert {path for path in left if path.startswith("bad")} == {"bad\\xff"}
            del left["bad\\xff"]
            assert left == {
                "abs": _LINK, "d": _EMPTY, "dangling": _LINK, "dl": _LINK, "e/mpty": _EMPTY,
                "gone": _LINK, "link": f"{_LINK} that is gone", "moved": _LINK, "p": _OTHER,
                "rel": _LINK, "s": _OTHER, "unlinked": f"{_LINK} that is gone", "was": _LINK,
            }  # fmt: skip
            assert found.left_out_total == len(found.left_out) == 14
            assert "[14 changed paths are left out" in found.unified
            assert "[abs: a symbolic link]\n" in found.unified
            assert "root:" not in found.unified
            if not again:
                await place.sandboxes.snapshot_sandbox(box)


async def test_a_folder_in_place_of_a_file_is_told_and_applied(tmp_path):
    async with running(tmp_path) as place:
        base = (await prepared(place.states, a="a", b="b")).id
        box = (await place.sandboxes.create_sandbox(base)).id
        made = "rm a b; mkdir a b; echo x > a/x"
        assert (await place.sandboxes.run(box, ["sh", "-ec", made])).exit_code == 0
        for again in range(2):  # the same from the upper and from a layer
            found = await place.sandboxes.diff(box, base_state_id=base)
            told = {change.path: change.kind for change in found.changes}
            assert told == {
                "a": CHANGE_KIND_DELETE, "a/x": CHANGE_KIND_ADD, "b": CHANGE_KIND_DELETE
            }  # fmt: skip
            if not again:
                await place.sandboxes.snapshot_sandbox(box)
        changes = tuple(
            FileChange(c.path, None if c.kind == CHANGE_KIND_DELETE else c.content)
            for c in found.changes
        )
        known = place.host.states.get(base)
        fork = await place.host.runtime.create(known.layers, limits=Limits())
        try:
            await apply(Plan(known, changes, (), None, ValidationOptions(), ""), fork)
            assert await fork.read_file("/work/repo/a/x", 10) == b"x\n"
        finally:
            await fork.delete()


async def test_states_that_share_nothing_are_compared_alike(tmp_path):
    async with running(tmp_path) as place:
        other = (await prepared(place.states, a="other", b="b")).id
        base = await _base(place)
        box = (await place.sandboxes.create_sandbox(base)).id
        await place.sandboxes.run(box, ["sh", "-c", "mkdir empty; mkfifo p"])
        found = await place.sandboxes.diff(box, base_state_id=other)
        told = {change.path: change.kind for change in found.changes}
        assert told == {
            "a": CHANGE_KIND_MODIFY, "b": CHANGE_KIND_DELETE,
            "gone/passwd": CHANGE_KIND_ADD, "was": CHANGE_KIND_ADD,
        }  # fmt: skip
        left = {change.path: change.reason for change in found.left_out}
        assert left == {
            **dict.fromkeys(("link", "moved", "unlinked", "same"), _LINK),
            "empty": _EMPTY, "p": _OTHER,
        }  # fmt: skip


async def test_a_diff_is_applied_through_no_link(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="a", **{"tests/t.py": "test"})).id
        box = (await place.sandboxes.create_sandbox(state)).id
        links = "ln -s tests/t.py code.py; ln -s tests t; ln -s a gone"
        await place.sandboxes.run(box, ["sh", "-c", links])
        frozen = await place.sandboxes.snapshot_sandbox(box)
        changes = (
            FileChange("code.py", b"replaced"),
            FileChange("t/t.py", b"hostile"),
            FileChange("t/new/x.py", b"hostile"),
            FileChange("gone", None),
            FileChange("new/y.py", b"made", 0o755),
        )
        known = place.host.states.get(frozen.id)
        plan = Plan(known, changes, (), None, ValidationOptions(), "")
        fork = await place.host.runtime.create(known.layers, limits=Limits())
        try:
            done = await apply(plan, fork)
            assert {change.path for change in done.changes} == {"code.py", "gone", "new/y.py"}
            assert {r.path: r.reason.partition(":")[0] for r in done.reverted} == {
                "t/t.py": "unwritable", "t/new/x.py": "unwritable",
            }  # fmt: skip
            assert await fork.read_file("/work/repo/tests/t.py", 100) == b"test"
            assert await fork.read_file("/work/repo/a", 100) == b"a"
            assert await fork.read_file("/work/repo/code.py", 100) == b"replaced"
            script = "ls tests; ls; stat -c %a new/y.py; readlink code.py"
            listed = await fork.run(Command(("sh", "-c", script)))
            assert listed.stdout.text.split() == [
                "t.py",
                "a",
                "code.py",
                "new",
                "t",
                "tests",
                "755",
            ]
            through = FileChange("t/t.py", None)
            await apply(Plan(known, (through,), (), None, ValidationOptions(), ""), fork)
            assert await fork.read_file("/work/repo/tests/t.py", 100) == b"test"
        finally:
            await fork.delete()


@pytest.mark.parametrize("target", ["/etc/passwd", "x" * 3000, "".join(map(chr, range(1, 127)))])
async def test_a_link_is_read_as_what_it_says(tmp_path, target):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="a")).id
        box = (await place.sandboxes.create_sandbox(state)).id
        inner = place.host.manager.get(box).box
        await inner.run(Command(("ln", "-s", "--", target, "l")))
        with pytest.raises(NotAFile) as caught:
            await inner.read_range("/work/repo/l", max_bytes=10, follow=False)
        assert (caught.value.kind, caught.value.target) == (Odd.LINK, target)
