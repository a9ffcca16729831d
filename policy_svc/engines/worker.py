"""The worker process: drives one stepper and talks JSON lines over an inherited socket.

- One thread steps and answers; only the reading of new weights runs beside it. They serve once they
  are read and the service has decided so: it may find meanwhile that they are not what it wanted.
- What samples have to be is tried on a thread of its own; others are sampled meanwhile.
- The process ends when its parent does: end of file on the socket is the end of work.
- Standard output is never used, so that nothing a library prints can be taken for an answer.

Commands: generate, abort, load, decide, pause, resume. Events: ready, tokens, done, failed, loaded,
paused.
"""

import argparse
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy_svc.chat import Tokenizer
from policy_svc.engines.base import Request, Sampling
from policy_svc.engines.stepper import REFUSED, Chunk, Stepper, StructureError, WeightsError
from policy_svc.engines.weights import identity_of

_TAIL_TOKENS = 48
"""Tokens decoded to look for a stop text; longer stop texts are found by their length."""


@dataclass(slots=True)
class _Job:
    request: Request
    ids: list[list[int]] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Load:
    version: int
    thread: threading.Thread
    prepared: object = None
    error: str = "their preparation failed; the engine's log says more"
    """Nothing once they are prepared, whatever else may end it."""
    identity: tuple[int, ...] = ()
    """Of the files, while they were read."""
    wanted: tuple[int, ...] = ()
    """Of those that the service has hashed, if it did."""
    use: bool | None = None
    """What the service decided; it has not yet: None."""


class Worker:
    """Answers commands; `send` takes one event."""

    def __init__(
        self, stepper: Stepper, tokenizer: Tokenizer, send: Callable[[dict[str, Any]], None]
    ) -> None:
        self._stepper, self._tokenizer, self._send = stepper, tokenizer, send
        self._jobs: dict[str, _Job] = {}
        self._checks: dict[str, tuple[Request, Future[None]]] = {}
        self._checker = ThreadPoolExecutor(1, "structures")
        self._load: _Load | None = None
        self._paused = False

    def idle(self) -> bool:
        """Whether there is nothing to do until a command comes."""
        load = self._load
        if self._checks or (load and (load.thread.is_alive() or load.use is not None)):
            return False
        return self._paused or not self._stepper.busy()

    def handle(self, command: dict[str, Any]) -> None:
        """Act on one command."""
        match command["do"]:
            case "generate":
                self._generate(command)
            case "abort":
                self._abort(command["request_id"])
            case "load":
                self._begin_load(command["version"], Path(command["path"]))
            case "decide":
                if self._load and self._load.version == command["version"]:
                    self._load.use = command["use"]
                    self._load.wanted = tuple(command.get("identity", ()))
            case "pause":
                self._paused = True
                self._send({"event": "paused"})
            case "resume":
                self._paused = False

    def work(self) -> None:
        """Finish a load that is ready, then step once."""
        self._finish_load()
        self._finish_checks()
        if self._paused or not self._stepper.busy():
            if self._checks:
                wait([check for _, check in self._checks.values()], 0.02, FIRST_COMPLETED)
            if self._load:
                self._load.thread.join(0.02)
            return
        for chunk in self._stepper.step():
            self._take(chunk)

    def _generate(self, command: dict[str, Any]) -> None:
        sampling = command["sampling"]
        sampling["stop"] = tuple(sampling["stop"])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        request = Request(
            command["request_id"], tuple(command["prompt"]), command["n"], Sampling(**sampling)
        )
        if request.sampling.structure:
            check = self._checker.submit(self._stepper.check, request)
            self._checks[request.request_id] = request, check
            return
        self._add(request)

    def _finish_checks(self) -> None:
        """Take the requests whose structures were tried."""
        for request, check in list(self._checks.values()):
            if not check.done():
                continue
            del self._checks[request.request_id]
            error = check.exception()
            if error:
                self._refuse(request, error)
            else:
                self._add(request)

    def _refuse(self, request: Request, error: BaseException) -> None:
        structure = request.sampling.structure
        field = structure.field if structure else "sampling"
        problem = f"cannot be followed: {error}"
        self._fail(request.request_id, problem, field, "write it in other words")

    def _add(self, request: Request) -> None:
        try:
            cached = self._stepper.add(request)
        except StructureError as error:
            self._refuse(request, error)
            return
        except (RuntimeError, ValueError) as error:
            self._fail(request.request_id, f"{type(error).__name__}: {error}")
            return
        self._jobs[request.request_id] = _Job(request, [[] for _ in range(request.n)])
        self._send({"event": "cached", "request_id": request.request_id, "tokens": cached})

    def _abort(self, request_id: str) -> None:
        if request_id in self._checks:
            request, check = self._checks.pop(request_id)
            check.cancel()
            untouched = self._jobs[request_id] = _Job(request, [[] for _ in range(request.n)])
            for sample in range(request.n):
                self._end(untouched, sample, "abort")
            return
        job = self._jobs.get(request_id)
        if job is None:
            return
        for chunk in self._stepper.cancel(request_id):
            self._take(chunk)
        for sample in range(job.request.n):
            if request_id in self._jobs and sample not in job.finished:
                self._end(job, sample, "abort")

    def _take(self, chunk: Chunk) -> None:
        job = self._jobs.get(chunk.request_id)
        if job is None or chunk.sample in job.finished:
            return
        if chunk.finish == REFUSED:
            self._jobs.pop(chunk.request_id)
            self._fail(chunk.request_id, "prompt and samples do not fit the key/value cache")
            return
        count, finish = self._until_stop_text(job, chunk)
        job.ids[chunk.sample] += chunk.token_ids[:count]
        if count:
            self._send(
                {
                    "event": "tokens",
                    "request_id": chunk.request_id,
                    "sample": chunk.sample,
                    "ids": list(chunk.token_ids[:count]),
                    "logprobs": list(chunk.logprobs[:count]),
                    "version": chunk.version,
                }
            )
        if finish:
            self._end(job, chunk.sample, finish)
            if chunk.finish is None:
                self._stepper.end_sample(chunk.request_id, chunk.sample)

    def _until_stop_text(self, job: _Job, chunk: Chunk) -> tuple[int, str | None]:
        """How many of the chunk's tokens to keep, and why the sample ends there if it does."""
        stops = job.request.sampling.stop
        if not stops:
            return len(chunk.token_ids), chunk.finish
        tail = max(_TAIL_TOKENS, *(len(stop.encode()) for stop in stops))
        ids = list(job.ids[chunk.sample][-tail:])
        for at, token in enumerate(chunk.token_ids):
            ids.append(token)
            text = self._tokenizer.decode(ids[-tail:], control=True)
            if any(stop in text for stop in stops):
                return at + 1, "stop"
        return len(chunk.token_ids), chunk.finish

    def _end(self, job: _Job, sample: int, reason: str) -> None:
        job.finished.add(sample)
        request_id = job.request.request_id
        self._send({"event": "done", "request_id": request_id, "sample": sample, "reason": reason})
        if len(job.finished) == job.request.n:
            self._jobs.pop(request_id, None)

    def _fail(
        self,
        request_id: str,
        message: str,
        field: str = "prompt_token_ids",
        remedy: str = "send another prompt",
    ) -> None:
        event = {"event": "failed", "request_id": request_id, "message": message[:2000]}
        self._send({**event, "field": field, "remedy": remedy})

    def _begin_load(self, version: int, path: Path) -> None:
        if self._load and (self._load.thread.is_alive() or self._load.use is not None):
            self._send({"event": "loaded", "version": version, "error": "another load is running"})
            return
        load = _Load(version, threading.Thread(target=self._prepare, name="load", args=(path,)))
        self._load = load
        load.thread.start()

    def _prepare(self, path: Path) -> None:
        load = self._load
        assert load is not None
        try:
            load.identity = identity_of(path)
            load.prepared = self._stepper.prepare(load.version, path)
            same = identity_of(path) == load.identity
            load.error = "" if same else f"{path} was changed while it was read"
        except (OSError, RuntimeError, ValueError) as error:
            load.error = str(error) or type(error).__name__

    def _finish_load(self) -> None:
        load = self._load
        if load is None or load.thread.is_alive() or load.use is None:
            return
        load.thread.join()
        self._load = None
        start_s = time.monotonic()
        if load.use and load.wanted and load.wanted != load.identity and not load.error:
            load.error = "what was read is not what was hashed: the file was changed meanwhile"
        if load.use and not load.error:
            self._stepper.switch(load.version, load.prepared)
        self._send(
            {
                "event": "loaded",
                "version": load.version,
                "error": load.error,
                "pause_s": time.monotonic() - start_s,
            }
        )


