"""Runs `sandbox_svc` itself in one container of a Docker engine.

- The container is not privileged: an ordinary user, no capabilities, no new privileges, a read-only
  root, a syscall filter that allows namespaces and mounts, which without capabilities work only in
  user namespaces of its own.
- Its /proc is whole, because the kernel lets nobody mount a fresh one where parts of the outer one
  are hidden; what an ordinary user may do there is little, and sandboxes see one of their own.
- On a unix socket it has no network at all; given a TCP address of loopback, it is on a bridge, and
  sandboxes still have none.
- States and sandboxes lie in a directory of the host that outlives the container.
- One worker per home; what a killed predecessor left is removed at start, by label.
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from regreen.rpc.errors import InfraError, InvalidArgument, MissingDependency
from regreen.settings import check_address, is_local

_LABEL = "regreen.worker"
_USER = 10_001
_PROFILE = Path(__file__).resolve().parents[2] / "infra" / "docker" / "sandbox.seccomp.json"
_HOME, _RUN, _SOCKET = "/home/regreen/data", "/run/regreen", "sandbox.sock"
_PORT = 50052
_START_S = 60.0
_STOP_S = 15
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker's container is made from."""

    image: str
    home: Path
    """Directory of the host for states, sandboxes and the socket."""
    listen: str = ""
    """`host:port` of loopback; empty is a unix socket below `home`."""
    memory_bytes: int = 16 << 30
    cpus: float = 0.0
    """Cores; 0, or more than the engine has, is all of them."""
    pids: int = 16_384
    oci_runtime: str = ""
    """OCI runtime of the engine, for example `runsc`; empty is its default."""
    seccomp: Path = _PROFILE
    arguments: Sequence[str] = ()
    """Further flags of `sandbox_svc`."""


