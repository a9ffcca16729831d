"""The training process: one per rank, started by `launch`, gone when its run ends.

- Rank 0 takes commands from the service, one at a time, over an inherited socket; it hands each to
  the other ranks before it obeys, so that all ranks do the same things in the same order.
- No step is done twice: a step that is not the next one of the weights at hand is refused.
- When the service dies, by whatever signal, its workers die too.
- An error that leaves the session sound is answered; any other ends the process, and the run goes
  on from its last checkpoint.
"""

import argparse
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from learner_svc.wire import Pipe, error_to_json
from regreen.rpc.errors import FailedPrecondition, RegreenError

_PR_SET_PDEATHSIG = 1
_log = logging.getLogger("learner.worker")


def main(argv: list[str] | None = None) -> int:
    """Serve commands until told to stop or until the service is gone."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--fd", type=int, default=-1, help="inherited socket; rank 0 only")
    parser.add_argument("--parent", type=int, default=0, help="process to die with")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    _die_with(options.parent)
    gc.disable()  # until all is loaded: none of that ends, and looking through it takes a second
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.fd >= 0:
        return _lead(Pipe(socket.socket(fileno=options.fd)))
    return _follow()


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends."""
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the learner service ended before its worker started")


def _lead(pipe: Pipe) -> int:
    commands = Commands(lambda done, total: pipe.send({"progress": [done, total]}))
    while (message := pipe.receive()) is not None:
        try:
            answer = commands.run(message)
        except RegreenError as error:
            pipe.send({"error": error_to_json(error)})
            continue
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            advice = "set a smaller micro_batch_tokens, or gradient_checkpointing"
            problem = f"out of memory: {str(error)[:300]}; {advice}"
            pipe.send({"error": error_to_json(FailedPrecondition(problem))})
            return 1
        pipe.send({"ok": answer})
        if message["op"] == "stop":
            return 0
    return 0


def _of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the host or of a GPU."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def _follow() -> int:
    """Ranks other than 0: open the session that rank 0 announces, then obey."""
    from learner_svc.launch import join_ranks, receive_command

    join_ranks()
    commands = Commands(lambda done, total: None)
    while (message := receive_command()) is not None:
        try:
            commands.run(message)
        except RegreenError as error:
            _log.warning("rank %s: %s", os.environ["RANK"], error)
        if message["op"] == "stop":
            break
    return 0


class Commands:
    """The commands of a worker, and the session that they act on."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        from learner_svc.session import Session

        gc.freeze()
        gc.enable()
        self._open = Session
        self._session: Session | None = None
        self._progress = progress
        self._root = Path()

    def run(self, message: dict[str, Any]) -> dict[str, Any]:
        """Obey one command.

        Raises:
            RegreenError: the command could not be carried out; the session is as before.
        """
        self._announce(message)
        handler = {
            "start": self._start,
            "step": self._step,
            "publish": self._publish,
            "save": self._save,
            "stop": self._stop,
        }
        return handler[message["op"]](message)

    def _announce(self, message: dict[str, Any]) -> None:
        from learner_svc.launch import join_ranks, send_command, world_size

        if int(os.environ.get("RANK", "0")) == 0 and world_size() > 1:
            join_ranks()
            send_command(message)

    def _start(self, message: dict[str, Any]) -> dict[str, Any]:
        from learner_svc.spec import RunSpec

        resume = message["resume"]
        self._root = Path(message["checkpoints"])
        self._session = self._open(
            RunSpec.from_json(message["spec"]),
            Path(message["extensions"]),
            Path(resume) if resume else None,
        )
        opened = self._session.opened()
        return {
            "step": opened.step,
            "trainable_parameters": opened.trainable_parameters,
            "parameters": opened.parameters,
            "engine": opened.engine,
        }

    def _step(self, message: dict[str, Any]) -> dict[str, Any]:
        from learner_svc.session import lend_memory
        from regreen.batch import Batch, BatchError
        from regreen.rpc.errors import InvalidArgument

        session = self._need()
        if message["step"] != session.step_done + 1:
            raise FailedPrecondition(
                f"step {message['step']} is not the next one: {session.step_done} are in the "
                "weights; start the run again"
            )
        try:
            batch = Batch.from_bytes(Path(message["batch"]).read_bytes())
        except BatchError as error:
            raise InvalidArgument(
                f"batch.{error.field}",
                error.problem,
                "write the batch with regreen.batch",
            ) from error
        metrics = session.step(batch, message["group_ids"], self._progress)
        if message["lend_memory"]:
            lend_memory()
        return {"metrics": metrics}

    def _publish(self, message: dict[str, Any]) -> dict[str, Any]:
        made = self._need().publish(self._root, message["policy_version"], message["driver_step"])
        return {"path": str(made.path) if made else ""}

    def _save(self, message: dict[str, Any]) -> dict[str, Any]:
        saved = self._need().save(
            self._root, message["policy_version"], message["keep"], message["driver_step"]
        )
        return {"path": str(saved.path) if saved else ""}

    def _stop(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._session is not None:
            self._session.close()
        return {}

    def _need(self) -> Any:
        if self._session is None:
            raise FailedPrecondition("no session is open in this worker")
        return self._session


if __name__ == "__main__":
    sys.exit(main())
