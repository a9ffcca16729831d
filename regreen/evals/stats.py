"""Statistics of repeated binary outcomes on a set of tasks; numpy only, every draw seeded.

- The unit of resampling is the task (the cluster): samples of one task are not independent.
- A rate is the mean over tasks of the mean over samples, so that no task weighs more than another.
- No interval is ever of zero width only because few tasks were seen: where the bootstrap is
  degenerate, a score interval with the number of tasks as sample size takes its place and says so.
- A difference is paired: both subjects are resampled on the same tasks.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from regreen.rpc.errors import InvalidArgument

Outcomes = Mapping[str, Sequence[bool]]
"""Task id to the outcomes of its samples."""

_EXACT_TASKS = 14
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float
    tasks: int
    samples: int
    method: str
    """"bootstrap", "wilson", "newcombe" or "none" (nothing was sampled)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first on the tasks that both were sampled on."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided sign-flip permutation test over tasks; exact up to 14 tasks."""
    tasks: int
    method: str


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples solves a task (arXiv:2107.03374).

    Raises:
        InvalidArgument: `k` is not in [1, samples] or `solved` not in [0, samples].
    """
    if not 1 <= k <= samples:
        raise InvalidArgument("k", f"is {k}", f"give 1 to {samples}, the number of samples")
    if not 0 <= solved <= samples:
        raise InvalidArgument("solved", f"is {solved}", f"give 0 to {samples}")
    if samples - solved < k:
        return 1.0
    factors = 1.0 - k / np.arange(samples - solved + 1, samples + 1, dtype=np.float64)
    return float(1.0 - np.prod(factors))


def mean_pass_at_k(outcomes: Outcomes, k: int) -> float | None:
    """Mean of `pass_at_k` over the tasks; None unless each has at least `k` samples."""
    if not outcomes or min(map(len, outcomes.values())) < k:
        return None
    values = [pass_at_k(len(o), sum(map(bool, o)), k) for o in outcomes.values()]
    return float(np.mean(values))


def wilson(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927).

    Raises:
        InvalidArgument: no trials, or more successes than trials.
    """
    if trials < 1:
        raise InvalidArgument("trials", "is less than 1", "give the number of trials")
    if not 0 <= successes <= trials:
        raise InvalidArgument("successes", f"is {successes}", f"give 0 to {trials}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == trials else min(1.0, (centre + spread) / scale)
    return low, high


def solve_rate(
    outcomes: Outcomes, *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Estimate:
    """pass@1 with a percentile bootstrap interval over tasks."""
    rates, samples = _task_rates(outcomes)
    if rates.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, "none")
    value = float(rates.mean())
    if np.ptp(rates) == 0.0:
        low, high = wilson(value * rates.size, rates.size, confidence)
        return Estimate(value, low, high, rates.size, samples, "wilson")
    low, high = _bootstrap(rates, confidence, draws, seed)
    return Estimate(value, low, high, rates.size, samples, "bootstrap")


def paired_difference(
    first: Outcomes,
    second: Outcomes,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Difference:
    """pass@1 of `second` minus pass@1 of `first`, paired by task.

    Tasks that only one of the two was sampled on are left out.
    """
    shared = sorted(t for t in first.keys() & second.keys() if first[t] and second[t])
    if not shared:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0, "none")
    left, _ = _task_rates({task: first[task] for task in shared})
    right, _ = _task_rates({task: second[task] for task in shared})
    gaps = right - left
    value, p_value = float(gaps.mean()), sign_flip_p(gaps, draws=draws, seed=seed)
    if np.ptp(gaps) == 0.0:
        low, high = _newcombe(float(left.mean()), float(right.mean()), gaps.size, confidence)
        return Difference(value, low, high, p_value, gaps.size, "newcombe")
    low, high = _bootstrap(gaps, confidence, draws, seed)
    return Difference(value, low, high, p_value, gaps.size, "bootstrap")


def crossed_mean(
    values: NDArray[np.float64],
    *,
    signed: bool = False,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` (seeds, tasks) with an interval over both: each is drawn anew by itself.

    Values are shares, or differences of shares where `signed`. Of one seed only tasks are drawn.
    Source: the pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1(2)).
    """
    seeds, tasks = values.shape
    if not values.size:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, "none")
    value = float(values.mean())
    if np.ptp(values) == 0.0:
        share = (1 + value) / 2 if signed else value
        low, high = wilson(share * tasks, tasks, confidence)
        low, high = (2 * low - 1, 2 * high - 1) if signed else (low, high)
        return Estimate(value, low, high, tasks, values.size, "wilson")
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    for index in range(draws):
        rows = rng.integers(0, seeds, seeds)
        columns = rng.integers(0, tasks, tasks)
        means[index] = values[np.ix_(rows, columns)].mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(value, float(low), float(high), tasks, values.size, "bootstrap")


def sign_flip_p(gaps: NDArray[np.float64], *, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean of zero when every gap's sign is exchangeable.

    Exact (all 2^n sign patterns) up to 14 gaps, else a seeded Monte Carlo estimate that counts the
    observed pattern itself (Phipson and Smyth 2010).
    """
    gaps = np.asarray(gaps, dtype=np.float64)
    observed = abs(float(gaps.sum())) - 1e-12
    if gaps.size <= _EXACT_TASKS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=gaps.size)))
        return float(np.mean(np.abs(signs @ gaps) >= observed))
    rng = np.random.default_rng(seed)
    signs = rng.choice((-1.0, 1.0), size=(draws, gaps.size))
    return float((1 + np.count_nonzero(np.abs(signs @ gaps) >= observed)) / (draws + 1))


def _task_rates(outcomes: Outcomes) -> tuple[NDArray[np.float64], int]:
    tasks = sorted(task for task, values in outcomes.items() if len(values))
    rates = np.array([np.mean([bool(v) for v in outcomes[t]]) for t in tasks], dtype=np.float64)
    return rates, sum(len(outcomes[task]) for task in tasks)


def _bootstrap(
    values: NDArray[np.float64], confidence: float, draws: int, seed: int
) -> tuple[float, float]:
    if draws < 1:
        raise InvalidArgument("draws", f"is {draws}", "give at least 1")
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    rows = max(1, _CHUNK // values.size)
    for start in range(0, draws, rows):
        picks = rng.integers(0, values.size, size=(min(rows, draws - start), values.size))
        means.append(values[picks].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def _newcombe(first: float, second: float, trials: int, confidence: float) -> tuple[float, float]:
    """Hybrid score interval of a difference of proportions (Newcombe 1998, method 10)."""
    low1, high1 = wilson(first * trials, trials, confidence)
    low2, high2 = wilson(second * trials, trials, confidence)
    gap = second - first
    low = gap - math.hypot(second - low2, high1 - first)
    high = gap + math.hypot(high2 - second, first - low1)
    return max(-1.0, low), min(1.0, high)
