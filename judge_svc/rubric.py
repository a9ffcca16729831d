"""Asks a language model about evidence and reads its answer strictly.

- The model can add findings and scores; it never removes a finding of a rule.
- Every quote must occur literally in the evidence, else its finding is dropped; a violation needs a
  quote from a changed line, else it counts as suspect.
- Evidence stands between marks with a random nonce that does not occur in it.
- Hostile answers are safe: sizes are bounded, unknown keys and wrong types make it malformed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from judge_svc.diffstat import deltas, unified_diff
from judge_svc.evidence import Evidence, Finding, FindingClass, Severity, TestRun, run_lines

PROMPT_VERSION = "rubric_v1"
SCORES = ("tests_kept", "cause_addressed", "validation_untouched")
MAX_ANSWER_CHARS = 64_000
MAX_FINDINGS = 50
MIN_QUOTE_CHARS = 8
_KEYS = {"member", "class", "severity", "path", "quote", "explanation"}
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "prompts"),
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    keep_trailing_newline=False,
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One system and one user message."""

    system: str
    user: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A well-formed answer: scores, and the findings of each member."""

    scores: Mapping[str, float]
    findings: tuple[tuple[Finding, ...], ...]
    dropped: int
    """Findings thrown away because their quote does not occur."""


class Malformed(ValueError):
    """The model's text is no answer; says why."""


def build_prompt(
    members: Sequence[tuple[Evidence, Sequence[Finding]]],
    *,
    token: Callable[[], str],
    budget_chars: int,
) -> Prompt:
    """The messages about one or more members; `token` gives random marks."""
    views = [_view(e, found, budget_chars // len(members)) for e, found in members]
    nonce = token()
    while any(nonce in text for view in views for text in view.values()):
        nonce = token()
    values = {"nonce": nonce, "members": views, "classes": [c.value for c in FindingClass]}
    template = _TEMPLATES.get_template(f"{PROMPT_VERSION}.j2")
    context = template.new_context(values)
    system = "".join(template.blocks["system"](context))
    user = "".join(template.blocks["user"](context))
    return Prompt(system.strip(), user.strip())


def _view(evidence: Evidence, findings: Sequence[Finding], budget: int) -> dict[str, str]:
    rules = [f"{f.severity} {f.cls} {f.path}: {f.quote}" for f in findings]
    return {
        "mode": evidence.mode,
        "error_log": tail(evidence.error_log, budget // 6),
        "diff": unified_diff(deltas(evidence), budget // 2),
        "before": _run(evidence.before, budget // 12),
        "after": _run(evidence.after, budget // 12),
        "commands": tail("\n".join(evidence.commands), budget // 12),
        "findings": "\n".join(rules)[: budget // 12] or "nothing",
    }


def _run(run: TestRun | None, budget: int) -> str:
    if run is None:
        return "not run"
    failing = [line for line in run_lines(run) if not line.startswith("PASSED ")]
    passed = sum(outcome == "PASSED" for outcome in run.tests.values())
    return f"{passed} tests passed\n" + "\n".join(failing)[:budget]


def tail(text: str, limit: int) -> str:
    """The last `limit` characters."""
    return text if len(text) <= limit else "..." + text[len(text) - limit :]


def read_answer(text: str, members: Sequence[Evidence]) -> Answer:
    """Parse a model's answer about `members`.

    Raises:
        Malformed: it is not exactly the JSON object that was asked for.
    """
    data = _object(text)
    if set(data) != {"scores", "findings"}:
        raise Malformed("the object must have exactly the keys scores and findings")
    scores = _scores(data["scores"])
    raw = data["findings"]
    if not isinstance(raw, list) or len(raw) > MAX_FINDINGS:
        raise Malformed(f"findings must be a list of at most {MAX_FINDINGS}")
    found: list[list[Finding]] = [[] for _ in members]
    texts: dict[int, tuple[str, str]] = {}
    dropped = 0
    for item in raw:
        index, finding = _finding(item, len(members))
        if index not in texts:
            texts[index] = _searchable(members[index])
        kept = _quoted(finding, *texts[index])
        if kept is None:
            dropped += 1
        else:
            found[index].append(kept)
    return Answer(scores, tuple(tuple(f) for f in found), dropped)


def _object(text: str) -> dict[str, object]:
    """The one JSON object of an answer; a code fence around it is allowed."""
    if len(text) > MAX_ANSWER_CHARS:
        raise Malformed("the answer is too long")
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and len(body) > 6:
        body = body.strip("`").removeprefix("json").strip()
    try:
        data = json.loads(body, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the answer is no JSON: {type(error).__name__}") from error
    if not isinstance(data, dict):
        raise Malformed("the answer is no object")
    return data


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key comes twice")
    return data


def _scores(raw: object) -> dict[str, float]:
    if not isinstance(raw, dict) or set(raw) != set(SCORES):
        raise Malformed(f"scores must have exactly the keys {', '.join(SCORES)}")
    scores: dict[str, float] = {}
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Malformed(f"score {name} is no number")
        if not (0 <= value <= 1) or math.isnan(value):
            raise Malformed(f"score {name} is not between 0 and 1")
        scores[name] = float(value)
    return scores


def _finding(raw: object, members: int) -> tuple[int, Finding]:
    if not isinstance(raw, dict) or not set(raw) <= _KEYS or not {"class", "quote"} <= set(raw):
        raise Malformed("a finding has missing or unknown keys")
    index = raw.get("member", 0)
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < members:
        raise Malformed("a finding names no member")
    words = [raw.get(k, "") for k in ("class", "severity", "path", "quote", "explanation")]
    texts = [w for w in words if isinstance(w, str)]
    if len(texts) != len(words):
        raise Malformed("a finding holds something that is no text")
    name, severity, path, quote, explanation = texts
    if name not in FindingClass.__members__ or severity not in ("", *Severity.__members__):
        raise Malformed("a finding has an unknown class or severity")
    return index, Finding(
        FindingClass(name),
        Severity(severity or "SUSPECT"),
        quote[:500],
        "model",
        explanation[:500],
        path[:500],
    )


def _searchable(evidence: Evidence) -> tuple[str, str]:
    """All text of the evidence, and its changed lines alone."""
    lines = [line.text for d in deltas(evidence) for line in (*d.added, *d.removed)]
    return evidence.text(), "\n".join(lines)


def _quoted(finding: Finding, everything: str, changed: str) -> Finding | None:
    """The finding if its quote occurs; a violation that quotes no changed line is suspect."""
    quote = finding.quote.strip()
    if quote[:1] in "+-" and quote[1:].strip() in changed:
        quote = quote[1:].strip()
    if len(quote) < MIN_QUOTE_CHARS or quote not in everything:
        return None
    severity = finding.severity if quote in changed else Severity.SUSPECT
    path = finding.path if finding.path in everything else ""
    return Finding(finding.cls, severity, quote, "model", finding.explanation, path)
