"""Loads modules ahead of a test run and hands each out when the run itself asks for it.

- Standard library only, Python 3.7 and newer.
- A module loaded ahead stays out of `sys.modules` until its import; what its import does to
  warnings, environment and finders is undone and done again at that moment.
- A module whose import does anything else that another one could see is not loaded ahead.
- At the moment of import the conditions are those of the loading, or the run says so and ends:
  it must then be done anew by a process that loaded nothing ahead.
- Nothing of the repository is ever loaded ahead.
"""

from __future__ import annotations

import _locale
import atexit
import gc
import hashlib
import importlib
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

OWN_PYTEST = "PYTEST_"
"""Variables that pytest sets for itself in every run."""


def _beside(name: str) -> Any:
    """A module of a file beside this one."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    spec: Any = importlib.util.spec_from_file_location("regreen_" + name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


looks = _beside("looks")
STANDARD, SHIFTING, HOOKS = looks.STANDARD, looks.SHIFTING, looks.HOOKS
inside, places, shape, space = looks.inside, looks.places, looks.shape, looks.space


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(OWN_PYTEST)}


def conditions() -> tuple[Any, ...]:
    """What an import could depend on and pytest itself leaves alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    sockets = sys.modules.get("socket")
    return (
        *(os.getcwd(), mask, tuple(sys.argv), sys.getrecursionlimit(), sys.getswitchinterval()),
        *(sys.dont_write_bytecode, _locale.setlocale(_locale.LC_ALL, None), gc.isenabled()),
        sockets.getdefaulttimeout() if sockets is not None else None,
        len(sys.path_hooks),
    )


def digest(variables: dict[str, str]) -> str:
    """One word for these variables and the other conditions."""
    text = repr((sorted(variables.items()), conditions()))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def effects(find: Callable[[str], Any]) -> dict[str, Any]:
    """What an import may leave behind that cannot be done again later."""
    log, chance = find("logging"), find("random")
    root = log.getLogger() if log is not None else None
    handlers = [signal.getsignal(n) for n in range(1, signal.NSIG)]
    hooks = (sys.excepthook, sys.displayhook, sys.gettrace(), sys.getprofile())
    count = sys.getrefcount
    return {
        "conditions": conditions(),
        "path": tuple(sys.path),
        "hooks": tuple(id(hook) for hook in (*hooks, *sys.path_hooks)),
        "streams": (id(sys.stdout), id(sys.stderr)),
        "uses of streams": count(sys.stdout) + count(sys.stderr),
        "signals": tuple(h if isinstance(h, int) else id(h) for h in handlers),
        "threads": threading.active_count(),
        "descriptors": tuple(sorted(os.listdir("/proc/self/fd"))),
        "gc": gc.get_threshold(),
        "random": hash(chance.getstate()) if chance is not None else None,
        "logging": (root.level, tuple(map(id, root.handlers)), root.manager.disable)
        if root is not None
        else (30, (), 0),
    }


class Recorder:
    """Notes which modules a run asks for, in order, and under which conditions."""

    def __init__(self, root: str) -> None:
        self.root = os.path.join(os.path.realpath(root), "")
        self.names: dict[str, str] = {}
        self.open: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        while self.open and not looks.importing(self.open[-1]):
            self.open.pop()
        foreign = [n for n in self.open if not inside(sys.modules.get(n), self.root)]
        self.open.append(name)
        self.names.setdefault(name, "" if foreign else digest(environment()))

    def survey(self) -> list[tuple[str, str]]:
        """The names that were found elsewhere than in the repository."""
        return [
            (name, told)
            for name, told in self.names.items()
            if looks.is_module(sys.modules.get(name)) and not inside(sys.modules[name], self.root)
        ]


