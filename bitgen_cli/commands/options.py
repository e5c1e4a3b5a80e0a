"""How options are declared, those that several commands have, and which of them were typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

DRAWING, OUTPUT, COMPUTING, CONFIGURING = "Drawing", "Output", "Computing", "Configuration"
READING, STORING, LEARNING, TRYING = "Reading pictures", "What is kept", "Learning", "Trying out"

OFFLINE = "HF_HUB_OFFLINE"
"""Environment variable of the hub's client: --offline sets it."""
BUDGETS = "0.06M, 0.25M, 0.60M or 1M"
"""What --resolution takes; each command says what for."""
BIT_COUNT = "Bits per latent position, where a model may be used with several."
"""Of --bits, which has a panel of its own in each command."""


def option(
    metavar: str,
    help: str,
    panel: str | None = None,
    names: tuple[str, ...] = (),
    least: int | None = None,
    most: int | None = None,
) -> Any:
    """An option with a value. The completions go by the metavar too (completions/generate.py).

    Args:
        metavar: what the value is.
        help: one line.
        panel: heading in the help; None is the first one, for what a newcomer needs first.
        names: with their dashes, where they are not the parameter's.
        least, most: smallest and largest value of a number.
    """
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, min=least, max=most)


def flag(names: str, help: str, panel: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(names, metavar="", help=help, rich_help_panel=panel)


def _stay_offline(wanted: bool) -> bool:
    """Keeps this process and those it starts from the network, before anything looks whether it may be used."""
    if wanted:
        os.environ[OFFLINE] = "1"
    return wanted


Json = Annotated[bool, flag("--json", "Print one JSON object.", OUTPUT)]
Device = Annotated[str, option("DEVICE", "auto, cpu, cuda, cuda:N or mps.", COMPUTING)]
Devices = Annotated[
    int | None,
    option("N", "Train in N processes of this machine, a GPU for each; torchrun works too.", COMPUTING, least=1),
]
Strategy = Annotated[
    str,
    option(
        "STRATEGY",
        "What several processes share: ddp the pictures, fsdp also weights, gradients and optimizer state.",
        COMPUTING,
    ),
]
DryRun = Annotated[
    bool,
    flag(
        "--dry-run",
        "Do everything up to the first step, show the memory and disk needed, leave nothing behind.",
        TRYING,
    ),
]
Dtype = Annotated[str, option("DTYPE", "auto, fp32, bf16 or fp16.", COMPUTING)]
Model = Annotated[
    str,
    option("MODEL", "A model or run folder, published weights by name (infinity-2b) or file, or demo, the built-in."),
]
TextDtype = Annotated[
    str, option("TYPE", "Of the text encoder: auto, fp32, bf16, or int8, which takes the least memory.", COMPUTING)
]
NoTextCache = Annotated[
    bool,
    flag("--no-text-cache", "Read prompts anew: do not take text features from disk, nor keep them.", COMPUTING),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        metavar="",
        help="Ask nothing of the network: what is not on this machine is an error.",
        rich_help_panel=COMPUTING,
        callback=_stay_offline,
    ),
]
Aspects = Annotated[
    str | None,
    option("SHAPES", "Crop pictures to these shapes alone, for example 1:1,16:9.", READING, ("--aspect",)),
]
CaptionKey = Annotated[
    str | None,
    option("FIELD", "Field or column that holds the captions; none reads no captions.", READING),
]
ImageRoot = Annotated[
    Path | None,
    option("FOLDER", "Where the pictures of a listing are, if not beside it; links may lead there.", READING),
]
Overrides = Annotated[
    list[str] | None,
    option(
        "KEY=VALUE",
        "Set a configuration value, for example sampling.cfg=4. May be repeated.",
        CONFIGURING,
        ("--set",),
    ),
]
ConfigFile = Annotated[
    Path | None,
    option("FILE", "A YAML file with values that replace the preset's.", CONFIGURING, ("--config",)),
]
Steps = Annotated[int | None, option("N", "Optimizer steps.", LEARNING, least=1)]
LearningSeed = Annotated[int | None, option("SEED", "Of everything random.", LEARNING)]
Sweep = Annotated[
    str | None,
    option(
        "HOW",
        "Try every combination of the values of keys that --set names several times: print shows the commands, "
        "run trains one after the other, in folders below --out.",
        TRYING,
    ),
]
Logs = Annotated[
    list[str] | None,
    option("LOG", "Also log to tensorboard or wandb; may be repeated.", OUTPUT, ("--log",)),
]


def shapes(text: str | None) -> tuple[str, ...]:
    """Shapes W:H with commas between them."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
