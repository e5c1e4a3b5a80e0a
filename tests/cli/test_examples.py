"""The examples of --help: every command has some, and they are commands that bitgen understands."""

from __future__ import annotations

import re
import shlex

import pytest

from bitgen_cli.__main__ import main
from bitgen_cli.config_keys import known_keys
from bitgen_cli.examples import EXAMPLES
from bitgen_cli.surface import FIRST_PANEL, Command, commands, program

Capture = pytest.CaptureFixture[str]

NARROW = 80
"""Columns of a terminal as it comes."""
FIRST = 6
"""Most options a newcomer is shown before the panels begin, --help left out."""
NAMES = sorted(EXAMPLES)
TYPED = [example.command for examples in EXAMPLES.values() for example in examples]


def test_every_command_has_examples() -> None:
    assert set(EXAMPLES) == {"", *(command.name for command in commands())}
    assert all(2 <= len(examples) <= 4 for examples in EXAMPLES.values())


@pytest.mark.parametrize("width", [NARROW, 120])
@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_the_examples(name: str, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width
    lines = [line.strip() for line in shown.partition("\n Examples\n")[2].splitlines() if line]
    assert lines == [line for example in EXAMPLES[name] for line in (f"# {example.does}", example.command)]


@pytest.mark.parametrize("typed", TYPED)
def test_examples_are_understood(typed: str) -> None:
    first, *words = shlex.split(typed)
    assert first == "bitgen"
    command, *rest = words
    known = program().commands[command]
    if rest != ["--help"]:
        context = known.make_context(command, list(rest), resilient_parsing=False)
        keys = [value.partition("=")[0] for value in context.params.get("overrides") or ()]
        assert set(keys) <= set(known_keys())


def test_examples_of_a_command_name_it() -> None:
    for name, examples in EXAMPLES.items():
        if name:
            assert re.match(rf"bitgen {name} ", examples[0].command)


def test_an_example_with_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--sed"):
        test_examples_are_understood("bitgen sample x --sed 3")


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_few_options_stand_before_the_panels(command: Command) -> None:
    first = [option for option in command.options if option.panel == FIRST_PANEL and "--help" not in option.names]
    assert len(first) <= FIRST
