"""Ports of a stack: the preferred ones where they are free, else such as nobody gets unasked."""

import socket
from pathlib import Path

import pytest

from regreen.stack import layout
from regreen.stack.layout import pick_port


def ephemeral() -> range:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return range(low, high + 1)


def test_a_free_port_is_none_that_the_kernel_gives_away() -> None:
    taken: set[int] = set()
    found = [pick_port(0, taken) for _ in range(40)]
    assert len(set(found)) == 40 == len(taken)
    assert not any(port in ephemeral() for port in found)


def test_a_preferred_port_is_kept_unless_it_is_in_use() -> None:
    wanted = pick_port(0, set())
    assert pick_port(wanted, set()) == wanted
    assert pick_port(wanted, {wanted}) != wanted
    with socket.socket() as other:
        other.bind(("127.0.0.1", wanted))
        other.listen()
        assert pick_port(wanted, set()) != wanted


@pytest.mark.parametrize("text", ["1024 65535", "nonsense", None])
def test_where_the_kernel_may_give_all_away_one_of_these_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    told = tmp_path / "range"
    if text is not None:
        told.write_text(text)
    monkeypatch.setattr(layout, "_EPHEMERAL", told)
    assert pick_port(0, set()) > 1023
