"""The sandbox service over gRPC on port 0, through the typed clients."""

import asyncio
import random
import time

import pytest

from regreen.client.channel import new_request_id
from regreen.common import v1 as common_pb
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from regreen.sandbox import v1 as pb
from sandbox_svc.backends import probe
from sandbox_svc.backends.embedded import EmbeddedRuntime
from tests.integration.sandbox.overlay import OverlayBuilder, prepared, spec


async def test_preparing_is_single_flight_reports_progress_and_is_cached(service):
    states, _, _ = service
    before = OverlayBuilder.builds

    async def all_events() -> list[pb.PrepareStateResponse]:
        return [event async for event in states.prepare_state(spec(a="1", b="2"))]

    one, two = await asyncio.gather(all_events(), all_events())
    assert one[-1].state == two[-1].state
    assert OverlayBuilder.builds == before + 1
    assert "build" in {event.progress.stage for event in one[:-1]}
    assert (await prepared(states, a="1", b="2")).id == one[-1].state.id
    assert OverlayBuilder.builds == before + 1
    state = await states.get_state(one[-1].state.id)
    assert state.python == "3.11"
    assert state.size_bytes > 0


async def test_a_failed_preparation_names_its_field_and_leaves_nothing(service):
    states, _, _ = service
    broken = spec(a="1")
    broken.package = "broken"
    with pytest.raises(InvalidArgument, match=r"spec\.package: is broken; use another"):
        [event async for event in states.prepare_state(broken)]
    unknown = spec()
    unknown.builder = "cobol"
    with pytest.raises(InvalidArgument, match=r"spec\.builder"):
        [event async for event in states.prepare_state(unknown)]
    assert list((await states.list_states()).states) == []


async def test_a_rollouts_life(service):
    states, sandboxes, _ = service
    state = await prepared(states, **{"pkg/a.py": "x = 1\n", "notes.txt": "needle here\n"})
    sandbox = await sandboxes.create_sandbox(state.id, labels={"run": "r1"})
    result = await sandboxes.run(sandbox.id, ["sh", "-c", "cat pkg/a.py; echo $SPEC; exit 4"])
    assert (result.reason, result.exit_code) == (pb.END_REASON_EXIT, 4)
    assert result.stdout.head == b"x = 1\ndemo\n"
    await sandboxes.write_file(sandbox.id, "/work/repo/pkg/a.py", b"x = 2\n")
    await sandboxes.write_file(sandbox.id, "/work/repo/new.sh", b"echo\n", mode=0o755)
    await sandboxes.run(sandbox.id, ["rm", "notes.txt"])
    listed = await sandboxes.list_files(sandbox.id, glob="**/*.py")
    assert [entry.path for entry in listed.files] == ["pkg/a.py"]
    found = await sandboxes.find_text(sandbox.id, "x = 2")
    assert [(m.path, m.line, m.text) for m in found.matches] == [("pkg/a.py", 1, "x = 2")]
    diff = await sandboxes.diff(sandbox.id)
    assert [(c.path, c.kind, c.content, c.mode) for c in diff.changes] == [
        ("new.sh", common_pb.CHANGE_KIND_ADD, b"echo\n", 0o755),
        ("notes.txt", common_pb.CHANGE_KIND_DELETE, b"", 0),
        ("pkg/a.py", common_pb.CHANGE_KIND_MODIFY, b"x = 2\n", 0o644),
    ]
    assert "--- a/pkg/a.py\n+++ b/pkg/a.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n" in diff.unified
    part = await sandboxes.read_file(sandbox.id, "/work/repo/pkg/a.py", offset=4, max_bytes=1)
    assert (part.content, part.size_bytes) == (b"2", 6)
    await sandboxes.delete_sandbox(sandbox.id)
    await sandboxes.delete_sandbox(sandbox.id)
    with pytest.raises(NotFound):
        await sandboxes.run(sandbox.id, ["true"])


_ODD_NAMES = r"""
touch "$(printf 'bad\377name')" "$(printf 'new\nline')" 'back\slash'
n=$(printf %0200d 0); mkdir -p $n/$n; echo long > $n/$n/long
n=$(printf %0250d 0); (for i in $(seq 20); do mkdir $n; cd $n; done; echo deep > deep)
echo locked > locked; chmod 000 locked; mkdir shut; echo s > shut/s; chmod 000 shut
echo good > good
"""


