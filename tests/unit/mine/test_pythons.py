"""What Pythons took away: each sign finds its use and nothing like it; the steps it asks for."""

import io
import tarfile
import time

import pytest

from regreen.mine.interpreter import CULPRIT, InterpreterMiner
from regreen.mine.kinds import PYTHONS
from regreen.mine.pythons import RELEASED, REMOVALS, signed, steps_of, texts_of

STRICT = {"setup.cfg": "[tool:pytest]\nfilterwarnings =\n    error\n"}


def releases(text: str, **settings: str) -> set[str]:
    return {row.python for row in signed({"a.py": text, **settings})}


@pytest.mark.parametrize(
    ("python", "text"),
    [
        ("3.9", "import base64\nx = base64.encodestring(b'')\n"),
        ("3.9", "from fractions import gcd\n"),
        ("3.9", "from xml.etree import cElementTree as etree\n"),
        ("3.9", "import xml.etree.cElementTree as etree\n"),
        ("3.9", "x = json.loads(text, encoding='utf-8')\n"),
        ("3.9", "if thread.isAlive():\n    pass\n"),
        ("3.10", "from collections import Mapping, OrderedDict\n"),
        ("3.10", "from collections import (\n    OrderedDict,\n    Callable,\n)\n"),
        ("3.10", "x = isinstance(y, collections.Iterable)\n"),
        ("3.10", "await asyncio.sleep(1, loop=loop)\n"),
        ("3.11", "spec = inspect.getargspec(f)\n"),
        ("3.11", "@asyncio.coroutine\ndef f(): pass\n"),
        ("3.11", "x = random.sample(set(y), 2)\n"),
        ("3.11", "x = open(path, 'rU')\n"),
        ("3.11", "x = re.compile(r'a+(?i)')\n"),
        ("3.11", "class A:\n    b: Point = Point()\n"),
        ("3.11", "class A(str, Enum):\n    B = 'b'\n"),
        ("3.12", "import os, imp\n"),
        ("3.12", "from distutils.version import LooseVersion\n"),
        ("3.12", "    self.assertEquals(1, 1)\n"),
        ("3.12", "    self.assert_(True)\n"),
        ("3.12", "parser.readfp(stream)\n"),
        ("3.12", "sock = ssl.wrap_socket(sock)\n"),
        ("3.13", "import cgi\n"),
        ("3.13", "import os.path, pipes as p\n"),
        ("3.13", "from lib2to3.pgen2 import token\n"),
        ("3.13", "suite = unittest.makeSuite(A)\n"),
        ("3.13", "from typing.io import TextIO\n"),
        ("3.13", "assert f.__doc__ == 'x'\n"),
        ("3.14", "isinstance(node, ast.Str)\n"),
        ("3.14", "from importlib.abc import Traversable\n"),
    ],
)
def test_a_use_is_a_sign(python: str, text: str) -> None:
    assert releases(text) == {python}


@pytest.mark.parametrize(
    "text",
    [
        "from collections import OrderedDict\nfrom collections.abc import Mapping\n",
        "x = collections.abc.Mapping\ny = six.moves.collections.Mapping\n",
        "from collections import OrderedDict  # no Mapping\n",
        "import imports, cgi_tools, importlib\nfrom .imp import x\nfrom crypto import y\n",
        "import asyncio\nawait asyncio.sleep(1)\nrun(loop=loop)\n",
        "x = inspect.getfullargspec(f)\n",
        "x = random.sample(sorted(y), 2)\n",
        "x = open(path, 'r')\nx = open(path, 'w', encoding='UTF-8')\n",
        "x = re.compile(r'(?i)a+')\nx = re.compile(r'a(?i:b)')\nx = re.compile(r'a(?P<i>b)')\n",
        "class A:\n    b: Point = point()\n",
        "class A(IntEnum):\n    B = 1\n",
        "self.assertEqual(1, 1)\nmock.assert_called()\nnp.assert_(x)\n",
        "locale.format_string('%d', 1)\n",
        "x = locale.getlocale()\nssl.SSLContext().wrap_socket(s)\n",
        "x = f.__doc__\n",
        "x = ast.String\n",
        "# from distutils import log\n",
        "x = datetime.utcnow()\n",
    ],
)
def test_what_is_like_a_use_is_none(text: str) -> None:
    assert releases(text) == set()


