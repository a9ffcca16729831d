"""Makes the broken environment of spec.json: the repository, its packages, what may be chosen.

- Every archive is fetched from the package index and checked by sha256; PIP_INDEX_URL names it.
- It runs under the interpreter of the task, Python 3.7 or newer.
- What may be chosen lies there as wheels: what has none is built now, with the network.
- What builds the project and releases without wheels is held at the versions of the spec.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import html.parser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("REGREEN_WORK", "/work"))
INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/"
PIP = [str(WORK / "env/bin/python"), "-m", "pip", "--disable-pip-version-check"]


class Links(html.parser.HTMLParser):
    """The files of an index page, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._href: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember where a link leads."""
        self._href = dict(attrs).get("href") if tag == "a" else None

    def handle_data(self, data: str) -> None:
        """The text of a link is the file's name."""
        if self._href:
            self.found[data.strip()] = self._href
            self._href = None


def fetch(package: str, filename: str, sha256: str, folder: Path) -> Path:
    """An archive of the index, checked."""
    page = urllib.parse.urljoin(INDEX, package.lower().replace("_", "-").replace(".", "-") + "/")
    links = Links()
    with urllib.request.urlopen(page, timeout=60) as answer:
        body = answer.read().decode()
        if "json" in answer.headers.get("Content-Type", ""):
            links.found = {file["filename"]: file["url"] for file in json.loads(body)["files"]}
        else:
            links.feed(body)
    with urllib.request.urlopen(urllib.parse.urljoin(page, links.found[filename])) as answer:
        data = answer.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SystemExit(f"{filename} has another sha256 than the task names")
    path = folder / filename
    path.write_bytes(data)
    return path


def unpack(archive: Path, target: Path, folder: Path) -> None:
    """An archive without its top folder."""
    inside = folder / f"unpacked-{archive.name}"
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(inside)
    else:
        untar(archive, inside)
    entries = list(inside.iterdir())
    top = entries[0] if len(entries) == 1 and entries[0].is_dir() else inside
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(top, target)


def untar(archive: Path, target: Path) -> None:
    """A tar archive; the filter of newer interpreters keeps it inside."""
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "data_filter"):
            opened.extractall(target, filter="data")
        else:
            opened.extractall(target)


def line(pin: dict[str, Any]) -> str:
    """A pin as pip takes it, with its hashes."""
    hashes = " ".join(f"--hash=sha256:{file['sha256']}" for file in pin["files"])
    return f"{pin['name']}=={pin['version']} {hashes}\n"


def pip(*words: str) -> int:
    """Run pip in the environment; its exit status."""
    return subprocess.run([*PIP, *words]).returncode


def must(code: int, what: str) -> None:
    """End where a step failed."""
    if code:
        raise SystemExit(f"cannot {what}")


def source(spec: dict[str, Any], folder: Path) -> Path:
    """The repository, with what is laid over it."""
    repo = WORK / "repo"
    repo.mkdir(parents=True, exist_ok=True)
    if (HERE / "repo.tar").exists():
        untar(HERE / "repo.tar", repo)
    else:
        file = spec["source"]
        unpack(fetch(spec["package"], file["filename"], file["sha256"], folder), repo, folder)
    over = spec.get("overlay_source")
    if over:
        archive = fetch(spec["package"], over["filename"], over["sha256"], folder)
        unpack(archive, folder / "over", folder)
        for path in spec["overlay_paths"]:
            whole = folder / "over" / path
            target = repo / path
            if whole.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(whole, target)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(whole, target)
    (repo / "requirements.lock").write_text(spec["lock"])
    return repo


def hold_build_tools(spec: dict[str, Any], folder: Path) -> None:
    """What pip builds with; older pips know one set for all, so names must not meet there."""
    named = {pin["name"] for pin in (*spec["pins"], *spec["wheelhouse"])}
    lines = {pin["name"]: f"{pin['name']}=={pin['version']}\n" for pin in spec["build_pins"]}
    for variable, skipped in (("PIP_BUILD_CONSTRAINT", set()), ("PIP_CONSTRAINT", named)):
        path = folder / f"{variable}.txt"
        path.write_text("".join(text for name, text in lines.items() if name not in skipped))
        os.environ[variable] = str(path)


def offer(pin: dict[str, Any], folder: Path) -> None:
    """A release that may be chosen, as a wheel."""
    house = WORK / "wheelhouse"
    house.mkdir(exist_ok=True)
    one = folder / f"{pin['name']}-{pin['version']}.txt"
    one.write_text(line(pin))
    if pip("wheel", "--no-deps", "--require-hashes", "-r", str(one), "-w", str(house)):
        sys.stdout.write(f"left out, no wheel of it for this machine: {line(pin)}")


def main() -> None:
    """Source, environment, packages, wheelhouse, project."""
    spec = json.loads((HERE / "spec.json").read_text())
    folder = Path(tempfile.mkdtemp())
    repo = source(spec, folder)
    subprocess.run([sys.executable, "-m", "venv", str(WORK / "env")], check=True)
    hold_build_tools(spec, folder)
    pins = folder / "pins.txt"
    pins.write_text("".join(map(line, spec["pins"])))
    must(pip("install", "--no-deps", "--require-hashes", "-r", str(pins)), "install the pins")
    with concurrent.futures.ThreadPoolExecutor(8) as several:
        list(several.map(lambda pin: offer(pin, folder), spec["wheelhouse"]))
    if spec["install_mode"] == "editable":
        must(pip("install", "--no-deps", "-e", str(repo)), "install the project")
    elif spec["install_mode"] == "path":
        where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        run = [PIP[0], "-c", where]
        packages = subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        Path(packages, "regreen_repo.pth").write_text(f"{repo}\n{repo}/src\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
