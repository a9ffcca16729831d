"""The check of the contracts can fail, for each of its reasons."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELD = "  // Whether it was answered from the result cache.\n  bool cached = 11;\n"


def check(proto: Path) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "infra/scripts/proto_check.sh", proto]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        (FIELD, ""),
        (FIELD.replace("11", "21"), "FAIL  buf breaking"),
        ("  bool cached = 11;\n", "FAIL  buf lint"),
        (FIELD.replace("bool cached", "bool  cached"), "FAIL  buf format"),
    ],
)
def test_a_broken_contract_fails_the_check(tmp_path: Path, changed: str, failed: str) -> None:
    proto = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", proto)
    file = proto / "regreen/sandbox/v1/sandbox.proto"
    text = file.read_text()
    assert text.count(FIELD) == 1
    file.write_text(text.replace(FIELD, changed))
    done = check(proto)
    assert done.returncode == (1 if failed else 0), done.stdout + done.stderr
    assert failed in done.stdout
    assert done.stdout.count("FAIL") == (1 if failed else 0)
