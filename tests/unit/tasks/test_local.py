"""What `regreen fix` reads of a project, without executing or asking anything."""

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from regreen.common.v1 import (
    CHANGE_KIND_ADD,
    CHANGE_KIND_DELETE,
    CHANGE_KIND_MODIFY,
    FileChange,
)
from regreen.pkgindex import IndexFile
from regreen.rpc.errors import FailedPrecondition, InvalidArgument, MissingDependency
from regreen.tasks import patch
from regreen.tasks.local import MAX_TREE_BYTES, detect, pack, project_files
from regreen.tasks.offers import neighbours

PYTHONS = ("3.9", "3.11", "3.13")
PYPROJECT = """
[project]
name = "Form_Letters"
version = "1.2"
requires-python = ">=3.10,<3.12"
dependencies = ["jinja2<3 ; python_version >= '3'", "form-letters[all]"]
[project.optional-dependencies]
test = ["pytest>=8"]
docs = ["sphinx"]
"""


def project(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_is_declared(tmp_path: Path) -> None:
    root = project(tmp_path, **{"pyproject.toml": PYPROJECT, "tests/test_a.py": ""})
    found = detect(root, PYTHONS)
    assert (found.name, found.version, found.python) == ("form-letters", "1.2", "3.11")
    assert [item.text for item in found.requirements] == ["jinja2<3", "pytest>=8"]
    assert (found.pins, found.test_arguments, found.installable) == ((), ("tests",), True)
    assert (found.origin, found.pin_files) == ("a fresh resolution", ("",))


def test_declarations_of_setup_cfg(tmp_path: Path) -> None:
    text = "[metadata]\nname = a\n[options]\npython_requires = <3.10\ninstall_requires =\n  six>1\n"
    text += "[options.extras_require]\ntests = nose\n"
    found = detect(project(tmp_path, **{"setup.cfg": text}), PYTHONS)
    assert (found.python, [item.text for item in found.requirements]) == ("3.9", ["six>1", "nose"])
    assert not found.installable


def test_pins_of_an_environment(tmp_path: Path) -> None:
    packages = ".venv/lib/python3.11/site-packages"
    root = project(
        tmp_path / "own",
        **{
            "setup.py": "raise SystemExit('never executed')",
            "requirements.txt": "six==0.1",
            ".venv/pyvenv.cfg": "version = 3.11.4\n",
            f"{packages}/six-1.16.0.dist-info/METADATA": "Name: six\nVersion: 1.16.0\n",
            f"{packages}/pip-24.0.dist-info/METADATA": "Name: pip\nVersion: 24.0\n",
            f"{packages}/own-1.dist-info/METADATA": "Name: own\nVersion: 1\n",
        },
    )
    found = detect(root, PYTHONS)
    assert (found.pins, found.python) == (("six==1.16.0",), "3.11")


def test_interpreters(tmp_path: Path) -> None:
    root = project(tmp_path, **{"requirements.lock": "# python==3.9\nsix==1\n"})
    assert detect(root, PYTHONS).python == "3.9"
    assert detect(root, PYTHONS, python="3.13").python == "3.13"
    project(root, **{".python-version": "3.12.1\n"})
    with pytest.raises(MissingDependency, match=r"uses Python 3\.12; found 3\.9, 3\.11, 3\.13"):
        detect(root, PYTHONS)
    (root / ".python-version").unlink()
    (root / "requirements.lock").unlink()
    project(root, **{"pyproject.toml": '[project]\nname="a"\nrequires-python=">=9.9"\n'})
    with pytest.raises(MissingDependency, match=r"needs Python >=9\.9"):
        detect(root, PYTHONS)


@pytest.mark.parametrize(
    ("files", "field"),
    [
        ({"README.md": "hello"}, "path"),
        ({"pyproject.toml": "[project\n"}, "pyproject.toml"),
        ({"setup.cfg": "name = a\n"}, "setup.cfg"),
        ({"pyproject.toml": '[project]\nrequires-python="new"\n'}, "requires-python"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        detect(project(tmp_path, **files), PYTHONS)
    assert refused.value.field == field
    assert refused.value.remedy or field == "path"


def test_a_named_lock_must_pin(tmp_path: Path) -> None:
    root = project(tmp_path, **{"setup.py": "", "some.txt": "six>=1\n"})
    with pytest.raises(InvalidArgument, match="no name==version line"):
        detect(root, PYTHONS, lock=root / "some.txt")


def test_the_archive_holds_the_project_and_nothing_else(tmp_path: Path) -> None:
    root = project(
        tmp_path / "p",
        **{"a.py": "a", "src/b.py": "b", ".git/config": "x", ".venv/x": "x", "a.egg-info/x": "x"},
        **{"build/lib/a.py": "x", "dist/a.whl": "x", "src/.tox/x": "x", "src/own/pyvenv.cfg": "x"},
        **{"src/build/__init__.py": "b", "src/dist/d.py": "d", "src/env/e.py": "e"},
        **{"src/venv/v.py": "v", "env/__init__.py": "e"},
    )
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    data, digest = pack(root)
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        assert archive.getnames() == [
            "a.py", "env/__init__.py", "src/b.py", "src/build/__init__.py", "src/dist/d.py",
            "src/env/e.py", "src/venv/v.py",
        ]  # fmt: skip
        assert {member.uid for member in archive} == {0}
    (root / "a.py").touch()
    assert pack(root)[1] == digest


def test_links_to_what_is_packed_are_packed_as_it(tmp_path: Path) -> None:
    root = project(tmp_path / "p", **{"src/b.py": "b", ".git/config": "password", ".venv/x": "x"})
    for name, target in {
        "a.py": "src/b.py", "src/absolute.py": root / "src/b.py", "twice.py": "a.py",
        "config": ".git/config", "installed": ".venv/x", "folder": "src", "circle": "circle",
        "nowhere": "absent", "out": "/etc/hostname", ".git_": "src/b.py",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)
    data, _ = pack(root)
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        packed = {member.name: archive.extractfile(member).read() for member in archive}
    assert packed == dict.fromkeys(
        ("a.py", "src/absolute.py", "twice.py", "src/b.py", ".git_"), b"b"
    )


def test_links_are_counted(tmp_path: Path) -> None:
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(MAX_TREE_BYTES // 3 + 1)
    for number in range(3):
        (tmp_path / f"again-{number}").symlink_to("large.bin")
    with pytest.raises(InvalidArgument, match="holds over"):
        list(project_files(tmp_path))


def test_a_huge_tree_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(MAX_TREE_BYTES + 1)
    with pytest.raises(InvalidArgument, match="holds over"):
        pack(tmp_path)


PINS = ["jinja2==2.11.3", "markupsafe==2.1.5"]


def lock(text: str) -> FileChange:
    return FileChange(path="requirements.lock", kind=CHANGE_KIND_MODIFY, content=text.encode())


def test_moved_pins_go_where_the_project_keeps_them(tmp_path: Path) -> None:
    text = "# web\nMarkupSafe[x] == 2.1.5 ; os_name != 'nt'  # why\n\njinja2==2.11.3\n"
    root = project(tmp_path, **{"requirements.txt": text})
    change = lock("# python==3.11\nmarkupsafe==2.0.1\nsix==1.0\n")
    moved = patch.moved_pins(PINS, [change])
    assert patch.describe_pins(PINS, moved) == (
        "markupsafe 2.1.5 -> 2.0.1", "six none -> 1.0", "jinja2 removed",
    )  # fmt: skip
    changes = patch.onto_project(root, ("requirements.txt",), PINS, [change])
    assert [c.path for c in changes] == ["requirements.txt"]
    assert changes[0].content.decode() == (
        "# web\nMarkupSafe[x] == 2.0.1 ; os_name != 'nt'  # why\n\nsix==1.0\n"
    )


def test_moved_pins_leave_other_lines_alone(tmp_path: Path) -> None:
    main = "jinja2==2.11.3 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\nsix==1.0\n"
    main += "markupsafe==1.0; python_version < '3'\nmarkupsafe>=2,<3 # why\n-r dev.txt\n"
    root = project(tmp_path, **{"requirements.txt": main, "dev.txt": "pytest==8.0\n"})
    pins = [*PINS, "six==1.0", "pytest==8.0.0"]
    text = "jinja2==3.0\nmarkupsafe==2.0.1\nsix==1.0\npytest==8.3\nnew==1\n"
    files = ("requirements.txt", "dev.txt")
    changes = patch.onto_project(root, files, pins, [lock(text)])
    assert {c.path: c.content.decode() for c in changes} == {
        "requirements.txt": "jinja2==3.0\nsix==1.0\nmarkupsafe==1.0; python_version < '3'\n"
        "markupsafe==2.0.1 # why\n-r dev.txt\nnew==1\n",
        "dev.txt": "pytest==8.3\n",
    }


def test_a_project_without_a_pin_file_gets_one(tmp_path: Path) -> None:
    changes = patch.onto_project(tmp_path, ("",), PINS, [lock("markupsafe==2.0.1\n")])
    assert [(c.path, c.kind) for c in changes] == [("requirements.lock", CHANGE_KIND_ADD)]


def test_the_diff_applies(tmp_path: Path) -> None:
    root = project(tmp_path / "p", **{"a.py": "one\ntwo\n", "gone.py": "x\n", "end.py": "no end"})
    changes = [
        FileChange(path="a.py", kind=CHANGE_KIND_MODIFY, content=b"one\n2\n"),
        FileChange(path="end.py", kind=CHANGE_KIND_MODIFY, content=b"still none"),
        FileChange(path="gone.py", kind=CHANGE_KIND_DELETE),
        FileChange(
            path="sub/new.py", kind=CHANGE_KIND_ADD, content=b"new\r\n\x0cline\n", mode=0o755
        ),
    ]
    text = patch.unified(root, changes)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", root, copy], check=True)
    subprocess.run(["git", "apply", "-"], input=text.encode(), cwd=copy, check=True)
    patch.apply(root, changes)
    for folder in (root, copy):
        found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.py")}
        assert found == {
            "a.py": b"one\n2\n", "end.py": b"still none", "sub/new.py": b"new\r\n\x0cline\n",
        }  # fmt: skip
        assert (folder / "sub/new.py").stat().st_mode & 0o100


@pytest.mark.parametrize("path", ["../out.py", "/etc/x", "link/x.py", "alias.py", ".git/config"])
def test_nothing_is_written_outside_the_project(tmp_path: Path, path: str) -> None:
    root = project(tmp_path / "p", **{"a.py": "a"})
    (root / "link").symlink_to(tmp_path)
    (root / "alias.py").symlink_to(tmp_path / "x.py")
    good = FileChange(path="a.py", kind=CHANGE_KIND_MODIFY, content=b"new")
    bad = FileChange(path=path, kind=CHANGE_KIND_ADD, content=b"x")
    with pytest.raises(FailedPrecondition, match="out of the project"):
        patch.apply(root, [good, bad])
    assert (root / "a.py").read_text() == "a"


class Shelf:
    """A package index in memory."""

    def __init__(self, *names: str) -> None:
        self.entries = [IndexFile(name, "", "0" * 64) for name in names]

    async def files(self, name: str) -> list[IndexFile]:
        return self.entries


async def test_other_releases_on_offer() -> None:
    new = [f"x-{v}-py3-none-any.whl" for v in ("2.1.0", "2.1.5", "2.2.0", "2.2.1", "3.0", "4.0rc1")]
    old = [f"x-{v}.tar.gz" for v in ("1.0", "1.1", "2.0.0", "2.0.1")]
    assert await neighbours(Shelf(*new, *old), "x==2.1.5", "3.11") == [
        "x==1.1", "x==2.0.1", "x==2.2.1", "x==3.0",
    ]  # fmt: skip
    wheels = [f"x-{v}-py3-none-any.whl" for v in ("1.0", "2.1.5")]
    assert await neighbours(Shelf(*wheels, *old), "x==2.1.5", "3.11") == ["x==1.0"]
