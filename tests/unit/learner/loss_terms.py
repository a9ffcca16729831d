"""Random tokens of four samples, and the loss that the package gives for them."""

import torch
from torch import Tensor

from learner_svc.algo.choices import LossSpec
from learner_svc.algo.losses import TokenTerms, policy_loss, token_scales
from learner_svc.algo.ratios import rejected

LENGTHS = [5, 2, 7, 3]
TOKENS = sum(LENGTHS)


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Flat random terms of four samples; double precision."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return -torch.rand(TOKENS, generator=generator, dtype=torch.double) * 2 - 0.1

    return {
        "current": draw(),
        "proximal": draw(),
        "sampled": draw(),
        "reference": draw(),
        "advantages": torch.tensor([0.7, -1.1, 0.4, -0.2], dtype=torch.double),
        "sample": torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
    }


def our_loss(
    data: dict[str, Tensor], spec: LossSpec, weights: list[float], selected: Tensor | None = None
) -> Tensor:
    """The loss of `data`, as the trainer puts it together."""
    sample = data["sample"]
    proximal = data.get("proximal")
    kept = None
    if spec.importance_cap is not None and spec.correction.rejects:
        kept = ~rejected(
            data["current"].detach() if proximal is None else proximal,
            data["sampled"],
            sample,
            correction=spec.correction,
            cap=spec.importance_cap,
            floor=spec.importance_floor,
        )
    scale = token_scales(
        spec.kind,
        sample,
        torch.tensor(weights),
        max_completion_tokens=spec.max_completion_tokens,
        kept=kept,
    )
    terms = TokenTerms(
        data["sampled"],
        data["advantages"][sample],
        scale.double(),
        proximal,
        data["reference"] if spec.kl_coefficient else None,
        sample,
        selected,
    )
    return policy_loss(data["current"], terms, spec).loss
