"""Protobuf to records and back: trajectories.

- Translation only; token ids, masks and logprobs pass through bit for bit.
- A message that was stored and read again is equal to the first, but for what a lease filled in.
"""

from dataset_svc import arrays
from dataset_svc.records import (
    PartRecord,
    RewardRecord,
    TrajectoryQuery,
    TrajectoryRecord,
    TurnRecord,
)
from dataset_svc.translate import (
    duration,
    enum_name,
    enum_value,
    from_document,
    moment,
    seconds,
    timestamp,
    to_document,
)
from regreen.common import v1 as common_pb
from regreen.dataset import v1 as pb
from regreen.judge import v1 as judge_pb
from regreen.rpc.errors import InvalidArgument
from regreen.sandbox import v1 as sandbox_pb

_LEAST_CHARS, _MOST_CHARS = 3, 400
"""A shorter text has no trigram, so that no index could find it."""


def trajectory_record(message: pb.Trajectory) -> TrajectoryRecord:
    """A trajectory as it came."""
    versions = [(span.version, span.start, span.end) for span in message.versions]
    stream = arrays.stream_of(message.token_ids, message.loss_mask, message.logprobs, versions)
    return TrajectoryRecord(
        id=message.id,
        task_id=message.task_id,
        run_id=message.run_id,
        group_id=message.group_id,
        group_index=message.group_index,
        attempt=message.attempt,
        seed=message.seed,
        pipeline=enum_name(common_pb.Pipeline, message.pipeline, "trajectory.pipeline"),
        mode=enum_name(common_pb.Mode, message.mode, "trajectory.mode"),
        grader=enum_name(common_pb.Grader, message.grader, "trajectory.grader"),
        end=enum_name(pb.EpisodeEnd, message.end, "trajectory.end"),
        actor=message.actor,
        policy=message.policy,
        state_id=message.state_id,
        token_exact=message.token_exact,
        prompt_tokens=message.prompt_tokens,
        stream=stream,
        turns=tuple(_turn_record(turn, place) for place, turn in enumerate(message.turns)),
        reward=_reward_record(message.reward) if message.HasField("reward") else None,
        verdict=to_document(message.verdict, "trajectory.verdict")
        if message.HasField("verdict")
        else None,
        validation=to_document(message.validation, "trajectory.validation")
        if message.HasField("validation")
        else None,
        changes=tuple(
            to_document(change, f"trajectory.changes[{place}]")
            for place, change in enumerate(message.changes)
        ),
        labels=dict(message.labels),
        stage_seconds=dict(message.stage_seconds),
        start_time=moment(message, "start_time", "trajectory.start_time"),
        end_time=moment(message, "end_time", "trajectory.end_time"),
        wire_bytes=message.ByteSize(),
    )


def trajectory_message(record: TrajectoryRecord) -> pb.Trajectory:
    """A stored trajectory; parts that the record leaves out stay unset."""
    message = pb.Trajectory(
        id=record.id,
        task_id=record.task_id,
        run_id=record.run_id,
        group_id=record.group_id,
        group_index=record.group_index,
        attempt=record.attempt,
        seed=record.seed,
        pipeline=enum_value(common_pb.Pipeline, record.pipeline),
        mode=enum_value(common_pb.Mode, record.mode),
        grader=enum_value(common_pb.Grader, record.grader),
        end=enum_value(pb.EpisodeEnd, record.end),
        actor=record.actor,
        policy=record.policy,
        state_id=record.state_id,
        token_exact=record.token_exact,
        prompt_tokens=record.prompt_tokens,
        turns=[_turn_message(turn) for turn in record.turns],
        changes=[from_document(change, common_pb.FileChange()) for change in record.changes],
        labels=record.labels,
        stage_seconds=record.stage_seconds,
        start_time=timestamp(record.start_time),
        end_time=timestamp(record.end_time),
    )
    if record.stream is not None:
        message.token_ids.extend(record.stream.token_ids.tolist())
        message.loss_mask = record.stream.loss_mask.tobytes()
        message.logprobs.extend(record.stream.logprobs.tolist())
        for version, start, end in record.stream.versions:
            message.versions.add(version=version, start=start, end=end)
    if record.reward is not None:
        message.reward.CopyFrom(_reward_message(record.reward))
    if record.verdict is not None:
        message.verdict.CopyFrom(from_document(record.verdict, judge_pb.Verdict()))
    if record.validation is not None:
        message.validation.CopyFrom(from_document(record.validation, sandbox_pb.Validation()))
    return message


def trajectory_query(filter: pb.TrajectoryFilter) -> TrajectoryQuery:
    """The filter of ListTrajectories and ExportTrajectories."""
    return TrajectoryQuery(
        run_id=filter.run_id,
        task_id=filter.task_id,
        actor=filter.actor,
        policy=filter.policy,
        solved_only=filter.solved_only,
        hack=filter.hack,
        pipeline=enum_name(common_pb.Pipeline, filter.pipeline, "filter.pipeline"),
        mode=enum_name(common_pb.Mode, filter.mode, "filter.mode"),
        group_id=filter.group_id,
        tool=filter.tool,
        verdict=_verdict(filter.verdict),
        text=_needle(filter.text),
    )


def _verdict(value: str) -> str:
    if value not in ("", "accepted", "rejected"):
        raise InvalidArgument(
            "filter.verdict", f"{value[:80]!r} is unknown", "give accepted or rejected"
        )
    return value


def _needle(text: str) -> str:
    if text and not _LEAST_CHARS <= len(text) <= _MOST_CHARS:
        raise InvalidArgument(
            "filter.text",
            f"has {len(text)} characters",
            f"give {_LEAST_CHARS} to {_MOST_CHARS} that follow each other in a turn",
        )
    return text


def _turn_record(turn: pb.Turn, place: int) -> TurnRecord:
    return TurnRecord(
        index=turn.index,
        role=enum_name(pb.TurnRole, turn.role, f"trajectory.turns[{place}].role"),
        text=turn.text,
        token_start=turn.token_start,
        token_end=turn.token_end,
        tool=turn.tool,
        arguments_json=turn.arguments_json,
        ok=turn.ok,
        duration_s=seconds(turn, "duration", f"trajectory.turns[{place}].duration") or 0.0,
        state_id=turn.state_id,
        score=turn.score,
    )


def _turn_message(record: TurnRecord) -> pb.Turn:
    return pb.Turn(
        index=record.index,
        role=enum_value(pb.TurnRole, record.role),
        text=record.text,
        token_start=record.token_start,
        token_end=record.token_end,
        tool=record.tool,
        arguments_json=record.arguments_json,
        ok=record.ok,
        duration=duration(record.duration_s),
        state_id=record.state_id,
        score=record.score,
    )


def _reward_record(reward: pb.Reward) -> RewardRecord:
    return RewardRecord(
        value=reward.value,
        solved=reward.solved,
        parts=tuple(PartRecord(part.name, part.value, part.detail) for part in reward.parts),
        hacks=tuple(reward.hacks),
    )


def _reward_message(record: RewardRecord) -> pb.Reward:
    return pb.Reward(
        value=record.value,
        solved=record.solved,
        parts=[pb.RewardPart(name=p.name, value=p.value, detail=p.detail) for p in record.parts],
        hacks=record.hacks,
    )
