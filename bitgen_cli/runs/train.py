"""`bitgen train`: pictures to a tokenizer, pictures or their tokens to a transformer; a run leaves a model folder."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitgen_cli.config import Config, LoopConfig
from bitgen_cli.engine.beginning import PartReport
from bitgen_cli.engine.captions import NO_CAPTIONS
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data_report import FILE, DataReport, announce, count_captions, data_report, measure
from bitgen_cli.engine.device import keep_freed_memory, pick_device, pick_dtype
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import TOKENIZER_FILE
from bitgen_cli.engine.online import OnlineTokens, online_schedules
from bitgen_cli.engine.parallel import Ranks, joined
from bitgen_cli.engine.scales import Schedule, buckets, budgeted, largest, nearest_ratio, ratios, schedule
from bitgen_cli.engine.sources import WORLD, PictureSource, open_source
from bitgen_cli.engine.store import TokenStore, is_store
from bitgen_cli.engine.tokenizer_stage import TokenizerStage
from bitgen_cli.engine.trainer import Stage, Trainer
from bitgen_cli.engine.training_memory import (
    Layout,
    TrainingMemory,
    tokenizer_training_memory,
    transformer_training_memory,
)
from bitgen_cli.engine.transformer_stage import TransformerStage
from bitgen_cli.errors import UsageError
from bitgen_cli.files import only_writer, write_json
from bitgen_cli.place import place
from bitgen_cli.report import Report
from bitgen_cli.runs.fitting import Fit, fit_of
from bitgen_cli.runs.logs import logged, plan_logs
from bitgen_cli.runs.start import NOTHING, Init, Parts, first_parts, first_tokenizer, save_report, save_start, to_json
from bitgen_cli.runs.text_features import has_features_for
from bitgen_cli.runs.tokens import Data, kept_of_pictures

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
        data: pictures as `open_source` reads them, or for the transformer a token store.
        out: folder of the run; must be new or empty.
        init: models and weight files to begin with. A transformer needs a tokenizer, for a store the one that made it.
        image_root: where listed pictures are, if not beside their listing.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        devices: processes of this machine that are to train together.
        strategy: `ddp` or `fsdp`, what they share, or those that torchrun started.
        logs: `tensorboard`, `wandb`: where measurements go besides metrics.jsonl.
        caption_key: field that holds the captions of pictures for the transformer; `none` reads none.
    """

    resolved: Resolved
    stage: str | None
    data: str
    out: Path
    init: Init = NOTHING
    device: str = "auto"
    devices: int = 1
    strategy: str = "ddp"
    logs: tuple[str, ...] = ()
    image_root: Path | None = None
    caption_key: str | None = None

    def lasting(self) -> Data:
        """The data by a name that does not hang on the current folder."""
        data = self.data if self.data.startswith(WORLD) else str(Path(self.data).expanduser().resolve())
        root = None if self.image_root is None else self.image_root.expanduser().resolve()
        return Data(data, root, self.caption_key)


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
        seconds: it took.
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
    stage = checked(options)
    logs = plan_logs(options.logs)
    device = prepare_device(options.device)
    with joined(options.strategy, device) as ranks:
        return _train(options, stage, logs, ranks, report, started)


def _train(
    options: TrainOptions, stage: str, logs: dict[str, Any], ranks: Ranks, report: Report, started: float
) -> TrainResult:
    """A training as one of the ranks; the first one alone writes."""
    config, run, data = options.resolved.config, RunFolder(options.out), options.lasting()
    if ranks.first:
        run.refuse_used()
        fit_for(options, stage, ranks.device).require()
    begun = begin(options, stage, run, ranks.device, report)
    if ranks.first:
        run.create(
            {
                "verb": "train",
                "stage": stage,
                "data": data.name,
                "image_root": None if data.image_root is None else str(data.image_root),
                "caption_key": data.caption_key,
                "init": list(options.init.models),
                "logs": logs,
                "config": config.model_dump(mode="json"),
                "origins": options.resolved.origins,
            }
        )
        if begun.parts is not None:
            save_start(run, config, begun.parts)
        told = _report_on(config, begun, report)
        if told is not None:
            write_json(run.path / FILE, told.to_json())
            report.notice(told.summary())
        save_report(run, begun.reports)
    ranks.wait()
    result = fit(stage, begun.stage, config, run, report, ranks, started)
    return replace(result, init=to_json(begun.reports))


