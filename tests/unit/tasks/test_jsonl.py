"""Files of records: whole, or as they were."""

import resource
import signal
from pathlib import Path

import pytest

from regreen.tasks.jsonl import load_tasks, shipped_tasks, write_lines


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "set" / "tasks.jsonl"
    write_lines(path, [shipped_tasks()[0]])
    path.chmod(0o640)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_lines(path, shipped_tasks())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, held)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["tasks.jsonl"]
    write_lines(path, shipped_tasks()[:2])
    assert load_tasks(path) == shipped_tasks()[:2]
    assert path.stat().st_mode & 0o777 == 0o640


def test_shipped_lists_of_ids_are_cut_only_where_a_state_names_them_again() -> None:
    cut = [t for t in shipped_tasks() if len(t.tests.fail_to_pass) != t.tests.fail_to_pass_count]
    assert [t.id for t in cut if t.stage != "test-run"] == []
