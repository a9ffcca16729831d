"""Runs `sandbox_svc` itself in one container of a Docker engine.

- The container is not privileged: an ordinary user, no capabilities, no new privileges, a read-only
  root, a syscall filter that allows namespaces and mounts, which without capabilities work only in
  user namespaces of its own.
- Its /proc is whole, because the kernel lets nobody mount a fresh one where parts of the outer one
  are hidden; what an ordinary user may do there is little, and sandboxes see one of their own.
- On a unix socket it has no network at all; given a TCP address of loopback, it is on a bridge, and
  sandboxes still have none.
- States and sandboxes lie in a directory of the host that outlives the container.
- One worker per home; what a killed predecessor left is removed at start, by label, and one that
  cannot be removed is an error: two services never share a home.
- A start that fails or is cut short leaves no container; an engine that hangs hangs nobody.
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
from regreen.rpc.ports import is_local
from regreen.settings import check_address
from sandbox_svc.backends.docker_engine import ContainerGone, Engine

_LABEL = "regreen.worker"
_USER = 10_001
_PROFILE = Path(__file__).resolve().parents[2] / "infra" / "docker" / "sandbox.seccomp.json"
_HOME, _RUN, _SOCKET = "/home/regreen/data", "/run/regreen", "sandbox.sock"
_PORT = 50052
_START_S = 60.0
_STOP_S = 15
_ANSWER_S = 60.0
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
        self._engine: Engine | None = None
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
        engine = self._engine = Engine(answer_s=_ANSWER_S)
        try:
            info = await engine.connect()
            await self._sweep(engine)
            for part in ("data", "run"):
                path = self._home / part
                path.mkdir(parents=True, exist_ok=True)
                if os.geteuid() == 0:
                    os.chown(path, *self._user)
            (self._home / "run" / _SOCKET).unlink(missing_ok=True)
            await self._start(engine, info)
            await self._wait()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.close()))
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _sweep(self, engine: Engine) -> None:
        filters = {"label": f"{_LABEL}={self._name}"}
        for found in await engine.blocking(engine.api.containers, all=True, filters=filters):
            await engine.remove(found["Id"])

    async def _start(self, engine: Engine, info: dict[str, Any]) -> None:
        options = self._options
        ports: dict[int, tuple[str, int | None]] = {}
        serve = [f"--listen=unix:{_RUN}/{_SOCKET}"]
        if options.listen:
            host, _, port = options.listen.rpartition(":")
            ports = {_PORT: (host, int(port) or None)}
            serve = [f"--listen=0.0.0.0:{_PORT}", "--insecure"]
        try:
            self._container = await engine.create(
                f"regreen-worker-{self._name}",
                image=options.image,
                command=[
                    *("python3", "-m", "sandbox_svc", "--backend=embedded", f"--home={_HOME}"),
                    *("--metrics=127.0.0.1:9052", *serve, *options.arguments),
                ],
                user=f"{self._user[0]}:{self._user[1]}",
                labels={_LABEL: self._name},
                environment={"HOME": "/home/regreen"},
                ports=list(ports),
                host_config=self._host_config(engine, info, ports),
            )
        except ContainerGone as error:
            raise MissingDependency(
                f"the engine has no image {options.image}; build it from "
                f"infra/docker/sandbox.Dockerfile ({error})"
            ) from error
        if options.listen:
            (bound,) = await engine.blocking(engine.api.port, self._container, _PORT)
            self.address = f"{bound['HostIp']}:{bound['HostPort']}"

    def _host_config(
        self, engine: Engine, info: dict[str, Any], ports: dict[int, tuple[str, int | None]]
    ) -> Any:
        options = self._options
        try:
            profile = options.seccomp.read_text(encoding="ascii")
        except OSError as error:
            raise MissingDependency(
                f"seccomp: {options.seccomp} cannot be read ({error.strerror}); give the profile "
                "of infra/docker"
            ) from error
        cores = float(info.get("NCPU") or 1)
        security = ["no-new-privileges", f"seccomp={profile}"]
        if any("apparmor" in o for o in info.get("SecurityOptions") or ()):
            security.append("apparmor=unconfined")  # the engine's own profile forbids mount
        config = engine.api.create_host_config(
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
        """Whether the container still runs.

        Raises:
            InfraError: the engine does not answer.
        """
        engine = self._engine
        return engine is not None and bool((await engine.state(self._container)).get("Running"))

    async def log(self) -> str:
        """The end of what the service said."""
        engine = self._engine
        if engine is None:
            return ""
        try:
            text = await engine.blocking(engine.api.logs, self._container, tail=20)
        except InfraError as error:
            return str(error)
        return bytes(text).decode("utf-8", "replace").strip()[-2000:]

    async def close(self) -> None:
        """End the service, let it finish, remove the container; states stay."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        if self._container:
            with contextlib.suppress(InfraError):
                await engine.blocking(engine.api.stop, self._container, timeout=_STOP_S)
            await engine.discard(self._container)
        await engine.close()


async def _serves(stub: Any) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
