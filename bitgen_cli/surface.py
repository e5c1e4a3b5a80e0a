"""What can be typed, as data: for the completions, the reference page and the tests. No command needs it to run."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import typer  # noqa: TID251 (it knows the commands)

from bitgen_cli.app import app

FIRST_PANEL = "Options"
"""Heading of the options that have no panel of their own."""


@dataclass(frozen=True)
class Argument:
    """What stands in a place of the command line.

    Attributes:
        value: its metavar, such as DATA.
        help: what it is.
        several: it may be there more than once.
        required: it must be there.
    """

    value: str
    help: str
    several: bool
    required: bool


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        names: as typed, such as -n and --num-images.
        off: names that say the opposite, such as --no-preview.
        help: what it does.
        panel: heading it stands under.
        value: metavar of its value; empty for a flag.
        limits: smallest and largest number, such as `1 to 3`; empty without limits.
        default: as it would be typed; empty where leaving it out is a choice of its own.
        repeated: it may be given again.
        required: it must be given.
    """

    names: tuple[str, ...]
    off: tuple[str, ...]
    help: str
    panel: str
    value: str
    limits: str
    default: str
    repeated: bool
    required: bool


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, what it does (paragraphs), what can follow it."""

    name: str
    help: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]

    @property
    def summary(self) -> str:
        """One line without a full stop."""
        return first_line(self.help)


HELP = Option(("--help", "-h"), (), "Show the help.", FIRST_PANEL, "", "", "", False, False)


def program() -> Any:
    """The program as typer parses it; `commands` of it are its subcommands by name."""
    return typer.main.get_command(app)


def commands() -> list[Command]:
    """The subcommands, in the order of the help."""
    return [_command(name, command) for name, command in program().commands.items()]


def first_line(text: str) -> str:
    """The first line of a text, without a full stop."""
    return text.strip().split("\n")[0].removesuffix(".")


def _command(name: str, command: Any) -> Command:
    arguments = [
        Argument(parameter.metavar, parameter.help, parameter.nargs == -1, parameter.required)
        for parameter in command.params
        if parameter.param_type_name == "argument"
    ]
    options = [_option(parameter) for parameter in command.params if parameter.param_type_name == "option"]
    return Command(name, inspect.cleandoc(command.help), tuple(arguments), (*options, HELP))


def _option(parameter: Any) -> Option:
    default = parameter.default
    if parameter.is_flag and default is not None:
        default = (parameter.opts if default else parameter.secondary_opts or [""])[0]
    return Option(
        names=tuple(parameter.opts),
        off=tuple(parameter.secondary_opts),
        help=parameter.help,
        panel=parameter.rich_help_panel or FIRST_PANEL,
        value="" if parameter.is_flag else parameter.metavar,
        limits=_limits(getattr(parameter, "min", None), getattr(parameter, "max", None)),
        default="" if default is None or parameter.required else str(default),
        repeated=parameter.multiple,
        required=parameter.required,
    )


def _limits(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f"at most {most}"
    return f"at least {least}" if most is None else f"{least} to {most}"
