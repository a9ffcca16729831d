"""Flattening a chain of layers: the states show the same files, before and after."""

import asyncio
import json
import shutil

import pytest

from sandbox_svc.backends.base import Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.images.store import Images
from sandbox_svc.sandboxes import Manager
from sandbox_svc.states import StateStore
from sandbox_svc.upkeep import Upkeep, UpkeepLimits
from tests.contract.runtimes import sh
from tests.integration.sandbox import images as made
from tests.integration.sandbox.trees import tree

pytestmark = pytest.mark.skipif(
    not shutil.which("python3", path="/usr/bin"), reason="no /usr/bin/python3 inside sandboxes"
)
_ROOT = """
mkdir -p base/deep/er gone/a; echo 1 > base/one; echo 2 > base/two; echo 3 > base/deep/er/three
echo x > gone/a/x; ln base/one base/one-more; ln -s one base/link; echo y > file-to-dir
mkdir dir-to-file && echo z > dir-to-file/z; chmod 640 base/two; mkdir kept && echo k > kept/k
"""
_STEPS = (
    "echo changed >> base/one",
    "rm base/two",
    "rm -rf gone",
    "mkdir gone; echo new > gone/new",
    "rm file-to-dir; mkdir file-to-dir; echo in > file-to-dir/in",
    "rm -rf dir-to-file; echo now a file > dir-to-file",
    "mkdir -p young/old; echo a > young/a; ln young/a young/b; ln -s ../base young/old/up",
    "rm young/b; mkdir young/c; echo c > young/c/c",
    "mv young/c young/d",
    "rm -rf base/deep; mkdir base/deep; chmod 2750 base/deep",
    "touch -d @1000000000.5 base/deep base/one; mkfifo pipe; chmod 1777 young",
    "echo b > base/two; chmod 4711 base/two",
    "rm -rf young/old; echo instead > young/old",
    "rm dir-to-file; mkdir dir-to-file; echo q > dir-to-file/q",
    "python3 -c \"import os; os.setxattr('base/one', 'user.note', b'v')\"",
    "python3 -c \"import os; os.setxattr('kept', 'user.note', b'd')\"; rm kept/k",
    "rm -rf kept; mkdir -p kept/k/k; echo deep > kept/k/k/k",
    "echo f > young/f; ln young/f kept/f; rm young/f",
    "rm pipe; echo after > pipe",
    "rm gone/new; rmdir gone",
)


async def _open(home, **limits):
    runtime = EmbeddedRuntime(home, run_probes=False, warm_seats=1)
    await runtime.start()
    states = StateStore(home, runtime)
    await states.open()
    manager = Manager(runtime, states)
    await manager.start()
    upkeep = Upkeep(states, runtime, manager.stood_on, lambda: 0.0, UpkeepLimits(**limits))
    return runtime, states, manager, upkeep


async def _close(runtime, states, manager, upkeep):
    await upkeep.close()
    await manager.close()
    await states.close()
    await runtime.close()


async def _prepared(runtime, states, script=_ROOT):
    async def build(progress):
        box = await runtime.create([], limits=Limits())
        made = await sh(box, script, cwd="/work/repo")
        assert made.ok, made.stderr.text
        layer = await box.freeze()
        await box.delete()
        return Prepared((layer,), (), {}, {})

    return await states.prepare("0" * 64, build)


async def _chain(manager, root, length):
    """Snapshots of one sandbox, each a step further; ids, and the tree that each showed."""
    sandbox = await manager.create(root.id)
    line = []
    for number in range(length):
        step = _STEPS[number] if number < len(_STEPS) else f"echo {number} > step; rm -f s{number}"
        done = await sh(sandbox.box, f"{step}\necho {number} > last", cwd="/work/repo")
        assert done.ok, (step, done.stderr.text)
        state = await manager.snapshot(sandbox.id)
        line.append(state.id)
    return sandbox, line


async def _trees(manager, ids):
    found = {}
    for state_id in ids:
        async with manager.fresh(state_id) as box:
            found[state_id] = await tree(box, "/work/repo")
    return found


