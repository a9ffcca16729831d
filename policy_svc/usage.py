"""How many tokens were generated for each tenant today, and who has had all of its own.

- A day is one of UTC. A generation that began ends.
- What a generation may sample at most is held for it from its beginning; what it did not sample is
  given back at its end, whatever the end. So generations that run at a time are bounded together,
  and no tenant has more tokens than its quota.
- The counts are in a file that is replaced whole, every few seconds while they change and at the
  end: a kill -9 forgets at most those seconds.
- Each replica counts what it generated itself.
"""

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

from regreen.common.v1 import QuotaUse
from regreen.rpc.errors import ResourceExhausted
from regreen.rpc.logging import get
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import charged

_WRITE_S = 2.0
_ENDS_S = 1.0
"""When to ask again for what other generations hold."""


def utc_now() -> datetime:
    """The time by which days begin and end."""
    return datetime.now(UTC)


class Usage:
    """Tokens of the present day by tenant; what has no tenant is not counted."""

    def __init__(
        self, path: Path, quotas: Quotas, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        self._path, self._quotas, self._now = path, quotas, now
        self._written = ""
        self._held: Counter[str] = Counter()
        """Tokens that running generations may still sample."""
        self._day, self._tokens = self._read()

    @contextlib.contextmanager
    def held(self, most: int) -> Iterator["Hold"]:
        """Hold `most` tokens for a generation of the present call while the block runs.

        Raises:
            ResourceExhausted: its tenant has not so many left today; says until when, or that they
                are held by its other generations.
        """
        self._admit(most)
        hold = Hold(self, charged(), most)
        self._held[hold.tenant] += most
        try:
            yield hold
        finally:
            self._release(hold, hold.left)

    def uses(self) -> list[QuotaUse]:
        """What each tenant has had and holds today, and its bound, as the present call sees it."""
        self._turn()
        return self._quotas.uses(tokens_per_day=self._tokens + self._held)

    def _admit(self, most: int) -> None:
        now, bound = self._turn(), self._quotas.mine().tokens_per_day
        used, held = self._tokens[charged()], self._held[charged()]
        if bound is None or used + held + most <= bound:
            return
        left, metadata = max(0, bound - used), {"quota": "tokens_per_day", "limit": str(bound)}
        told = f"quota tokens_per_day of tenant {charged()} is {bound}; "
        if most <= left:
            raise ResourceExhausted(
                f"{told}{held} of the {left} that are left are held by its running generations, "
                f"and this asks for up to {most}; retry when they end, or ask for fewer",
                metadata=metadata,
                retry_after_s=_ENDS_S,
            )
        midnight = datetime.combine(now.date() + timedelta(days=1), time(), UTC)
        raise ResourceExhausted(
            f"{told}{left} are left until midnight, UTC, and this asks for up to {most} (samples "
            "by max_new_tokens); ask for fewer" + (", or tomorrow" if most <= bound else ""),
            metadata=metadata,
            # Nothing comes of waiting for what is over the bound of any day.
            retry_after_s=(midnight - now).total_seconds() if most <= bound else None,
        )

    def _count(self, hold: "Hold", tokens: int) -> None:
        self._turn()
        if hold.tenant:
            self._tokens[hold.tenant] += tokens
        self._release(hold, min(tokens, hold.left))

    def _release(self, hold: "Hold", tokens: int) -> None:
        hold.left -= tokens
        self._held[hold.tenant] -= tokens
        if not self._held[hold.tenant]:
            del self._held[hold.tenant]

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Have the counts written while the block runs, and at its end."""
        writer = asyncio.create_task(self._forever(), name="usage")
        try:
            yield
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._write()

    async def _forever(self) -> None:
        while True:
            await asyncio.sleep(_WRITE_S)
            self._write()

    def _turn(self) -> datetime:
        now = self._now()
        if now.date().isoformat() != self._day:
            self._day, self._tokens = now.date().isoformat(), Counter()
        return now

    def _write(self) -> None:
        """Replace the file, if it would change; trouble costs the counts a restart, no call."""
        text = json.dumps({"day": self._day, "tokens": self._tokens})
        if text == self._written:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self._path)
        except OSError as error:
            get().warning("usage was not written", path=str(self._path), problem=str(error))
            return
        self._written = text

    def _read(self) -> tuple[str, "Counter[str]"]:
        today = self._now().date().isoformat()
        try:
            found = json.loads(self._path.read_text())
            if found["day"] == today:
                return today, Counter({str(k): int(v) for k, v in found["tokens"].items()})
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            get().warning("usage was not read", path=str(self._path), problem=str(error))
        return today, Counter()


@dataclass(slots=True)
class Hold:
    """Tokens that one generation may still sample."""

    usage: Usage
    tenant: str
    left: int

    def count(self, tokens: int) -> None:
        """Count tokens that were sampled: they are held no more."""
        self.usage._count(self, tokens)
