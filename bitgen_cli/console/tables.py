"""Tables and lists of facts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table as RichTable
from rich.text import Text

from bitgen_cli.console.terminal import console_on, harmless, is_terminal

if TYPE_CHECKING:
    from bitgen_cli.report import Table


def show_tables(tables: Sequence[Table]) -> None:
    """Prints tables to stdout: drawn on a terminal, else aligned with spaces."""
    console = console_on(sys.stdout)
    drawn = is_terminal(console)
    for number, table in enumerate(tables):
        if number:
            print()
        if drawn:
            console.print(Text(table.title, style="bold"))
            console.print(_draw(table))
        else:
            print(plain_table(table))


def _draw(table: Table) -> RichTable:
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(harmless(cell)) for cell in row))
    return drawn


def plain_table(table: Table) -> str:
    """The table as text: title, heads, rows of a line each, columns two spaces apart."""
    rows = [table.columns, *([harmless(cell).replace("\n", r"\n") for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([table.title, *lines])


def show_facts(facts: Mapping[str, str]) -> None:
    """Prints facts by name to stdout, a line each."""
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {harmless(value)}")
