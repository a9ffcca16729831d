"""Sandboxes as containers of a Docker engine, through its SDK.

- Containers have no network, no new privileges, and limits on memory, processes and cores; their
  commands have no capabilities. They carry this instance's label and are swept by it at start.
- A container is a live box's, waits in the pool, or is being removed; any other is a leak.
- A layer is an image tag; the image holds everything below it, and its record names what that is.
  An image of this instance without a record was cut short, and is removed at start.
- Disk use is not enforced here, and `capabilities` says so; only one file is bounded.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from regreen.rpc.errors import FailedPrecondition, InfraError, MissingDependency, Unavailable
from sandbox_svc.backends.base import (
    HOST_BASE,
    NO_ENV,
    Capability,
    Command,
    Door,
    EndReason,
    Limits,
    Mount,
)
from sandbox_svc.backends.docker_box import DockerBox, layer_record
from sandbox_svc.backends.docker_engine import ContainerGone, Engine
from sandbox_svc.backends.docker_marks import COUNT, PREPARE
from sandbox_svc.backends.docker_pool import ContainerPool, PoolSize, Recipe
from sandbox_svc.backends.embedded import DEFAULT_LIMITS
from sandbox_svc.backends.layers import is_full
from sandbox_svc.backends.probe import MEMFD

_LABEL = "regreen.instance"
_IDENTITY = "docker-instance"
_REPOSITORY = "regreen-layer"
_BASE = "regreen-base"
_DEEPEST = 120
"""Layers of an image; the engine's overlay driver takes no more than some more."""
_PREPARE_S = 120
_END_S = 30
_PREPARE = f"""
set -e
mkdir -p /work/repo /work/env /work/home /run/regreen /opt /srv /mnt
chmod 711 /run/regreen
grep -q ':1000:' /etc/passwd || echo 'regreen:x:1000:1000::/work/home:/bin/sh' >> /etc/passwd
grep -q ':1000:' /etc/group || echo 'regreen:x:1000:' >> /etc/group
chown 1000:1000 /work /work/* /opt /srv /mnt
{PREPARE}
"""


