"""`sbom.py NAME [FILE]`: what the image that this runs in holds, as CycloneDX: Python and system
packages, and Regreen in the version that its `__init__.py`, FILE, has.

- The same packages give the same bytes: nothing of the time or the machine is in it.
"""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote


def component(kind: str, name: str, version: str, **more: Any) -> dict[str, Any]:
    """A package, by the name that tools look it up with."""
    purl = f"pkg:{kind}/{quote(name.lower(), safe='/')}@{quote(version, safe='')}"
    reference = f"{purl}?arch={more.pop('arch')}" if "arch" in more else purl
    return {
        **{"type": "library", "bom-ref": reference, "name": name, "version": version},
        **{"purl": reference},
        **more,
    }


def python_packages() -> list[dict[str, Any]]:
    """What the interpreter that runs this finds."""
    found = []
    for one in metadata.distributions():
        licence = one.metadata.get("License-Expression")
        more = {"licenses": [{"expression": licence}]} if licence else {}
        found.append(component("pypi", one.metadata["Name"], one.version, **more))
    return found


def system_packages() -> list[dict[str, Any]]:
    """What dpkg has installed."""
    form = "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat", form], check=True, capture_output=True, text=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [
        component("deb", f"debian/{name}", version, arch=arch)
        for status, name, version, arch in rows
        if status == "installed"
    ]


def regreen(source: Path) -> dict[str, Any]:
    """The platform's own code.

    Raises:
        SystemExit: the file has no version.
    """
    found = re.search(r'^__version__ = "([^"]+)"$', source.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"sbom: {source} has no __version__")
    return {**component("generic", "regreen", found[1]), "type": "application"}


def main() -> None:
    """Print the bill of materials."""
    own = [regreen(Path(file)) for file in sys.argv[2:]]
    parts = {one["bom-ref"]: one for one in (*own, *python_packages(), *system_packages())}
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        **{"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1},
        "metadata": {"component": {"type": "container", "name": sys.argv[1]}},
        "components": [parts[name] for name in sorted(parts)],
    }
    print(json.dumps(bill, indent=1))


if __name__ == "__main__":
    main()
