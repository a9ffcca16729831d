"""Adapters of versions, as the learner leaves them beside whole weights, for SGLang to load.

- `adapter/` in a version's folder is PEFT's format, and `adapter.json` its digest.
- One is used where it stands on the very model that the servers serve; else whole weights are.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from regreen.rpc.errors import DataLoss

_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter."""

    name: str
    """Of its content."""
    path: Path


def adapter_of(version: Path, base: Path) -> Adapter | None:
    """The adapter in a version's folder, if it stands on the model in `base`.

    Raises:
        DataLoss: it is damaged.
    """
    path = version / _FOLDER
    if not path.is_dir():
        return None
    try:
        stands_on = json.loads((path / "adapter_config.json").read_bytes())[
            "base_model_name_or_path"
        ]
        if Path(stands_on).resolve() != base.resolve():
            return None
        sha256 = json.loads((path / "adapter.json").read_bytes())["sha256"]
        with (path / "adapter_model.safetensors").open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"the adapter in {path} cannot be read: {error}") from error
    if found != sha256:
        raise DataLoss(f"the adapter in {path} has the digest {found}, not {sha256}")
    return Adapter(f"regreen-{found[:24]}", path)
