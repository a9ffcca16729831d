"""Engines that compute on this machine, each in a worker process of its own.

- The event loop never computes: a step may hold the interpreter lock for a second.
- A terminal's Ctrl-C reaches the service alone, which drains before it lets the worker end.
- A worker that dies fails what it ran (`Unavailable`, to be retried) and is started again with the
  weights that served last; a worker whose parent dies ends by itself.
- Tokens are recorded as they arrive, so an aborted request keeps what it had.
"""

import asyncio
import importlib.util
import json
import os
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from policy_svc import metrics
from policy_svc.chat import Tokenizer
from policy_svc.engines.base import (
    Apart,
    Check,
    Completion,
    EngineInfo,
    FinishReason,
    Generation,
    PauseMode,
    Request,
    TokenSink,
    spans,
)
from regreen.cpu import cpu_count
from regreen.rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from regreen.rpc.logging import get

_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """A local engine: `engine` is "openvino" or "torch"; weights default to the model's own."""

    engine: str
    model: Path
    weights: Path
    version: int = 0
    threads: int = 0
    kv_cache_gib: int = 1
    dtype: str = "auto"
    tokenizers: Path | None = None
    """Where OpenVINO's forms of tokenizers are kept: without, it follows no structure."""
    start_timeout_s: float = 300.0


@dataclass(slots=True)
class _Sample:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: str = ""


@dataclass(slots=True)
class _Call:
    request: Request
    samples: list[_Sample]
    done: "asyncio.Future[None]"
    sink: TokenSink | None
    cached: int = 0


def local_engines() -> list[str]:
    """Return the local engines whose packages are installed, best first."""
    packages = {"openvino": "openvino_genai", "torch": "torch"}
    return [name for name, package in packages.items() if importlib.util.find_spec(package)]


