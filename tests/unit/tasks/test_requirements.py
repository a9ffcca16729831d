"""What a project wants: requirements files, declarations and locks, for one interpreter."""

import io
import tarfile
from pathlib import Path

import pytest

from regreen.rpc.errors import InvalidArgument, NotFound
from regreen.tasks.complete import complete, requires_of_sdist
from regreen.tasks.declared import poetry_requirement, poetry_specifier
from regreen.tasks.local import Project, check_lock, detect
from regreen.tasks.wanted import Wanted
from tests.unit.tasks.test_local import project


def found(root: Path, python: str = "3.11", **files: str) -> Project:
    return detect(project(root, **files), ["3.9", "3.11"], python=python)


def texts(project: Project) -> list[str]:
    return sorted(item.text for item in project.requirements)


def test_every_line_of_a_requirements_file_counts(tmp_path: Path) -> None:
    text = (
        "flask==2.* # web\nclick == 8.0.1\nsix\nuvicorn[standard]==0.30.0 \\\n  --hash=sha256:00\n"
    )
    text += 'pywin32==306; sys_platform=="win32"\ntomli==2.0.1 ; python_version < "3.11"\n'
    text += "-r more/own.txt\n-c limits.txt\n-e .[speed]\n--extra-index-url https://me:pw@host/x\n"
    pyproject = (
        '[project]\nname="own"\ndependencies=["attrs>=20"]\n[project.optional-dependencies]\n'
    )
    pyproject += 'speed=["orjson"]\ndocs=["sphinx"]\ntest=["own[cov]"]\ncov=["coverage"]\n'
    pyproject += '[dependency-groups]\ntest=["trio", {include-group="typed"}]\ntyped=["mypy"]\n'
    seen = found(
        tmp_path,
        **{"requirements.txt": text, "more/own.txt": "idna\n", "limits.txt": "idna<3\nattrs==23\n"},
        **{"pyproject.toml": pyproject, "requirements-dev.txt": "pytest==8.3.5\n"},
        **{"requirements/tests.txt": "hypothesis\n", "requirements/docs.txt": "furo\n"},
    )
    assert texts(seen) == [
        "attrs>=20", "click==8.0.1", "coverage", "flask==2.*", "hypothesis", "idna", "mypy",
        "orjson", "pytest==8.3.5", "six", "trio", "uvicorn[standard]==0.30.0",
    ]  # fmt: skip
    assert seen.pins == ("click==8.0.1", "pytest==8.3.5", "uvicorn==0.30.0")
    assert (seen.exact, seen.origin) == (False, "requirements.txt")
    assert seen.pin_files == ("requirements.txt", "limits.txt", "requirements-dev.txt")
    assert [item.text for item in seen.constraints] == ["idna<3", "attrs==23"]
    (note,) = seen.notes
    assert note == (
        "requirements.txt line 11: --extra-index-url is not followed; set REGREEN_INDEX_URL"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("foo @ git+https://me:pw@host/foo", r"'foo @ git\+https://host/foo' is a URL.*--lock"),
        ("git+ssh://host/foo#egg=foo", "is a URL, path or version control"),
        ("-e ./sub", "is a URL, path or version control"),
        ("./wheels/x-1-py3-none-any.whl", "is a URL, path or version control"),
        ("flask=3", r"'flask=3' is no requirement"),
        ("-r missing.txt", r"missing\.txt is no file here"),
        ("six==1.0\nsix==1.1", r"line 3: pins six==1.1, but requirements.txt line 2 pins six==1.0"),
    ],
)
def test_a_line_that_cannot_be_followed_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"requirements\.txt line \d.*{said}|{said}") as no:
        found(tmp_path, **{"requirements.txt": f"idna\n{line}\n"})
    assert no.value.field.startswith("requirements.txt line ")
    assert "pw" not in no.value.message


def test_a_line_for_another_system_may_be_anything(tmp_path: Path) -> None:
    line = "foo @ git+https://host/foo ; sys_platform == 'win32'\n-e .\nown\n"
    assert found(tmp_path / "own", **{"requirements.txt": line}).requirements == ()


