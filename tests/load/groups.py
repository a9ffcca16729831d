"""GRPO groups that a small model samples: token ids, logprobs and rewards of real completions."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regreen.batch import Batch, Sample, VersionSpan

_PROMPTS = (
    "The build fails: ImportError: cannot import name 'soft_unicode' from 'markupsafe'.",
    "AttributeError: module 'numpy' has no attribute 'float'. Which pin is to blame?",
    "TypeError: __init__() got an unexpected keyword argument 'proxies'. Fix the pins.",
    "ModuleNotFoundError: No module named 'pkg_resources'. What has to be installed?",
)
_SAMPLES, _TOKENS = 8, 40


def sampled(model_path: Path, seed: int, version: int) -> Batch:
    """One group for each prompt, sampled at temperature 1.

    A completion's reward is the share of its tokens that begin a word.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    samples = []
    for number, prompt in enumerate(_PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        head = ids.shape[1]
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=_SAMPLES,
                min_new_tokens=_TOKENS,
                max_new_tokens=_TOKENS,
            )
            scores = model(out[:, :-1]).logits[:, head - 1 :].log_softmax(-1)
        logprobs = scores.gather(-1, out[:, head:, None]).squeeze(-1)
        for row, said in zip(out, logprobs, strict=True):
            words = tokenizer.convert_ids_to_tokens(row[head:].tolist())
            samples.append(
                Sample.make(
                    row.numpy(),
                    [0] * head + [1] * _TOKENS,
                    logprobs=[0.0] * head + said.tolist(),
                    group_id=f"grp_{seed}_{number}",
                    prompt_len=head,
                    reward=sum(word.startswith("Ġ") for word in words) / _TOKENS,
                    spans=(VersionSpan(head, int(row.numel()), version),),
                )
            )
    return Batch(tuple(samples), kind="grpo")
