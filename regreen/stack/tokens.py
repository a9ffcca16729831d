"""The tokens of a stack on one machine: that of its commands, and the judge's for the policy.

Both are the platform's own: who runs a stack sees what all its tenants made.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from regreen.rpc.scopes import AREAS
from regreen.rpc.tenants import EVERY
from regreen.rpc.tokens import id_of
from regreen.stack.layout import Layout
from regreen.tokens import TokenFile, write_private

_LIFE = timedelta(days=365)
_DUE = timedelta(days=30)


def prepare_tokens(layout: Layout) -> None:
    """Make the tokens that are not there, do not hold, or end soon."""
    tokens = TokenFile(layout.tokens)
    _prepare(tokens, layout.client_token, "commands", [f"{a}:admin" for a in AREAS])
    _prepare(tokens, layout.judge_token, "judge", ["policy:write"])


def _prepare(tokens: TokenFile, path: Path, name: str, scopes: list[str]) -> None:
    now = datetime.now(UTC)
    known = {token.id: token for token in tokens.list()}
    held = known.get(id_of(path.read_text().strip())) if path.exists() else None
    if held is None or not held.holds(now + _DUE):
        _, text = tokens.create(name, scopes, EVERY, _LIFE, now)
        write_private(path, text + "\n")
