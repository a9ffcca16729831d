"""Builds Python environments: unpack, install by hash, in place, compile, test once, freeze.

- The host only fetches and stores; every byte of the task runs in boxes without a network.
- The environment holds exactly the pins of the spec and the project; build tools live elsewhere.
- The same spec gives the same layers' content, whatever else the store holds.
- The baseline is what the broken State itself says, run by the validator's own test runner.
"""

import asyncio
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from regreen.blobs import BlobStore, Digest
from regreen.lockfile import format_lock, lock_of, normalize
from regreen.pkgindex import find_uv, interpreter_tags, wheel_fits
from regreen.rpc.errors import (
    FailedPrecondition,
    InfraError,
    InvalidArgument,
    MissingDependency,
    NoSuchFile,
)
from regreen.testpaths import PYTEST_INI, SHARED_INI
from sandbox_svc.backends.base import Box, Command, EndReason, ExecResult, Limits, Mount, Runtime
from sandbox_svc.backends.fds import FULL, no_space
from sandbox_svc.builders import testrun
from sandbox_svc.builders.base import (
    BUILDHOUSE,
    ENV,
    HOME,
    LOCK,
    REPO,
    RUNNER,
    TOOLS,
    WHEELHOUSE,
    DistFile,
    EnvironmentSpec,
    Installed,
    Pin,
    Prepared,
    Progress,
    Stage,
    lay_over,
    nothing_installed,
)
from sandbox_svc.builders.checked import check_spec
from sandbox_svc.builders.compiled import COMPILED, ByteCode
from sandbox_svc.builders.interpreters import Interpreter, find_interpreter
from sandbox_svc.builders.protect import protected_roots, pytest_settings
from sandbox_svc.builders.standing import module_files, own_modules, own_names
from sandbox_svc.fetches import Fetches
from sandbox_svc.wheelhouse import DistStore, Wheel, pick

