"""`bitgen train`: pictures to a tokenizer, or a token store to a transformer; a run leaves a model folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitgen_cli.config import Config, LoopConfig
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import WORLD, open_source
from bitgen_cli.engine.device import keep_freed_memory, pick_device
from bitgen_cli.engine.model_folder import TOKENIZER_FILE
from bitgen_cli.engine.scales import nearest_ratio, schedule
from bitgen_cli.engine.store import MANIFEST
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import TokenizerStage
from bitgen_cli.engine.trainer import Stage, Trainer
from bitgen_cli.engine.transformer_stage import TransformerStage
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.start import NOTHING, Init, Parts, first_parts, first_tokenizer, save_report, save_start, to_json

if TYPE_CHECKING:
    from bitgen_cli.presets import Resolved

TOKENIZER, TRANSFORMER, SUBJECT = "tokenizer", "transformer", "subject"


@dataclass(frozen=True)
class TrainOptions:
    """What to train and on what.

    Attributes:
        resolved: the whole configuration and where its values come from.
        stage: `tokenizer` or `transformer`; None takes the transformer for a token store, the tokenizer for
            pictures.
        data: for the tokenizer a folder of pictures or `world:N[:SEED][:flip]`, for the transformer a token store.
        out: folder of the run; must be new or empty.
        init: models and weight files to begin with. The transformer needs the tokenizer that made the store.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    """

    resolved: Resolved
    stage: str | None
    data: str
    out: Path
    init: Init = NOTHING
    device: str = "auto"


@dataclass(frozen=True)
class TrainResult:
    """What a training left.

    Attributes:
        run: its folder.
        stage: `tokenizer` or `transformer`.
        steps: done in all.
        loss: of the last step.
        validation: measurements on held-out pictures after the last step; empty without such pictures.
        model: the model folder.
        seconds: this call took.
        init: what became of every key of the weights it began with, a part each; empty when it was resumed.
    """

    run: Path
    stage: str
    steps: int
    loss: float
    validation: dict[str, float]
    model: Path
    seconds: float
    init: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "run": str(self.run), "model": str(self.model)}


def train(options: TrainOptions, report: Report) -> TrainResult:
    """Trains a stage from its beginning.

    Raises:
        UsageError: no recipe for the stage, parts that do not fit together, or OUT holds something.
        InputError: the data or the model to begin with cannot be read.
        ResourceError: no such device, or no space left; the last checkpoint is good.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    config = options.resolved.config
    stage_name = options.stage or stage_for(options.data)
    if stage_name == SUBJECT:
        raise UsageError("`bitgen train` does not learn subjects", "bitgen finetune-subject does")
    recipe(config, stage_name)
    device = prepare_device(options.device)
    run = RunFolder(options.out)
    run.refuse_used()
    data = options.data if options.data.startswith(WORLD) else str(Path(options.data).expanduser().resolve())
    description = {
        "verb": "train",
        "stage": stage_name,
        "data": data,
        "init": list(options.init.models),
        "config": config.model_dump(mode="json"),
        "origins": options.resolved.origins,
    }
    stage: Stage
    seed = recipe(config, stage_name).seed
    if stage_name == TOKENIZER:
        tokenizer, begun = first_tokenizer(config, options.init, seed, report)
        stage = tokenizer_stage(config, data, tokenizer, device, report)
        run.create(description)
    else:
        parts, begun = first_parts(config, data, options.init, seed, report)
        stage = transformer_stage(config, parts, run, device)
        run.create(description)
        save_start(run, config, parts)
    save_report(run, begun)
    return replace(fit(stage_name, stage, config, run, report, device, started), init=to_json(begun))


def fit(
    stage_name: str,
    stage: Stage,
    config: Config,
    run: RunFolder,
    report: Report,
    device: torch.device,
    started: float,
    *,
    resumed: bool = False,
) -> TrainResult:
    """Runs the loop to its end, from the run's last checkpoint when `resumed`."""
    loop = recipe(config, stage_name)
    try:
        trainer = Trainer(stage, loop, run, report, device)
        if resumed:
            checkpoint = run.load_last(report)
            trainer.load(checkpoint)
            run.cut_log(checkpoint.step)
        values = trainer.fit()
    finally:
        stage.close()
    return TrainResult(
        run=run.path,
        stage=stage_name,
        steps=trainer.progress.step,
        loss=values["loss"],
        validation={name: value for name, value in values.items() if name.startswith(("val_", "drift_"))},
        model=run.model,
        seconds=time.perf_counter() - started,
    )


def recipe(config: Config, stage: str) -> LoopConfig:
    """The recipe of a stage.

    Raises:
        UsageError: unknown stage, or the configuration has no recipe for it.
    """
    if stage not in (TOKENIZER, TRANSFORMER, SUBJECT):
        raise UsageError(f"unknown stage {stage!r}", f"{TOKENIZER} or {TRANSFORMER}")
    found: LoopConfig | None = getattr(config.training, stage)
    if found is None:
        raise UsageError(f"{config.name} has no recipe for stage {stage}", f"add training.{stage} to it")
    return found


def prepare_device(name: str) -> torch.device:
    """The device of that name, made ready for training."""
    device = pick_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def tokenizer_stage(
    config: Config, data: str, tokenizer: Tokenizer, device: torch.device, report: Report
) -> TokenizerStage:
    """The stage that trains a tokenizer on pictures."""
    scales = config.model.scales
    square = schedule(scales, patchify=config.model.transformer.patchify, ratio=nearest_ratio(1.0, scales))
    source = open_source(data, picture_size=max(square.pixels(config.model.tokenizer.patch_size)))
    return TokenizerStage(config, source, tokenizer, device, report)


def transformer_stage(config: Config, parts: Parts, run: RunFolder, device: torch.device) -> TransformerStage:
    """The stage that trains a transformer on a token store."""
    assert parts.model.tokenizer is not None
    file = run.start / TOKENIZER_FILE
    return TransformerStage(
        config, parts.store, parts.model.tokenizer, file, parts.transformer, parts.text_encoder, device
    )


def stage_for(data: str) -> str:
    return TRANSFORMER if (Path(data) / MANIFEST).is_file() else TOKENIZER
