"""Two machines, two ranks each: what a DeepSpeed run loses is begun anew, with equal losses.

- Two network namespaces stand for two hosts: in one the learner service with its ranks, in the
  other `learner_svc.node` with its own, kept running as a supervisor would. They share the home's
  disk, as machines share a volume, and reach each other by the veth pair alone.
- GRPO in full: groups are sampled from the newest checkpoint, so that weights that differ in one
  bit soon give other batches, too. ZeRO stage 2 over gloo.
- A run that nothing disturbs is the measure. In the other, each fault comes in the middle of a
  step, once the learner has told that some of its tokens are done: a rank of either machine and
  the whole second machine by signal 9, and the network between them pulled and put back.
- Last the network stays away: the run has to fail in bounded time and name the machine; put back,
  it is started again, as a driver would, and ends.
- Losses, gradient norms and the digests of the last weights have to be equal bit for bit.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from regreen.client.learner import LearnerClient
from regreen.home import default_home
from regreen.learner import v1 as pb
from regreen.model_store import ensure_default_model
from regreen.rpc.errors import RegreenError
from tests.load.groups import sampled
from tests.load.network import HERE, Network, enter
from tests.load.processes import children
from tests.load.train_model import blank

_RUN = "ranks"
_RATE = pb.Hyperparameters(learning_rate=1e-3, micro_batch_tokens=128, zero_stage=2)
_SKIPPED = 77
FAULTS = ("rank there", "rank here", "machine", "outage", "network")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and within which bounds."""

    faults: tuple[str, ...] = FAULTS
    checkpoint_every: int = 2
    silence_s: float = 10.0
    start_timeout_s: float = 180.0

    @property
    def steps(self) -> int:
        """One without a fault first, and one after the last."""
        return len(self.faults) + 2

    def saved_before(self, step: int) -> int:
        """The last step before that has a checkpoint; 0 is the model that the run began with."""
        return (step - 1) // self.checkpoint_every * self.checkpoint_every


@dataclass(slots=True)
class Row:
    """One step."""

    step: int
    loss: float
    grad_norm: float
    reward: float
    seconds: float
    fault: str = ""
    restarts: int = 0
    told: list[str] = field(default_factory=list)
    went_on_from: list[int] = field(default_factory=list)
    """The step of the checkpoint that each restart began with."""
    failed_after_s: float = 0.0
    """From the fault to the failure of the run, where it was to fail."""
    error: str = ""


@dataclass(slots=True)
class Machines:
    """The service here, the node there, and the client."""

    network: Network
    home: Path
    client: LearnerClient
    service: asyncio.subprocess.Process
    node: asyncio.subprocess.Process | None = None
    away: bool = False

    async def keep_node(self) -> None:
        """Start the node, and again whenever it has ended."""
        command = self.network.there(
            *(sys.executable, "-m", "learner_svc.node", f"--home={self.home}", "--follower=0")
        )
        with (self.home / "node.log").open("ab") as log:
            while True:
                self.node = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
                try:
                    await self.node.wait()
                finally:
                    if self.node.returncode is None:
                        self.node.terminate()
                        await self.node.wait()

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        assert self.node is not None
        for pid in (*children(self.service.pid), *children(self.node.pid)):
            if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise LookupError(f"rank {number} does not run")

    async def strike(self, fault: str, plan: Plan) -> None:
        """Do what a fault is."""
        if fault == "rank there":
            os.kill(self.rank(3), signal.SIGKILL)
        elif fault == "rank here":
            os.kill(self.rank(0), signal.SIGKILL)
        elif fault == "machine":
            assert self.node is not None
            self.node.kill()
        else:
            self.network.cut()
        if fault == "outage":
            await asyncio.sleep(2 * plan.silence_s)
            self.network.join()


@asynccontextmanager
async def machines(network: Network, home: Path, plan: Plan) -> AsyncIterator[Machines]:
    """Both machines, up."""
    home.mkdir()
    address = f"unix:{home}/learner.sock"
    settings = {
        "LISTEN": address,
        "METRICS": "127.0.0.1:0",
        "PROCESSES": "2",
        "NODES": "2",
        "ADDRESS": HERE,
        "SILENCE_S": str(plan.silence_s),
        "START_TIMEOUT_S": str(plan.start_timeout_s),
    }
    variables = {f"REGREEN_LEARNER__{name}": value for name, value in settings.items()}
    with (home / "learner.log").open("ab") as log:
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "learner_svc", f"--home={home}"),
            env=os.environ | variables,
            stdout=log,
            stderr=log,
        )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 120)
            both = Machines(network, home, LearnerClient(channel), service)
            keeper = asyncio.create_task(both.keep_node())
            yield both
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
    finally:
        service.terminate()
        await service.wait()


