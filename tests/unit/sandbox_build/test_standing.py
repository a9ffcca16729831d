"""What a State's verdicts stand on, and what a path that a run wrote is to them."""

from dataclasses import replace
from typing import Any

import pytest

from regreen.rpc.errors import InvalidArgument
from sandbox_svc.builders.base import REPO
from sandbox_svc.builders.kinds import Kind, Kinds
from sandbox_svc.builders.modules import as_source, given, hidden
from sandbox_svc.builders.protect import by_name
from sandbox_svc.builders.standing import Where, learned, refuse_loose

SITE = "/work/env/lib/python3.11/site-packages"
FACTS = {
    "protected": ["tests"],
    "settings": {"setup.cfg": ""},
    "modules": ["greet", "tests"],
    "foreign": ["wordlib", "json", "token"],
    "spec": {
        "package": "greet",
        "test": {"fail_to_pass": ["tests/test_a.py::test_a"], "protected_paths": []},
    },
}
HELD = [
    *("greet/__init__.py", "greet/more.py", "greet/api/call.py", "greet/api/test_call.py"),
    *("python/extra.py", "tests/conftest.py", "tests/helper.py", "tests/test_a.py"),
    *("tests/pack/__init__.py", "tests/pack/test_b.py", "checks/check_c.py", "docs/conf.py"),
]
WHERE = Where(
    places=(f"{REPO}/tests", f"{REPO}/python", REPO, SITE, "/usr/lib/python3.11"),
    files=(f"{REPO}/tests/test_a.py", f"{REPO}/checks/check_c.py", f"{REPO}/docs/use.rst"),
    others=(("greet/more.py::greet.more", f"{REPO}/greet/more.py"), ("x::y", f"{SITE}/x.py")),
    rewritten=("conftest.py", "test_*.py"),
)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return learned(FACTS, WHERE, HELD)


def test_what_is_learned(facts: dict[str, Any]) -> None:
    assert set(facts["protected"]) == {
        *("tests", "tests/test_a.py", "checks/check_c.py", "docs/use.rst"),
        *("=tests.py", "=tests/__init__.py", "=checks.py", "=checks/__init__.py"),
        *("=greet/api.py", "=greet/api/__init__.py"),
    }
    assert set(facts["modules"]) == {"greet", "tests", "python/extra"} | {
        f"tests/{name}" for name in ("conftest", "helper", "test_a", "pack")
    }
    assert facts["folders"] == ["checks", "greet/api", "tests", "tests/pack"]
    assert set(facts["stems"]) == {
        *("conftest", "helper", "test_a", "test_b", "test_call", "check_c"),
        *("tests", "pack", "checks", "api"),
    }
    assert facts["loose"] == ["greet/more.py::greet.more"]


def test_source_beside_tests_is_not_theirs(facts: dict[str, Any]) -> None:
    roots = facts["protected"]
    for path in ("greet/api/call.py", "greet/api/new/x.py", "checks/helper.py"):
        assert not by_name(path, roots)
    for path in ("greet/api.py", "greet/api.abi3.so", "greet/api/__init__.so", "checks.so"):
        assert by_name(path, roots) == "test"
    told = replace(WHERE, roots=(f"{REPO}/checks", f"{REPO}/greet", REPO, f"{REPO}/src", "/x"))
    roots = learned(FACTS, told, HELD)["protected"]
    assert by_name("checks/helper.py", roots) == "test"
    assert not by_name("greet/more.py", roots)
    assert not by_name("src/more.py", roots)


def test_plugins_that_are_loaded_by_name_are_the_states(facts: dict[str, Any]) -> None:
    told = replace(WHERE, plugins=(f"{REPO}/greet/plug.py", f"{SITE}/other.py"))
    found = learned(FACTS, told, HELD)
    assert by_name("greet/plug.py", found["protected"]) == "test"
    assert by_name("greet/plug/__init__.py", found["protected"]) == "test"
    assert found["stems"] == facts["stems"]
    assert found["folders"] == facts["folders"]


def test_a_test_that_may_be_edited_is_not_asked_for(facts: dict[str, Any]) -> None:
    refuse_loose(["tests/test_a.py::test", "x::y"], facts, "required_tests")
    with pytest.raises(InvalidArgument, match=r"greet\.more.*test\.protected_paths"):
        refuse_loose(["greet/more.py::greet.more"], facts, "required_tests")
    kept = {**FACTS, "protected": ["tests", "greet/more.py"]}
    assert learned(kept, WHERE, HELD)["loose"] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tests/helper.py", ("tests", "helper")),
        ("helper.cpython-311-x86_64-linux-gnu.so", ("", "helper")),
        ("a/b/__init__.pyc", ("a", "b")),
        ("b/__init__.abi3.so", ("", "b")),
        ("tests/helper", ("tests", "helper")),
        ("tests/helper.txt", None),
        ("tests/not-one.py", None),
        ("tests/__pycache__/helper.cpython-311.pyc", None),
        ("__init__.py", None),
    ],
)
def test_the_module_of_an_entry(path: str, expected: tuple[str, str] | None) -> None:
    assert given(path) == expected