async def test_names_that_cannot_be_judged_are_left_out_and_counted(service):
    states, sandboxes, _ = service
    base = await prepared(states, **{"notes.txt": "x\n"})
    other = await prepared(states, **{"other.txt": "x\n"})
    sandbox = await sandboxes.create_sandbox(base.id)
    await sandboxes.run(sandbox.id, ["sh", "-c", _ODD_NAMES])
    diff = await sandboxes.diff(sandbox.id)
    assert [(c.path, c.content) for c in diff.changes] == [("good", b"good\n")]
    reasons = {change.path: change.reason for change in diff.left_out}
    assert reasons["bad\\xffname"].startswith("a name that is too long")
    assert reasons["locked"] == "a file that its owner may not read"
    assert f"[{diff.left_out_total} changed paths are left out" in diff.unified
    assert f"[locked: {reasons['locked']}]\n" in diff.unified
    unrelated = await sandboxes.diff(sandbox.id, base_state_id=other.id)
    assert {c.path for c in unrelated.changes} == {"good", "notes.txt", "other.txt"}
    assert "bad\ufffdname" in {f.path for f in (await sandboxes.list_files(sandbox.id)).files}


async def test_a_slow_difference_is_named_and_the_service_answers_meanwhile(service):
    states, sandboxes, _ = service
    lines = [f"{number * 7919 % 130}\n" for number in range(2000)]
    state = await prepared(states, **{"big.txt": "".join(lines)})
    sandbox = await sandboxes.create_sandbox(state.id)
    random.Random(7).shuffle(lines)
    await sandboxes.write_file(sandbox.id, "/work/repo/big.txt", "".join(lines).encode())
    began = time.monotonic()
    task = asyncio.create_task(sandboxes.diff(sandbox.id))
    while not task.done():
        asked = time.monotonic()
        await sandboxes.get_sandbox(sandbox.id)
        assert time.monotonic() - asked < 1.0
    assert [change.path for change in (await task).changes] == ["big.txt"]
    assert time.monotonic() - began < 10.0


async def test_a_long_glob_is_refused(service):
    states, sandboxes, _ = service
    sandbox = await sandboxes.create_sandbox((await prepared(states, a="1")).id)
    with pytest.raises(InvalidArgument, match="glob"):
        await sandboxes.list_files(sandbox.id, glob="**/" * 200)
    listed = await sandboxes.list_files(sandbox.id, glob="**/" * 7 + "a")
    assert [entry.path for entry in listed.files] == ["a"]


async def test_forks_snapshots_and_restores_form_a_tree(service):
    states, sandboxes, _ = service
    root = await prepared(states, x="0")
    trunk = await sandboxes.create_sandbox(root.id)
    await sandboxes.write_file(trunk.id, "/work/repo/x", b"1")
    forked = await sandboxes.fork_sandbox(trunk.id, 2, labels={"fork": "yes"})
    assert forked.state.parent_id == root.id
    first, second = forked.sandboxes
    await sandboxes.write_file(first.id, "/work/repo/x", b"2")
    assert (await sandboxes.read_file(second.id, "/work/repo/x")).content == b"1"
    assert (await sandboxes.read_file(trunk.id, "/work/repo/x")).content == b"1"
    snapshot = await sandboxes.snapshot_sandbox(first.id, labels={"note": "n"})
    assert snapshot.parent_id == forked.state.id
    assert list(snapshot.layers[: len(forked.state.layers)]) == list(forked.state.layers)
    changes = (await sandboxes.diff(first.id, base_state_id=root.id)).changes
    assert [change.content for change in changes] == [b"2"]
    unrelated = await prepared(states, x="9", y="9")
    changes = (await sandboxes.diff(first.id, base_state_id=unrelated.id)).changes
    assert [(change.path, change.content) for change in changes] == [("x", b"2"), ("y", b"")]
    restored = await sandboxes.restore_sandbox(first.id, root.id)
    assert restored.state_id == root.id
    assert (await sandboxes.read_file(first.id, "/work/repo/x")).content == b"0"
    with pytest.raises(FailedPrecondition):
        await states.delete_state(root.id)
    listing = await sandboxes.list_sandboxes(labels={"fork": "yes"})
    assert {sandbox.id for sandbox in listing.sandboxes} == {first.id, second.id}
    for sandbox in (trunk, first, second):
        await sandboxes.delete_sandbox(sandbox.id)
    await states.delete_state(root.id)
    await states.delete_state(root.id)
    assert root.id not in {state.id for state in (await states.list_states()).states}


