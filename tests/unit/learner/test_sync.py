"""Weights offered through a blob store, and a policy that takes them: exact, bounded, whole."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner_svc import lora, published
from learner_svc.checkpoint import FileEntry, Manifest, Saved, entry_of
from learner_svc.published import Position, Published
from learner_svc.settings import LearnerSettings
from learner_svc.sync import SyncConfig, WeightSync
from policy_svc.engines.sglang_adapters import adapter_of
from policy_svc.offered import OfferedWeights, form_at
from regreen.blobs import Digest, ObjectBlobs, digest_of, open_blobs
from regreen.rpc.errors import DataLoss, NotFound, RegreenError
from regreen.weight_sync import Offer, name_of

DELTA = SyncConfig("delta", snapshot_every=3)
Weights = dict[str, Tensor]


class Run:
    """A run that publishes weights whose masters move by less than bf16 tells apart, mostly."""

    def __init__(self, home: Path, blobs: ObjectBlobs, config: SyncConfig = DELTA, seed: int = 0):
        self.folder, self.config, self.blobs = home / f"run-{seed}", config, blobs
        self.source = home / "model"
        self.source.mkdir(parents=True, exist_ok=True)
        (self.source / "config.json").write_text('{"hidden_size": 1}')
        (self.source / "tokenizer.json").write_text('{"tokens": []}')
        self.sync = WeightSync(blobs, config)
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: Weights = {
            name: torch.randn(shape, generator=self.generator) * 0.02
            for name, shape in {"embed": (300, 40), "norm": (40,)}.items()
        }
        self.version = 0
        self.adapter: dict[str, str] = {}
        """Files of adapters, those of their weights last."""

    def step(self, rate: float = 1e-6) -> Published:
        """Move the masters and publish them."""
        for name, old in self.weights.items():
            noise = torch.randn(old.shape, generator=self.generator)
            self.weights[name] = old + rate * noise.sign()
        self.version += 1
        return self.publish()

    def publish(self) -> Published:
        def write(path: Path) -> FileEntry:
            notes = {}
            for name, text in self.adapter.items():
                file = path.parent / "adapter" / name
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
                notes = {lora.NOTE: entry_of(file).sha256}
            save_file(self.weights, path, notes)
            return entry_of(path)

        position = Position(self.folder.name, self.version, self.version)
        root = published.beside(self.folder / "checkpoints")
        return published.publish(root, position, self.source, write)

    async def offer(self, rate: float = 1e-6) -> tuple[Published, Offer]:
        made = self.step(rate)
        offered = await self.sync.offer(self.folder, made)
        assert offered is not None
        return made, offered.offer


def blob(home: Path, digest: Digest) -> Path:
    return home / "blobs" / digest.sha256[:2] / digest.sha256


def blobs_of(home: Path) -> set[str]:
    return {path.name for path in (home / "blobs").glob("??/*")}


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"regreen_policy_weight_{name}_total", labels) or 0.0


def same_as_served(folder: Path, made: Published) -> bool:
    """Whether a folder has, bit for bit, what torch rounds the published weights to."""
    got, masters = load_file(folder / "model.safetensors"), load_file(made.file)
    return got.keys() == masters.keys() and all(
        torch.equal(got[name].view(torch.int16), masters[name].to(torch.bfloat16).view(torch.int16))
        for name in masters
    )


@pytest.fixture
def store(tmp_path: Path) -> ObjectBlobs:
    return open_blobs(tmp_path / "blobs")


async def test_a_policy_follows_by_deltas_and_gets_every_bit(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run, policy = Run(tmp_path, store), OfferedWeights(store, tmp_path / "policy")
    serving = tmp_path / "nothing"
    lengths, deltas = [], count("fetches", kind="delta")
    snapshots, fallbacks = count("fetches", kind="snapshot"), count("fallbacks", reason="no_base")
    for _ in range(7):
        made, offer = await run.offer()
        lengths.append(len(offer.chain))
        serving = await policy.path_of(made.entry.sha256, {serving})
        assert same_as_served(serving, made)
        assert (serving / "config.json").read_text() == '{"hidden_size": 1}'
        assert len(list((tmp_path / "policy").iterdir())) <= 3
        link = offer.chain[-1]
        if link.delta is not None:
            assert link.delta.size_bytes < link.weights.size_bytes / 20
    assert lengths == [1, 2, 3, 1, 2, 3, 1]
    assert count("fetches", kind="delta") == deltas + 4
    assert count("fetches", kind="snapshot") == snapshots + 3
    assert count("fallbacks", reason="no_base") == fallbacks
    assert await policy.path_of(made.entry.sha256, ()) == serving


async def test_blobs_and_names_of_old_chains_are_removed(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store)
    made = [await run.offer() for _ in range(8)]
    kept = made[3:]  # chains that begin with the fourth and the seventh
    files = {digest.sha256 for digest in made[0][1].files.values()}
    expected = {digest.sha256 for _, offer in kept for digest in offer.blobs}
    offers = {digest_of(offer.to_bytes()).sha256 for _, offer in kept}
    assert blobs_of(tmp_path) == expected | offers | files
    named = [await store.named(name_of(one.entry.sha256)) for one, _ in made]
    assert [name is not None for name in named] == [False] * 3 + [True] * 5
    last = made[-1][1].weights.sha256
    assert {path.name for path in (run.folder / "sync").iterdir()} == {
        "state.json",
        f"{last}.safetensors",
    }
    late = OfferedWeights(store, tmp_path / "late")
    with pytest.raises(NotFound, match="offers no weights"):
        await late.path_of(made[0][0].entry.sha256, ())


async def test_who_has_no_base_takes_the_snapshot_and_the_deltas_after_it(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store)
    made = [(await run.offer())[0] for _ in range(3)]
    before = count("fallbacks", reason="no_base")
    late = OfferedWeights(store, tmp_path / "late")
    assert same_as_served(await late.path_of(made[2].entry.sha256, ()), made[2])
    assert count("fallbacks", reason="no_base") == before + 1
    # And back: what a crash of the driver has it do.
    assert same_as_served(await late.path_of(made[1].entry.sha256, ()), made[1])


async def test_weights_that_are_the_same_are_offered_once(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store)
    made, offer = await run.offer()
    there = blobs_of(tmp_path)
    again = await run.sync.offer(run.folder, run.publish())
    assert again is not None
    assert (again.offer, blobs_of(tmp_path)) == (offer, there)
    anew = WeightSync(store, DELTA)  # as after a start of the service
    again = await anew.offer(run.folder, made)
    assert again is not None
    assert (again.offer, blobs_of(tmp_path)) == (offer, there)


async def test_two_runs_of_the_same_weights_share_no_blob(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    first, second = Run(tmp_path, store), Run(tmp_path, store)
    second.folder = tmp_path / "run-other"
    for _ in range(3):
        await first.offer()
        made, _ = await second.offer()
    for _ in range(6):  # the first goes on until it has removed those
        await first.offer()
    policy = OfferedWeights(store, tmp_path / "policy")
    assert same_as_served(await policy.path_of(made.entry.sha256, ()), made)


@pytest.mark.parametrize("spoil", ["cut", "changed", "gone"])
async def test_a_delta_that_is_damaged_or_gone_is_done_without(
    tmp_path: Path, store: ObjectBlobs, spoil: str
) -> None:
    """One of a chain that the policy's base is further than is not needed; the last one is."""
    run, policy = Run(tmp_path, store), OfferedWeights(store, tmp_path / "policy")
    (first, _), (second, offer) = [await run.offer() for _ in range(2)]
    serving = await policy.path_of(first.entry.sha256, ())
    digest = offer.chain[1].delta
    assert digest is not None
    path = blob(tmp_path, digest)
    content = path.read_bytes()
    path.unlink()
    if spoil != "gone":
        path.write_bytes(content[:-1] if spoil == "cut" else content[:-1] + b"?")
    before = count("fallbacks", reason="missing" if spoil == "gone" else "damaged")
    with pytest.raises(NotFound if spoil == "gone" else DataLoss):
        await policy.path_of(second.entry.sha256, {serving})
    assert count("fallbacks", reason="missing" if spoil == "gone" else "damaged") == before + 1
    assert form_at(serving) is not None
    third = [await run.offer() for _ in range(2)][-1][0]
    assert same_as_served(await policy.path_of(third.entry.sha256, {serving}), third)


