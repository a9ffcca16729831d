"""Dockerfiles of the services: what they run as and stand on, and no syntax of one builder only."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "infra" / "docker"
SERVICES = ("dataset", "judge", "policy", "learner", "sandbox", "rollout")
USER = "10001:10001"
BUILDKIT = re.compile(
    r"^#\s*syntax\s*=|^RUN\s+--|^(?:COPY|ADD)\s.*--(?:link|chmod|exclude|parents|checksum)\b|<<-?\s*\w",
    re.IGNORECASE,
)
"""What the builder of Docker 20.10 and podman's do not read."""


def faults(text: str) -> Iterator[str]:
    """What a service's Dockerfile must not say, and what it lacks."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("#")]
    yield from (f"not of every builder: {line}" for line in lines if BUILDKIT.search(line))
    bases = [line.split()[1] for line in told if line.startswith("FROM ")]
    if set(bases) != {"${BASE_IMAGE}"} or "ARG BASE_IMAGE=regreen-base" not in told:
        yield f"stands on {bases}"
    last = max(number for number, line in enumerate(told) if line.startswith("FROM "))
    users = [line.removeprefix("USER ") for line in told[last:] if line.startswith("USER ")]
    if users[-1:] != [USER]:
        yield f"runs as {users[-1:] or 'root'}"
    if not any(re.fullmatch(r"RUN sh /tmp/packages\.sh \w+", line) for line in told):
        yield "installs its packages in another way"
    yield from (
        f"installs: {line}"
        for line in told[last:]
        if line.startswith("RUN ") and re.search(r"\b(?:pip|apt|apt-get|curl|wget|uv)\b", line)
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_as_nobody_in_particular_on_the_one_base(name: str) -> None:
    assert list(faults((FOLDER / f"{name}.Dockerfile").read_text())) == []


def test_there_is_no_other() -> None:
    found = {path.name.partition(".")[0] for path in FOLDER.glob("*.Dockerfile")}
    assert found == {*SERVICES, "base", "sglang"}


def test_sglang_does_not_run_as_root_either() -> None:
    lines = (FOLDER / "sglang.Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1:] == ["USER regreen"]
    assert not [line for line in lines if BUILDKIT.search(line)]


def test_packages_come_by_hash_from_the_wheelhouse_alone() -> None:
    (install,) = re.findall(
        r"pip\" install (.*?)\n(?! )", (FOLDER / "packages.sh").read_text(), re.DOTALL
    )
    assert {"--no-index", "--require-hashes", "--no-deps"} <= set(install.split())
    assert "--find-links /wheelhouse" in install


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("USER 10001:10001", "", "runs as root"),
        ("USER 10001:10001", "USER root", "runs as"),
        ("USER 10001:10001", "USER 10001:10001\nUSER 0", "runs as"),
        ("FROM ${BASE_IMAGE}\n", "FROM python:3.11\n", "stands on"),
        ("RUN sh", "RUN --mount=type=cache,target=/root/.cache sh", "not of every builder"),
        ("COPY judge_svc", "COPY --chmod=755 judge_svc", "not of every builder"),
        ("COPY judge_svc", "COPY --link judge_svc", "not of every builder"),
        ("# The", "# syntax=docker/dockerfile:1\n# The", "not of every builder"),
        ("RUN python3", "RUN <<EOF\npython3", "not of every builder"),
        ("RUN sh /tmp/packages.sh judge", "RUN pip install grpcio", "in another way"),
        ("RUN python3", "RUN pip install x && python3", "installs: "),
    ],
)
def test_what_is_wrong_is_found(old: str, new: str, said: str) -> None:
    text = (FOLDER / "judge.Dockerfile").read_text()
    assert old in text
    assert any(said in fault for fault in faults(text.replace(old, new)))
