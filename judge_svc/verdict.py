"""Composes verdicts: rules, then contrast within a group, then the language model.

- `accepted` means that no violation was found; it says nothing about whether tests pass.
- A violation found by a rule stands whatever the model says; the model only adds.
- Same evidence, model, prompt, rules and bounds: same stored verdict. A model that did not answer
  is not stored, so that the next call asks again.
- CPU-bound work runs on the given executor, one evidence at a time.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from typing import ParamSpec, TypeVar

from judge_svc.cache import VerdictCache, cache_key
from judge_svc.evidence import Evidence, Finding, Severity, Verdict
from judge_svc.group import contrast
from judge_svc.models.base import Model
from judge_svc.rubric import PROMPT_VERSION, Answer, Malformed, Prompt, build_prompt, read_answer
from judge_svc.rules import RULES_VERSION, Bounds, order, run_rules
from judge_svc.rules.outcomes import coverage_pair
from regreen.rpc.errors import InvalidArgument, Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class ModelUse(Enum):
    """Whether the language model takes part."""

    NEVER = "never"
    IF_AVAILABLE = "if_available"
    REQUIRED = "required"
    IF_CONFIGURED = "if_configured"
    """Required where one is configured; rules and coverage alone where none is."""

    @property
    def demands(self) -> bool:
        """Whether a configured model must give a usable answer."""
        return self in (ModelUse.REQUIRED, ModelUse.IF_CONFIGURED)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one call."""

    evidence_bytes: int = 32 << 20
    files: int = 5_000
    members: int = 256
    prompt_chars: int = 48_000
    """Characters of evidence in one prompt, all members together."""
    model_timeout_s: float = 60.0