@pytest.mark.parametrize(("python", "numpy"), [("3.9", "numpy==1.26.4"), ("3.11", "numpy==2.1.0")])
def test_a_fork_of_uv_lock_is_taken_by_its_marker(tmp_path: Path, python: str, numpy: str) -> None:
    registry = 'source = { registry = "https://host/simple" }\n'
    lock = "".join(
        f'[[package]]\nname="{name}"\nversion="{version}"\n{registry}{more}'
        for name, version, more in (
            ("numpy", "1.26.4", "resolution-markers=[\"python_full_version < '3.10'\"]\n"),
            ("numpy", "2.1.0", "resolution-markers=[\"python_full_version >= '3.10'\"]\n"),
            ("pywin32", "306", ""),
            ("pytest", "8.3.5", 'dependencies=[{name="iniconfig"}]\n'),
            ("iniconfig", "2.1.0", ""),
            ("httptools", "0.6", ""),
            ("uvicorn", "0.30", '[package.optional-dependencies]\nstandard=[{name="httptools"}]\n'),
        )
    )
    lock += '[[package]]\nname="own"\nversion="1"\nsource={editable="."}\ndependencies=[\n'
    lock += "{name='numpy',version='1.26.4',marker=\"python_full_version < '3.10'\"},\n"
    lock += "{name='numpy',version='2.1.0',marker=\"python_full_version >= '3.10'\"},\n"
    lock += "{name='pywin32',marker=\"sys_platform == 'win32'\"},\n"
    lock += "{name='uvicorn',extra=['standard']}]\n"
    lock += "[package.dev-dependencies]\ndev=[{name='pytest'}]\n"
    seen = found(tmp_path, python, **{"pyproject.toml": '[project]\nname="own"\n', "uv.lock": lock})
    rest = ("httptools==0.6", "iniconfig==2.1.0", "pytest==8.3.5", "uvicorn==0.30")
    assert seen.pins == tuple(sorted((numpy, *rest)))
    assert (seen.exact, seen.origin, seen.pin_files) == (True, "uv.lock", ("",))


def test_a_lock_of_what_no_index_has_is_refused(tmp_path: Path) -> None:
    lock = '[[package]]\nname="foo"\nversion="1"\nsource={git="https://host/foo"}\n'
    with pytest.raises(InvalidArgument, match=r"uv\.lock.*foo comes from git.*--lock"):
        found(tmp_path, **{"setup.py": "", "uv.lock": lock})


