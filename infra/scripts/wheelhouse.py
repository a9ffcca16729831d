"""`wheelhouse.py NAME...`: wheels of the images of these services, and lists of them with hashes.

- `build/wheelhouse` holds wheels, and for every service NAME.txt: name, version and the SHA-256 of
  the file that is there. Images install from these alone. The paths of all are printed.
- Each file was checked by the hashes of requirements/NAME.txt. torch is taken by its version, as
  its index has it, with the libraries that only its CUDA build needs; deepspeed is built here.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "wheelhouse"
PIN = re.compile(r"^([A-Za-z0-9._-]+==[^\\\n]+)", re.ASCII | re.MULTILINE)
TORCH = re.compile(r"\btorch==([0-9.]+)", re.ASCII)
"""As infra/scripts/setup.sh names it."""
NEEDS_TORCH = "learner"


def collect(folder: Path, *words: str) -> None:
    """Put wheels into a folder.

    Raises:
        SystemExit: pip failed; it has said why.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    # What is built here is built with what `make setup` has installed by hash.
    command += ["--no-build-isolation", "--wheel-dir", str(folder), *words]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"wheelhouse: pip wheel {' '.join(words)} failed; pip said why")


def pins(text: str) -> dict[str, str]:
    """Versions by name, of the packages that are for this kind of machine."""
    found = [Requirement(line.strip()) for line in PIN.findall(text)]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in found
        if one.marker is None or one.marker.evaluate()
    }


def torch(listed: dict[str, str]) -> list[Path]:
    """torch, and what it needs that is not listed."""
    found = TORCH.search((ROOT / "infra" / "scripts" / "setup.sh").read_text())
    assert found, "setup.sh installs torch"
    with tempfile.TemporaryDirectory(dir=WHEELS) as place:
        bounds = Path(place) / "bounds.txt"
        bounds.write_text("".join(f"{name}=={version}\n" for name, version in listed.items()))
        collect(Path(place), "--constraint", str(bounds), f"torch=={found[1]}")
        return [
            wheel.replace(WHEELS / wheel.name)
            for wheel in sorted(Path(place).glob("*.whl"))
            if parse_wheel_filename(wheel.name)[0] not in listed
        ]


def wheel_of(name: str, version: str) -> Path:
    """The wheel of a pinned package.

    Raises:
        SystemExit: pip has made none.
    """
    for wheel in WHEELS.glob("*.whl"):
        found = parse_wheel_filename(wheel.name)
        if (found[0], str(found[1])) == (name, version):
            return wheel
    raise SystemExit(f"wheelhouse: there is no wheel of {name}=={version}")


def main() -> None:
    """Make the wheels and lists of the services that are named."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    for service in sys.argv[1:]:
        requirements = ROOT / "requirements" / f"{service}.txt"
        collect(WHEELS, "--no-deps", "--require-hashes", "--requirement", str(requirements))
        listed = pins(requirements.read_text())
        wheels = [wheel_of(name, version) for name, version in listed.items()]
        if service == NEEDS_TORCH:
            wheels += torch(listed)
        lines = []
        for wheel in wheels:
            name, version, _, _ = parse_wheel_filename(wheel.name)
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
        (WHEELS / f"{service}.txt").write_text("".join(lines))
        for path in (WHEELS / f"{service}.txt", *wheels):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
