"""What a client shows to the services: its certificates and its token.

- `REGREEN_TLS` names a folder with `ca.crt`, `tls.crt` and `tls.key`.
- `REGREEN_TOKEN_FILE` names a file with a bearer token.
- A stack says in its `stack.json` whether it runs with either, and names such places; those that
  the environment names go before.
- Secrets are read from files alone, never from the environment or the command line.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regreen.rpc.certificates import Tls

TLS_VARIABLE, TOKEN_VARIABLE = "REGREEN_TLS", "REGREEN_TOKEN_FILE"


@dataclass(frozen=True, slots=True)
class Access:
    """What a client shows; nothing on a stack that asks for nothing."""

    tls: Tls | None = None
    """Its certificates; plain text without."""

    token_file: Path | None = None
    """File with its token; no token without."""

    @classmethod
    def of(cls, tls: str | None, token_file: str | None = None) -> "Access":
        """That of a folder of certificates and a file with a token."""
        return cls(Tls.of(Path(tls)) if tls else None, Path(token_file) if token_file else None)

    @classmethod
    def of_environment(cls) -> "Access":
        """What the environment names."""
        return cls.of(os.environ.get(TLS_VARIABLE), os.environ.get(TOKEN_VARIABLE))

    @classmethod
    def of_stack(cls, described: Mapping[str, Any]) -> "Access":
        """What a described stack asks for."""
        return cls.of(
            _named(TLS_VARIABLE, described.get("tls")),
            _named(TOKEN_VARIABLE, described.get("token_file")),
        )


def _named(variable: str, described: str | None) -> str | None:
    """What the environment names, where a stack does not say that it asks for nothing."""
    return None if described == "" else os.environ.get(variable) or described
