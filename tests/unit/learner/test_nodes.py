"""A run over two machines: the second shares nothing but the home, and has a network of its own
where one can be made."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from learner_svc.checkpoint import load_manifest
from learner_svc.launch import CALL, Call, environment
from learner_svc.link import Link, LinkEnded, Machines, listener
from learner_svc.node import Node
from learner_svc.process import MachineAway, WorkerProcess
from learner_svc.session import Session
from learner_svc.settings import LearnerSettings
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.batch import Batch
from regreen.client.learner import LearnerClient
from regreen.learner import v1 as pb
from tests.load.network import HERE, Network
from tests.unit.learner.test_service import learner

Make = Callable[..., Batch]
RATE = pb.Hyperparameters(learning_rate=1e-3, micro_batch_tokens=150)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def in_place(*command: str) -> tuple[str, ...]:
    """A command as it is."""
    return command


@pytest.fixture
def second() -> Iterator[tuple[str, Callable[..., tuple[str, ...]]]]:
    """The address of the first machine, and how a command runs on the second."""
    try:
        with Network() as network:
            yield HERE, network.there
            return
    except (OSError, subprocess.CalledProcessError) as reason:
        sys.stderr.write(f"both machines in one network namespace: {reason}\n")
    yield "127.0.0.1", in_place


def test_the_second_machine_of_these_tests_has_a_network_of_its_own(
    second: tuple[str, Callable[..., tuple[str, ...]]],
) -> None:
    address, there = second
    if address != HERE:
        pytest.skip("no second network namespace can be made: the machines share one")
    told = [
        subprocess.run([*run("readlink", "/proc/self/ns/net")], capture_output=True, check=True)
        for run in (in_place, there)
    ]
    assert told[0].stdout != told[1].stdout


@asynccontextmanager
async def follower(
    home: Path, there: Callable[..., tuple[str, ...]]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The ranks of a second machine."""
    process = await asyncio.create_subprocess_exec(
        *there(sys.executable, "-m", "learner_svc.node", f"--home={home}", "--follower=0")
    )
    try:
        yield process
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 128 + signal.SIGTERM


async def start(client: LearnerClient, model: Path) -> pb.LearnerRun:
    return await client.start_run(
        "run_n", pb.RUN_KIND_GRPO, str(model), engine="deepspeed", hyperparameters=RATE
    )


@pytest.mark.slow
@pytest.mark.timeout(600)  # DeepSpeed is started twice
async def test_a_rank_of_another_machine_matches_one_process_and_may_be_lost(
    tiny_model: Path,
    make_batch: Make,
    tmp_path: Path,
    second: tuple[str, Callable[..., tuple[str, ...]]],
) -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    spec = RunSpec(
        "run_n",
        RunKind.GRPO,
        str(tiny_model),
        "plain",
        Hyperparameters(learning_rate=1e-3, micro_batch_tokens=150),
    )
    session = Session(spec, tmp_path / "extensions")
    expected = [session.step(batch, (), lambda done, total: None)["loss"] for batch in batches]
    home = tmp_path / "home"
    address, there = second
    async with (
        follower(home, there) as other,
        learner(home, processes=1, nodes=2, address=address) as (client, _),
    ):
        await start(client, tiny_model)
        (rank,) = children(other.pid)
        apart = os.readlink(f"/proc/{rank}/ns/net") != os.readlink("/proc/self/ns/net")
        assert apart == (address == HERE)
        variables = Path(f"/proc/{rank}/environ").read_bytes().split(b"\0")
        assert {b"RANK=1", b"LOCAL_RANK=0", b"WORLD_SIZE=2"} <= set(variables)
        losses = []
        for index, batch in enumerate(batches[:2]):
            done = await client.step("run_n", index + 1, batch=batch.to_bytes())
            losses.append(done.metrics["loss"])
        saved = await client.save_checkpoint("run_n")
        assert load_manifest(Path(saved.uri)).state_format == "adamw"
        os.kill(rank, signal.SIGKILL)
        done = await client.step("run_n", 3, batch=batches[2].to_bytes())
        losses.append(done.metrics["loss"])
        (again,) = children(other.pid)
        assert again != rank
        assert (await client.get_run("run_n")).restarts == 1
        assert losses == pytest.approx(expected, rel=1e-3, abs=1e-6)
        await client.stop_run("run_n")
        assert not (home / "learner" / CALL).exists()
        async with asyncio.timeout(30):
            while children(other.pid):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