async def test_a_long_chain_becomes_short_and_shows_the_same(tmp_path):
    host = await _open(tmp_path / "home", flatten_layers=20)
    runtime, states, manager, upkeep = host
    root = await _prepared(runtime, states)
    sandbox, line = await _chain(manager, root, 60)
    watched = [line[n] for n in (0, 5, 10, 15, 18, 19, 20, 25, 40, 59)]
    before = await _trees(manager, watched)
    assert len(states.get(line[-1]).layers) == 61
    live = await tree(sandbox.box, "/work/repo")

    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 60.0)
    longest = max(len(state.layers) for state in states.list())
    assert longest <= 22
    assert all(state.layers[0] == root.layers[0] for state in states.list())
    assert await _trees(manager, watched) == before
    assert await tree(sandbox.box, "/work/repo") == live

    # A sandbox that stood on the old layers goes on over the new ones, and its diff is right.
    await sh(sandbox.box, "echo more > more", cwd="/work/repo")
    child = await manager.snapshot(sandbox.id)
    assert len(child.layers) <= 22
    assert child.parent_id == line[-1]
    assert [s.id for s in states.lineage(child.id)] == [root.id, *line, child.id]

    # Without the states between, and the sandbox, the old layers go; the last state is whole.
    for state_id in line[:-1]:
        await manager.delete_state(state_id)
    await manager.delete(sandbox.id)
    await states.collect()
    wanted = {layer for state in states.list() for layer in state.layers}
    assert set(await runtime.layers()) == wanted
    assert (await _trees(manager, [line[-1]]))[line[-1]] == before[line[-1]]

    # And after a restart, too.
    await _close(*host)
    host = await _open(tmp_path / "home", flatten_layers=20)
    assert (await _trees(host[2], [line[-1]]))[line[-1]] == before[line[-1]]
    await _close(*host)


async def test_deleted_names_do_not_show_where_nothing_lies_beneath(tmp_path):
    """A whiteout in a directory that no layer beneath has would be listed as an entry."""
    host = await _open(tmp_path / "home", flatten_layers=2)
    runtime, states, manager, upkeep = host
    root = await _prepared(runtime, states, "mkdir a; echo a > a/a")
    sandbox = await manager.create(root.id)
    for step in ("mkdir b; echo b > b/b; echo c > b/c", "rm b/b a/a", "touch d", "touch e"):
        assert (await sh(sandbox.box, step, cwd="/work/repo")).ok
        last = await manager.snapshot(sandbox.id)
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 30.0)
    assert len(states.get(last.id).layers) <= 4
    async with manager.fresh(last.id) as box:
        listed = await sh(box, "ls a; ls b; rm -r a b && echo removed", cwd="/work/repo")
        assert listed.stdout.text == "c\nremoved\n", listed.stderr.text
    await _close(*host)


async def test_diffs_name_what_changed_across_flattened_layers(tmp_path):
    from sandbox_svc.diffs import diff

    host = await _open(tmp_path / "home", flatten_layers=3)
    runtime, states, manager, upkeep = host
    root = await _prepared(runtime, states, "echo 1 > one; echo 2 > two")
    sandbox = await manager.create(root.id)
    steps = ("echo a > a", "echo b > b", "rm a", "echo 3 > one", "rm two", "echo c > c")
    line = []
    for step in steps:
        assert (await sh(sandbox.box, step, cwd="/work/repo")).ok
        line.append((await manager.snapshot(sandbox.id)).id)

    async def seen(box_id, base):
        found = await diff(manager, box_id, base_state_id=base)
        return {(change.path, change.kind.value) for change in found.changes}

    expected = {base: await seen(sandbox.id, base) for base in (root.id, *line)}
    assert expected[line[0]] == {
        ("a", "delete"), ("b", "add"), ("one", "modify"), ("two", "delete"), ("c", "add"),
    }  # fmt: skip
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 30.0)
    again = await manager.create(line[-1])
    assert again.layers != sandbox.layers
    for base in (root.id, *line):
        assert await seen(again.id, base) == expected[base]
        assert await seen(sandbox.id, base) == expected[base]
    await _close(*host)


async def test_a_sandbox_outlives_the_flattened_states_that_it_stood_on(tmp_path):
    host = await _open(tmp_path / "home", flatten_layers=3)
    runtime, states, manager, upkeep = host
    root = await _prepared(runtime, states, "echo 1 > one")
    sandbox = await manager.create(root.id)
    line = []
    for number in range(5):
        await sh(sandbox.box, f"echo {number} > n{number}", cwd="/work/repo")
        line.append((await manager.snapshot(sandbox.id)).id)
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 30.0)
    await sh(sandbox.box, "echo 5 > n5; rm n0", cwd="/work/repo")
    line.append((await manager.snapshot(sandbox.id)).id)
    assert sandbox.layers == states.get(line[-1]).layers
    for gone in (line[4], line[5]):
        await manager.delete_state(gone)
    await sh(sandbox.box, "echo 6 > n6", cwd="/work/repo")
    assert (await manager.snapshot(sandbox.id)).parent_id == line[3]
    for gone in (state.id for state in states.list() if state.id != root.id):
        await manager.delete_state(gone)
    last = await manager.snapshot(sandbox.id)
    assert last.parent_id == root.id
    async with manager.fresh(last.id) as box:
        listed = await sh(box, "cd /work/repo; ls; cat n6")
        assert listed.stdout.text.split() == ["n1", "n2", "n3", "n4", "n5", "n6", "one", "6"]
    await _close(*host)


