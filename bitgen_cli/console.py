"""Everything the terminal shows: progress, the training panel, tables, small pictures, results and errors.

What is not a terminal gets plain lines, and few of them. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
)
from rich.progress import Task as RichTask
from rich.progress_bar import ProgressBar
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table as RichTable
from rich.text import Text

from bitgen_cli.place import place
from bitgen_cli.report import Silent

if TYPE_CHECKING:
    from PIL import Image

    from bitgen_cli.engine.data_report import CaptionCounts
    from bitgen_cli.examples import Example
    from bitgen_cli.report import Report, Table, Task
    from bitgen_cli.runs.finetune_subject import SubjectResult
    from bitgen_cli.runs.gen_priors import PriorResult
    from bitgen_cli.runs.prompt_file import Failure
    from bitgen_cli.runs.sample_result import SampledPicture, SampleResult
    from bitgen_cli.runs.sweep import SweepResult, SweepRun
    from bitgen_cli.runs.tokenize import TokenizeResult
    from bitgen_cli.runs.train import TrainResult
    from bitgen_cli.runs.verify import VerifyResult

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""
SLOW = 0.1
"""Units per second below which it is told how long each takes."""
SPEED_OVER = 300.0
"""Seconds that the speed of a bar is a mean of: a single step may take long."""
PREVIEW_COLUMNS = 48
"""Widest picture in the terminal, in characters."""
PREVIEW_PICTURES = 4
"""Most pictures shown beside each other."""
WORST, NAMED = 5, 10
"""Pictures named of which most is cut off, and of those that were skipped."""
FAILURES = 20
"""Lines of a prompt file whose failure is explained."""
MUCH = 0.2
"""Share of a picture that is named when it is cut off."""
CHANCE = 0.5
"""Accuracy of a bit that is guessed."""

_BAR_CELLS = 24
_SPARKS = "▁▂▃▄▅▆▇█"
_ACCURACY, _HELD_OUT = "bit_accuracy/", "val_bit_accuracy/"
_APART = ("images_per_second", "seconds_left", "epoch")


def listening(*, apart: bool = False) -> AbstractContextManager[Report]:
    """A report on the terminal; of several processes that work together, the first alone speaks.

    Args:
        apart: each works on a share of its own, so that the others warn too.
    """
    rank = place().rank
    if not rank:
        return ConsoleReport()
    return nullcontext(_Warner(rank) if apart else Silent())


class _Warner(Silent):
    """Shows warnings alone, and who warns."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def warning(self, text: str) -> None:
        _say(_console(sys.stderr), "warning", "yellow", f"rank {self._rank}: {text}")


class ConsoleReport:
    """Shows on stderr what a run reports; use it as a context, whose end clears the progress bars away.

    Args:
        clock: seconds from anywhere; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = _console(sys.stderr)
        self._clock = clock
        self._training: TrainingPanel | None = None
        self._line_due = clock()
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            _CountColumn(),
            _SpeedColumn(),
            _TimesColumn(),
            TextColumn("{task.fields[status]}", style="dim"),
            console=self._console,
            speed_estimate_period=SPEED_OVER,
        )
        if is_terminal(self._console):
            self._live = Live(
                get_renderable=self._view, console=self._console, refresh_per_second=8, redirect_stdout=False
            )

    def __enter__(self) -> ConsoleReport:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None and self._live.is_started:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._live.transient = self._training is None
            self._live.stop()

    def notice(self, text: str) -> None:
        _say(self._console, "note", "cyan", text)

    def warning(self, text: str) -> None:
        _say(self._console, "warning", "yellow", text)

    @contextmanager
    def task(self, title: str, total: float | None) -> Iterator[Task]:
        if self._live is None:
            plain = _PlainTask(title, total, self._clock)
            yield plain
            plain.close()
            return
        self._live.start()
        bar = self._progress.add_task(title, total=total, done=0.0, status="")
        try:
            yield _Bar(self._progress, bar)
        finally:
            self._progress.remove_task(bar)

    def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
        if self._training is None:
            self._training = TrainingPanel()
        self._training.update(step, total_steps, values)
        if self._live is not None:
            self._live.start()
        elif "loss" not in values:
            _print_error_line(self._training.line(values))
        elif self._clock() >= self._line_due or step == total_steps:
            self._line_due = self._clock() + LINE_EVERY
            _print_error_line(self._training.line(values))

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = [] if self._training is None else [self._training]
        return Group(*parts, self._progress) if self._progress.tasks else Group(*parts)


class _Bar:
    """A task as a progress bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._done = self._ahead = 0.0

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount
        self.ahead(max(0.0, self._ahead - amount))

    def ahead(self, amount: float) -> None:
        self._ahead = amount
        self._progress.update(self._task, completed=self._done + amount, done=self._done)

    def status(self, text: str) -> None:
        self._progress.update(self._task, status=text)