def test_ranks_are_numbered_by_machine() -> None:
    call = Call.make("learner", 29500, processes=4, nodes=3)
    assert [list(call.ranks(node)) for node in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    found = environment({}, call, 9)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [found[name] for name in names] == ["9", "1", "12", "learner", "29500"]


def test_ranks_talk_over_the_interface_that_leads_to_rank_0() -> None:
    near = Call.make("127.0.0.1", 29500, processes=1, nodes=2)
    found = environment({}, near, 1)
    assert found["GLOO_SOCKET_IFNAME"] == found["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment({"GLOO_SOCKET_IFNAME": "eth7"}, near, 1)["GLOO_SOCKET_IFNAME"] == "eth7"
    alone = Call.make("127.0.0.1", 29500, processes=2, nodes=1)
    assert "GLOO_SOCKET_IFNAME" not in environment({}, alone, 1)


async def until(node: Node, ready: Callable[[], bool]) -> None:
    """Let a node look until something holds; looks block, so that they need a thread."""
    async with asyncio.timeout(30):
        while not ready():
            await asyncio.to_thread(node.look)
            await asyncio.sleep(0.02)


async def over(link: Link) -> None:
    """Keep a link up until it ends."""
    async with asyncio.timeout(30):
        while True:
            assert not link.exchange()
            await asyncio.sleep(0.02)


async def test_machines_are_let_in_once_and_heard_of_when_they_are_lost(tmp_path: Path) -> None:
    calls, said = tmp_path / CALL, list[str]()
    sock = listener()
    call = Call.make("127.0.0.1", 1, 1, nodes=2, link=sock.getsockname()[1], silence_s=1.0)
    machines = Machines(call, sock, said.append)
    gathering = asyncio.create_task(machines.gather())
    await asyncio.sleep(0)
    stranger = Link(replace(call, id="0" * 32), 1)
    with pytest.raises(LinkEnded, match="ended the call"):
        await over(stranger)
    assert machines.missing == [1]
    calls.write_text(call.to_json())
    node, twin = Node(calls, 1), Node(calls, 1)
    await until(node, gathering.done)
    await until(node, lambda: bool(node.ranks))
    for _ in range(5):
        await asyncio.to_thread(twin.look)
    assert not twin.ranks, "another machine answers as this one"
    os.kill(node.ranks[1].pid, signal.SIGKILL)
    await until(node, lambda: not node.ranks)
    async with asyncio.timeout(30):
        while not said:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert said[0].startswith("machine 1: rank 1 was ended by SIGKILL")
    machines.close()


_NO_HELLOS = (
    b"\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 4000 + b"\n",
    b'{"call": "\xc3\xa9", "node": 1}\n',
    b"x" * 10_000,
)


@pytest.mark.parametrize("said", _NO_HELLOS, ids=range(len(_NO_HELLOS)))
async def test_what_is_no_machine_is_shown_out_and_machines_come_in(
    said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sock = listener()
    call = Call.make("127.0.0.1", 1, 1, nodes=2, link=sock.getsockname()[1], silence_s=30.0)
    machines = Machines(call, sock, lambda why: None)
    gathering = asyncio.create_task(machines.gather())
    await asyncio.sleep(0)
    reader, writer = await asyncio.open_connection("127.0.0.1", call.link)
    writer.write(said)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 20) in (b"", b"{}\n")
    writer.close()
    link = Link(call, 1)
    await asyncio.wait_for(gathering, 20)
    link.close()
    machines.close()
    assert not caplog.records, "nothing of it was unexpected"


async def test_a_machine_that_talks_nonsense_is_lost() -> None:
    said, sock = list[str](), listener()
    call = Call.make("127.0.0.1", 1, 1, nodes=2, link=sock.getsockname()[1], silence_s=30.0)
    machines = Machines(call, sock, said.append)
    gathering = asyncio.create_task(machines.gather())
    await asyncio.sleep(0)
    link = Link(call, 1)
    await asyncio.wait_for(gathering, 20)
    link._sock.sendall(b"[]\n")
    async with asyncio.timeout(20):
        while not said:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert said == ["machine 1 said what no learner_svc.node says (not an object)"]
    link.close()
    machines.close()


@pytest.mark.parametrize("said", [b"5\n", b"{\n", b"HTTP/1.1 400 Bad Request\r\n", b"x" * 9000])
async def test_a_service_that_is_no_learner_ends_a_call(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        call = Call.make("127.0.0.1", 1, 1, nodes=2, link=other.getsockname()[1])
        link = Link(call, 1)
        connection, _ = other.accept()
        connection.sendall(said)
        with pytest.raises(LinkEnded, match="what answers is no learner"):
            await over(link)
        connection.close()
        link.close()


async def test_a_silent_service_ends_a_call() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        call = Call.make("127.0.0.1", 1, 1, nodes=2, link=silent.getsockname()[1], silence_s=0.3)
        link = Link(call, 1)
        with pytest.raises(LinkEnded, match=r"the learner has not been heard of for 0\.3 s"):
            await over(link)
        link.close()


async def test_a_silent_machine_ends_a_call(tmp_path: Path) -> None:
    calls, said = tmp_path / CALL, list[str]()
    sock = listener()
    call = Call.make("127.0.0.1", 1, 1, nodes=2, link=sock.getsockname()[1], silence_s=1.0)
    calls.write_text(call.to_json())
    machines = Machines(call, sock, said.append)
    gathering = asyncio.create_task(machines.gather())
    node = Node(calls, 1)
    await until(node, gathering.done)
    await until(node, lambda: bool(node.ranks))
    async with asyncio.timeout(30):
        while not said:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert said == ["machine 1 has not been heard of for 1 s"]
    await until(node, lambda: not node.ranks)
    machines.close()


async def test_a_machine_that_does_not_answer_is_named(tmp_path: Path) -> None:
    ranks = WorkerProcess(tmp_path / "log", tmp_path / CALL)
    with pytest.raises(MachineAway, match=r"machine 1 of 2 did not answer.*--follower 0"):
        await ranks.spawn(1, nodes=2, timeout_s=0.2)
    assert not ranks.pids
    assert not (tmp_path / CALL).exists()


def test_several_machines_need_an_address() -> None:
    with pytest.raises(ValueError, match="address: is needed with nodes above 1"):
        LearnerSettings(nodes=2)


async def test_what_is_no_call_ends_neither_a_node_nor_the_ranks_of_a_run(tmp_path: Path) -> None:
    calls = tmp_path / CALL
    for text in ("", "{", "[]", '{"id": "x"}', '{"id": "x", "shell": "rm"}', "\udcff"):
        calls.write_bytes(text.encode("utf-8", "surrogateescape"))
        node = Node(calls, 1)
        node.look()
        assert not node.ranks
        ranks = WorkerProcess(tmp_path / "log", calls)
        await ranks.spawn(1)
        (pid,) = ranks.pids
        await ranks.kill()
        assert not Path(f"/proc/{pid}").exists()
        assert calls.exists(), "it is not the run's own"
