"""Base, SFT and GRPO policies on the same held-out tasks, trained anew with each of several seeds.

- A seed is one whole chain: its own experts' order, its own rollouts, its own draws when measured.
- Every stage is resumable by the run or task that it writes; a killed study goes on where it was,
  and one with more seeds adds to those that are there.
- Intervals are over tasks and seeds at once: both are drawn anew, since another study would have
  met other ones of both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regreen.client.stack import Stack
from regreen.evals.report import write_report, write_whole
from regreen.evals.rows import Outcome, load_outcomes, outcomes_by_task
from regreen.evals.stats import crossed_mean, sign_flip_p
from regreen.loop import EPISODE, Loop, Plan, Show, digest, report_folder, stack_alone
from regreen.rpc.errors import FailedPrecondition, InvalidArgument
from regreen.train.progress import Listener
from regreen.train.weights import BASE

PLAN = Plan(
    name="study",
    train_tasks=16,
    test_tasks=12,
    eval_samples=2,
    sft_epochs=3,
    sft_styles=3,
    grpo_steps=6,
    groups_per_step=4,
    group_size=4,
    max_refills=2,
    labels=EPISODE,
    pipelines=("simplified",),
)
QUICK = Plan(
    name="study-quick",
    train_tasks=4,
    test_tasks=2,
    eval_samples=1,
    sft_epochs=1,
    sft_styles=1,
    grpo_steps=1,
    groups_per_step=1,
    group_size=2,
    max_refills=0,
    labels=EPISODE,
    pipelines=("simplified",),
)
STAGES = ("base", "sft", "grpo")
_GRADER = "build_gates_judge"
Outcomes = Mapping[tuple[str, int], Sequence[Outcome]]
"""What was measured, by stage and seed."""
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study wrote."""

    markdown: Path
    json: Path
    html: Path
    """The report of all its runs."""
    found: Json


