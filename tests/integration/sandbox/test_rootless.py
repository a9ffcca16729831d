"""The same runtime without root: the contract and abuse suites as an ordinary user.

- When the tests run as root, another user is borrowed with `setpriv`; its home is a directory
  that it owns. Otherwise this is the normal case and the suites themselves cover it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_UID = "12345"
_SANDBOX, _BUILD = "tests/integration/sandbox", "tests/integration/sandbox_build"
_PARTS = {
    "abuse": ("abuse", ["tests/contract/abuse"]),
    "contract": (
        "not docker and (exit_codes or time_out_kills or files_are_written or freezing"
        " or changed_paths or children or terminal or reaches_the_whole_group or full_pipe"
        " or first_thread)",
        ["tests/contract/test_runtime.py", "tests/contract/test_process.py"],
    ),
    "states": (
        "programs_alone or whiteouts_hide or comes_back_equal or deleted_names or kept_files"
        " or hundred or compared or leaves_whole_states or digest or travel or no_path"
        " or no_archive or over_the_bound or refused_and_leave_nothing or bombs",
        [
            *(f"{_SANDBOX}/test_{name}.py" for name in ("flatten", "actions", "images", "crash")),
            *(f"{_SANDBOX}/test_{name}.py" for name in ("transfer", "path_fuzz", "hostile_images")),
            "tests/unit/sandbox/test_tree_digest.py",
        ],
    ),
    "grader": ("naive or honest", [f"{_BUILD}/test_cheats.py"]),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="already an ordinary user; the suites cover it")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv on this host")
@pytest.mark.parametrize("part", _PARTS)
def test_an_ordinary_user_gets_the_same_walls(part: str) -> None:
    chosen, files = _PARTS[part]
    python = "/usr/bin/python3"
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip(
            f"{python} is {version or 'absent'}; it cannot load this environment's packages"
        )
    work = Path(tempfile.mkdtemp(prefix="regreen-rootless-"))
    shutil.chown(work, int(_UID), int(_UID))
    packages = sysconfig.get_paths()["purelib"]
    try:
        result = subprocess.run(
            [
                *("setpriv", "--reuid", _UID, "--regid", _UID, "--clear-groups", python, "-m"),
                *("pytest", "-q", "-p", "no:cacheprovider", "-k", chosen),
                *("--basetemp", str(work / "t"), "-c", str(_ROOT / "pyproject.toml"), *files),
            ],
            cwd=_ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": str(work),
                "PYTHONPATH": f"{_ROOT}:{packages}",
                "PYTHONDONTWRITEBYTECODE": "1",
                "REGREEN_HOME": str(work / "home"),
            },
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if "Permission denied" in result.stderr and not result.stdout:
        pytest.skip(f"user {_UID} cannot read this checkout: {result.stderr.strip()[-200:]}")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
