"""Mutation run over `learner_svc/algo`: every small change to its lines must fail a test.

- One mutant is one change of one operator, constant, condition, bound or stop of a gradient.
  Decorators are left alone: `frozen` and `slots` are no maths.
- Mutants live in memory: no file is written, and a fork that imports its own takes the place of
  the process's start, which would cost ten seconds each.
- A mutant that no test fails survives, unless `EQUIVALENT` names its line and why no test could.
- The score, and every survivor, stand in `build/bench/mutate.json`; below 90 % the exit code is 1.

`python -m tests.load.mutate [FILE ...] [--every N]`: all files of the folder, or those named; every
N-th mutant, for a quick look.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "learner_svc" / "algo"
TESTS = ROOT / "tests" / "unit" / "learner"
TESTS_OF = {
    "advantages.py": ["test_advantages.py"],
    "batch.py": ["test_packing.py"],
    "choices.py": ["test_ratios.py", "test_hyperparameters.py", "test_losses.py"],
    "kl.py": ["test_ratios.py", "test_losses.py"],
    "ratios.py": ["test_ratios.py", "test_losses_trl.py", "test_losses.py"],
    "losses.py": ["test_losses_shares.py", "test_losses_trl.py", "test_losses.py"],
}
REQUIRED = 0.9
LIMIT_S = 120
BROKEN = 99
"""Exit code of a fork that could not run tests: no mutant is killed by it."""
EQUIVALENT = {
    "batch.py: self._latest: Ids = np.empty(0, np.int32) -> 0 to 1": (
        "read only once a path exists, which sets it"
    ),
}
"""`file: line of code -> change` to the reason why no test can tell it."""

SWAPS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
NAMES = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "any": "all",
    "sum": "mean",
    "mean": "sum",
    "amin": "amax",
    "amax": "amin",
}
DROPPED = ("detach", "clamp", "exp")
"""Calls that are replaced by what they were called on."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change."""

    file: str
    line: int
    code: str
    change: str
    tree: ast.Module

    @property
    def key(self) -> str:
        """What `EQUIVALENT` calls it."""
        return f"{self.file}: {self.code} -> {self.change}"


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a mutant."""

    file: str
    line: int
    code: str
    change: str
    killed: bool
    equivalent: str
    seconds: float


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], ast.AST | None]]]:
    """Name and effect of every mutation of a node; an effect returns a node to put in its place."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        for kind in SWAPS.get(type(node.op), ()):
            yield f"{type(node.op).__name__} to {kind.__name__}", _operator(kind)
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            for kind in SWAPS.get(type(op), ()):
                yield f"{type(op).__name__} to {kind.__name__}", _comparison(place, kind)
    if isinstance(node, ast.UnaryOp):
        yield f"no {type(node.op).__name__}", lambda found: found.operand
    if isinstance(node, ast.If | ast.IfExp):
        yield "other branch", _negated
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} to {not node.value}", lambda found: ast.Constant(not found.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} to {node.value + 1}", lambda found: ast.Constant(found.value + 1)
    if isinstance(node, ast.Call):
        yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, Callable[[Any], ast.AST | None]]]:
    for place, keyword in enumerate(node.keywords):
        if keyword.arg in ("min", "max"):
            yield f"{keyword.arg}= to {NAMES[keyword.arg]}=", _keyword(place, NAMES[keyword.arg])
    name = node.func
    if isinstance(name, ast.Attribute) and name.attr in NAMES:
        yield f"{name.attr} to {NAMES[name.attr]}", _attribute(NAMES[name.attr])
    if isinstance(name, ast.Attribute) and name.attr in DROPPED:
        yield f"no {name.attr}", _dropped
    if isinstance(name, ast.Name) and name.id in NAMES:
        yield f"{name.id} to {NAMES[name.id]}", _name(NAMES[name.id])


def _operator(kind: type[ast.AST]) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.op = kind()

    return change


def _comparison(place: int, kind: type[ast.AST]) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.ops[place] = kind()

    return change


def _negated(found: Any) -> None:
    found.test = ast.UnaryOp(ast.Not(), found.test)


