"""`regreen fix` on a real project: real services and packages, a scripted chat endpoint."""

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from judge_svc.__main__ import running as judge_running
from judge_svc.settings import JudgeSettings
from policy_svc.__main__ import running as policy_running
from policy_svc.settings import PolicySettings
from regreen.client.stack import Endpoints, Stack
from regreen.fix import FixOptions, FixResult, fix_project
from regreen.rollout.progress import Show
from regreen.rpc.errors import InvalidArgument, MissingDependency
from sandbox_svc.__main__ import serving as sandbox_serving
from sandbox_svc.settings import SandboxSettings
from tests.fixtures.chat_script import ScriptedChat, call
from tests.fixtures.policy.http import serving
from tests.fixtures.policy.model import default_model

pytestmark = [pytest.mark.registry, pytest.mark.asyncio(loop_scope="module")]
LOOPBACK = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.2}
RUNNER = "pytest==8.3.5\npluggy==1.5.0\niniconfig==2.1.0\npackaging==25.0\n"
FILES = {
    "letters.py": "from jinja2 import Template\n\n\ndef greet(name):\n"
    "    return Template('Dear {{ name }},').render(name=name)\n",
    "tests/test_letters.py": "from letters import greet\n\n\ndef test_greet():\n"
    "    assert greet('Ada') == 'Dear Ada,'\n",
}
MOVE, VALIDATE = (
    call("dependency_upgrade", name="markupsafe", version="2.0.1"),
    call("validate_and_build"),
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def endpoints(registry: None) -> AsyncIterator[tuple[Path, Endpoints]]:
    """Sandbox and judge services, and a policy service over the scripted endpoint."""
    home = Path(tempfile.mkdtemp(prefix="regreen-fix-"))
    home.chmod(0o711)
    async with contextlib.AsyncExitStack() as exits:
        exits.callback(shutil.rmtree, home, ignore_errors=True)
        url = await exits.enter_async_context(serving(ScriptedChat([MOVE, VALIDATE], "key").app()))
        policy = PolicySettings(
            home=home / "policy",
            http="",
            engine="openai",
            openai_url=f"{url}/v1",
            openai_model="scripted",
            openai_key="key",
            model=default_model(),
            **LOOPBACK,
        )
        sandbox = SandboxSettings(home=home, warm_seats=1, **LOOPBACK)
        try:
            one = await exits.enter_async_context(sandbox_serving(sandbox))
        except MissingDependency as error:
            pytest.skip(f"no sandboxes here: {error}")
        two = await exits.enter_async_context(judge_running(JudgeSettings(home=home, **LOOPBACK)))
        three = await exits.enter_async_context(policy_running(policy))
        yield home, Endpoints(sandbox=one.address, judge=two.address, policy=three.server.address)


def project(root: Path, lock: str = "", **more: str) -> Path:
    files = {**FILES, **more, **({"requirements.lock": lock} if lock else {})}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


async def fix(
    endpoints: tuple[Path, Endpoints], root: Path, show: Show = lambda *shown: None
) -> FixResult:
    home, where = endpoints
    options = FixOptions(attempts=1)
    async with Stack(where) as stack:
        try:
            return await fix_project(stack, root, home, options, show, python="3.11")
        finally:
            assert not (await stack.sandbox.list_sandboxes()).sandboxes


async def test_a_moved_pin_is_found_and_verified(endpoints, tmp_path: Path) -> None:
    lock = f"# web\njinja2==2.11.3\nmarkupsafe==2.1.5  # newest\n{RUNNER}"
    shown: list[tuple] = []
    found = await fix(endpoints, project(tmp_path, lock), lambda *line: shown.append(line))
    verdicts = [text for stage, done, _, text in shown if stage == "validate" and done]
    assert [text.partition(":")[0] for text in verdicts] == ["attempt 1 of 1, turn 2 of 50"]
    assert verdicts[0].endswith("PASSED: build and tests are green")
    assert (found.fixed, found.failing_before, found.failing_after) == (True, 1, 0), found.summary
    assert found.pins == ("markupsafe 2.1.5 -> 2.0.1",)
    assert "-markupsafe==2.1.5  # newest\n+markupsafe==2.0.1  # newest\n" in found.patch
    assert (tmp_path / "requirements.lock").read_text() == lock


async def test_a_green_project_is_left_alone(endpoints, tmp_path: Path) -> None:
    lock = f"jinja2==3.1.6\nmarkupsafe==2.1.5\n{RUNNER}"
    found = await fix(endpoints, project(tmp_path, lock))
    assert (found.fixed, found.already_green, found.patch) == (False, True, "")


async def test_a_few_pins_are_completed(endpoints, tmp_path: Path) -> None:
    text = "jinja2==3.1.5\npytest==8.3.5\npywin32==306; sys_platform == 'win32'\ndocopt == 0.6.2\n"
    found = await fix(endpoints, project(tmp_path, **{"requirements.txt": text}))
    assert (found.fixed, found.already_green, found.patch) == (False, True, "")


async def test_pins_that_contradict_each_other_are_named(endpoints, tmp_path: Path) -> None:
    files = {"requirements.txt": "flask==3.0.3\n", "requirements-dev.txt": "werkzeug<2\n"}
    said = r"correct requirements.txt line 1 \(flask==3.0.3\), requirements-dev.txt line 1"
    with pytest.raises(InvalidArgument, match=said):
        await fix(endpoints, project(tmp_path, **files))


async def test_an_unknown_package_is_named(endpoints, tmp_path: Path) -> None:
    root = project(tmp_path, f"regreen-no-such-package-xyz==1.0\n{RUNNER}")
    with pytest.raises(InvalidArgument, match=r"no-such-package.*correct requirements\.lock"):
        await fix(endpoints, root)
