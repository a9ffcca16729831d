"""Brings /work/env to what requirements.lock says: `sync_env.py [--lock FILE]`.

- Standard library only, Python 3.7 and newer; runs uv, never touches the network.
- Only releases of the wheelhouse's index are installed, each checked by its sha256.
- The project itself stays installed as it is, whatever the lock says.
- Exit status: 0 in step, 2 a bad lock, 3 not in the wheelhouse, 4 the installation failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any, NoReturn

Index = Any
FACTS = "/work/.regreen/env.json"
PIN = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
PYTHON = re.compile(r"#\s*python==(\d+\.\d+)")


def fail(status: int, message: str) -> NoReturn:
    sys.stderr.write(f"sync-env: {message}\n")
    sys.exit(status)


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(path: str) -> tuple[dict[str, str], str]:
    pins: dict[str, str] = {}
    python = ""
    try:
        with open(path, encoding="utf-8") as source:
            lines = source.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(2, f"{path} cannot be read: {error}")
    for number, raw in enumerate(lines, 1):
        line = raw.strip()
        match = PYTHON.fullmatch(line)
        if match:
            python = match.group(1)
            continue
        line = line.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        match = PIN.fullmatch(line)
        if not match:
            fail(2, f"line {number}: {line[:80]!r} is no pin; write name==version")
        name = normalize(match.group(1))
        if name in pins:
            fail(2, f"line {number} pins {name} twice; keep one")
        pins[name] = match.group(2)
    return pins, python


def site_packages(env: str) -> str:
    lib = os.path.join(env, "lib")
    for name in sorted(os.listdir(lib)) if os.path.isdir(lib) else []:
        folder = os.path.join(lib, name, "site-packages")
        if name.startswith("python") and os.path.isdir(folder):
            return folder
    return ""


def installed(env: str, project: str) -> dict[str, str]:
    found: dict[str, str] = {}
    folder = site_packages(env)
    for entry in os.listdir(folder) if folder else []:
        if entry.endswith(".dist-info"):
            name, _, version = entry[: -len(".dist-info")].rpartition("-")
            if normalize(name) != project:
                found[normalize(name)] = version
    return found


def same_version(left: str, right: str) -> bool:
    def key(text: str) -> str:
        return re.sub(r"[-_]", ".", text.lower()).lstrip("v")

    return key(left) == key(right)


def hashed_requirements(wanted: dict[str, str], index: Index) -> str:
    lines = []
    for name, version in sorted(wanted.items()):
        releases = index.get(name, {})
        files = releases.get(version)
        if files is None:
            offered = ", ".join(sorted(releases)) or "no release of it"
            fail(3, f"{name}=={version} is not in the wheelhouse; it has: {offered}")
        hashes = " ".join("--hash=sha256:" + entry["sha256"] for entry in files)
        lines.append(f"{name}=={version} {hashes}\n")
    return "".join(lines)


def uv(*arguments: str) -> None:
    command = [os.environ.get("REGREEN_UV", "/opt/regreen/bin/uv"), *arguments]
    environment = dict(os.environ)
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "UV_FIND_LINKS", "UV_INDEX_URL"):
        environment.pop(name, None)
    environment.update(UV_NO_CONFIG="1", UV_OFFLINE="1", UV_NO_PROGRESS="1", UV_LINK_MODE="copy")
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        text = done.stdout.decode("utf-8", "replace").strip()
        fail(4, "uv {} failed:\n{}".format(" ".join(arguments[:2]), text[-4000:]))


def install(env: str, wanted: dict[str, str], index: Index, wheelhouse: str) -> None:
    handle, path = tempfile.mkstemp(prefix="pins-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(hashed_requirements(wanted, index))
    python = os.path.join(env, "bin/python")
    offline = ["--no-deps", "--no-index", "--find-links", wheelhouse, "--no-build"]
    uv("pip", "install", "--quiet", "--python", python, *offline, "--require-hashes", "-r", path)
    os.unlink(path)


def install_project(env: str, facts: dict[str, Any]) -> None:
    python = os.path.join(env, "bin/python")
    if facts["install_mode"] == "editable":
        uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--no-index",
           "--find-links", facts["buildhouse"], "--editable", facts["repo"])  # fmt: skip
    elif facts["install_mode"] == "path":
        with open(os.path.join(site_packages(env), "project.pth"), "w", encoding="utf-8") as out:
            out.write("\n".join(facts["path"]) + "\n")


def new_env(env: str, executable: str) -> None:
    shutil.rmtree(env, ignore_errors=True)
    uv("venv", "--quiet", "--python", executable, env)


def main() -> None:
    if sys.prefix != sys.base_prefix:
        # The environment may be replaced below: go on under its base interpreter.
        # (`sys._base_executable` is the environment's own before Python 3.11.)
        base = os.path.realpath(sys.executable)
        os.execv(base, [base, "-I", "-S", os.path.abspath(__file__), *sys.argv[1:]])
    with open(FACTS, encoding="utf-8") as source:
        facts = json.load(source)
    parser = argparse.ArgumentParser(prog="sync-env")
    parser.add_argument("--lock", default=os.path.join(facts["repo"], "requirements.lock"))
    options = parser.parse_args()
    with open(os.path.join(facts["wheelhouse"], "index.json"), encoding="utf-8") as source:
        index = json.load(source)
    pins, python = read_lock(options.lock)
    env, fresh = facts["env"], False
    python = python or facts["python"]
    if python not in facts["interpreters"]:
        offered = ", ".join(sorted(facts["interpreters"]))
        fail(3, f"python=={python} cannot be chosen here; there is: {offered}")
    if os.path.basename(os.path.dirname(site_packages(env))) != "python" + python:
        hashed_requirements(pins, index)
        new_env(env, facts["interpreters"][python])
        fresh = True
        sys.stdout.write(f"python {python}\n")
    have = installed(env, facts["project"])
    wanted = {n: v for n, v in pins.items() if not (n in have and same_version(have[n], v))}
    extra = sorted(set(have) - set(pins))
    hashed_requirements(wanted, index)
    if extra:
        uv("pip", "uninstall", "--quiet", "--python", os.path.join(env, "bin/python"), *extra)
    if wanted:
        install(env, wanted, index, facts["wheelhouse"])
    if fresh:
        install_project(env, facts)
    for name in extra:
        sys.stdout.write(f"removed {name} {have[name]}\n")
    for name, version in sorted(wanted.items()):
        sys.stdout.write("{} {} -> {}\n".format(name, have.get(name, "(new)"), version))
    if not (extra or wanted or fresh):
        sys.stdout.write("already in step\n")


if __name__ == "__main__":
    main()
