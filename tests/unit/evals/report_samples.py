"""Made-up outcomes for report tests; seeded, so that the same call gives the same rows."""

import numpy as np

from regreen.evals.rows import Outcome
from regreen.evals.summary import ReportInput, RunFacts, TaskFacts
from regreen.ids import derive_seed

SUBJECTS = {
    "base": 0.05, "sft": 0.3, "grpo": 0.55,
    "baseline:noop": 0.0, "baseline:previous": 0.2, "baseline:pin-back": 0.9,
}  # fmt: skip
TOOLS = ("dependency_upgrade", "read_file", "run_sh", "validate_and_build", "INVALID")


def outcome(subject: str, task: str, pipeline: str, sample: int, *, solved: bool) -> Outcome:
    rng = np.random.default_rng(derive_seed(subject, task, pipeline, sample))
    tools = tuple(TOOLS[i] for i in rng.integers(0, len(TOOLS), size=rng.integers(1, 8)))
    return Outcome(
        id=f"trj_{subject}_{task}_{pipeline}_{sample}",
        subject=subject,
        task_id=task,
        pipeline=pipeline,
        mode="any_fix",
        sample=sample,
        solved={"build": solved or sample == 3, "build_gates": solved, "build_gates_judge": solved},
        graded="build_gates_judge",
        hacks=("TEST_SKIPPED",) if sample == 3 and subject == "grpo" else (),
        tools=tools,
        end="submitted" if solved else "turn_limit",
        tokens=900,
        sampled_tokens=120,
        seconds={"generate": 1.5, "tool": 0.4, "validate": 3.0, "judge": 0.01, "total": 5.0},
    )


def report_input() -> ReportInput:
    rng = np.random.default_rng(5)
    tasks = [f"task-{letter}" for letter in "abcdef"]
    outcomes = [
        outcome(subject, task, pipeline, sample, solved=bool(rng.random() < rate))
        for subject, rate in SUBJECTS.items()
        for task in tasks
        for pipeline in ("simplified", "full")
        for sample in range(1 if subject.startswith("baseline:") else 4)
    ]
    steps = range(1, 13)
    sft = RunFacts(
        name="sft",
        kind="sft",
        state="done",
        settings={"epochs": 2.0, "start": "base"},
        metrics={"learner/loss": [(s, 2.5 / s) for s in steps]},
        checkpoints=3,
    )
    grpo = RunFacts(
        name="grpo",
        kind="grpo",
        state="active",
        settings={"steps": 12.0},
        metrics={
            "reward_mean": [(s, s / 20) for s in steps],
            "solve_rate": [(s, s / 15) for s in steps],
            "hack_rate": [(s, 0.0) for s in steps],
            "learner/clip_fraction": [(s, float("nan")) for s in steps],
            "tool_share/read_file": [(s, 0.4) for s in steps],
        },
        checkpoints=12,
    )
    facts = [
        TaskFacts(
            task, "test", "admitted", "import-error", "source", "3.11", ("any_fix",), 2.5,
            "all checks held", (("broken-fails", 1, True), ("noop-fails", 1, True)),
        )
        for task in tasks
    ]  # fmt: skip
    return ReportInput(
        title="Sample report <script>",
        created="2026-01-02 03:04 UTC",
        environment={"processor": "made up & small"},
        outcomes=outcomes,
        subjects=list(SUBJECTS),
        grader="build_gates_judge",
        runs=[sft, grpo],
        tasks=facts,
        commands=["regreen eval --name sample"],
        lost=2,
    )
