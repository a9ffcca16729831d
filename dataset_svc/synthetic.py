"""Made-up tasks and trajectories for measurements: shaped like real ones, the same for a number.

- Everything derives from a number, so a run can be repeated and its parts told apart.
- Texts compress and repeat about as logs and tool calls do; no two trajectories are equal.
"""

import hashlib
import random
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.sandbox import v1 as sandbox_pb

TOOLS = ("read_file", "write_file", "find_files", "run_sh", "validate_and_build", "ask_for_help")
HACKS = ("test-deleted", "test-skipped", "assertion-weakened", "runner-replaced")
_ERRORS = (
    "ImportError: cannot import name 'soft_unicode' from 'markupsafe'",
    "AttributeError: module 'collections' has no attribute 'Mapping'",
    "TypeError: __init__() got an unexpected keyword argument 'strict'",
    "ModuleNotFoundError: No module named 'pkg_resources'",
)
_EPOCH_S, _SPAN_S = 1_700_000_000, 10_000_000
_PROMPT_TOKENS, _TURN_TOKENS = 400, 60


def task(number: int) -> pb.Task:
    """A dependency-upgrade task."""
    failing = [f"tests/test_{number % 7}.py::test_{n}" for n in range(3)]
    package = f"package-{number}"
    return pb.Task(
        id=f"{package}-1.0__culprit-{number % 40}-2.0",
        kind="dependency-upgrade",
        environment=sandbox_pb.EnvironmentSpec(
            builder="python",
            package=package,
            version="1.0",
            source=sandbox_pb.DistFile(filename=f"{package}-1.0.tar.gz", sha256="ab" * 32),
            python="3.11",
            test=sandbox_pb.TestSpec(arguments=["tests"], timeout=Duration(seconds=60)),
        ),
        fail_to_pass=failing,
        fail_to_pass_count=len(failing),
        fail_to_pass_sha256=hashlib.sha256("\n".join(sorted(failing)).encode()).hexdigest(),
        pass_to_pass_count=40,
        category="import-error",
        blame="source",
        modes=[common_pb.MODE_ANY_FIX],
        culprit=f"culprit-{number % 40}",
        culprit_version="2.0",
        split="train",
    )


def trajectory(
    number: int, task_id: str, run_id: str = "", *, turns: int = 10, id: str = ""
) -> pb.Trajectory:
    """A trajectory of a prompt and then policy and tool turns; one in four is solved."""
    rng = random.Random(number)
    solved, hacked = rng.random() < 0.25, rng.random() < 0.05
    made, mask, versions = _turns(rng, number, turns)
    tokens = len(mask)
    return pb.Trajectory(
        id=id,
        task_id=task_id,
        run_id=run_id,
        seed=number,
        pipeline=common_pb.PIPELINE_SIMPLIFIED,
        mode=common_pb.MODE_ANY_FIX,
        grader=common_pb.GRADER_BUILD_GATES,
        token_ids=[rng.randrange(32_000) for _ in range(_PROMPT_TOKENS // 4)] * 4
        + [rng.randrange(32_000) for _ in range(tokens - _PROMPT_TOKENS)],
        loss_mask=bytes(mask),
        logprobs=[-0.25 * bit for bit in mask],
        versions=versions,
        turns=made,
        end=pb.EPISODE_END_SUBMITTED if solved else pb.EPISODE_END_TURN_LIMIT,
        changes=[
            common_pb.FileChange(
                path=f"src/module_{number % 50}.py",
                kind=common_pb.CHANGE_KIND_MODIFY,
                content=f"value = {number}\n".encode() * 8,
            )
        ],
        validation=sandbox_pb.Validation(
            outcome=sandbox_pb.VALIDATION_OUTCOME_PASSED
            if solved
            else sandbox_pb.VALIDATION_OUTCOME_FAILED,
            summary=f"{number % 42} of 42 tests passed",
            counts={"passed": number % 42},
            log=f"collected 42 items\nE   {rng.choice(_ERRORS)}\n",
        ),
        reward=pb.Reward(
            value=1.0 if solved and not hacked else 0.0,
            solved=solved and not hacked,
            parts=[pb.RewardPart(name="validation", value=float(solved), detail="validated")],
            hacks=[rng.choice(HACKS)] if hacked else [],
        ),
        start_time=Timestamp(seconds=_EPOCH_S + number % _SPAN_S),
        end_time=Timestamp(seconds=_EPOCH_S + number % _SPAN_S + 60),
        stage_seconds={"generate": 20.0, "tool": 5.0},
        actor="policy" if number % 10 else "expert",
        policy=("base", "sft", "grpo")[number % 3],
        state_id="st_" + "0" * 32,
        token_exact=True,
        prompt_tokens=_PROMPT_TOKENS,
    )


def _turns(
    rng: random.Random, number: int, count: int
) -> tuple[list[pb.Turn], Sequence[int], list[pb.TokenVersion]]:
    prompt = f"The build of package-{number % 1000} is broken. {rng.choice(_ERRORS)}"
    turns = [pb.Turn(role=pb.TURN_ROLE_PROMPT, text=prompt, token_end=_PROMPT_TOKENS)]
    mask, versions, place = [0] * _PROMPT_TOKENS, [], _PROMPT_TOKENS
    for index in range(1, count):
        by_policy = index % 2 == 1
        tool = rng.choice(TOOLS) if by_policy else turns[-1].tool
        path = f"src/module_{rng.randrange(50)}.py"
        text = (
            f'<tool>{{"name": "{tool}", "arguments": {{"path": "{path}"}}}}</tool>'
            if by_policy
            else f"{path}:{rng.randrange(400)}: {rng.choice(_ERRORS)}\nexit {rng.randrange(3)}"
        )
        turns.append(
            pb.Turn(
                index=index,
                role=pb.TURN_ROLE_POLICY if by_policy else pb.TURN_ROLE_TOOL,
                text=text,
                token_start=place,
                token_end=place + _TURN_TOKENS,
                tool=tool,
                arguments_json=f'{{"path": "{path}"}}' if by_policy else "",
                ok=rng.random() < 0.9,
                duration=Duration(nanos=250_000_000),
            )
        )
        if by_policy:
            versions.append(
                pb.TokenVersion(version=number % 9, start=place, end=place + _TURN_TOKENS)
            )
        mask += [int(by_policy)] * _TURN_TOKENS
        place += _TURN_TOKENS
    return turns, mask, versions
