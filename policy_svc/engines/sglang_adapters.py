"""Adapters of versions, as the learner leaves them beside whole weights, for SGLang to load.

- `adapter/` in a version's folder is PEFT's format; its digest stands in the metadata of the whole
  weights beside it, whose own digest the version names.
- One is used where it stands on the very model that the servers serve; else whole weights are.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from policy_svc.engines.stepper import WeightsError
from policy_svc.engines.weights import SINGLE, metadata_of
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
        told = json.loads((path / "adapter_config.json").read_bytes())
        if Path(told["base_model_name_or_path"]).resolve() != base.resolve():
            return None
        sha256 = metadata_of(version / SINGLE).get("adapter_sha256")
        with (path / "adapter_model.safetensors").open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError, WeightsError) as error:
        raise DataLoss(f"the adapter in {path} cannot be read: {error}") from error
    if found != sha256:
        raise DataLoss(f"the adapter in {path} has the digest {found}, not {sha256}")
    return Adapter(f"regreen-{found[:24]}", path)
