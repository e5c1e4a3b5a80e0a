"""`bitgen train --overfit-check`: whether model and recipe can memorise a few pictures, before they get all of them.

What cannot learn four pictures by heart learns nothing from four million either: a wrong learning rate, a broken data
set, bits that do not belong to their captions. Nothing random takes part, and nothing is left behind.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitgen_cli.config import Config
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.trainer import Stage, Trainer
from bitgen_cli.errors import UsageError
from bitgen_cli.place import place
from bitgen_cli.report import Report, Table
from bitgen_cli.runs.train import TOKENIZER, TRANSFORMER, TrainOptions, begin, checked, fit_for, prepare_device, recipe

PICTURES = 4
STEPS = 600
"""Most steps it may take."""
ACCURACY = 0.99
"""Share of the bits of every scale that must be right."""
ERROR = 0.06
"""Mean absolute error of the reconstructions that must be reached, of pictures in [-1, 1]."""
LASTING = 3
"""Steps in a row that must be so good."""

_PLAIN: dict[str, dict[str, Any]] = {
    TOKENIZER: {"scale_dropout": 0.0, "adversarial_weight": 0.0, "every_bit_count": True},
    TRANSFORMER: {"flip_strength": 0.0, "caption_dropout": 0.0},
}
"""What makes memorising harder, turned off."""
_ALWAYS = {"accumulation": 1, "ema_decay": 0.0, "validation_images": 0, "sample_every": 0, "batch_size": PICTURES}


@dataclass(frozen=True)
class OverfitResult:
    """How well a few pictures were memorised.

    Attributes:
        stage: `tokenizer` or `transformer`.
        pictures: their names.
        passed: whether every measure was reached.
        steps: it took, or were given.
        loss: at the end.
        measures: accuracy of the bits per scale, or error of the reconstructions.
        wanted: what each must reach.
        seconds: it took.
    """

    stage: str
    pictures: list[str]
    passed: bool
    steps: int
    loss: float
    measures: dict[str, float]
    wanted: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """For people."""
        verdict = "PASS" if self.passed else "FAIL"
        bound = "at least" if self.stage == TRANSFORMER else "at most"
        rows = [[name, f"{value:.4f}", f"{bound} {self.wanted}"] for name, value in self.measures.items()]
        title = f"{verdict}: {len(self.pictures)} pictures, {self.steps} steps, {self.seconds:.0f} s"
        return [Table(title, ["measure", "reached", "wanted"], rows)]


def overfit_check(options: TrainOptions, report: Report) -> OverfitResult:
    """Trains on PICTURES pictures, without chance, until they are known by heart or STEPS are over.

    Raises: as `train`.
    """
    started = time.perf_counter()
    if place().count > 1:
        raise UsageError("--overfit-check is done by one process", "leave out torchrun and --devices")
    stage_name = checked(options)
    plain = replace(options, resolved=replace(options.resolved, config=_plain(options.resolved.config, stage_name)))
    device = prepare_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        fit_for(plain, stage_name, device).require()
        stage = begin(plain, stage_name, run, device, report).stage
        try:
            chosen = _chosen(stage)
            stage.groups = [chosen]
            trainer = Trainer(stage, recipe(plain.resolved.config, stage_name), run, report, Ranks(device=device))
            passed, measures = _memorise(trainer, stage_name, report)
        finally:
            stage.close()
    return OverfitResult(
        stage=stage_name,
        pictures=stage.names(chosen),
        passed=passed,
        steps=trainer.progress.step,
        loss=trainer.progress.losses[-1],
        measures=measures,
        wanted=ACCURACY if stage_name == TRANSFORMER else ERROR,
        seconds=time.perf_counter() - started,
    )


def _memorise(trainer: Trainer, stage: str, report: Report) -> tuple[bool, dict[str, float]]:
    """Whether the pictures were memorised, and what was measured in the last step."""
    good = 0
    measures: dict[str, float] = {}
    with report.task("memorise", STEPS) as task:
        while trainer.progress.step < STEPS and good < LASTING:
            found = trainer.step()
            wanted = "bit_accuracy/" if stage == TRANSFORMER else "l1"
            measures = {name: float(value) for name, value in found.items() if name.startswith(wanted)}
            reached = [v >= ACCURACY if stage == TRANSFORMER else v <= ERROR for v in measures.values()]
            good = good + 1 if all(reached) else 0
            task.advance()
            task.status(f"loss {trainer.progress.losses[-1]:.4f}")
    return good == LASTING, measures


def _chosen(stage: Stage) -> list[int]:
    """A few pictures of one shape, of different captions where there are such: equal ones cannot be told apart."""
    group = max(stage.groups, key=len)
    told: dict[str, int] = {}
    for index, name in zip(group, stage.captions(group), strict=True):
        told.setdefault(name, index)
    different = list(told.values())[:PICTURES]
    return sorted([*different, *(index for index in group if index not in different)][:PICTURES])


def _plain(config: Config, stage: str) -> Config:
    """The configuration without chance, averages and decay."""
    loop = recipe(config, stage)
    steady = {"weight_decay": 0.0, "schedule": "constant", "warmup_steps": min(20, loop.optimizer.warmup_steps)}
    changes = {**_ALWAYS, **_PLAIN[stage], "steps": STEPS, "optimizer": loop.optimizer.model_copy(update=steady)}
    training = config.training.model_copy(update={stage: loop.model_copy(update=changes)})
    transformer = config.model.transformer.model_copy(update={"drop_path": 0.0})
    model = config.model.model_copy(update={"transformer": transformer})
    return config.model_copy(update={"training": training, "model": model})
