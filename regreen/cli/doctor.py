"""`regreen doctor`: what this machine can do, and what is missing.

- It changes nothing. With `--kube` it looks at a cluster instead (doctor_kube).
- Each line says what was looked at, what was found and the remedy.
- What can be tried is tried, in a process of its own that ends with what it made; settings of the
  kernel only say why it failed.
"""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from regreen.cli import output
from regreen.cli.options import Home, Json
from regreen.client.stack import Endpoints, Stack
from regreen.home import default_home
from regreen.rpc.errors import InvalidArgument, RegreenError
from regreen.stack import parts
from regreen.stack.layout import Layout

_GIB = 1 << 30
_PROBE_S, _BUILD_S = 20.0, 180.0
_NAMESPACE = """
import ctypes, os
def check(failed, name):
    if failed:
        raise SystemExit(f"{name}: {os.strerror(ctypes.get_errno())}")
libc = ctypes.CDLL(None, use_errno=True)
root = os.geteuid() == 0
try:
    if root:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
except OSError as error:
    raise SystemExit(f"giving up root: {error.strerror}")
check(libc.unshare(0x10000000 if root else 0x10020000), "unshare")
check(not root and libc.mount(None, b"/", None, 0x44000, None), "mount in a user namespace")
"""
"""What the sandbox service does first: as root it mounts before it gives up root, else inside."""
_SWITCHES = {
    "user.max_user_namespaces": ("0", "15000"),
    "kernel.unprivileged_userns_clone": ("0", "1"),
    "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
}
"""Settings that can forbid user namespaces: the value that does, and one that does not."""

_SAID = {True: "yes", False: "NO", None: "?"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool | None
    """None where it could not be looked at, or is a fault for some alone."""
    found: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    home: Home = None,
    kube: Annotated[
        bool, typer.Option("--kube", help="Check a Kubernetes cluster instead; reads only.")
    ] = False,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            help="With --kube: kubeconfig file; default that of kubectl.", show_default=False
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="With --kube: namespace of the chart; default the config's.")
    ] = "",
    workers_namespace: Annotated[
        str, typer.Option(help="With --kube: sandbox.workersNamespace; default the same.")
    ] = "",
    json_output: Json = False,
) -> None:
    """Check this machine or a cluster; exits with 1 if something that is needed is missing."""
    if kube:
        from regreen.cli.doctor_kube import look

        findings = output.run(look(kubeconfig, namespace, workers_namespace))
    else:
        _only_with_kube(kubeconfig, namespace, workers_namespace)
        findings = [*_machine(home or default_home()), *_services()]
        findings += _certificates(home or default_home())
        findings += output.run(_stack(home or default_home()))
    if json_output:
        output.print_json_lines(asdict(item) for item in findings)
    else:
        output.print_table(
            "",
            ["check", "ok", "found", "remedy"],
            [[item.name, _SAID[item.ok], item.found, item.remedy] for item in findings],
        )
    unknown = [item.name for item in findings if item.ok is None]
    if unknown:
        typer.echo(f"doctor: not known, or not in force: {', '.join(unknown)}", err=True)
    if any(item.ok is False for item in findings):
        raise typer.Exit(output.FAILED)


def _only_with_kube(kubeconfig: Path | None, *namespaces: str) -> None:
    """Refuse options that would be read by nobody."""
    if kubeconfig or any(namespaces):
        raise typer.BadParameter("--kubeconfig and the namespaces are for --kube; add it")