async def test_a_base_that_is_damaged_here_is_found_and_replaced(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run, policy = Run(tmp_path, store), OfferedWeights(store, tmp_path / "policy")
    first, _ = await run.offer()
    serving = await policy.path_of(first.entry.sha256, ())
    weights = serving / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second, _ = await run.offer()
    before = count("fallbacks", reason="damaged")
    assert same_as_served(await policy.path_of(second.entry.sha256, {serving}), second)
    assert count("fallbacks", reason="damaged") == before + 1
    anew = OfferedWeights(store, tmp_path / "policy")
    assert same_as_served(await anew.path_of(first.entry.sha256, ()), first)


@pytest.mark.parametrize("spoil", ["gone", "damaged", "other type"])
async def test_a_learner_without_a_sound_base_makes_a_snapshot(
    tmp_path: Path, store: ObjectBlobs, spoil: str
) -> None:
    run = Run(tmp_path, store)
    _, offer = await run.offer()
    base = run.folder / "sync" / f"{offer.weights.sha256}.safetensors"
    if spoil == "gone":
        base.unlink()
    elif spoil == "damaged":
        base.write_bytes(base.read_bytes()[:-1] + b"?")
    config = DELTA
    run.sync = WeightSync(store, config)  # a process that has not hashed it
    if spoil == "other type":
        run.weights["norm"] = torch.randn(41, generator=run.generator)
    made, offer = await run.offer()
    assert len(offer.chain) == 1
    policy = OfferedWeights(store, tmp_path / "policy")
    assert same_as_served(await policy.path_of(made.entry.sha256, ()), made)
    assert len((await run.offer())[1].chain) == 2


async def test_deltas_that_would_be_more_than_a_snapshot_are_not_made(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    """At a rate that moves every element."""
    run = Run(tmp_path, store, SyncConfig("delta", snapshot_every=100))
    chains = [len((await run.offer(rate=0.05))[1].chain) for _ in range(6)]
    assert chains[0] == 1
    assert chains.count(1) > 2


async def test_whole_weights_in_fp32_are_those_that_were_published(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store, SyncConfig("full", "fp32"))
    policy = OfferedWeights(store, tmp_path / "policy")
    for _ in range(3):
        made, offer = await run.offer()
        assert len(offer.chain) == 1
        folder = await policy.path_of(made.entry.sha256, ())
        got, masters = load_file(folder / "model.safetensors"), load_file(made.file)
        assert all(torch.equal(got[name], masters[name]) for name in masters)
    assert {path.name for path in (run.folder / "sync").iterdir()} == {"state.json"}
    assert len(list((tmp_path / "blobs").glob("names/*"))) == 2


async def test_adapters_come_along_and_are_removed_with_their_weights(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run, policy = Run(tmp_path, store), OfferedWeights(store, tmp_path / "policy")
    told = {"base_model_name_or_path": str(run.source)}
    blobs: list[str] = []
    for number in range(7):
        run.adapter = {lora.CONFIG: json.dumps(told), lora.WEIGHTS: f"adapters {number}"}
        made, offer = await run.offer()
        folder = await policy.path_of(made.entry.sha256, ())
        found = adapter_of(folder, run.source)  # its digest is that of the weights' notes
        assert found is not None
        assert (found.path / lora.WEIGHTS).read_text() == f"adapters {number}"
        assert same_as_served(folder, made)
        blobs.append(offer.files[f"adapter/{lora.WEIGHTS}"].sha256)
    assert [sha256 in blobs_of(tmp_path) for sha256 in blobs] == [False] * 3 + [True] * 4


async def test_by_path_alone_nothing_is_written(tmp_path: Path, store: ObjectBlobs) -> None:
    run = Run(tmp_path, store, SyncConfig())
    assert await run.sync.offer(run.folder, run.step()) is None
    assert not blobs_of(tmp_path)
    assert not (run.folder / "sync").exists()


def test_deltas_of_fp32_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="take bf16, of which it changes few, or full"):
        LearnerSettings(weight_sync="delta", sync_dtype="fp32")
    assert LearnerSettings(weight_sync="full", sync_dtype="fp32").snapshot_every == 20


async def test_a_store_that_does_not_take_them_is_told_and_asked_again(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store)
    made = run.step()
    real = tmp_path / "blobs"
    shutil.rmtree(real)
    real.write_text("no folder")
    with pytest.raises(RegreenError):
        await run.sync.offer(run.folder, made)
    # A checkpoint is whole all the same.
    files = {"model.safetensors": made.entry}
    manifest = Manifest(run.folder.name, 1, 1, 1, "", {}, "adamw", (), 0, files=files)
    saved = Saved(made.path, manifest)
    await run.sync.offer_saved(run.folder, saved)
    real.unlink()
    real.mkdir()
    await run.sync.offer_saved(run.folder, saved)
    again = await run.sync.offer(run.folder, made)
    assert again is not None
    assert again.digest == await store.named(name_of(made.entry.sha256))
    policy = OfferedWeights(store, tmp_path / "policy")
    assert same_as_served(await policy.path_of(made.entry.sha256, ()), made)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(format="other"),
        lambda raw: raw.update(chain=[]),
        lambda raw: raw["chain"][0].update(delta=raw["chain"][0]["weights"]),
        lambda raw: raw["chain"].append(raw["chain"][0]),
        lambda raw: raw["chain"][0]["weights"].update(sha256="../../etc"),
        lambda raw: raw["files"].update({"../x": raw["chain"][0]["weights"]}),
        lambda raw: raw["files"].update({"a/b/c": raw["chain"][0]["weights"]}),
        lambda raw: raw["files"].update({"/x": raw["chain"][0]["weights"]}),
        lambda raw: raw.update(more=1),
        lambda raw: raw.pop("files"),
    ],
)
async def test_an_offer_that_says_what_cannot_be_is_refused(
    tmp_path: Path, store: ObjectBlobs, change: Callable[[dict[str, object]], object]
) -> None:
    run = Run(tmp_path, store)
    made, offer = await run.offer()
    assert Offer.from_bytes(offer.to_bytes()) == offer
    raw = json.loads(offer.to_bytes())
    change(raw)
    digest = await store.put(json.dumps(raw).encode())
    await store.name(name_of(made.entry.sha256), digest, replace=True)
    with pytest.raises(DataLoss, match="an offer of weights cannot be read"):
        await OfferedWeights(store, tmp_path / "policy").path_of(made.entry.sha256, ())


