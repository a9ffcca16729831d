"""Makes, lists and revokes bearer tokens in their file of hashes.

- A token's text is given out once, to its maker; the file never has it.
- The file is replaced whole, and read by its owner alone (0600); one process changes it at a time.
"""

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from regreen.rpc import scopes as known
from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.rpc.tenants import EVERY
from regreen.rpc.tokens import PREFIX, Token, digest, read_tokens, write_text

DEFAULT_TENANT = "default"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_SECRET_BYTES = 32


class TokenFile:
    """The tokens that services check calls against."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def list(self) -> list[Token]:
        """Every token, oldest first.

        Raises:
            FailedPrecondition: the file cannot be used.
        """
        return sorted(self._read().values(), key=lambda token: token.created)

    def create(
        self, name: str, scopes: Sequence[str], tenant: str, life: timedelta, now: datetime
    ) -> tuple[Token, str]:
        """A new token, and its text.

        Raises:
            InvalidArgument: a name, the tenant or a scope is none.
        """
        for field, value in (("name", name), ("tenant", tenant)):
            if not _NAME.fullmatch(value) and (field, value) != ("tenant", EVERY):
                raise InvalidArgument(
                    field,
                    f"{value!r} is none",
                    "give letters, digits, '.', '_' and '-', at most 64"
                    + (f", or {EVERY} for the platform's own" if field == "tenant" else ""),
                )
        for scope in scopes:
            if scope not in known.KNOWN:
                raise InvalidArgument(
                    "scope", f"{scope!r} is none", f"give {', '.join(known.KNOWN)}"
                )
        if not scopes:
            raise InvalidArgument("scope", "is missing", f"give {', '.join(known.KNOWN)}")
        id = secrets.token_hex(6)
        text = f"{PREFIX}_{id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        token = Token(
            id=id,
            name=name,
            tenant=tenant,
            scopes=tuple(dict.fromkeys(scopes)),
            sha256=digest(text),
            created=now.isoformat(),
            expires=(now + life).isoformat(),
        )
        with self._locked():
            self._write({**self._read(), id: token})
        return token, text

    def revoke(self, id: str, now: datetime) -> Token:
        """Let a token hold no more, from the next call of anybody on.

        Raises:
            NotFound: there is none of this id.
        """
        with self._locked():
            tokens = self._read()
            if id not in tokens:
                raise NotFound(f"no token {id!r}; `regreen tokens list` shows those that there are")
            if not tokens[id].revoked:
                tokens[id] = replace(tokens[id], revoked=now.isoformat())
                self._write(tokens)
            return tokens[id]

    def _read(self) -> dict[str, Token]:
        return read_tokens(self.path) if self.path.exists() else {}

    def _write(self, tokens: dict[str, Token]) -> None:
        write_private(self.path, write_text(tokens))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def write_private(path: Path, text: str) -> None:
    """Replace a file, whole, by one that its owner alone may read."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as target:
            target.write(text)
            target.flush()
            os.fsync(target.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