class _CountColumn(ProgressColumn):
    """Units that are finished, of all."""

    def render(self, task: RichTask) -> Text:
        total = "?" if task.total is None else f"{int(task.total)}"
        return Text(f"{int(task.fields['done']):>{len(total)}}/{total}", style="progress.download")


class _SpeedColumn(ProgressColumn):
    """Units per second, or seconds for each."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else pace(speed), style="progress.data.speed")


class _TimesColumn(ProgressColumn):
    """Time since the start, and about how much is left."""

    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        left = "--:--" if task.time_remaining is None else _clock(task.time_remaining)
        return Text(f"{_clock(task.elapsed or 0)}<{left}", style="progress.remaining")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class _PlainTask:
    """A task as a line now and then; short tasks say nothing."""

    def __init__(self, title: str, total: float | None, clock: Callable[[], float]) -> None:
        self._title = title
        self._total = total
        self._clock = clock
        self._started = clock()
        self._due = self._started + LINE_EVERY
        self._done = self._ahead = 0.0
        self._first: float | None = None
        self._status = ""
        self._told: float | None = None

    def advance(self, amount: float = 1.0) -> None:
        if self._first is None:
            # what an earlier run had done comes in one piece at the start and is no measure of speed
            self._first = amount
        self._done += amount
        self.ahead(max(0.0, self._ahead - amount))

    def ahead(self, amount: float) -> None:
        if self._first is None:
            self._first = 0.0
        self._ahead = amount
        if self._clock() >= self._due:
            self._speak()

    def status(self, text: str) -> None:
        self._status = text

    def close(self) -> None:
        """Says how it ended, if it has said anything before and something has happened since."""
        if self._told not in (None, self._done):
            self._speak()

    def _speak(self) -> None:
        now = self._clock()
        self._told = self._done
        self._due = now + LINE_EVERY
        so_far = self._done + self._ahead
        speed = (so_far - (self._first or 0.0)) / max(now - self._started, 1e-9)
        of_total = "" if self._total is None else f"/{self._total:g}"
        line = f"{self._title}: {self._done:g}{of_total}" + (f", {pace(speed)}" if speed > 0 else "")
        if self._total is not None and speed > 0 and so_far < self._total:
            line += f", {duration((self._total - so_far) / speed)} left"
        _print_error_line(line + (f", {self._status}" if self._status else ""))


class TrainingPanel:
    """The newest measurements of a training, as a panel or as one line."""

    def __init__(self) -> None:
        self._step = 0
        self._total = 0
        self._values: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=32)

    def update(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Takes in measurements; those of earlier steps stay until they are measured again."""
        self._step, self._total = step, total
        self._values.update(values)
        if "loss" in values:
            self._losses.append(values["loss"])

    def line(self, values: Mapping[str, float]) -> str:
        """These measurements of the newest step in one line of plain text."""
        named = sorted(filter(_in_line, values), key="loss".__ne__)
        parts = [f"{_name(key)} {_number(key, values[key])}" for key in named]
        for label, prefix in (("bit accuracy", _ACCURACY), ("held-out bit accuracy", _HELD_OUT)):
            scales = per_scale(values, prefix)
            if scales:
                parts.append(f"{label} {' '.join(f'{100 * value:.1f}' for value in scales)} %")
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} img/s")
        if "seconds_left" in values:
            parts.append(f"{duration(values['seconds_left'])} left")
        return f"step {self._step}/{self._total}: {', '.join(parts)}"

    def __rich__(self) -> Panel:
        parts: list[RenderableType] = [self._numbers()]
        if per_scale(self._values, _ACCURACY):
            parts.append(self._scales())
        parts.append(self._footer())
        return Panel(
            Group(*parts), title=f"step {self._step} of {self._total}", title_align="left", expand=False
        )

    def _numbers(self) -> RichTable:
        """Loss with its course, then everything without a place of its own."""
        table = RichTable.grid(padding=(0, 2))
        if self._losses:
            table.add_row("loss", f"{self._losses[-1]:.4f}", Text(sparks(self._losses), style="cyan"))
        others = [key for key in self._values if _in_line(key) and key != "loss"]
        for key in others:
            table.add_row(_name(key), _number(key, self._values[key]), "")
        return table

    def _scales(self) -> RichTable:
        """One bar per scale; what a guess would reach is marked."""
        accuracy, held_out = per_scale(self._values, _ACCURACY), per_scale(self._values, _HELD_OUT)
        table = RichTable.grid(padding=(0, 2))
        table.add_row("", "bit accuracy, │ is chance", "", "held out" if held_out else "")
        for number, value in enumerate(accuracy):
            other = f"{100 * held_out[number]:.1f} %" if number < len(held_out) else ""
            table.add_row(f"scale {number}", accuracy_bar(value), f"{100 * value:.1f} %", other)
        return table

    def _footer(self) -> RichTable:
        table = RichTable.grid(padding=(0, 2))
        cells: list[RenderableType] = [ProgressBar(self._total, self._step, width=30)]
        if "images_per_second" in self._values:
            cells.append(f"{self._values['images_per_second']:.1f} img/s")
        if "seconds_left" in self._values:
            cells.append(f"{duration(self._values['seconds_left'])} left")
        table.add_row(*cells)
        return table


