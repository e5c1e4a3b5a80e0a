"""Several processes train what one would: DDP and FSDP2 over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny_training import World, measured, options_for

from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.report import Silent
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.train import train

TOLERANCE = 1e-5
"""Sums over ranks are added up in another order; metrics.jsonl keeps six digits."""

RECIPE: dict[str, Any] = {
    "precision": "fp32",
    "steps": 5,
    "validate_every": 3,
    "sample_every": 5,
    "optimizer": {"learning_rate": 0.002, "warmup_steps": 2, "schedule": "constant"},
}


def train_as(strategy: str, stage: str, world: World, out: Path, changes: dict[str, Any]) -> None:
    options = options_for(stage, world, out, **{**RECIPE, **changes})
    train(type(options)(**{**vars(options), "strategy": strategy}), Silent())


def go_on_as(strategy: str, run: Path, steps: int) -> None:
    resume(run, Silent(), steps=steps, device="cpu", strategy=strategy)


def require_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), f"step {theirs['step']}"


ADVERSARY = {"adversarial_weight": 0.1, "adversarial_start": 2, "scale_dropout": 0.5, "discriminator_layers": 1}


@pytest.mark.parametrize(
    ("stage", "strategy", "changes"),
    [
        ("transformer", "ddp", {}),
        ("transformer", "fsdp", {"checkpoint_activations": True}),
        ("tokenizer", "ddp", ADVERSARY),
        ("tokenizer", "fsdp", {}),
    ],
)
def test_two_ranks_have_the_curve_of_one(
    world: World, tmp_path: Path, strategy: str, stage: str, changes: dict[str, Any]
) -> None:
    """With accumulation, averages, flips, caption dropout and drop path; samples and model come from the first rank."""
    train_as("ddp", stage, world, tmp_path / "alone", changes)
    processes.finish(processes.start_ranks(2, train_as, strategy, stage, world, tmp_path / "both", changes))
    require_same(measured(tmp_path / "both"), measured(tmp_path / "alone"))
    pictures = [sorted(file.name for file in (tmp_path / run / "samples").iterdir()) for run in ("alone", "both")]
    assert pictures[0] == pictures[1]
    files = [
        {file.relative_to(tmp_path / run / "model") for file in (tmp_path / run / "model").rglob("*")}
        for run in ("alone", "both")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_two_ranks_saved_goes_on_under_one_and_three(world: World, tmp_path: Path, strategy: str) -> None:
    """Three ranks share four pictures unevenly."""
    train_as("ddp", "transformer", world, tmp_path / "straight", {"steps": 7})
    processes.finish(
        processes.start_ranks(2, train_as, strategy, "transformer", world, tmp_path / "one", {"steps": 4})
    )
    import shutil

    shutil.copytree(tmp_path / "one", tmp_path / "three")
    go_on_as("ddp", tmp_path / "one", 3)
    processes.finish(processes.start_ranks(3, go_on_as, strategy, tmp_path / "three", 3))
    expected = {line["step"]: line for line in measured(tmp_path / "straight") if "loss" in line}
    for run in ("one", "three"):
        found = {line["step"]: line for line in measured(tmp_path / run) if "loss" in line}
        assert list(found) == list(expected)
        for step, line in found.items():
            assert line == pytest.approx(expected[step], rel=TOLERANCE, abs=TOLERANCE), f"{run}, step {step}"


def test_shares_cover_a_batch_and_weigh_as_their_pictures() -> None:
    for count in (1, 2, 3, 5):
        for pictures in (1, 2, 4, 7):
            shares = [Ranks(rank, count).share(pictures) for rank in range(count)]
            counted = [row for share in shares if share.weight for row in share.rows]
            assert counted == list(range(pictures))
            assert sum(share.weight for share in shares) == pytest.approx(count)
            means = torch.tensor([float(sum(share.rows)) / len(share.rows) for share in shares])
            weights = torch.tensor([share.weight for share in shares])
            assert float((means * weights).mean()) == pytest.approx(sum(range(pictures)) / pictures)


def test_a_shared_checkpoint_is_plain_safetensors(world: World, tmp_path: Path) -> None:
    processes.finish(processes.start_ranks(2, train_as, "fsdp", "transformer", world, tmp_path / "run", {"steps": 2}))
    saved = RunFolder(tmp_path / "run").load_last(Silent())
    assert saved.sharded
    names = sorted(file.name for file in saved.folder.iterdir())
    assert len(names) == 3
    assert [name.endswith(".safetensors") for name in names] == [True, True, False]
    assert saved.shapes("weights").keys() == saved.shapes("ema").keys()
    (saved.folder / names[1]).write_bytes(b"abc")
    report = Silent()
    with pytest.raises(Exception, match="no whole checkpoint"):
        RunFolder(tmp_path / "run").load_last(report)
    assert any("half written" in notice for notice in report.notices)