class DockerRuntime:
    """See `backends.base.Runtime`."""

    name = "docker"

    def __init__(
        self,
        home: Path,
        *,
        image: str = "python:3.11-slim",
        oci_runtime: str = "",
        defaults: Limits = DEFAULT_LIMITS,
        run_probes: bool = True,
        pool: PoolSize | None = None,
        answer_s: float = 60.0,
    ) -> None:
        self._home, self._image, self._oci = home.absolute(), image, oci_runtime
        self._defaults, self._run_probes = defaults, run_probes
        self._instance = _instance_of(self._home)
        self._boxes: dict[str, DockerBox] = {}
        self._started: dict[str, tuple[Mount, ...]] = {}
        self._capabilities: tuple[Capability, ...] = ()
        self._base = self._data = ""
        self._closing = False
        self.engine = Engine(answer_s=answer_s)
        self.pool = ContainerPool(
            pool or PoolSize(),
            start=self._start_from,
            discard=lambda container: self.engine.task(self.engine.discard(container)),
            running=self._is_running,
        )

    @property
    def api(self) -> Any:
        """The engine's client."""
        return self.engine.api

    async def start(self) -> None:
        """Reach the engine, sweep what a crashed predecessor left, get ready.

        Raises:
            MissingDependency: no engine, or it lacks the image or the OCI runtime; the message
                names the remedy.
        """
        _keep_identity(self._home, self._instance)  # first: layers without one are of old homes
        (self._home / "docker-layers").mkdir(exist_ok=True)
        try:
            info = await self.engine.connect()
            self._data = info.get("DockerRootDir", "")
            known = info.get("Runtimes") or {}
            if self._oci and known and self._oci not in known and not self._oci.startswith("io."):
                raise MissingDependency(
                    f"docker_runtime: the engine has no OCI runtime {self._oci!r}; it has "
                    f"{', '.join(sorted(known))}: add it to the engine's daemon.json"
                )
            await self._sweep()
            await self._prepare_base()
            if self._run_probes:
                self._capabilities = tuple(await self._prove())
        except BaseException:
            await self.engine.close()
            raise

    async def _sweep(self) -> None:
        for container in await self._containers():
            await self.engine.discard(container)
        for layer in await self.layers():
            if self._record(layer) is None:  # commands could not run there
                (self._home / "docker-layers" / layer).unlink()
        filters = {"label": f"{_LABEL}={self._instance}"}
        for image in await self.engine.blocking(self.api.images, filters=filters):
            tags = [tag for tag in image["RepoTags"] or () if tag != "<none>:<none>"]
            for tag in tags or [image["Id"]]:  # untagged: dropped while a container stood on it
                layer = tag.removeprefix(f"{_REPOSITORY}:")
                if not tags or (layer != tag and self._record(layer) is None):
                    await self._remove_image(tag)

    async def _prepare_base(self) -> None:
        """Commit the base image once per source image: users and directories of a sandbox."""
        try:
            source = (await self.engine.blocking(self.api.inspect_image, self._image))["Id"]
        except ContainerGone as error:
            raise MissingDependency(
                f"the engine has no image {self._image}; docker pull it or set docker_image"
            ) from error
        tag = hashlib.sha256((source + _PREPARE).encode()).hexdigest()[:12]
        self._base = f"{_BASE}:{tag}"
        with contextlib.suppress(ContainerGone):
            await self.engine.blocking(self.api.inspect_image, self._base)
            return
        container = await self.engine.create(
            f"regreen-{self._instance}",
            image=self._image,
            command=["/bin/sh", "-c", _PREPARE],
            user="0:0",
            entrypoint=[],
            labels={_LABEL: self._instance},
            host_config=self.api.create_host_config(network_mode="none"),
        )
        try:
            ended = await self.engine.blocking(self.api.wait, container, timeout=_PREPARE_S)
            if ended["StatusCode"] != 0:
                log = await self.engine.blocking(self.api.logs, container)
                told = log.decode("utf-8", "replace")[-500:]
                raise MissingDependency(f"image {self._image} cannot be prepared: {told}")
            commit = self.engine.patient.commit
            await self.engine.blocking(commit, container, repository=_BASE, tag=tag)
        finally:
            await self.engine.discard(container)

    async def close(self) -> None:
        """Delete every box and let go of the engine; bounded in time, whatever the engine does.

        Safe to call twice.
        """
        if self._closing:
            return
        self._closing = True
        await asyncio.gather(
            *(box.delete() for box in list(self._boxes.values())), return_exceptions=True
        )
        await self.pool.close()
        await self.engine.close()

    async def create(
        self,
        layers: Sequence[str],
        *,
        limits: Limits,
        mounts: Sequence[Mount] = (),
        env: Mapping[str, str] = NO_ENV,
        door: Door | None = None,
        base: str = HOST_BASE,
    ) -> DockerBox:
        """Start a box over `layers` (lowest first); an empty sequence is the bare base."""
        if door is not None:
            raise FailedPrecondition(
                "egress: sandboxes of the docker backend have no network at all; "
                "use --backend embedded"
            )
        if base != HOST_BASE:
            raise FailedPrecondition(
                "the docker backend has no imported images; use the embedded backend"
            )
        for mount in mounts:
            if not mount.source.exists():
                raise MissingDependency(f"mount source does not exist: {mount.source}")
        if self._closing:
            raise Unavailable("the service is stopping")
        box = DockerBox(self, layers, _complete(limits, self._defaults), env)
        self._boxes[box.id] = box
        self._started[box.id] = tuple(mounts)
        try:
            await box.launch()
        except BaseException:
            with contextlib.suppress(InfraError):  # the engine goes on trying
                await box.delete()
            raise
        return box

    async def start_container(self, box: DockerBox) -> str:
        """A running container over a box's layers, in which nothing ran yet; its id."""
        recipe = Recipe(tuple(box.layers), box.limits, self._started[box.id])
        fresh = len(box.layers) == box.below  # else it goes on after a freeze, alone on its layers
        if fresh and (waiting := await self.pool.take(recipe)):
            return waiting
        return await self._start_from(recipe)

    async def _is_running(self, container: str) -> bool:
        return bool((await self.engine.state(container)).get("Running"))

    async def _start_from(self, recipe: Recipe) -> str:
        limits, mounts = recipe.limits, recipe.mounts
        host_config = self.api.create_host_config(
            network_mode="none",
            cap_drop=["ALL"],
            cap_add=["KILL"],  # of root, who ends commands; these get none
            security_opt=["no-new-privileges"],
            pids_limit=limits.pids + 2,
            mem_limit=limits.memory_bytes,
            memswap_limit=limits.memory_bytes,
            nano_cpus=int(limits.cpus * 1e9),
            ipc_mode="private",
            shm_size=limits.memory_bytes // 4,
            init=True,
            tmpfs={"/tmp": f"mode=1777,size={limits.memory_bytes // 2}"},
            binds=[f"{m.source}:{m.target}:{'ro' if m.read_only else 'rw'}" for m in mounts],
            ulimits=[
                {"Name": "fsize", "Soft": limits.disk_bytes, "Hard": limits.disk_bytes},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ],
            log_config={"Type": "none"},
            runtime=self._oci or None,
        )
        return await self.engine.create(
            f"regreen-{self._instance}",
            image=self._image_of(recipe.layers),
            command=["sleep", "infinity"],
            entrypoint=[],
            user="0:0",
            hostname="regreen",
            working_dir="/",
            labels={_LABEL: self._instance},
            host_config=host_config,
        )

    def _image_of(self, layers: Sequence[str]) -> str:
        if not layers:
            return self._base
        record = self._record(layers[-1])
        if record is None or record["below"] != list(layers[:-1]):
            raise FailedPrecondition(
                f"layer {layers[-1]} is not on this host; prepare its state again",
                metadata={"layer": layers[-1]},
            )
        return f"{_REPOSITORY}:{layers[-1]}"

    def _record(self, layer: str) -> dict[str, Any] | None:
        try:
            text = (self._home / "docker-layers" / layer).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        record: dict[str, Any] = json.loads(text)
        return record if record.get("names") == COUNT else None

    def check_depth(self, box: DockerBox) -> None:
        """Refuse one snapshot more where the engine takes none.

        Raises:
            FailedPrecondition: there are too many layers below the box.
        """
        if len(box.layers) >= _DEEPEST:
            raise FailedPrecondition(
                f"{len(box.layers)} snapshots above one another are as many as the engine takes; "
                "prepare a state of what the sandbox holds"
            )

    async def commit(self, box: DockerBox) -> str:
        """Kill a box's processes and turn its changes into a layer."""
        return await self.engine.blocking(self._commit, box)

    def _commit(self, box: DockerBox) -> str:
        from docker.errors import APIError

        layer = secrets.token_hex(6)
        with contextlib.suppress(APIError):  # it has ended; `wait` knows
            self.api.kill(box.container)
        self.api.wait(box.container, timeout=_END_S)
        self.engine.patient.commit(box.container, repository=_REPOSITORY, tag=layer, pause=False)
        history = self.api.history(f"{_REPOSITORY}:{layer}")
        path = self._home / "docker-layers" / layer
        draft = path.with_name(f".{layer}")
        draft.write_text(layer_record(box.layers, int(history[0]["Size"])), encoding="utf-8")
        draft.rename(path)
        return layer

    async def orphans(self) -> Mapping[str, frozenset[str]]:
        """Containers of this instance that belong to no live box."""
        found = frozenset(await self._containers())
        own = {box.container for box in self._boxes.values()} | self.pool.containers
        return {"container": found - own}

    async def _containers(self) -> Sequence[str]:
        filters = {"label": f"{_LABEL}={self._instance}"}
        found = await self.engine.blocking(self.api.containers, all=True, filters=filters)
        return [entry["Id"] for entry in found]

    async def forget(self, box: DockerBox) -> None:
        """Kill and remove the container of a box that is deleted.

        Raises:
            InfraError: it is still there; asked again, it is tried again.
        """
        if box.container:
            await self.engine.remove(box.container)
        self._boxes.pop(box.id, None)
        self._started.pop(box.id, None)

    async def layers(self) -> Sequence[str]:
        """Ids of all layers that this host holds."""
        names = os.listdir(self._home / "docker-layers")
        return sorted(name for name in names if not name.startswith("."))

    async def layer_size(self, layer: str) -> int:
        """Bytes of one layer."""
        record = self._record(layer)
        return int(record["size_bytes"]) if record else 0

    async def make_durable(self) -> None:
        """Nothing to do: the engine writes a commit before it answers."""

    def disk_is_full(self) -> bool:
        """Whether the engine's disk is full, where this host can see it."""
        return bool(self._data) and os.path.isdir(self._data) and is_full(Path(self._data))

    async def drop_layer(self, layer: str) -> None:
        """Remove a layer that no state uses; unknown ids are ignored."""
        if self._record(layer) is None:
            return
        (self._home / "docker-layers" / layer).unlink(missing_ok=True)
        await self.pool.drop_layer(layer)
        await self._remove_image(f"{_REPOSITORY}:{layer}")

    async def _remove_image(self, name: str) -> None:
        with contextlib.suppress(InfraError):  # without a record, the next start tries again
            await self.engine.blocking(self.api.remove_image, name, force=True)

    def capabilities(self) -> Sequence[Capability]:
        """What this host was proven to enforce."""
        return self._capabilities

    def unkept(self) -> Mapping[str, str]:
        """Names of `Limits` that nothing here keeps, each with what the operator can do."""
        return dict.fromkeys(("disk_bytes", "inodes"), "use --backend embedded")

    def identity(self) -> str:
        """The prepared image, by its source's digest, and the OCI runtime that starts it."""
        return f"{self.name} {self._base} {self._oci}"

    async def _prove(self) -> list[Capability]:
        limits = Limits(memory_bytes=64 << 20, pids=16, cpus=0.5, output_bytes=1 << 20)
        box = await self.create([], limits=limits)

        async def sh(script: str, timeout_s: float = 20.0) -> tuple[EndReason, str]:
            command = Command(("/bin/sh", "-c", script), cwd="/", timeout_s=timeout_s)
            result = await box.run(command)
            return result.reason, result.stdout.text

        try:
            _, status = await sh("grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status")
            _, devices = await sh("grep -c : /proc/net/dev")
            _, memory = await sh("head -c 200000000 /dev/zero | tail -c 200000000 | wc -c")
            program = f"command -v python3 > /dev/null && exec python3 -ISc {quote(MEMFD)}"
            memfd, said = await sh(f"{program} || echo , the image has no python3")
            flood, _ = await sh("head -c 4000000 /dev/zero; sleep 2")
            hidden = "env -i setsid sleep 301 & sleep 0.2; echo; while :; do :; done"
            spin, _ = await sh(hidden, timeout_s=1.0)
            _, left = await sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            ended = "sleep infinity" in left and "sleep 301" not in left
            _, forks = await sh("for i in $(seq 40); do sleep 3 & done; echo all")  # fills it
        finally:
            await box.delete()
        return [
            Capability("memory", "200000000" not in memory, self.name),
            Capability("pids", "all" not in forks, self.name),
            Capability("wall_time", spin is EndReason.TIMEOUT and ended, self.name),
            Capability("no_capabilities", "CapEff:\t0000000000000000" in status, self.name),
            Capability("no_new_privs", "NoNewPrivs:\t1" in status, self.name),
            Capability("syscall_filter", "Seccomp:\t2" in status, self.name),
            Capability("no_network", devices.strip() == "1", self.name),
            Capability("output", flood is EndReason.OUTPUT, "service"),
            Capability("memfd", memfd is EndReason.OOM, self.name, f"at the limit: {memfd}{said}"),
            Capability("cpu", False, self.name, "set, not proven"),
            Capability("disk", False, self.name, "only the size of one file is bounded"),
            Capability("inodes", False, self.name, "not bounded"),
            Capability("inotify", False, self.name, "containers share those of one host user"),
        ]


