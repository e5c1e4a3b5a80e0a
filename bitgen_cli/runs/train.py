"""`bitgen train`: pictures to a tokenizer, or a token store to a transformer; a run leaves a model folder."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitgen_cli.config import Config, LoopConfig, ModelConfig
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import WORLD, open_source
from bitgen_cli.engine.device import keep_freed_memory, pick_device
from bitgen_cli.engine.model_folder import (
    TEXT_FOLDER,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Model,
    find_model,
    load_model,
    load_weights,
    read_model_config,
    read_tensors,
    require_same_tokenizer,
    save_model,
)
from bitgen_cli.engine.scales import nearest_ratio, schedule
from bitgen_cli.engine.store import TokenStore, is_store
from bitgen_cli.engine.text import TextEncoder, load_text_encoder, new_text_encoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import TokenizerStage
from bitgen_cli.engine.trainer import Stage, Trainer
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.engine.transformer_stage import TransformerStage
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.text_features import has_features_for

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
        init: model folder or run folder to begin with. The transformer needs the one whose tokenizer made the
            store.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
    """

    resolved: Resolved
    stage: str | None
    data: str
    out: Path
    init: str | None = None
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
    """

    run: Path
    stage: str
    steps: int
    loss: float
    validation: dict[str, float]
    model: Path
    seconds: float

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
        "init": options.init,
        "config": config.model_dump(mode="json"),
        "origins": options.resolved.origins,
    }
    stage: Stage
    if stage_name == TOKENIZER:
        tokenizer = _first_tokenizer(config, options.init)
        stage = tokenizer_stage(config, data, tokenizer, device, report)
        run.create(description)
    else:
        parts = _first_parts(config, data, options.init, report)
        stage = transformer_stage(config, parts, run, device)
        run.create(description)
        _save_start(run, config, parts)
    return fit(stage_name, stage, config, run, report, device, started)


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


@dataclass(frozen=True)
class Parts:
    """What a transformer's training needs besides its recipe.

    Attributes:
        store: bits, captions, latents.
        model: folder and tokenizer of the model the store was made with.
        transformer, text_encoder: to begin with; no text encoder where the store has its features.
    """

    store: TokenStore
    model: Model
    transformer: Transformer
    text_encoder: TextEncoder | None


def transformer_stage(config: Config, parts: Parts, run: RunFolder, device: torch.device) -> TransformerStage:
    """The stage that trains a transformer on a token store."""
    assert parts.model.tokenizer is not None
    file = run.start / TOKENIZER_FILE
    return TransformerStage(
        config, parts.store, parts.model.tokenizer, file, parts.transformer, parts.text_encoder, device
    )


def open_store(data: str, model: Model) -> TokenStore:
    """The token store in a folder, made with the tokenizer of that model.

    Raises:
        InputError: there is none, or it is broken.
        UsageError: another tokenizer made it.
    """
    store = TokenStore.open(Path(data))
    require_same_tokenizer(model, store.manifest.tokenizer, f"the token store {data}")
    return store


def text_encoder_for(
    config: Config, folder: Path | None, store: TokenStore, seed: int, report: Report
) -> TextEncoder | None:
    """The configured text encoder: fixed; or trained, from a model folder that has one, else new.

    None where it is fixed and the store has its features.
    """
    length = config.model.transformer.text_length
    text = config.model.text_encoder
    if has_features_for(store.manifest, config.model):
        return None
    if store.manifest.has_text:
        report.notice(f"the text features of {store.path} were not made by {text.source} and are not used")
    if text.source != "new":
        return load_text_encoder(text.source, length, torch.device("cpu"), torch.float32)
    if folder is not None:
        return load_text_encoder(str(folder / TEXT_FOLDER), length, torch.device("cpu"), torch.float32)
    return new_text_encoder(text, store.captions, length, seed)


def _first_tokenizer(config: Config, init: str | None) -> Tokenizer:
    """A tokenizer with fresh weights, or with those of a model of the same geometry."""
    tokenizer = Tokenizer(config.model.tokenizer)
    tokenizer.autoencoder.initialise(torch.Generator().manual_seed(recipe(config, TOKENIZER).seed))
    if init is not None:
        folder = find_model(init)
        _require_tokenizer(config, folder)
        load_weights(tokenizer, folder / TOKENIZER_FILE)
    return tokenizer


def _first_parts(config: Config, data: str, init: str | None, report: Report) -> Parts:
    """Store, tokenizer, and a transformer with fresh weights or with those of the model to begin with."""
    if init is None:
        raise UsageError("stage transformer needs --init", "the model or run whose tokenizer made the store")
    folder = find_model(init)
    _require_tokenizer(config, folder)
    model = load_model(folder, parts=("tokenizer",))
    store = open_store(data, model)
    seed = recipe(config, TRANSFORMER).seed
    transformer = Transformer(config.model)
    transformer.initialise(torch.Generator().manual_seed(seed))
    known = folder if (folder / TRANSFORMER_FILE).is_file() else None
    if known is not None and not _same_but_scales(model.config, config.model):
        report.notice(f"the transformer of {folder} has another geometry; this run begins with fresh weights")
        known = None
    if known is not None:
        _load_transformer(transformer, known / TRANSFORMER_FILE, model.config, config.model)
    return Parts(store, model, transformer, text_encoder_for(config, known, store, seed, report))


def _same_but_scales(found: ModelConfig, wanted: ModelConfig) -> bool:
    """Whether two models differ in nothing that a transformer's weights depend on but the rows of their scales."""
    rows = {"scale_embeddings": wanted.transformer.scale_embeddings}
    transformer = found.transformer.model_copy(update=rows)
    return (transformer, found.text_encoder) == (wanted.transformer, wanted.text_encoder)


def _load_transformer(transformer: Transformer, file: Path, found: ModelConfig, wanted: ModelConfig) -> None:
    """Weights of a file for other scales: each scale takes the embedding of the file's scale nearest in size."""
    with torch.device("meta"):
        expected = Transformer(found).state_dict()
    tensors = read_tensors(file, expected, torch.device("cpu"), None)
    if found.scales != wanted.scales:
        own, others = (
            schedule(model.scales, patchify=model.transformer.patchify, ratio=nearest_ratio(1.0, model.scales)).counts
            for model in (wanted, found)
        )
        rows = tensors["scale_embedding.weight"]
        nearest = [min(range(len(others)), key=lambda k: abs(math.log(others[k] / count))) for count in own]
        tensors["scale_embedding.weight"] = transformer.scale_embedding.weight.detach().clone()
        tensors["scale_embedding.weight"][: len(own)] = rows[nearest].to(transformer.dtype)
    transformer.load_state_dict(tensors)


def _save_start(run: RunFolder, config: Config, parts: Parts) -> None:
    """Copies what a resumed run needs: the tokenizer, and the vocabulary of a trained text encoder."""
    save_model(
        run.start,
        config.model,
        config.sampling,
        tokenizer=parts.model.folder / TOKENIZER_FILE,
        text_encoder=parts.text_encoder if config.model.text_encoder.source == "new" else None,
    )


def _require_tokenizer(config: Config, folder: Path) -> None:
    found, _, _ = read_model_config(folder)
    if found.tokenizer != config.model.tokenizer:
        raise UsageError(
            f"the tokenizer of {folder} has another geometry than {config.name}",
            "use the configuration it was made with",
        )


def stage_for(data: str) -> str:
    return TRANSFORMER if is_store(Path(data)) else TOKENIZER