@pytest.mark.parametrize(
    "lock",
    [
        "[[package]]\n",
        '[[package]]\nname="a"\nversion="1"\nresolution-markers=["what?"]\n',
        "[[package\n",
    ],
)
def test_a_malformed_lock_is_named(tmp_path: Path, lock: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        found(tmp_path, **{"setup.py": "", "uv.lock": lock})
    assert (refused.value.field, bool(refused.value.remedy)) == ("uv.lock", True)


def test_poetry_lock_and_declarations(tmp_path: Path) -> None:
    pyproject = '[tool.poetry]\nname="own"\nversion="1.2"\n[tool.poetry.dependencies]\n'
    pyproject += (
        'python=">=3.8,<3.10 || ^3.11"\ndjango="^4.2"\nuvicorn={version="*",extras=["x"]}\n'
    )
    pyproject += 'old={version="~1.2",python="<3.9"}\nredis={version=">=5",optional=true}\n'
    pyproject += '[tool.poetry.group.dev.dependencies]\npytest="8.3.5"\n'
    bare = found(tmp_path / "bare", "", **{"pyproject.toml": pyproject})
    assert (bare.name, bare.version, bare.python) == ("own", "1.2", "3.11")
    assert texts(bare) == ["django<5,>=4.2", "pytest==8.3.5", "uvicorn[x]"]
    lock = "".join(
        f'[[package]]\nname="{name}"\nversion="{version}"\npython-versions=">=3.7"\n{more}'
        for name, version, more in (
            ("Django", "4.2.1", "[package.dependencies]\nsqlparse='^0.3'\n"
             "tzdata={version='*',markers=\"sys_platform == 'win32'\"}\n"),
            ("sqlparse", "0.5.0", ""),
            ("tzdata", "2024.1", ""),
            ("old", "1.2.0", ""),
            ("uvicorn", "0.30", "[package.dependencies]\nwatch={version='*',optional=true}\n"
             "[package.extras]\nx=['watch (>=1)']\n"),
            ("watch", "1.0", ""),
            ("pytest", "8.3.5", ""),
            ("never", "1.0", "markers=\"sys_platform == 'win32'\"\n"),
        )
    )  # fmt: skip
    seen = found(tmp_path / "own", "", **{"pyproject.toml": pyproject, "poetry.lock": lock})
    assert seen.pins == (
        "django==4.2.1", "pytest==8.3.5", "sqlparse==0.5.0", "uvicorn==0.30", "watch==1.0",
    )  # fmt: skip
    loose = found(tmp_path / "loose", **{"pyproject.toml": "[tool.x]\n", "poetry.lock": lock})
    assert "never==1.0" not in loose.pins
    assert "tzdata==2024.1" in loose.pins


@pytest.mark.parametrize(
    ("constraint", "specifier"),
    [
        ("^1.2.3", ">=1.2.3,<2"), ("^0.2.3", ">=0.2.3,<0.3"), ("^0.0.3", ">=0.0.3,<0.0.4"),
        ("^0", ">=0,<1"), ("~1.2.3", ">=1.2.3,<1.3"), ("~1", ">=1,<2"), ("*", ""),
        ("1.2.3", "==1.2.3"), ("2.*", "==2.*"), (">= 1, <2", ">=1,<2"), (">=1 !=1.5", ">=1,!=1.5"),
        ("^2.7 || ~3.6", ">=2.7,<3||>=3.6,<3.7"),
    ],
)  # fmt: skip
def test_constraints_of_poetry(constraint: str, specifier: str) -> None:
    assert poetry_specifier(constraint).replace(" ", "") == specifier


def test_a_dependency_of_poetry_keeps_its_marker() -> None:
    value = {"version": "^2", "markers": "os_name == 'nt'", "python": "<3.9 || >3.11"}
    assert poetry_requirement("x", value) == (
        "x>=2,<3 ; (os_name == 'nt') and "
        "((python_full_version < '3.9') or (python_full_version > '3.11'))"
    )
    assert poetry_requirement("x", {"git": "https://h/x"}) == "x @ git+https://h/x"


@pytest.mark.parametrize("name", ["requirements.lock", "requirements.txt"])
def test_text_locks_are_exact(tmp_path: Path, name: str) -> None:
    text = "# This file is autogenerated by pip-compile with Python 3.11\n-e file:.\n"
    text += "Jinja2==2.11.3 \\\n    --hash=sha256:00\nmarkupsafe==2.0.1 ; os_name == 'posix'\n"
    text += "colorama==0.4 ; os_name == 'nt'\n"
    seen = found(tmp_path, **{"setup.py": "", name: text})
    assert (seen.pins, seen.exact) == (("jinja2==2.11.3", "markupsafe==2.0.1"), True)
    assert (seen.origin, seen.pin_files) == (name, (name,))


def test_a_named_lock_may_be_that_of_a_tool(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text("version = 1\n")
    check_lock(tmp_path / "uv.lock")


class Resolver:
    """Answers as uv would, by a table of problems; remembers what it was asked."""

    def __init__(self, *answers: list[str] | str) -> None:
        self.answers, self.asked = list(answers), []

    async def resolve(self, lines, python, *, constraints=(), overrides=()):
        self.asked.append((list(lines), list(overrides)))
        answer = self.answers.pop(0)
        if isinstance(answer, str):
            raise NotFound(answer)
        return answer


async def test_pins_of_a_lock_hold_against_what_others_require() -> None:
    resolver = Resolver("No solution found", ["a==1", "b==1", "pytest==8"])
    pins = await complete(resolver, [], [], "3.11", exact=["b==1", "a==1"])
    assert pins == ["a==1", "b==1", "pytest==8"]
    lines = ["a==1", "b==1", "pytest"]
    assert resolver.asked == [(lines, []), (lines, ["a==1", "b==1"])]
    closed = Resolver()
    assert await complete(closed, [], [], "3.11", exact=["pytest==8"]) == ["pytest==8"]


async def test_a_contradiction_names_the_lines_that_make_it() -> None:
    problem = (
        "No solution found: because flask==3 depends on werkzeug>=3 and you require werkzeug<2"
        ", your requirements are unsatisfiable"
    )
    wanted = [
        Wanted("flask", "flask==3", "requirements.txt line 1", "3"),
        Wanted("werkzeug", "werkzeug<2", "requirements.txt line 7"),
        Wanted("flask-login", "flask-login", "pyproject.toml"),
    ]
    with pytest.raises(InvalidArgument) as refused:
        await complete(Resolver(problem), wanted, [], "3.11")
    assert (
        "correct requirements.txt line 1 (flask==3), requirements.txt line 7 (werkzeug<2), or"
        in (refused.value.message)
    )


def test_requirements_of_a_source_archive_are_read() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (
            ("x-1/PKG-INFO", "Metadata-Version: 1.2\nName: x\n"),
            (
                "x-1/src/x.egg-info/requires.txt",
                "six>=1\n\n[test]\nnose\n\n[:os_name == 'nt']\nwin\n",
            ),
            ("x-1/setup.py", "raise SystemExit('never executed')"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    assert requires_of_sdist(buffer.getvalue(), "3.11") == ["six>=1"]


@pytest.mark.parametrize("archive", [b"", b"junk", b"PKjunk", b"\x1f\x8bjunk"])
def test_a_damaged_source_archive_says_nothing(archive: bytes) -> None:
    assert requires_of_sdist(archive, "3.11") == []


@pytest.mark.parametrize(
    "text",
    [
        'project = "own"',
        "[project]\ndependencies = 3",
        "[project]\noptional-dependencies = []",
        '[tool]\npoetry = "x"',
        '[tool.poetry.dependencies]\nsix = "^x"',
        "dependency-groups = 1",
    ],
)
def test_a_declaration_of_another_shape_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"pyproject\.toml: .*; correct it"):
        found(tmp_path, **{"pyproject.toml": text})
