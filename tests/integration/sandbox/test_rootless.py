"""The same runtime without root: the contract and abuse suites as an ordinary user.

- When the tests run as root, another user is borrowed with `setpriv`; its home is a directory
  that it owns, its interpreter the system's or, where that is another version, the one that runs
  these tests. Otherwise this is the normal case and the suites themselves cover it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
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
        " or first_thread or child_ran or themselves)",
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
    "grader": (
        "naive or honest or test_written",
        [f"{_BUILD}/test_cheats.py", f"{_BUILD}/test_written.py"],
    ),
    "limits": (
        "not full_host",
        [f"{_SANDBOX}/test_{name}.py" for name in ("limits", "kept_actions", "diff_links")],
    ),
}


_PLACES = ("/mnt", "/srv", "/opt")
_BOUND = 'mount --bind -o ro "$0" "$1" && shift && exec "$@"'


def _as_user(python: str) -> list[str]:
    return ["setpriv", "--reuid", _UID, "--regid", _UID, "--clear-groups", python]


def _ways(work: Path) -> Iterator[list[str]]:
    """Commands that may run this interpreter's version as another user, the usual first."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for python in ("/usr/bin/python3", f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        yield _as_user(python)
    yield _as_user(os.path.realpath(sys.executable))
    # One in a home that the user may not enter is shown to it elsewhere, in mounts of its own; not
    # in a place that sandboxes have for themselves, such as /tmp.
    used = (_ROOT, sysconfig.get_paths()["purelib"], work)
    free = [top for top in _PLACES if not any(str(path).startswith(f"{top}/") for path in used)]
    shown = next(filter(os.path.isdir, free), _PLACES[0])
    bind = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _BOUND]
    libraries = ["env", f"LD_LIBRARY_PATH={shown}/lib"]
    shared = libraries if sysconfig.get_config_var("Py_ENABLE_SHARED") else []
    yield [*bind, sys.base_prefix, shown, *shared, *_as_user(f"{shown}/bin/{version}")]


def _way(work: Path) -> list[str]:
    """The first of them that works; without one the test is skipped, with what each said."""
    said = []
    for way in _ways(work):
        asked = [*way, "-c", "import sys; print(sys.version_info[:2], sys.prefix)"]
        try:
            done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=work)
        except OSError as error:
            said.append(f"{way[0]}: {error.strerror}")
            continue
        if done.stdout.startswith(f"{sys.version_info[:2]} "):
            return way
        said.append(f"{way[-1]}: {(done.stdout or done.stderr).strip()[-100:]}")
    pytest.skip(f"user {_UID} has no Python that loads this environment: {'; '.join(said)}")


def _run(way: list[str], work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*way, *words],
        cwd=_ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(work),
            "PYTHONPATH": f"{_ROOT}:{sysconfig.get_paths()['purelib']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "REGREEN_HOME": str(work / "home"),
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory of the user's own."""
    made = Path(tempfile.mkdtemp(prefix="regreen-rootless-"))
    shutil.chown(made, int(_UID), int(_UID))
    yield made
    shutil.rmtree(made, ignore_errors=True)


_needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="already an ordinary user; the suites cover it"
)
_needs_tools = pytest.mark.skipif(
    not (shutil.which("setpriv") and shutil.which("unshare")), reason="no setpriv or unshare here"
)


@_needs_root
@_needs_tools
@pytest.mark.parametrize("part", _PARTS)
def test_an_ordinary_user_gets_the_same_walls(part: str, work: Path) -> None:
    chosen, files = _PARTS[part]
    usual = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen)
    where = ("--basetemp", str(work / "t"), "-c", str(_ROOT / "pyproject.toml"), *files)
    result = _run(_way(work), work, *usual, *where)
    if "Permission denied" in result.stderr and not result.stdout:
        pytest.skip(f"user {_UID} cannot read this checkout: {result.stderr.strip()[-200:]}")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@_needs_root
@_needs_tools
def test_an_interpreter_that_the_user_may_not_enter_is_shown_to_it(work: Path) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("this root may not make mounts of its own")
    *_, bound = _ways(work)
    done = _run(bound, work, "-c", "import os, sys, grpc; print(os.getuid(), sys.prefix)")
    uid, shown = done.stdout.split()
    assert uid == _UID, done.stderr
    assert shown in _PLACES
    assert not (Path(shown) / "bin" / "python3").exists()  # in mounts of its own alone
