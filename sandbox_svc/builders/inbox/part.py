"""Runs a part of what was collected: chosen tests, a worker's share, or up to what decides.

- Standard library only, Python 3.7 and newer.
- All is collected as in a whole run, and what runs keeps its order: only running is left out.
- What was collected is told by number and digest, so that workers can be seen to agree.
- It stops only where no later result could make a required test pass.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Any

BAD = ("failed", "error")


class Part:
    """pytest hooks, and what the reporter of a run sends through."""

    def __init__(
        self, send: Callable[[dict[str, Any]], None], setup: dict[str, Any], pytest: Any
    ) -> None:
        self.forward = send
        self.only = setup.get("only")
        self.share = setup.get("share")
        self.required: frozenset[str] = frozenset(map(str, setup.get("required", ())))
        self.errors: list[str] = []
        self.session: Any = None
        self.told = False
        pytest.hookimpl(tryfirst=True)(Part.pytest_collection_finish)

    def send(self, body: dict[str, Any]) -> None:
        """Pass a frame on; after the one that decides, no further test begins."""
        self.forward(body)
        if body["t"] == "collect":
            self.errors.append(body["id"])
        elif body["t"] == "test" and self.decides(body["id"], body["o"]):
            self.stop(body["id"])

    def decides(self, nodeid: str, outcome: str) -> bool:
        """Whether a required test can no longer pass; a required module is its tests'."""
        if nodeid in self.required:
            return outcome != "passed"
        return outcome in BAD and nodeid.partition("::")[0] in self.required

    def stop(self, nodeid: str) -> None:
        if self.told:
            return
        self.told = True
        self.forward({"t": "stopped", "by": nodeid})
        if self.session is not None:
            self.session.shouldfail = "a required test does not pass: " + nodeid

    def pytest_collection_finish(self, session: Any) -> None:
        items = list(session.items)
        ids = [item.nodeid for item in items]
        chosen = [item for item in items if self.wants(item.nodeid)]
        lost = self.lost(frozenset(ids))
        if lost:
            self.stop(lost)
            chosen = []
        self.session = session
        text = "\n".join(ids).encode("utf-8", "backslashreplace")
        digest = hashlib.sha256(text).hexdigest()
        self.forward({"t": "part", "n": len(items), "run": len(chosen), "ids": digest})
        session.items[:] = chosen

    def wants(self, nodeid: str) -> bool:
        if self.only is not None and not any(belongs(nodeid, one) for one in self.only):
            return False
        if self.share is None:
            return True
        home = nodeid.partition("::")[0]
        spread = zlib.crc32(home.encode("utf-8", "backslashreplace")) % self.share["of"]
        return bool(self.share["files"].get(home, spread) == self.share["number"])

    def lost(self, ids: frozenset[str]) -> str:
        """A required test that is not there because what holds it could not be collected."""
        for error in self.errors:
            for one in self.required:
                if one not in ids and (one == error or one.startswith((error + "::", error + "/"))):
                    return one
        return ""


def belongs(nodeid: str, chosen: str) -> bool:
    """Whether a test is the chosen one, or within the chosen file, class or folder."""
    chosen = chosen.rstrip("/")
    return nodeid == chosen or nodeid.startswith((chosen + "::", chosen + "/", chosen + "["))
