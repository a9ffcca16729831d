"""Numbers: every local engine's logprobs against Hugging Face's own model in float32."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_svc.engines.base import Request, Sampling
from policy_svc.engines.process import local_engines
from policy_svc.engines.stepper import Stepper
from policy_svc.engines.torch_exact import PrefixCache, TorchStepper, draw
from policy_svc.engines.torch_llama import Prefix
from tests.fixtures.policy.model import default_model, write_other_weights

PROMPT = tuple(range(1000, 1040))
TOLERANCE = {"torch": 2e-4, "openvino": 5e-4}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    import transformers

    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        default_model(), dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def exact() -> TorchStepper:
    model = default_model()
    return TorchStepper(model, model, 0, threads=1, end_id=2)


def build(name: str, exact: TorchStepper) -> Stepper:
    if name == "torch":
        return exact
    return begun(name, default_model())


def begun(name: str, model: Path) -> Stepper:
    if name == "torch":
        return TorchStepper(model, model, 0, threads=1, end_id=2)
    from policy_svc.engines.openvino import OpenVinoOptions, OpenVinoStepper

    return OpenVinoStepper(model, model, 0, OpenVinoOptions(threads=1, dtype="f32"))


def run(
    stepper: Stepper, *requests: Request
) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    found: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    for request in requests:
        stepper.add(request)
    while stepper.busy():
        for chunk in stepper.step():
            ids, logprobs = found.setdefault((chunk.request_id, chunk.sample), ([], []))
            ids += chunk.token_ids
            logprobs += chunk.logprobs
    return found


def reference_logprobs(
    model: torch.nn.Module, prompt: tuple[int, ...], ids: list[int]
) -> list[float]:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0]
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return [rows[at, token].item() for at, token in enumerate(ids)]


@pytest.mark.parametrize("name", local_engines())
def test_logprobs_equal_hugging_face(
    name: str, exact: TorchStepper, reference: torch.nn.Module
) -> None:
    stepper = build(name, exact)
    sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=10, seed=5)
    requests = [
        Request("a", PROMPT, 3, sampling),
        Request("b", PROMPT[::-1], 1, sampling),
        Request("c", PROMPT[:20], 2, sampling),
    ]
    prompts = {request.request_id: request.prompt_token_ids for request in requests}
    for (request_id, _), (ids, logprobs) in run(stepper, *requests).items():
        expected = reference_logprobs(reference, prompts[request_id], ids)
        worst = max(abs(a - b) for a, b in zip(expected, logprobs, strict=True))
        assert worst < TOLERANCE[name]


@pytest.mark.parametrize("name", local_engines())
@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 5e5},
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 32},
    ],
    ids=["untied", "a head each", "one for all, wide"],
)
def test_any_llama_is_served(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "initializer_range": 0.2, "max_position_embeddings": 256}
        | shape
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    stepper = begun(name, tmp_path)
    prompt = tuple(range(200, 240))
    sampling = Sampling(max_new_tokens=12, seed=2)
    for ids, logprobs in run(stepper, Request("a", prompt, 3, sampling)).values():
        expected = reference_logprobs(reference, prompt, ids)
        assert max(abs(a - b) for a, b in zip(expected, logprobs, strict=True)) < TOLERANCE[name]


def test_a_later_turn_on_a_cached_prefix_is_exact(
    exact: TorchStepper, reference: torch.nn.Module
) -> None:
    sampling = Sampling(max_new_tokens=6, seed=1)
    first = run(exact, Request("t1", PROMPT, 1, sampling))["t1", 0]
    longer = (*PROMPT, *first[0], 2, 198, 1, 520)
    cached = exact.add(Request("t2", longer, 1, sampling))
    assert cached >= len(PROMPT) + len(first[0]) - 1
    ids, logprobs = [], []
    while exact.busy():
        for chunk in exact.step():
            ids += chunk.token_ids
            logprobs += chunk.logprobs
    expected = reference_logprobs(reference, longer, ids)
    assert max(abs(a - b) for a, b in zip(expected, logprobs, strict=True)) < 2e-4


def test_a_sample_does_not_depend_on_its_neighbours(exact: TorchStepper) -> None:
    sampling = Sampling(max_new_tokens=6, seed=3)
    alone = run(exact, Request("x", PROMPT, 2, sampling))
    others = [Request(str(i), PROMPT[i:], 2, Sampling(max_new_tokens=4, seed=i)) for i in range(3)]
    among = run(exact, *others, Request("x", PROMPT, 2, sampling))
    assert alone["x", 1][0] == among["x", 1][0]


def test_a_swap_in_place_equals_a_fresh_model(exact: TorchStepper, tmp_path: Path) -> None:
    other = write_other_weights(tmp_path)
    sampling = Sampling(max_new_tokens=3, seed=3)
    exact.switch(1, exact.prepare(1, other))
    swapped = run(exact, Request("x", PROMPT, 1, sampling))["x", 0]
    model = default_model()
    fresh = TorchStepper(model, other, 1, threads=1, end_id=2)
    assert run(fresh, Request("x", PROMPT, 1, sampling))["x", 0] == swapped
    exact.switch(0, exact.prepare(0, model))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, math.log(2.0), math.log(5.0)]).expand(8000, 3)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(8000, generator=generator).tolist()
    counts = draw(logits, Sampling(), uniforms).bincount(minlength=3) / 8000
    assert torch.allclose(counts, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=0.02)
    cold = draw(logits, Sampling(temperature=0.5), uniforms).bincount(minlength=3) / 8000
    assert torch.allclose(cold, torch.tensor([1 / 30, 4 / 30, 25 / 30]), atol=0.02)
    assert draw(logits[:5], Sampling(temperature=0.0), uniforms[:5]).tolist() == [2] * 5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-80, 80).map(lambda i: i / 10), min_size=4, max_size=30),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 5),
    st.floats(0.05, 1.0),
)
def test_truncated_draws_stay_in_the_kept_set(
    row: list[float], uniform: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([row])
    (token,) = draw(logits, Sampling(top_k=top_k, top_p=top_p), [uniform]).tolist()
    order = sorted(range(len(row)), key=lambda i: -row[i])
    probabilities = torch.softmax(logits.double(), -1)[0]
    before = sum(probabilities[i].item() for i in order if row[i] > row[token])
    assert before < top_p + 1e-9
    if top_k:
        assert sum(1 for value in row if value > row[token]) < top_k


def test_the_prefix_cache_is_bounded_and_finds_the_longest() -> None:
    def prefix(*ids: int) -> Prefix:
        filled = torch.arange(len(ids), dtype=torch.float32).view(1, 1, -1, 1)
        return Prefix(ids, filled, filled)

    cache = PrefixCache(8)
    cache.put(prefix(1, 2, 3))
    cache.put(prefix(1, 2, 3, 4, 5))
    found = cache.longest((1, 2, 3, 4, 9))
    assert found is not None
    assert found.token_ids == (1, 2, 3, 4)
    assert found.keys.shape[2] == 4
    assert cache.longest((7, 1)) is None
    cache.put(prefix(8, 9, 10, 11))
    assert cache.longest((1, 2, 3, 4, 9)) is None
    whole = cache.longest((8, 9, 10, 11))
    assert whole is not None
    assert len(whole.token_ids) == 3, "one token is left to compute"
