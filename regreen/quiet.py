"""Nothing that is started here reports its use to anyone.

- OpenVINO reports each of its imports to Google through `openvino_telemetry`, and knows no variable
  that forbids it; where that package cannot be imported, OpenVINO goes without.
- Hugging Face's libraries read variables, which processes that are started from here inherit.
"""

import os
import sys

REPORTERS = ("openvino_telemetry",)
"""Modules that do nothing but report."""
VARIABLES = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def be_quiet() -> None:
    """Have no library report, in this process and in those that it starts."""
    for name in REPORTERS:
        sys.modules[name] = None  # type: ignore[assignment]
    os.environ.update(VARIABLES)
