"""A real Prometheus over a local stack that trains: every panel and alert must find its data.

- Beside it a collector takes the spans of all processes: the trace of every trajectory must hold
  all planes, each span below one that is there.
- The stack is that of `make up`, with TLS, in a home of its own: a scripted policy, real sandboxes,
  a small model that is really trained, two GRPO steps.
- A panel passes if its query answers with at least one number; an alert, if every selector in it
  finds a series, since a healthy stack answers nothing to the whole.
- Panels are asked for over the run, with the windows that Grafana would choose.
- Beside the stack stands a front of a sandbox fleet with one worker, in a stand-in cluster.
- Exit code 77 where Prometheus is not installed.
"""

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as dataset_pb
from regreen.rollout.context import Budget, Knobs, Sampling, labels_of
from regreen.rollout.worker import worker_pool
from regreen.rpc import traces
from regreen.stack import control
from regreen.stack.layout import Layout
from regreen.stack.ports import Ports
from regreen.train.config import GrpoConfig
from regreen.train.progress import Progress
from regreen.train.rl import train_grpo
from regreen.train.rows import all_trajectories
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.collector import Collector, collecting
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import tiny_spec
from tests.integration import dataset_samples as samples
from tests.integration.fleet.conftest import world
from tests.integration.rollout.world import PIN, VALIDATE, call, task_of
from tests.load import train_model
from tests.load.expressions import FOLDER, alerts, panels, prices, selectors

SKIPPED = 77
_WINDOW = "4s"
"""What Grafana makes of the scrape interval."""
_PLANES = frozenset({"driver", "policy", "sandbox", "judge", "dataset", "learner"})


def script() -> dict[str, Any]:
    """Neighbours fare differently, so that groups teach."""
    texts = [PIN, call("give_up", reason="it cannot be done")]
    rest = [{"text": VALIDATE, "turn": turn} for turn in (1, 2)]
    return {"responses": [{"texts": texts, "turn": 0, "rotate": True}, *rest]}


@contextlib.contextmanager
def prometheus(
    home: Path, metrics: Mapping[str, Sequence[str]], program: str
) -> Iterator[httpx.Client]:
    """Prometheus over these addresses, with the configuration that ships; a client of it."""
    found = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    found["global"] = {"scrape_interval": "1s", "evaluation_interval": "5s"}
    expected = [
        {
            "record": "regreen_component_expected",
            "expr": "vector(1)",
            "labels": {"job": "regreen", "component": entry["labels"]["component"]},
        }
        for entry in found["scrape_configs"][0]["static_configs"]
    ]  # as the chart records them
    rules = home / "expected.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "expected", "rules": expected}]}))
    found["rule_files"] = [str(FOLDER / "alerts.yml"), str(rules)]
    for entry in found["scrape_configs"][0]["static_configs"]:
        entry["targets"] = [
            address.removeprefix("http://").removesuffix("/metrics")
            for address in metrics[entry["labels"]["component"]]
        ]
    config, log = home / "prometheus.yml", home / "prometheus.log"
    config.write_text(yaml.safe_dump(found))
    ports = Ports()
    address = f"127.0.0.1:{ports.pick()}"
    command = [program, f"--config.file={config}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={home / 'tsdb'}", "--log.level=warn"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30.0, trust_env=False) as client:
            _wait_ready(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(30)
        ports.close()


def _wait_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/-/ready").is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"prometheus ended: {log.read_text()[-2000:]}")


def answers(client: httpx.Client, expr: str, start_s: float) -> list[float]:
    """The finite numbers that an expression has had since `start_s`, as a panel asks for them.

    Raises:
        RuntimeError: Prometheus refuses it.
    """
    asked = {"query": expr, "start": start_s, "end": time.time(), "step": "1s"}
    answer = client.get("/api/v1/query_range", params=asked).json()
    if answer["status"] != "success":
        raise RuntimeError(f"{answer['error']}: {expr}")
    found = (float(text) for row in answer["data"]["result"] for _, text in row["values"])
    return [value for value in found if math.isfinite(value)]


@contextlib.asynccontextmanager
async def fleet(home: Path) -> AsyncIterator[str]:
    """A front with its worker; the address of its metrics."""
    with contextlib.closing(Ports()) as ports:
        address = f"127.0.0.1:{ports.pick()}"
        async with world() as cluster:
            flags = {
                "backend": "kubernetes",
                "home": cluster.home / "front",
                "listen": "127.0.0.1:0",
                "metrics": address,
                "kube-config": cluster.kubeconfig,
                "kube-workers": 1,
            }
            words = (f"--{name}={value}" for name, value in flags.items())
            with (home / "front.log").open("wb") as log:
                front = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "sandbox_svc", *words), stdout=log, stderr=log
                )
            try:
                await _wait_worker(front, address, home / "front.log")
                yield address
            finally:
                if front.returncode is None:
                    front.terminate()
                    await front.wait()


async def _wait_worker(front: asyncio.subprocess.Process, address: str, log: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(180):
        while front.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                told = (await client.get(f"http://{address}/metrics")).text
                if 'regreen_sandbox_workers{state="ready"} 1.0' in told:
                    return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"the front ended: {log.read_text()[-2000:]}")


