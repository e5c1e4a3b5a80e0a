"""`bitgen inspect-config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitgen_cli.commands.options import (
    ConfigFile,
    Json,
    Overrides,
    flag,
    option,
)
from bitgen_cli.errors import UsageError


def inspect_config(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="A preset, a configuration file, a run, a model, a subject or a picture made by bitgen; "
            "with --plot, one run or several.",
            show_default=False,
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool,
        flag("--schema", "Print the JSON schema of a configuration instead."),
    ] = False,
    plot: Annotated[
        Path | None,
        option("FILE", "Draw the course of a run's training instead: FILE.png, .svg or .pdf."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every value and where it comes from, the scales, sizes, and the memory needed."""
    if not targets and not schema:
        raise UsageError(
            "nothing to inspect", "name a preset, file, run, model, subject or picture, or ask for --schema"
        )
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.tables import show_tables
    from bitgen_cli.console.terminal import show_json

    if plot is not None:
        if schema or overrides or config is not None:
            raise UsageError("--plot goes with runs alone", "leave --schema, --set and --config away")
        from bitgen_cli.runs.plot import plot as draw

        with listening() as report:
            drawn = draw([Path(target) for target in targets or ()], plot, report)
        show_json(drawn.to_json()) if as_json else print(drawn.file)
        return
    if targets and len(targets) > 1:
        raise UsageError(f"{len(targets)} targets", "several belong to --plot alone, which takes runs")
    from bitgen_cli.runs.inspect_config import InspectOptions, inspect

    options = InspectOptions(
        target=targets[0] if targets else "", overrides=list(overrides or ()), schema=schema, config_file=config
    )
    with listening() as report:
        result = inspect(options, report)
    if as_json or schema:
        show_json(result.to_json())
    else:
        show_tables(result.sections)