async def test_files_of_an_overlay_in_each_others_way_are_named(service):
    states, _, _ = service
    for paths, field in (
        (("a", "b", "a/c"), "spec.overlay[2].path"),
        (("a/c", "a"), "spec.overlay[1].path"),
        (("ok", "../b"), "spec.overlay[1].path"),
    ):
        overlay = [common_pb.FileChange(path=path, content=b"x", kind=1) for path in paths]
        for builder in ("overlay", "system"):
            with pytest.raises(InvalidArgument) as refused:
                async for _ in states.prepare_state(
                    pb.EnvironmentSpec(builder=builder, overlay=overlay)
                ):
                    pass
            told = refused.value.message
            assert told.startswith(f"{field}: "), told
            assert f"{paths[-1]!r}" in told or f"/{paths[-1]};" in told
            assert told.endswith("or name another path") == (".." not in paths[-1]), told


async def test_an_overlay_deletes_what_it_says_is_deleted(service):
    states, sandboxes, _ = service
    added, deleted = common_pb.CHANGE_KIND_ADD, common_pb.CHANGE_KIND_DELETE
    changes = (("a", added), ("sub/b", added), ("a", deleted), ("never there", deleted))
    overlay = [common_pb.FileChange(path=path, content=b"x", kind=kind) for path, kind in changes]
    for builder in ("overlay", "system"):
        spec = pb.EnvironmentSpec(builder=builder, overlay=overlay)
        events = [event async for event in states.prepare_state(spec)]
        sandbox = await sandboxes.create_sandbox(events[-1].state.id)
        listing = await sandboxes.list_files(sandbox.id, root="/work/repo")
        assert [entry.path.split("/")[-1] for entry in listing.files] == ["sub", "b"], builder
        assert (await sandboxes.read_file(sandbox.id, "/work/repo/sub/b")).content == b"x"
        await sandboxes.delete_sandbox(sandbox.id)
        spec.overlay.add(path="sub", kind=deleted)
        with pytest.raises(
            InvalidArgument, match=r"spec.overlay\[4\].path: 'sub' cannot be deleted"
        ):
            async for _ in states.prepare_state(spec):
                pass


async def test_exec_streams_and_ends_with_the_result(service):
    states, sandboxes, _ = service
    sandbox = await sandboxes.create_sandbox((await prepared(states)).id)
    command = pb.Command(argv=["sh", "-c", "echo out; echo err >&2; exit 7"])
    events = [event async for event in sandboxes.exec(sandbox.id, command)]
    assert b"".join(event.stdout for event in events) == b"out\n"
    assert b"".join(event.stderr for event in events) == b"err\n"
    assert events[-1].ended.exit_code == 7


async def test_dropping_a_stream_kills_its_command(service):
    states, sandboxes, _ = service
    sandbox = await sandboxes.create_sandbox((await prepared(states)).id)
    command = pb.Command(argv=["sh", "-c", "echo up; exec sleep 4321"])
    stream = sandboxes.exec(sandbox.id, command)
    assert (await anext(stream)).stdout == b"up\n"
    await stream.aclose()
    gone = "while grep -q '[s]leep.4321' /proc/[0-9]*/cmdline; do :; done; echo gone"
    result = await sandboxes.run(sandbox.id, ["sh", "-c", gone], timeout_s=20)
    assert result.stdout.head == b"gone\n"


