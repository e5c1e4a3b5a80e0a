"""`bitgen resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitgen_cli.commands.options import (
    Device,
    Devices,
    Json,
    Logs,
    Offline,
    Strategy,
    option,
)
from bitgen_cli.commands.trainings import start_several


def resume(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    steps: Annotated[
        int | None,
        option("N", "Train N steps more than was planned.", least=1),
    ] = None,
    logs: Logs = None,
    device: Device = "auto",
    offline: Offline = False,
    devices: Devices = None,
    strategy: Strategy = "ddp",
    as_json: Json = False,
) -> None:
    """Continue a training from its last checkpoint, as if it had never stopped."""
    start_several(context, devices)

    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_json
    from bitgen_cli.console.trainings import show_subject, show_training
    from bitgen_cli.runs.finetune_subject import SubjectResult
    from bitgen_cli.runs.resume import resume as go_on

    with listening() as report:
        result = go_on(run, report, steps=steps, device=device, strategy=strategy, logs=tuple(logs or ()))
    if as_json:
        show_json(result.to_json())
    elif isinstance(result, SubjectResult):
        show_subject(result)
    else:
        show_training(result)