class Training:
    """One run."""

    def __init__(
        self, both: Machines, model: Path, plan: Plan, tell: Callable[[str], None]
    ) -> None:
        self._both, self._model, self._plan, self._tell = both, model, plan, tell
        self._client = both.client
        self.rows: list[Row] = []
        self.weights = ""
        self._batches: dict[int, bytes] = {}

    async def run(self, faults: dict[int, str]) -> None:
        """All steps, each with its fault."""
        newest, version = await self._start(), 0
        for step in range(1, self._plan.steps + 1):
            batch = await asyncio.to_thread(sampled, newest, step, version)
            rewards = [sample.reward for sample in batch]
            self._batches[step] = batch.to_bytes()
            row = await self._step(step, faults.get(step, ""))
            row.reward = sum(rewards) / len(rewards)
            self.rows.append(row)
            self._tell(f"step {step}: loss {row.loss:.6f} {row.fault} {row.seconds:.1f} s")
            if step % self._plan.checkpoint_every == 0 or step == self._plan.steps:
                saved = await self._client.save_checkpoint(_RUN, policy_version=step)
                newest, version, self.weights = Path(saved.uri), step, saved.digest.sha256
        await self._client.stop_run(_RUN)

    async def _start(self) -> Path:
        await self._client.start_run(
            _RUN,
            pb.RUN_KIND_GRPO,
            str(self._model),
            engine="deepspeed",
            hyperparameters=_RATE,
        )
        return self._model

    async def _step(self, step: int, fault: str) -> Row:
        began_s, before = time.monotonic(), (await self._client.get_run(_RUN)).restarts
        told: list[str] = []
        begun: list[int] = []
        striker = asyncio.create_task(self._disturb(step, fault, told, begun)) if fault else None
        error, failed_after_s = "", 0.0
        try:
            done = await self._client.step(_RUN, step, batch=self._batches[step])
        except RegreenError as failure:
            if fault != "network" or striker is None:
                raise
            error, failed_after_s = failure.message, time.monotonic() - await striker
            done = await self._again(step)
        seconds = time.monotonic() - began_s
        if striker is not None:
            await striker
        metrics, after = done.metrics, (await self._client.get_run(_RUN)).restarts
        return Row(
            step=step,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            reward=0.0,
            seconds=seconds,
            fault=fault,
            restarts=after - before if after >= before else after,
            told=told,
            went_on_from=begun,
            failed_after_s=failed_after_s,
            error=error,
        )

    async def _disturb(self, step: int, fault: str, told: list[str], begun: list[int]) -> float:
        """Strike once some tokens of the step are done, and hear what is told; when it was."""
        struck_s = 0.0
        async for event in self._client.watch_run(_RUN, from_step=step):
            at = event.progress
            if not struck_s and at.step == step and 0 < at.tokens_done < at.tokens_total:
                struck_s = time.monotonic()
                striking = asyncio.create_task(self._both.strike(fault, self._plan))
            if struck_s and event.HasField("restart") and event.restart.to_step == step - 1:
                restart = event.restart
                how = "stands" if restart.complete else restart.reason
                begun.append(restart.from_step)
                told.append(f"{restart.number} of {restart.limit} from {restart.from_step}: {how}")
            if event.step.step == step:
                break
        if not struck_s:
            raise RuntimeError(f"step {step} was over before it could be disturbed")
        await striking
        return struck_s

    async def _again(self, step: int) -> pb.StepResponse:
        """What a driver does: start the run from its checkpoint, and send what came after it."""
        run = await self._client.get_run(_RUN)
        assert run.state == pb.RUN_STATE_FAILED, run
        self._both.network.join()
        await self._start()
        position = (await self._client.get_run(_RUN)).step
        saved = self._plan.saved_before(step)
        assert position == saved, f"the run stands at {position}, its checkpoint at {saved}"
        for earlier in range(position + 1, step):
            again = await self._client.step(_RUN, earlier, batch=self._batches[earlier])
            first = self.rows[earlier - 1]
            for name in ("loss", "grad_norm"):
                assert again.metrics[name] == getattr(first, name), f"step {earlier}: {name}"
        return await self._client.step(_RUN, step, batch=self._batches[step])


