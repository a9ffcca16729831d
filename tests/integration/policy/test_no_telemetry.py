"""Whoever serves the policy tells nobody: OpenVINO's reporter is never imported, also where it is.

- A stand-in for the reporting package, first on the path, writes down that it was imported.
"""

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regreen.client.channel import connect
from regreen.client.policy import PolicyClient
from regreen.policy import v1 as pb
from tests.fixtures.policy.model import default_model

SERVICES = ("dataset", "judge", "learner", "policy", "sandbox")
ROOT = Path(__file__).resolve().parents[3]
REPORTER = """
import pathlib
(pathlib.Path.home() / "intel").mkdir(exist_ok=True)
raise ImportError("that would have reported")
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with a fresh home in which the reporting package can be found."""
    package = tmp_path / "path" / "openvino_telemetry"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(REPORTER)
    (tmp_path / "user").mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "CI"}
    return {**kept, "HOME": str(tmp_path / "user"), "PYTHONPATH": str(tmp_path / "path")}


def python(env: dict[str, str], code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_openvino_alone_imports_what_reports(env: dict[str, str], tmp_path: Path) -> None:
    python(env, "import openvino")
    assert (tmp_path / "user" / "intel").is_dir()


@pytest.mark.parametrize("service", ["policy_svc", "learner_svc"])
def test_a_service_has_its_libraries_keep_quiet(
    env: dict[str, str], tmp_path: Path, service: str
) -> None:
    env = {**env, "DO_NOT_TRACK": "0"}
    code = f"import os, {service}, openvino; from huggingface_hub import constants;"
    code += "print(constants.HF_HUB_DISABLE_TELEMETRY, os.environ['DO_NOT_TRACK'])"
    assert python(env, code).split() == ["True", "1"]
    assert not list((tmp_path / "user").rglob("*intel*"))


async def test_a_serving_policy_leaves_no_trace_in_the_home(
    env: dict[str, str], tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/policy"
    words = ["--engine", "openvino", "--model", str(default_model()), "--http", ""]
    words += ["--listen", address, "--metrics", "127.0.0.1:0", "--home", str(tmp_path / "home")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "policy_svc", *words), env=env, cwd=ROOT
    )
    try:
        async with connect(address) as channel:
            policy = PolicyClient(channel, patience_s=100.0)
            sampling = pb.Sampling(temperature=1.0, max_new_tokens=4)
            answer = await policy.generate([1, 520, 9531, 198], sampling=sampling)
            assert (await policy.get_policy()).engine == "openvino"
    finally:
        process.terminate()
        await process.wait()
    assert answer.completions[0].token_ids
    assert not list((tmp_path / "user").rglob("*intel*"))


def test_spans_are_not_even_made_where_no_collector_is_named(env: dict[str, str]) -> None:
    services = ", ".join(f"{name}_svc.__main__" for name in SERVICES)
    code = f"import sys, {services}; from regreen.rpc import traces; traces.prepare();"
    code += "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    kept = {name: value for name, value in env.items() if not name.startswith("OTEL_")}
    assert python(kept, code).strip() == "[]"


def test_no_set_up_installs_what_reports() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        named = re.findall(r"^(\S*telemetry\S*?)==", path.read_text(), re.MULTILINE)
        # OpenTelemetry sends nothing but to the collector that its user names.
        assert [name for name in named if not name.startswith("opentelemetry-")] == [], path.name
    assert "openvino-telemetry==" in (ROOT / "infra" / "scripts" / "lock.sh").read_text()
