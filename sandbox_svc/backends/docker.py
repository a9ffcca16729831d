"""Sandboxes as containers of a Docker engine, through its SDK.

- The SDK blocks; every call runs in this runtime's own named threads.
- Containers have no network, no capabilities, no new privileges, and limits on memory, processes
  and cores; they carry this instance's label and are swept by it at start.
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from regreen.rpc.errors import FailedPrecondition, InfraError, MissingDependency
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
from sandbox_svc.backends.docker_box import DockerBox, layer_record, parse_listing
from sandbox_svc.backends.docker_exec import capture
from sandbox_svc.backends.docker_pool import ContainerPool, PoolSize, Recipe
from sandbox_svc.backends.embedded import DEFAULT_LIMITS
from sandbox_svc.backends.layers import is_full

_LABEL = "regreen.instance"
_REPOSITORY = "regreen-layer"
_BASE = "regreen-base"
_PREPARE = """
set -e
mkdir -p /work/repo /work/env /work/home /run/regreen /opt /srv /mnt
chmod 711 /run/regreen
grep -q ':1000:' /etc/passwd || echo 'regreen:x:1000:1000::/work/home:/bin/sh' >> /etc/passwd
grep -q ':1000:' /etc/group || echo 'regreen:x:1000:' >> /etc/group
chown 1000:1000 /work /work/* /opt /srv /mnt
"""
_P = ParamSpec("_P")
_T = TypeVar("_T")


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
    ) -> None:
        self._home, self._image, self._oci = home.absolute(), image, oci_runtime
        self._defaults, self._run_probes = defaults, run_probes
        self._instance = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:12]
        self._threads = ThreadPoolExecutor(64, thread_name_prefix="sandbox-docker")
        self._boxes: dict[str, DockerBox] = {}
        self._started: dict[str, tuple[tuple[Mount, ...], bool]] = {}
        self._capabilities: tuple[Capability, ...] = ()
        self._base = self._data = ""
        self.api: Any = None
        self.pool = ContainerPool(
            pool or PoolSize(), start=self._start_from, remove=self._remove, running=self._running
        )

    async def start(self) -> None:
        """Reach the engine, sweep what a crashed predecessor left, get ready.

        Raises:
            MissingDependency: no engine, or it lacks the image; the message names the remedy.
        """
        try:
            import docker.client
        except ImportError as error:
            raise MissingDependency(
                "the docker package is missing; install regreen[sandbox]"
            ) from (error)
        from docker.errors import DockerException

        (self._home / "docker-layers").mkdir(parents=True, exist_ok=True)
        try:
            client: Any = await self.blocking(docker.client.DockerClient.from_env, timeout=120)
            self.api = client.api
            self._data = (await self.blocking(self.api.info)).get("DockerRootDir", "")
        except DockerException as error:
            raise MissingDependency(
                f"no Docker engine answers ({error}); start one or set DOCKER_HOST, "
                "or use --backend embedded"
            ) from error
        await self.blocking(self._sweep)
        await self.blocking(self._prepare_base)
        if self._run_probes:
            self._capabilities = tuple(await self._prove())

    def _sweep(self) -> None:
        filters = {"label": f"{_LABEL}={self._instance}"}
        for container in self.api.containers(all=True, filters=filters):
            self._remove(container["Id"])
        for image in self.api.images(filters=filters):
            tags = [tag for tag in image["RepoTags"] or () if tag != "<none>:<none>"]
            for tag in tags or [image["Id"]]:  # untagged: dropped while a container stood on it
                layer = tag.removeprefix(f"{_REPOSITORY}:")
                if not tags or (layer != tag and self._record(layer) is None):
                    self._remove_image(tag)

    def _prepare_base(self) -> None:
        """Commit the base image once per source image: users and directories of a sandbox."""
        from docker.errors import ImageNotFound

        try:
            source = self.api.inspect_image(self._image)["Id"]
        except ImageNotFound as error:
            raise MissingDependency(
                f"the engine has no image {self._image}; docker pull it or set docker_image"
            ) from error
        tag = hashlib.sha256((source + _PREPARE).encode()).hexdigest()[:12]
        self._base = f"{_BASE}:{tag}"
        with contextlib.suppress(ImageNotFound):
            self.api.inspect_image(self._base)
            return
        container = self.api.create_container(
            self._image,
            ["/bin/sh", "-c", _PREPARE],
            user="0:0",
            entrypoint=[],
            labels={_LABEL: self._instance},
            host_config=self.api.create_host_config(network_mode="none"),
        )["Id"]
        try:
            self.api.start(container)
            code = self.api.wait(container)["StatusCode"]
            if code != 0:
                log = self.api.logs(container).decode("utf-8", "replace")[-500:]
                raise MissingDependency(f"image {self._image} cannot be prepared: {log}")
            self.api.commit(container, repository=_BASE, tag=tag)
        finally:
            self._remove(container)

    async def close(self) -> None:
        """Delete every box and stop the threads."""
        await asyncio.gather(*(box.delete() for box in list(self._boxes.values())))
        await self.pool.close()
        if self.api is not None:
            await self.blocking(self.api.close)
        self._threads.shutdown()

    async def create(
        self,
        layers: Sequence[str],
        *,
        limits: Limits,
        mounts: Sequence[Mount] = (),
        network: bool = False,
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
        box = DockerBox(self, layers, _complete(limits, self._defaults), env)
        self._boxes[box.id] = box
        self._started[box.id] = (tuple(mounts), network)
        try:
            await box.launch()
        except BaseException:
            await asyncio.shield(box.delete())
            raise
        return box

    async def start_container(self, box: DockerBox) -> str:
        """A running container over a box's layers, in which nothing ran yet; its id."""
        mounts, network = self._started[box.id]
        recipe = Recipe(tuple(box.layers), box.limits, mounts, network)
        fresh = len(box.layers) == box.below  # else it goes on after a freeze, alone on its layers
        if fresh and (waiting := await self.pool.take(recipe)):
            return waiting
        return await self.blocking(self._start_from, recipe)

    def _running(self, container: str) -> bool:
        from docker.errors import APIError

        try:
            return bool(self.api.inspect_container(container)["State"]["Running"])
        except APIError:
            return False

    def _start_from(self, recipe: Recipe) -> str:
        from docker.errors import APIError

        limits, mounts = recipe.limits, recipe.mounts
        host_config = self.api.create_host_config(
            network_mode="host" if recipe.network else "none",
            cap_drop=["ALL"],
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
            ulimits=[{"Name": "fsize", "Soft": limits.disk_bytes, "Hard": limits.disk_bytes}],
            log_config={"Type": "none"},
            runtime=self._oci or None,
        )
        try:
            container: str = self.api.create_container(
                self._image_of(recipe.layers),
                ["sleep", "infinity"],
                entrypoint=[],
                user="0:0",
                hostname="regreen",
                working_dir="/",
                labels={_LABEL: self._instance},
                host_config=host_config,
            )["Id"]
            self.api.start(container)
        except APIError as error:
            raise InfraError(f"the engine cannot start a container: {error}") from error
        return container

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
        return record

    async def commit(self, box: DockerBox) -> str:
        """Kill a box's processes and turn its changes into a layer."""
        return await self.blocking(self._commit, box)

    def _commit(self, box: DockerBox) -> str:
        from docker.errors import APIError

        layer = secrets.token_hex(6)
        try:
            with contextlib.suppress(APIError):
                self.api.kill(box.container)
            self.api.commit(box.container, repository=_REPOSITORY, tag=layer, pause=False)
            history = self.api.history(f"{_REPOSITORY}:{layer}")
        except APIError as error:
            raise InfraError(f"the engine cannot commit: {error}") from error
        path = self._home / "docker-layers" / layer
        draft = path.with_name(f".{layer}")
        draft.write_text(layer_record(box.layers, int(history[0]["Size"])), encoding="utf-8")
        draft.rename(path)
        return layer

    async def orphans(self) -> Mapping[str, frozenset[str]]:
        """Containers of this instance that belong to no live box."""
        found = await self.blocking(self._containers)
        return {"container": found - {box.container for box in self._boxes.values()}}

    def _containers(self) -> frozenset[str]:
        filters = {"label": f"{_LABEL}={self._instance}"}
        return frozenset(entry["Id"] for entry in self.api.containers(all=True, filters=filters))

    async def remove_container(self, container: str) -> None:
        """Kill and remove a container; absent ones are fine."""
        for box_id, box in list(self._boxes.items()):
            if box.container == container and box.deleted:
                del self._boxes[box_id], self._started[box_id]
        if container:
            await self.blocking(self._remove, container)

    def _remove(self, container: str) -> None:
        from docker.errors import APIError

        with contextlib.suppress(APIError):
            self.api.remove_container(container, force=True, v=True)

    async def listing(
        self, layers: Sequence[str], script: str, limit_bytes: int
    ) -> dict[str, bytes]:
        """What a listing script prints in an untouched container over `layers`."""
        box = await self.create(layers, limits=Limits())
        try:
            argv = ["/bin/sh", "-c", script]
            _, out, _ = await self.blocking(
                capture, self.api, box.container, argv, user="1000:1000", limit_bytes=limit_bytes
            )
            return parse_listing(out.head)
        finally:
            await box.delete()

    async def blocking(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Run a blocking call in the runtime's own threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*args, **kwargs))

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
        await self.blocking(self._remove_image, f"{_REPOSITORY}:{layer}")

    def _remove_image(self, name: str) -> None:
        from docker.errors import APIError

        with contextlib.suppress(APIError):
            self.api.remove_image(name, force=True)

    def capabilities(self) -> Sequence[Capability]:
        """What this host was proven to enforce."""
        return self._capabilities

    async def _prove(self) -> list[Capability]:
        limits = Limits(memory_bytes=64 << 20, pids=16, cpus=0.5)
        box = await self.create([], limits=limits)

        async def sh(script: str, timeout_s: float = 20.0) -> tuple[EndReason, str]:
            command = Command(("/bin/sh", "-c", script), cwd="/", timeout_s=timeout_s)
            result = await box.run(command)
            return result.reason, result.stdout.text

        try:
            _, memory = await sh("head -c 200000000 /dev/zero | tail -c 200000000 | wc -c")
            _, forks = await sh("for i in $(seq 40); do sleep 3 & done; echo all")
            _, status = await sh("grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status")
            _, devices = await sh("grep -c : /proc/net/dev")
            spin, _ = await sh("while :; do :; done", timeout_s=0.5)
        finally:
            await box.delete()
        return [
            Capability("memory", "200000000" not in memory, self.name),
            Capability("pids", "all" not in forks, self.name),
            Capability("wall_time", spin is EndReason.TIMEOUT, self.name),
            Capability("no_capabilities", "CapEff:\t0000000000000000" in status, self.name),
            Capability("no_new_privs", "NoNewPrivs:\t1" in status, self.name),
            Capability("syscall_filter", "Seccomp:\t2" in status, self.name),
            Capability("no_network", devices.strip() == "1", self.name),
            Capability("cpu", False, self.name, "set, not proven"),
            Capability("disk", False, self.name, "only the size of one file is bounded"),
        ]


def _complete(limits: Limits, default: Limits) -> Limits:
    return replace(
        limits,
        memory_bytes=limits.memory_bytes or default.memory_bytes,
        pids=limits.pids or default.pids,
        cpus=limits.cpus or default.cpus,
        disk_bytes=limits.disk_bytes or default.disk_bytes,
        wall_s=limits.wall_s or default.wall_s,
    )