class Group:
    """What one import brought: its modules and how to do its effects again."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.modules: dict[str, Any] = {}
        self.children: list[tuple[str, str, Any]] = []
        self.needs: list[Group] = []
        self.after: list[Group] = []
        self.filters: list[Any] = []
        self.variables: dict[str, Any] = {}
        self.finders: list[Any] = []
        self.exits: list[Any] = []
        self.absent: list[str] = []
        self.released = False


class Served:
    """A loader that gives a module which is there already, untouched."""

    def __init__(self, shelf: Shelf, group: Group) -> None:
        self.shelf, self.group = shelf, group

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        del sys.modules[module.__name__]
        self.shelf.hand_out(self.group, module.__name__)


class Absent:
    """The last finder: notes top-level modules that nobody has."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if "." not in name:
            self.names.append(name)


class Shelf:
    """Modules that were loaded ahead; a finder that hands them out."""

    def __init__(self, root: str, log: int) -> None:
        self.root, self.log = os.path.join(os.path.realpath(root), ""), log
        self.base = dict(sys.modules)
        homes = [sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), *filter(None, sys.path)]
        self.homes = tuple(os.path.join(os.path.realpath(home), "") for home in homes)
        self.groups: list[Group] = []
        self.of: dict[str, Group] = {}
        self.spoilt: set[str] = set()
        self.loading: Group | None = None
        self.refuse: Any = None
        self.environment: dict[str, str] = {}
        self.conditions: tuple[Any, ...] = ()
        self.functions: list[tuple[str, dict[str, Any], str, Any]] = []

    def load(self, names: list[tuple[str, str]], deep: bool) -> dict[str, str]:
        """Load what can be loaded ahead; the others by name with the reason.

        It ends where a run has changed the conditions before it imports the next one.
        """
        refused: dict[str, str] = {}
        sys.meta_path.insert(0, self)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for name, told_digest in names:
                if name in sys.modules or name in self.of:
                    continue
                if told_digest and told_digest != digest(self._after_all()):
                    break
                why = self._load(name, told, deep)
                if why:
                    refused[name] = why
                    self.spoilt = set(sys.modules).difference(self.base, self.of)
        sys.meta_path.remove(self)
        for group in self.groups:
            group.released = False
        self.environment, self.conditions = environment(), conditions()
        self.functions = [
            (name, space(module), key, value)
            for name, module in self.base.items()
            if name not in SHIFTING
            for key, value in space(module).items()
            if callable(value) and key not in HOOKS
        ]
        return refused

    def _load(self, name: str, told: Any, deep: bool) -> str:
        """Load one module and put it on the shelf; the reason if that cannot be."""
        group = self.loading = Group(name)
        deep = deep and name.partition(".")[0] not in (*STANDARD, "_pytest")
        known = self._known() if deep else {}
        first, before = shape(known), effects(self._module)
        filters, variables = list(warnings.filters), dict(os.environ)
        finders, size = list(sys.meta_path), os.fstat(self.log).st_size
        absent, register = Absent(), atexit.register

        def note(call: Any, *args: Any, **named: Any) -> Any:
            group.exits.append((call, args, named))
            return call

        sys.meta_path.append(absent)
        atexit.register = note  # type: ignore[assignment]
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - whatever a package raises
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            atexit.register = register
            sys.meta_path.remove(absent)
            self.loading = None
        sys.stdout.flush()
        sys.stderr.flush()
        if told or os.fstat(self.log).st_size != size:
            del told[:]
            return "it prints or warns"
        why = self._take(group)
        why = why or self._effects_of(group, filters, variables, finders)
        group.absent = [n for n in absent.names if n not in sys.modules]
        after = effects(self._module)
        if after["uses of streams"] > before["uses of streams"]:
            gc.collect()
            after = effects(self._module)
        after["uses of streams"] = max(after["uses of streams"], before["uses of streams"])
        before["random"] = after["random"] if before["random"] is None else before["random"]
        changed = [key for key in before if before[key] != after[key]]
        changed += ["atexit"] if sys.getrefcount(note) > 2 else []
        why = why or ("it changes " + ", ".join(changed) if changed else "")
        if deep and not why:
            why = self._patched(first, shape(known), group)
        if not why:
            self._hide(group)
        return why

    def _after_all(self) -> dict[str, str]:
        """The environment of a run that has imported everything so far."""
        space = environment()
        for group in self.groups:
            for key, value in group.variables.items():
                put(space, key, value)
        return space

    def _known(self) -> dict[str, Any]:
        return {**self.base, **{n: m for g in self.groups for n, m in g.modules.items()}}

    def _take(self, group: Group) -> str:
        """Collect what is new; what one that was refused has left is not."""
        old = {*self.base, *self.of, *self.spoilt}
        group.modules = {name: module for name, module in sys.modules.items() if name not in old}
        for module in group.modules.values():
            found = [] if any(module is other for other in self.base.values()) else places(module)
            if any(place.startswith(self.root) for place in found):
                return "it loads a part of the repository"
            if not all(place.startswith(self.homes) for place in found):
                return "it loads files that are not of the State's packages"
        return "" if group.modules else "it brings nothing"

    def _effects_of(
        self, group: Group, filters: list[Any], variables: Any, finders: list[Any]
    ) -> str:
        """Note the effects that can be done again, and undo them."""
        below = [f for g in self._closure(group) for f in g.filters]
        now = list(warnings.filters)
        added = now[: len(now) - len(filters)]
        if now[len(added) :] != filters or sorted(map(str, added[len(added) - len(below) :])) != (
            sorted(map(str, below))
        ):
            return "it changes the filters of warnings"
        group.filters = added[: len(added) - len(below)]
        group.variables = {
            key: os.environ.get(key)
            for key in {*variables, *os.environ}
            if variables.get(key) != os.environ.get(key)
        }
        for other in self._closure(group):
            for key, value in other.variables.items():
                if group.variables.get(key, "") == value:
                    del group.variables[key]
        brought = [f for g in self._closure(group) for f in g.finders]
        if sys.meta_path[: len(finders)] != finders:
            return "it changes the finders of modules"
        group.finders = [f for f in sys.meta_path[len(finders) :] if f not in brought]
        warnings.filters[:] = filters  # type: ignore[index]
        mutated()
        for key in {*variables, *os.environ}:
            put_variable(key, variables.get(key))
        sys.meta_path[:] = finders
        return ""

    def _closure(self, group: Group) -> list[Group]:
        found: list[Group] = []
        todo = list(group.needs) + list(group.after)
        while todo:
            other = todo.pop()
            if other not in found:
                found.append(other)
                todo += [*other.needs, *other.after]
        return found

    def _patched(self, first: Any, last: Any, group: Group) -> str:
        """What it changed in modules that were there before."""
        for key in {*first, *last}:
            if first.get(key) == last.get(key):
                continue
            owner, _, name = key[0], None, key[1]
            child = group.modules.get(owner + "." + name)
            shelved = owner + "." + name in self.of
            if key not in first and (child is not None or shelved):
                continue
            if first.get(key) == "None" and name[0] == "_" and owner.split(".")[0] in STANDARD:
                continue  # a cache that is filled when it is first needed
            return f"it changes {owner}.{name}"
        return ""

    def _hide(self, group: Group) -> None:
        self.groups.append(group)
        for name in group.modules:
            self.of[name] = group
            parent, _, child = name.rpartition(".")
            if parent and parent not in group.modules:
                owner = self._module(parent)
                if space(owner).get(child) is group.modules[name]:
                    group.children.append((parent, child, group.modules[name]))
        for name in set(sys.modules).difference(self.base, self.spoilt):
            del sys.modules[name]
        for other in self.groups:
            other.released = False
            for parent, child, _ in other.children:
                space(self._module(parent)).pop(child, None)

    def _module(self, name: str) -> Any:
        """A module, on the shelf or not."""
        group = self.of.get(name)
        return sys.modules.get(name) if group is None else group.modules[name]

    def serve(self, refuse: Callable[[str], NoReturn]) -> None:
        """Hand out modules from now on; `refuse` is called when a run has to be done anew."""
        self.refuse = refuse
        for place in list(sys.path_importer_cache):
            if (os.path.realpath(place) + os.sep).startswith(self.root):
                del sys.path_importer_cache[place]
        importlib.invalidate_caches()
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        group = self.of.get(name)
        if group is None or group.released:
            return None
        own = getattr(group.modules[name], "__spec__", None)
        spec = ModuleSpec(name, Served(self, group), origin=getattr(own, "origin", None))  # type: ignore[arg-type]
        spec.submodule_search_locations = getattr(own, "submodule_search_locations", None)
        return spec

    def hand_out(self, group: Group, name: str) -> None:
        """Answer an import."""
        if self.loading is not None:
            wanted = self.loading.needs if group.root == name else self.loading.after
            wanted.append(group)
        elif group.root != name:
            self.refuse(f"order: {name} before {group.root}")
        self.release(group)
        if self.loading is None and all(g.released for g in self.groups):
            sys.meta_path.remove(self)

    def release(self, group: Group) -> None:
        """Put the modules of a group where an import of its root would put them."""
        if group.released:
            return
        serving = self.loading is None
        for other in group.after:
            if not other.released and serving:
                self.refuse(f"order: {group.root} before {other.root}")
            self.release(other)
        for other in group.needs:
            self.release(other)
        if serving:
            self._check(group)
        group.released = True
        for key, value in group.variables.items():
            put_variable(key, value)
            if serving:
                put(self.environment, key, value)
        for item in reversed(group.filters):
            if item in warnings.filters:
                warnings.filters.remove(item)  # type: ignore[attr-defined]
            warnings.filters.insert(0, item)  # type: ignore[attr-defined]
        if group.filters:
            mutated()
        for call, args, named in group.exits if serving else ():
            atexit.register(call, *args, **named)
        sys.meta_path.extend(group.finders)
        sys.modules.update(group.modules)
        for parent, child, module in group.children:
            setattr(sys.modules[parent], child, module)

    def _check(self, group: Group) -> None:
        """Refuse to hand out what would not have been loaded like this now."""
        if environment() != self.environment:
            self.refuse("environment")
        if conditions() != self.conditions:
            self.refuse("conditions")
        for name, module in group.modules.items():
            if name in sys.modules and sys.modules[name] is not module:
                self.refuse("conflict: " + name)
        top = [n for n in group.modules if "." not in n]
        own = all(n in sys.builtin_module_names or looks.is_standard(group.modules[n]) for n in top)
        for owner, held, key, value in () if own else self.functions:
            if held.get(key) is not value:
                self.refuse(f"patched: {owner}.{key}")
        for name in top:  # the standard library too: a repository may have a module of that name
            spec = getattr(group.modules[name], "__spec__", None)
            origin = getattr(spec, "origin", None)
            if not origin or origin in ("built-in", "frozen"):
                continue
            found = PathFinder.find_spec(name)
            if found is not None and found.origin != origin:
                self.refuse("shadowed: " + name)
        for name in group.absent:
            if PathFinder.find_spec(name) is not None:
                self.refuse("shadowed: " + name)


def put(space: dict[str, str], key: str, value: Any) -> None:
    if value is None:
        space.pop(key, None)
    else:
        space[key] = value


def put_variable(key: str, value: Any) -> None:
    if os.environ.get(key) != value:
        put(os.environ, key, value)  # type: ignore[arg-type]


def mutated() -> None:
    """Tell the warnings module that its filters are others now."""
    names = ("_filters_mutated", "_filters_mutated_lock_held")
    tell = next(filter(None, (getattr(warnings, name, None) for name in names)), None)
    if tell is None:
        raise RuntimeError("this Python does not let filters of warnings be changed")
    tell()
