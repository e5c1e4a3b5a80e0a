"""`bitgen inspect-config RUN --plot FILE`: the course of a training as curves; of several, beside each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bitgen_cli.config import Config
from bitgen_cli.engine.scales import nearest_ratio, schedule
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import atomic_path, read_json
from bitgen_cli.report import Report
from bitgen_cli.runs.measurements import Series, per_scale, read_measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
HELD_OUT = "val_"
"""Begins the names of measurements on held-out pictures."""
CHANCE_ACCURACY, CHANCE_LOSS = 0.5, math.log(2)
"""Of a bit that is guessed: how often that is right, and its cross-entropy in nats."""
MOST_PANELS = 24
"""What is measured besides is not drawn."""

MOST_INSIDE = 5
"""Names in a panel's legend; a longer one stands beside it."""
MOST_BEHIND = 8
"""Curves up to which what is smoothed is seen behind its mean."""

_COLUMNS = (3, 4)
_SIZE = (4.6, 3.2)
"""Inches of a panel."""
_SMOOTHED = 60
"""Points from which a curve is drawn faint, with its running mean on top."""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind readers too. Source: Okabe and Ito, Color Universal Design."""
_POINTS = 40
"""Most measurements on held-out pictures of which each gets a point."""
_NOT_DRAWN = ("epoch", "images_per_second")
_FIRST = ("loss", "bit_accuracy")
"""What is drawn per scale, before others."""
_TOGETHER = {
    "parts of the loss": ("l1", "structure", "commitment", "adversarial", "lpips"),
    "bits: how unsure, how evenly used": ("bit_entropy", "bit_usage"),
    "photos and class": ("subject_loss", "prior_loss"),
}
"""Titles of panels with several measurements, each with its held-out twin."""
_TITLES = {
    "loss": "loss",
    "l1": "L1",
    "l2": "L2",
    "lpips": "LPIPS",
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "grad_norm": "norm of the gradient",
    "drift_": "drift from the base model",
}
"""What is called otherwise than its name says."""
_WITH_BITS = re.compile(r"(.+)_(\d+)_bits")
"""Measurements of a tokenizer or transformer that is used with several numbers of bits."""
_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "bitgen",
}


@dataclass(frozen=True)
class PlotResult:
    """What was drawn.

    Attributes:
        file: the picture.
        runs: folders whose measurements it shows.
        panels: their titles, in order.
    """

    file: Path
    runs: list[Path]
    panels: list[str]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {"plot": str(self.file), "runs": [str(run) for run in self.runs], "panels": self.panels}


@dataclass(frozen=True)
class _Curve:
    """A line of a panel.

    Attributes:
        label: in the legend; empty is not named there.
        series: what is drawn.
        colour: of it.
        held_out: dashed with points: on held-out pictures.
    """

    label: str
    series: Series
    colour: Any
    held_out: bool = False


@dataclass(frozen=True)
class _Panel:
    """One diagram.

    Attributes:
        title: above it.
        curves: in it.
        chance: what a guess would reach, as a line.
        logarithmic: the values' axis.
    """

    title: str
    curves: list[_Curve]
    chance: float | None = None
    logarithmic: bool = False

    @property
    def noisy(self) -> bool:
        """Whether long curves are drawn smoothed: all but what a schedule says."""
        return self.title != _title("learning_rate")


@dataclass(frozen=True)
class _Run:
    """A run to draw.

    Attributes:
        path: its folder.
        measured: series by name.
        sizes: height and width of each scale; empty where they are not known.
        chance: the loss of guessed bits; None where the loss is no mean over bits.
        title: its name and what it trains.
    """

    path: Path
    measured: dict[str, Series]
    sizes: Sequence[tuple[int, int]]
    chance: float | None
    title: str


def plot(runs: Sequence[Path], file: Path, report: Report) -> PlotResult:
    """Draws the measurements of a run, or the main ones of several, into a file that is replaced if it exists.

    Args:
        runs: their folders.
        file: its suffix says the format.
        report: hears what is not drawn.

    Raises:
        UsageError: matplotlib is not installed, or the suffix is no known one.
        InputError: no run, or no measurements; or FILE cannot be written.
        ResourceError: no space left.
    """
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {file}: must end in {', '.join(FORMATS)}")
    if file.is_dir():
        raise UsageError(f"--plot {file}: is a folder", "name a file")
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise UsageError("--plot needs the package matplotlib", 'pip install "bitgen[plot]"')
    read = [_read(run) for run in runs]
    with _style():
        panels = _panels_of_one(read[0]) if len(read) == 1 else _panels_of_several(read)
        if len(panels) > MOST_PANELS:
            left = ", ".join(panel.title for panel in panels[MOST_PANELS:][:3])
            report.warning(f"{len(panels) - MOST_PANELS} measurements are not drawn: {left} ...")
            panels = panels[:MOST_PANELS]
        if not panels:
            raise InputError(f"{read[0].path} holds no measurements that can be drawn")
        figure = _figure(panels, read)
        with atomic_path(file) as temporary:
            kind = file.suffix.lower().removeprefix(".")
            metadata = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
            figure.savefig(temporary, format=kind, dpi=150, metadata=metadata)
    return PlotResult(file, list(runs), [panel.title for panel in panels])


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Run:
    """A run folder.

    Raises:
        InputError: it is none, or has measured nothing.
    """
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} is no run: there is no {file}", "--plot draws run folders")
    stored = read_json(file)
    if not isinstance(stored, dict) or "verb" not in stored:
        raise InputError(f"{path} is no run: {file} describes none", "--plot draws run folders")
    header = stored.get("header")
    what = f"{header.get('token')} {header.get('class_word')}" if isinstance(header, dict) else stored.get("stage", "")
    sizes: Sequence[tuple[int, int]] = ()
    chance: float | None = CHANCE_LOSS
    try:
        config = Config.model_validate(stored.get("config"))
    except ValidationError:
        pass  # of another version: its curves can be drawn all the same
    else:
        model = config.model
        ratio = nearest_ratio(1.0, model.scales)
        sizes = schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio).sizes
        recipe = config.training.transformer if "stage" in stored else config.training.subject
        if recipe is not None and recipe.bit_loss != "mean":
            chance = None
    name = path.resolve().name
    return _Run(path, read_measurements(path), sizes, chance, f"{name}: {what}" if what else name)


def _panels_of_one(run: _Run) -> list[_Panel]:
    """Everything a run has measured: losses first, then bits, then what is left."""
    measured, scales = dict(run.measured), per_scale(run.measured)
    for name in [*_NOT_DRAWN, *(f"{family}/{scale}" for family, found in scales.items() for scale in found)]:
        measured.pop(name, None)

    def with_twin(names: Sequence[str]) -> list[_Curve]:
        curves = []
        for colour, name in zip(_colours(len(names)), names, strict=True):
            label = _title(name) if len(names) > 1 else "training"
            own, twin = measured.pop(name, None), measured.pop(f"{HELD_OUT}{name}", None)
            if own is not None:
                curves.append(_Curve(label, own, colour))
            if twin is not None:
                other = f"{label}, held out" if len(names) > 1 else "held out"
                alone = own is None or len(names) > 1
                curves.append(_Curve(other, twin, colour if alone else _COLOURS[1], held_out=True))
        return curves

    per_bit = "loss" in scales
    panels = [_Panel("loss", with_twin(["loss"]), run.chance if per_bit else None)]
    families = [name for name in scales if not name.startswith(HELD_OUT) or name.removeprefix(HELD_OUT) not in scales]
    for family in sorted(families, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        panels.append(_scales_panel(family, scales, run))
    for title, names in _TOGETHER.items():
        there = [name for name in names if name in measured or f"{HELD_OUT}{name}" in measured]
        chance = run.chance if "subject_loss" in there else None
        panels.append(_Panel(title, with_twin(there), chance))
    drift = [name for name in measured if name.startswith("drift_")]
    curves = [
        _Curve(name.removeprefix("drift_").replace("_", " "), measured.pop(name), colour, held_out=True)
        for colour, name in zip(_colours(len(drift)), drift, strict=True)
    ]
    panels.append(_Panel(_TITLES["drift_"], curves))
    panels += _panels_by_bits(measured)
    last = [name for name in ("grad_norm", "learning_rate") if name in measured]
    for name in [name for name in measured if name not in last] + last:
        if name in measured:
            base = name.removeprefix(HELD_OUT)
            title = _title(base) if base in measured else f"{_title(base)}, held out"
            panels.append(_Panel(title, with_twin([base]), logarithmic=base == "grad_norm"))
    return [panel for panel in panels if panel.curves]


def _panels_by_bits(measured: dict[str, Series]) -> list[_Panel]:
    """What was measured with several numbers of bits, a curve each; taken out of `measured`."""
    counts: dict[str, set[int]] = {}
    for name in measured:
        match = _WITH_BITS.fullmatch(name.removeprefix(HELD_OUT))
        if match:
            counts.setdefault(match[1], set()).add(int(match[2]))
    panels = []
    for base, several in counts.items():
        curves, alone = [], True
        for bits, colour in zip(sorted(several), _shades(len(several)), strict=True):
            own = measured.pop(f"{base}_{bits}_bits", None)
            twin = measured.pop(f"{HELD_OUT}{base}_{bits}_bits", None)
            label = f"{bits} bits"
            if own is not None:
                curves.append(_Curve(label, own, colour))
                label, alone = "", False
            if twin is not None:
                curves.append(_Curve(label, twin, colour, held_out=True))
        panels.append(_Panel(f"{_title(base)}, held out" if alone else _title(base), curves))
    return panels


def _scales_panel(family: str, scales: Mapping[str, Mapping[int, Series]], run: _Run) -> _Panel:
    """One curve for each scale, and its held-out twin as points."""
    own, twin = scales[family], scales.get(f"{HELD_OUT}{family}", {})
    chance = {"loss": run.chance, "bit_accuracy": CHANCE_ACCURACY}.get(family.removeprefix(HELD_OUT))
    colours = dict(zip(own, _shades(len(own)), strict=True))
    curves = []
    for scale, series in own.items():
        size = f" ({run.sizes[scale][0]}x{run.sizes[scale][1]})" if scale < len(run.sizes) else ""
        curves.append(_Curve(f"{scale}{size}", series, colours[scale], held_out=family.startswith(HELD_OUT)))
        if scale in twin:
            curves.append(_Curve("", twin[scale], colours[scale], held_out=True))
    return _Panel(f"{family.replace('_', ' ')} per scale", curves, chance)


def _panels_of_several(runs: Sequence[_Run]) -> list[_Panel]:
    """What runs can be compared by: losses, mean bit accuracy, quality of reconstructions, learning rate."""
    colours = _colours(len(runs))
    names = ["loss", "val_loss", "bit_accuracy", "val_bit_accuracy", "val_psnr", "val_ssim"]
    more = {name for run in runs for name in run.measured if name.startswith("drift_")}
    panels = []
    for name in [*names, *sorted(more), "learning_rate"]:
        base, held_out = name.removeprefix(HELD_OUT), name.startswith((HELD_OUT, "drift_"))
        curves = []
        for run, colour in zip(runs, colours, strict=True):
            series = _mean(per_scale(run.measured).get(name, {})) if base == "bit_accuracy" else run.measured.get(name)
            if series is not None:
                curves.append(_Curve("", series, colour, held_out=held_out))
        title = "bit accuracy, mean of the scales" if base == "bit_accuracy" else _title(base)
        panels.append(_Panel(f"{title}, held out" if name.startswith(HELD_OUT) else title, curves))
    return [panel for panel in panels if panel.curves]


def _title(name: str) -> str:
    """The name of a measurement for people."""
    return _TITLES.get(name, name.replace("_", " "))


def _mean(scales: Mapping[int, Series]) -> Series | None:
    """The mean over scales, at the steps that all of them were measured at."""
    if not scales:
        return None
    tables = [dict(zip(series.steps, series.values, strict=True)) for series in scales.values()]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return Series(steps, [sum(table[step] for table in tables) / len(tables) for step in steps])


# -- how it is drawn ---------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """The same look whatever the user's own settings of matplotlib are; no window is opened."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def _colours(count: int) -> list[Any]:
    """Colours of things without an order."""
    return list(_COLOURS[:count]) if count <= len(_COLOURS) else _shades(count)