async def test_a_lineage_leaves_out_what_was_deleted_and_goes_on(tmp_path):
    host = await _open(tmp_path / "home", flatten_layers=50)
    runtime, states, manager, _ = host
    root = await _prepared(runtime, states, "echo 1 > one")
    sandbox, line = await _chain(manager, root, 4)
    for gone in (line[1], line[2]):
        await manager.delete_state(gone)
    await _close(*host)

    host = runtime, states, manager, _ = await _open(tmp_path / "home", flatten_layers=50)
    assert [s.id for s in states.lineage(line[3])] == [root.id, line[0], line[3]]
    sandbox = await manager.create(line[3])
    child = await manager.snapshot(sandbox.id)
    assert [s.id for s in states.lineage(child.id)] == [root.id, line[0], line[3], child.id]
    await manager.delete_state(root.id)
    assert [s.id for s in states.lineage(child.id)] == [line[0], line[3], child.id]
    assert states.ancestors(child.id) == [root.id, *line]  # deleted ones are known by their ids
    await _close(*host)


async def test_records_that_name_the_parent_alone_have_a_lineage_by_parents(tmp_path):
    host = await _open(tmp_path / "home", flatten_layers=50)
    runtime, states, manager, _ = host
    root = await _prepared(runtime, states, "echo 1 > one")
    _sandbox, line = await _chain(manager, root, 3)
    await _close(*host)
    for path in (tmp_path / "home" / "states").glob("st_*.json"):
        record = json.loads(path.read_bytes())
        del record["ancestors"]
        path.write_text(json.dumps(record))

    host = runtime, states, manager, _ = await _open(tmp_path / "home", flatten_layers=50)
    assert [s.id for s in states.lineage(line[2])] == [root.id, *line]
    child = await manager.snapshot((await manager.create(line[2])).id)
    await manager.delete_state(line[1])
    assert [s.id for s in states.lineage(line[2])] == [line[2]]
    kept = [root.id, line[0], line[2], child.id]
    assert [s.id for s in states.lineage(child.id)] == kept
    await _close(*host)


async def test_a_chain_that_cannot_be_read_is_left_as_it_is(tmp_path, monkeypatch):
    host = await _open(tmp_path / "home", flatten_layers=2)
    runtime, states, manager, upkeep = host
    root = await _prepared(runtime, states, "echo 1 > one")
    sandbox, line = await _chain(manager, root, 0)
    for number in range(4):
        await sh(sandbox.box, f"echo {number} > n", cwd="/work/repo")
        line.append((await manager.snapshot(sandbox.id)).id)
    second = states.get(line[1]).layers[-1]
    await sh(sandbox.box, "true")
    (tmp_path / "home" / "layers" / second).rename(tmp_path / "home" / "layers" / f"{second}x")
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 30.0)
    assert len(states.get(line[-1]).layers) == 5
    assert not list((tmp_path / "home" / "trash").glob("draft-*"))
    (tmp_path / "home" / "layers" / f"{second}x").rename(tmp_path / "home" / "layers" / second)
    async with manager.fresh(line[-1]) as box:
        assert await box.read_file("/work/repo/n", 9) == b"3\n"
    await _close(*host)


async def test_snapshots_of_an_image_are_flattened_over_the_image(tmp_path):
    runtime, states, manager, upkeep = await _open(tmp_path / "home", flatten_layers=4)
    images = Images(states, runtime)

    async def archive():
        yield made.oci(made.system(), made.files(etc__hosts=b"ours", gone=b"1", d__old=b"2"))

    image, _ = await images.import_(archive())
    sandbox = await manager.create(image.id)
    line = []
    for step in (
        "rm /gone /etc/hosts",
        "rm -r /d; mkdir /d; echo 1 > /d/x",
        "rm /bin/ln /d/x; echo 2 > /d/y",
        "mkdir /etc/passwd.d; echo 3 > /etc/passwd.d/z",
        "rm /etc/group",
        "echo 4 > /end",
    ):
        assert (await sh(sandbox.box, step)).ok
        line.append((await manager.snapshot(sandbox.id)).id)

    async def shown() -> list[str]:
        found = []
        for state_id in line:
            async with manager.fresh(state_id) as box:
                done = await sh(box, "ls -R / /etc 2>&1 | cat; cat /etc/hosts; ls -d /usr")
                found.append(done.stdout.text.partition("/proc:")[0] + done.stderr.text)
        return found

    before = await shown()
    await upkeep.start()
    await asyncio.wait_for(upkeep.settled(), 60.0)
    last = states.get(line[-1])
    assert len(last.layers) < len(image.layers) + len(line)
    assert last.layers[: len(image.layers)] == image.layers
    assert last.base == image.base
    assert await shown() == before
    await images.close()
    await _close(runtime, states, manager, upkeep)