def try_out(options: TrainOptions, report: Report) -> Fit:
    """Does everything up to the first step and leaves nothing behind: what the training needs, and whether it is there.

    Where it is not there, nothing is built.

    Raises: as `train`.
    """
    stage = checked(options)
    device, run = prepare_device(options.device), RunFolder(options.out)
    run.refuse_used()
    plan_logs(options.logs)
    found = fit_for(options, stage, device)
    if found.fits:
        begun = begin(options, stage, run, device, report)
        try:
            Trainer(begun.stage, recipe(options.resolved.config, stage), run, report, Ranks(device=device))
        finally:
            begun.stage.close()
        found = replace(found, init=tuple(to_json(begun.reports)))
    return found


def fit_for(options: TrainOptions, stage: str, device: torch.device) -> Fit:
    """What each rank of a stage needs to be trained."""
    config, data = options.resolved.config, options.lasting()
    store = TokenStore.open(Path(data.name)) if stage == TRANSFORMER and data.is_store else None
    stored_text = store is not None and has_features_for(store.text, config.model)
    layout = Layout(device, max(options.devices, place().count), options.strategy == "fsdp")
    online = stage == TRANSFORMER and store is None

    def needed(config: Config, layout: Layout) -> TrainingMemory:
        model = config.model
        if store is not None:
            shapes = [store.schedule(ratio) for ratio in store.ratios]
        elif config.training.transformer is not None and online:
            shapes = list(online_schedules(model, config.training.transformer.aspects).values())
        else:
            shapes = [
                schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio)
                for ratio in ratios(model.scales)
            ]
        longest, counts = max(shapes, key=lambda scales: scales.positions), parameters(model)
        if stage == TOKENIZER:
            memory = tokenizer_training_memory(config, counts, longest, layout)
        else:
            tokenized = pick_dtype("auto", device) if online else None
            memory = transformer_training_memory(
                config, counts, longest, layout, stored_text=stored_text, tokenized=tokenized
            )
        assert memory is not None
        return memory

    kept = store.kept_latents() if store is not None else 0
    if device.type == "cpu" and store is None:
        rows = layout.rows(recipe(config, stage).batch_size)
        kept = _kept_pictures(config, data) if stage == TOKENIZER else kept_of_pictures(config, data, rows)
    return fit_of(config, stage, layout, needed, options.out, data=kept)


def _kept_pictures(config: Config, data: Data) -> int:
    """Bytes of the pictures that are kept when they have been read."""
    training = config.training.tokenizer
    assert training is not None
    height, width = _square(config).pixels(config.model.tokenizer.patch_size)
    count = len(picture_source(config, data.name, data.image_root))
    return min(int(training.picture_cache * 2**30), 3 * height * width * count)


@dataclass(frozen=True)
class Begun:
    """A stage before its first step.

    Attributes:
        parts: of a transformer's training.
        source: of a tokenizer's.
        reports: what became of the weights it begins with.
    """

    stage: Stage
    parts: Parts | None
    source: PictureSource | None
    reports: list[PartReport]


def checked(options: TrainOptions) -> str:
    """The stage, when the options fit together."""
    stage = options.stage or stage_for(options.data)
    if stage == SUBJECT:
        raise UsageError("`bitgen train` does not learn subjects", "bitgen finetune-subject does")
    recipe(options.resolved.config, stage)
    stored = options.lasting().is_store
    if stage == TRANSFORMER and not options.init.models:
        whose = "whose tokenizer made the store" if stored else "with the tokenizer that turns the pictures into bits"
        raise UsageError("stage transformer needs --init", f"the model or run {whose}")
    if stage == TRANSFORMER and stored:
        for flag, value in (("--image-root", options.image_root), ("--caption-key", options.caption_key)):
            if value is not None:
                raise UsageError(f"{flag} is for pictures", "a token store holds all that is learned from")
    if stage == TOKENIZER and options.caption_key is not None:
        raise UsageError("a tokenizer learns from no captions", "leave out --caption-key, or add --stage transformer")
    return stage