async def test_an_offer_under_the_name_of_others_is_refused(
    tmp_path: Path, store: ObjectBlobs
) -> None:
    run = Run(tmp_path, store)
    first, _ = await run.offer()
    second, _ = await run.offer()
    other = await store.named(name_of(second.entry.sha256))
    assert other is not None
    await store.name(name_of(first.entry.sha256), other, replace=True)
    with pytest.raises(DataLoss, match="others are offered"):
        await OfferedWeights(store, tmp_path / "policy").path_of(first.entry.sha256, ())


_KILLS = """
import asyncio, os, shutil, signal, sys, threading
from pathlib import Path

import tests.unit.learner.test_sync as t
import learner_svc.sync, policy_svc.offered
from regreen.blobs import open_blobs

home, who = Path(sys.argv[1]), sys.argv[2]
TRACED = {learner_svc.sync.__file__ if who == "learner" else policy_svc.offered.__file__}


def child(work, at=0):
    \"\"\"Whether a process of its own came to its end; it is killed at the line number `at`.\"\"\"
    if pid := os.fork():
        return os.waitpid(pid, 0)[1] == 0
    lines = 0

    def line(frame, event, arg):
        nonlocal lines
        lines += event == "line"
        if lines == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame, event, arg):
        return line if frame.f_code.co_filename in TRACED else None

    try:
        if at:
            threading.settrace(call)
            sys.settrace(call)
        asyncio.run(work())
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def run_in(place):
    \"\"\"A run that has published `steps` versions, and offered those before the last.\"\"\"
    blobs = open_blobs(place / "blobs", fsync=False)
    return t.Run(place, blobs, t.SyncConfig("delta", snapshot_every=2))


async def before(place):
    run = run_in(place)
    made = [await run.offer() for _ in range(5)]
    if who == "policy":
        await t.OfferedWeights(run.blobs, place / "policy").path_of(made[-1][0].entry.sha256, ())
        await run.offer()


async def offer(place):
    run = run_in(place)
    made = [run.step() for _ in range(6)][-1]
    await run.sync.offer(run.folder, made)


async def take(place):
    run = run_in(place)
    made = [run.step() for _ in range(6)]
    policy = t.OfferedWeights(run.blobs, place / "policy")
    got = await policy.path_of(made[-1].entry.sha256, {place / "policy" / made[-2].entry.sha256})
    assert t.same_as_served(got, made[-1])


async def check(place, whole=False):
    \"\"\"Weights are whole or not there, for a policy that has none and for this one.\"\"\"
    run = run_in(place)
    made = [run.step() for _ in range(6)]
    seen = t.OfferedWeights(run.blobs, place / f"other-{whole}")
    for one in made[-2:]:
        try:
            assert t.same_as_served(await seen.path_of(one.entry.sha256, ()), one)
        except t.NotFound:
            assert one is made[-1] and not whole
    for path in (place / "policy").glob("*/form.json"):
        if form := t.form_at(path.parent):
            assert t.entry_of(path.parent / "model.safetensors").sha256 == form.weights.sha256


async def after(place):
    \"\"\"What a kill leaves, what comes of the same work again, what is left in the end.\"\"\"
    await check(place)
    await (offer if who == "learner" else take)(place)
    await check(place, whole=True)
    run = run_in(place)
    run.version = 6
    for _ in range(4):
        await run.offer(rate=1e-5)
    left = len([*(place / "blobs").glob("??/*")])
    assert left == 2 + 2 * 4, left  # small files; of each of four offers its blob and its link
    if who == "policy":
        assert len([*(place / "policy").iterdir()]) <= 3


assert child(lambda: before(home / "before"))
at, ended = 1, False
while not ended:
    place = home / str(at)
    shutil.copytree(home / "before", place)
    work = offer if who == "learner" else take
    ended = child(lambda: work(place), at)
    assert child(lambda: after(place)), at
    shutil.rmtree(place)
    at += int(sys.argv[3])
print(at)
"""


@pytest.mark.parametrize("who", ["learner", "policy"])
def test_a_kill_at_every_fourth_line_leaves_it_whole_or_not_at_all(
    tmp_path: Path, who: str
) -> None:
    command = [sys.executable, "-c", _KILLS, str(tmp_path), who, "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 60
