"""What ranks keep in the host's memory: refusals, estimates, and DeepSpeed's configuration."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner_svc import estimate as estimates
from learner_svc import gpus
from learner_svc.algo.batch import pack_samples
from learner_svc.engines.base import OptimizerState
from learner_svc.engines.deepspeed import DeepSpeedEngine, config_for, prepare_environment
from learner_svc.engines.plain import PlainEngine
from learner_svc.memory import Layout, estimate_bytes, model_shape, offloaded_bytes
from learner_svc.model import TrainModel, load_model
from learner_svc.spec import Hyperparameters, RunKind, RunSpec
from regreen.rpc.errors import FailedPrecondition, InvalidArgument

OFF = Hyperparameters(offload="optimizer", zero_stage=2)


def spec_of(model: Path, engine: str = "deepspeed", **changes: object) -> RunSpec:
    settings = replace(OFF, **changes)  # type: ignore[arg-type]
    return RunSpec("run_1", RunKind.GRPO, str(model), engine, settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offload": "disk"}, "give one of none, optimizer, parameters"),
        ({"offload": "parameters"}, "set zero_stage to 3"),
        ({"zero_stage": 0}, "divides nothing"),
        ({"engine": "plain"}, "the engine is plain"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_model: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said):
        spec_of(tiny_model, **changes).check()  # type: ignore[arg-type]


@pytest.mark.skipif(gpus.has_gpu(), reason="runs compute on GPUs here")
def test_a_run_that_computes_in_the_hosts_memory_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InvalidArgument, match="offload: is optimizer, but runs compute on this"):
        estimates.estimate(spec_of(tiny_model), [tiny_model], 2)


def test_what_is_kept_elsewhere_is_not_kept_here(tiny_model: Path) -> None:
    shape, layout = model_shape(tiny_model), Layout(masters=True, ranks=4, on_gpu=True, half=True)
    here = replace(OFF, offload="none")
    gained = estimate_bytes(shape, here, layout) - estimate_bytes(shape, OFF, layout)
    assert gained == 12 * shape.parameters // 4
    assert offloaded_bytes(shape, here, layout) == 0
    assert offloaded_bytes(shape, OFF, layout) == 16 * shape.parameters // 4
    both = replace(OFF, offload="parameters", zero_stage=3)
    assert offloaded_bytes(shape, both, layout) == 18 * shape.parameters // 4
    few = replace(OFF, trainable_layers=1)
    assert offloaded_bytes(shape, few, layout) == 16 * shape.layer_parameters // 4


def test_a_host_that_has_not_as_much_is_refused(tiny_model: Path) -> None:
    layout = Layout(masters=True, ranks=2, on_gpu=True)
    shape = replace(model_shape(tiny_model), parameters=10**15)
    with pytest.raises(FailedPrecondition, match=r"2 processes would keep .* in the host's memory"):
        estimates._host_bytes(shape, OFF, layout, 2)


@pytest.mark.parametrize(
    ("offload", "stage"),
    [("none", 2), ("optimizer", 1), ("optimizer", 2), ("optimizer", 3), ("parameters", 3)],
)
def test_deepspeed_reads_its_configuration_as_meant(offload: str, stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = config_for(replace(OFF, offload=offload), torch.bfloat16, stage)
    read = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert read.stage == stage
    for kept, places in (
        (read.offload_optimizer, ("optimizer", "parameters")),
        (read.offload_param, ("parameters",)),
    ):
        assert (kept is not None and kept.device == "cpu") == (offload in places)
    # torch's AdamW is what DeepSpeed refuses to run beside weights that are elsewhere.
    assert config["optimizer"]["params"]["torch_adam"] == (offload == "none")


def trained(engine: DeepSpeedEngine | PlainEngine, updates: int) -> list[float]:
    """Gradient norms of so many updates on one sample."""
    mask = np.r_[0, np.ones(37)].astype(np.uint8)
    [pack] = pack_samples([np.arange(2, 40)], [mask], max_tokens=99)
    norms = []
    for _ in range(updates):
        engine.backward(-engine.logprobs(pack).mean(), last=True)
        norms.append(engine.step(1e-3))
    return norms


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it compiles
@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler")
def test_deepspeeds_adamw_for_processors_does_as_torchs(tiny_model: Path, tmp_path: Path) -> None:
    """On a CPU the host's memory is where all is already, but the code is that of GPUs."""
    prepare_environment(tmp_path / "extensions")

    def opened() -> DeepSpeedEngine:
        return DeepSpeedEngine(TrainModel(load_model(tiny_model)).train(), OFF, torch.float32)

    plain = PlainEngine(TrainModel(load_model(tiny_model)).train(), OFF, torch.float32)
    expected = trained(plain, 4)
    engine = opened()
    assert engine.state_format == "adamw"
    assert trained(engine, 2) == pytest.approx(expected[:2], rel=1e-4)
    state = engine.optimizer_state()
    kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    assert trained(engine, 2) == pytest.approx(expected[2:], rel=1e-4)
    engine.close()
    other = opened()
    with torch.no_grad():
        for name, parameter in other._model.model.named_parameters():
            other._deepspeed.utils.safe_set_full_fp32_param(parameter, weights[name])
            parameter.copy_(weights[name])
    other.load_optimizer_state(OptimizerState(state.updates, kept))
    assert other.optimizer_state().updates == 2
    assert trained(other, 2) == pytest.approx(expected[2:], rel=1e-4)
    other.close()
