"""The command surface: the program with its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Annotated, Any

import typer

from bitgen_cli import __version__
from bitgen_cli.commands.finetune_subject import finetune_subject
from bitgen_cli.commands.gen_priors import gen_priors
from bitgen_cli.commands.inspect_config import inspect_config
from bitgen_cli.commands.resume import resume
from bitgen_cli.commands.sample import sample
from bitgen_cli.commands.tokenize import tokenize
from bitgen_cli.commands.train import train
from bitgen_cli.errors import BitgenError, ExitCode, Interrupted
from bitgen_cli.examples import EXAMPLES
from bitgen_cli.place import place

TRACEBACK = "BITGEN_TRACEBACK"
"""Environment variable: set to 1, errors come with the place in the program they come from."""
_AFTER_THE_FIRST = 4.0
"""Seconds that other ranks keep an error to themselves."""


class _Plain:
    """A command whose --help is shown like every flag, and costs nothing where it is not asked for."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.metavar, option.default = "", False  # without a default, typer loads pydantic to check it
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the help and, last, what can be typed to begin with."""
        super().format_help(ctx, formatter)  # type: ignore[misc]
        from bitgen_cli.console.terminal import show_examples

        if self.epilog is None:  # type: ignore[attr-defined]
            print()
        show_examples(EXAMPLES["" if ctx.parent is None else ctx.info_name])


class _Group(_Plain, typer.core.TyperGroup):
    """The program."""


class _Command(_Plain, typer.core.TyperCommand):
    """A subcommand."""


app = typer.Typer(
    name="bitgen",
    help="Bitwise autoregressive text-to-image models: sample, train, tokenize.",
    epilog=f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in ExitCode)}.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bitgen {__version__}")
        raise typer.Exit()


@app.callback(cls=_Group, invoke_without_command=True)
def _bitgen(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


for _body in (sample, tokenize, train, finetune_subject, gen_priors, resume, inspect_config):
    app.command(cls=_Command)(_body)


def run(arguments: list[str]) -> int:
    """The exit code of one command; every error becomes a line on stderr here and nowhere else."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal without UTF-8, or a file name that is none, must not end a command
        if stream.errors == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if place().rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the first of several processes speaks for all
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except typer.TyperException as error:
        return _usage_error(error)
    except Interrupted as end:
        return _fail(str(end), end.exit_code, kind="interrupted")
    except BitgenError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read our output has enough
        _drain_stdout()
        return ExitCode.OK
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped by Ctrl-C", ExitCode.INTERRUPTED, kind="interrupted")
    except Exception as error:
        if _no_space(error):  # files tell where they are: this is stdout
            hint = "what was done is saved; free some space or send it elsewhere"
            return _fail(f"cannot write to standard output: no space left ({hint})", ExitCode.RESOURCES)
        if _out_of_memory(error):
            return _fail(
                "out of memory (a smaller --batch-size or --resolution needs less)", ExitCode.RESOURCES
            )
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = "" if _wants_traceback() else f" ({TRACEBACK}=1 shows where)"
        return _fail(f"{reason}{hint}", ExitCode.INTERNAL, kind="internal error")


def _invoke(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        with command.make_context("bitgen", arguments, obj=arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return ExitCode.OK


def _usage_error(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = "bitgen" if context is None else context.command_path
    return _fail(f"{error.format_message().rstrip('.')} (see {path} --help)", ExitCode.USAGE)


def _fail(message: str, code: int, kind: str = "error") -> int:
    from bitgen_cli.console.terminal import show_error

    _drain_stdout()
    rank = place().rank
    if rank:
        if code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            return int(code)
        # what all ranks meet is told by the first; whoever started them ends the others meanwhile
        time.sleep(_AFTER_THE_FIRST)
        message = f"rank {rank}: {message}"
    if _wants_traceback():
        import traceback

        traceback.print_exc()
    with suppress(OSError):  # where the disk behind stderr is full, the exit code alone tells
        show_error(message, kind)
    return int(code)


def _drain_stdout() -> None:
    """Writes what is left, or drops it where nobody takes it: the interpreter must not try once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_space(error: Exception) -> bool:
    """Whether a disk is full, or what the user may have of it."""
    from bitgen_cli.files import NO_SPACE

    return isinstance(error, OSError) and error.errno in NO_SPACE


def _out_of_memory(error: Exception) -> bool:
    """Whether the machine or the accelerator had no memory left, in the words of Python and torch."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK, "") not in ("", "0")
