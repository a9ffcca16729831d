"""infra/docker/sbom.py: the bill of materials of an image."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import regreen

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "regreen" / "__init__.py"


def bill(*words: str) -> str:
    script = str(ROOT / "infra" / "docker" / "sbom.py")
    return subprocess.run(
        [sys.executable, script, *words], check=True, capture_output=True, text=True
    ).stdout


def held() -> list[list[str]]:
    """What a fresh interpreter finds; this one may see more, of packages that brought their own."""
    ask = (
        "import json; from importlib import metadata as m; "
        "print(json.dumps([[d.metadata['Name'], d.version] for d in m.distributions()]))"
    )
    found: list[list[str]] = json.loads(subprocess.check_output([sys.executable, "-c", ask]))
    return found


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="sbom: no dpkg-query on this machine")
def test_a_bill_names_every_package_and_the_platform() -> None:
    text = bill("regreen-judge", str(OWN))
    said = json.loads(text)
    assert (said["bomFormat"], said["specVersion"]) == ("CycloneDX", "1.5")
    assert said["metadata"]["component"]["name"] == "regreen-judge"
    by_purl: dict[str, Any] = {one["purl"].partition("?")[0]: one for one in said["components"]}
    assert by_purl[f"pkg:generic/regreen@{regreen.__version__}"]["type"] == "application"
    for name, version in held():
        assert f"pkg:pypi/{name.lower()}@{quote(version)}" in by_purl
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Package}\n"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    installed = {line.split()[1] for line in listed if line.startswith("installed ")}
    names = {one["name"] for one in said["components"] if one["purl"].startswith("pkg:deb/")}
    assert names == {f"debian/{name}" for name in installed}
    references = [one["bom-ref"] for one in said["components"]]
    assert references == sorted(set(references))
    assert text == bill("regreen-judge", str(OWN)), "the same packages give the same bytes"


def test_a_source_without_a_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bill("regreen-judge", str(tmp_path / "__init__.py"))
    assert "has no __version__" in caught.value.stderr
