"""Where everything is kept that is written at run time."""

import os
from pathlib import Path


def default_home() -> Path:
    """`REGREEN_HOME`, else the user's data directory."""
    if home := os.environ.get("REGREEN_HOME"):
        return Path(home)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "regreen"
