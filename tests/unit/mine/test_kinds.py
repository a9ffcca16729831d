"""The tables and texts of the further kinds: signs, mends, bounds, checks, candidates, Debian."""

import ast
from datetime import date
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from regreen.debian import mirror, pool_url, upstream_version
from regreen.mine.bounds import loosened
from regreen.mine.checks import FOLDER, build_check, requirements_check
from regreen.mine.conflict import reasons
from regreen.mine.culprits import Break, CulpritFacts
from regreen.mine.debian import parse_sources
from regreen.mine.kinds import MORE_KINDS, more_candidates
from regreen.mine.signs import BUILD_BREAKS, RUNNER_BREAKS, mended, signed
from regreen.tasks import environment as env
from regreen.tasks.model import Change, Fix


@pytest.mark.parametrize(
    ("path", "text", "bad", "expected"),
    [
        ("setup.cfg", "[metadata]\ndescription-file = R\n", "78.0.1", "description_file = R"),
        ("setup.cfg", "[metadata]\nlong-description-content-type = x\n", "78.0.1",
         "long_description_content_type = x"),
        ("setup.py", "setup(\n    use_2to3=True,\n    name='x',\n)\n", "58.0.2", ""),
        ("setup.py", "import os\nimport pkg_resources\n", "82.0.0", ""),
    ],
)  # fmt: skip
def test_a_sign_is_found_and_mended(path: str, text: str, bad: str, expected: str) -> None:
    (one,) = signed({path: text})
    assert one.bad == bad
    edits = mended(one, {path: text})
    changed = env.edited_texts(edits, {path: text})[path]
    assert not signed({path: changed})
    assert [edit.new.strip() for edit in edits] == [expected]


def test_what_is_used_is_not_mended_away() -> None:
    text = "import pkg_resources\nprint(pkg_resources.working_set)\n"
    (one,) = signed({"setup.py": text})
    assert mended(one, {"setup.py": text}) == []


def test_a_version_of_another_age_is_a_sign_and_a_plain_one_is_not() -> None:
    assert [one.bad for one in signed({"PKG-INFO": "Name: x\nVersion: 1.0-beta-x\n"})] == ["66.0.0"]
    assert signed({"PKG-INFO": "Name: x\nVersion: 1.0.post2\n", "setup.cfg": "[a]\nb = 1\n"}) == []


def test_every_row_cites_its_changelog_and_names_an_adjacent_pair() -> None:
    for row in BUILD_BREAKS:
        assert row.changelog.startswith("https://")
        assert row.good != row.bad
    assert all(row.changelog.startswith("https://") for row in RUNNER_BREAKS)


@pytest.mark.parametrize(
    ("path", "text", "edit"),
    [
        ("setup.py", "install_requires=['flask>=1.0,<2', 'x']", ("flask>=1.0,<2", "flask>=1.0")),
        ("setup.py", "install_requires=['Flask==1.1']", ("Flask==1.1", "Flask>=1.1")),
        ("setup.cfg", "install_requires =\n    flask~=1.1\n", ("flask~=1.1", "flask>=1.1")),
        ("pyproject.toml", '[tool.poetry.dependencies]\nflask = "^1.0"\n',
         ('flask = "^1.0', 'flask = ">=1.0')),
    ],
)  # fmt: skip
def test_bounds_are_loosened_where_they_stand(path: str, text: str, edit: tuple[str, str]) -> None:
    found = loosened({path: text}, {"flask": Requirement("flask<2")}, {"flask": "2.0"})
    assert [(one.old, one.new) for one in found] == [edit]


def test_a_bound_that_stands_nowhere_is_not_loosened() -> None:
    ruled_out = {"flask": Requirement("flask<2")}
    assert loosened({"setup.py": "requires(flask())"}, ruled_out, {"flask": "2.0"}) == []
    assert loosened({"setup.py": "'flask-login<2'"}, ruled_out, {"flask": "2.0"}) == []


def test_checks_are_python_of_any_age_and_hold_their_facts() -> None:
    one = requirements_check(["b", "a"])
    two = build_check("x", "1.0", ["m"], ["tests"])
    for check, line in ((one, "NAMES = ['a', 'b']"), (two, "('x', '1.0', ['m'], ['tests'])")):
        assert check.path.startswith(f"{FOLDER}/test_")
        ast.parse(check.content, feature_version=(3, 7))
        assert line in check.content or "= 'x', '1.0', ['m'], ['tests']" in check.content


def test_a_fix_may_make_a_file() -> None:
    made = Change(path="pyproject.toml", text="x\n")
    fix = Fix(mode="any_fix", origin="source-edit", changes=[made])
    (change,) = env.edited_files(fix, {})
    assert (change.path, change.content) == ("pyproject.toml", b"x\n")


def test_records_without_checks_have_the_text_that_they_had() -> None:
    plain = Fix(mode="any_fix", origin="pins-restored")
    assert plain.model_dump_json() == '{"mode":"any_fix","origin":"pins-restored","edits":[]}'


def test_every_kind_has_candidates() -> None:
    facts = [CulpritFacts("flask", (Break("2.0", date(2023, 5, 1)),), ("a", "b"))]
    found = more_candidates(facts)
    assert [row[0].kind for row in found] == list(MORE_KINDS)
    assert {c.package for c in found[0]} == {"a", "b"}
    assert {c.package for c in more_candidates(facts, packages=["a"])[1]} == {"a"}
    conflicts, *others = more_candidates(facts, packages=["Of_Ours"])
    assert not conflicts, "those need a culprit"
    assert [{c.package for c in kind} for kind in others] == [{"of-ours"}] * 3


def test_the_resolvers_reasons_are_read_as_sentences() -> None:
    said = (
        "AssertionError: x No solution found when resolving dependencies: ╰─▶ Because you require "
        "wordlib<2 and wordlib==2.0, we can conclude that your requirements are unsatisfiable."
    )
    assert reasons(said)[1].startswith("Because you require wordlib<2")


def test_the_mirror_is_that_of_the_settings(tmp_path: Path) -> None:
    assert mirror({}, tmp_path) == ""
    (tmp_path / "sources.list.d").mkdir()
    text = "Types: deb\nURIs: http://mirror.example/debian-security http://mirror.example/debian\n"
    (tmp_path / "sources.list.d" / "debian.sources").write_text(text)
    assert mirror({}, tmp_path) == "http://mirror.example/debian"
    assert (
        mirror({"REGREEN_DEBIAN_MIRROR": "http://a.example/x/"}, tmp_path) == "http://a.example/x"
    )


def test_sources_name_packages_versions_and_archives() -> None:
    text = (
        "Package: python-foo\nBinary: python3-foo, python-foo-doc\nVersion: 1.2-3\n"
        "Checksums-Sha256:\n " + "a" * 64 + " 123 python-foo_1.2-3.debian.tar.xz\n "
        + "b" * 64 + " 456 python-foo_1.2+dfsg.orig.tar.gz\n\nPackage: bash\nBinary: bash\n"
    )  # fmt: skip
    (found,) = parse_sources(text)
    assert (found.package, found.version, found.sha256) == ("foo", "1.2", "b" * 64)
    assert upstream_version("foo-1.2.tar.gz") == ""
    base = "http://m.example/debian"
    assert pool_url("libfoo_1.orig.tar.gz", base).endswith(
        "/pool/main/libf/libfoo/libfoo_1.orig.tar.gz"
    )
    assert pool_url("foo-1.2.tar.gz", base) == ""
