"""`bitgen resume`: a run folder's state names its verb; that run continues where it stopped."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import ValidationError

from bitgen_cli.config import Config
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trainer import Stage
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.finetune_subject import VERB, SubjectResult, resume_subject
from bitgen_cli.runs.train import (
    TOKENIZER,
    Parts,
    TrainResult,
    fit,
    open_store,
    prepare_device,
    recipe,
    text_encoder_for,
    tokenizer_stage,
    transformer_stage,
)


def resume(
    path: Path, report: Report, *, steps: int | None = None, device: str = "auto"
) -> TrainResult | SubjectResult:
    """Continues a training from its last whole checkpoint.

    On the CPU the result equals that of a run that was never stopped, bit for bit.

    Args:
        path: of the run.
        report: who listens.
        steps: train so many steps more than the run was made for; stored with the run.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises:
        InputError: no run, no whole checkpoint, or its data or start model cannot be read.
        UsageError: the run is finished and no further steps are asked for.
        ResourceError: no such device, or no space left; the last checkpoint is good.
        DivergedError: the loss is no longer a number; the last checkpoint is good.
        Interrupted: stopped by the user; the run is saved.
    """
    started = time.perf_counter()
    run = RunFolder(path)
    description = run.description()
    try:
        verb = description["verb"]
        if verb == VERB:
            return resume_subject(run, description, report, steps=steps, device=device)
        stage_name, data = description["stage"], description["data"]
        config = Config.model_validate(description["config"])
    except (KeyError, ValidationError) as error:
        raise InputError(f"{path / 'config.json'} does not describe a training: {error}") from error
    if verb != "train":
        raise InputError(f"{path} is a run of `bitgen {verb}`, which cannot be resumed")
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--steps {steps}: at least 1")
        config = _with_steps(config, stage_name, recipe(config, stage_name).steps + steps)
    total = recipe(config, stage_name).steps
    done = max(run.steps(), default=0)
    if done >= total:
        raise UsageError(f"{path} is finished: {done} of {total} steps", "--steps N trains N more")
    where = prepare_device(device)
    stage: Stage
    if stage_name == TOKENIZER:
        stage = tokenizer_stage(config, data, Tokenizer(config.model.tokenizer), where, report)
    else:
        model = load_model(run.start, parts=("tokenizer",))
        store = open_store(data, model)
        text_encoder = text_encoder_for(config, run.start, store, recipe(config, stage_name).seed, report)
        parts = Parts(store, model, Transformer(config.model), text_encoder)
        stage = transformer_stage(config, parts, run, where)
    if steps is not None:
        run.describe({**description, "config": config.model_dump(mode="json")})
    return fit(stage_name, stage, config, run, report, where, started, resumed=True)


def _with_steps(config: Config, stage: str, steps: int) -> Config:
    longer = recipe(config, stage).model_copy(update={"steps": steps})
    return config.model_copy(update={"training": config.training.model_copy(update={stage: longer})})