def _instance_of(home: Path) -> str:
    """What the containers of a home are told by: services in containers may have equal paths."""
    kept = _kept_identity(home)
    if kept is None and (home / "docker-layers").is_dir():  # a version that took the path for it
        return hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    return kept or secrets.token_hex(6)


def _kept_identity(home: Path) -> str | None:
    """What a home holds: empty where an older version was cut short in writing it."""
    with contextlib.suppress(FileNotFoundError):
        return (home / _IDENTITY).read_text(encoding="ascii").strip()
    return None


def _keep_identity(home: Path, instance: str) -> None:
    """Write it once and as a whole: a home that loses it loses track of its containers."""
    if _kept_identity(home):
        return
    home.mkdir(parents=True, exist_ok=True)
    draft = home / f".{_IDENTITY}"
    with draft.open("w", encoding="ascii") as target:
        target.write(instance)
        target.flush()
        os.fsync(target.fileno())
    draft.rename(home / _IDENTITY)


def _complete(limits: Limits, default: Limits) -> Limits:
    return replace(
        limits,
        memory_bytes=limits.memory_bytes or default.memory_bytes,
        pids=limits.pids or default.pids,
        cpus=limits.cpus or default.cpus,
        disk_bytes=limits.disk_bytes or default.disk_bytes,
        output_bytes=limits.output_bytes or default.output_bytes,
        wall_s=limits.wall_s or default.wall_s,
    )