def begin(options: TrainOptions, stage: str, run: RunFolder, device: torch.device, report: Report) -> Begun:
    """Data, weights and stage, as they are before the first step."""
    config, data = options.resolved.config, options.lasting()
    seed = recipe(config, stage).seed
    if stage == TOKENIZER:
        tokenizer, reports = first_tokenizer(config, options.init, seed, report)
        source = picture_source(config, data.name, data.image_root)
        announce(source, options.data, report)
        return Begun(TokenizerStage(config, source, tokenizer, device, report), None, source, reports)
    parts, reports = first_parts(config, data, options.init, seed, report, device)
    return Begun(transformer_stage(config, parts, run, device), parts, None, reports)


def fit(
    stage_name: str,
    stage: Stage,
    config: Config,
    run: RunFolder,
    report: Report,
    ranks: Ranks,
    started: float,
    *,
    resumed: bool = False,
) -> TrainResult:
    """Runs the loop to its end, from the run's last checkpoint when `resumed`; one process at a time may.

    Raises:
        InputError: another process trains this run.
    """
    loop = recipe(config, stage_name)
    heard = 0
    try:
        with only_writer(run.path) if ranks.first else nullcontext():
            trainer = Trainer(stage, loop, run, report, ranks)
            if resumed:
                saved = run.load_last(report, clean=ranks.first)
                trainer.load(saved)
                if ranks.first:
                    heard = run.cut_log(saved.step)
            with logged(run, report, trainer.progress.step, heard) if ranks.first else nullcontext():
                values = trainer.fit()
    finally:
        stage.close()
    return TrainResult(
        run=run.path,
        stage=stage_name,
        steps=trainer.progress.step,
        loss=trainer.progress.losses[-1],
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
    """The device of that name, made ready for training; each of several processes takes a GPU of its own."""
    device = pick_device(name)
    here = place()
    if device.type == "cuda" and here.count > 1:
        device = pick_device(f"cuda:{here.local_rank}")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def require_alone() -> None:
    """Raises UsageError in one of several processes: a subject is learned in minutes, and by one."""
    if place().count > 1:
        raise UsageError("a subject is learned by one process", "start bitgen without torchrun")


def picture_source(config: Config, data: str, image_root: Path | None) -> PictureSource:
    """The pictures a tokenizer learns from; captions play no part."""
    size = max(_square(config).pixels(config.model.tokenizer.patch_size))
    return open_source(data, size, caption_key=NO_CAPTIONS, image_root=image_root)


def _square(config: Config) -> Schedule:
    """The scales of the largest square pictures a tokenizer learns from."""
    model, training = config.model, config.training.tokenizer
    assert training is not None
    return budgeted(
        model.scales,
        patchify=model.transformer.patchify,
        ratio=nearest_ratio(1.0, model.scales),
        budget=largest(training.resolutions),
    )


def _report_on(config: Config, begun: Begun, report: Report) -> DataReport | None:
    """What is to be said of the pictures that are learned from; None of a store, which has its own report."""
    model, training = config.model, config.training.tokenizer
    if begun.source is not None:
        assert training is not None
        pixels = {
            ratio: schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio).pixels(
                model.tokenizer.patch_size
            )
            for ratio in buckets(model.scales, training.aspects)
        }
        return data_report(begun.source, *measure(begun.source, report), pixels)
    assert begun.parts is not None
    tokens, text = begun.parts.tokens, begun.parts.text_encoder
    if not isinstance(tokens, OnlineTokens):
        return None
    vocabulary = None if text is None else text.vocabulary
    captions = count_captions(tokens.keys, tokens.captions, model.transformer.text_length, vocabulary)
    return data_report(tokens.source, tokens.keys, tokens.sizes, tokens.bad, tokens.pixels, captions)


def transformer_stage(config: Config, parts: Parts, run: RunFolder, device: torch.device) -> TransformerStage:
    """The stage that trains a transformer."""
    assert parts.model.tokenizer is not None
    file = run.start / TOKENIZER_FILE
    return TransformerStage(
        config, parts.tokens, parts.model.tokenizer, file, parts.transformer, parts.text_encoder, device
    )


def stage_for(data: str) -> str:
    """What is trained on data unless something else is asked for."""
    return TRANSFORMER if is_store(Path(data)) else TOKENIZER