def accuracy_bar(accuracy: float) -> Text:
    """A bar for an accuracy in [0, 1] with chance marked; red where it is no better than that."""
    full = round(accuracy * _BAR_CELLS)
    chance = round(CHANCE * _BAR_CELLS)
    style = "green" if accuracy > CHANCE + 0.005 else "red"
    bar = Text()
    for cell in range(_BAR_CELLS):
        if cell == chance:
            bar.append("│", style="bold")
        else:
            bar.append("━" if cell < full else " ", style=style)
    return bar


def sparks(values: Sequence[float]) -> str:
    """The course of the values as one character each, lowest to highest; what is not finite is left out."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((value - low) * scale)] for value in finite)


def duration(seconds: float) -> str:
    """Seconds in words of at most two units, such as "3 min 5 s"; "?" where it is not known."""
    if not 0 <= seconds < float("inf"):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, small_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def pace(speed: float) -> str:
    """Units per second, or how long each takes where that is long."""
    return f"{speed:.1f}/s" if speed >= SLOW else f"{duration(1 / speed) if speed > 0 else '?'} each"


def per_scale(values: Mapping[str, float], prefix: str) -> list[float]:
    """The values of `prefix0`, `prefix1` ... in that order."""
    found = {int(key[len(prefix) :]): value for key, value in values.items() if key.startswith(prefix)}
    return [found[number] for number in sorted(found)]


def show_json(value: dict[str, Any]) -> None:
    """Prints one JSON object to stdout."""
    print(json.dumps(value, indent=2))


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
        _print_error_line(result.seeds)


def show_failures(failures: Sequence[Failure]) -> None:
    """Prints to stderr which lines of a prompt file could not be drawn, the first ones with the reason."""
    for failure in failures[:FAILURES]:
        _say(_console(sys.stderr), "error", "bold red", f"line {failure.line}: {failure.message}")
    lines = len({failure.line for failure in failures})
    more = f", {len(failures) - FAILURES} more are in --json" if len(failures) > FAILURES else ""
    _say(_console(sys.stderr), "error", "bold red", f"{lines} {'line' if lines == 1 else 'lines'} failed{more}")


def show_store(result: TokenizeResult) -> None:
    """Prints what a token store holds to stdout."""
    facts = {
        "store": str(result.out),
        "pictures": f"{result.count}" + (f" ({result.added} new)" if result.added != result.count else ""),
    }
    if result.part is not None:
        facts["part"] = result.part + (", the store is complete" if not result.missing else "")
    if result.bad:
        facts["skipped"] = str(len(result.bad))
    facts["data"] = result.report.layout
    if result.report.captions is not None:
        facts["captions"] = captions_line(result.report.captions)
    if result.report.misclaimed:
        facts["wrong shape"] = f"{_pictures(result.report.misclaimed)} another shape than the data says"
    facts["per picture"] = (
        f"{result.bits_per_image:.0f} bits, {result.bytes_per_image:.0f} bytes in the store"
    )
    if result.text_features:
        facts["text features"] = "of every caption"
    if result.psnr is not None and result.ssim is not None:
        facts["reconstructions"] = f"PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.3f}"
    facts["took"] = duration(result.seconds)
    if result.added:
        facts["took"] += f", {result.images_per_second:.1f} img/s"
    _show_facts(facts)
    print()
    show_tables(_store_tables(result))


def captions_line(counts: CaptionCounts) -> str:
    """What there is of captions, in one line."""
    parts = [str(counts.count)]
    if counts.several:
        parts.append(f"{_pictures(counts.several)} several")
    if counts.missing:
        parts.append(f"{_pictures(counts.missing)} none")
    if counts.cut is None and counts.count:
        parts.append(f"unknown how many have more than {counts.limit} tokens: there is no text encoder yet")
    elif counts.cut:
        verb = "is" if counts.cut == 1 else "are"
        parts.append(f"{counts.cut} {verb} cut after {counts.limit} tokens (the longest has {counts.longest})")
    return "; ".join(parts)


def _pictures(count: int) -> str:
    return "1 picture has" if count == 1 else f"{count} pictures have"


def _store_tables(result: TokenizeResult) -> list[Table]:
    """Shapes; which pictures lose most, have their captions cut, or were skipped."""
    from bitgen_cli.report import Table

    told = result.report
    sizes = {entry.ratio: entry for entry in result.ratios}
    rows = [
        [
            bucket.aspect,
            f"{bucket.width} x {bucket.height}",
            str(bucket.count),
            f"{100 * bucket.cropped:.1f} %",
            str(bucket.enlarged or ""),
            str(sizes[bucket.ratio].positions),
            str(sizes[bucket.ratio].bits),
        ]
        for bucket in told.buckets
    ]
    heads = ["shape", "pixels", "pictures", "cut off", "enlarged", "positions", "bits"]
    tables = [Table("shapes", heads, rows)]
    worst = [[entry.key, f"{100 * entry.share:.1f} %"] for entry in told.most_cropped[:WORST] if entry.share >= MUCH]
    if worst:
        tables.append(Table("most is cut off", ["picture", "share"], worst))
    if told.captions is not None and told.captions.cut_of:
        tables.append(Table("captions that are cut", ["picture"], [[key] for key in told.captions.cut_of[:WORST]]))
    if told.bad:
        more = len(told.bad) - NAMED
        bad = [[entry.key, entry.reason] for entry in told.bad[:NAMED]]
        bad += [[f"and {more} more", "in data_report.json"]] if more > 0 else []
        tables.append(Table("skipped", ["picture", "reason"], bad))
    return tables


def show_check(result: VerifyResult) -> None:
    """Prints whether a token store is whole to stdout, else every file that is not."""
    if result.faults:
        for fault in result.faults:
            print(f"{fault.file}: {fault.reason}")
        return
    kept = ["bits", *(["latents"] if result.latents else []), *(["text features"] if result.text_features else [])]
    shards = "1 shard" if result.shards == 1 else f"{result.shards} shards"
    parts = f" of {result.parts} parts" if result.parts > 1 else ""
    facts = {
        "store": str(result.store),
        "verified": f"{result.count} pictures in {shards}{parts}: OK",
        "kept": f"{', '.join(kept)}; {result.bytes} bytes",
        "took": duration(result.seconds),
    }
    _show_facts(facts)


def show_training(result: TrainResult) -> None:
    """Prints what a training reached to stdout."""
    facts = {
        "model": str(result.model),
        "run": str(result.run),
        "stage": result.stage,
        "steps": str(result.steps),
        "loss": f"{result.loss:.4f}",
    }
    for key, value in result.validation.items():
        if _in_line(key):
            facts[_name(key)] = _number(key, value)
    scales = per_scale(result.validation, _HELD_OUT)
    if scales:
        facts["held-out bit accuracy"] = " ".join(f"{100 * value:.1f}" for value in scales) + " % per scale"
    facts["took"] = duration(result.seconds)
    _show_facts(facts)


def show_sweep(result: SweepResult) -> None:
    """Prints what became of every run of a sweep to stdout, the best one marked."""
    from bitgen_cli.report import Table

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    best = result.best
    measures: dict[str, Callable[[SweepRun], str]] = {
        "loss": lambda run: number(run.loss),
        "held-out loss": lambda run: number(run.val_loss),
        "lowest": lambda run: number(run.best_val_loss),
        "held-out PSNR": lambda run: "" if run.val_psnr is None else f"{run.val_psnr:.2f}",
    }
    shown = {head: cell for head, cell in measures.items() if any(cell(run) for run in result.runs)}
    rows = []
    for run in result.runs:
        state = f"{run.state}, exit {run.exit_code}" if run.exit_code and run.state == "failed" else run.state
        cells = [*run.values.values(), str(run.steps), *(cell(run) for cell in shown.values()), state]
        rows.append([*cells, "best" if run is best else ""])
    show_tables([Table(str(result.out), [*result.heads, "steps", *shown, "state", ""], rows)])


def show_priors(result: PriorResult) -> None:
    """Prints what a folder of class pictures holds to stdout."""
    counts = {"new": result.made, "reused": result.reused, "your own": result.own}
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    facts = {"folder": str(result.folder), "class": result.class_word}
    facts["pictures"] = f"{len(result.pictures)} ({told})"
    facts["took"] = duration(result.seconds)
    _show_facts(facts)


def show_subject(result: SubjectResult) -> None:
    """Prints a learned subject and its drift report to stdout, and on a terminal what to type next."""
    from bitgen_cli.report import Table

    facts = {
        "subject": f"{result.name}, a {result.class_word} called {result.token}",
        "file": str(result.file),
        "run": str(result.run),
        "steps": str(result.steps),
    }
    seen = result.validation
    for label, key in (("photos, loss", "val_subject_loss"), ("class, loss", "val_prior_loss")):
        if key in seen:
            facts[label] = f"{seen[key]:.4f}"
    if result.merged is not None:
        facts["merged model"] = str(result.merged)
    facts["took"] = duration(result.seconds)
    _show_facts(facts)
    rows = []
    for label, name in ((result.phrase, "subject"), (f"{result.class_word}, no token", "class"), ("unrelated",) * 2):
        if f"drift_{name}_adherence" in seen:
            kept = seen.get(f"drift_{name}_agreement")
            same = "" if kept is None else f"{100 * kept:.1f} %"
            leak = seen.get("drift_class_leak") if name == "class" else None
            become = "" if leak is None else f"{100 * max(0.0, leak):.0f} %"
            rows.append([label, same, f"{100 * seen[f'drift_{name}_adherence']:.0f} %", become])
    if rows:
        print()
        heads = ["pictures", "bits unchanged", "prompt adherence", "like the subject"]
        show_tables([Table("drift from the base model", heads, rows)])
    _print_error_line(f'draw it with: bitgen sample "a {result.phrase} on the moon"')


def show_tables(tables: Sequence[Table]) -> None:
    """Prints tables to stdout: drawn on a terminal, else aligned with spaces."""
    console = _console(sys.stdout)
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


def preview(paths: Sequence[Path]) -> None:
    """Shows the first pictures beside each other, small, if stdout is a terminal with colours.

    A character is two pixels, one above the other: the upper half block in the colour of the upper one, on a
    ground of the colour of the lower one.

    Args:
        paths: of pictures; at most PREVIEW_PICTURES are shown.
    """
    from PIL import Image

    console = _console(sys.stdout)
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


def show_error(message: str, kind: str = "error") -> None:
    """Prints an error to stderr, after its kind."""
    _say(_console(sys.stderr), kind, "bold red", message)


def is_terminal(console: Console) -> bool:
    """Whether more than plain lines can be shown."""
    return console.is_terminal and not console.is_dumb_terminal


def show_examples(examples: Sequence[Example]) -> None:
    """Prints commands to copy, each below what it does, which a shell takes for a comment."""
    console = _console(sys.stdout)
    console.print(Text(" Examples", "bold"))
    for example in examples:
        console.print()
        console.print(Text(f"   # {example.does}", "dim"), soft_wrap=True)
        console.print(Text(f"   {example.command}"), soft_wrap=True, highlight=False)


def _show_facts(facts: Mapping[str, str]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {harmless(value)}")


def _console(stream: TextIO) -> Console:
    """A console for stdout or stderr; colours forced by the environment do not make a file a terminal."""
    return Console(file=stream, force_terminal=stream.isatty())


def _say(console: Console, kind: str, style: str, text: str) -> None:
    console.print(Text.assemble((f"{kind}: ", style), harmless(text)), soft_wrap=True, highlight=False)


def harmless(text: str) -> str:
    """The text with what is no character to be seen written out: a file's name cannot command the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _print_error_line(line: str) -> None:
    print(harmless(line), file=sys.stderr, flush=True)


def _in_line(key: str) -> bool:
    """Whether a measurement is shown by its name: not one of a single scale, nor one with its own place."""
    return "/" not in key and key not in _APART


def _name(key: str) -> str:
    """The name of a measurement for people."""
    held_out = key.startswith("val_")
    first, *rest = key.removeprefix("val_").split("_")
    name = " ".join(({"psnr": "PSNR", "ssim": "SSIM", "l1": "L1", "l2": "L2"}.get(first, first), *rest))
    return f"held-out {name}" if held_out else name


def _number(key: str, value: float) -> str:
    return f"{value:.2e}" if key == "learning_rate" else f"{value:.4f}"
