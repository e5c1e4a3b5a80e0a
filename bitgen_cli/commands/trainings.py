"""What the commands that train have in common: several processes, trying out, and sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from bitgen_cli.commands.options import is_given
from bitgen_cli.errors import UsageError
from bitgen_cli.place import place

if TYPE_CHECKING:
    from bitgen_cli.runs.fitting import Fit
    from bitgen_cli.runs.sweep import SweepOptions


def start_several(context: typer.Context, devices: int | None) -> None:
    """Runs the same command in several processes, and ends as they end; returns where that is done or not asked for."""
    if devices is None or devices == 1 or place().count > 1:
        return
    from bitgen_cli.runs.launch import launch

    raise typer.Exit(launch(context.obj, devices))


def show_fit(found: Fit, *, as_json: bool) -> None:
    """Shows what a training needs; refuses one that does not fit."""
    from bitgen_cli.console.tables import show_tables
    from bitgen_cli.console.terminal import show_result

    show_result(found, lambda it: show_tables(it.tables()), as_json=as_json)
    found.require()


_OF_EACH_RUN = ("out", "overrides", "sweep", "name", "as_json")
_COMPUTES = ("device", "devices", "strategy", "logs", "offline")


def shared_words(context: typer.Context) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What was typed for all runs of a sweep: words that change the result, and words that do not."""
    shared: list[str] = []
    computing: list[str] = []
    for parameter in context.command.params:
        if parameter.name in _OF_EACH_RUN or not is_given(context, str(parameter.name)):
            continue
        value = context.params[str(parameter.name)]
        words = computing if parameter.name in _COMPUTES else shared
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append([*parameter.opts, *parameter.secondary_opts][0 if value else -1])
        else:
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [parameter.opts[0], str(item)]
    return tuple(shared), tuple(computing)


def try_combinations(options: SweepOptions, how: str, as_json: bool) -> None:
    """Shows the commands of a sweep, or runs them and shows what they reached."""
    from bitgen_cli.console.progress import listening
    from bitgen_cli.console.terminal import show_json, show_result
    from bitgen_cli.console.trainings import show_sweep
    from bitgen_cli.runs import sweep

    if how not in (sweep.PRINT, sweep.RUN):
        raise UsageError(f"--sweep {how}: must be {sweep.PRINT} or {sweep.RUN}")
    if how == sweep.PRINT:
        planned = sweep.plan(options)
        if as_json:
            show_json({"runs": [run.planned_json() for run in planned]})
        else:
            print("\n".join(run.command for run in planned))
        return
    with listening() as report:
        result = sweep.sweep(options, report)
    show_result(result, show_sweep, as_json=as_json)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
