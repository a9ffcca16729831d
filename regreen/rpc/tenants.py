"""Whose a thing is: asked wherever a service looks something up or makes it.

- Without tokens there are no tenants: everything is everybody's, and what is made is nobody's.
- A tenant sees what it made; nobody's things and all others' are seen by the platform's own tokens,
  whose tenant is `EVERY`.
- What a caller does not see is to it as if it were not there: the same NotFound, no hint.
- A service behind a front takes the front's word for whose a call is (`HEADER`);
  any other ignores it.
- A call of the platform's own may name the tenant that it is charged to (`CHARGED`): it sees as
  much as before, and what it makes and uses is that tenant's.
- Work that no call began (a reaper, a start) sees everything.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

from regreen.rpc.tokens import EVERY as EVERY
from regreen.rpc.tokens import Caller, act_as, acting_as, caller

HEADER = "regreen-tenant"
"""Says whose a call is that a front passes on."""
CHARGED = "regreen-charged-tenant"
"""Names the tenant that a call is charged to."""
_CHARGING: ContextVar[str] = ContextVar("charging", default="")


def own() -> str:
    """Whose the present call is, and alone sees; empty where it sees everything."""
    who = caller()
    return "" if who is None or who.tenant == EVERY else who.tenant


def charged() -> str:
    """Whose that is which the present call makes and uses; empty where it is nobody's."""
    who = caller()
    return who.charged if who is not None and who.charged else own()


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
    if own():
        return ((HEADER, own()),)
    return ((CHARGED, charged()),) if charged() else ()


def believe(tenant: str, charged: str = "") -> None:
    """Have the present call be of the tenant that a front named; of nobody where it named none."""
    if tenant:
        act_as(Caller(tenant, ""))
    else:
        act_as(Caller(EVERY, "", charged) if charged else None)


@contextlib.contextmanager
def charging(tenant: str) -> Iterator[None]:
    """Have calls that clients make within name a tenant to be charged; none where it is empty."""
    before = _CHARGING.set(tenant)
    try:
        yield
    finally:
        _CHARGING.reset(before)


def named() -> Sequence[tuple[str, str]]:
    """Headers of a client's call that names whom it is charged to."""
    return ((CHARGED, _CHARGING.get()),) if _CHARGING.get() else ()


def for_all() -> contextlib.AbstractContextManager[None]:
    """Around what is the platform's own work, within a call of a tenant."""
    return acting_as(None)
