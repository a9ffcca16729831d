"""Byte code of wheels, kept: what one State has compiled no other has to.

- It is made of a wheel in a box of its own, which has no part of a task and runs no code of the
  wheel: a task's own build could write what it likes into its State, and never into this.
- It is kept by the wheel's sha256 and the interpreter; a State takes it only for a file whose
  source has the sha256 that was compiled, and gives it that file's own time and size.
- Nothing depends on it: what is missing is compiled in the State.
"""

import asyncio
import hashlib
import marshal
from collections.abc import Sequence
from pathlib import Path

import structlog

from regreen.rpc.errors import RegreenError
from sandbox_svc.backends.base import Command, EndReason, Limits, Mount, Runtime
from sandbox_svc.builders.base import ENV, TOOLS, WHEELHOUSE
from sandbox_svc.builders.interpreters import Interpreter
from sandbox_svc.wheelhouse import DistStore, Wheel

_log = structlog.get_logger(__name__)
COMPILED = "/compiled"
SCRIPT = Path(__file__).parent / "inbox" / "compile_wheel.py"
_MOST_BYTES = 64 << 20
_NOTHING = marshal.dumps({})
_OUT, _AT_ONCE, _WITHIN_S = "/work/compiled", 2, 120.0


class ByteCode:
    """The byte code of a store's wheels."""

    def __init__(self, store: DistStore) -> None:
        self._store = store

    async def mount(
        self,
        wheels: Sequence[Wheel],
        interpreter: Interpreter,
        mounts: Sequence[Mount],
        runtime: Runtime,
        limits: Limits,
    ) -> Mount:
        """A folder with what is kept of these wheels; what is missing is made first.

        `mounts` are those of the tools, the interpreter and the wheelhouse.
        """
        keys = {_key(wheel, interpreter): wheel for wheel in wheels}
        missing = {k: w for k, w in keys.items() if not self._store.compiled(k).is_file()}
        if missing:
            await self._make(missing, interpreter, mounts, runtime, limits)
        return Mount(self._store.compiled_folder(keys), COMPILED)

    async def _make(
        self,
        missing: dict[str, Wheel],
        interpreter: Interpreter,
        mounts: Sequence[Mount],
        runtime: Runtime,
        limits: Limits,
    ) -> None:
        box = await runtime.create((), limits=limits, mounts=mounts)
        gate = asyncio.Semaphore(_AT_ONCE)
        minor = ".".join(interpreter.full_version.split(".")[:2])
        site = f"{ENV}/lib/python{minor}/site-packages"

        async def one(key: str, wheel: Wheel) -> None:
            script = (str(interpreter.executable), "-I", "-S", f"{TOOLS}/lib/{SCRIPT.name}")
            argv = (*script, f"{WHEELHOUSE}/{wheel.filename}", site, f"{_OUT}/{key}")
            async with gate:
                done = await box.run(Command(argv, cwd="/work", timeout_s=_WITHIN_S))
                if done.ok:
                    data = await box.read_file(f"{_OUT}/{key}", _MOST_BYTES)
                elif done.reason is EndReason.EXIT:
                    data = _NOTHING  # no archive that Python can read: not to be tried each time
                else:
                    return
            await asyncio.to_thread(self._store.keep_compiled, key, data)

        try:
            await box.write_file(f"{_OUT}/.keep", b"")
            made = await asyncio.gather(
                *map(one, missing, missing.values()), return_exceptions=True
            )
        finally:
            await box.delete()
        for error in made:
            if isinstance(error, (RegreenError, OSError)):
                _log.warning("byte code not kept", error=str(error))
            elif isinstance(error, BaseException):
                raise error


def _key(wheel: Wheel, interpreter: Interpreter) -> str:
    script = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    parts = [wheel.sha256, interpreter.full_version, str(interpreter.executable), script]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