def _keyword(place: int, name: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.keywords[place].arg = name

    return change


def _attribute(name: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.func.attr = name

    return change


def _name(name: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found.func.id = name

    return change


def _dropped(found: Any) -> ast.AST:
    # torch.clamp(x, ...) is x, x.clamp(...) is x.
    owner = found.func.value
    inner: ast.AST = found.args[0] if isinstance(owner, ast.Name) and owner.id == "torch" else owner
    return inner


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self._old, self._new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self._new if node is self._old else self.generic_visit(node)


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file."""
    source = (FOLDER / file).read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    found = []
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    decorators = {
        id(part) for node in classes for mark in node.decorator_list for part in ast.walk(mark)
    }
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in decorators:
            continue
        for name, change in changes(node):
            twin = copy.deepcopy(tree)
            target = list(ast.walk(twin))[index]
            new = change(target)
            if new is not None:
                twin = _Replace(target, new).visit(twin)
            line = getattr(node, "lineno", 0)
            ast.fix_missing_locations(twin)
            found.append(Mutant(file, line, lines[line - 1].strip(), name, twin))
    return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module of `learner_svc.algo` from a tree."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = f"learner_svc.algo.{mutant.file.removesuffix('.py')}"
        self._code = compile(mutant.tree, str(FOLDER / mutant.file), "exec")

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def get_code(self, fullname: str) -> Any:
        return self._code

    def get_source(self, fullname: str) -> None:
        return None


def test(mutant: Mutant | None, file: str) -> bool:
    """Whether the tests of a file fail on a mutant (or on the file as it is), in a fork."""
    child = os.fork()
    if child == 0:
        status = BROKEN
        try:
            os.setsid()
            signal.alarm(LIMIT_S)
            if mutant is not None:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                sys.meta_path.insert(0, _Finder(mutant))
            import pytest

            tests = [str(TESTS / name) for name in TESTS_OF[file]]
            # Imported before pytest could rewrite their assertions; they have none of ours.
            rewriting = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
            status = int(pytest.main(["-xq", "-p", "no:cacheprovider", *rewriting, *tests]))
        except BaseException:  # a fork never returns into its parent's program
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    if code == BROKEN:
        raise RuntimeError(f"the tests of {file} could not be run")
    return code != 0


def judge(mutant: Mutant) -> Fate:
    """Run one mutant."""
    started = time.monotonic()
    killed = test(mutant, mutant.file)
    return Fate(
        mutant.file,
        mutant.line,
        mutant.code,
        mutant.change,
        killed,
        "" if killed else EQUIVALENT.get(mutant.key, ""),
        round(time.monotonic() - started, 2),
    )


def prepare() -> None:
    """Import what every fork needs, once; nothing of `learner_svc.algo`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    import hypothesis
    import pytest
    import transformers

    import dataset_svc.__main__

    if importlib.util.find_spec("trl"):
        import trl.trainer.grpo_trainer
        import trl.trainer.rloo_trainer  # noqa: F401
    # The last two are what plugins and `conftest.py` import.
    assert all((pytest, transformers, hypothesis, dataset_svc))
    sys.dont_write_bytecode = False
    assert not any(name.startswith("learner_svc.algo.") for name in sys.modules)


def main(files: list[str], every: int) -> int:
    """Run every n-th mutant of the files; print the score of each file."""
    started = time.monotonic()
    prepare()
    if untold := {path.name for path in FOLDER.glob("[!_]*.py")} - set(TESTS_OF):
        print(f"TESTS_OF names no tests of {', '.join(sorted(untold))}")
        return 2
    for file in files:
        if test(None, file):
            print(f"{file}: its tests fail as it is; nothing to learn from mutants")
            return 2
    todo = [mutant for file in files for mutant in mutants(file)][::every]
    fates: list[Fate] = []
    with ThreadPoolExecutor(2) as pool:
        for fate in pool.map(judge, todo):
            fates.append(fate)
            if not fate.killed:
                kind = "equivalent" if fate.equivalent else "SURVIVED"
                print(f"{kind}: {fate.file}:{fate.line}: {fate.code} -> {fate.change}", flush=True)
    table = {}
    for file in [*files, "all"]:
        own = [fate for fate in fates if file in (fate.file, "all")]
        equal = sum(bool(fate.equivalent) for fate in own)
        killed = sum(fate.killed for fate in own)
        score = killed / max(len(own) - equal, 1)
        table[file] = {
            "mutants": len(own),
            "killed": killed,
            "equivalent": equal,
            "survived": len(own) - killed - equal,
            "score": round(score, 4),
        }
        print(f"{file:15} {killed:4} of {len(own):4} killed, {equal:3} equivalent: {score:.1%}")
    target = ROOT / "build" / "bench" / "mutate.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    left = [asdict(fate) for fate in fates if not fate.killed]
    seconds = round(time.monotonic() - started, 1)
    report = {
        "required": REQUIRED,
        "every": every,
        "scores": table,
        "not_killed": left,
        "seconds": seconds,
    }
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{seconds} s; {target.relative_to(ROOT)}")
    return 0 if table["all"]["score"] >= REQUIRED else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", choices=[[], *sorted(TESTS_OF)], metavar="FILE")
    parser.add_argument("--every", type=int, default=1, metavar="N")
    options = parser.parse_args()
    sys.exit(main(options.files or sorted(TESTS_OF), options.every))
