"""What bf16 rounds is not lost: masters are the weights as they were loaded."""

from pathlib import Path

import numpy as np
import torch

from learner_svc.algo.batch import pack_samples
from learner_svc.engines.deepspeed import DeepSpeedEngine, prepare_environment
from learner_svc.model import TrainModel, load_model
from learner_svc.spec import Hyperparameters


def engine_of(path: Path, extensions: Path) -> DeepSpeedEngine:
    prepare_environment(extensions)
    return DeepSpeedEngine(TrainModel(load_model(path)).train(), Hyperparameters(), torch.bfloat16)


def test_masters_are_the_weights_that_were_loaded(tiny_model: Path, tmp_path: Path) -> None:
    engine = engine_of(tiny_model, tmp_path)
    loaded = dict(load_model(tiny_model).named_parameters())
    found = {name: tensor.clone() for name, tensor in engine.weights()}
    engine.close()
    assert found.keys() == loaded.keys()
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in loaded.values())
    for name, tensor in loaded.items():
        assert torch.equal(found[name], tensor), name


def test_moments_survive_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    engine = engine_of(tiny_model, tmp_path)
    assert engine.optimizer_state().updates == 0
    [pack] = pack_samples(
        [np.arange(2, 40)], [np.r_[0, np.ones(37)].astype(np.uint8)], max_tokens=99
    )
    for _ in range(2):
        engine.backward(-engine.logprobs(pack).sum(), last=True)
        engine.step(1e-3)
    state = engine.optimizer_state()
    kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
    engine.close()
    other = engine_of(tiny_model, tmp_path)
    other.load_optimizer_state(state)
    again = other.optimizer_state()
    assert (state.updates, again.updates, again.tensors.keys()) == (2, 2, kept.keys())
    assert any(tensor.any() for tensor in kept.values())
    for name, tensor in kept.items():
        assert torch.equal(again.tensors[name], tensor), name
    other.close()