def _machine(home: Path) -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    existing = next(path for path in (home, *home.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11"),
        Finding("platform", sys.platform == "linux", sys.platform, "run on Linux"),
        _namespaces(),
        *_spawner(),
        Finding("disk", free > 5 * _GIB, f"{free / _GIB:.1f} GiB free", "free 5 GiB"),
        Finding("memory", memory > 6 * _GIB, f"{memory / _GIB:.1f} GiB", "use 8 GiB or more"),
        Finding("cpu", True, f"{os.cpu_count()} cores"),
    ]


def _namespaces() -> Finding:
    """Whether the sandbox service could isolate a process here; found out by doing it."""
    name = "user namespaces"
    trouble = _tried(["-I", "-S", "-c", _NAMESPACE]).stderr.strip()
    if not trouble:
        return Finding(name, True, "made one")
    paths = {key: "/proc/sys/" + key.replace(".", "/") for key in _SWITCHES}
    set_to = {key: value for key, path in paths.items() if (value := _read(path))}
    found = ", ".join((trouble.splitlines()[-1], *(f"{k}={v}" for k, v in set_to.items())))
    lifts = [f"sysctl {k}={good}" for k, (bad, good) in _SWITCHES.items() if set_to.get(k) == bad]
    inside = "let this container make user namespaces, or set sandbox `backend` to docker"
    return Finding(name, False, found, ", ".join(lifts) or inside)


def _spawner() -> list[Finding]:
    """Whether the sandbox service has its spawner, a C program, or can build it."""
    if importlib.util.find_spec("sandbox_svc") is None:
        return []
    tried = _tried(["-P", "-m", "sandbox_svc.backends.program"], _BUILD_S)
    if tried.returncode == 0:
        return [Finding("spawner", True, "built")]
    said = tried.stderr.strip().splitlines()[-1:] or ["it failed"]
    return [Finding("spawner", False, said[0], "install gcc and libc6-dev, or ziglang")]


def _interpreters() -> list[Finding]:
    """What the sandbox service would find, where it is installed."""
    if importlib.util.find_spec("sandbox_svc") is None:
        return []
    told = _tried(["-P", "-m", "sandbox_svc.builders.interpreters"]).stdout
    return [_pythons(json.loads(told))] if told else []


def _pythons(found: Iterable[str]) -> Finding:
    versions = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    remedy = "" if versions else "install Python 3.8 to 3.11: `uv python install 3.8 3.9 3.10 3.11`"
    return Finding("interpreters", bool(versions), ", ".join(versions) or "none", remedy)


def _tried(
    arguments: Sequence[str], within_s: float = _PROBE_S
) -> "subprocess.CompletedProcess[str]":
    """A Python program's end; one that hangs or cannot start has an error text like any other."""
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=within_s, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _services() -> list[Finding]:
    """Which services can run; that one is not installed is no trouble as long as another is."""
    idle = {lack.service: lack for lack in parts.lacks()}
    poor = {lack.service: lack for lack in parts.lacks_usual()}
    none_runs = all(name in idle for name, packages in parts.NEEDS.items() if packages)
    found = []
    for name in parts.NEEDS:
        lack = idle.get(name) or poor.get(name)
        if lack is None:
            found.append(Finding(f"service: {name}", True, "installed"))
            continue
        what = "not installed, lacks" if name in idle else "lacks"
        remedy = f"run `make setup`, or `pip install '.[{','.join(lack.extras)}]'` in a checkout"
        ok = name in idle and not none_runs
        found.append(Finding(f"service: {name}", ok, f"{what} {', '.join(lack.packages)}", remedy))
    return found


def _certificates(home: Path) -> list[Finding]:
    """Which certificate of this home ends first, where there are some."""
    from regreen.certs.folder import CertFolder  # only here is a certificate looked at

    folder = CertFolder(Layout(home).certs)
    if not folder.exists():
        return []
    try:
        first = min(folder.entries(), key=lambda entry: entry.end, default=None)
    except (OSError, ValueError, RegreenError) as error:
        return [Finding("certificates", False, str(error), "see `regreen certs show`")]
    if first is None:
        return [Finding("certificates", True, "none issued yet")]
    found = f"{first.name} ends first, at {first.end:%Y-%m-%d %H:%M} UTC"
    ok = not first.due(datetime.now(UTC))
    return [Finding("certificates", ok, found, "" if ok else "run `regreen certs renew`")]


async def _stack(home: Path) -> list[Finding]:
    try:
        endpoints = Endpoints.load(home)
    except InvalidArgument as error:
        return [Finding("home", False, error.message)]
    except RegreenError:
        idle = Finding("stack", True, "not running", "start it with `regreen up`")
        return [idle, *await asyncio.to_thread(_interpreters)]
    async with Stack(endpoints, patience_s=0.0) as stack:
        try:
            found = await stack.sandbox.get_capabilities()
        except RegreenError as error:
            return [Finding("sandbox service", False, error.message, "see `regreen logs sandbox`")]
    rows = [
        Finding(
            f"limit: {item.name}",
            True if item.proven else None,
            f"proven ({item.driver})"
            if item.proven
            else f"not in force ({item.driver}): {item.detail}",
        )
        for item in found.capabilities
    ]
    return [*rows, _pythons(found.interpreters)]


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
