"""What a source archive says before anything of it runs."""

import io
import tarfile
from pathlib import Path

import pytest

from regreen.mine.project import (
    compiled,
    licence_of,
    member_names,
    needs_of,
    test_roots,
    unpack,
)
from regreen.rpc.errors import InvalidArgument

test_roots.__test__ = False  # type: ignore[attr-defined]
SETUP = """
from setuptools import setup
raise SystemExit("never run")
setup(name="shop", tests_require=["mock", "pytest-cov", "black"],
      install_requires=["web>=1,<2", "old; python_version<'3'"])
"""
INFO = """Metadata-Version: 2.1
Name: shop
Version: 1.0
License: MIT
Classifier: License :: OSI Approved :: BSD License
Requires-Dist: db>=3
Requires-Dist: never; python_version < "3"
Requires-Dist: hypothesis<7; extra == "test"
Requires-Dist: sphinx; extra == "docs"
"""


def archive(files: dict[str, str], top: str = "shop-1.0/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{top}{name}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("names", "roots"),
    [
        (["shop/__init__.py", "tests/test_a.py", "shop/tests/test_b.py"], ["tests"]),
        (["shop/tests/test_b.py", "shop/web/tests/test_c.py"], ["shop/tests", "shop/web/tests"]),
        (["test_shop.py", "shop.py"], ["test_shop.py"]),
        (["tests/unit/test_a.py", "test/test_b.py"], ["test", "tests"]),
        (["docs/tests/test_a.py", "shop/__init__.py"], []),
        (["shop/testing.py", "shop/__init__.py"], []),
    ],
)
def test_where_the_tests_are(names, roots) -> None:
    assert test_roots(names) == roots


def test_code_to_compile_is_seen() -> None:
    assert compiled(["shop/_speed.c"])
    assert not compiled(["tests/data/example.c", "shop/a.py"])


def test_what_a_project_and_its_tests_require(tmp_path: Path) -> None:
    files = {
        "PKG-INFO": INFO,
        "setup.py": SETUP,
        "tox.ini": "[testenv]\ndeps =\n  freezegun\n  -rmore.txt\n  flake8\n",
        "requirements-test.txt": "responses==0.1\npytest-xdist\nshop\n",
        "shop/__init__.py": "import pkg_resources\n",
    }
    data = archive(files)
    assert "shop/__init__.py" in member_names(data)
    root = unpack(data, tmp_path)
    found = needs_of(root, data, "3.11", "shop")
    assert set(found.runtime) == {"db>=3", "web<2,>=1"}
    assert found.tests == (
        *("hypothesis", "mock", "pytest-cov", "freezegun", "responses", "pytest-xdist"),
        *("setuptools", "pytest"),
    )
    assert found.names()[:2] == ("db", "web")
    assert found.with_tests(["lxml", "mock"]).tests[-1] == "lxml"
    assert licence_of(root) == "BSD License"


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        member_names(b"no archive")
    with pytest.raises(InvalidArgument, match="cannot be unpacked"):
        unpack(archive({"../../outside.py": "x"}), tmp_path / "in")
    assert not (tmp_path / "outside.py").exists()
