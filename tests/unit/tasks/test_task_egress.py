"""Hosts that a task's rollouts may reach: in its record, its file, its message and its digests."""

from pathlib import Path

import pytest

from dataset_svc import checks, translate
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox.v1 import sandbox_pb2 as pb
from regreen.tasks.jsonl import dump_lines, load_tasks, shipped_distributions, shipped_tasks
from regreen.tasks.messages import task_message
from regreen.tasks.records import RecordStore, record_sha256
from sandbox_svc.builders import base
from sandbox_svc.builders.base import DistFile, EnvironmentSpec, Pin
from sandbox_svc.specs import spec_from_proto

HOSTS = ["docs.example.org", "*.example.net:8443"]


def asking(*hosts: str):
    return shipped_tasks()[0].model_copy(update={"egress": list(hosts)})


def test_the_record_the_file_and_the_message_carry_them(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(dump_lines([asking(*HOSTS)]))
    (task,) = load_tasks(path)
    assert task.egress == HOSTS
    message = task_message(task, shipped_distributions())
    assert list(message.environment.egress) == HOSTS
    checks.check_task(translate.task_record(message, "tasks[0]"), "tasks[0]")
    store = RecordStore(tmp_path / "kept")
    store.put(task)
    assert store.get(record_sha256(task)) == task
    assert spec_from_proto(message.environment).egress == tuple(HOSTS)


@pytest.mark.parametrize(
    "entry",
    ["http://example.org", "user@example.org", "example.org:0", "a b", "0x7f.1", "*.10.0.0.1"],
)
def test_a_malformed_host_is_named_wherever_it_comes_in(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(dump_lines([asking("example.org", entry)]))
    with pytest.raises(
        InvalidArgument, match=r"line 1 field egress.*egress\[1\].*give names such as"
    ):
        load_tasks(path)
    message = task_message(asking("example.org", entry), shipped_distributions())
    with pytest.raises(InvalidArgument, match=r"tasks\[3\]\.environment\.egress\[1\]"):
        checks.check_task(translate.task_record(message, "tasks[3]"), "tasks[3]")
    with pytest.raises(InvalidArgument, match=r"spec\.egress\[1\].*give names such as"):
        spec_from_proto(pb.EnvironmentSpec(egress=["example.org", entry]))


def test_digests_of_before_there_were_hosts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "FORMAT", 2)  # that of the time
    spec = EnvironmentSpec(
        builder="python",
        package="demo",
        version="1.0",
        python="3.11",
        source=DistFile("demo-1.0.tar.gz", "1" * 64),
        pins=(Pin("six", "1.0"),),
    )
    assert spec.digest == "ee1dad2efb8326f0cc4bdbfc6ba8adf2b74f78e5994f42d8a1224a093f4f65da"
    first = shipped_tasks()[0].model_copy(update={"seconds": 20.5})  # as measured at the time
    assert first.id == "apispec-5.2.2__marshmallow-4.3.1"
    assert record_sha256(first) == (
        "405aaf76adf75b6203913055eca93158f722de5a19feb36a54e06355c5c14de4"
    )


def test_hosts_are_part_of_the_digests() -> None:
    def digests(*hosts: str) -> tuple[str, str]:
        record = asking(*hosts)
        message = task_message(record, shipped_distributions())
        return record_sha256(record), spec_from_proto(message.environment).digest

    found = [digests(), digests("a.test"), digests("b.test"), digests("a.test", "b.test")]
    for kind in zip(*found, strict=True):
        assert len(set(kind)) == len(found)