INBOX = Path(__file__).parent / "inbox"
DISTS = "/dists"
FACTS = "/work/.regreen/env.json"
MAX_SETTINGS = 2000
_LISTING_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the host has laid out for one spec."""

    interpreters: Mapping[str, Interpreter]
    mounts: tuple[Mount, ...]

    @property
    def python(self) -> str:
        """Any interpreter that can run the scripts of `inbox`."""
        newest = max(self.interpreters, key=lambda v: [int(part) for part in v.split(".")])
        return str(self.interpreters[newest].executable)


class PythonBuilder:
    """See `builders.base.Builder`."""

    name = "python"

    def __init__(self, store: DistStore, tools: Path, blobs: BlobStore | None = None) -> None:
        self.store, self.blobs = store, blobs
        self.tools = _lay_out_tools(tools)
        self.byte_code = ByteCode(store)

    async def prepare(
        self,
        spec: EnvironmentSpec,
        runtime: Runtime,
        limits: Limits,
        progress: Progress,
        fetches: Fetches | None = None,
        installed: Installed = nothing_installed,
    ) -> Prepared:
        """Fetch, build, install, freeze, then run the broken State's tests."""
        check_spec(spec)
        interpreters = {v: find_interpreter(v) for v in spec.allowed_pythons}
        inputs = await self._fetch(spec, interpreters, progress, fetches)
        house, wheels = await self._wheelhouse(spec, inputs, runtime, limits, progress)
        inputs = replace(inputs, mounts=(*inputs.mounts, Mount(house, WHEELHOUSE)))
        installation = self._installation(spec, interpreters)
        layers = installed(installation)
        mounts = inputs.mounts
        if not layers:
            given = (interpreters[spec.python], mounts, runtime, limits)
            mounts = (*mounts, await self.byte_code.mount(wheels, *given))
        box = await runtime.create(layers, limits=limits, mounts=mounts)
        try:
            if layers:
                progress(Stage("install", 1, 1, "as in a State that is here"))
            else:
                await self._install(spec, inputs, box, progress)
            settings = await _read_settings(box)
            files = await module_files(box)
            foreign = await _foreign_modules(box, inputs, normalize(spec.package), files)
            if not layers:
                progress(Stage("snapshot", 0, 1))
                layers = (await box.freeze(),)
        finally:
            await box.delete()
        kept = tuple(m for m in inputs.mounts if m.target != DISTS)
        env = box_environment()
        facts = {
            "spec": json.loads(spec.canonical()),
            "python": spec.python,
            "interpreters": {v: str(i.executable) for v, i in interpreters.items()},
            "full_versions": {v: i.full_version for v, i in interpreters.items()},
            "wheelhouse": str(house),
            "lock": _lock_text(spec),
            "protected": list(protected_roots(spec.test)),
            "settings": settings,
            "modules": sorted(own_modules(files, foreign)),
            "foreign": sorted(foreign),
            "runner": RUNNER,
        }
        progress(Stage("baseline", 0, 1))
        baseline, facts = await testrun.baseline(runtime, layers, kept, env, facts, limits, files)
        told = "; ".join((f"{len(baseline.failing)} tests fail", *baseline.notes))
        progress(Stage("baseline", 1, 1, told))
        facts |= {"baseline": asdict(baseline)}
        return Prepared(layers, kept, env, facts, installation)

    def _installation(self, spec: EnvironmentSpec, found: Mapping[str, Interpreter]) -> str:
        """A digest of all that the files follow from: the spec, and what of this host has part."""
        parts = [f"{v} {i.full_version} {i.executable}" for v, i in sorted(found.items())]
        parts += [os.uname().machine, str(self.tools)]
        return hashlib.sha256(spec.installation + "\n".join(parts).encode()).hexdigest()

    async def _fetch(
        self,
        spec: EnvironmentSpec,
        interpreters: Mapping[str, Interpreter],
        progress: Progress,
        fetches: Fetches | None,
    ) -> Inputs:
        wanted: list[tuple[str, DistFile]] = []
        pythons = spec.allowed_pythons
        for pin in (*spec.pins, *spec.wheelhouse):
            wanted += [(pin.name, f) for f in _files_for(pin, pythons)]
        tools = [(pin.name, f) for pin in spec.build_pins for f in _files_for(pin, pythons)]
        archives = [(spec.package, f) for f in (spec.source, spec.overlay_source) if f is not None]
        await self.store.ensure([*wanted, *tools, *archives], progress, fetches)
        files = [f for _, f in archives]
        if spec.source_tree:
            files.append(await self._source_tree(spec))
        files += [f for _, f in wanted if not f.filename.endswith(".whl")]
        folder = self.store.folder(files)
        buildhouse = self.store.folder([f for _, f in tools])
        mounts = [Mount(folder, DISTS), Mount(buildhouse, BUILDHOUSE), Mount(self.tools, TOOLS)]
        mounts += [i.mount for i in interpreters.values() if i.mount is not None]
        return Inputs(interpreters, tuple(mounts))

    async def _source_tree(self, spec: EnvironmentSpec) -> DistFile:
        if self.blobs is None:
            raise MissingDependency("this service has no blob store; send `source` instead")
        with tempfile.TemporaryDirectory(dir=self.store.root) as folder:
            path = Path(folder) / "source-tree.tar"
            await self.blobs.get_file(Digest(spec.source_tree, spec.source_tree_bytes), path)
            return self.store.adopt(path)

    async def _wheelhouse(
        self,
        spec: EnvironmentSpec,
        inputs: Inputs,
        runtime: Runtime,
        limits: Limits,
        progress: Progress,
    ) -> tuple[Path, list[Wheel]]:
        """Wheels of every release for every allowed interpreter, and those that are installed.

        Source archives are built first. A wheel that was built for one interpreter serves all that
        it fits. The State's own comes first, so that what was built before for others changes
        nothing.

        Raises:
            MissingDependency: a pin has no wheel that fits the State's own interpreter.
        """
        tags = {python: interpreter_tags(python) for python in spec.allowed_pythons}
        wheels: set[Wheel] = set()
        for pin in _pins(spec):
            for file in _files_for(pin, spec.allowed_pythons):
                if file.filename.endswith(".whl"):
                    wheels.add(Wheel(pin.name, pin.version, file.filename, file.sha256))
        to_build = [(pin, found) for pin in _pins(spec) if (found := _sources(pin, spec))]
        for number, (pin, sources) in enumerate(to_build):
            built: list[Wheel] = []
            for python, file in sources.items():
                if any(wheel_fits(wheel.filename, tags[python]) for wheel in built):
                    continue
                wheel = self.store.built(self._build_key(spec, file, inputs, python))
                if wheel is None:
                    progress(Stage("build", number, len(to_build), str(pin)))
                    job = (pin, file, python)
                    wheel = await self._build_wheel(spec, inputs, runtime, limits, job)
                if wheel is not None and wheel_fits(wheel.filename, tags[python]):
                    built.append(replace(wheel, name=pin.name, version=pin.version))
            wheels.update(built)
        own = tags[spec.python]
        fits = [w for w in sorted(wheels, key=astuple) if wheel_fits(w.filename, own)]
        have = {(wheel.name, wheel.version): wheel for wheel in fits}
        lost = [str(p) for p in spec.pins if (p.name, p.version) not in have]
        if lost:
            raise MissingDependency(
                f"no wheel of {', '.join(lost)} for Python {spec.python} can be had or built here"
            )
        return self.store.house(wheels), [have[p.name, p.version] for p in spec.pins]

    def _build_key(self, spec: EnvironmentSpec, file: DistFile, inputs: Inputs, python: str) -> str:
        parts = [file.sha256, inputs.interpreters[python].full_version, os.uname().machine]
        tools = [(pin, pick(pin, python)) for pin in spec.build_pins]
        parts += sorted(f"{pin} {tool.sha256 if tool else ''}" for pin, tool in tools)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def _build_wheel(
        self,
        spec: EnvironmentSpec,
        inputs: Inputs,
        runtime: Runtime,
        limits: Limits,
        job: tuple[Pin, DistFile, str],
    ) -> Wheel | None:
        """Build one sdist in a box of its own; None where it cannot be built."""
        pin, file, python = job
        executable = str(inputs.interpreters[python].executable)
        box = await runtime.create((), limits=limits, mounts=inputs.mounts)
        try:
            await box.write_file("/work/home/.keep", b"")
            argv = [f"{TOOLS}/bin/uv", "build", "--wheel", "--offline", "--no-index"]
            argv += ["--find-links", BUILDHOUSE, "--python", executable]
            argv += ["--out-dir", "/work/wheels", f"{DISTS}/{file.filename}"]
            done = await box.run(Command(tuple(argv), env=_build_environment(), cwd="/work"))
            if not done.ok:
                _refuse_full_disk(done)
                return None
            listing = await box.run(Command(("ls", "/work/wheels"), cwd="/work"))
            names = [n for n in listing.stdout.text.split() if n.endswith(".whl")]
            if len(names) != 1:
                return None
            data = await box.read_file(f"/work/wheels/{names[0]}", 256 << 20)
        finally:
            await box.delete()
        key = self._build_key(spec, file, inputs, python)
        return self.store.record_built(key, pin.name, pin.version, names[0], data)

    async def _install(
        self, spec: EnvironmentSpec, inputs: Inputs, box: Box, progress: Progress
    ) -> None:
        """Source, overlay, environment, project, lock file and byte code."""
        await box.write_file(f"{HOME}/.keep", b"")
        unpack = (inputs.python, "-I", "-S", f"{TOOLS}/lib/unpack.py")
        archive = spec.source.filename if spec.source else "source-tree.tar"
        keep = () if spec.source else ("--keep-top",)
        await _must(box, (*unpack, f"{DISTS}/{archive}", REPO, *keep), "unpack the source")
        if spec.overlay_source is not None:
            only = [part for path in spec.overlay_paths for part in ("--only", path)]
            overlay = (f"{DISTS}/{spec.overlay_source.filename}", REPO, *only)
            await _must(box, (*unpack, *overlay), "unpack the overlay")
        for number, change in enumerate(spec.overlay):
            await lay_over(box, number, change)
        facts = {
            "project": normalize(spec.package),
            "install_mode": spec.install_mode,
            "python": spec.python,
            "interpreters": {v: str(i.executable) for v, i in inputs.interpreters.items()},
            "wheelhouse": WHEELHOUSE,
            "buildhouse": BUILDHOUSE,
            "repo": REPO,
            "env": ENV,
            "path": [REPO, f"{REPO}/src"],
        }
        await box.write_file(FACTS, json.dumps(facts, indent=1).encode())
        await box.write_file(f"{REPO}/{LOCK}", _lock_text(spec).encode())
        progress(Stage("install", 0, 2, f"{len(spec.pins)} packages"))
        sync = (inputs.python, "-I", "-S", f"{TOOLS}/lib/sync_env.py")
        await _must(box, sync, "install the pins")
        progress(Stage("compile", 1, 2))
        environment = box_environment()
        prefix = environment.pop("PYTHONPYCACHEPREFIX")
        byte_code = (f"{ENV}/bin/python", "-S", f"{TOOLS}/lib/byte_code.py", prefix, COMPILED)
        folders = (f"{ENV}/lib", REPO, f"{TOOLS}/lib")
        await box.run(Command((*byte_code, *folders), env=environment))
        caches = "/work/home/.cache /work/repo/.pytest_cache /work/.cache /work/pycache/tmp"
        await box.run(Command(("sh", "-c", f"rm -rf /tmp/* {caches}"), cwd="/"))


