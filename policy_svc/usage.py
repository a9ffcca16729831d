"""How many tokens were generated for each tenant today, and who has had all of its own.

- A day is one of UTC. A generation that began ends; the next is refused until midnight.
- The counts are in a file that is replaced whole, every few seconds while they change and at the
  end: a kill -9 forgets at most those seconds.
- Each replica counts what it generated itself.
"""

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

from regreen.rpc.logging import get
from regreen.rpc.quotas import Quotas
from regreen.rpc.tenants import own

_WRITE_S = 2.0


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
        self._day, self._tokens = self._read()

    def check(self) -> None:
        """Refuse a generation of a tenant that has had its tokens of today.

        Raises:
            ResourceExhausted: says how long it is until midnight.
        """
        now = self._turn()
        midnight = datetime.combine(now.date() + timedelta(days=1), time(), UTC)
        wait_s = (midnight - now).total_seconds()
        self._quotas.check("tokens_per_day", self._tokens[own()] + 1, retry_after_s=wait_s)

    def count(self, tokens: int) -> None:
        """Count tokens that were generated for the present call."""
        self._turn()
        if tenant := own():
            self._tokens[tenant] += tokens

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
