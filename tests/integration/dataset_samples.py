"""Well-formed tasks, groups and trajectories for the dataset tests.

- Everything is valid as it is; a test that wants something wrong changes one field.
"""

import hashlib
import uuid

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from regreen.client.dataset import RolloutQueueClient, RunClient, TaskClient, TrajectoryClient
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.judge import v1 as judge_pb
from regreen.sandbox import v1 as sandbox_pb


def fresh(prefix: str = "t") -> str:
    """A name that no other test uses."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def task(task_id: str = "", package: str = "") -> pb.Task:
    """A dependency-upgrade task."""
    failing = ["tests/test_a.py::test_one", "tests/test_a.py::test_two"]
    package = package or fresh("pkg")
    return pb.Task(
        id=task_id or fresh("task"),
        kind="dependency-upgrade",
        environment=sandbox_pb.EnvironmentSpec(
            builder="python",
            package=package,
            version="1.0.1",
            source=sandbox_pb.DistFile(filename=f"{package}-1.0.1.tar.gz", sha256="ab" * 32),
            python="3.10",
            pins=[
                sandbox_pb.Pin(
                    name="werkzeug",
                    version="3.1.9",
                    files=[sandbox_pb.DistFile(filename="w.whl", sha256="cd" * 32)],
                )
            ],
            test=sandbox_pb.TestSpec(arguments=["tests"], timeout=Duration(seconds=60)),
        ),
        fail_to_pass=failing,
        fail_to_pass_count=2,
        fail_to_pass_sha256=hashlib.sha256("\n".join(sorted(failing)).encode()).hexdigest(),
        pass_to_pass_count=40,
        category="import-error",
        blame="source",
        modes=[common_pb.MODE_ANY_FIX, common_pb.MODE_KEEP_NEW],
        culprit="werkzeug",
        culprit_version="3.1.9",
        culprit_good_version="2.0.3",
        fixes=[
            pb.ReferenceFix(
                mode=common_pb.MODE_KEEP_NEW,
                origin="source-edit",
                changes=[
                    common_pb.FileChange(
                        path="src/a.py",
                        kind=common_pb.CHANGE_KIND_MODIFY,
                        content=b"\x00\xffx = 1\n",
                    )
                ],
            )
        ],
        labels={"origin": "test"},
        moved={"werkzeug": "2.0.3 3.1.9"},
    )


def foreign_task(task_id: str = "") -> pb.Task:
    """A task of another system."""
    return pb.Task(
        id=task_id or fresh("foreign"),
        kind="issue",
        environment=sandbox_pb.EnvironmentSpec(builder="foreign", package=fresh("acme/repo")),
        fail_to_pass=["tests/test_a.py::test_one"],
        fail_to_pass_count=1,
        modes=[common_pb.MODE_ANY_FIX],
        split="test",
        foreign=pb.ForeignTask(
            format="swe-bench", document_json='{"instance_id": "a"}', needs=["image a:latest"]
        ),
    )


def report(task_id: str, status: int = pb.TASK_STATUS_ADMITTED) -> pb.GateReport:
    """A gate report that carries an admission."""
    names = ("broken-fails", "reference-passes", "noop-fails", "pinned")
    checks = [
        pb.GateCheck(
            name=name, repeat=n, ok=True, detail="as it should", duration=Duration(seconds=n)
        )
        for name in names
        for n in (1, 2)
    ]
    return pb.GateReport(
        task_id=task_id,
        status=status,
        reason="all checks held",
        checks=checks,
        state_id="st_" + "0" * 32,
        error_log="ImportError: cannot import name 'url_quote'",
    )


def group(run_id: str, task_id: str, size: int = 2, step: int = 1, seed: int = 7) -> pb.Group:
    """A group to enqueue."""
    return pb.Group(
        run_id=run_id,
        task_id=task_id,
        size=size,
        pipeline=common_pb.PIPELINE_SIMPLIFIED,
        mode=common_pb.MODE_ANY_FIX,
        grader=common_pb.GRADER_BUILD_GATES,
        seed=seed,
        step=step,
        labels={"temperature": "1.0"},
    )


def trajectory(
    task_id: str, *, tokens: int = 40, salt: str = "", reward: float = 1.0
) -> pb.Trajectory:
    """A trajectory of one prompt, one sampled turn, one tool result and one sampled turn."""
    prompt, first, tool = tokens // 4, tokens // 2, 3 * tokens // 4
    mask = bytes(prompt) + b"\1" * (first - prompt) + bytes(tool - first) + b"\1" * (tokens - tool)
    turns = [
        pb.Turn(index=0, role=pb.TURN_ROLE_PROMPT, text="repair this", token_end=prompt),
        pb.Turn(
            index=1,
            role=pb.TURN_ROLE_POLICY,
            text='<tool>{"name": "read_file"}</tool>\x00' + salt,
            token_start=prompt,
            token_end=first,
            tool="read_file",
            arguments_json='{"path": "a.py"}',
            ok=True,
            duration=Duration(seconds=1, nanos=500_000_000),
        ),
        pb.Turn(
            index=2,
            role=pb.TURN_ROLE_TOOL,
            text="binary \x00 \ufdd0 output",
            token_start=first,
            token_end=tool,
            tool="read_file",
            ok=True,
            state_id="st_" + "1" * 32,
            score=-0.25,
        ),
        pb.Turn(index=3, role=pb.TURN_ROLE_POLICY, text="done", token_start=tool, token_end=tokens),
    ]
    return pb.Trajectory(
        task_id=task_id,
        pipeline=common_pb.PIPELINE_SIMPLIFIED,
        mode=common_pb.MODE_ANY_FIX,
        grader=common_pb.GRADER_BUILD_GATES,
        token_ids=range(100, 100 + tokens),
        loss_mask=mask,
        logprobs=[-0.1 * bit * (n % 7) for n, bit in enumerate(mask)],
        versions=[
            pb.TokenVersion(version=3, start=prompt, end=first),
            pb.TokenVersion(version=4, start=tool, end=tokens),
        ],
        turns=turns,
        end=pb.EPISODE_END_SUBMITTED,
        changes=[
            common_pb.FileChange(
                path="src/a.py", kind=common_pb.CHANGE_KIND_ADD, content=b"\x00\x01\xff", mode=0o755
            )
        ],
        validation=sandbox_pb.Validation(
            state_id="st_" + "0" * 32,
            outcome=sandbox_pb.VALIDATION_OUTCOME_PASSED,
            summary="42 of 42 tests passed",
            tests=[sandbox_pb.TestResult(id="tests/test_a.py::test_one", outcome=1)],
            counts={"passed": 42},
            log="42 passed \x00",
        ),
        verdict=judge_pb.Verdict(accepted=True, model="", rules_version="1"),
        reward=pb.Reward(
            value=reward,
            solved=reward > 0,
            parts=[pb.RewardPart(name="validation", value=reward, detail="passed")],
            hacks=[] if reward >= 0 else ["test-deleted"],
        ),
        start_time=Timestamp(seconds=1_700_000_000),
        end_time=Timestamp(seconds=1_700_000_060, nanos=1000),
        stage_seconds={"generate": 1.5, "tool": 0.25},
        actor="policy",
        policy="base",
        state_id="st_" + "0" * 32,
        token_exact=True,
        labels={"note": "x"},
        prompt_tokens=prompt,
    )


class Clients:
    """The four clients on one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.tasks = TaskClient(channel, patience_s=2.0)
        self.trajectories = TrajectoryClient(channel, patience_s=2.0)
        self.queue = RolloutQueueClient(channel, patience_s=2.0)
        self.runs = RunClient(channel, patience_s=2.0)


async def imported(clients: Clients, count: int = 1) -> list[str]:
    """Ids of new tasks."""
    tasks = [task() for _ in range(count)]
    await clients.tasks.import_tasks(tasks)
    return [task.id for task in tasks]


async def new_run(clients: Clients) -> str:
    """Id of a new run."""
    return (await clients.runs.create_run(fresh("run"), "grpo")).run.id
