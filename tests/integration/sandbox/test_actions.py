"""Actions over gRPC: run once, answered again, compared, quarantined."""

import asyncio
import contextlib
import os
from collections.abc import Callable

import pytest

from regreen.client.actions import ActionClient
from regreen.client.channel import connect
from regreen.client.sandbox import SandboxClient, StateClient
from regreen.rpc.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from regreen.sandbox import v1 as pb
from sandbox_svc import hosts
from sandbox_svc.__main__ import serving
from sandbox_svc.backends import program
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.service import SandboxHost
from sandbox_svc.settings import SandboxSettings
from tests.integration.sandbox.overlay import OverlayBuilder, prepared

_MARK = "date +%s%N"
"""Prints something else in every run."""


class Place:
    """A running service and its clients."""

    def __init__(self, host, channel):
        self.host = host
        self.actions = ActionClient(channel, patience_s=0.0)
        self.states = StateClient(channel, patience_s=0.0)
        self.sandboxes = SandboxClient(channel, patience_s=0.0)

    async def sh(self, state_id: str, script: str, **options) -> pb.ExecuteResponse:
        """An action that runs a shell script."""
        return await self.actions.execute(state_id, ["/bin/sh", "-c", script], **options)

    async def quarantined(self) -> list[pb.QuarantinedAction]:
        """What is quarantined now."""
        return list((await self.actions.list_quarantined()).actions)


@contextlib.asynccontextmanager
async def running(tmp_path, **options):
    settings = SandboxSettings(
        home=tmp_path / "home", listen=f"unix:{tmp_path}/s", metrics="127.0.0.1:0", drain_s=0.2,
        **{"action_rerun_share": 0.0, **options},
    )  # fmt: skip
    runtime = EmbeddedRuntime(tmp_path / "home" / "sandbox", run_probes=False, warm_seats=1)
    host = SandboxHost(settings, runtime, [OverlayBuilder()])
    async with serving(settings, host) as server, connect(server.address) as channel:
        yield Place(host, channel)