def box_environment() -> dict[str, str]:
    """Variables of every command in a Python State."""
    return {
        "PATH": f"{ENV}/bin:{TOOLS}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": HOME,
        "VIRTUAL_ENV": ENV,
        "PYTHONPYCACHEPREFIX": "/work/pycache",
        "PYTHONHASHSEED": "0",
        "TZ": "UTC",
        "LANG": "C.UTF-8",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": WHEELHOUSE,
        "UV_NO_CACHE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": WHEELHOUSE,
    }


def _build_environment() -> dict[str, str]:
    environment = box_environment()
    for name in ("UV_FIND_LINKS", "VIRTUAL_ENV", "PIP_FIND_LINKS"):
        del environment[name]
    return environment


def _lock_text(spec: EnvironmentSpec) -> str:
    return format_lock(lock_of([str(pin) for pin in spec.pins], spec.python))


def _pins(spec: EnvironmentSpec) -> list[Pin]:
    """Every release that is installed or on offer, once."""
    # What is installed is what the pins say, whatever else is on offer under its name.
    return list({(p.name, p.version): p for p in (*spec.wheelhouse, *spec.pins)}.values())


def _sources(pin: Pin, spec: EnvironmentSpec) -> dict[str, DistFile]:
    """Source archives of a release by the interpreter that has no wheel of it, its own first."""
    pythons = dict.fromkeys((spec.python, *spec.allowed_pythons))
    files = {python: file for python in pythons if (file := pick(pin, python)) is not None}
    return {python: f for python, f in files.items() if not f.filename.endswith(".whl")}


