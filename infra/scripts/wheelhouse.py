"""`wheelhouse.py NAME...`: wheels of the images of these services, and lists of them with hashes.

- `build/wheelhouse` holds wheels, and for every service NAME.txt: name, version and the SHA-256 of
  the file that is there. Images install from these alone. The paths of all are printed.
- Each file was checked by the hashes of requirements/NAME.txt; torch by those of torch.txt, which
  has PyPI's builds and the CPU build, and what PyPI's needs by those of cuda.txt.
- deepspeed has no wheel and is built here, of a source that was checked.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "wheelhouse"
REQUIREMENTS = ROOT / "requirements"
PIN = re.compile(r"^([A-Za-z0-9._-]+==[^\\\n]+)", re.ASCII | re.MULTILINE)
BY_HASH = ("--no-deps", "--require-hashes", "--requirement")
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
    """torch as the index at hand has it, and the libraries of CUDA where that build needs them.

    pip is not asked for one of several hashes: it prefers PyPI's build to one from a folder.

    Raises:
        SystemExit: it is none of the builds of torch.txt.
    """
    known = (REQUIREMENTS / "torch.txt").read_text()
    with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
        place = Path(folder)
        collect(place, "--no-deps", *PIN.findall(known))
        (wheel,) = place.glob("*.whl")
        if digest(wheel) not in known:
            raise SystemExit(
                f"wheelhouse: {wheel.name} (sha256:{digest(wheel)}) is no build of "
                "requirements/torch.txt; add its hash there if you trust it"
            )
        if needs(wheel) - set(listed):
            collect(place, *BY_HASH, str(REQUIREMENTS / "cuda.txt"))
        return [one.replace(WHEELS / one.name) for one in sorted(place.glob("*.whl"))]


def digest(wheel: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with wheel.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def needs(wheel: Path) -> set[str]:
    """Names of the packages that a wheel requires on this machine."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        said = Metadata.from_email(archive.read(name), validate=False)
    return {
        canonicalize_name(one.name)
        for one in said.requires_dist or []
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


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
        requirements = REQUIREMENTS / f"{service}.txt"
        collect(WHEELS, *BY_HASH, str(requirements))
        listed = pins(requirements.read_text())
        wheels = [wheel_of(name, version) for name, version in listed.items()]
        if service == NEEDS_TORCH:
            wheels += torch(listed)
        lines = []
        for wheel in wheels:
            name, version, _, _ = parse_wheel_filename(wheel.name)
            lines.append(f"{name}=={version} --hash=sha256:{digest(wheel)}\n")
        (WHEELS / f"{service}.txt").write_text("".join(lines))
        for path in (WHEELS / f"{service}.txt", *wheels):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
