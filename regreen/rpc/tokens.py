"""Bearer tokens: a file of hashes, read anew when it changes, and the check of every call.

- Only hashes are kept: a token has 256 random bits, so a plain SHA-256 tells nothing of it.
- A call is checked from memory: no other service is asked.
- A file that cannot be read leaves the former one in use; without any, every token is refused.
- No message and no log holds a token; it is named by its id.
- A call may name a tenant that it is charged to; only a token whose tenant covers that one is
  believed.
"""

import contextlib
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regreen.rpc import scopes
from regreen.rpc.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from regreen.rpc.logging import get

PREFIX = "rgt"
HEADER = "authorization"
EVERY = "*"
"""Tenant of the platform's own tokens: of services that act for all, and of operators."""
_BEARER = "Bearer "
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token."""

    id: str
    name: str
    """What it is for, in its maker's words."""
    tenant: str
    """Whose it is."""
    scopes: tuple[str, ...]
    sha256: str
    created: str
    """ISO 8601, as the others."""
    expires: str
    revoked: str = ""
    """When it was; empty while it holds."""

    def holds(self, now: datetime) -> bool:
        """Whether it is neither revoked nor at its end."""
        return not self.revoked and now < datetime.fromisoformat(self.expires)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    tenant: str
    token_id: str
    charged: str = ""
    """Tenant that the call is charged to; empty where it is the caller's own."""


_CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)


def caller() -> Caller | None:
    """Who makes this call; None where no token is asked for."""
    return _CALLER.get()


def act_as(who: Caller | None) -> None:
    """Have what follows be done for somebody else, up to the end of the present task."""
    _CALLER.set(who)


@contextlib.contextmanager
def acting_as(who: Caller | None) -> Iterator[None]:
    """Have what is within be done for somebody else."""
    before = _CALLER.set(who)
    try:
        yield
    finally:
        _CALLER.reset(before)


def digest(text: str) -> str:
    """What is kept of a token's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(text: str) -> str:
    """Id of a token from its text; empty where it is none."""
    parts = text.split("_", 2)
    return parts[1] if len(parts) == 3 and parts[0] == PREFIX else ""


def read_tokens(path: Path) -> dict[str, Token]:
    """The tokens of a file, by id.

    Raises:
        FailedPrecondition: it cannot be read or is no such file.
    """
    try:
        found: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
        if found["version"] != _VERSION:
            raise ValueError(f"it has version {found['version']}, not {_VERSION}")
        rows = [Token(**{**row, "scopes": tuple(row["scopes"])}) for row in found["tokens"]]
        for row in rows:
            if datetime.fromisoformat(row.expires).tzinfo is None:
                raise ValueError(f"expires of {row.id} has no time zone")
        return {row.id: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"tokens: {path} cannot be used ({error}); give a file of `regreen tokens create`"
        ) from error


def write_text(tokens: Mapping[str, Token]) -> str:
    """A file that `read_tokens` reads."""
    rows = [asdict(token) for token in tokens.values()]
    return json.dumps({"version": _VERSION, "tokens": rows}, indent=2) + "\n"


class Guard:
    """Lets calls in, or says why not.

    Raises:
        FailedPrecondition: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._tokens = read_tokens(path)

    def admit(self, method: str, header: str, charged: str = "") -> Caller | None:
        """Who makes a call of `package.Service/Method` with this header; None where it is open.

        `charged` is the tenant that the call names to be charged, if it does.

        Raises:
            Unauthenticated: there is no token, or none that holds.
            PermissionDenied: its scopes do not cover the method, or its tenant the one named.
        """
        service = method.partition("/")[0]
        if service in scopes.OPEN:
            return None
        token = self._token(header)
        wanted = scopes.SCOPES.get(method)
        if service not in scopes.ANY:
            if wanted is None:
                raise PermissionDenied(f"{method} is in no scope; nobody may call it")
            if not scopes.covers(token.scopes, wanted):
                raise PermissionDenied(
                    f"token {token.id} ({token.name}) lacks the scope {wanted}; "
                    "`regreen tokens create --scope` makes one that has it",
                    metadata={"scope": wanted},
                )
        if charged and token.tenant not in (EVERY, charged):
            raise PermissionDenied(
                f"token {token.id} ({token.name}) is of one tenant, and may charge no other"
            )
        found = Caller(token.tenant, token.id, "" if charged == token.tenant else charged)
        act_as(found)
        return found

    def _token(self, header: str) -> Token:
        text = header.removeprefix(_BEARER)
        if not header.startswith(_BEARER) or not text:
            raise Unauthenticated(
                "this service asks for a token; REGREEN_TOKEN_FILE names the file that holds it"
            )
        self._renew()
        token = self._tokens.get(id_of(text))
        kept = token.sha256 if token else digest("")
        if not hmac.compare_digest(digest(text), kept) or token is None:
            raise Unauthenticated("the token is not known here; ask for one that is")
        if not token.holds(datetime.now(UTC)):
            why = "was revoked" if token.revoked else f"ended at {token.expires}"
            raise Unauthenticated(f"token {token.id} {why}; ask for another")
        return token

    def _renew(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._tokens = read_tokens(self._path)
        except FailedPrecondition as error:
            get().warning("the former tokens stay in use", problem=error.message)

    def _stamp(self) -> object:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size
