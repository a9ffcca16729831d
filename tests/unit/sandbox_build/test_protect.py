"""Which changes reach a validation."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iniconfig._parse import parse_lines
from iniconfig.exceptions import ParseError

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import FileChange, TestSpec
from sandbox_svc.builders.protect import (
    MAX_CHANGES,
    by_name,
    check_changes,
    check_path,
    protected_roots,
    protection,
    pytest_settings,
    split_changes,
)
from sandbox_svc.builders.standing import own_modules, own_names

ROOTS = protected_roots(TestSpec(arguments=("pkg/testing", "--deselect", "tests/a.py::test_b")))


FOREIGN = ("logging", "wordlib")


def reason(path: str, content: bytes = b"x") -> str:
    return protection(FileChange(path, content), ROOTS, {"setup.cfg": ""}, (), FOREIGN)


def test_roots_come_from_the_arguments() -> None:
    assert ROOTS == ("pkg/testing", "tests/a.py")
    assert protected_roots(TestSpec(arguments=(".",), protected_paths=("ci/",))) == ("ci",)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("pkg/__init__.py", ""),
        ("pkg/testing.py", ""),
        ("tests/a/__init__.py", "test"),
        ("pkg/test_it/__init__.py", ""),
        ("pkg/load_test/x.py", ""),
        ("pkg/test_it.abi3.so", "test"),
        ("pkg/test_it.pyd", "test"),
        ("conftest.cpython-311-x86_64-linux-gnu.so", "validation-configuration"),
        ("a/conftest/b.py", "validation-configuration"),
        ("docs/test.rst", ""),
        ("setup.py", ""),
        ("pkg/logging.py", ""),
        ("pkg/testing/data.json", "test"),
        ("other/tests/data.json", "test"),
        ("pkg/test_it.py", "test"),
        ("conftest.py", "validation-configuration"),
        ("a/b/conftest.py", "validation-configuration"),
        ("pytest.ini", "validation-configuration"),
        ("sitecustomize.py", "plugin"),
        ("src/x.egg-info/entry_points.txt", "plugin"),
        ("x-1.DIST-INFO/METADATA", "plugin"),
        ("x-1.dıst-info/METADATA", ""),
        ("x-1.ｄist-info/METADATA", "plugin"),
        ("x.EGG-LINK", "plugin"),
        ("x.egg/EGG-INFO/entry_points.txt", "plugin"),
        ("sitecustomize/__init__.py", "plugin"),
        ("sitecustomize/data.json", "plugin"),
        ("a/SiteCustomize/__init__.abi3.so", "plugin"),
        ("usercustomize.cpython-311-x86_64-linux-gnu.so", "plugin"),
        ("usercustomize.pyc", "plugin"),
        ("__pycache__/sitecustomize.cpython-311.pyc", "plugin"),
        ("docs/sitecustomize.md", ""),
        ("sitecustomize2.py", ""),
        ("python3._pth", "plugin"),
        ("src", "shadows"),
        ("lib", "shadows"),
        ("conftest/__init__.py", "validation-configuration"),
        ("pkg/pytest.toml", "validation-configuration"),
        ("a.pth", "plugin"),
        ("logging.py", "shadows"),
        ("wordlib.py", "shadows"),
        ("wordlib/__init__.py", "shadows"),
        ("src/wordlib.py", "shadows"),
        ("lib/wordlib.abi3.so", "shadows"),
        ("pkg/wordlib.py", ""),
        ("wordlib2.py", ""),
        ("wordlib/data.json", ""),
        ("wordlib/helper.py", ""),
        ("wordlib.pyd", "shadows"),
        ("src/wordlib/__init__.abi3.so", "shadows"),
        ("logging/handlers.txt", ""),
        ("logging/handlers.py", "shadows"),
        ("packaging/debian/control", ""),
        ("packaging/build.py", "shadows"),
        ("src/pytest/__init__.py", "shadows"),
        ("_pytest/x.py", "shadows"),
        ("a/__pycache__/b.pyc", "generated"),
        (".git/hooks/pre-commit", "repository-internals"),
        ("sub/.git/config", "repository-internals"),
    ],
)
def test_reasons(path: str, expected: str) -> None:
    assert reason(path) == expected


def test_a_module_that_the_repository_has_may_be_edited() -> None:
    change = FileChange("attr/_make.py", b"x")
    assert protection(change, (), {}) == "shadows"
    assert protection(change, (), {}, ["attr"]) == ""
    assert protection(FileChange("wordlib.py", b""), (), {}, ["wordlib"], FOREIGN) == ""


def test_a_folder_shadows_only_once_the_diff_makes_it_a_package() -> None:
    helper, init = (FileChange(f"wordlib/{n}.py", b"") for n in ("helper", "__init__"))
    kept, _, _ = split_changes([helper], (), {}, (), FOREIGN)
    assert kept == (helper,)
    _, reverted, _ = split_changes([helper, init], (), {}, (), FOREIGN)
    assert [(r.path, r.reason) for r in reverted] == [
        ("wordlib/helper.py", "shadows"),
        ("wordlib/__init__.py", "shadows"),
    ]
    kept, _, _ = split_changes([helper, FileChange(init.path, None)], (), {}, (), FOREIGN)
    assert helper in kept


def test_a_package_that_two_share_brings_no_module_of_the_other_one() -> None:
    foreign = {"acme", "acme.testing", "acme.deep", "acme.deep.one"}
    own = own_modules(["acme/core.py", "src/acme/more.py"], foreign)
    assert own == {"src"}  # a folder, of no installed package's name

    def reason(path: str) -> str:
        return protection(FileChange(path, b""), (), {}, own, foreign)

    for path in (
        *("acme/testing.py", "src/acme/testing/__init__.py", "acme/deep/one.abi3.so"),
        *("acme/__init__.py", "acme.py"),
    ):
        assert reason(path) == "shadows", path
    for path in ("acme/core.py", "acme/new.py", "acme/deep/two.py", "src/acme/other/testing.py"):
        assert not reason(path), path


def test_only_what_can_be_imported_is_the_repository_s_own() -> None:
    files = ["mock/data.py", "tool.py", "pack/__init__.py", "lib/quick.abi3.so", "docs/x/y.py"]
    foreign = {"mock", "pack"}
    assert own_modules(files, foreign) == {"tool", "pack", "lib/quick", "docs", "lib"}
    assert own_names(["pack/__init__.py", "src/pack/a/b.py"]) == {
        "pack",
        "src.pack.a.b",
        "pack.a.b",
    }


@pytest.mark.parametrize("folder", ["Tests", "TEST", "greet/Test"])
def test_folders_of_tests_are_compared_in_one_case(folder: str) -> None:
    assert by_name(f"{folder}/helper.py", ()) == "test"


def test_the_environment_adds_arguments() -> None:
    added = {"PYTEST_ADDOPTS": "-c ci/t.ini --rootdir=/work/repo '/work/repo/spec/../checks'"}
    test = TestSpec(arguments=("./tests/",), environment=added)
    assert protected_roots(test) == ("checks", "ci/t.ini", "tests")


@pytest.mark.parametrize(
    ("arguments", "added", "problem"),
    [
        (("@ci/args.txt",), "", "names a file of arguments"),
        (("tests",), "-q @ci/args.txt", "names a file of arguments"),
        (("tests",), "-k 'open", "cannot be read"),
    ],
)
def test_arguments_that_a_diff_could_change_are_refused(
    arguments: tuple[str, ...], added: str, problem: str
) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        protected_roots(TestSpec(arguments=arguments, environment={"PYTEST_ADDOPTS": added}))


def test_settings_files_are_kept_while_pytest_part_is_the_same() -> None:
    build = b"[options]\ninstall_requires = x\n"
    assert reason("setup.cfg", build) == ""
    assert reason("setup.cfg", build + b"[tool:pytest]\naddopts=-x\n") == "validation-configuration"
    assert reason("pyproject.toml", b"[tool.black]\n") == ""
    assert reason("pyproject.toml", b"[tool.pytest.ini_options]\n") == "validation-configuration"
    assert reason("pyproject.toml", b"not toml [") == "validation-configuration"
    assert pytest_settings("tox.ini", b"[pytest]\nx=1\n") == pytest_settings(
        "tox.ini", b"[other]\n[pytest]\nx = 1\n"
    )


@pytest.mark.parametrize(
    "content",
    [
        b"[pytest] # ]\npythonpath = evil\n",
        b"[pytest] ; x\npythonpath = evil\n",
        b"[tox]\nx = 1\x0c[pytest]\npythonpath = evil\n",
        b"[tox]\nx = 1\xe2\x80\xa8[tool:pytest]\npythonpath = evil\n",
        b"[tox]\r[pytest]\rpythonpath = evil\r",
        b"[ pytest ]\nx = 1\n",
        b"[tox]\nx = \x0c\n[pytest\xe3\x80\x80]\nx = 1\n",
        b"\xef\xbb\xbf[pytest]\nx = 1\n",
    ],
)
def test_settings_are_read_as_pytest_reads_them(content: bytes) -> None:
    for name in ("tox.ini", "setup.cfg"):
        assert pytest_settings(name, content)
        assert reason(name, content) == "validation-configuration"
    assert not pytest_settings("tox.ini", b"# [pytest]\n [pytest]\n[pytestx]\na = [pytest]\n")


@pytest.mark.parametrize("header", ["[ pytest]", "[pytest ]", "[pytest\u3000]", "[\tpytest]"])
def test_a_blank_in_a_header_makes_it_another_section(header: str) -> None:
    kept = pytest_settings("tox.ini", b"[pytest]\nfilterwarnings = error\n")
    changed = f"{header}\nfilterwarnings = error\n".encode()
    assert pytest_settings("tox.ini", changed) not in ("", kept)
    assert protection(FileChange("tox.ini", changed), (), {"tox.ini": kept}) != ""


def test_settings_at_depth_are_compared_with_those_of_the_same_path() -> None:
    part = b"[tool.pytest.ini_options]\nx = 1\n"
    kept = {"a/pyproject.toml": pytest_settings("pyproject.toml", part), "b/pyproject.toml": ""}

    def why(path: str, content: bytes | None) -> str:
        return protection(FileChange(path, content), ("b/c/tests", "d/tests"), kept)

    assert why("a/pyproject.toml", part + b"[tool.black]\n") == ""
    assert why("a/pyproject.toml", b"[tool.black]\n") == "validation-configuration"
    assert why("a/pyproject.toml", None) == "validation-configuration"
    assert why("b/pyproject.toml", b"[tool.black]\n") == ""
    assert why("b/pyproject.toml", part) == "validation-configuration"
    assert why("e/tox.ini", b"[pytest]\n") == "validation-configuration"
    assert why("e/pyproject.toml", b"[tool.black]\n") == ""
    assert why("d/pyproject.toml", b"[tool.black]\n") == "validation-configuration", "a new root"


def test_roots_hold_the_settings_that_the_arguments_name() -> None:
    named = ("-cci/a.ini", "--config-file=ci/b.ini", "--inifile=./ci/c.ini", "-c", "ci/d.ini")
    roots = protected_roots(TestSpec(arguments=(*named, "--cov=x", "./tests/unit")))
    assert roots == ("ci/a.ini", "ci/b.ini", "ci/c.ini", "ci/d.ini", "tests/unit")


def test_lock_is_apart_and_reverted_are_listed() -> None:
    changes = [
        FileChange("requirements.lock", b""),
        FileChange("conftest.py", b""),
        FileChange("a", b""),
    ]
    kept, reverted, lock = split_changes(changes, ROOTS, {})
    assert [c.path for c in kept] == ["a"]
    assert [r.path for r in reverted] == ["conftest.py"]
    assert lock is changes[0]


@given(st.text(max_size=60))
def test_accepted_paths_stay_inside(path: str) -> None:
    try:
        check_path(path)
    except InvalidArgument:
        return
    assert not path.startswith("/")
    assert ".." not in path.split("/")
    assert "\0" not in path
    assert "\n" not in path


def test_bounds() -> None:
    with pytest.raises(InvalidArgument, match=r"^changes\[2\]\.path: names a again"):
        check_changes([FileChange("a", b""), FileChange("0", b""), FileChange("a", None)])
    with pytest.raises(InvalidArgument, match=r"^changes\[1\]\.path: '/b' is not relative"):
        check_changes([FileChange("c", b""), FileChange("/b", b"")])
    with pytest.raises(InvalidArgument, match="at most"):
        check_changes([FileChange(f"f{n}", b"") for n in range(MAX_CHANGES + 1)])
    with pytest.raises(InvalidArgument, match=r"^changes\[0\]\.content: a is too large"):
        check_changes([FileChange("a", bytes((8 << 20) + 1))])


_BLANKS = st.sampled_from(
    [" ", "\t", "\x0c", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\n", "\r"]
)
_MARKS = st.sampled_from(["[", "]", "#", ";", "=", ":", "a", "\ufeff", "[pytest]", "\n[tox]\n"])
_INI = st.sampled_from(
    [
        "[tox]\nx = 1\n[pytest]\na = 1\n b = 3\nc : 2\n [d\n",
        "[tool:pytest]\na = x=1\n y : 2\n  error::Warning\n[tox]\n",
        "[tox]\nx = 1\x0c[pytest]\na = 1\n",
    ]
)


@st.composite
def _edited(draw: st.DrawFn) -> tuple[str, str]:
    """A file of settings, and the same after a few small edits."""
    before = after = draw(_INI)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(after)))
        end = min(len(after), place + draw(st.integers(0, 1)))
        after = after[:place] + draw(st.one_of(_BLANKS, _MARKS, st.just(""))) + after[end:]
    return before, after


def _as_its_parser_reads(text: str) -> list[dict[str, dict[str, str]]]:
    """pytest's sections as iniconfig finds them; before its version 2 a line ended at its end.

    Raises:
        ParseError: it cannot read them, and pytest does not start.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = []
    for lines in (text.splitlines(True), [line + "\n" for line in text.split("\n")]):
        sections: dict[str, dict[str, str]] = {}
        for number, section, name, value in parse_lines("x", lines):
            if section is None:
                raise ParseError("x", number, "no section header defined")
            if section in ("pytest", "tool:pytest"):
                values = sections.setdefault(section, {})
                if name is not None:
                    values[name] = "\n".join(value or ())
        found.append(sections)
    return found


@settings(max_examples=3000, deadline=None)
@given(_edited())
def test_no_edit_of_settings_goes_unseen(edited: tuple[str, str]) -> None:
    read = []
    for text in edited:
        with contextlib.suppress(ParseError):
            read.append(_as_its_parser_reads(text))
    before, after = (pytest_settings("tox.ini", text.encode()) for text in edited)
    if len(read) == 2 and before == after:
        assert read[0] == read[1]