async def test_repeated_requests_are_done_once(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    request_id = new_request_id()
    one = await sandboxes.create_sandbox(state.id, request_id=request_id)
    two = await sandboxes.create_sandbox(state.id, request_id=request_id)
    assert one.id == two.id
    run_id = new_request_id()
    for _ in range(2):
        await sandboxes.run(one.id, ["sh", "-c", "echo x >> n"], request_id=run_id)
    assert (await sandboxes.read_file(one.id, "/work/repo/n")).content == b"x\n"


async def test_a_full_pool_is_refused_with_a_delay(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    held = [await sandboxes.create_sandbox(state.id) for _ in range(4)]
    with pytest.raises(ResourceExhausted) as caught:
        await sandboxes.create_sandbox(state.id)
    assert caught.value.retry_after_s
    with pytest.raises(ResourceExhausted):
        await sandboxes.fork_sandbox(held[0].id, 1)
    assert (await sandboxes.diff(held[0].id)).changes == []


async def test_sandboxes_expire_unless_kept_alive(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    brief = await sandboxes.create_sandbox(state.id, ttl_s=0.3)
    kept = await sandboxes.create_sandbox(state.id, ttl_s=0.3)
    await sandboxes.keep_alive(kept.id, ttl_s=60)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if len((await sandboxes.list_sandboxes()).sandboxes) == 1:
            break
    with pytest.raises(NotFound):
        await sandboxes.get_sandbox(brief.id)
    assert (await sandboxes.get_sandbox(kept.id)).id == kept.id
    with pytest.raises(InvalidArgument, match="ttl"):
        await sandboxes.create_sandbox(state.id, ttl_s=1e9)


async def test_bad_requests_name_the_field(service):
    states, sandboxes, _ = service
    state = await prepared(states)
    sandbox = await sandboxes.create_sandbox(state.id)
    missing = "sbx_" + "0" * 32
    for call, error, text in (
        (sandboxes.create_sandbox("nonsense"), InvalidArgument, "state_id"),
        (sandboxes.create_sandbox("st_" + "0" * 32), NotFound, "no such state"),
        (sandboxes.run(missing, ["true"]), NotFound, "no such sandbox"),
        (sandboxes.run(sandbox.id, []), InvalidArgument, "argv"),
        (sandboxes.run(sandbox.id, ["true"], cwd="rel"), InvalidArgument, "cwd"),
        (sandboxes.read_file(sandbox.id, "rel"), InvalidArgument, "path"),
        (sandboxes.read_file(sandbox.id, "/nope"), NotFound, "no such file"),
        (
            sandboxes.write_file(sandbox.id, "/work/repo/x", bytes(49 << 20)),
            InvalidArgument,
            r"content: 51380224 bytes; give at most 50331648",
        ),
        (
            sandboxes.write_file(sandbox.id, "/work/repo/x", b"x", mode=0o4755),
            InvalidArgument,
            r"mode: is 0o4755; give at most 0o777",
        ),
        (sandboxes.find_text(sandbox.id, ""), InvalidArgument, "text"),
        (sandboxes.list_files(sandbox.id, root="/nope"), NotFound, "no such directory"),
        (sandboxes.list_sandboxes(page_size=-1), InvalidArgument, "page_size"),
        (sandboxes.list_sandboxes(page_token="x"), InvalidArgument, "page_token"),
        (sandboxes.list_sandboxes(page_token="nan_x"), InvalidArgument, "page_token: .*first page"),
        (states.list_states(page_token="nan_x"), InvalidArgument, "page_token: .*first page"),
        (states.list_states(page_token="-inf_x"), InvalidArgument, "page_token: .*first page"),
        (sandboxes.fork_sandbox(sandbox.id, 0), InvalidArgument, "count"),
        (
            sandboxes.fork_sandbox(sandbox.id, 4),
            InvalidArgument,
            r"count: is 4, .* holds 4 sandboxes.*give at most 3, or raise .*max_sandboxes",
        ),
        (
            sandboxes.create_sandbox(state.id, ttl_s=1e9),
            InvalidArgument,
            r"ttl: is 1000000000 s; give 0 to 86400 s",
        ),
        (sandboxes.keep_alive(sandbox.id, ttl_s=-1), InvalidArgument, "ttl: is -1 s; give 0 to"),
        (
            sandboxes.read_file(sandbox.id, "/etc/hosts", offset=-1),
            InvalidArgument,
            "offset: is -1; give 0 or more",
        ),
        (
            sandboxes.run(sandbox.id, ["true"], environment={"a=b": "c"}),
            InvalidArgument,
            "command.environment: .*; name it as a shell would",
        ),
        (
            sandboxes.create_sandbox(state.id, limits=pb.Limits(memory_bytes=1)),
            InvalidArgument,
            "limits.memory_bytes: is 1; give at least 16777216",
        ),
        (sandboxes.list_files(sandbox.id, root="rel"), InvalidArgument, "root: is not an absolute"),
        (sandboxes.create_sandbox(state.id, limits=pb.Limits(pids=-1)), InvalidArgument, "pids"),
    ):
        with pytest.raises(error, match=text):
            await call


async def test_a_file_name_cannot_pose_as_another_path(service):
    states, sandboxes, _ = service
    sandbox = await sandboxes.create_sandbox((await prepared(states, z="needle\n")).id)
    names = ["a:1:b\nc", "z\n", "\n\n./z", "d\n./z"]
    made = "import os,sys;[os.makedirs(os.path.dirname(n) or '.',exist_ok=True) or "
    made += "open(n,'w').write('no\\nneedle\\n') for n in sys.argv[1:]]"
    done = await sandboxes.run(sandbox.id, ["python3", "-c", made, *names])
    assert done.exit_code == 0, done.stderr.head
    found = await sandboxes.find_text(sandbox.id, "needle")
    seen = sorted((match.path, match.line, match.text) for match in found.matches)
    assert seen == sorted([("z", 1, "needle"), *((name, 2, "needle") for name in names)])


async def test_lists_are_paged(service):
    states, _, _ = service
    made = [(await prepared(states, n=str(number))).id for number in range(3)]
    first = await states.list_states(page_size=2)
    rest = await states.list_states(page_size=2, page_token=first.next_page_token)
    assert [state.id for state in (*first.states, *rest.states)] == made
    assert rest.next_page_token == ""
    assert [s.id for s in (await states.list_states(parent_id=made[0])).states] == []


async def test_capabilities_and_metrics_tell_the_truth(service):
    import urllib.request

    states, sandboxes, server = service
    answer = await sandboxes.get_capabilities()
    assert answer.runtime == "embedded"
    assert list(answer.capabilities) == []
    sandbox = await sandboxes.create_sandbox((await prepared(states)).id)
    await sandboxes.run(sandbox.id, ["true"])
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "regreen_sandbox_active 1.0" in text
    assert 'regreen_sandbox_exec_seconds_count{reason="exit"}' in text


async def test_probes_prove_the_limits_of_this_host(tmp_path):
    runtime = EmbeddedRuntime(tmp_path / "home")
    await runtime.start()
    found = {c.name: c for c in runtime.capabilities()}
    await runtime.close()
    always = {"wall_time", "pids", "memory", "disk", "output", "no_capabilities", "no_new_privs"}
    always |= {"inodes", "syscall_filter", "no_network", "host_read_only", "no_nested_namespaces"}
    always |= {"own_programs"}
    assert not [found[name] for name in always if not found[name].proven]
    assert not found["inotify"].proven


async def test_probes_prove_nothing_where_no_limit_acts(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_TIGHT", probe._WIDE)
    monkeypatch.setattr(probe, "_FEW_FILES", probe._WIDE)
    runtime = EmbeddedRuntime(tmp_path / "home")
    await runtime.start()
    proven = {c.name for c in runtime.capabilities() if c.proven}
    await runtime.close()
    assert proven & {"pids", "memory", "memfd", "disk", "inodes", "output", "cpu"} == set()


async def test_probes_prove_nothing_where_the_scripts_cannot_run(tmp_path, monkeypatch):
    for script in ("_FORKS", "_MEMORY", "MEMFD", "SHARED", "_DISK", "_FILES", "_FLOOD", "_LOOK"):
        monkeypatch.setattr(probe, script, "no-such-program")
    runtime = EmbeddedRuntime(tmp_path / "home")
    await runtime.start()
    proven = {c.name for c in runtime.capabilities() if c.proven}
    await runtime.close()
    assert proven <= {"wall_time", "cpu", "own_programs", "own_devices"}
