"""Which scope each method asks for: the one table, in which every method of every contract stands.

- A method that is not here is refused to everybody.
- A scope is `SERVICE:LEVEL`; `write` covers `read`, and `admin` both. `read` changes nothing,
  `write` is the daily work, `admin` removes what others rely on or changes what all are served.
"""

from collections.abc import Collection, Mapping

LEVELS = ("read", "write", "admin")
AREAS = ("sandbox", "dataset", "policy", "judge", "learner")
OPEN = frozenset({"grpc.health.v1.Health"})
"""Services that answer without a token: health says nothing but whether a service serves."""
ANY = frozenset({"grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection"})
"""Services that answer every valid token."""
_TABLE = {
    "sandbox.v1.StateService": {
        "read": "GetState ListStates GetLineage ExportState",
        "write": "PrepareState ImportState",
        "admin": "DeleteState",
    },
    "sandbox.v1.SandboxService": {
        "read": "GetSandbox ListSandboxes ReadFile ListFiles FindText Diff GetCapabilities "
        "ListQuotas",
        "write": "CreateSandbox DeleteSandbox ForkSandbox SnapshotSandbox RestoreSandbox KeepAlive "
        "Exec Run WriteFile Validate",
    },
    "sandbox.v1.ExecService": {
        "read": "ListExecs",
        "write": "StartExec AttachExec WriteStdin SignalExec ResizeTerminal",
    },
    "sandbox.v1.ActionService": {"read": "ListQuarantined", "write": "Execute"},
    "sandbox.v1.ImageService": {"read": "ExportImage", "write": "ImportImage"},
    "sandbox.v1.EgressService": {"read": "ListEgress"},
    "dataset.v1.TaskService": {
        "read": "GetTask ListTasks GetGateReport GetTaskStats",
        "admin": "ImportTasks RecordGate SplitTasks",
    },
    "dataset.v1.TrajectoryService": {
        "read": "GetTrajectory ListTrajectories ExportTrajectories",
        "write": "CommitTrajectory",
    },
    "dataset.v1.ArchiveService": {
        "read": "GetTrajectoryStats ListQuotas",
        "write": "CommitTrajectories",
        "admin": "PruneTrajectories",
    },
    "dataset.v1.RolloutQueueService": {
        "read": "GetQueue",
        "write": "EnqueueGroups LeaseRollouts Heartbeat CommitRollout FailRollout TakeGroups "
        "AcknowledgeGroups RewindRun",
    },
    "dataset.v1.ParkingService": {
        "read": "ListRollouts ListParkedTasks",
        "admin": "ReleaseTask",
    },
    "dataset.v1.KnowledgeService": {
        "read": "SearchKnowledge",
        "write": "RecordKnowledge RecordKnowledgeUse",
    },
    "dataset.v1.RunService": {
        "read": "GetRun ListRuns ListMetrics ListCheckpoints",
        "write": "CreateRun UpdateRun RecordMetrics RecordCheckpoint",
    },
    "policy.v1.PolicyService": {
        "read": "RenderChat Tokenize GetPolicy ListQuotas",
        "write": "Generate AbortGeneration",
        "admin": "LoadVersion Pause Resume Sleep Wake",
    },
    "judge.v1.JudgeService": {"write": "Judge JudgeGroup", "admin": "Calibrate"},
    "learner.v1.LearnerService": {
        "read": "EstimateRun WatchRun GetRun ListRuns",
        "write": "StartRun Step PublishWeights OfferWeights SaveCheckpoint StopRun",
    },
}
SCOPES: Mapping[str, str] = {
    f"regreen.{service}/{method}": f"{service.partition('.')[0]}:{level}"
    for service, levels in _TABLE.items()
    for level, methods in levels.items()
    for method in methods.split()
}
"""Scope by `package.Service/Method`."""
KNOWN = tuple(f"{area}:{level}" for area in AREAS for level in LEVELS)
"""Every scope there is."""


def covers(granted: Collection[str], scope: str) -> bool:
    """Whether one of the granted scopes is, or is above, `scope`."""
    area, _, level = scope.partition(":")
    return any(f"{area}:{above}" in granted for above in LEVELS[LEVELS.index(level) :])