@pytest.mark.parametrize(
    "text",
    [
        "try:\n    from collections.abc import Mapping\nexcept ImportError:\n"
        "    from collections import Mapping\n",
        "try:\n    import cgi\nexcept ImportError:\n    cgi = None\n",
        "if sys.version_info < (3, 8):\n    import imp\nelse:\n    import importlib\n",
        "if PY3:\n    import importlib\nelse:\n    import imp\n",
        "def f():\n    if hasattr(inspect, 'x'):\n        for y in z:\n"
        "            inspect.getargspec(y)\n",
    ],
)
def test_what_stands_behind_a_check_is_no_sign(text: str) -> None:
    assert releases(text) == set()


def test_a_use_beside_a_check_is_one() -> None:
    text = "try:\n    x()\nexcept ImportError:\n    pass\nimport imp\n"
    assert releases(text) == {"3.12"}
    assert releases("if x:\n    y()\nelse:\n    import imp\n") == {"3.12"}


def test_warnings_count_where_they_are_errors() -> None:
    text = "x = datetime.utcnow()\n"
    assert releases(text) == set()
    assert releases(text, **STRICT) == {"3.12"}
    settings = '[tool.pytest.ini_options]\nfilterwarnings = [\n    "error",\n]\n'
    assert releases(text, **{"pyproject.toml": settings}) == {"3.12"}
    ignored = "[pytest]\nfilterwarnings = ignore::DeprecationWarning\n"
    assert releases(text, **{"tox.ini": ignored}) == set()


def test_a_python_that_a_project_claims_took_nothing_of_it() -> None:
    claim = "Classifier: Programming Language :: Python :: "
    claims = f"Name: a\n{claim}3\n{claim}3.12\n{claim}3.9\nRequires-Dist: x\n"
    text = "import imp\nimport cgi\n"
    assert releases(text, **{"PKG-INFO": claims}) == {"3.13"}
    assert releases(text, **{"PKG-INFO": f"{claim}3 :: Only\n"}) == {"3.12", "3.13"}


def test_every_row_cites_whats_new_of_a_known_release() -> None:
    for row in REMOVALS:
        assert row.python in RELEASED
        assert row.changelog.startswith(f"https://docs.python.org/3/whatsnew/{row.python}.html#")
    assert len({(row.python, row.note) for row in REMOVALS}) == len(REMOVALS)
    assert set(PYTHONS) <= set(RELEASED)


def test_steps_are_between_neighbours_the_newest_first() -> None:
    signs = signed({"a.py": "import imp\nimport cgi\nfrom collections import Mapping\n"})
    steps = steps_of(signs, ["3.13", "3.9", "3.11", "3.12", "3.10"])
    assert [(step.good, step.bad) for step in steps] == [
        ("3.12", "3.13"), ("3.11", "3.12"), ("3.9", "3.10"),
    ]  # fmt: skip
    gaps = steps_of(signs, ["3.8", "3.11", "3.13"])
    assert [(step.good, step.bad, len(step.signs)) for step in gaps] == [
        ("3.11", "3.13", 2), ("3.8", "3.11", 1),
    ]  # fmt: skip
    assert steps_of(signs, ["3.14"]) == []
    assert steps_of(signed({"a.py": "x = ast.Str\n"}), ["3.12", "3.13"]) == []


def test_what_lies_beside_a_project_is_not_read() -> None:
    out = io.BytesIO()
    paths = ["p/a.py", "tests/test_a.py", "setup.py", "docs/x.py", "p/_vendor/y.py", "setup.cfg"]
    paths += ["PKG-INFO", "p.egg-info/PKG-INFO"]
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in [*paths, "README.md"]:
            member = tarfile.TarInfo(f"p-1.0/{path}")
            member.size = 2
            tar.addfile(member, io.BytesIO(b"x\n"))
    read = {"p/a.py", "tests/test_a.py", "setup.cfg", "PKG-INFO"}
    assert set(texts_of(out.getvalue())) == read


def test_the_miner_needs_no_dependencies_and_names_python() -> None:
    assert not InterpreterMiner.needs_dependencies
    assert CULPRIT == "python"


@pytest.mark.parametrize("text", ["\n" * 200_000, "filterwarnings =" + "\n" * 200_000])
def test_hostile_settings_take_no_time(text: str) -> None:
    began = time.process_time()
    assert signed({"setup.cfg": text, "a.py": "import imp\n"}) != []
    assert time.process_time() - began < 5  # minutes where the time grows with the square
