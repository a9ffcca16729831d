"""The record of one break, as `regreen.tasks.pin` completes it to a task.

- The two sets of pins differ by the culprit and what it forces to move, nothing else.
- Ids that are not the same in equal runs, or exist under one of the sets only, are unstable.
"""

from regreen.lockfile import normalize
from regreen.mine.candidate import Found, Ground, Rejected, Tried
from regreen.mine.facts import Damage, diagnose, stable_ids
from regreen.mine.lab import Laboratory
from regreen.mine.project import Needs
from regreen.tasks.model import ids_sha256

MAX_UNSTABLE = 200


def record_of(
    ground: Ground, lab: Laboratory, name: str, good: Tried, bad: Tried, lost: Damage
) -> Found:
    """The record of one step."""
    release, broken = ground.release, sorted(lost.broken)
    unstable = {
        *lost.renamed, *(bad.run.passed - good.run.passed), *lab.unsteady,
        *(good.run.passed - stable_ids(good.run.passed)),
    }  # fmt: skip
    unstable -= lost.broken
    if len(unstable) > MAX_UNSTABLE:
        raise Rejected("confirm", "too many ids are not stable", f"{len(unstable)}")
    facts = diagnose(bad.run, name, lost.broken)
    direct = {normalize(n.partition("[")[0]) for n in Needs(ground.needs.runtime, ()).names()}
    names = sorted({*good.pins, *bad.pins})
    mined = {
        "kind": "dependency-upgrade",
        "id": f"{release.package}-{release.version}__{name}-{bad.version}",
        "package": release.package,
        "version": release.version,
        "sdist": release.sdist.model_dump(),
        "python": release.python,
        "build": {"mode": release.mode, "tools": list(release.tools)},
        "culprit": {
            "name": name, "from": good.version, "to": bad.version, "direct": name in direct,
            "last_good": good.version, "first_bad": bad.version,
        },
        "changed": {
            n: [good.pins.get(n), bad.pins.get(n)]
            for n in names
            if good.pins.get(n) != bad.pins.get(n)
        },
        "pins_pass": [f"{n}=={v}" for n, v in sorted(good.pins.items())],
        "pins_fail": [f"{n}=={v}" for n, v in sorted(bad.pins.items())],
        "test_command": " ".join(["python -m pytest -o addopts=", *release.roots]),
        "tests": {
            "fail_to_pass": broken,
            "n_fail_to_pass": len(broken),
            "fail_to_pass_sha256": ids_sha256(broken),
            "pass_to_pass_n": len(good.run.passed & bad.run.passed),
        },
        "stage": facts.stage,
        "category": facts.category,
        "blame_top": facts.blame,
        "error_lines": list(facts.error_lines),
        "seconds": {"test": round(good.run.seconds, 2)},
    }  # fmt: skip
    return Found(mined, tuple(sorted(unstable)), ground.licence)
