"""The certificates of a stack on one machine: made by themselves, renewed before they end."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from regreen.certs.folder import LOCAL, CertFolder

CLIENT = "client"
"""Name of the certificate that the commands of this machine show."""
LEAF_LIFE = timedelta(days=30)
AUTHORITY_LIFE = timedelta(days=2 * 365)


def prepare(path: Path, services: Sequence[str]) -> None:
    """Make what is missing of a stack's certificates, and renew what is due."""
    folder, now = CertFolder(path), datetime.now(UTC)
    if not folder.exists():
        folder.init(AUTHORITY_LIFE, now)
    there = {entry.name for entry in folder.entries()}
    for name in services:
        if name not in there:
            folder.issue(name, [name, *LOCAL], LEAF_LIFE, now)
    if CLIENT not in there:
        folder.issue(CLIENT, [], LEAF_LIFE, now)
    renew_due(path)


def renew_due(path: Path) -> list[str]:
    """Renew what is due, the authority too; the names of what was.

    An authority that is due is first trusted beside the present one, and signs from the next look
    on; the former one goes when nothing is of it any more.
    """
    folder, now = CertFolder(path), datetime.now(UTC)
    authorities = folder.authorities()
    entries = folder.entries()
    renewed = []
    if len(authorities) == 1 and authorities[0].not_valid_after_utc - now < 2 * LEAF_LIFE:
        folder.renew_authority(AUTHORITY_LIFE, now)
        return ["authority"]
    if any(entry.due(now) for entry in entries):
        renewed = [entry.name for entry in folder.renew([], LEAF_LIFE, now)]
    elif len(authorities) > 1:
        folder.retire()
        renewed = ["authority"]
    return renewed