def _files_for(pin: Pin, pythons: Sequence[str]) -> list[DistFile]:
    return [f for f in {pick(pin, python) for python in pythons} if f is not None]


async def _must(box: Box, argv: tuple[str, ...], what: str) -> ExecResult:
    """Run a step of the preparation that has to work.

    Raises:
        DiskFull: the host has no space left.
        InfraError: the runtime failed or the step ran out of a limit.
        InvalidArgument: the step itself refused; the spec cannot be followed here.
    """
    done = await box.run(Command(argv, env=_build_environment(), cwd="/work"))
    if done.ok:
        return done
    _refuse_full_disk(done)
    text = (done.stderr.text + done.stdout.text).strip()[-2000:]
    if done.reason is not EndReason.EXIT:
        raise InfraError(f"cannot {what}: ended by {done.reason}: {text}")
    raise InvalidArgument("spec", f"cannot {what}: {text}", "correct the spec or the pins")


def _refuse_full_disk(done: ExecResult) -> None:
    """Say that the disk is full where a step says so: no fault of the spec.

    Raises:
        DiskFull: it is.
    """
    text = done.stderr.text + done.stdout.text
    if any(os.strerror(number) in text for number in FULL):
        raise no_space(f"no space to prepare a state: {text.strip()[-500:]}")


