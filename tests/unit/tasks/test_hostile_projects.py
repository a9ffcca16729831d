"""Repositories and projects made to do harm: nothing of them runs, nothing outside them is read."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument
from regreen.tasks import repository
from regreen.tasks.add import told_apart
from regreen.tasks.checkout import Wish, check_out
from regreen.tasks.declared import read_declared
from regreen.tasks.local import detect, pack, project_files
from regreen.tasks.pin import Pinner
from regreen.tasks.repository import name_of, shown
from regreen.tasks.wanted import Requirements

SECRET = "hunter2"
HERE = ["3.11"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home with a secret file in it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "secret.txt").write_text(f"{SECRET} is the password\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return home


@pytest.fixture
def project(tmp_path: Path, home: Path) -> Path:
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nname = "own"\nversion = "1"\n')
    (root / "tests/test_own.py").write_text("def test_own():\n    assert False\n")
    return root


def git(root: Path, *words: str) -> str:
    argv = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org",
            "-c", "protocol.file.allow=always", *words]  # fmt: skip
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null"}
    done = subprocess.run(argv, cwd=root, env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def committed(root: Path) -> str:
    if not (root / ".git").exists():
        git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "as it is")
    return git(root, "rev-parse", "HEAD")


def url(root: Path) -> str:
    return f"file://{root}"


def test_filters_that_the_user_has_do_not_run(project: Path, home: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    (home / "attributes").write_text("*.py filter=spy\n")
    (home / ".gitconfig").write_text(
        f'[filter "spy"]\n\tsmudge = touch {told}; cat\n\tprocess = touch {told}\n'
        f"[core]\n\tattributesFile = {home}/attributes\n\tautocrlf = true\n"
    )
    (project / ".gitattributes").write_text("* filter=spy\n")
    committed(project)
    told.unlink(missing_ok=True)
    (tmp_path / "work").mkdir()
    found = check_out(url(project), Wish(), tmp_path / "work")
    assert b"\r" not in (found.broken / "tests/test_own.py").read_bytes()
    assert not told.exists()


def test_a_submodule_is_not_fetched(project: Path, tmp_path: Path, home: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "stolen.txt").write_text("x")
    committed(other)
    committed(project)
    git(project, "submodule", "add", "--quiet", url(other), "inner")
    committed(project)
    (home / ".gitconfig").write_text(
        "[submodule]\n\trecurse = true\n[protocol]\n\tallow = always\n"
    )
    (tmp_path / "work").mkdir()
    found = check_out(url(project), Wish(), tmp_path / "work")
    assert not list(tmp_path.glob("work/**/stolen.txt"))
    assert "inner" not in "".join(map(str, project_files(found.broken)))


def test_links_out_of_a_repository_are_not_followed(
    project: Path, home: Path, tmp_path: Path
) -> None:
    (project / "requirements.txt").symlink_to(home / "secret.txt")
    (project / ".python-version").symlink_to("loop")
    (project / "loop").symlink_to(".python-version")
    (project / "docs").symlink_to("/etc")
    (project / "inner.txt").symlink_to("pyproject.toml")
    committed(project)
    (tmp_path / "work").mkdir()
    found = check_out(url(project), Wish(), tmp_path / "work")
    assert not (found.broken / "requirements.txt").is_symlink()
    assert not (found.broken / "docs").is_symlink()
    assert (found.broken / "inner.txt").is_symlink()
    assert not detect(found.broken, HERE).pins
    with pytest.raises(InvalidArgument) as caught:
        detect(project, HERE)
    assert "is a link out of the repository" in caught.value.message
    assert SECRET not in caught.value.message


def written(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.write_text(text)


OUTSIDE = {
    "requirements.txt": "-r ../home/secret.txt\n",
    "requirements-dev.txt": "-c ../home/secret.txt\n",
    "pyproject.toml": (
        '[project]\nname = "own"\ndynamic = ["dependencies"]\n[tool.setuptools.dynamic]\n'
        'dependencies = { file = ["../home/secret.txt"] }\n'
    ),
    "setup.cfg": "[options]\ninstall_requires = file: ../home/secret.txt\n",
}


@pytest.mark.parametrize("name", list(OUTSIDE))
def test_no_requirement_is_read_from_outside(project: Path, name: str) -> None:
    if name == "setup.cfg":
        (project / "pyproject.toml").unlink()
    (project / name).write_text(OUTSIDE[name])
    with pytest.raises(InvalidArgument) as caught:
        detect(project, HERE)
    assert "secret.txt: is outside of the repository" in caught.value.message
    assert SECRET not in caught.value.message


def test_a_project_inside_a_repository_may_use_its_files(project: Path, tmp_path: Path) -> None:
    (project / "requirements.txt").write_text("-r ../common.txt\n")
    (tmp_path / "common.txt").write_text("wordlib==2.0\n")
    (tmp_path / ".git").mkdir()
    assert detect(project, HERE).pins == ("wordlib==2.0",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[fix]\npatch = '../home/secret.txt'\n", "fix.patch: leaves the repository"),
        ("[fix]\npatch = '/etc/passwd'\n", "fix.patch: leaves the repository"),
        ('[task]\nid = "a\\u001b"\n', "task.id: is"),
        ('[task]\nlicence = "a\\u001b[2J"\n', "task.licence: is"),
        ("[task]\ntimeout_s = inf\n", "timeout_s: is inf; give 1 to 86400 seconds"),
        ("[task]\ntimeout_s = nan\n", "timeout_s: is nan"),
        ("[task]\ntimeout_s = 1e300\n", r"timeout_s: is 1e\+300"),
        ("[task]\npath = '../home'\n", "task.path: '../home' is no directory inside it"),
        ('[task]\npath = "a\\u0000"\n', "task.path"),
        (f"a = {'[' * 50_000}", "cannot be read: maximum recursion"),
        ("x" * (17 << 20), "task.toml: is too large"),
    ],
    ids=range(11),
)
def test_a_hostile_task_toml_is_refused(
    project: Path, text: str, said: str, tmp_path: Path
) -> None:
    (project / "task.toml").write_text(text)
    with pytest.raises(InvalidArgument, match=said):
        check_out(str(project), Wish(), tmp_path)


def test_a_task_toml_that_is_a_link_or_a_pipe_is_refused(
    project: Path, home: Path, tmp_path: Path
) -> None:
    (project / "task.toml").symlink_to(home / "secret.txt")
    with pytest.raises(InvalidArgument, match=r"task.toml: is a link out of the repository"):
        check_out(str(project), Wish(), tmp_path)
    (project / "task.toml").unlink()
    os.mkfifo(project / "task.toml")
    with pytest.raises(InvalidArgument, match=r"task.toml: is no file"):
        check_out(str(project), Wish(), tmp_path)


NAMES = ["pyproject.toml", "setup.cfg", "requirements.txt", "requirements.lock", "uv.lock",
         ".python-version"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_pipe_is_never_waited_for(project: Path, name: str) -> None:
    if name == "setup.cfg":
        (project / "pyproject.toml").unlink()
    (project / name).unlink(missing_ok=True)
    os.mkfifo(project / name)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match=f"{name}: is no file"):
        detect(project, HERE)
    assert time.monotonic() - began < 5


DEEP = [
    ("pyproject.toml", f"a = {'[' * 50_000}", "pyproject.toml: is nested too deeply"),
    ("uv.lock", f"a = {'[' * 50_000}", "uv.lock: maximum recursion"),
    ("requirements.txt", f"a ; {'(' * 20_000}os_name == 'a'", "requirements.txt line 1"),
]


@pytest.mark.parametrize(("name", "text", "said"), DEEP)
def test_what_is_nested_deeply_is_refused(project: Path, name: str, text: str, said: str) -> None:
    (project / name).write_text(text)
    with pytest.raises(InvalidArgument, match=said):
        detect(project, HERE)


def test_groups_that_include_each_other_deeply_are_refused(project: Path) -> None:
    groups = "".join(f"g{n} = [{{include-group = 'g{n + 1}'}}]\n" for n in range(3000))
    (project / "pyproject.toml").write_text(f"[dependency-groups]\n{groups}g3000 = []\n")
    with pytest.raises(InvalidArgument, match=r"pyproject.toml: declares what cannot be read"):
        read_declared(project)


def test_a_line_of_spaces_takes_no_time(project: Path) -> None:
    (project / "requirements.txt").write_text(f"wordlib{' ' * 200_000}==2.0 # why\n")
    began = time.process_time()
    asked = Requirements(project, read_declared(project), "3.11")
    asked.add_file(project / "requirements.txt")
    assert [wanted.pin for wanted in asked.wanted] == ["wordlib==2.0"]
    assert time.process_time() - began < 5


def large(root: Path) -> None:
    with (root / "large.bin").open("wb") as target:
        target.truncate(1 << 40)


def crowded(root: Path) -> None:
    for number in range(60):
        (root / f"{number}.txt").touch()


@pytest.mark.parametrize("made", [large, crowded])
def test_a_tree_is_bounded_before_it_is_read(
    project: Path, made: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regreen.tasks.local.MAX_TREE_FILES", 50)
    made(project)
    with pytest.raises(InvalidArgument, match="path: holds over 256 MiB or 50 files"):
        pack(project)
    with pytest.raises(InvalidArgument, match="path: holds over 256 MiB or 50 files"):
        told_apart(project, tmp_path / "home")


def test_a_repository_that_unfolds_is_not_written(project: Path, tmp_path: Path) -> None:
    """Ten trees of ten times the one below each: a few objects name ten million files."""
    committed(project)
    blob = git(project, "rev-parse", "HEAD:pyproject.toml")
    tree = f"100644 blob {blob}\tf"
    for _ in range(7):
        made = subprocess.run(
            ["git", "mktree"], cwd=project, input=tree, capture_output=True, text=True, check=True
        ).stdout.strip()
        tree = "\n".join(f"040000 tree {made}\td{n}" for n in range(10))
    bomb = git(project, "commit-tree", made, "-m", "bomb")
    git(project, "branch", "bomb", bomb)
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidArgument, match="commit: 'origin/bomb' has more than 200000 files"):
        check_out(url(project), Wish(commit="origin/bomb"), tmp_path / "work")
    assert not (tmp_path / "work/broken").exists()


def test_a_deep_repository_is_not_written(project: Path, tmp_path: Path) -> None:
    deep = project / "/".join("d" * 150)
    deep.mkdir(parents=True)
    (deep / "f").touch()
    committed(project)
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidArgument, match="commit: 'HEAD' has folders more than 100 deep"):
        check_out(url(project), Wish(), tmp_path / "work")


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{SECRET}@127.0.0.1:1/team/repo.git",
        f"https://{SECRET}@127.0.0.1:1/team/repo.git",
        f"https://a:b@{SECRET}@127.0.0.1:1/repo.git",
        f"git+https://user:{SECRET}@127.0.0.1:1/repo.git?token={SECRET}",
        f"https://user:{SECRET}@127.0.0.1:1",
    ],
)
def test_a_password_in_an_address_is_told_nobody(address: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be cloned") as caught:
        check_out(address, Wish(), tmp_path)
    assert SECRET not in caught.value.message
    assert SECRET not in name_of(address)
    assert SECRET not in str(list(tmp_path.rglob("*")))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("ext::sh -c touch% told", "is no directory"),
        ("git+ext::sh -c touch% told", "is no directory"),
        ("--upload-pack=touch told", "is no directory"),
        ("-u@host:touch", "is no directory"),
        ("ssh://-oProxyCommand=touch%20told/x", "cannot be cloned"),
        ("fd::3", "is no directory"),
    ],
)
def test_an_address_is_no_option_and_no_command(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidArgument, match=said):
        check_out(source, Wish(), tmp_path / "work")
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize("commit", ["--upload-pack=x", "-b", "a b", "HEAD@{1}", "a:b", "\x1b[2J"])
def test_a_commit_is_no_option(project: Path, commit: str, tmp_path: Path) -> None:
    committed(project)
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidArgument, match=r"commit: .* is no commit"):
        check_out(url(project), Wish(commit=commit), tmp_path / "work")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_transfer_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 300\n")
    slow.chmod(0o755)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(slow))
    monkeypatch.setattr(repository, "TIMEOUT_S", 1.0)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="did not end in 1 s"):
        check_out("ssh://host/repo", Wish(), tmp_path)
    assert time.monotonic() - began < 30
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() - began < 30 and alive(pid):
        time.sleep(0.05)
    assert not alive(pid)


def test_what_a_server_says_is_shown_as_text() -> None:
    assert shown("remote: \x1b[31mred\x07 https://a:b@h/x?t=1") == "remote:  [31mred  https://h/x"


def test_a_fix_of_a_file_without_a_name_is_refused(project: Path, tmp_path: Path) -> None:
    (project / os.fsdecode(b"\xff.py")).write_text("x = 1\n")
    with pytest.raises(InvalidArgument, match=r"fix: .* is no name in Unicode"):
        told_apart(project, tmp_path / "home")


async def test_the_project_that_somebody_stands_in_chooses_no_index(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of uv in the working directory would send its requests where the project says."""
    from regreen.pkgindex import PackageIndex, find_uv, index_urls
    from regreen.rpc.errors import NotFound

    evil = "http://127.0.0.1:9/evil/"
    (project / "uv.toml").write_text(f'[[index]]\nurl = "{evil}"\ndefault = true\n')
    monkeypatch.chdir(project)
    names = ("REGREEN_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL",
             "PIP_CONFIG_FILE")  # fmt: skip
    plain = {n: v for n, v in os.environ.items() if n not in names}
    assert evil not in index_urls({**plain, "HOME": str(project.parent / "home")})
    (project / "uv.toml").write_text('no-such-setting = "refused where it is read"\n')
    async with PackageIndex(["http://127.0.0.1:9/simple/"]) as index:
        with pytest.raises(NotFound) as caught:
            await Pinner(index, find_uv()).resolve(["wordlib"], "3.11")
    assert "no-such-setting" not in caught.value.message