def missing(client: httpx.Client, start_s: float) -> tuple[list[str], int]:
    """What finds no data, and the number of questions."""
    boxes = prices()
    asked: list[tuple[str, str]] = []
    for where, expr in panels():
        for name, value in boxes.items():
            expr = expr.replace(f"${name}", value)
        asked.append((f"panel {where}", expr.replace("$__rate_interval", _WINDOW)))
    asked += [(f"alert {n}", one) for n, expr in alerts() for one in sorted(selectors(expr))]
    empty = [(where, expr) for where, expr in asked if not answers(client, expr, start_s)]
    for _, expr in alerts():
        answers(client, expr, start_s)  # it is one that Prometheus takes
    return [f"{where}: {expr}" for where, expr in empty], len(asked)


async def admit(stack: Stack, task: Any) -> None:
    """Two tasks that can be trained on."""
    state_id = ""
    async for event in stack.state.prepare_state(task.environment):
        if event.HasField("state"):
            state_id = event.state.id
    for name in ("greet-a", "greet-b"):
        task.id = name
        await stack.tasks.import_tasks([task])
        report = samples.report(name)
        report.state_id = state_id
        await stack.tasks.record_gate(report)


async def train(stack: Stack, model: Path) -> tuple[str, list[str]]:
    """Two steps over both tasks; how the run ended, and its trajectories."""
    config = GrpoConfig(
        name="observed",
        base_uri=str(model),
        tasks=("greet-a", "greet-b"),
        steps=2,
        groups_per_step=2,
        group_size=2,
        max_refills=2,
        concurrency=4,
        labels=labels_of(Budget(turns=3), Sampling(), Knobs()),
        hyperparameters={"learning_rate": 1e-3, "importance_cap": -1.0},
    )

    def tell(progress: Progress) -> None:
        if progress.stage == "grpo":
            print(f"step {progress.done} of {progress.total}", file=sys.stderr)

    def workers(stack: Stack, run_id: str, count: int) -> Any:
        return worker_pool(stack, run_id=run_id, concurrency=count)

    result = await train_grpo(stack, config, tell, workers=workers)
    wanted = dataset_pb.TrajectoryFilter(run_id=result.run_id)
    return result.state, [kept.id async for kept in all_trajectories(stack, wanted)]


def untraced(collector: Collector, trajectory_ids: Sequence[str]) -> list[str]:
    """What is wrong with the traces of these trajectories."""
    found, wrong = collector.traces(), [] if trajectory_ids else ["no trajectory was stored"]
    steps = {
        (span.trace_id, span.parent_id)
        for span in collector.spans
        if span.name.endswith("LearnerService/Step")
    }
    for trajectory_id in trajectory_ids:
        spans = found.get(traces.trace_of(trajectory_id), [])
        ids = {span.span_id for span in spans}
        roots = [span.name for span in spans if span.parent_id not in ids]
        if roots != ["rollout"]:
            wrong.append(f"trace {trajectory_id}: begins with {roots}")
        planes = {span.component for span in spans}
        if any(link in steps for span in spans for link in span.links):
            planes.add("learner")
        if lacking := _PLANES - planes:
            wrong.append(f"trace {trajectory_id}: lacks {', '.join(sorted(lacking))}")
    return wrong


async def observe(home: Path, program: str, collector: Collector) -> int:
    """The whole; the exit code."""
    (home / "made").mkdir()
    spec = tiny_spec(DistStore(home / "sandbox" / "dists"), home / "made")
    (home / "script.json").write_text(json.dumps(script()))
    model = train_model.blank(home / "blank", default_model())
    os.environ.update(
        OMP_NUM_THREADS="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        REGREEN_INDEX_URL="http://127.0.0.1:9/simple/",
        REGREEN_POLICY__SCRIPT=str(home / "script.json"),
        REGREEN_POLICY__MODEL=str(model),
        REGREEN_LEARNER__ENGINE="plain",
        REGREEN_SANDBOX__WARM_SEATS="1",
        REGREEN_DATASET__UPKEEP_S="1",
    )
    layout = Layout(home)
    rows = await control.up(
        layout, arguments={"policy": ["--engine", "scripted"]}, fixed_ports=False, tls=True
    )
    try:
        async with fleet(home) as front:
            metrics = {row.name: [row.metrics] for row in rows}
            metrics["sandbox"].append(front)
            with prometheus(home, metrics, program) as client:
                start_s = time.time()
                await asyncio.sleep(3.0)  # some samples from before the first call
                async with Stack(Endpoints.load(home), patience_s=120.0) as stack:
                    await admit(stack, task_of(spec))
                    state, kept = await train(stack, model)
                await asyncio.sleep(5.0)  # the last samples
                wrong, count = missing(client, start_s)
    finally:
        await control.down(layout)
    wrong += untraced(collector, kept)
    for line in wrong:
        print(f"FAIL          {line}")
    print(
        f"observe: run {state}; {count} expressions, {len(kept)} traces, "
        f"{len(collector.spans)} spans; {len(wrong)} without what they must have"
    )
    return 1 if wrong or state != "done" else 0


def main() -> int:
    """Run it in a home that goes afterwards."""
    program = shutil.which("prometheus")
    if program is None:
        print(
            "observe: skipped: no program `prometheus` here: Debian's package of that name has it"
        )
        return SKIPPED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack is stopped
    home = Path(tempfile.mkdtemp(prefix="regreen-observe-"))
    home.chmod(0o711)
    try:
        with collecting() as collector:
            return asyncio.run(observe(home, program, collector))
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
