"""What the containers of a home are told by: kept for ever, and never half written."""

import hashlib
import os
from pathlib import Path

import pytest

from regreen.rpc.errors import MissingDependency
from sandbox_svc.backends.docker import DockerRuntime

pytestmark = pytest.mark.asyncio(loop_scope="function")


async def begun(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Start where no engine answers: the identity is written before one is asked."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{home}/no-engine")
    runtime = DockerRuntime(home, run_probes=False)
    with pytest.raises(MissingDependency):
        await runtime.start()
    return runtime._instance


async def test_an_identity_is_written_once(tmp_path, monkeypatch):
    first = await begun(tmp_path / "home", monkeypatch)
    kept = tmp_path / "home/docker-instance"
    assert first
    assert kept.read_text() == first
    os.utime(kept, ns=(1, 1))
    assert await begun(tmp_path / "home", monkeypatch) == first
    assert kept.stat().st_mtime_ns == 1


async def test_one_that_was_cut_short_is_replaced_as_a_whole(tmp_path, monkeypatch):
    (tmp_path / "docker-layers").mkdir()
    (tmp_path / "docker-instance").touch()
    os.link(tmp_path / "docker-instance", tmp_path / "as-it-was")
    found = await begun(tmp_path, monkeypatch)
    assert found not in ("", hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:12])
    assert (tmp_path / "docker-instance").read_text() == found
    assert (tmp_path / "as-it-was").read_bytes() == b""  # not written in place
    assert await begun(tmp_path, monkeypatch) == found


async def test_a_home_of_a_version_without_identities_keeps_what_it_went_by(tmp_path, monkeypatch):
    (tmp_path / "docker-layers").mkdir()
    digest = hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:12]
    assert await begun(tmp_path, monkeypatch) == digest
