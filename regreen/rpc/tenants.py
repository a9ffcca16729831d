"""Whose a thing is: asked wherever a service looks something up or makes it.

- Without tokens there are no tenants: everything is everybody's, and what is made is nobody's.
- A tenant sees what it made; nobody's things and all others' are seen by the platform's own tokens,
  whose tenant is `EVERY`.
- What a caller does not see is to it as if it were not there: the same NotFound, no hint.
- A service behind a front takes the front's word for whose a call is (`HEADER`);
  any other ignores it.
- Work that no call began (a reaper, a start) sees everything.
"""

import contextlib
from collections.abc import Iterable, Sequence

from regreen.rpc.tokens import Caller, act_as, acting_as, caller

HEADER = "regreen-tenant"
"""Says whose a call is that a front passes on."""
EVERY = "*"
"""Tenant of the platform's own tokens: of services that act for all, and of operators."""


def own() -> str:
    """Whose that is which the present call makes; empty where it is nobody's."""
    who = caller()
    return "" if who is None or who.tenant == EVERY else who.tenant


def sees_all() -> bool:
    """Whether the present call sees everything."""
    return not own()


def sees(owner: str) -> bool:
    """Whether the present call sees what is `owner`'s."""
    return own() in ("", owner)


def sees_any(owners: Iterable[str]) -> bool:
    """Whether the present call sees what is of all of `owners`."""
    return sees_all() or own() in owners


def on_behalf() -> Sequence[tuple[str, str]]:
    """Headers of a call that is made for the tenant of the present one, to who believes them."""
    return ((HEADER, own()),) if own() else ()


def believe(tenant: str) -> None:
    """Have the present call be of the tenant that a front named; of nobody where it named none."""
    act_as(Caller(tenant, "") if tenant else None)


def for_all() -> contextlib.AbstractContextManager[None]:
    """Around what is the platform's own work, within a call of a tenant."""
    return acting_as(None)
