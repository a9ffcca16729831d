"""What each tenant may have at most: a file that services read, and read anew when it changes.

- A bound that is not named is none; a tenant that is not named has the bounds of `default`.
- Callers without tokens have no bounds, nor have the platform's own where they name no tenant.
- A file that cannot be read any more leaves the former bounds in use.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from regreen.common.v1 import QuotaUse
from regreen.rpc.errors import FailedPrecondition, ResourceExhausted
from regreen.rpc.logging import get
from regreen.rpc.tenants import charged, own


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds of one tenant; None is none."""

    sandboxes: int | None = None
    """Running and starting at a time."""
    state_bytes: int | None = None
    """Of the States that it made, by snapshot, import or preparation."""
    trajectory_bytes: int | None = None
    """Of the trajectories that are kept for it."""
    tokens_per_day: int | None = None
    """Generated for it by the policy from midnight to midnight, UTC."""


NAMES = tuple(field.name for field in fields(Quota))


def read_quotas(path: Path) -> tuple[Quota, Mapping[str, Quota]]:
    """The bounds of tenants that are not named, and those of the others by name.

    The file is TOML: a table `default` and a table `tenants.NAME` for each other, with the names of
    `Quota` as keys.

    Raises:
        FailedPrecondition: it cannot be read or is no such file; names the key.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
        if unknown := sorted(found.keys() - {"default", "tenants"}):
            raise ValueError(f"{unknown[0]} is none of default, tenants")
        named = _table("tenants", found.get("tenants", {}))
        tenants = {name: _quota(f"tenants.{name}", table) for name, table in named.items()}
        return _quota("default", found.get("default", {})), tenants
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"quotas: {path} cannot be used ({error}); give a TOML file with the tables default "
            f"and tenants.NAME of {', '.join(NAMES)}"
        ) from error


def _table(place: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no table")
    return value


def _quota(place: str, value: Any) -> Quota:
    table = _table(place, value)
    for name, bound in table.items():
        if name not in NAMES:
            raise ValueError(f"{place}.{name} is none of {', '.join(NAMES)}")
        if type(bound) is not int or bound < 0:
            raise ValueError(f"{place}.{name} is {bound!r}, not a whole number of at least 0")
    return Quota(**table)


class Quotas:
    """The bounds of all tenants; without a file there are none.

    Raises:
        FailedPrecondition: the file cannot be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._seen = self._stamp()
        self._default, self._tenants = read_quotas(path) if path else (Quota(), {})

    def mine(self) -> Quota:
        """Bounds of whom the present call is charged to."""
        return self.of(charged())

    def of(self, tenant: str) -> Quota:
        """Bounds of a tenant; nobody has none."""
        self._renew()
        return self._tenants.get(tenant, self._default) if tenant else Quota()

    def check(
        self,
        name: str,
        would_be: int,
        *,
        tenant: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Refuse a call after which a tenant would have `would_be` of what `name` bounds.

        Without `tenant`, it is whom the call is charged to.

        Raises:
            ResourceExhausted: that is over the bound, which is named.
        """
        tenant = charged() if tenant is None else tenant
        bound = getattr(self.of(tenant), name)
        if bound is not None and would_be > bound:
            raise ResourceExhausted(
                f"quota {name} of tenant {tenant} is {bound}; this would make {would_be}",
                metadata={"quota": name, "limit": str(bound)},
                retry_after_s=retry_after_s,
            )

    def uses(self, **used: Mapping[str, int]) -> list[QuotaUse]:
        """What each tenant has that the present call sees, and its bounds.

        `used` is by the names of `Quota`, and by tenant.
        """
        self._renew()
        known = {own()} if own() else self._tenants.keys() | set().union(*used.values())
        return [
            QuotaUse(tenant=tenant, quota=name, used=has.get(tenant, 0), bound=bound)
            for tenant in sorted(known - {""})
            for name, has in used.items()
            for bound in (getattr(self.of(tenant), name),)
        ]

    def _renew(self) -> None:
        stamp = self._stamp()
        if self._path is None or stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._default, self._tenants = read_quotas(self._path)
        except FailedPrecondition as error:
            get().warning("the former quotas stay in use", problem=error.message)

    def _stamp(self) -> object:
        try:
            status = self._path.stat() if self._path else None
        except OSError:
            return None
        return status and (status.st_ino, status.st_mtime_ns, status.st_size)
