"""Walls between tenants: a run starts from nothing that lies in the folder of another tenant's run.

- Folders of runs have the runs' ids in their names, which other tenants may guess.
"""

from collections.abc import Mapping
from pathlib import Path

from learner_svc.estimate import local_path
from learner_svc.spec import RunSpec
from regreen.rpc import tenants
from regreen.rpc.errors import AlreadyExists, NotFound


def check_seen(spec: RunSpec, resume_uri: str, runs: Mapping[str, tuple[str, Path]]) -> None:
    """Refuse an id that another tenant's run has, and weights that are of such a run.

    `runs` says of each id whose it is and where.

    Raises:
        AlreadyExists: the id is taken.
        NotFound: the base model or checkpoint is another tenant's.
    """
    hidden = {name: folder for name, (owner, folder) in runs.items() if not tenants.sees(owner)}
    if spec.run_id in hidden:
        raise AlreadyExists(f"run_id {spec.run_id[:80]!r} is taken; choose another")
    for field, uri in (("base_uri", spec.base_uri), ("resume_uri", resume_uri)):
        if not uri or not hidden:
            continue
        try:
            path = local_path(uri, field).resolve()
        except (OSError, ValueError):
            continue  # no path of this host; whoever opens it says so
        if any(path.is_relative_to(folder.resolve()) for folder in hidden.values()):
            raise NotFound(f"{field}: there is nothing at {uri[:200]!r}")
