"""What a module begins with: weights that were given, fresh ones where none fit, and a report of every key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 4
"""Names that an error lists."""


@dataclass(frozen=True)
class Misshapen:
    """A key whose value in the file is another one than the model's, with what both are."""

    key: str
    found: str
    needed: str


@dataclass
class PartReport:
    """How one part of a model begins.

    Attributes:
        part: `tokenizer`, `transformer` or `text_encoder`; every key stands behind that name and a dot.
        source: where its weights come from; None where nothing was given, so that all of it is new.
        loaded: keys whose weights were taken.
        adapted: keys whose weights were taken but changed to fit, and how.
        new: keys of the model that the source has not.
        dropped: keys of the source that the model has not.
        misshapen: keys of both whose shapes differ: the model's begin fresh.
        unneeded: keys of the source that follow from others.
    """

    part: str
    source: str | None
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    misshapen: list[Misshapen] = field(default_factory=list)
    unneeded: list[str] = field(default_factory=list)

    def mismatches(self) -> dict[str, list[str]]:
        """Keys that do not fit, each kind in its order; nothing where no source was given."""
        if self.source is None:
            return {}
        found = {
            "new": [self._full(key) for key in self.new],
            "dropped": [self._full(key) for key in self.dropped],
            "misshapen": [self._full(wrong.key) for wrong in self.misshapen],
        }
        return {kind: keys for kind, keys in found.items() if keys}

    def describe(self, key: str) -> str:
        """A key, with both shapes where they differ."""
        for wrong in self.misshapen:
            if self._full(wrong.key) == key:
                return f"{key} is {wrong.found}, needs {wrong.needed}"
        return key

    def summary(self) -> str:
        """One line for people."""
        if self.source is None:
            return f"{self.part}: fresh weights"
        counts = {
            "loaded": len(self.loaded),
            "adapted": len(self.adapted),
            "new": len(self.new),
            "dropped": len(self.dropped),
            "of another shape": len(self.misshapen),
        }
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "loaded")
        changes = "".join(f"; {key}: {how}" for key, how in self.adapted.items())
        return f"{self.part} from {self.source}: {told}{changes}"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "part": self.part,
            "source": self.source,
            "loaded": self.loaded,
            "adapted": self.adapted,
            "new": self.new,
            "dropped": self.dropped,
            "misshapen": [vars(wrong) for wrong in self.misshapen],
            "unneeded": self.unneeded,
        }

    def _full(self, key: str) -> str:
        return f"{self.part}.{key}" if key else self.part


def account(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], report: PartReport, unknown: Iterable[str] = ()
) -> None:
    """Tells what becomes of every key of a module and of what is given for it.

    Args:
        expected: the module's state dict; only names and shapes count.
        given: tensors by the module's names.
        report: gets every key; `adapted` ones are there already.
        unknown: names of the source for which there is none of ours.
    """
    report.new += sorted(expected.keys() - given.keys())
    report.dropped += [*sorted(given.keys() - expected.keys()), *unknown]
    for key, own in expected.items():
        if key not in given:
            continue
        if given[key].shape != own.shape:
            report.misshapen.append(Misshapen(key, str(tuple(given[key].shape)), str(tuple(own.shape))))
        elif key not in report.adapted:
            report.loaded.append(key)


@torch.no_grad()
def begin(module: nn.Module, given: Mapping[str, Tensor], report: PartReport, unknown: Iterable[str] = ()) -> None:
    """Copies what fits into a module that has fresh weights, and fills the report.

    Args:
        module: changed in place.
        given, report, unknown: as in `account`.
    """
    expected = module.state_dict()
    account(expected, given, report, unknown)
    for key, own in expected.items():
        if key in given and given[key].shape == own.shape:
            own.copy_(given[key])


def not_allowed(reports: Sequence[PartReport], allowed: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Kinds of mismatches and the keys of each that no name allows; of the keys, as they are described."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for kind, keys in report.mismatches().items():
            left = [report.describe(key) for key in keys if not any(_allows(name, key) for name in allowed)]
            if left:
                found.setdefault(kind, []).extend(left)
    return list(found.items())


def unused(reports: Sequence[PartReport], allowed: Sequence[str]) -> list[str]:
    """The names that allow nothing."""
    keys = [key for report in reports for found in report.mismatches().values() for key in found]
    return [name for name in allowed if not any(_allows(name, key) for key in keys)]


def _allows(name: str, key: str) -> bool:
    """Whether a name means a key: all of it, its beginning up to a dot, or a pattern; with or without the part."""
    inner = key.partition(".")[2]
    return any(
        candidate == name or candidate.startswith(f"{name}.") or fnmatchcase(candidate, name)
        for candidate in (key, inner)
        if candidate
    )