async def until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until something holds; each look lets the service work."""
    async with asyncio.timeout(timeout_s):
        while not await holds():
            pass


def out(response: pb.ExecuteResponse) -> bytes:
    return response.result.stdout.head


async def test_equal_actions_run_once_and_survive_a_restart(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, **{"a.txt": "hello"})).id
        first = await place.sh(state, f"cat a.txt; {_MARK}")
        again = await place.sh(state, f"cat a.txt; {_MARK}")
        assert (first.cached, again.cached) == (False, True)
        assert out(again) == out(first)
        assert out(first).startswith(b"hello")
        assert again.action_sha256 == first.action_sha256
        others = [
            await place.sh(state, _MARK + " "),
            await place.sh(state, f"cat a.txt; {_MARK}", environment={"A": "1"}),
            await place.sh(state, f"cat a.txt; {_MARK}", stdin=b"x"),
            await place.sh(state, f"cat ../repo/a.txt; {_MARK}", cwd="/work/env"),
            await place.sh(state, f"cat a.txt; {_MARK}", limits=pb.Limits(pids=40)),
        ]
        keys = {first.action_sha256, *(other.action_sha256 for other in others)}
        assert len(keys) == 6
        assert not any(other.cached for other in others)
        # Bounds on time do not decide what a command that ended by itself has given.
        assert (await place.sh(state, f"cat a.txt; {_MARK}", timeout_s=7.0)).cached
    async with running(tmp_path) as place:
        kept = await place.sh(state, f"cat a.txt; {_MARK}")
        assert kept.cached
        assert out(kept) == out(first)


async def test_what_another_program_ran_is_not_answered(tmp_path, monkeypatch):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        first = await place.sh(state, _MARK)
    changed = program.spawner(["DUMPABLE"], into=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(program, "spawner", lambda: changed)
        async with running(tmp_path) as place:
            other = await place.sh(state, _MARK)
            assert not other.cached
            assert other.action_sha256 != first.action_sha256
    async with running(tmp_path) as place:
        assert (await place.sh(state, _MARK)).cached


async def test_what_other_programs_of_the_host_gave_is_not_answered(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(hosts, "PROGRAMS", (*hosts.PROGRAMS, str(programs)))
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        await place.sh(state, _MARK)
        assert (await place.sh(state, _MARK)).cached
        (programs / "installed").touch()
        assert not (await place.sh(state, _MARK)).cached


async def test_two_equal_requests_at_once_share_one_run(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        answers = await asyncio.gather(*(place.sh(state, f"sleep 0.3; {_MARK}") for _ in range(5)))
        assert len({out(answer) for answer in answers}) == 1
        assert sorted(answer.cached for answer in answers) == [False, True, True, True, True]
        alone = await asyncio.gather(*(place.sh(state, _MARK, do_not_cache=True) for _ in range(3)))
        assert len({out(answer) for answer in alone}) == 3


async def test_failing_commands_are_kept_but_no_overrun(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        for _ in range(2):
            failed = await place.sh(state, f"{_MARK}; exit 3")
        assert (failed.cached, failed.result.exit_code) == (True, 3)
        missing = [await place.actions.execute(state, ["no-such-program"]) for _ in range(2)]
        assert (missing[1].cached, missing[1].result.exit_code) == (True, 127)
        overruns = {
            pb.END_REASON_TIMEOUT: {"script": "sleep 9", "timeout_s": 0.3},
            pb.END_REASON_OUTPUT: {
                "script": "cat /dev/zero", "limits": pb.Limits(output_bytes=1 << 20),
            },
            pb.END_REASON_DISK: {
                "script": "head -c 30000000 /dev/zero > big; sleep 5",
                "limits": pb.Limits(disk_bytes=4 << 20),
            },
        }  # fmt: skip
        for reason, options in overruns.items():
            found = [await place.sh(state, **options, keep_state=True) for _ in range(2)]
            assert [answer.result.reason for answer in found] == [reason] * 2
            assert not any(answer.cached or answer.HasField("state") for answer in found)


async def test_an_action_that_differs_is_quarantined_for_good(tmp_path):
    async with running(tmp_path, action_rerun_share=1.0) as place:
        state = (await prepared(place.states, a="1")).id
        await place.sh(state, "echo always the same")
        await place.sh(state, _MARK)
        assert (await place.sh(state, "echo always the same")).cached
        hit = await place.sh(state, _MARK)
        assert hit.cached

        async def found():
            return await place.quarantined()

        await until(found)
        (item,) = await place.quarantined()
        assert (item.action_sha256, item.state_id) == (hit.action_sha256, state)
        assert list(item.argv) == ["/bin/sh", "-c", _MARK]
        assert "stdout" in item.detail
        answers = [await place.sh(state, _MARK) for _ in range(2)]
        assert all(answer.quarantined and not answer.cached for answer in answers)
        assert out(answers[0]) != out(answers[1])
        assert (await place.sh(state, "echo always the same")).cached
    async with running(tmp_path) as place:
        assert [i.action_sha256 for i in await place.quarantined()] == [hit.action_sha256]
        assert (await place.sh(state, _MARK)).quarantined
        await place.states.delete_state(state)
        assert await place.quarantined() == []
    assert not list((tmp_path / "home/sandbox/actions/results").iterdir())


_DIFFERS = {
    "random": "head -c 8 /dev/urandom | od -An -tx1",
    "time": _MARK,
    "pid": "echo $$; (sh -c 'echo $PPID' & wait)",
}


async def _hundred(place: Place, state: str, script: str) -> list[pb.ExecuteResponse]:
    return [await place.sh(state, script) for _ in range(100)]


async def test_a_hundred_runs_that_differ_are_flagged_and_no_longer_served(tmp_path):
    async with running(tmp_path, action_rerun_share=1.0) as place:
        state = (await prepared(place.states, a="1")).id
        for name, script in _DIFFERS.items():
            if name == "pid" and not await _differs(place, state, script):
                continue  # numbers begin anew in every sandbox
            await _hundred(place, state, script)  # the first second look comes among them

            async def flagged(script: str = script) -> bool:
                return (await place.sh(state, script)).quarantined

            await until(flagged)
            answers = await asyncio.gather(*(place.sh(state, script) for _ in range(20)))
            assert all(answer.quarantined and not answer.cached for answer in answers), name
            if name != "pid":
                assert len({out(answer) for answer in answers}) == 20


async def _differs(place: Place, state: str, script: str) -> bool:
    runs = [await place.sh(state, script, do_not_cache=True) for _ in range(10)]
    return len({out(run) for run in runs}) > 1


async def test_without_second_looks_a_run_that_differs_is_served_a_hundred_times(tmp_path):
    async with running(tmp_path) as place:  # its share of second looks is 0
        state = (await prepared(place.states, a="1")).id
        for name in ("random", "time"):
            answers = await _hundred(place, state, _DIFFERS[name])
            assert [answer.cached for answer in answers] == [False] + [True] * 99
            assert len({out(answer) for answer in answers}) == 1


_UNREADABLE = {
    "mode": "echo secret > kept; chmod 0 kept; mkdir d; echo x > d/x; chmod 0 d",
    "path": "for i in $(seq 400); do mkdir ddddddddddddddd; cd ddddddddddddddd; done; echo x > f",
}


@pytest.mark.parametrize("name", _UNREADABLE)
async def test_files_that_cannot_be_compared_do_not_cost_the_answer(tmp_path, name):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        script = f"{_UNREADABLE[name]} && echo done"
        answer = await place.sh(state, script, keep_state=True)
        assert (out(answer), answer.result.exit_code) == (b"done\n", 0)
        assert answer.state.parent_id == state
        digest = answer.state.labels["files_sha256"]
        assert digest == "" if name == "path" or os.geteuid() else digest
        box = await place.sandboxes.create_sandbox(answer.state.id)
        seen = await place.sandboxes.run(box.id, ["/bin/sh", "-c", "ls | head -n 3"])
        assert seen.stdout.head == (b"a\nd\nkept\n" if name == "mode" else b"a\nddddddddddddddd\n")
        again = await place.sh(state, script, keep_state=True)
        assert out(again) == b"done\n"
        assert again.state.id
        if digest == "":
            with pytest.raises(FailedPrecondition, match="cannot be exported because of"):
                async for _ in place.states.export_state(answer.state.id):
                    pass


async def test_a_forced_run_is_compared_with_what_is_known(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        await place.sh(state, "echo same")
        forced = await place.sh(state, "echo same", skip_cache_lookup=True)
        assert (forced.cached, forced.quarantined) == (False, False)
        await place.sh(state, "echo $$; exit $(($(date +%N) % 200))")
        await until(lambda: _forced(place, state))


async def _forced(place: Place, state: str) -> bool:
    script = "echo $$; exit $(($(date +%N) % 200))"
    return (await place.sh(state, script, skip_cache_lookup=True)).quarantined


async def test_kept_files_are_a_state_named_by_parent_and_action(tmp_path):
    async with running(tmp_path) as place:
        state = await prepared(place.states, **{"a.txt": "1"})
        plain = await place.sh(state.id, "echo 2 > b.txt")
        assert not plain.HasField("state")
        first = await place.sh(state.id, "echo 2 > b.txt", keep_state=True)
        again = await place.sh(state.id, "echo 2 > b.txt", keep_state=True)
        assert (first.cached, again.cached) == (False, True)
        assert first.state == again.state
        assert first.state.parent_id == state.id
        line = await place.states.get_lineage(first.state.id)
        assert [found.id for found in line] == [state.id, first.state.id]
        forced = await place.sh(state.id, "echo 2 > b.txt", keep_state=True, skip_cache_lookup=True)
        assert (forced.state.id, forced.quarantined) == (first.state.id, False)
        grandchild = await place.sh(first.state.id, "cat b.txt")
        assert out(grandchild) == b"2\n"
        # Gone states are made again under the same name.
        await place.states.delete_state(first.state.id)
        anew = await place.sh(state.id, "echo 2 > b.txt", keep_state=True)
        assert (anew.cached, anew.state.id) == (False, first.state.id)
        # Files that differ between runs are found out, and neither state replaces the other.
        one = await place.sh(state.id, f"{_MARK} > c.txt", keep_state=True)
        two = await place.sh(state.id, f"{_MARK} > c.txt", keep_state=True, skip_cache_lookup=True)
        assert two.quarantined
        assert one.state.id != two.state.id
        texts = {out(await place.sh(one.state.id, "cat c.txt")) for one in (one, two)}
        assert len(texts) == 2
        held = {layer for s in place.host.states.list() for layer in s.layers}
        await place.host.states.collect()
        assert set(await place.host.runtime.layers()) == held


async def test_a_damaged_result_is_a_miss(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        first = await place.sh(state, _MARK)
        path = tmp_path / "home/sandbox/actions/results" / state / first.action_sha256
        for damage in (
            b"",
            path.read_bytes()[:-3],
            path.read_bytes().replace(b'"exit"', b'"oom!"'),
        ):
            path.write_bytes(damage)
            found = await place.sh(state, _MARK)
            assert not found.cached
            assert (await place.sh(state, _MARK)).cached


async def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path):
    async with running(tmp_path, action_cache_bytes=200_000) as place:
        state = (await prepared(place.states, a="1")).id
        big = "head -c 60000 /dev/zero; echo {}"
        for number in range(4):
            await place.sh(state, big.format(number))
            await place.sh(state, big.format(0))
        assert (await place.sh(state, big.format(0))).cached
        assert not (await place.sh(state, big.format(1))).cached
        folder = tmp_path / "home/sandbox/actions/results" / state
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 200_000


async def test_a_rebuilt_state_has_no_old_results(tmp_path):
    async with running(tmp_path) as place:
        state = await prepared(place.states, a="1")
        first = await place.sh(state.id, _MARK)
        from tests.integration.sandbox.overlay import spec

        async for _ in place.states.prepare_state(spec(a="1"), rebuild=True):
            pass
        again = await place.sh(state.id, _MARK)
        assert not again.cached
        assert out(again) != out(first)


async def test_actions_wait_for_a_place_and_are_refused_beyond_the_queue(tmp_path):
    async with running(tmp_path, max_actions=1, max_queued_actions=2) as place:
        state = (await prepared(place.states, a="1")).id
        answers = await asyncio.gather(
            *(place.sh(state, f"sleep 0.5; echo {number}") for number in range(6)),
            return_exceptions=True,
        )
        refused = [answer for answer in answers if isinstance(answer, ResourceExhausted)]
        assert len(refused) == 3
        assert all(error.retry_after_s for error in refused)
        assert sum(isinstance(answer, pb.ExecuteResponse) for answer in answers) == 3


async def test_a_wrong_request_is_refused_by_name(tmp_path):
    async with running(tmp_path) as place:
        state = (await prepared(place.states, a="1")).id
        with pytest.raises(InvalidArgument, match="argv"):
            await place.actions.execute(state, [])
        with pytest.raises(InvalidArgument, match="cwd"):
            await place.actions.execute(state, ["true"], cwd="x")
        with pytest.raises(NotFound):
            await place.actions.execute("st_" + "0" * 32, ["true"])
        with pytest.raises(InvalidArgument, match="page_size"):
            await place.actions.list_quarantined(page_size=-1)
        same = [await place.sh(state, _MARK, request_id="one", do_not_cache=True) for _ in range(2)]
        assert out(same[0]) == out(same[1])
