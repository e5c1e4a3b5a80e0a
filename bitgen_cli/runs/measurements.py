"""What a run has measured: metrics.jsonl as a series of numbers for each name. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

METRICS = "metrics.jsonl"
_PER_SCALE = re.compile(r"(.+)/(\d{1,4})")


@dataclass(frozen=True)
class Series:
    """Measurements of one name, in the order of the file.

    Attributes:
        steps: they were made after.
        values: of them.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_measurements(run: Path) -> dict[str, Series]:
    """The measurements of a run by their names, in the order they first appear in.

    A last line that was cut off in the middle of being written is left out.

    Args:
        run: its folder.

    Raises:
        InputError: there are none, or a line is damaged.
    """
    file = run / METRICS
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise explain(error, file, "read") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{file}, line {number}: not a text file in UTF-8") from error
    found: dict[str, Series] = {}
    for number, line in enumerate(lines[:-1], start=1):
        step, measured = _measured(line, f"{file}, line {number}")
        for name, value in measured.items():
            series = found.setdefault(name, Series())
            series.steps.append(step)
            series.values.append(value)
    if not found:
        raise InputError(f"{file} holds no measurements yet", "the run has not logged a step")
    return found


def per_scale(measured: Mapping[str, Series]) -> dict[str, dict[int, Series]]:
    """The names that are measured per scale, `loss` for `loss/0`, `loss/1` ...: their series by scale, ascending."""
    found: dict[str, dict[int, Series]] = {}
    for name, series in measured.items():
        match = _PER_SCALE.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = series
    return {name: dict(sorted(scales.items())) for name, scales in found.items()}


def _measured(line: str, where: str) -> tuple[int, dict[str, float]]:
    """Step and measurements of one line.

    Raises:
        InputError: it is none.
    """
    try:
        stored = json.loads(line)
        step = stored.pop("step")
        values = {name: float(value) for name, value in stored.items() if not isinstance(value, str | bool)}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{where}: not a measurement", "remove the line, or resume the run, which does") from error
    if not isinstance(step, int) or isinstance(step, bool) or len(values) != len(stored):
        raise InputError(f"{where}: not a measurement", "remove the line, or resume the run, which does")
    return step, values
