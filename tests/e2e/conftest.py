"""One whole local stack, started with the command line in a home of its own, for all e2e tests.

- Ports are free ones, the package index is one that nobody serves, the policy plays a script.
- The tiny task's files lie in the sandbox service's store, so that nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from regreen.client.stack import Endpoints, Stack
from regreen.dataset import v1 as pb
from sandbox_svc.wheelhouse import DistStore
from tests.fixtures.policy.model import default_model
from tests.fixtures.tasks.tiny_task import tiny_spec
from tests.integration.rollout.world import PIN, VALIDATE, call, says, task_of

ROOT = Path(__file__).resolve().parents[2]
MIXED = "mixedoutcomes"
GIVE_UP = call("give_up", reason="it cannot be done")
CLI = (sys.executable, "-c", "from regreen.cli.main import main; main()")


@dataclass(frozen=True)
class Local:
    """A home and how to command it."""

    home: Path
    env: dict[str, str]
    task: pb.Task

    def cli(self, *words: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `regreen WORDS` against this home, or against another one."""
        env = {**self.env, "REGREEN_HOME": str(home or self.home)}
        return subprocess.run(
            [*CLI, *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
        )

    def rows(self) -> dict[str, dict]:
        """`regreen status --json` by service."""
        return {row["name"]: row for row in json.loads(self.cli("status", "--json").stdout)}

    def stack(self, patience_s: float = 30.0) -> Stack:
        return Stack(Endpoints.load(self.home), patience_s=patience_s)


@pytest.fixture(scope="session")
def local() -> Iterator[Local]:
    """The running stack."""
    home = Path(tempfile.mkdtemp(prefix="regreen-e2e-"))
    home.chmod(0o711)
    (home / "made").mkdir()
    spec = tiny_spec(DistStore(home / "sandbox" / "dists"), home / "made")
    script = home / "script.json"
    fallback = {"text": "Good morning."}
    # Members of a group of a task with this word in its log fare differently, so that they teach.
    mixed = {"texts": [PIN, GIVE_UP], "turn": 0, "when": MIXED}
    responses = [mixed, *says(PIN, VALIDATE, when="greet"), fallback]
    script.write_text(json.dumps({"responses": responses}))
    env = {
        **os.environ,
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "2",
        "REGREEN_INDEX_URL": "http://127.0.0.1:9/simple/",
        "REGREEN_POLICY__SCRIPT": str(script),
        "REGREEN_POLICY__MODEL": str(default_model()),
        "REGREEN_LEARNER__ENGINE": "plain",
        "REGREEN_SANDBOX__WARM_SEATS": "1",
    }
    found = Local(home, env, task_of(spec))
    try:
        up = found.cli("up", "--ports", "any", "--engine", "scripted", "--json")
        if up.returncode and "user namespaces" in up.stderr:
            pytest.skip(f"no sandboxes here: {up.stderr[-300:]}")
        assert up.returncode == 0, up.stderr[-3000:]
        yield found
    finally:
        down = found.cli("down")
        shutil.rmtree(home, ignore_errors=True)
    assert down.returncode == 0, down.stderr
