"""--json: every command has it, and the keys that the reference lists are those that are printed."""

from __future__ import annotations

import re

import pages
import pytest

from bitgen_cli.report import Silent
from bitgen_cli.runs.inspect_config import InspectOptions, inspect
from bitgen_cli.surface import commands

RESULTS = pages.generator().RESULTS


def documented() -> dict[str, set[str]]:
    """The keys in the reference's tables, by command."""
    section = pages.reference().partition("\n## JSON\n")[2]
    found = {}
    for chapter in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
        command = chapter.partition(" --json\n")[0]
        rows = re.findall(r"^\| (`.*?`) \|", chapter, re.MULTILINE)
        found[command] = {key for row in rows for key in re.findall("`([^`]+)`", row)}
    return found


@pytest.mark.parametrize("command", RESULTS)
def test_the_keys_in_the_reference_are_those_that_are_printed(command: str) -> None:
    assert documented()[command] == set(pages.generator().printed(RESULTS[command]))


@pytest.mark.usefixtures("estimated_once")
def test_the_keys_of_inspect_config_are_those_that_are_printed() -> None:
    printed = set(inspect(InspectOptions("demo"), Silent()).to_json())
    assert documented()["inspect-config"] == {*printed, "run", "model"}


def test_every_command_has_json_and_its_keys_are_documented() -> None:
    for command in commands():
        assert "--json" in {name for option in command.options for name in option.names}, command.name
    # of resume it is said that it prints what the command before it did
    names = {command.name for command in commands()} - {"resume"}
    assert {command.split()[0] for command in documented()} == names
    assert set(documented()) == {*RESULTS, "inspect-config"}