class Judge:
    """Judges evidence; one per process."""

    def __init__(
        self,
        model: Model,
        cache: VerdictCache,
        executor: Executor,
        token: Callable[[], str],
        *,
        bounds: Bounds | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._model, self._cache, self._executor, self._token = model, cache, executor, token
        self._bounds, self._limits = bounds or Bounds(), limits or Limits()

    async def judge(self, evidence: Evidence, use: ModelUse) -> Verdict:
        """The verdict on one trajectory.

        Raises:
            InvalidArgument: there is nothing to judge, or too much.
            Unavailable: the model is required and does not answer.
        """
        self._check(evidence, "evidence")
        return (await self._verdicts([evidence], use, ["evidence"]))[0]

    async def judge_group(self, members: Sequence[Evidence], use: ModelUse) -> list[Verdict]:
        """The verdicts on the members of one group, in their order.

        Raises:
            InvalidArgument: fewer than two members, too many, or one that cannot be judged.
            Unavailable: the model is required and does not answer.
        """
        if len(members) < 2:
            raise InvalidArgument(
                "members", f"has {len(members)}", "send two or more, or call Judge"
            )
        if len(members) > self._limits.members:
            raise InvalidArgument(
                "members", f"has {len(members)}", f"send at most {self._limits.members}"
            )
        fields = [f"members[{index}]" for index in range(len(members))]
        for member, field in zip(members, fields, strict=True):
            self._check(member, field)
        return await self._verdicts(list(members), use, fields)

    async def _verdicts(
        self, members: list[Evidence], use: ModelUse, fields: list[str]
    ) -> list[Verdict]:
        name = await self._model_name(use)
        keys = self._keys(members, name)
        stored = [await self._run(self._cache.get, key) for key in keys]
        hits = [verdict for verdict in stored if verdict is not None]
        used = not (name and use.demands) or all(verdict.model_used for verdict in hits)
        if len(hits) == len(members) and used:
            return hits
        found = [await self._run(run_rules, member, self._bounds) for member in members]
        if len(members) > 1:
            extra = await self._run(contrast, members, found)
            found = [order([*own, *more]) for own, more in zip(found, extra, strict=True)]
        answer, asked = await self._ask(members, found, use) if name else (None, False)
        verdicts = [
            _compose(member, own, answer, index, name)
            for index, (member, own) in enumerate(zip(members, found, strict=True))
        ]
        if asked or not name:
            for key, verdict in zip(keys, verdicts, strict=True):
                await self._run(self._cache.put, key, verdict)
        return verdicts

    async def _model_name(self, use: ModelUse) -> str:
        """The model to ask; empty for none."""
        if use is ModelUse.NEVER:
            return ""
        try:
            name = await self._model.name()
        except Unavailable:
            if use.demands:
                raise
            return ""
        if use is ModelUse.REQUIRED and not name:
            await self._model.complete("", "", timeout_s=self._limits.model_timeout_s)
        return name

    async def _ask(
        self, members: list[Evidence], found: list[tuple[Finding, ...]], use: ModelUse
    ) -> tuple[Answer | None, bool]:
        """The model's answer if it is well-formed, and whether it answered at all."""
        prompt = await self._run(self._prompt, members, found)
        try:
            text = await self._model.complete(
                prompt.system, prompt.user, timeout_s=self._limits.model_timeout_s
            )
        except Unavailable:
            if use.demands:
                raise
            return None, False
        try:
            return await self._run(read_answer, text, members), True
        except Malformed as error:
            if use.demands:
                raise Unavailable(f"the judge model's answer is malformed: {error}") from error
            return None, True

    def _prompt(self, members: list[Evidence], found: list[tuple[Finding, ...]]) -> Prompt:
        pairs = list(zip(members, found, strict=True))
        return build_prompt(pairs, token=self._token, budget_chars=self._limits.prompt_chars)

    async def _run(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """`work` on the executor."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, partial(work, *args, **named))

    def _keys(self, members: list[Evidence], model: str) -> list[str]:
        digests = [member.sha256 for member in members]
        bounds = json.dumps(asdict(self._bounds))
        prompt = PROMPT_VERSION if model else ""
        group = digests if len(members) > 1 else []
        return [
            cache_key(digest, str(index), model, prompt, RULES_VERSION, bounds, *group)
            for index, digest in enumerate(digests)
        ]

    def _check(self, evidence: Evidence, field: str) -> None:
        empty = not (evidence.changes or evidence.unified_diff)
        if empty and evidence.after is None:
            raise InvalidArgument(
                field, "holds no changes and no validation", "send changes and the validations"
            )
        if evidence.size_bytes > self._limits.evidence_bytes:
            raise InvalidArgument(
                f"{field}.changes",
                f"{evidence.size_bytes} bytes are too many",
                f"send at most {self._limits.evidence_bytes}",
            )
        if len(evidence.changes) + len(evidence.originals) > self._limits.files:
            raise InvalidArgument(
                f"{field}.changes", "names too many files", f"send at most {self._limits.files}"
            )
        known = {c.path for c in evidence.originals}
        for change in evidence.changes:
            if not change.path:
                raise InvalidArgument(f"{field}.changes.path", "is empty", "name the file")
            unknown = change.kind == "MODIFY" and change.path not in known
            if unknown and change.path not in evidence.unified_diff:
                raise InvalidArgument(
                    f"{field}.originals",
                    f"lacks {change.path[:200]!r}, which was modified",
                    "send its content before the change, or a unified diff",
                )


def _compose(
    evidence: Evidence,
    found: tuple[Finding, ...],
    answer: Answer | None,
    index: int,
    name: str,
) -> Verdict:
    findings = found if answer is None else order([*found, *answer.findings[index]])
    pair = coverage_pair(evidence)
    return Verdict(
        accepted=not any(f.severity is Severity.VIOLATION for f in findings),
        findings=findings,
        evidence_sha256=evidence.sha256,
        rules_version=RULES_VERSION,
        scores=dict(answer.scores) if answer else {},
        model=name,
        prompt_version=PROMPT_VERSION if name else "",
        model_used=answer is not None,
        coverage_change=pair[1].percent - pair[0].percent if pair else 0.0,
        coverage_measured=pair is not None,
    )