class ProcessEngine(Apart):
    """An `Engine` behind a worker process."""

    def __init__(self, options: LocalOptions, end_id: int) -> None:
        self._options = replace(options, threads=options.threads or cpu_count())
        self._end_id = end_id
        self._tokenizer = Tokenizer(options.model)
        self._version, self._weights = options.version, options.weights
        self._calls: dict[str, _Call] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None
        self._loading: asyncio.Future[dict[str, Any]] | None = None
        self._pausing: asyncio.Future[None] | None = None
        config = json.loads((options.model / "config.json").read_bytes())
        self._info = EngineInfo(
            name=options.engine,
            model=options.model.name,
            dtype=options.dtype,
            vocabulary=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            end_of_turn_id=end_id,
        )
        self._closed = False
        self._paused = False

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        return self._info

    @property
    def version(self) -> int:
        """Version of tokens sampled from now on."""
        return self._version

    async def start(self) -> None:
        """Start the worker and wait until it is ready."""
        await self._spawn()

    async def close(self) -> None:
        """End the worker."""
        self._closed = True
        if self._pump:
            self._pump.cancel()
            with suppress(asyncio.CancelledError):
                await self._pump
        await self._end_process()
        self._drop_all("the engine was closed")

    async def generate(self, request: Request, on_tokens: TokenSink | None = None) -> Generation:
        """Sample in the worker; cancelling the call aborts the request there."""
        if request.request_id in self._calls:
            raise AlreadyExists(f"request_id {request.request_id!r} is running")
        loop = asyncio.get_running_loop()
        call = _Call(
            request, [_Sample() for _ in range(request.n)], loop.create_future(), on_tokens
        )
        self._calls[request.request_id] = call
        try:
            sampling = asdict(request.sampling)
            await self._send(
                do="generate",
                request_id=request.request_id,
                prompt=request.prompt_token_ids,
                n=request.n,
                sampling=sampling,
            )
            await call.done
        except asyncio.CancelledError:
            with suppress(Unavailable):
                await self._send(do="abort", request_id=request.request_id)
            raise
        finally:
            self._calls.pop(request.request_id, None)
        completions = tuple(self._completion(sample) for sample in call.samples)
        return Generation(completions, call.cached)

    async def load(self, version: int, path: Path, checked: Check | None = None) -> float:
        """Prepare weights beside the running ones, then switch."""
        if self._loading:
            raise FailedPrecondition("another version is being loaded; retry when it is done")
        loading = asyncio.get_running_loop().create_future()
        self._loading = loading
        try:
            await self._send(do="load", version=version, path=str(path))
            identity: tuple[int, ...] = ()
            try:
                if checked:
                    identity = await checked
            except BaseException:
                with suppress(Unavailable):  # it has ended, and its load with it
                    await self._send(do="decide", version=version, use=False)
                    await loading
                raise
            await self._send(do="decide", version=version, use=True, identity=identity)
            answer = await loading
        finally:
            self._loading = None
        if answer["error"]:
            raise FailedPrecondition(f"weights were not loaded: {answer['error']}")
        self._version, self._weights = version, path
        return float(answer["pause_s"])

    def moved(self, path: Path) -> None:
        """Start the worker, should it die, with the weights at another place."""
        self._weights = path

    async def pause(self, mode: PauseMode) -> int:
        """Freeze running requests (in_place) or end them (abort); draining is the caller's."""
        running = len(self._calls)
        if mode is PauseMode.ABORT:
            await self.abort(None)
        elif mode is PauseMode.IN_PLACE:
            self._paused = True
            self._pausing = asyncio.get_running_loop().create_future()
            await self._send(do="pause")
            await self._pausing
        return running

    async def resume(self) -> None:
        """Step on."""
        self._paused = False
        await self._send(do="resume")

    async def abort(self, request_id: str | None) -> int:
        """End requests; each is answered with what it has."""
        chosen = [request_id] if request_id is not None else list(self._calls)
        ended = 0
        for one in chosen:
            if one in self._calls:
                await self._send(do="abort", request_id=one)
                ended += 1
        return ended

    def _completion(self, sample: _Sample) -> Completion:
        return Completion(
            tuple(sample.ids),
            tuple(sample.logprobs),
            spans(sample.versions),
            FinishReason(sample.reason),
            self._tokenizer.decode(sample.ids),
        )

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        options = {
            "engine": self._options.engine,
            "model": str(self._options.model),
            "weights": str(self._weights),
            "version": self._version,
            "threads": self._options.threads,
            "kv_cache_gib": self._options.kv_cache_gib,
            "dtype": self._options.dtype,
            "end_id": self._end_id,
            "tokenizers": str(self._options.tokenizers or ""),
        }
        arguments = ["--link", str(theirs.fileno()), "--options", json.dumps(options)]
        threads = str(self._options.threads)
        # Spinning at barriers costs 4-10x where cores are shared with other processes.
        waiting = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "policy_svc.engines.worker",
                *arguments,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env={**waiting, **os.environ, "PYTHONPATH": _python_path()},
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LINE_BYTES)
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                line = await _line(reader)
        except TimeoutError as error:
            await self._end_process()
            raise Unavailable("the engine did not become ready in time") from error
        ready: dict[str, Any] = (
            json.loads(line) if line else {"error": "its process ended while it started"}
        )
        if ready["error"]:
            await self._end_process()
            raise FailedPrecondition(f"engine {self._options.engine}: {ready['error']}")
        self._info = replace(self._info, dtype=ready["dtype"], structures=ready["structures"])
        self._pump = asyncio.create_task(self._read_events(reader), name="engine events")
        if self._paused:
            await self._send(do="pause")

    async def _end_process(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
        process, self._process = self._process, None
        if process is None:
            return
        try:
            async with asyncio.timeout(2.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        while line := await _line(reader):
            self._take(json.loads(line))
        get().error("engine process ended", engine=self._options.engine)
        metrics.ENGINE_DEATHS.inc()
        await self._end_process()
        self._drop_all("the engine's process ended")
        delay_s = 0.2
        while not self._closed:
            try:
                await self._spawn()
            except (FailedPrecondition, Unavailable) as error:
                get().error("engine does not start", error=str(error), retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 30.0)
            else:
                return

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "loaded":
            if self._loading and not self._loading.done():
                self._loading.set_result(event)
        elif kind == "paused":
            if self._pausing and not self._pausing.done():
                self._pausing.set_result(None)
        elif call := self._calls.get(event["request_id"]):
            self._take_of_call(call, event)

    def _take_of_call(self, call: _Call, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "cached":
            call.cached = event["tokens"]
        elif kind == "failed":
            if not call.done.done():
                problem = InvalidArgument(event["field"], event["message"], event["remedy"])
                call.done.set_exception(problem)
        elif kind == "tokens":
            sample = call.samples[event["sample"]]
            sample.ids += event["ids"]
            sample.logprobs += event["logprobs"]
            sample.versions += [event["version"]] * len(event["ids"])
            if call.sink:
                call.sink(event["sample"], event["ids"], event["logprobs"])
        elif kind == "done":
            call.samples[event["sample"]].reason = event["reason"]
            if all(s.reason for s in call.samples) and not call.done.done():
                call.done.set_result(None)

    async def _send(self, **command: Any) -> None:
        if self._writer is None:
            raise Unavailable("the engine is starting again", retry_after_s=1.0)
        try:
            self._writer.write(json.dumps(command).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise Unavailable("the engine is starting again", retry_after_s=1.0) from error

    def _drop_all(self, why: str) -> None:
        _fail = Unavailable(why, retry_after_s=1.0)
        waiting: list[asyncio.Future[Any] | None] = [call.done for call in self._calls.values()]
        for future in (*waiting, self._loading, self._pausing):
            if future and not future.done():
                future.set_exception(_fail)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Return the next line that a worker wrote whole, or nothing if it has ended."""
    try:
        line = await reader.readline()
    except ConnectionError:  # it died with a command unread
        return b""
    return line if line.endswith(b"\n") else b""


def _python_path() -> str:
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return f"{root}{os.pathsep}{inherited}" if inherited else root
