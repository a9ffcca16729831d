"""What a call of the command line loads: the module of its command and no other."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from regreen.cli.main import COMMANDS, GROUPS, make_app

WORDS = [*GROUPS, *(name for names in COMMANDS.values() for name in names)]
HEAVY = ("numpy", "jinja2", "httpx", "pydantic_settings", "obstore")


def test_every_command_is_in_the_tables() -> None:
    assert sorted(typer.main.get_command(make_app()).commands) == sorted(WORDS)


@pytest.mark.parametrize("word", WORDS)
def test_a_part_has_the_command_that_the_whole_has(word: str) -> None:
    whole, part = make_app(), make_app([word])
    below = getattr(typer.main.get_command(whole).commands[word], "commands", {})
    for words in ([word], *([word, name] for name in below)):
        told = [CliRunner().invoke(app, [*words, "--help"]).output for app in (whole, part)]
        assert told[0] == told[1]
        assert f"Usage: regreen {' '.join(words)}" in told[0]


@pytest.mark.parametrize("words", [[], ["--help"], ["nonsense"], ["--version", "tasks"]])
def test_what_names_no_command_gets_all_of_them(words: list[str]) -> None:
    assert len(typer.main.get_command(make_app(words)).commands) == len(WORDS)


@pytest.mark.parametrize("word", ["state", "sandbox"])
def test_a_command_loads_what_it_needs(word: str) -> None:
    code = f"import sys; from regreen.cli.main import main; sys.argv = ['regreen', {word!r}, '-h']"
    code += f"\ntry: main()\nexcept SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
