"""`python -m regreen.stack.elsewhere NAME=ADDRESS...`: use services that others run in a home.

- It writes the home's `stack.json`, which says who runs them; `regreen up` then waits for them,
  and neither starts nor stops anything.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from regreen.home import default_home
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, RegreenError
from regreen.stack.layout import ELSEWHERE, SERVICES, Layout


def use(
    layout: Layout, by: str, endpoints: Mapping[str, str], tls: str = "", token_file: str = ""
) -> None:
    """Describe services by their addresses; `by` says who runs them, for messages.

    Raises:
        FailedPrecondition: a stack of this home's own runs.
        InvalidArgument: the home cannot be written, or a service is unknown.
    """
    known = [service.name for service in SERVICES]
    for name in endpoints:
        if name not in known:
            raise InvalidArgument("name", f"{name!r} is unknown", f"give {', '.join(known)}")
    if layout.supervised():
        raise FailedPrecondition(
            f"a stack of {layout.home} runs already; stop it with `regreen down` first"
        )
    layout.make()
    described = {
        ELSEWHERE: by,
        "endpoints": dict(endpoints),
        **{"metrics": {}, "http": {}, "tls": tls, "token_file": token_file},
    }
    draft = layout.description.with_suffix(".tmp")
    draft.write_text(json.dumps(described, indent=2) + "\n")
    draft.replace(layout.description)
    layout.borrowed.unlink(missing_ok=True)


def leave(layout: Layout) -> None:
    """Forget services that others ran; a stack of this home's own stays."""
    if not layout.supervised():
        layout.description.unlink(missing_ok=True)


def main() -> None:
    """Write the description, or remove it."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.stack.elsewhere", description=__doc__
    )
    parser.add_argument("--home", type=Path, default=default_home())
    parser.add_argument("places", nargs="*", metavar="NAME=ADDRESS")
    parser.add_argument("--by", default="somebody else", help="what runs them, for messages")
    parser.add_argument("--tls", default="", help="folder with ca.crt, tls.crt and tls.key")
    parser.add_argument("--token-file", default="")
    parser.add_argument("--leave", action="store_true", help="use them no more")
    given = parser.parse_args()
    layout = Layout(given.home)
    try:
        if given.leave:
            leave(layout)
        else:
            places = dict(place.partition("=")[::2] for place in given.places)
            use(layout, given.by, places, given.tls, given.token_file)
    except RegreenError as error:
        raise SystemExit(error.message) from None


if __name__ == "__main__":
    main()
