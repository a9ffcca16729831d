"""The benchmark of whole GRPO steps: what it hands to the learner, measures, and makes of it."""

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from regreen.batch import Batch, VersionSpan
from regreen.policy import v1 as policy_pb
from regreen.train.bench import number_types, spreads, table, target, targets
from regreen.train.bench_sides import Rollout, Trl, batch_of, observation, tree_peak_bytes


def completion(ids: Sequence[int], version: int, text: str) -> policy_pb.Completion:
    span = policy_pb.VersionSpan(version=version, start=0, end=len(ids))
    logprobs = [-0.5] * len(ids)
    return policy_pb.Completion(token_ids=ids, logprobs=logprobs, versions=[span], text=text)


def test_only_what_was_sampled_is_trained_on_with_the_version_it_was_sampled_under():
    rollout = Rollout.begin([5, 6, 7])
    rollout.take(completion([8, 2], 1, "e"))  # it ended early
    rollout.take(completion([9], 1, "x"))
    rollout.observe([10, 11])
    rollout.take(completion([12], 2, "ee"))
    other = Rollout.begin([5, 6, 7])
    other.take(completion([8, 9], 1, "x"))
    batch = Batch.from_bytes(batch_of([[rollout, other]]).to_bytes())
    first, second = batch.samples
    assert first.token_ids.tolist() == [5, 6, 7, 8, 2, 9, 10, 11, 12]
    assert first.loss_mask.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1]
    assert first.logprobs.tolist() == [0, 0, 0, -0.5, -0.5, -0.5, 0, 0, -0.5]
    assert first.spans == (VersionSpan(3, 5, 1), VersionSpan(5, 6, 1), VersionSpan(8, 9, 2))
    assert (first.reward, second.reward) == (0.75, 0.0)
    assert batch.group_ids == ("grp_0",)


def test_every_sample_sees_tool_output_of_its_own():
    seen = {tuple(observation(turn, sample, 20)) for turn in (1, 2) for sample in range(32)}
    assert len(seen) == 64
    assert all(300 <= token < 48300 for ids in seen for token in ids)


def test_bf16_is_measured_where_the_processor_has_units_for_it(tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512_bf16\n")
    assert number_types(cpuinfo) == ("fp32",)
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512_bf16 amx_bf16\n")
    assert number_types(cpuinfo) == ("fp32", "bf16")


def one(ours_mb: int = 5000) -> dict[str, object]:
    ours = {"step_s": [50.0, 52.0, 70.0], "rollout_s": [10.0], "update_s": [40.0], "live_s": [2.1]}
    trl = {"step_s": [180.0, 182.0, 190.0], "generate_s": [29.0], "update_s": [88.0]}
    seconds = {"ours": spreads(ours), "trl": spreads(trl)}
    peaks = {"ours": ours_mb, "trl": 10_000}
    return {"rounds": 3, "trl": "1.16.0", "seconds": seconds, "peak_mb": peaks, "growth": {}}


def test_targets_are_told_as_met_or_missed():
    update = {"ratio": 2.4, "loss_ours": -0.1, "loss_trl": -0.1, "grad_norm_ours": 8.1}
    found = targets({"fp32": one(), "bf16": one(20_000)}, {"fp32": update | {"grad_norm_trl": 8.2}})
    assert {name: row["met"] for name, row in found.items()} == {
        "TRL's step over ours, fp32": True,
        "padded update over ours, fp32": True,
        "transformers.generate over our rollout, fp32": False,
        "our peak memory over TRL's, fp32": True,
        "seconds until new weights serve, fp32": False,
        "TRL's step over ours, bf16": True,
        "padded update over ours, bf16": True,
        "transformers.generate over our rollout, bf16": False,
        "our peak memory over TRL's, bf16": False,
        "seconds until new weights serve, bf16": False,
        "loss of both updates on one group, apart by, fp32": True,
        "grad_norm of both updates on one group, apart by, fp32": False,
    }
    assert found["TRL's step over ours, fp32"] == target(3.5, "at least", 3.5)


def test_without_trl_only_what_needs_no_peer_is_told():
    alone = one()
    alone["trl"] = "TRL is not installed: `make bench-rl` installs it"
    alone["seconds"] = {"ours": alone["seconds"]["ours"]}
    alone["peak_mb"] = {"ours": 5000}
    met = targets({"fp32": alone}, {"fp32": {"skipped": "TRL is not installed"}})
    assert list(met) == ["seconds until new weights serve, fp32"]
    shape = {"prompts": 4, "samples": 8, "prompt_tokens": 400, "new_tokens": 80}
    report = {"shape": shape, "threads": 2, "steps": {"fp32": alone}, "targets": met}
    text = table(report | {"updates": {}, "skipped": {"bf16": "only emulated"}})
    assert "`make bench-rl` installs it" in text
    assert "seconds until new weights serve, fp32: 2.1, at most 2: missed" in text
    assert "bf16: left out, only emulated" in text


def test_the_peak_counts_a_process_and_what_it_started():
    grow = "a = bytearray(b'x' * (48 << 20)); del a; print('done', flush=True); input()"
    code = (
        "import subprocess, sys; "
        f'p = subprocess.Popen([sys.executable, "-c", "{grow}"], stdin=subprocess.PIPE); '
        f"{grow}"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"done\n", b"done\n"]
        assert tree_peak_bytes(process.pid) > 2 * (96 << 20) * 0.9
        process.communicate(b"\n")
    assert tree_peak_bytes(process.pid) == 0


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path: Path):
    code = (
        "import sys; sys.modules['trl'] = None; from learner_svc.peer import main; "
        f"sys.exit(main(['--model', {str(tmp_path)!r}, '--output', {str(tmp_path)!r}, "
        "'--threads', '1']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"event": "missing"' in done.stdout
    assert "`make bench-rl` installs it" in done.stdout


def test_updates_that_are_not_the_same_are_no_ratio():
    from learner_svc.bench import check_equal

    check_equal((-0.5, 8.134), (-0.5, 8.135), "fp32")
    with pytest.raises(ValueError, match=r"gradient norm: ours 8\.1"):
        check_equal((-0.5, 8.1), (-0.5, 8.2), "fp32")
    check_equal((-0.5, 8.1), (-0.5, 8.2), "bf16")


async def test_a_peer_that_dies_in_a_step_is_told_with_its_log(tmp_path: Path):
    code = "import sys; sys.stdin.readline(); sys.stderr.write('no memory'); sys.exit(9)"
    pipe = asyncio.subprocess.PIPE
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=pipe, stdout=pipe, stderr=log
        )
    peer = Trl(process, {"event": "ready", "trl": "1.16.0"}, tmp_path / "log")
    assert not peer.missing
    assert await peer.step() == {}
    assert peer.missing == "TRL's trainer ended with 9; its log ends: no memory"
    assert await peer.step() == {}
