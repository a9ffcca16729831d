"""`python -m regreen.stack.access`: certificates, tokens and a password for services in containers.

- Each service finds in a folder of its own what it alone may read, by the names that the chart
  mounts: `tls`, `tokens`, `quotas`, for the judge `token`, for the dataset `database`. The
  authority's key and the tokens themselves stay in the home.
- Made once and renewed long before it ends, each file replaced whole; services take it up as they
  run. `HOME/ready` is there once all was handed out.
"""

import argparse
import secrets
import time
from pathlib import Path

from regreen.certs.local import prepare
from regreen.rpc.certificates import CA, CERT, KEY
from regreen.stack.layout import SERVICES, Layout
from regreen.stack.tokens import prepare_tokens
from regreen.tokens import write_private

READY = "ready"
PASSWORD = "password"
_LOOK_S = 3600.0


def hand_out(layout: Layout, handed: Path, database: str, quotas: str = "") -> None:
    """Make what is missing, renew what is due, and give each service its part.

    `database` is a URL with `{password}` in it; the folder `database` is its server's. `quotas` is
    the file of that name, for each service that keeps some.
    """
    prepare(layout.certs, [service.name for service in SERVICES])
    prepare_tokens(layout)
    for service in SERVICES:
        place = handed / service.name
        for name in (CA, CERT, KEY):
            _copy(layout.certs / service.name / name, place / "tls" / name)
        _copy(layout.tokens, place / "tokens" / "tokens.json")
        if quotas:
            _put(quotas, place / "quotas" / "quotas.toml")
    _copy(layout.judge_token, handed / "judge" / "token" / "token")
    password = layout.home / PASSWORD
    if not password.exists():
        write_private(password, secrets.token_urlsafe(32))
    url = handed / "dataset" / "database" / "url"
    _put(database.format(password=password.read_text()), url)
    given = handed / "database" / PASSWORD
    _copy(password, given)
    given.chmod(0o644)  # the server runs as another user, and nobody else has this folder
    write_private(layout.home / READY, "")


def _copy(source: Path, target: Path) -> None:
    _put(source.read_text(), target)


def _put(text: str, target: Path) -> None:
    """Give a file this content, unless it has it."""
    if target.exists() and target.read_text() == text:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    write_private(target, text)


def main() -> None:
    """Hand out now, and look again every hour."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.stack.access", description=__doc__
    )
    parser.add_argument("--home", type=Path, required=True, help="kept here, the authority too")
    parser.add_argument("--handed", type=Path, required=True, help="folders NAME of the services")
    parser.add_argument("--database", required=True, help="URL with {password} in it")
    parser.add_argument("--quotas", default="", help="text of a file of quotas")
    parser.add_argument("--once", action="store_true", help="end after the first time")
    given = parser.parse_args()
    (given.home / READY).unlink(missing_ok=True)  # of an earlier start
    while True:
        hand_out(Layout(given.home), given.handed, given.database, given.quotas)
        if given.once:
            return
        time.sleep(_LOOK_S)


if __name__ == "__main__":
    main()
