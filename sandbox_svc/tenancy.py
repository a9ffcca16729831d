"""What each tenant holds of States, and what of a State that several made is told to whom.

- A State is of every tenant that made it, in the order in which they did; nobody is "".
- How many bytes a tenant holds is kept up to date by what changes, and never counted anew.
- A State counts in full for each tenant that it is of, though it is kept once.
- Labels are of who made a State first: the others gave it others, or none.
- What an archive says that a tenant sent is that tenant's word: it is taken as a State of its own,
  made of the one that it names, so that it can neither pass for what others rely on nor be a way to
  what is theirs.
"""

import asyncio
from collections import Counter, UserDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import charged, own, sees_all, sees_any
from sandbox_svc.state_records import State, state_id
from sandbox_svc.unknown import no_state

Rewrite = Callable[[State, State], Awaitable[None]]


class Held(Protocol):
    """What tenants hold."""

    @property
    def tenants(self) -> Sequence[str]:
        """Whose it is."""
        ...

    @property
    def size_bytes(self) -> int:
        """What it counts for each of them."""
        ...


T = TypeVar("T", bound=Held)


class Holdings(UserDict[str, T]):
    """What tenants hold, by id."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        super().__init__()

    def __setitem__(self, key: str, held: T) -> None:
        self._count(self.data.get(key), -1)
        self._count(held, 1)
        self.data[key] = held

    def __delitem__(self, key: str) -> None:
        self._count(self.data.pop(key), -1)

    def _count(self, held: T | None, times: int) -> None:
        for tenant in held.tenants if held is not None else ():
            self._bytes[tenant] += times * (held.size_bytes if held is not None else 0)
            if not self._bytes[tenant]:
                del self._bytes[tenant]

    def bytes_by_tenant(self) -> Mapping[str, int]:
        """What each tenant holds in all."""
        return self._bytes

    def bytes_of(self, tenant: str) -> int:
        """What a tenant holds in all."""
        return self._bytes[tenant]


class Owners:
    """Whose the States of one store are."""

    def __init__(
        self, states: Holdings[State], rewriting: asyncio.Lock, rewrite: Rewrite, quotas: Quotas
    ) -> None:
        """`rewrite` puts a record in the place of another, under the lock."""
        self._states, self._quotas = states, quotas
        self._rewriting, self._rewrite = rewriting, rewrite

    def bytes_by_tenant(self) -> Mapping[str, int]:
        """Bytes of the States of each tenant."""
        return self._states.bytes_by_tenant()

    def admit(self, size_bytes: int = 1) -> None:
        """Refuse a call whose tenant may not have so much more.

        Raises:
            ResourceExhausted: its quota is used up.
        """
        self._quotas.check("state_bytes", self._states.bytes_of(charged()) + size_bytes)

    def admit_share(self, state: State) -> None:
        """Refuse a call whose tenant may not have a State that is there.

        Raises:
            ResourceExhausted: its quota is used up.
        """
        if charged() not in state.tenants:
            self.admit(state.size_bytes)

    async def share(self, state: State, tenants: Sequence[str] = ()) -> State:
        """Have a State be the caller's too, or that of `tenants`; nothing is made for it.

        Raises:
            NotFound: it was deleted meanwhile.
        """
        new = tuple(tenants) or (charged(),)
        if set(new) <= set(state.tenants):
            return state
        return await self._hand(state.id, lambda old: together(old, new))

    def goes(self, state_id: str) -> bool:
        """Whether a State that the caller sees is gone once it deletes it: nobody else has it."""
        state = self._states.get(state_id)
        if state is None or not sees_any(state.tenants):
            return False
        return sees_all() or len(state.tenants) == 1

    async def withdraw(self, state_id: str) -> bool:
        """Take a State from the caller's tenant, for others to keep; whether there are any.

        One that the caller does not see is others'.
        """
        state, mine = self._states.get(state_id), own()
        if state is None or mine not in state.tenants:
            return True
        left = await self._hand(state_id, lambda old: tuple(name for name in old if name != mine))
        return bool(left.tenants)

    async def _hand(
        self, state_id: str, change: Callable[[tuple[str, ...]], tuple[str, ...]]
    ) -> State:
        """Change whose a State is."""
        while True:  # it may be made anew while its record is written
            async with self._rewriting:
                state = self._states.get(state_id)
                if state is None:
                    raise no_state(state_id)
                tenants = change(state.tenants)
                if tenants == state.tenants:
                    return state
                labels = state.labels if tenants[:1] == state.tenants[:1] else {}
                await self._rewrite(state, replace(state, tenants=tenants, labels=labels))


def made_again(old: State | None, new: State) -> State:
    """A State as it is recorded where there is one in its place: who had that has it too."""
    if old is None:
        return new
    labels = new.labels if new.tenants[:1] == old.tenants[:1] else old.labels
    return replace(new, tenants=together(old.tenants, new.tenants), labels=labels)


def together(*lists: Sequence[str]) -> tuple[str, ...]:
    """All tenants of several lists, each once, in their order."""
    return tuple(dict.fromkeys(tenant for tenants in lists for tenant in tenants))


def labels_of(state: State) -> Mapping[str, str]:
    """The labels of a State as the caller may see them."""
    return state.labels if own() in ("", *state.tenants[:1]) else {}


def word_of(tenant: str, state: State, size_bytes: int) -> State:
    """The State that a tenant's archive makes of the one that it names."""
    return replace(
        state,
        id=state_id(state.id, f"archive of {tenant}"),
        parent_id=state.id,
        ancestors=(*state.ancestors, state.id),
        spec_sha256="",
        size_bytes=size_bytes,
        tenants=(tenant,),
    )
