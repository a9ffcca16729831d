"""A start that puts the repository off ends where every other start does, on each interpreter."""

import os
import subprocess
from pathlib import Path

import pytest

from regreen.pkgindex import find_uv
from regreen.rpc.errors import MissingDependency
from sandbox_svc.builders.inbox import start
from sandbox_svc.builders.interpreters import find_interpreter

SHOWS = f"""
import sys
here = {str(Path(start.__file__).parent)!r}
sys.path[:] = sys.path[1:]
if sys.flags.no_site:
    space = {{"__name__": "start"}}
    exec(open(here + "/start.py").read(), space)
    space["as_usual"]()
import builtins, os, site, subprocess
print(sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.flags, tuple(sys.flags))
print([getattr(sys.flags, n) for n in dir(type(sys.flags)) if n[:2] not in ("__", "n_")
       and n not in ("count", "index")])
print(getattr(sys, "orig_argv", None), sys.argv, sorted(vars(builtins)))
print(site.ENABLE_USER_SITE, site.PREFIXES, subprocess._args_from_interpreter_flags())
print(sorted(n for n in os.environ if n.startswith(("PYTHON", "REGREEN"))), sys.warnoptions)
print("mark" in sys.modules, "sitecustomize" in sys.modules)
"""


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("places", ["", ":src:../more"])
def test_it_is_as_after_any_other_start(tmp_path: Path, version: str, places: str) -> None:
    try:
        python = find_interpreter(version).executable
    except MissingDependency as error:
        pytest.skip(str(error))
    env, repo = tmp_path / "env", tmp_path / "repo"
    subprocess.run([find_uv(), "venv", "-q", "-p", str(python), str(env)], check=True)
    for folder in (repo / "src", tmp_path / "more", tmp_path / "script"):
        folder.mkdir(parents=True)
    (repo / "mark.py").write_text("")
    (repo / "sitecustomize.py").write_text("")
    (tmp_path / "script" / "show.py").write_text(SHOWS)
    site = next((env / "lib").glob("python*")) / "site-packages"
    (site / "project.pth").write_text(f"{repo}\nimport mark\n")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "REGREEN"))}
    plain["PYTHONWARNINGS"] = "ignore"

    def shown(*options: str, **more: str) -> str:
        command = [str(env / "bin" / "python"), *options, str(tmp_path / "script" / "show.py")]
        done = subprocess.run(
            command, cwd=repo, env={**plain, **more}, capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    usual = shown(**({"PYTHONPATH": places} if places else {}))
    assert "True True" in usual
    assert shown("-S", **({"REGREEN_PYTHONPATH": places} if places else {})) == usual
    assert shown("-S") != usual or not places
