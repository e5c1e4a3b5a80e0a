"""`bitgen train`: pictures to a tokenizer, or a token store to a transformer; a run leaves a model folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitgen_cli.config import Config, LoopConfig
from bitgen_cli.engine.beginning import PartReport
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import WORLD, open_source
from bitgen_cli.engine.device import keep_freed_memory, pick_device
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import TOKENIZER_FILE
from bitgen_cli.engine.scales import nearest_ratio, ratios, schedule
from bitgen_cli.engine.store import MANIFEST, TokenStore
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import TokenizerStage
from bitgen_cli.engine.trainer import Stage, Trainer
from bitgen_cli.engine.training_memory import (
    Place,
    TrainingMemory,
    tokenizer_training_memory,
    transformer_training_memory,
)
from bitgen_cli.engine.transformer_stage import TransformerStage, kept_latents
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.fitting import Fit, fit_of
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
        ResourceError: no such device, not enough memory or disk; when the disk is full later, the last checkpoint is
            good.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    stage_name, device, run, data = _checked(options)
    config = options.resolved.config
    fit_for(config, stage_name, data, run, device).require()
    begun = _begin(config, stage_name, data, options.init, run, device, report)
    run.create(
        {
            "verb": "train",
            "stage": stage_name,
            "data": data,
            "init": list(options.init.models),
            "config": config.model_dump(mode="json"),
            "origins": options.resolved.origins,
        }
    )
    if begun.parts is not None:
        save_start(run, config, begun.parts)
    save_report(run, begun.reports)
    result = fit(stage_name, begun.stage, config, run, report, device, started)
    return replace(result, init=to_json(begun.reports))


def try_out(options: TrainOptions, report: Report) -> Fit:
    """Does everything up to the first step and leaves nothing behind: what the training needs, and whether it is there.

    Where it is not there, nothing is built.

    Raises: as `train`.
    """
    stage_name, device, run, data = _checked(options)
    config = options.resolved.config
    found = fit_for(config, stage_name, data, run, device)
    if found.fits:
        begun = _begin(config, stage_name, data, options.init, run, device, report)
        try:
            Trainer(begun.stage, recipe(config, stage_name), run, report, device)
        finally:
            begun.stage.close()
        found = replace(found, init=tuple(to_json(begun.reports)))
    return found


def fit_for(config: Config, stage: str, data: str, run: RunFolder, device: torch.device) -> Fit:
    """What a stage needs to be trained on those data."""
    store = TokenStore.open(Path(data)) if stage == TRANSFORMER and (Path(data) / MANIFEST).is_file() else None

    def needed(config: Config, place: Place) -> TrainingMemory:
        model = config.model
        known = list(ratios(model.scales)) if store is None else store.ratios
        shapes = [schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio) for ratio in known]
        if store is not None:
            shapes = [store.schedule(ratio) for ratio in known]
        largest = max(shapes, key=lambda scales: scales.positions)
        of = tokenizer_training_memory if stage == TOKENIZER else transformer_training_memory
        memory = of(config, parameters(model), largest, place)
        assert memory is not None
        return memory

    kept = kept_latents(store) if store is not None else 0
    if stage == TOKENIZER and device.type == "cpu":
        kept = _kept_pictures(config, data)
    return fit_of(config, stage, Place(device), needed, run.path, data=kept)


def _kept_pictures(config: Config, data: str) -> int:
    """Bytes of the pictures that are kept when they have been read."""
    training = config.training.tokenizer
    assert training is not None
    model = config.model
    square = schedule(model.scales, patchify=model.transformer.patchify, ratio=nearest_ratio(1.0, model.scales))
    height, width = square.pixels(model.tokenizer.patch_size)
    return min(int(training.picture_cache * 2**30), 3 * height * width * len(open_source(data, picture_size=height)))


@dataclass(frozen=True)
class _Begun:
    """A stage before its first step.

    Attributes:
        parts: of a transformer's training.
        reports: what became of the weights it begins with.
    """

    stage: Stage
    parts: Parts | None
    reports: list[PartReport]


def _checked(options: TrainOptions) -> tuple[str, torch.device, RunFolder, str]:
    """Stage, device, the unused run folder, and the data by a name that does not hang on the current folder."""
    stage = options.stage or stage_for(options.data)
    if stage == SUBJECT:
        raise UsageError("`bitgen train` does not learn subjects", "bitgen finetune-subject does")
    recipe(options.resolved.config, stage)
    device = prepare_device(options.device)
    run = RunFolder(options.out)
    run.refuse_used()
    if stage == TRANSFORMER and not options.init.models:
        raise UsageError("stage transformer needs --init", "the model or run whose tokenizer made the store")
    data = options.data if options.data.startswith(WORLD) else str(Path(options.data).expanduser().resolve())
    return stage, device, run, data


def _begin(
    config: Config, stage: str, data: str, init: Init, run: RunFolder, device: torch.device, report: Report
) -> _Begun:
    seed = recipe(config, stage).seed
    if stage == TOKENIZER:
        tokenizer, reports = first_tokenizer(config, init, seed, report)
        return _Begun(tokenizer_stage(config, data, tokenizer, device, report), None, reports)
    parts, reports = first_parts(config, data, init, seed, report)
    return _Begun(transformer_stage(config, parts, run, device), parts, reports)


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