def faults_found(calm: Training, struck: Training, plan: Plan) -> list[str]:
    """What is not as it has to be."""
    found = []
    for expected, row in zip(calm.rows, struck.rows, strict=True):
        for name in ("loss", "grad_norm", "reward"):
            calm_value, value = getattr(expected, name), getattr(row, name)
            if calm_value != value:
                found.append(f"step {row.step}: {name} {value!r}, undisturbed {calm_value!r}")
        if wrong := set(row.went_on_from) - {plan.saved_before(row.step)}:
            found.append(f"step {row.step}: went on from {wrong}, not from the last checkpoint")
        if row.fault and row.fault != "network" and not row.restarts:
            found.append(f"step {row.step}: {row.fault}, but nothing was restarted")
        if row.fault == "network":
            # A first silence, then a start that waits for the machine; and what both take to end.
            bound_s = plan.silence_s + plan.start_timeout_s + 60.0
            if not 0 < row.failed_after_s <= bound_s:
                found.append(f"step {row.step}: failed after {row.failed_after_s} s")
            if "machine 1" not in row.error:
                found.append(f"step {row.step}: does not name the machine: {row.error}")
    if calm.weights != struck.weights:
        found.append(f"last weights {struck.weights}, undisturbed {calm.weights}")
    return found


async def compare(home: Path, plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    """Both runs; the report."""
    source = await asyncio.to_thread(ensure_default_model, default_home())
    model = blank(home / "model", source.path)
    order = dict(enumerate(plan.faults, 2))
    with Network() as network:
        runs: list[Training] = []
        for name, faults in (("undisturbed", dict[int, str]()), ("disturbed", order)):
            tell(f"{name} run")
            async with machines(network, home / name, plan) as both:
                training = Training(both, model, plan, tell)
                await training.run(faults)
                runs.append(training)
        names = network.names()
    calm, struck = runs
    return {
        "plan": asdict(plan),
        "namespaces": names,
        "ranks": 4,
        "undisturbed": [asdict(row) for row in calm.rows],
        "disturbed": [asdict(row) for row in struck.rows],
        "weights": {"undisturbed": calm.weights, "disturbed": struck.weights},
        "faults": faults_found(calm, struck, plan),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{'step':4} {'fault':11} {'restarts':8} {'loss':>14} {'grad norm':>12} "
        f"{'undisturbed':11} {'seconds':>8}"
    ]
    for calm, row in zip(report["undisturbed"], report["disturbed"], strict=True):
        same = all(calm[name] == row[name] for name in ("loss", "grad_norm", "reward"))
        lines.append(
            f"{row['step']:4} {row['fault']:11} {row['restarts']:8} {row['loss']:14.6e} "
            f"{row['grad_norm']:12.6f} {'equal' if same else 'DIFFERS':11} {row['seconds']:8.1f}"
        )
        lines += [f"{'':16} {told[:140]}" for told in row["told"]]
        if row["error"]:
            lines.append(
                f"{'':16} failed {row['failed_after_s']:.1f} s later: {row['error'][:200]}"
            )
    same = report["weights"]["undisturbed"] == report["weights"]["disturbed"]
    lines.append(f"last weights: {'equal' if same else 'DIFFERENT'}")
    lines += [f"BREACH: {fault}" for fault in report["faults"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 when all is as it has to be, 77 where it cannot be run."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m tests.load.ranks", description=__doc__
    )
    usual = Plan()
    parser.add_argument("--faults", default=",".join(FAULTS), help="some of them, in order")
    parser.add_argument("--silence-s", type=float, default=usual.silence_s)
    parser.add_argument("--start-timeout-s", type=float, default=usual.start_timeout_s)
    parser.add_argument("--out", type=Path, default=Path("build/bench/ranks.json"))
    given = parser.parse_args(argv)
    faults = tuple(filter(None, given.faults.split(",")))
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"--faults: {', '.join(sorted(unknown))}; known are {', '.join(FAULTS)}")
    reason = enter([sys.executable, "-m", "tests.load.ranks", *(argv or sys.argv[1:])])
    if reason:
        print(f"ranks: skipped: {reason}")
        return _SKIPPED
    plan = Plan(faults, silence_s=given.silence_s, start_timeout_s=given.start_timeout_s)
    home = Path(tempfile.mkdtemp(prefix="regreen-ranks-"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    try:
        report = asyncio.run(
            compare(home, plan, lambda line: print(line, file=sys.stderr, flush=True))
        )
    except BaseException:
        for log in home.glob("*/*.log"):
            with contextlib.suppress(OSError):
                shutil.copy(log, given.out.with_name(f"ranks-{log.parent.name}-{log.name}"))
        raise
    finally:
        shutil.rmtree(home, ignore_errors=True)
    report["seconds"] = time.monotonic() - began_s
    given.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