def _shades(count: int) -> list[Any]:
    """Colours of scales, from the coarsest to the finest: viridis without its lightest end, which white swallows."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * index / max(1, count - 1)) for index in range(count)]


def _figure(panels: Sequence[_Panel], runs: Sequence[_Run]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # as few empty places as can be
    columns = min(len(panels), min(_COLUMNS, key=lambda number: -len(panels) % number))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_SIZE[0] * columns, _SIZE[1] * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(panels):
            _draw(axes, panels[place], of_scales=panels[place].title.endswith("per scale"))
        else:
            axes.set_visible(False)
    if len(runs) == 1:
        figure.suptitle(_plain(runs[0].title), fontsize=12, fontweight="bold", x=0.01, ha="left")
    else:
        lines = [Line2D([], [], color=colour, linewidth=2) for colour in _colours(len(runs))]
        names = [_plain(name) for name in _names([run.path for run in runs])]
        figure.legend(lines, names, loc="outside upper left", ncols=min(4, len(runs)), fontsize=9)
    return figure


def _draw(axes: Axes, panel: _Panel, *, of_scales: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(_plain(panel.title))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    if panel.logarithmic:
        _logarithmic(axes, [value for curve in panel.curves for value in curve.series.values])
    for curve in panel.curves:
        steps, values, label = curve.series.steps, curve.series.values, _plain(curve.label)
        if curve.held_out:
            marker = "o" if len(values) <= _POINTS else ""
            look: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2, "marker": marker, "markersize": 3.5}
            axes.plot(steps, values, color=curve.colour, label=label, **look)
        elif panel.noisy and len(values) >= _SMOOTHED:
            if len(panel.curves) <= MOST_BEHIND:
                axes.plot(steps, values, color=curve.colour, linewidth=0.6, alpha=0.25)
            axes.plot(steps, _running_mean(values), color=curve.colour, linewidth=1.6, label=label)
        else:
            marker = "o" if len(values) == 1 else ""
            axes.plot(steps, values, color=curve.colour, marker=marker, markersize=3.5, linewidth=1.6, label=label)
    if panel.chance is not None:
        axes.axhline(panel.chance, color="#666666", linewidth=1, linestyle=":", label="chance")
    _legend(axes, panel, of_scales=of_scales)


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    """An axis of powers of ten, with the numbers between them where there are few."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return
    axes.set_yscale("log")
    numbers = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(numbers)
    axes.yaxis.set_minor_formatter(numbers if max(positive) < 10 * min(positive) else NullFormatter())


def _legend(axes: Axes, panel: _Panel, *, of_scales: bool) -> None:
    """Names what is drawn, beside the panel where that is much; nothing where one curve says it all."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if of_scales and any(not curve.label for curve in panel.curves):
        handles.append(Line2D([], [], color="#444444", linestyle="--", linewidth=1.2, marker="o", markersize=3.5))
        labels.append("held out")
    if of_scales or len(handles) > MOST_INSIDE:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.8)
    elif len(handles) > 1 or panel.title == _TITLES["drift_"]:
        axes.legend(handles, labels, loc="best")


def _running_mean(values: Sequence[float]) -> list[float]:
    """Means of the values around each one, over a twentieth of them; those that are not finite are left out."""
    reach = len(values) // 40
    means = []
    for place in range(len(values)):
        around = [v for v in values[max(0, place - reach) : place + reach + 1] if math.isfinite(v)]
        means.append(sum(around) / len(around) if around else math.nan)
    return means


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or the whole path where that is the same for two."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _plain(text: str) -> str:
    """Text that matplotlib takes literally: no formulas, and a legend for what begins with an underscore."""
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$")
