"""The runtimes that this host can start, for the contract suite; the others with the reason."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import Command, ExecResult, Limits, Runtime
from sandbox_svc.backends.embedded import EmbeddedRuntime

NAMES = ("embedded", "docker")
DOCKER_IMAGE = os.environ.get("REGREEN_TEST_DOCKER_IMAGE", "debian:bookworm-slim")
SMALL = Limits(
    memory_bytes=128 << 20, pids=32, cpus=1.0, disk_bytes=64 << 20, inodes=5000, wall_s=60.0
)


def make(name: str, home: Path) -> Runtime:
    if name == "embedded":
        return EmbeddedRuntime(home, run_probes=False, warm_seats=1)
    from sandbox_svc.backends.docker import DockerRuntime

    if not shutil.which("docker") and not os.environ.get("DOCKER_HOST"):
        pytest.skip("docker: no client and no DOCKER_HOST on this host")
    return DockerRuntime(home, image=DOCKER_IMAGE, run_probes=False)


@asynccontextmanager
async def started(name: str, home: Path) -> AsyncIterator[Runtime]:
    """A running runtime; skips with the reason when this host has none."""
    runtime = make(name, home)
    try:
        await runtime.start()
    except RegreenError as error:
        if name == "docker":
            pytest.skip(f"docker: no engine answers ({type(error).__name__})")
        raise
    try:
        yield runtime
    finally:
        await runtime.close()
        if name == "docker":
            shutil.rmtree(home / "docker-layers")
            again = make(name, home)  # finds images without records, and sweeps them
            await again.start()
            await again.close()


async def sh(box, script: str, **options) -> ExecResult:
    """Run a shell script in a box."""
    options.setdefault("cwd", "/")
    return await box.run(Command(("/bin/sh", "-c", script), **options))
