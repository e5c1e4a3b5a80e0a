"""The two streams: whether they are a terminal, what may go there, and what every command prints to them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from bitgen_cli.examples import Example


class Result(Protocol):
    """What a command has done, for programs."""

    def to_json(self) -> dict[str, Any]: ...


_Result = TypeVar("_Result", bound=Result)


def console_on(stream: TextIO) -> Console:
    """A console for stdout or stderr; colours forced by the environment do not make a file a terminal."""
    return Console(file=stream, force_terminal=stream.isatty())


def is_terminal(console: Console) -> bool:
    """Whether more than plain lines can be shown."""
    return console.is_terminal and not console.is_dumb_terminal


def harmless(text: str) -> str:
    """The text with what is no character to be seen written out: a file's name cannot command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(console: Console, kind: str, style: str, text: str) -> None:
    """Prints a text in one line, after its kind in this style."""
    console.print(Text.assemble((f"{kind}: ", style), harmless(text)), soft_wrap=True, highlight=False)


def print_error_line(line: str) -> None:
    """Prints a line to stderr at once."""
    print(harmless(line), file=sys.stderr, flush=True)


def show_error(message: str, kind: str = "error") -> None:
    """Prints an error to stderr, after its kind."""
    say(console_on(sys.stderr), kind, "bold red", message)


def show_json(value: dict[str, Any]) -> None:
    """Prints one JSON object to stdout."""
    print(json.dumps(value, indent=2))


def show_result(result: _Result, show: Callable[[_Result], object], *, as_json: bool) -> None:
    """Prints a result as one JSON object, or shows it to people."""
    if as_json:
        show_json(result.to_json())
    else:
        show(result)


def show_examples(examples: Sequence[Example]) -> None:
    """Prints commands to copy, each below what it does, which a shell takes for a comment."""
    console = console_on(sys.stdout)
    console.print(Text(" Examples", "bold"))
    for example in examples:
        console.print()
        console.print(Text(f"   # {example.does}", "dim"), soft_wrap=True)
        console.print(Text(f"   {example.command}"), soft_wrap=True, highlight=False)
