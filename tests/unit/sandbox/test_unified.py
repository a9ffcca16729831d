"""Diffs for people are such that `patch` and `git apply` take them."""

import subprocess
import time
from pathlib import Path

import pytest

from sandbox_svc.unified import lines_of, unified


def shown(old: str, new: str, name: str = "f.py") -> str:
    sides = (lines_of(old.encode()), lines_of(new.encode()))
    return unified(*sides, f"a/{name}", f"b/{name}", until_s=time.monotonic() + 20)


@pytest.mark.parametrize("mark", ["\x0c", "\r", "\x0b", "\x1c", "\x85", "\u2028", "\r\n"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, mark: str, end: str) -> None:
    old, new = f"a{mark}b\nc{end}", f"a{mark}b\nd{mark}e{end}"
    text = shown(old, new)
    assert text.count("\\ No newline at end of file") == (0 if end else 2)
    (tmp_path / "f.py").write_bytes(old.encode())
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(command, input=text.encode(), cwd=tmp_path, check=True)
    assert (tmp_path / "f.py").read_bytes() == new.encode()


def test_a_name_with_a_blank_ends_in_a_tab() -> None:
    assert shown("a\n", "b\n", "a b.txt").startswith("--- a/a b.txt\t\n+++ b/a b.txt\t\n@@")


def test_what_is_no_text_has_no_lines() -> None:
    with pytest.raises(UnicodeDecodeError):
        lines_of("café".encode("latin-1"))
    assert lines_of(b"") == []
