"""`bitgen train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitgen_cli.commands.options import (
    LEARNING,
    TRYING,
    Aspects,
    CaptionKey,
    ConfigFile,
    Device,
    Devices,
    DryRun,
    ImageRoot,
    Json,
    LearningSeed,
    Logs,
    Offline,
    Overrides,
    Steps,
    Strategy,
    Sweep,
    flag,
    option,
    shapes,
)
from bitgen_cli.commands.trainings import shared_words, show_fit, start_several, try_combinations
from bitgen_cli.errors import DivergedError, UsageError

if TYPE_CHECKING:
    from bitgen_cli.runs.train import TrainOptions


def train(
    context: typer.Context,
    data: Annotated[
        str,
        option("DATA", "Pictures as for tokenize; for a transformer also a token store."),
    ],
    out: Annotated[Path, option("RUN", "Folder of the run, new or empty.")],
    preset: Annotated[
        str | None,
        option("PRESET", "The model and its recipe."),
    ] = None,
    stage: Annotated[
        str | None,
        option("STAGE", "tokenizer or transformer; without it, what DATA is for."),
    ] = None,
    init: Annotated[
        list[str] | None,
        option(
            "MODEL",
            "Start from this model or weight file, of Infinity too; may be repeated. A transformer needs a tokenizer: "
            "of a store the one that made it.",
        ),
    ] = None,
    aspect: Aspects = None,
    caption_key: CaptionKey = None,
    image_root: ImageRoot = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    steps: Steps = None,
    batch_size: Annotated[
        int | None,
        option("N", "Pictures per micro-batch.", LEARNING, least=1),
    ] = None,
    seed: LearningSeed = None,
    allow_init_mismatch: Annotated[
        list[str] | None,
        option("NAME", "Weights of --init that may be missing, left over or misshapen. May be repeated.", LEARNING),
    ] = None,
    logs: Logs = None,
    dry_run: DryRun = False,
    overfit_check: Annotated[
        bool,
        flag(
            "--overfit-check",
            "See whether four pictures can be memorised, PASS or FAIL, and leave nothing behind.",
            TRYING,
        ),
    ] = False,
    sweep: Sweep = None,
    device: Device = "auto",
    offline: Offline = False,
    devices: Devices = None,
    strategy: Strategy = "ddp",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on pictures, or a transformer on a token store or on pictures.

    Ctrl-C finishes the step and saves; `bitgen resume` continues.
    """
    if sweep is None and not dry_run and not overfit_check:
        start_several(context, devices)

    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_result
    from bitgen_cli.console.trainings import show_training
    from bitgen_cli.presets import resolve

    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": seed}
    flags: dict[str, Any] = {}
    if aspect is not None or any(value is not None for value in given.values()):
        section = stage
        if stage is None or (aspect is not None and stage == "transformer"):
            from bitgen_cli.runs.train import stage_for

            usual = stage_for(data)
            section = stage or usual
            if aspect is not None and section == usual == "transformer":
                raise UsageError("--aspect is for pictures", "a token store has the shapes `bitgen tokenize` was told")
        given["aspects"] = None if aspect is None else list(shapes(aspect))
        flags = {f"training.{section}.{name}": value for name, value in given.items() if value is not None}
    if sweep is not None:
        from bitgen_cli.runs.sweep import SweepOptions, combinations

        if dry_run or overfit_check:
            raise UsageError("--sweep does not go with --dry-run and --overfit-check", "try one combination out")
        tried = SweepOptions("train", *shared_words(context), tuple(overrides or ()), out, config)
        for combination in combinations(tried.overrides):
            # every mistake is told before the first run begins
            resolve(preset, config_file=config, overrides=combination.overrides, flags=flags)
        try_combinations(tried, sweep, as_json)
        return
    resolved = resolve(preset, config_file=config, overrides=tuple(overrides or ()), flags=flags)

    from bitgen_cli.runs.start import Init
    from bitgen_cli.runs.train import TrainOptions, try_out
    from bitgen_cli.runs.train import train as start

    options = TrainOptions(
        resolved=resolved,
        stage=stage,
        data=data,
        out=out,
        init=Init(tuple(init or ()), tuple(allow_init_mismatch or ())),
        device=device,
        devices=devices or 1,
        strategy=strategy,
        image_root=image_root,
        logs=tuple(logs or ()),
        caption_key=caption_key,
    )
    if overfit_check:
        _check_overfit(options, as_json=as_json)
        return
    if dry_run:
        with listening() as report:
            found = try_out(options, report)
        show_fit(found, as_json=as_json)
        return
    with listening() as report:
        result = start(options, report)
    show_result(result, show_training, as_json=as_json)


def _check_overfit(options: TrainOptions, *, as_json: bool) -> None:
    """Shows whether a few pictures can be memorised; fails when they cannot."""
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.tables import show_tables
    from bitgen_cli.console.terminal import show_result
    from bitgen_cli.runs.overfit import overfit_check

    with listening() as report:
        result = overfit_check(options, report)
    show_result(result, lambda it: show_tables(it.tables()), as_json=as_json)
    if not result.passed:
        raise DivergedError(
            f"FAIL: {len(result.pictures)} pictures were not memorised in {result.steps} steps",
            "look at the pictures, their captions and the learning rate",
        )
