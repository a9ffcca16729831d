"""Ports of a stack: the preferred ones where they are free, else such as nobody gets unasked."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from regreen.stack import ports
from regreen.stack.ports import Ports


@pytest.fixture
def mine() -> Iterator[Ports]:
    """Ports of a stack."""
    found = Ports()
    yield found
    found.close()


def ephemeral() -> range:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return range(low, high + 1)


def test_a_free_port_is_none_that_the_kernel_gives_away(mine: Ports) -> None:
    found = [mine.pick() for _ in range(40)]
    assert len(set(found)) == 40
    assert not any(port in ephemeral() for port in found)


def test_a_preferred_port_is_kept_unless_it_is_in_use(mine: Ports) -> None:
    other = Ports()
    wanted = other.pick()
    other.close()
    assert mine.pick(wanted) == wanted
    assert mine.pick(wanted) != wanted
    mine.close()
    with socket.socket() as server:
        server.bind(("127.0.0.1", wanted))
        server.listen()
        assert mine.pick(wanted) != wanted


def test_what_a_stack_chose_is_no_other_stacks_before_it_is_bound(mine: Ports) -> None:
    other = Ports()
    chosen = other.pick()
    assert mine.pick(chosen) != chosen
    other.close()
    assert mine.pick(chosen) == chosen


@pytest.mark.parametrize("text", ["1024 65535", "nonsense", None])
def test_where_the_kernel_may_give_all_away_one_of_these_is_taken(
    mine: Ports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    told = tmp_path / "range"
    if text is not None:
        told.write_text(text)
    monkeypatch.setattr(ports, "_EPHEMERAL", told)
    assert mine.pick() > 1023
