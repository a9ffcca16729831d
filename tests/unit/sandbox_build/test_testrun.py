"""Result streams: only what the runner wrote is believed."""

import hashlib
import hmac
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_svc.backends.base import EndReason, ExecResult
from sandbox_svc.builders.testrun import read_frames, read_run

KEY = b"k" * 32


def frame(number: int, body: dict[str, Any], key: bytes = KEY) -> bytes:
    data = json.dumps(body).encode()
    mac = hmac.new(key, struct.pack(">Q", number) + data, hashlib.sha256).digest()
    return struct.pack(">I", len(data)) + mac + data


def stream(*bodies: dict[str, Any]) -> bytes:
    return b"".join(frame(number, body) for number, body in enumerate(bodies))


def run(data: bytes, exit_code: int = 0, reason: EndReason = EndReason.EXIT) -> Any:
    return read_run(ExecResult(reason, exit_code=exit_code, channel=data), KEY)


def ended(status: int = 0) -> dict[str, Any]:
    return {"t": "exit", "status": status}


def test_a_whole_run() -> None:
    found = run(
        stream(
            {"t": "start"},
            {"t": "collect", "id": "tests/b.py", "msg": "ImportError: x"},
            {"t": "collected", "n": 2},
            {"t": "control", "kind": "call", "o": "failed"},
            {"t": "test", "id": "a::b", "o": "passed", "msg": "", "s": 0.5},
            {"t": "test", "id": "a::c", "o": "failed", "msg": "boom", "s": 0.1},
            ended(1),
        ),
        exit_code=1,
    )
    assert found.ids("passed") == {"a::b"}
    assert found.tests["a::c"].message == "boom"
    assert found.collect_errors == {"tests/b.py": "ImportError: x"}
    assert found.complete
    assert not found.tampered
    assert found.collected == 2


def test_the_worst_outcome_of_an_id_wins() -> None:
    one, two = ({"t": "test", "id": "x", "o": o} for o in ("failed", "passed"))
    assert run(stream(one, two, ended())).tests["x"].outcome == "failed"
    assert run(stream(two, one, ended())).tests["x"].outcome == "failed"


def test_unknown_outcomes_are_errors() -> None:
    assert run(stream({"t": "test", "id": "x", "o": "splendid"})).tests["x"].outcome == "error"


@pytest.mark.parametrize("outcome", ["passed", "xpassed", ""])
def test_a_control_that_passes_is_the_end_of_belief(outcome: str) -> None:
    test = {"t": "test", "id": "x", "o": "passed"}
    frames = [{"t": "control", "kind": "call", "o": outcome}, test, ended()]
    assert "control that must fail" in run(stream(*frames)).tampered
    assert "no control" in run(stream(test, ended())).tampered
    good = run(stream({"t": "control", "kind": "setup", "o": "error"}, test, ended()))
    assert good.tampered == ""


def test_replaced_functions_are_named() -> None:
    frames = [{"t": "replaced", "names": ["a.b"]}, {"t": "replaced", "names": ["c"]}]
    assert run(stream(*frames)).replaced == {"a.b", "c"}


def test_status_must_agree() -> None:
    assert not run(stream(ended(1)), exit_code=0).complete
    assert not run(stream({"t": "start"})).complete
    assert not run(stream(ended(0)), reason=EndReason.SIGNAL).complete


def test_forged_replayed_and_reordered_frames_are_seen() -> None:
    good = stream({"t": "start"}, {"t": "collected", "n": 1})
    forged = frame(2, {"t": "test", "id": "x", "o": "passed"}, key=b"f" * 32)
    assert "not written by the runner" in run(good + forged).tampered
    assert "not written by the runner" in run(good + good).tampered
    swapped = frame(1, {"t": "a"}) + frame(0, {"t": "b"})
    assert "not written by the runner" in run(swapped).tampered
    assert run(good + forged).ids("passed") == set()


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_belief(data: bytes) -> None:
    frames, problem = read_frames(data, KEY)
    assert frames == []
    assert bool(problem) == bool(data)


@given(st.binary(max_size=100), st.integers(0, 80))
def test_cut_streams_keep_the_authentic_start(tail: bytes, cut: int) -> None:
    good = stream({"t": "start"}, {"t": "collected", "n": 3})
    frames, _ = read_frames(good + tail, KEY)
    assert frames[:2] == [{"t": "start"}, {"t": "collected", "n": 3}]
    frames, problem = read_frames(good[: len(good) - 1 - cut % 40], KEY)
    assert len(frames) <= 1
    assert problem


def test_a_timeout_may_cut_the_stream() -> None:
    data = stream({"t": "start"})[:-3]
    assert run(data, reason=EndReason.TIMEOUT).tampered == ""
    assert run(data).tampered != ""