def test_what_an_entry_stands_before() -> None:
    assert list(hidden("a/b/__init__.py")) == ["a/b.py"]
    assert list(hidden("a/b/__init__.so")) == ["a/b.py", "a/b/__init__.py"]
    assert list(hidden("a/b.abi3.so")) == ["a/b.py"]
    assert list(hidden("b")) == ["b.py"]
    assert not list(hidden("a/b.py"))
    assert not list(hidden("a/b.pyc"))
    assert as_source("a/b.abi3.so") == "a/b.py"
    assert as_source("a/b.txt") == "a/b.txt"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (f"{REPO}/tests/helper.py", Kind.TAKEN_UP),
        (f"{REPO}/tests/pack/helper.pyc", Kind.TAKEN_UP),
        (f"{REPO}/tests/helper/__init__.pyc", Kind.TAKEN_UP),
        (f"{REPO}/tests/helper", Kind.LINK),
        (f"{REPO}/tests/data", Kind.STATES),
        (f"{REPO}/tests/new/helper.py", Kind.STATES),
        (f"{REPO}/tests/new/conftest.py", Kind.STATES),
        (f"{REPO}/tests/new/pytest.ini", Kind.STATES),
        (f"{REPO}/tests/new/setup.cfg", Kind.STATES),
        (f"{REPO}/tests/new/.", None),
        (f"{REPO}/tests/new/", Kind.TAKEN_UP),
        (f"{REPO}/out/tests/conftest.py", Kind.STATES),
        (f"{REPO}/out/conftest.py", Kind.STATES),
        (f"{REPO}/out/pyvenv.cfg", None),
        (f"{REPO}/out/new.pth", None),
        (f"{REPO}/sitecustomize.py", Kind.TAKEN_UP),
        (f"{REPO}/tests/sitecustomize/x.py", Kind.TAKEN_UP),
        (f"{REPO}/conftest.py", Kind.TAKEN_UP),
        (f"{REPO}/greet/conftest.py", Kind.TAKEN_UP),
        (f"{REPO}/checks/conftest.so", Kind.TAKEN_UP),
        (f"{REPO}/conftest/__init__.py", Kind.TAKEN_UP),
        (f"{REPO}/tests.py", Kind.TAKEN_UP),
        (f"{REPO}/tests/__init__.py", Kind.TAKEN_UP),
        (f"{REPO}/checks/__init__.py", Kind.TAKEN_UP),
        (f"{REPO}/greet/new.py", None),
        (f"{REPO}/greet/wordlib.py", None),
        (f"{REPO}/python/wordlib.py", Kind.TAKEN_UP),
        (f"{REPO}/wordlib.pyc", Kind.TAKEN_UP),
        (f"{REPO}/src/wordlib/__init__.so", Kind.TAKEN_UP),
        (f"{REPO}/src", Kind.TAKEN_UP),
        (f"{REPO}/token", Kind.LINK),
        (f"{REPO}/setup.cfg", Kind.STATES),
        (f"{SITE}/wordlib/__init__.pyc", Kind.TAKEN_UP),
        (f"{SITE}/wordlib", Kind.LINK),
        (f"{SITE}/other.py", Kind.STATES),
        (f"{SITE}/x.pth", Kind.TAKEN_UP),
        (f"/work/pycache{REPO}/tests/test_a.cpython-311.pyc", None),
        (f"/work/pycache{REPO}/tests/conftest.cpython-311.pyc", None),
        (f"/work/pycache{REPO}/tests/helper.cpython-311.pyc", Kind.STATES),
        (f"/work/pycache{REPO}/checks/check_c.cpython-311.pyc", Kind.STATES),
        (f"/work/pycache{SITE}/wordlib.cpython-311.pyc", Kind.STATES),
        (f"/work/pycache{REPO}/greet/new.cpython-311.pyc", None),
        ("/work/home/x.py", None),
    ],
)
def test_what_a_written_path_is(facts: dict[str, Any], path: str, kind: Kind | None) -> None:
    assert Kinds(facts).of(path) is kind


def test_data_is_neither_code_nor_settings_nor_a_test(facts: dict[str, Any]) -> None:
    kinds = Kinds(facts)
    data = [f"{REPO}/{path}" for path in ("tests/x.db", "tests/data/golden", "tests/a.rst")]
    other = ("setup.cfg", "tests/pytest.ini", "docs/use.rst", "tests/x.so", "requirements.lock")
    assert all(map(kinds.is_data, data))
    assert not any(kinds.is_data(f"{REPO}/{path}") for path in other)
    assert not kinds.is_data(f"{SITE}/wordlib/data.json")