async def _read_settings(box: Box) -> dict[str, str]:
    """pytest's part of each settings file of the repository, by path.

    Raises:
        InvalidArgument: there are more than anyone can keep.
        InfraError: the listing cannot be had.
    """
    wanted = SHARED_INI | PYTEST_INI
    either = " -o ".join(f"-name {name}" for name in sorted(wanted))
    find = rf"find . -name .git -prune -o -type f \( {either} \) -printf '%P\n'"
    listing = await box.run(Command(("sh", "-c", find), cwd=REPO, output_bytes=8 << 20))
    if not listing.ok or listing.stdout.truncated:
        raise InfraError(f"settings cannot be listed: {listing.stderr.text[-500:]}")
    paths = [p for p in listing.stdout.text.splitlines() if p.rpartition("/")[2] in wanted]
    if len(paths) > MAX_SETTINGS:
        raise InvalidArgument("spec.source", f"has {len(paths)} settings files", "leave some out")
    found: dict[str, str] = {}
    for path in sorted(paths):
        try:
            content = await box.read_file(f"{REPO}/{path}", 1 << 20)
        except (FailedPrecondition, NoSuchFile):  # too large, or a name that is no text
            content = b"\xff"
        name = path.rpartition("/")[2]
        found[path] = await asyncio.to_thread(pytest_settings, name, content)
    return found


async def _foreign_modules(
    box: Box, inputs: Inputs, project: str, files: Sequence[str]
) -> set[str]:
    """Names of the top-level modules of the interpreters and of the installed packages.

    Of packages whose name the repository has too, with these files, also what is inside and the
    repository has not.

    Raises:
        InfraError: the listing cannot be had.
    """
    found: set[str] = set()
    script, own = f"{TOOLS}/lib/list_modules.py", own_names(files)
    shared = json.dumps(sorted({name.partition(".")[0] for name in own if "." in name})).encode()
    for interpreter in inputs.interpreters.values():
        argv = (str(interpreter.executable), "-I", "-S", script, ENV, project)
        listing = Command(
            argv, env=_build_environment(), cwd="/work", stdin=shared, output_bytes=_LISTING_BYTES
        )
        done = await box.run(listing)
        if not done.ok or done.stdout.truncated:
            raise InfraError(f"modules cannot be listed: {done.stderr.text[-500:]}")
        found.update(json.loads(done.stdout.text))
    return {name for name in found if "." not in name or name not in own}


def _lay_out_tools(root: Path) -> Path:
    """uv and the scripts of `inbox` under a directory named by their content."""
    uv = Path(find_uv())
    scripts = sorted(INBOX.glob("*.py"))
    digest = hashlib.sha256(f"{uv}:{uv.stat().st_size}:{uv.stat().st_mtime_ns}".encode())
    for script in scripts:
        digest.update(script.read_bytes())
    final = root / digest.hexdigest()[:16]
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        (building / "bin").mkdir()
        (building / "lib").mkdir()
        shutil.copyfile(uv, building / "bin" / "uv")
        (building / "bin" / "uv").chmod(0o755)
        for script in scripts:
            shutil.copyfile(script, building / "lib" / script.name)
            (building / "lib" / script.name).chmod(0o644)
        launcher = f'#!/bin/sh\nexec {ENV}/bin/python -I {TOOLS}/lib/sync_env.py "$@"\n'
        (building / "bin" / "sync-env").write_text(launcher, "ascii")
        (building / "bin" / "sync-env").chmod(0o755)
        for folder in (building, building / "bin", building / "lib"):
            folder.chmod(0o755)
        os.rename(building, final)
    except OSError as error:
        if not final.is_dir():
            raise InfraError(f"tools cannot be laid out in {root}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final
