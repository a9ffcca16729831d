"""The tree of states against a simple model: dictionaries of files, with real sandboxes.

- Whatever the order of creating, writing, snapshotting, forking, restoring, deleting, flattening
  and crashing, every state and every sandbox shows exactly the files that the model says.
- A crash is a new store over what the old one left on the disk; sandboxes end with it.
- At the end nothing is left but what the states need.
"""

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from regreen.rpc.errors import FailedPrecondition
from sandbox_svc.backends.base import Command, Limits
from sandbox_svc.backends.embedded import EmbeddedRuntime
from sandbox_svc.builders.base import Prepared
from sandbox_svc.sandboxes import Manager, PoolLimits
from sandbox_svc.states import StateStore
from sandbox_svc.upkeep import Upkeep, UpkeepLimits

_NAMES = st.sampled_from(("a", "b", "d/a", "d/b", "d/e/a"))
_TEXTS = st.sampled_from(("1", "2", "3"))
_PICK = st.integers(min_value=0, max_value=9)
_LIST = 'cd /work/repo && find . -type f | sort | while read f; do echo "$f=$(cat $f)"; done'
_MOST_BOXES = 3


class StateTree(RuleBasedStateMachine):
    """One store, its sandboxes, and what each should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="regreen-tree-"))
        self.home.chmod(0o711)
        self.loop = asyncio.new_event_loop()
        self.states: dict[str, dict[str, str]] = {}
        self.parents: dict[str, str] = {}
        self.boxes: dict[str, dict[str, str]] = {}
        self.stands: dict[str, str] = {}
        """Sandbox to the state it was made from or put back to."""
        self.latest: dict[str, str] = {}
        """Sandbox to the state that its next snapshot is a child of."""

    def do(self, work):
        """Run a coroutine to its end."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 60.0))

    async def _open(self) -> None:
        self.runtime = EmbeddedRuntime(self.home, run_probes=False, warm_seats=1)
        await self.runtime.start()
        self.store = StateStore(self.home, self.runtime)
        await self.store.open()
        self.manager = Manager(self.runtime, self.store, pool=PoolLimits(max_sandboxes=8))
        await self.manager.start()
        limits = UpkeepLimits(flatten_layers=2)
        self.upkeep = Upkeep(self.store, self.runtime, self.manager.stood_on, lambda: 0.0, limits)

    @initialize()
    def prepare(self) -> None:
        async def build(progress):
            box = await self.runtime.create([], limits=Limits())
            await box.write_file("/work/repo/a", b"0")
            await box.write_file("/work/repo/d/e/a", b"0")
            layer = await box.freeze()
            await box.delete()
            return Prepared((layer,), (), {}, {})

        self.do(self._open())
        root = self.do(self.store.prepare("0" * 64, build))
        self.states[root.id] = {"a": "0", "d/e/a": "0"}

    def _state(self, pick: int) -> str:
        return list(self.states)[pick % len(self.states)]

    def _box(self, pick: int) -> str:
        return list(self.boxes)[pick % len(self.boxes)]

    async def _sh(self, box_id: str, script: str) -> str:
        box = self.manager.get(box_id).box
        done = await box.run(Command(("/bin/sh", "-c", script), cwd="/"))
        assert done.ok, done.stderr.text
        return done.stdout.text

    async def _shown(self, box_id: str) -> dict[str, str]:
        lines = (await self._sh(box_id, _LIST)).split()
        return dict(line.removeprefix("./").split("=") for line in lines)

    def _appeared(self, box_id: str, state_id: str) -> None:
        self.boxes[box_id] = dict(self.states[state_id])
        self.stands[box_id] = self.latest[box_id] = state_id

    @precondition(lambda self: self.states and len(self.boxes) < _MOST_BOXES)
    @rule(pick=_PICK)
    def create(self, pick: int) -> None:
        state_id = self._state(pick)
        self._appeared(self.do(self.manager.create(state_id)).id, state_id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, name=_NAMES, text=_TEXTS)
    def write(self, pick: int, name: str, text: str) -> None:
        box_id = self._box(pick)
        made = f"mkdir -p $(dirname {name}) && echo {text} > {name}"
        self.do(self._sh(box_id, f"cd /work/repo && {made}"))
        self.boxes[box_id][name] = text

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, name=st.sampled_from(("a", "b", "d", "d/e")), again=st.booleans())
    def remove(self, pick: int, name: str, again: bool) -> None:
        box_id = self._box(pick)
        anew = f" && mkdir -p {name}" if again and name.startswith("d") else ""
        self.do(self._sh(box_id, f"cd /work/repo && rm -rf {name}{anew}"))
        files = self.boxes[box_id]
        self.boxes[box_id] = {
            path: text for path, text in files.items() if not f"{path}/".startswith(f"{name}/")
        }

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, names=st.permutations(("a", "b", "d", "d/e", "f")))
    def rename(self, pick: int, names: list[str]) -> None:
        """A file or a directory moves to where nothing is; overlayfs may refuse and `mv` copies."""
        box_id, (old, new, *_) = self._box(pick), names
        files = self.boxes[box_id]
        taken = [path for path in files if f"{path}/".startswith(f"{new}/")]
        moved = [path for path in files if f"{path}/".startswith(f"{old}/")]
        if taken or not moved or f"{new}/".startswith(f"{old}/"):
            return
        room = f"rm -rf {new} && mkdir -p $(dirname {new})"
        self.do(self._sh(box_id, f"cd /work/repo && {room} && mv -T {old} {new}"))
        for path in moved:
            files[new + path.removeprefix(old)] = files.pop(path)

    @rule()
    def collect_garbage(self) -> None:
        self.do(self._collect())

    async def _collect(self) -> None:
        await self.store.collect()
        needed = {layer for state in self.store.list() for layer in state.layers}
        assert needed <= set(await self.runtime.layers())

    def _recorded(self, box_id: str, state) -> None:
        assert state.parent_id == self.latest[box_id]
        self.states[state.id] = dict(self.boxes[box_id])
        self.parents[state.id] = state.parent_id
        self.latest[box_id] = state.id

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def snapshot(self, pick: int) -> None:
        box_id = self._box(pick)
        self._recorded(box_id, self.do(self.manager.snapshot(box_id)))

    @precondition(lambda self: self.boxes and len(self.boxes) < _MOST_BOXES)
    @rule(pick=_PICK)
    def fork(self, pick: int) -> None:
        box_id = self._box(pick)
        state, forks = self.do(self.manager.fork(box_id, 2))
        self._recorded(box_id, state)
        for one in forks:
            assert one.parent_id == box_id
            self._appeared(one.id, state.id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, other=_PICK)
    def restore(self, pick: int, other: int) -> None:
        box_id, state_id = self._box(pick), self._state(other)
        self.do(self.manager.restore(box_id, state_id))
        self._appeared(box_id, state_id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def delete_sandbox(self, pick: int) -> None:
        box_id = self._box(pick)
        self.do(self.manager.delete(box_id))
        del self.boxes[box_id], self.stands[box_id], self.latest[box_id]

    @precondition(lambda self: len(self.states) > 1)
    @rule(pick=_PICK)
    def delete_state(self, pick: int) -> None:
        state_id = self._state(pick)
        in_use = state_id in self.stands.values()
        try:
            self.do(self.manager.delete_state(state_id))
        except FailedPrecondition:
            assert in_use
            return
        assert not in_use
        del self.states[state_id]
        for box_id, latest in self.latest.items():
            while latest not in self.states:
                latest = self.parents.get(latest, self.stands[box_id])
            self.latest[box_id] = latest

    @rule()
    def flatten(self) -> None:
        self.do(self._flatten())

    async def _flatten(self) -> None:
        while await self.upkeep._flatten_one():
            pass

    @rule()
    def crash(self) -> None:
        async def again() -> None:
            old = self.manager, self.store, self.runtime
            for part in old:
                await part.close()
            await self._open()

        self.do(again())
        self.boxes, self.stands, self.latest = {}, {}, {}
        assert {state.id for state in self.store.list()} == set(self.states)

    @rule(pick=_PICK)
    def look_at_a_state(self, pick: int) -> None:
        if self.states:
            self.do(self._look(self._state(pick)))

    async def _look(self, state_id: str) -> None:
        async with self.manager.fresh(state_id) as box:
            done = await box.run(Command(("/bin/sh", "-c", _LIST), cwd="/"))
            lines = done.stdout.text.split()
            shown = dict(line.removeprefix("./").split("=") for line in lines)
        assert shown == self.states[state_id]

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def look_at_a_sandbox(self, pick: int) -> None:
        box_id = self._box(pick)
        assert self.do(self._shown(box_id)) == self.boxes[box_id]

    def teardown(self) -> None:
        try:
            if hasattr(self, "runtime"):
                self.do(self._end())
        finally:
            self.loop.close()
            shutil.rmtree(self.home, ignore_errors=True)

    async def _end(self) -> None:
        try:
            for box_id, files in self.boxes.items():
                assert await self._shown(box_id) == files
            for state_id in self.states:
                await self._look(state_id)
            await self.manager.close()
            await self.store.collect()
            needed = {layer for state in self.store.list() for layer in state.layers}
            assert set(await self.runtime.layers()) == needed
        finally:
            await self.manager.close()
            await self.store.close()
            await self.runtime.close()


StateTree.TestCase.settings = settings(
    max_examples=6,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
)
TestStateTree = StateTree.TestCase
