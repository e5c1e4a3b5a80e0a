"""`bitgen resume`: a run folder's state names its verb; that run continues where it stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bitgen_cli.config import Config
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.parallel import joined
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import TokenizerStage
from bitgen_cli.engine.trainer import Stage
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.place import place
from bitgen_cli.report import Report
from bitgen_cli.runs.finetune_subject import VERB, SubjectResult, resume_subject
from bitgen_cli.runs.logs import add_logs
from bitgen_cli.runs.start import Parts, text_encoder_for
from bitgen_cli.runs.tokens import Data, open_tokens
from bitgen_cli.runs.train import (
    TOKENIZER,
    TrainResult,
    fit,
    picture_source,
    prepare_device,
    recipe,
    transformer_stage,
)


def resume(
    path: Path,
    report: Report,
    *,
    steps: int | None = None,
    device: str = "auto",
    strategy: str = "ddp",
    logs: tuple[str, ...] = (),
) -> TrainResult | SubjectResult:
    """Continues a training from its last whole checkpoint.

    On the CPU the result equals that of a run that was never stopped, bit for bit.

    Args:
        path: of the run.
        report: who listens.
        steps: train so many steps more than the run was made for; stored with the run.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        strategy: `ddp` or `fsdp`, where torchrun or `--devices` started several processes; how many there are, and how
            many there were before, changes nothing but the last digits.
        logs: `tensorboard`, `wandb`: logs besides those that the run has.

    Raises:
        InputError: no run, no whole checkpoint, or its data or start model cannot be read.
        UsageError: the run is finished and no further steps are asked for.
        ResourceError: no such device, or no space left; the last checkpoint is good.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    run = RunFolder(path)
    description = add_logs(run, run.description(), logs if place().rank == 0 else ())
    try:
        verb = description["verb"]
        if verb == VERB:
            return resume_subject(run, description, report, steps=steps, device=device)
        stage_name = description["stage"]
        told = (stage_name, description["data"], *(description.get(key, "") for key in ("image_root", "caption_key")))
        if not all(isinstance(value, str | None) for value in told) or None in told[:2]:
            raise InputError(f"{path / 'config.json'} does not describe a training: stage and data must be text")
        config = Config.model_validate(description["config"])
    except (KeyError, ValidationError) as error:
        raise InputError(f"{path / 'config.json'} does not describe a training: {error}") from error
    if verb != "train":
        raise InputError(f"{path} is a run of `bitgen {verb}`, which cannot be resumed")
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--steps {steps}: at least 1")
        config = _with_steps(config, stage_name, recipe(config, stage_name).steps + steps)
    run.refuse_finished(recipe(config, stage_name).steps)
    where = prepare_device(device)
    with joined(strategy, where) as ranks:
        stage = _stage(run, description, config, where, report)
        if steps is not None and ranks.first:
            run.describe({**description, "config": config.model_dump(mode="json")})
        return fit(stage_name, stage, config, run, report, ranks, started, resumed=True)


def _stage(
    run: RunFolder, description: dict[str, Any], config: Config, where: torch.device, report: Report
) -> Stage:
    """The stage as it was when the run began; a checkpoint brings it to where it stopped."""
    stage_name, root = description["stage"], description.get("image_root")
    data = Data(description["data"], None if root is None else Path(root), description.get("caption_key"))
    if stage_name == TOKENIZER:
        source = picture_source(config, data.name, data.image_root)
        return TokenizerStage(config, source, Tokenizer(config.model.tokenizer), where, report)
    model = load_model(run.start, parts=("tokenizer",))
    tokens = open_tokens(config, data, model, where, report)
    text_encoder = text_encoder_for(config, run.start, tokens, recipe(config, stage_name).seed, report)
    parts = Parts(tokens, model, Transformer(config.model), text_encoder)
    return transformer_stage(config, parts, run, where)


def _with_steps(config: Config, stage: str, steps: int) -> Config:
    longer = recipe(config, stage).model_copy(update={"steps": steps})
    return config.model_copy(update={"training": config.training.model_copy(update={stage: longer})})
