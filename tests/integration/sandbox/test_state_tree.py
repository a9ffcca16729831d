"""The tree of states against a simple model: dictionaries of files, with real sandboxes.

- Whatever the order of creating, writing, snapshotting, forking, restoring, deleting, flattening
  and starting anew, every state and every sandbox shows exactly the files that the model says.
- A restart is a new store over what the old one left on the disk; sandboxes end with it.
- A crash is `kill -9` of a whole service, perhaps in the middle of something: every state that was
  there is there, whole; what was under way has made its state, whole, or none.
- At the end nothing is left but what the states need.
- Every run tries other programs. One that fails says its seed: `REGREEN_TREE_SEED=N` repeats it.
"""

import asyncio
import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from regreen.rpc.errors import FailedPrecondition
from tests.integration.sandbox.treeworlds import Known, Service, Store

_SEED = "REGREEN_TREE_SEED"
_NAMES = st.sampled_from(("a", "b", "d/a", "d/b", "d/e/a"))
_TEXTS = st.sampled_from(("1", "2", "3"))
_PICK = st.integers(min_value=0, max_value=9)
_LIST = 'cd /work/repo && find . -type f | sort | while read f; do echo "$f=$(cat $f)"; done'
_MOST_BOXES = 3


class StateTree(RuleBasedStateMachine):
    """One store, its sandboxes, and what each should hold."""

    world_of: type[Store] | type[Service] = Store
    most_ends = 25
    """Restarts and crashes of one program."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="regreen-tree-"))
        self.home.chmod(0o711)
        self.loop = asyncio.new_event_loop()
        self.world = self.world_of(self.home)
        self.opened = False
        self.ends = 0
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

    @initialize()
    def prepare(self) -> None:
        self.do(self.world.open())
        self.opened = True
        files = {"a": "0", "d/e/a": "0"}
        root = self.do(self.world.root(files))
        self.states[root.id] = files

    def _state(self, pick: int) -> str:
        return list(self.states)[pick % len(self.states)]

    def _box(self, pick: int) -> str:
        return list(self.boxes)[pick % len(self.boxes)]

    def _sh(self, box_id: str, script: str) -> None:
        self.do(self.world.sh(box_id, f"cd /work/repo && {script}"))

    def _appeared(self, box_id: str, state_id: str) -> None:
        self.boxes[box_id] = dict(self.states[state_id])
        self.stands[box_id] = self.latest[box_id] = state_id

    @precondition(lambda self: self.states and len(self.boxes) < _MOST_BOXES)
    @rule(pick=_PICK)
    def create(self, pick: int) -> None:
        state_id = self._state(pick)
        self._appeared(self.do(self.world.create(state_id)), state_id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, name=_NAMES, text=_TEXTS)
    def write(self, pick: int, name: str, text: str) -> None:
        box_id = self._box(pick)
        others = (path for path in self.boxes[box_id] if path != name)
        if any(f"{p}/".startswith(f"{name}/") or name.startswith(f"{p}/") for p in others):
            return  # after a rename a directory has the name, or a file that of its directory
        self._sh(box_id, f"mkdir -p $(dirname {name}) && echo {text} > {name}")
        self.boxes[box_id][name] = text

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, name=st.sampled_from(("a", "b", "d", "d/e")), again=st.booleans())
    def remove(self, pick: int, name: str, again: bool) -> None:
        box_id = self._box(pick)
        anew = f" && mkdir -p {name}" if again and name.startswith("d") else ""
        self._sh(box_id, f"rm -rf {name}{anew}")
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
        self._sh(box_id, f"{room} && mv -T {old} {new}")
        for path in moved:
            files[new + path.removeprefix(old)] = files.pop(path)

    def _recorded(self, box_id: str, state: Known) -> None:
        assert state.parent_id == self.latest[box_id]
        self.states[state.id] = dict(self.boxes[box_id])
        self.parents[state.id] = state.parent_id
        self.latest[box_id] = state.id

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def snapshot(self, pick: int) -> None:
        box_id = self._box(pick)
        self._recorded(box_id, self.do(self.world.snapshot(box_id)))

    @precondition(lambda self: self.boxes and len(self.boxes) < _MOST_BOXES)
    @rule(pick=_PICK)
    def fork(self, pick: int) -> None:
        box_id = self._box(pick)
        state, forks = self.do(self.world.fork(box_id, 2))
        self._recorded(box_id, state)
        for one in forks:
            self._appeared(one, state.id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK, other=_PICK)
    def restore(self, pick: int, other: int) -> None:
        box_id, state_id = self._box(pick), self._state(other)
        self.do(self.world.restore(box_id, state_id))
        self._appeared(box_id, state_id)

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def delete_sandbox(self, pick: int) -> None:
        box_id = self._box(pick)
        self.do(self.world.delete_sandbox(box_id))
        del self.boxes[box_id], self.stands[box_id], self.latest[box_id]

    @precondition(lambda self: len(self.states) > 1)
    @rule(pick=_PICK)
    def delete_state(self, pick: int) -> None:
        state_id = self._state(pick)
        in_use = state_id in self.stands.values()
        try:
            self.do(self.world.delete_state(state_id))
        except FailedPrecondition:
            assert in_use
            return
        assert not in_use
        self._gone(state_id)

    def _gone(self, state_id: str) -> None:
        del self.states[state_id]
        for box_id, latest in self.latest.items():
            while latest not in self.states:
                latest = self.parents.get(latest, self.stands[box_id])
            self.latest[box_id] = latest

    @precondition(lambda self: self.ends < self.most_ends)
    @rule()
    def restart(self) -> None:
        self.do(self.world.restart())
        self._ended()
        assert {state.id for state in self.do(self.world.states())} == set(self.states)

    def _ended(self) -> None:
        """No sandbox outlives its service."""
        self.boxes, self.stands, self.latest = {}, {}, {}
        self.ends += 1

    @rule(pick=_PICK)
    def look_at_a_state(self, pick: int) -> None:
        if self.states:
            self.do(self._look(self._state(pick)))

    async def _look(self, state_id: str) -> None:
        assert _files(await self.world.look(state_id, _LIST)) == self.states[state_id]

    @precondition(lambda self: self.boxes)
    @rule(pick=_PICK)
    def look_at_a_sandbox(self, pick: int) -> None:
        box_id = self._box(pick)
        assert _files(self.do(self.world.sh(box_id, _LIST))) == self.boxes[box_id]

    def teardown(self) -> None:
        try:
            if self.opened:
                self.do(self._end())
        finally:
            self.loop.close()
            shutil.rmtree(self.home, ignore_errors=True)

    async def _end(self) -> None:
        try:
            for box_id, files in self.boxes.items():
                assert _files(await self.world.sh(box_id, _LIST)) == files
            for state_id in self.states:
                await self._look(state_id)
            await self.world.check_nothing_is_left()
        finally:
            await self.world.close()


def _files(listed: str) -> dict[str, str]:
    return dict(line.removeprefix("./").split("=") for line in listed.split())


class StoreTree(StateTree):
    """The store in this process, which is told when to flatten and when to collect."""

    world: Store

    @rule()
    def collect_garbage(self) -> None:
        self.do(self.world.collect())

    @rule()
    def flatten(self) -> None:
        self.do(self.world.flatten())


class ServiceTree(StateTree):
    """A service, which is killed."""

    world_of = Service
    world: Service
    most_ends = 3  # a process takes a second to start

    @precondition(lambda self: self.ends < self.most_ends)
    @rule(
        during=st.sampled_from(("nothing", "snapshot", "fork", "restore", "delete_state", "write")),
        pick=_PICK,
        other=_PICK,
        moment_ms=st.sampled_from((0, 1, 2, 3, 5, 8, 13)),
    )
    def crash(self, during: str, pick: int, other: int, moment_ms: int) -> None:
        state_id = self._state(other) if self.states else ""
        box_id = self._box(pick) if self.boxes else ""
        if not state_id or (not box_id and during != "delete_state"):
            during = "nothing"
        in_use = state_id in self.stands.values()

        async def work(world: Service) -> str:
            match during:
                case "snapshot":
                    return (await world.snapshot(box_id)).id
                case "fork":
                    return (await world.fork(box_id, 1))[0].id
                case "restore":
                    await world.restore(box_id, state_id)
                case "delete_state":
                    await world.delete_state(state_id)
                case "write":
                    await world.sh(box_id, "echo 9 > /work/repo/a")
            return ""

        answered = self.do(self.world.killed(work, moment_ms / 1000))
        found = {state.id: state for state in self.do(self.world.states())}
        missing, made = set(self.states) - set(found), set(found) - set(self.states)
        if during == "delete_state" and not in_use:
            assert missing <= {state_id}
            assert missing or answered is None
        else:
            assert not missing
        if during in ("snapshot", "fork"):
            assert len(made) <= 1
            assert {answered or ""} <= {*made, ""}
        else:
            assert not made
        for new in made:
            self._recorded(box_id, found[new])
        for old in missing:
            self._gone(old)
        self._ended()
        for one in self.states:  # every committed state is whole
            self.do(self._look(one))


@pytest.mark.parametrize(("machine", "examples"), [(StoreTree, 20), (ServiceTree, 6)])
def test_every_state_and_sandbox_shows_what_the_model_says(machine, examples) -> None:
    number = int(os.environ.get(_SEED) or secrets.randbits(32))
    print(f"{_SEED}={number} repeats these programs")  # pytest shows it where the test fails
    run_state_machine_as_test(
        seed(number)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=False,
            print_blob=False,
        ),
    )
