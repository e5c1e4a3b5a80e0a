"""`bitgen train --overfit-check`: four pictures by heart, or a FAIL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_training import World, options_for, resolved

from bitgen_cli.report import Silent
from bitgen_cli.runs import overfit
from bitgen_cli.runs.overfit import PICTURES, overfit_check

FAST = {"learning_rate": 0.01, "warmup_steps": 2, "schedule": "cosine"}


def test_what_can_learn_passes_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    options = options_for("transformer", world, tmp_path / "run", precision="fp32", optimizer=FAST)
    found = overfit_check(options, Silent())
    assert found.passed
    assert len(found.pictures) == len(set(found.pictures)) == PICTURES
    assert set(found.measures) == {"bit_accuracy/0", "bit_accuracy/1", "bit_accuracy/2"}
    assert all(value >= overfit.ACCURACY for value in found.measures.values())
    assert found.steps < overfit.STEPS
    assert not (tmp_path / "run").exists()
    assert found.tables()[0].title.startswith("PASS")


@pytest.mark.parametrize("stage", ["transformer", "tokenizer"])
def test_what_cannot_learn_fails(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(overfit, "STEPS", 6)
    options = options_for(stage, world, tmp_path / "run")
    slow = resolved(stage, precision="fp32", optimizer={"learning_rate": 1e-7})
    found = overfit_check(replace(options, resolved=slow), Silent())
    assert not found.passed
    assert found.steps == 6
    assert found.tables()[0].title.startswith("FAIL")
    assert not (tmp_path / "run").exists()