def serve(link: socket.socket, build: Callable[[], tuple[Stepper, Tokenizer]]) -> None:
    """Build the stepper, say ready, and answer until the other side is gone."""

    def send(event: dict[str, Any]) -> None:
        link.sendall(json.dumps(event).encode() + b"\n")

    try:
        stepper, tokenizer = build()
    except (WeightsError, OSError, RuntimeError, ImportError, ValueError) as error:
        send({"event": "ready", "error": f"{type(error).__name__}: {error}"})
        return
    ready = {"dtype": stepper.dtype, "structures": stepper.structures}
    send({"event": "ready", "error": "", **ready})
    worker = Worker(stepper, tokenizer, send)
    pending = b""
    while True:
        readable, _, _ = select.select([link], [], [], None if worker.idle() else 0)
        if readable:
            data = link.recv(1 << 20)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                worker.handle(json.loads(line))
        worker.work()


def _build(options: dict[str, Any]) -> tuple[Stepper, Tokenizer]:
    model, weights = Path(options["model"]), Path(options["weights"])
    tokenizer = Tokenizer(model)
    version, threads = options["version"], options["threads"]
    if options["engine"] == "openvino":
        from policy_svc.engines.openvino import OpenVinoOptions, OpenVinoStepper

        kept = options["tokenizers"]
        settings = OpenVinoOptions(
            threads,
            options["kv_cache_gib"],
            options["dtype"],
            end_id=options["end_id"],
            tokenizers=Path(kept) if kept else None,
        )
        return OpenVinoStepper(model, weights, version, settings), tokenizer
    from policy_svc.engines.torch_exact import TorchStepper

    stepper = TorchStepper(model, weights, version, threads=threads, end_id=options["end_id"])
    return stepper, tokenizer


def main() -> None:
    """Entry of the process: `--link FD --options JSON`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--link", type=int, required=True, help="inherited socket")
    parser.add_argument("--options", required=True, help="JSON: engine, model, weights, ...")
    arguments = parser.parse_args()
    options = json.loads(arguments.options)
    with socket.socket(fileno=arguments.link) as link:
        try:
            serve(link, lambda: _build(options))
        except (BrokenPipeError, ConnectionResetError):
            return


if __name__ == "__main__":
    main()
