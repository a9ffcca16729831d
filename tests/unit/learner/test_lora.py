"""Adapters: their mathematics, what a checkpoint holds of them, and how a run goes on."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner_svc import checkpoint as ckpt
from learner_svc import lora
from learner_svc.algo.batch import Pack, pack_samples
from learner_svc.engines.base import Engine
from learner_svc.engines.deepspeed import DeepSpeedEngine, prepare_environment
from learner_svc.engines.plain import PlainEngine
from learner_svc.memory import Layout, estimate_bytes, model_shape, trained_parameters
from learner_svc.model import TrainModel, freeze, load_model
from learner_svc.session import Session
from learner_svc.spec import Hyperparameters
from policy_svc.engines.sglang_adapters import adapter_of
from policy_svc.engines.weights import metadata_of
from regreen.batch import Batch
from regreen.rpc.errors import DataLoss, FailedPrecondition, InvalidArgument
from tests.unit.learner.test_session import saved_after, spec_of, train

Make = Callable[..., Batch]
RANK = {"lora_rank": 4, "lora_alpha": 8.0}


def packed(batch: Batch) -> Pack:
    samples = batch.samples
    ids, masks = [s.token_ids for s in samples], [s.loss_mask for s in samples]
    (pack,) = pack_samples(ids, masks, max_tokens=10_000)
    return pack


def test_gradients_are_those_of_the_whole_weights(tiny_model: Path, make_batch: Make) -> None:
    """The same loss, once through the adapters and once through W + (alpha / rank) B A."""
    model = load_model(tiny_model)
    freeze(model, Hyperparameters(lora_rank=4, lora_alpha=8.0))
    adapted = TrainModel(model)
    low = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in low)
    torch.manual_seed(1)
    for parameter in low.values():
        torch.nn.init.normal_(parameter, std=0.1)
    pack = packed(make_batch())
    loss = adapted(pack).sum()
    got = torch.autograd.grad(loss, list(low.values()))

    whole = load_model(tiny_model)
    whole.requires_grad_(False)
    copies = {name: p.detach().clone().requires_grad_() for name, p in low.items()}
    for place in {name.rpartition(".")[0] for name in copies}:
        module = whole.get_submodule(place)
        weight = module._parameters.pop("weight")
        module.weight = weight + 2.0 * copies[f"{place}.lora_b"] @ copies[f"{place}.lora_a"]
    expected = TrainModel(whole)(pack).sum()
    wanted = torch.autograd.grad(expected, list(copies.values()))
    torch.testing.assert_close(loss, expected)
    for name, mine, theirs in zip(low, got, wanted, strict=True):
        largest = float(theirs.abs().max())
        assert largest > 0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * largest, msg=name)


def test_a_run_begins_as_its_base_and_changes_linear_maps_alone(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    whole = Session(spec_of(tiny_model), tmp_path / "ext")
    (first, _), *_ = train(whole, batches[:1])
    whole.close()
    session = Session(spec_of(tiny_model, **RANK), tmp_path / "ext")
    assert train(session, batches[:1])[0][0] == pytest.approx(first, rel=1e-5)
    saved = saved_after(session, tmp_path / "checkpoints", batches[1:])
    session.close()
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(saved.path / ckpt.WEIGHTS)
    assert before.keys() <= after.keys() | {"lm_head.weight"}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    maps = {n for n in after if "_proj.weight" in n}
    assert changed == maps
    assert len(maps) == 14


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
@pytest.mark.parametrize("layers", [0, 1])
def test_a_resumed_run_continues_bit_for_bit(
    tiny_model: Path, make_batch: Make, tmp_path: Path, engine: str, layers: int
) -> None:
    spec = spec_of(tiny_model, engine, trainable_layers=layers, kl_coefficient=0.1, **RANK)
    batches = [make_batch(seed=seed) for seed in range(5)]
    straight = Session(spec, tmp_path / "ext")
    saved = saved_after(straight, tmp_path / "checkpoints", batches[:2])
    expected = train(straight, batches[2:])
    straight.close()
    resumed = Session(spec, tmp_path / "ext", resume=saved.path)
    assert train(resumed, batches[2:]) == expected
    resumed.close()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, raised inside DeepSpeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_alike_and_resume(
    tiny_model: Path, make_batch: Make, tmp_path: Path, stage: int
) -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    plain = Session(spec_of(tiny_model, "plain", **RANK), tmp_path / "ext")
    expected = train(plain, batches)
    plain.close()
    spec = spec_of(tiny_model, "deepspeed", zero_stage=stage, **RANK)
    session = Session(spec, tmp_path / "ext")
    results = train(session, batches[:2])
    saved = session.save(tmp_path / "checkpoints", 0, 3)
    assert saved is not None
    session.close()
    resumed = Session(spec, tmp_path / "ext", resume=saved.path)
    results += train(resumed, batches[2:])
    resumed.close()
    assert results == [pytest.approx(pair, rel=1e-4) for pair in expected]


@pytest.mark.parametrize("kind", [PlainEngine, DeepSpeedEngine])
def test_masters_of_adapters_are_fp32(
    tiny_model: Path, make_batch: Make, tmp_path: Path, kind: type[Engine]
) -> None:
    """What bf16 rounds of them is kept, and taken up again."""
    prepare_environment(tmp_path)
    settings, pack = Hyperparameters(lora_rank=4, lora_alpha=8.0), packed(make_batch())

    def engine_of(tensors: dict[str, torch.Tensor]) -> Engine:
        model = load_model(tiny_model)
        freeze(model, settings)
        if tensors:
            lora.load_adapters(model, tensors)
        return kind(TrainModel(model).train(), settings, torch.bfloat16)

    first = engine_of({})
    for _ in range(2):
        first.backward(-first.logprobs(pack).sum(), last=True)
        first.step(1e-3)
    kept = {name: tensor.clone() for name, tensor in first.adapters().items()}
    whole = {name: tensor.clone() for name, tensor in first.weights()}
    first.close()
    assert any(not torch.equal(t, t.bfloat16().float()) for t in kept.values())
    again = engine_of(kept)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.adapters().items())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.weights())
    again.close()


def test_the_reference_is_the_base(tiny_model: Path, make_batch: Make, tmp_path: Path) -> None:
    """One model is both: with its adapters switched off it gives the KL of a second model."""
    batches = [make_batch(seed=seed) for seed in range(3)]
    session = Session(spec_of(tiny_model, kl_coefficient=0.1, **RANK), tmp_path / "ext")
    told = [session.step(batch, (), lambda done, total: None) for batch in batches]
    assert abs(told[0]["kl"]) < 1e-9 < 1e-6 < told[2]["kl"]
    saved = session.save(tmp_path / "checkpoints", 0, 3)
    session.close()
    assert saved is not None
    pack = packed(batches[0])
    with torch.no_grad():
        base = TrainModel(load_model(tiny_model))(pack)
        model = load_model(tiny_model)
        freeze(model, Hyperparameters(lora_rank=4, lora_alpha=8.0))
        lora.load_adapters(model, load_file(saved.path / ckpt.ADAPTER / lora.WEIGHTS))
        adapted = TrainModel(model)
        with lora.switched_off(model):
            assert torch.equal(adapted(pack), base)
        assert not torch.allclose(adapted(pack), base, atol=1e-3)


def test_another_base_or_other_adapters_are_refused(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    spec = spec_of(base, **RANK)
    session = Session(spec, tmp_path / "ext")
    saved = saved_after(session, tmp_path / "checkpoints", [make_batch()])
    session.close()
    other = spec_of(base, lora_rank=2)
    with pytest.raises(DataLoss, match="of another model, rank or trainable_layers"):
        Session(other, tmp_path / "ext", resume=saved.path)
    model = load_model(base)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    model.save_pretrained(base)
    with pytest.raises(FailedPrecondition, match=r"another model.layers.1.mlp.up_proj.weight than"):
        Session(spec, tmp_path / "ext", resume=saved.path)
    whole = Session(spec_of(base), tmp_path / "ext")
    kept = saved_after(whole, tmp_path / "whole", [make_batch()])
    whole.close()
    with pytest.raises(FailedPrecondition, match="holds no adapters"):
        Session(spec_of(base, **RANK), tmp_path / "ext", resume=kept.path)
    # What it holds is a whole model, for a run of its own.
    session = Session(spec_of(saved.path, **RANK), tmp_path / "ext")
    train(session, [make_batch()])
    session.close()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, raised inside peft
def test_peft_reads_the_adapters(tiny_model: Path, make_batch: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements/peer.txt)")
    session = Session(spec_of(tiny_model, trainable_layers=1, **RANK), tmp_path / "ext")
    saved = saved_after(session, tmp_path / "checkpoints", [make_batch(), make_batch(seed=1)])
    session.close()
    whole = AutoModelForCausalLM.from_pretrained(saved.path)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), saved.path / ckpt.ADAPTER
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_peft_needs_to_know_is_written(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model, trainable_layers=1, **RANK), tmp_path / "ext")
    saved = saved_after(session, tmp_path / "checkpoints", [make_batch()])
    session.close()
    folder = saved.path / ckpt.ADAPTER
    told = json.loads((folder / lora.CONFIG).read_text())
    assert (told["peft_type"], told["r"], told["lora_alpha"]) == ("LORA", 4, 8.0)
    names = {
        f"base_model.model.{place}.lora_{side}.weight"
        for place in told["target_modules"]
        for side in "AB"
    }
    kept = load_file(folder / lora.WEIGHTS)
    assert kept.keys() == names
    assert len(names) == 14, "both sides of the seven maps of the one layer that trains"
    entry = saved.manifest.files[f"{ckpt.ADAPTER}/{lora.WEIGHTS}"]
    with safe_open(saved.path / ckpt.WEIGHTS, framework="pt") as weights:
        assert weights.metadata()[lora.NOTE] == entry.sha256


def test_what_is_published_has_the_adapter_that_the_checkpoint_has(
    tiny_model: Path, make_batch: Make, tmp_path: Path
) -> None:
    session = Session(spec_of(tiny_model, **RANK), tmp_path / "ext")
    train(session, [make_batch()])
    root = tmp_path / "checkpoints"
    made = [session.publish(root, 1), session.publish(root, 1)]  # the second finds the first
    saved = session.save(root, 1, 3)
    session.close()
    assert saved is not None
    assert made[0] is not None
    assert made[0].file.samefile(saved.path / ckpt.WEIGHTS)
    for name in (lora.WEIGHTS, lora.CONFIG):
        published = (made[0].path / ckpt.ADAPTER / name).read_bytes()
        assert published == (saved.path / ckpt.ADAPTER / name).read_bytes()
    note = metadata_of(saved.path / ckpt.WEIGHTS)[lora.NOTE]
    assert (
        note
        == hashlib.sha256((made[0].path / ckpt.ADAPTER / lora.WEIGHTS).read_bytes()).hexdigest()
    )
    found = adapter_of(made[0].path, tiny_model)
    assert found is not None
    assert note.startswith(found.name.removeprefix("regreen-"))


@pytest.mark.parametrize("layers", [0, 1])
def test_the_estimate_counts_what_trains(tiny_model: Path, tmp_path: Path, layers: int) -> None:
    spec = spec_of(tiny_model, trainable_layers=layers, kl_coefficient=0.1, **RANK)
    session = Session(spec, tmp_path / "ext")
    shape, settings = model_shape(tiny_model), spec.hyperparameters
    opened = session.opened()
    session.close()
    assert opened.trainable_parameters == trained_parameters(shape, settings)
    whole = spec_of(tiny_model, trainable_layers=layers, kl_coefficient=0.1).hyperparameters
    less = estimate_bytes(shape, whole, Layout()) - estimate_bytes(shape, settings, Layout())
    assert less >= 4 * shape.parameters, "no second model for the reference, among others"


def test_a_layer_without_linear_maps_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no plain linear map"):
        lora.adapt(torch.nn.Sequential(torch.nn.LayerNorm(3)), [torch.nn.LayerNorm(3)], 4, 8.0)
