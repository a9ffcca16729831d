"""The scripts that run inside sandboxes, against hostile archives and odd locks."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from sandbox_svc.builders.inbox import looks, part, sync_env
from sandbox_svc.verdicts import belongs

INBOX = Path(sync_env.__file__).parent


def unpack(archive: Path, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
    python = [sys.executable, "-I", "-S"]
    command = [*python, str(INBOX / "unpack.py"), str(archive), str(target), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def tar_of(path: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(info)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_the_top_directory_is_stripped_and_modes_are_plain(tmp_path: Path) -> None:
    run = tarfile.TarInfo("p-1/run.sh")
    run.mode = 0o4755
    archive = tar_of(tmp_path / "a.tar.gz", ("p-1/x/y.py", b"y"), ("", run))
    assert unpack(archive, tmp_path / "out" / "repo").returncode == 0
    assert (tmp_path / "out/repo/x/y.py").read_bytes() == b"y"
    assert (tmp_path / "out/repo/run.sh").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("name", ["../evil", "/evil", "p-1/../../evil"])
def test_names_that_leave_are_refused(tmp_path: Path, name: str) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", (name, b"x"))
    done = unpack(archive, tmp_path / "out" / "repo")
    assert done.returncode == 2
    assert "leaves the target" in done.stderr
    assert not (tmp_path / "evil").exists()


def test_links_become_copies_and_never_leave(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path / "a.tar.gz",
        ("", special("p/to-link.txt", tarfile.SYMTYPE, "sub/to-later.txt")),
        ("", special("p/sub/to-later.txt", tarfile.SYMTYPE, "../a.txt")),
        ("p/a.txt", b"a"),
        ("", special("p/b.txt", tarfile.SYMTYPE, "a.txt")),
        ("", special("p/hard.txt", tarfile.LNKTYPE, "p/a.txt")),
        ("", special("p/itself", tarfile.SYMTYPE, "itself")),
        ("", special("p/nowhere", tarfile.SYMTYPE, "absent")),
    )
    assert unpack(archive, tmp_path / "out" / "repo").returncode == 0
    repo = tmp_path / "out" / "repo"
    found = {str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file()}
    assert found == {"a.txt", "b.txt", "hard.txt", "to-link.txt", "sub/to-later.txt"}
    for name in found:
        assert not (repo / name).is_symlink()
        assert (repo / name).read_bytes() == b"a"
    evil = tar_of(
        tmp_path / "b.tar.gz", ("", special("p/e", tarfile.SYMTYPE, "../../../etc/passwd"))
    )
    assert unpack(evil, tmp_path / "out" / "other").returncode == 2


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", ("", special("p/dev", kind)))
    assert unpack(archive, tmp_path / "out" / "repo").returncode == 2


def test_zip_and_overlay(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("p/src.py", "1")
        bundle.writestr("p/tests/old.py", "1")
    later = tar_of(tmp_path / "b.tar.gz", ("p/src.py", b"2"), ("p/tests/new.py", b"2"))
    repo = tmp_path / "out" / "repo"
    assert unpack(tmp_path / "a.zip", repo).returncode == 0
    assert unpack(later, repo, "--only", "tests").returncode == 0
    assert (repo / "src.py").read_text() == "1"
    assert [p.name for p in (repo / "tests").iterdir()] == ["new.py"]
    assert [p.name for p in repo.parent.iterdir()] == ["repo"]


def test_locks_are_read_as_the_validator_reads_them(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("# python==3.9\n# note\nA_b==1.0  # why\n\n")
    assert sync_env.read_lock(str(lock)) == ({"a-b": "1.0"}, "3.9")
    for text in ("a>=1\n", "a==1\nA==2\n"):
        lock.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            sync_env.read_lock(str(lock))
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        sync_env.read_lock(str(tmp_path / "absent"))


def test_only_offered_releases_become_requirements(capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads('{"a": {"1.0": [{"filename": "a.whl", "sha256": "00"}]}}')
    assert sync_env.hashed_requirements({"a": "1.0"}, index) == "a==1.0 --hash=sha256:00\n"
    with pytest.raises(SystemExit) as stopped:
        sync_env.hashed_requirements({"a": "2.0"}, index)
    assert stopped.value.code == 3
    assert "it has: 1.0" in capsys.readouterr().err


def test_installed_distributions_leave_the_project_out(tmp_path: Path) -> None:
    site = tmp_path / "lib" / "python3.9" / "site-packages"
    for name in (
        "Jinja2-3.0.dist-info",
        "my_project-1.dist-info",
        "x.pth",
        "ruamel.yaml-0.1.dist-info",
    ):
        (site / name).mkdir(parents=True)
    assert sync_env.installed(str(tmp_path), "my-project") == {
        "jinja2": "3.0",
        "ruamel-yaml": "0.1",
    }
    assert sync_env.same_version("1.0.post1", "1.0-post1")


class Lazy(ModuleType):
    """A module that loads others when it is touched."""

    woken: ClassVar[list[str]] = []

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        self.woken.append("__dict__")
        return {}

    def __getattr__(self, name: str) -> Any:
        self.woken.append(name)
        raise AttributeError(name)


def test_looking_at_a_lazy_module_does_not_wake_it() -> None:
    lazy = Lazy("lazy")
    ModuleType.__setattr__(lazy, "__file__", "/somewhere/lazy.py")
    Lazy.woken.clear()
    assert looks.places(lazy) == ["/somewhere/lazy.py/"]
    assert looks.inside(lazy, "/somewhere/")
    assert not looks.inside(lazy, "/elsewhere/")
    looks.shape({"lazy": lazy})
    assert not Lazy.woken
    assert vars(lazy) == {}, "what looking used to do"
    assert Lazy.woken


def test_what_belongs_to_a_chosen_place() -> None:
    tests = ("tests/a/test_b.py::TestC::test_d[1]", "tests/a/test_b.py::TestC::test_d")
    for chosen in ("tests", "tests/a/", "tests/a/test_b.py", "tests/a/test_b.py::TestC"):
        assert all(part.belongs(test, chosen) and belongs(test, chosen) for test in tests)
    assert part.belongs(tests[0], tests[1])
    assert not part.belongs(tests[1], tests[0])
    for chosen in ("test", "tests/a/test", "tests/a/test_b.py::TestC::test"):
        assert not any(part.belongs(test, chosen) or belongs(test, chosen) for test in tests)