async def run_study(
    home: Path, plan: Plan, seeds: Sequence[int], out: Path, listen: Listener, show: Show
) -> StudyResult:
    """Run a study, or go on with it; writes `results.md` and `results.json` to `out`.

    Raises:
        InvalidArgument: no seeds, one of them twice, or `out` cannot be written.
        FailedPrecondition: too few tasks can run on this machine, or another demo or study runs on
            this home; says what is missing.
        Unavailable: a service did not come up or come back.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InvalidArgument("seeds", f"are {list(seeds)}", "give at least one, none twice")
    async with stack_alone(home, show) as stack:
        return await _run(stack, home, plan, seeds, out, listen, show)


async def _run(
    stack: Stack,
    home: Path,
    plan: Plan,
    seeds: Sequence[int],
    out: Path,
    listen: Listener,
    show: Show,
) -> StudyResult:
    loop = Loop(stack, plan, listen, show)
    train, test = await loop.tasks()
    name = f"{plan.name}-{digest(plan, train, test)}"
    measured: dict[tuple[str, int], Sequence[Outcome]] = {}
    evals, runs = [], []
    steps = [(seed, stage) for seed in seeds for stage in STAGES]
    for number, (seed, stage) in enumerate(steps):
        show("study", number, len(steps), f"seed {seed}: {stage}", paced=False)
        run, of_sft = f"{name}-{stage}-{seed}", f"{name}-sft-{seed}"
        if stage == "sft":
            await loop.sft(run, train, seed=seed)
        elif stage == "grpo":
            await loop.grpo(run, of_sft, train, seed=seed)
        subject = BASE if stage == "base" else run
        measure = f"{name}-eval-{stage}-{seed}"
        scripts = stage == "base" and seed == seeds[0]
        run_id = await loop.evaluate(measure, subject, test, seed=seed, scripts=scripts)
        measured[stage, seed] = await load_outcomes(stack, run_id)
        evals.append(measure)
        runs += [run] if stage != "base" else []
    show("study", len(steps), len(steps), "report", paced=False)
    command = f"regreen study --seeds {','.join(map(str, seeds))}"
    command += " --quick" if plan.name == QUICK.name else ""
    files = await write_report(
        stack, report_folder(home, plan), evals=evals, runs=runs, commands=[command], title="Study"
    )
    report = json.loads(files.json.read_text())
    found = {
        "command": command,
        "created": report["created"],
        "environment": report["environment"],
        "plan": asdict(plan),
        "train_tasks": train,
        "lost": report["lost"],
        **results(measured),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_whole(out / "results.md", markdown(found))
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror}"
        raise InvalidArgument("out", problem, "name a directory you can write") from error
    return StudyResult(out / "results.md", out / "results.json", files.html, found)


def results(measured: Outcomes, grader: str = _GRADER) -> Json:
    """Every figure of a study, of what was measured by stage and seed.

    A share is that of a task's attempts; means are over tasks, so that none weighs more than
    another. Tasks that were not measured in every stage and seed are left out.

    Raises:
        FailedPrecondition: no task was measured in all of them.
    """
    seeds = sorted({seed for _, seed in measured})
    policies = {
        key: [o for o in outcomes if not o.subject.startswith("baseline:")]
        for key, outcomes in measured.items()
    }
    by_task = {key: outcomes_by_task(outcomes, grader) for key, outcomes in policies.items()}
    tasks = sorted(set.intersection(*(set(found) for found in by_task.values())))
    if not tasks:
        raise FailedPrecondition(
            "no task was measured in every stage with every seed: attempts were lost to the "
            "platform; see `regreen runs list --kind eval`, and use other seeds"
        )
    policies = {
        key: [outcome for outcome in outcomes if outcome.task_id in tasks]
        for key, outcomes in policies.items()
    }
    shares = {
        stage: np.array([[np.mean(by_task[stage, s][t]) for t in tasks] for s in seeds])
        for stage in STAGES
    }
    return {
        "seeds": seeds,
        "tasks": tasks,
        "stages": {stage: _stage(stage, shares[stage], policies, seeds) for stage in STAGES},
        "differences": [
            _difference(first, second, shares)
            for first, second in (("base", "sft"), ("sft", "grpo"), ("base", "grpo"))
        ],
        "scripts": _scripts(measured, tasks, grader),
    }


def _stage(
    stage: str, shares: NDArray[np.float64], policies: Outcomes, seeds: Sequence[int]
) -> Json:
    own = [outcome for seed in seeds for outcome in policies[stage, seed]]
    return {
        **asdict(crossed_mean(shares)),
        "attempts": len(own),
        "by_seed": [round(float(row.mean()), 6) for row in shares],
        "by_task": [round(float(column.mean()), 6) for column in shares.T],
        "flagged": sum(bool(outcome.hacks) for outcome in own),
        "turns": round(float(np.mean([len(outcome.tools) for outcome in own])), 3),
    }


def _difference(first: str, second: str, shares: Mapping[str, NDArray[np.float64]]) -> Json:
    gaps = shares[second] - shares[first]
    p_value = sign_flip_p(gaps.mean(axis=0))
    found = asdict(crossed_mean(gaps, signed=True))
    return {"first": first, "second": second, **found, "p_value": p_value}


def _scripts(measured: Outcomes, tasks: Sequence[str], grader: str) -> Json:
    found: dict[str, list[Outcome]] = {}
    for outcomes in measured.values():
        for outcome in outcomes:
            if outcome.subject.startswith("baseline:") and outcome.task_id in tasks:
                found.setdefault(outcome.subject, []).append(outcome)
    rates = {name: outcomes_by_task(of, grader) for name, of in sorted(found.items())}
    return {
        name: asdict(crossed_mean(np.array([[np.mean(of[t]) for t in sorted(of)]])))
        for name, of in rates.items()
    }


def markdown(found: Json) -> str:
    """The results as a page for people."""
    plan, seeds = found["plan"], found["seeds"]
    lines = [
        "# Base, SFT and GRPO on held-out tasks",
        "",
        f"Made by `{found['command']}` on {found['created']}; run it again and it goes on. "
        f"{found['environment'].get('processor', '')}.",
        f"{len(found['train_tasks'])} tasks were there to train on, {len(found['tasks'])} held "
        f"out; {len(seeds)} seeds; simplified pipeline, every fair mode, {plan['eval_samples']} "
        f"attempts of each; {plan['grpo_steps']} steps of GRPO with {plan['groups_per_step']} "
        f"groups of {plan['group_size']}. Attempts lost to the platform: {found['lost']}.",
        "",
        "| solved, graded by build, gates and the judge's rules | mean over tasks | 95% interval "
        "over tasks and seeds | by seed | attempts | flagged as hacks | turns |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage, row in found["stages"].items():
        by_seed = ", ".join(f"{share:.0%}" for share in row["by_seed"])
        lines.append(
            f"| {stage} | {row['value']:.1%} | {row['low']:.1%} – {row['high']:.1%} | {by_seed} "
            f"| {row['attempts']} | {row['flagged']} | {row['turns']:.1f} |"
        )
    lines += [
        f"| script: `{name}` | {row['value']:.1%} | {row['low']:.1%} – {row['high']:.1%} | – "
        f"| {row['samples']} | – | – |"
        for name, row in found["scripts"].items()
    ]
    lines += ["", "| difference | points | 95% interval | p (sign flips over tasks) |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {row['first']} to {row['second']} | {100 * row['value']:+.1f} "
        f"| {100 * row['low']:+.1f} – {100 * row['high']:+.1f} | {row['p_value']:.2g} |"
        for row in found["differences"]
    ]
    lines += ["", f"| task | {' | '.join(STAGES)} |", f"|---|{'---|' * len(STAGES)}"]
    for index, task in enumerate(found["tasks"]):
        cells = (f"{found['stages'][stage]['by_task'][index]:.0%}" for stage in STAGES)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
