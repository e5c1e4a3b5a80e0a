"""--json: every command has it, and the keys that the README lists are those that are printed."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import typer

from bitgen_cli.app import app
from bitgen_cli.runs.finetune_subject import SubjectResult
from bitgen_cli.runs.fitting import Fit
from bitgen_cli.runs.gen_priors import PriorResult
from bitgen_cli.runs.overfit import OverfitResult
from bitgen_cli.runs.plot import PlotResult
from bitgen_cli.runs.sample_result import SampledPicture, SampleResult
from bitgen_cli.runs.sweep import SweepResult
from bitgen_cli.runs.tokenize import TokenizeResult
from bitgen_cli.runs.train import TrainResult
from bitgen_cli.runs.verify import VerifyResult

README = Path(__file__).parents[2] / "README.md"
RESULTS = {
    "sample": SampleResult,
    "tokenize": TokenizeResult,
    "tokenize --verify": VerifyResult,
    "train": TrainResult,
    "train --overfit-check": OverfitResult,
    "train --sweep run": SweepResult,
    "finetune-subject": SubjectResult,
    "gen-priors": PriorResult,
    "inspect-config --plot": PlotResult,
    "train --dry-run": Fit,
}
EMPTY = {"pictures": (), "remade": (), "runs": (), "init": (), "choices": (), "seconds": 0.0, "failures": ()}


@dataclass
class Nothing:
    """What stands for a part that is itself an object."""

    total: int = 0
    peak: int = 0

    def to_json(self) -> dict[str, Any]:
        return {}


def printed(result: Any) -> set[str]:
    """The keys of a result with nothing in it."""
    values = {one.name: EMPTY.get(one.name) for one in fields(result)}
    values |= {name: Nothing() for name in ("memory", "disk") if name in values}
    values |= {name: 0 for name in ("data", "free") if name in values and result is Fit}
    return set(result(**values).to_json())


def documented() -> dict[str, set[str]]:
    section = README.read_text().partition("\n## JSON\n")[2].partition("\n## ")[0]
    found = {}
    for commands, keys in re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE):
        for command in re.findall("`([^`]+)`", commands):
            found[command] = set(re.findall("`([^`]+)`", re.sub(r"\([^)]*\)", "", keys)))
    return found


@pytest.mark.parametrize("command", RESULTS)
def test_the_keys_in_the_readme_are_those_that_are_printed(command: str) -> None:
    assert documented()[command] == printed(RESULTS[command])


def test_the_keys_of_a_picture_are_documented() -> None:
    (row,) = re.findall(r"^\| `sample` \| `pictures` \((.*?)\)", README.read_text(), re.MULTILINE)
    printed = SampledPicture(Path("x.png"), "a cat", 1, {}).to_json()
    assert re.findall("`([^`]+)`", row) == list(printed)


def test_every_command_has_json_and_its_keys_are_documented() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert "--json" in {flag for option in command.params for flag in option.opts}, name
    assert {command.split()[0] for command in documented()} == set(commands)
    assert set(documented()) == {*RESULTS, "resume"}
