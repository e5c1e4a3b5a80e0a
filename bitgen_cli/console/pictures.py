"""Pictures that were made: their paths and seeds, what failed, and small ones on a terminal with colours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.segment import Segment, Segments
from rich.style import Style

from bitgen_cli.console.tables import show_facts
from bitgen_cli.console.terminal import console_on, is_terminal, print_error_line, say
from bitgen_cli.console.words import duration

if TYPE_CHECKING:
    from PIL import Image

    from bitgen_cli.runs.gen_priors import PriorResult
    from bitgen_cli.runs.prompt_file import Failure
    from bitgen_cli.runs.sample_result import SampledPicture, SampleResult

PREVIEW_COLUMNS = 48
"""Widest picture in the terminal, in characters."""
PREVIEW_PICTURES = 4
"""Most pictures shown beside each other."""
FAILURES = 20
"""Lines of a prompt file whose failure is explained."""


def show_picture(picture: SampledPicture) -> None:
    """Prints the paths of a picture to stdout as soon as it is there."""
    for path in picture.files:
        print(path, flush=True)


def show_samples(result: SampleResult, *, with_preview: bool, named: bool = False) -> None:
    """Prints the paths of every picture to stdout, and on a terminal shows the first ones small.

    Args:
        result: what was written.
        with_preview: whether pictures are shown.
        named: whether `show_picture` has printed the paths.
    """
    paths = [picture.path for picture in result.pictures]
    if with_preview:
        preview(paths if result.grid is None else [result.grid])
    if result.manifest is None:
        show_seeds(result)
    files = [] if named else [file for picture in result.pictures for file in picture.files]
    for path in [*files, *([] if result.grid is None else [result.grid])]:
        print(path)


def show_seeds(result: SampleResult) -> None:
    """Prints to stderr which seeds were drawn with."""
    if result.seeds is not None:
        print_error_line(result.seeds)


def show_failures(failures: Sequence[Failure]) -> None:
    """Prints to stderr which lines of a prompt file could not be drawn, the first ones with the reason."""
    for failure in failures[:FAILURES]:
        say(console_on(sys.stderr), "error", "bold red", f"line {failure.line}: {failure.message}")
    lines = len({failure.line for failure in failures})
    more = f", {len(failures) - FAILURES} more are in --json" if len(failures) > FAILURES else ""
    say(console_on(sys.stderr), "error", "bold red", f"{lines} {'line' if lines == 1 else 'lines'} failed{more}")


def show_priors(result: PriorResult) -> None:
    """Prints what a folder of class pictures holds to stdout."""
    counts = {"new": result.made, "reused": result.reused, "your own": result.own}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    facts = {"folder": str(result.folder), "class": result.class_word}
    facts["pictures"] = f"{len(result.pictures)} ({told})"
    facts["took"] = duration(result.seconds)
    show_facts(facts)


def preview(paths: Sequence[Path]) -> None:
    """Shows the first pictures beside each other, small, if stdout is a terminal with colours.

    A character is two pixels, one above the other: the upper half block in the colour of the upper one, on a
    ground of the colour of the lower one.

    Args:
        paths: of pictures; at most PREVIEW_PICTURES are shown.
    """
    from PIL import Image

    console = console_on(sys.stdout)
    if not is_terminal(console) or console.no_color:
        return
    shown = paths[:PREVIEW_PICTURES]
    room = (console.width + 2) // max(1, len(shown)) - 2
    cells: list[list[list[Segment]]] = []
    for path in shown:
        with Image.open(path) as image:
            cells.append(_half_blocks(image.convert("RGB"), min(PREVIEW_COLUMNS, room), console.height - 2))
    for row in range(max((len(picture) for picture in cells), default=0)):
        line: list[Segment] = []
        for picture in cells:
            blank = [Segment(" " * len(picture[0]))]
            line += [*(picture[row] if row < len(picture) else blank), Segment("  ")]
        console.print(Segments([*line[:-1], Segment.line()]), end="")


def _half_blocks(image: Image.Image, columns: int, rows: int) -> list[list[Segment]]:
    """Rows of characters for an RGB picture, as large as fits into `columns` and `rows`, at least 2 x 1."""
    from PIL import Image

    scale = min(columns / image.width, 2 * max(1, rows) / image.height)
    width = max(2, round(image.width * scale))
    height = max(2, 2 * round(image.height * scale / 2))
    small = image.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    pixels = small.tobytes()

    def colour(x: int, y: int) -> str:
        return "#" + pixels[3 * (y * width + x) :][:3].hex()

    return [
        [Segment("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1))) for x in range(width)]
        for y in range(0, height, 2)
    ]