class DockerWorker:
    """The container of one worker; use as an async context manager."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._home = options.home.absolute()
        self._name = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:12]
        self._container = ""
        self._api: Any = None
        root = os.geteuid() == 0
        self._user = (_USER, _USER) if root else (os.getuid(), os.getgid())
        self.address = options.listen or f"unix:{self._home}/run/{_SOCKET}"
        check_address("listen", self.address, unix=True)
        if not is_local(self.address):
            raise InvalidArgument(
                "listen", f"{self.address} is not of loopback", "give 127.0.0.1:PORT or nothing"
            )

    async def __aenter__(self) -> Self:
        """Start the container and wait until it serves.

        Raises:
            MissingDependency: no engine, no image, no profile, or sandboxes do not work inside.
        """
        self._connect()
        for part in ("data", "run"):
            path = self._home / part
            path.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(path, *self._user)
        (self._home / "run" / _SOCKET).unlink(missing_ok=True)
        await asyncio.to_thread(self._sweep)
        try:
            await asyncio.to_thread(self._start)
            await self._wait()
        except BaseException:
            await asyncio.shield(self.close())
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _connect(self) -> None:
        try:
            import docker.client
            from docker.errors import DockerException
        except ImportError as error:
            raise MissingDependency(
                "the docker package is missing; install regreen[sandbox]"
            ) from error
        try:
            connect: Any = docker.client.DockerClient.from_env
            self._api = connect(timeout=120).api
            self._api.ping()
        except DockerException as error:
            raise MissingDependency(
                f"no Docker engine answers ({error}); start one or set DOCKER_HOST"
            ) from error

    def _sweep(self) -> None:
        for found in self._api.containers(all=True, filters={"label": f"{_LABEL}={self._name}"}):
            self._remove(found["Id"])

    def _start(self) -> None:
        from docker.errors import APIError, ImageNotFound

        options = self._options
        ports: dict[int, tuple[str, int | None]] = {}
        serve = [f"--listen=unix:{_RUN}/{_SOCKET}"]
        if options.listen:
            host, _, port = options.listen.rpartition(":")
            ports = {_PORT: (host, int(port) or None)}
            serve = [f"--listen=0.0.0.0:{_PORT}", "--insecure"]
        try:
            self._container = self._api.create_container(
                options.image,
                [
                    *("python3", "-m", "sandbox_svc", "--backend=embedded", f"--home={_HOME}"),
                    *("--metrics=127.0.0.1:9052", *serve, *options.arguments),
                ],
                user=f"{self._user[0]}:{self._user[1]}",
                labels={_LABEL: self._name},
                environment={"HOME": "/home/regreen"},
                ports=list(ports),
                host_config=self._host_config(ports),
            )["Id"]
            self._api.start(self._container)
            if options.listen:
                (bound,) = self._api.port(self._container, _PORT)
                self.address = f"{bound['HostIp']}:{bound['HostPort']}"
        except ImageNotFound as error:
            raise MissingDependency(
                f"the engine has no image {options.image}; build it from "
                "infra/docker/sandbox.Dockerfile"
            ) from error
        except APIError as error:
            raise InfraError(f"the engine cannot start the worker: {error}") from error

    def _host_config(self, ports: dict[int, tuple[str, int | None]]) -> Any:
        options = self._options
        try:
            profile = options.seccomp.read_text(encoding="ascii")
        except OSError as error:
            raise MissingDependency(
                f"seccomp: {options.seccomp} cannot be read ({error.strerror}); give the profile "
                "of infra/docker"
            ) from error
        engine = self._api.info()
        cores = float(engine.get("NCPU") or 1)
        security = ["no-new-privileges", f"seccomp={profile}"]
        if any("apparmor" in o for o in engine.get("SecurityOptions") or ()):
            security.append("apparmor=unconfined")  # the engine's own profile forbids mount
        config = self._api.create_host_config(
            network_mode="bridge" if ports else "none",
            port_bindings=ports,
            cap_drop=["ALL"],
            security_opt=security,
            read_only=True,
            tmpfs={"/tmp": "mode=1777,size=1g"},
            binds=[f"{self._home}/data:{_HOME}:rw", f"{self._home}/run:{_RUN}:rw"],
            mem_limit=options.memory_bytes,
            memswap_limit=options.memory_bytes,
            nano_cpus=int(min(options.cpus or cores, cores) * 1e9),
            pids_limit=options.pids,
            ipc_mode="private",
            init=True,
            runtime=options.oci_runtime or None,
        )
        config["MaskedPaths"], config["ReadonlyPaths"] = [], []
        return config

    async def _wait(self) -> None:
        """Until the service inside serves.

        Raises:
            MissingDependency: it ended; the message is its own.
        """
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_START_S):
                    while not await _serves(stub):
                        if not await self.running():
                            raise MissingDependency(f"the worker ended: {await self.log()}")
                        await asyncio.sleep(_LOOK_S)
                    return
        raise InfraError(f"the worker does not serve: {await self.log()}")

    async def running(self) -> bool:
        """Whether the container still runs."""
        state = (await asyncio.to_thread(self._api.inspect_container, self._container))["State"]
        return bool(state["Running"])

    async def wait(self) -> int:
        """Wait until the container ends; its exit code."""
        ended = await asyncio.to_thread(self._api.wait, self._container, timeout=None)
        return int(ended["StatusCode"])

    async def log(self) -> str:
        """The end of what the service said."""
        text = await asyncio.to_thread(self._api.logs, self._container, tail=20)
        return bytes(text).decode("utf-8", "replace").strip()[-2000:]

    async def close(self) -> None:
        """End the service, let it finish, remove the container; states stay."""
        if self._api is None:
            return
        if self._container:
            await asyncio.to_thread(self._end)
        await asyncio.to_thread(self._api.close)
        self._api = None

    def _end(self) -> None:
        from docker.errors import APIError

        with contextlib.suppress(APIError):
            self._api.stop(self._container, timeout=_STOP_S)
        self._remove(self._container)

    def _remove(self, container: str) -> None:
        from docker.errors import APIError

        with contextlib.suppress(APIError):
            self._api.remove_container(container, force=True, v=True)


async def _serves(stub: Any) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
