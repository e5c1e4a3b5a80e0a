"""Whether a training fits: memory against what is free, checkpoints against the disk, and which flags would help."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from bitgen_cli.config import Config, LoopConfig
from bitgen_cli.engine.device import free_memory
from bitgen_cli.engine.memory import BYTES, FP32
from bitgen_cli.engine.scales import RESOLUTIONS
from bitgen_cli.engine.training_memory import LABELS, Layout, TrainingMemory
from bitgen_cli.errors import ResourceError
from bitgen_cli.report import Table

PROGRAM = 2**29
"""Bytes that the program, its libraries and their work space take besides."""
RANKS = (2, 4, 8, 16)
"""Numbers of devices that are tried."""


class Needed(Protocol):
    """The memory of a stage for other settings."""

    def __call__(self, config: Config, layout: Layout) -> TrainingMemory: ...


@dataclass(frozen=True)
class Choice:
    """Settings that would need less.

    Attributes:
        flags: what to type.
        total: bytes each rank would need, the program included.
        fits: whether that is free.
    """

    flags: str
    total: int
    fits: bool


@dataclass(frozen=True)
class Disk:
    """Bytes on disk, at their most.

    Attributes:
        checkpoint: one of them.
        kept: how many there are at once: the last ones, one that is being written, the best.
        models: model folders, of which the old one goes when the new one is whole.
        free: on the file system of the run; None where nobody tells.
    """

    checkpoint: int
    kept: int
    models: int
    free: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoint * self.kept + self.models


@dataclass(frozen=True)
class Fit:
    """What a training needs and whether it is there.

    Attributes:
        stage: that is trained.
        parameters: numbers that learn.
        device: where.
        ranks: processes that work together.
        memory: of each rank.
        data: bytes of what is kept of the data.
        free: bytes of memory; None where nobody tells.
        disk: what the run leaves.
        choices: settings that would need less memory; empty where it fits.
        init: what became of every key of the weights the training would begin with.
    """

    stage: str
    parameters: int
    device: str
    ranks: int
    memory: TrainingMemory
    data: int
    free: int | None
    disk: Disk
    choices: tuple[Choice, ...] = ()
    init: tuple[dict[str, Any], ...] = ()

    @property
    def total(self) -> int:
        """Bytes of memory, the program included."""
        return self.memory.total + self.data + PROGRAM

    @property
    def fits(self) -> bool:
        """Whether nothing is known to be too small."""
        memory = self.free is None or self.total <= self.free
        return memory and (self.disk.free is None or self.disk.total <= self.disk.free)

    def require(self) -> None:
        """Raises ResourceError, with what would help, when it does not fit."""
        if self.free is not None and self.total > self.free:
            fitting = [choice for choice in self.choices if choice.fits]
            told = "; ".join(f"{choice.flags}: {size(choice.total)}" for choice in fitting or self.choices)
            raise ResourceError(
                f"stage {self.stage} needs about {size(self.total)} of memory, "
                f"{self.device} has {size(self.free)} free",
                f"{'what fits' if fitting else 'what needs less, but not little enough'}: {told}" if told else None,
            )
        if self.disk.free is not None and self.disk.total > self.disk.free:
            raise ResourceError(
                f"the run will take up to {size(self.disk.total)} on disk, {size(self.disk.free)} are free",
                f"--out on another disk, or --set training.{self.stage}.keep_last=1",
            )

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "stage": self.stage,
            "device": self.device,
            "ranks": self.ranks,
            "parameters": self.parameters,
            "memory": {**self.memory.to_json(), "data": self.data, "program": PROGRAM, "total": self.total},
            "free": self.free,
            "disk": {**asdict(self.disk), "total": self.disk.total},
            "fits": self.fits,
            "choices": [asdict(choice) for choice in self.choices],
            "init": list(self.init),
        }

    def tables(self) -> list[Table]:
        """The same for people."""
        rows = [["Trained parameters", f"{self.parameters:,}"]]
        rows += [[LABELS[key], size(value)] for key, value in asdict(self.memory).items() if value]
        rows += [["Data", size(self.data)]] if self.data else []
        rows += [["Program and libraries", size(PROGRAM)], ["Peak", size(self.total)]]
        rows += [["Free", "not known" if self.free is None else size(self.free)]]
        rows += [["It fits" if self.fits else "It does not fit", ""]]
        where = self.device if self.ranks == 1 else f"each of {self.ranks} ranks on {self.device}"
        disk = [
            ["A checkpoint", size(self.disk.checkpoint)],
            [f"{self.disk.kept} of them at most", size(self.disk.checkpoint * self.disk.kept)],
            ["Models", size(self.disk.models)],
            ["Free", "not known" if self.disk.free is None else size(self.disk.free)],
        ]
        found = [
            Table(f"Memory for stage {self.stage} on {where}, estimated", ["", "Bytes"], rows),
            Table("On disk", ["", "Bytes"], disk),
        ]
        if self.choices:
            less = [[c.flags, size(c.total), "fits" if c.fits else "does not fit"] for c in self.choices]
            found.append(Table("What would need less memory", ["Flags", "Peak", ""], less))
        return found


def fit_of(
    config: Config,
    stage: str,
    layout: Layout,
    needed: Needed,
    out: Path,
    *,
    data: int = 0,
    returns: int = 0,
    may_shard: bool = False,
    more: Callable[[Config], Iterator[tuple[str, Config]]] | None = None,
) -> Fit:
    """What a training needs, and where that is more than there is, which flags need less.

    Args:
        config: its recipe for the stage must be there.
        stage: `tokenizer`, `transformer` or `subject`.
        layout: where it is computed.
        needed: the memory for settings.
        out: folder of the run, which need not exist.
        data: bytes of what is kept of the data on each device.
        returns: bytes in use that are part of what is needed: weights that are loaded already.
        may_shard: whether the stage can be divided among several devices.
        more: flags of this stage alone, and the configuration each makes.
    """
    memory = needed(config, layout)
    free = free_memory(layout.device)
    if free is not None and layout.device.type == "cpu":
        free //= layout.ranks  # they share the machine's memory
    free = None if free is None else free + returns
    trained = memory.gradients * (layout.ranks if layout.sharded else 1) // FP32
    disk = _disk(_recipe(config, stage), trained, out)
    found = Fit(stage, trained, str(layout.device), layout.ranks, memory, data, free, disk)
    if free is None or found.total <= free:
        return found
    choices: list[Choice] = []
    for flags, other, elsewhere in _others(config, stage, layout, needed, free - data - PROGRAM, may_shard, more):
        total = needed(other, elsewhere).total + data + PROGRAM
        if total - PROGRAM < 0.99 * (found.total - PROGRAM):
            choices.append(Choice(flags, total, total <= free))
    choices.sort(key=lambda choice: choice.total)
    return replace(found, choices=tuple(choices))


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _recipe(config: Config, stage: str) -> LoopConfig:
    found: LoopConfig = getattr(config.training, stage)
    return found


def with_recipe(config: Config, stage: str, **values: Any) -> Config:
    """The configuration with other values in a stage's recipe."""
    recipe = _recipe(config, stage).model_copy(update=values)
    return config.model_copy(update={"training": config.training.model_copy(update={stage: recipe})})


def _others(
    config: Config,
    stage: str,
    layout: Layout,
    needed: Needed,
    room: int,
    may_shard: bool,
    more: Callable[[Config], Iterator[tuple[str, Config]]] | None,
) -> Iterator[tuple[str, Config, Layout]]:
    """Flags that may need less, with the configuration and layout they make."""
    training = _recipe(config, stage)
    smaller = _smaller_batch(config, stage, layout, needed, room)
    if smaller is not None:
        yield smaller
    everything: dict[str, Any] = {}
    for key, value, changes in (
        ("checkpoint_activations", True, not getattr(training, "checkpoint_activations", True)),
        ("precision", "bf16", training.precision == "fp32"),
        ("ema_decay", 0.0, training.ema_decay > 0),
        ("sample_every", 0, training.sample_every > 0),
    ):
        if changes:
            everything[key] = value
            yield _set(stage, key, value), with_recipe(config, stage, **{key: value}), layout
    lower = lower_resolution(config.model.scales.resolution) if stage == "tokenizer" else None
    if lower is not None:
        scales = config.model.scales.model_copy(update={"resolution": lower})
        model = config.model.model_copy(update={"scales": scales})
        yield f"--set model.scales.resolution={lower}", config.model_copy(update={"model": model}), layout
    for flags, other in () if more is None else more(config):
        yield flags, other, layout
    if len(everything) > 1:
        words = [_set(stage, key, value) for key, value in everything.items()]
        base = config if smaller is None else smaller[1]
        words = words if smaller is None else [smaller[0], *words]
        yield " ".join(words), with_recipe(base, stage, **everything), layout
    if may_shard:
        for ranks in RANKS:
            if ranks > layout.ranks or not layout.sharded:
                spread = Layout(layout.device, ranks, sharded=True)
                if ranks == RANKS[-1] or needed(config, spread).total <= room:
                    yield f"--strategy fsdp on {ranks} devices", config, spread
                    return


def _set(stage: str, key: str, value: object) -> str:
    shown = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    return f"--set training.{stage}.{key}={shown}"


def _smaller_batch(
    config: Config, stage: str, layout: Layout, needed: Needed, room: int
) -> tuple[str, Config, Layout] | None:
    """The largest micro-batch that fits, or the smallest there is, with more of them in a step."""
    training = _recipe(config, stage)
    most, least = layout.rows(training.batch_size), 1
    if most == least:
        return None

    def of(rows: int) -> tuple[str, Config, Layout]:
        batch = rows * layout.ranks
        times = -(-training.batch_size * training.accumulation // batch)
        values = {"batch_size": batch, "accumulation": times}
        name = f"--set training.{stage}.batch_size={batch}" if stage == "subject" else f"--batch-size {batch}"
        return f"{name} {_set(stage, 'accumulation', times)}", with_recipe(config, stage, **values), layout

    low, high = (needed(of(rows)[1], layout).total for rows in (least, most))
    each = (high - low) / (most - least)
    rows = max(least, min(most - 1, least + int((room - low) // each))) if each > 0 else least
    while rows > least and needed(of(rows)[1], layout).total > room:
        rows -= 1
    return of(rows)


def lower_resolution(now: str | None) -> str | None:
    """The next smaller pixel budget; None where there is none."""
    known = list(RESOLUTIONS)
    return known[known.index(now) - 1] if now is not None and known.index(now) > 0 else None


def _disk(training: LoopConfig, trained: int, out: Path) -> Disk:
    """Weights, two averages of the optimizer, averaged weights; the model in the type it is left in."""
    checkpoint = trained * (FP32 + 2 * FP32 + (FP32 if training.ema_decay else 0))
    kept = min(training.keep_last + 1, training.steps) + (1 if training.validation_images else 0)
    model = trained * BYTES.get(training.export_precision, 2)
    place = next((folder for folder in (out, *out.absolute().parents) if folder.is_dir()), None)
    free = None
    if place is not None:
        try:
            free = shutil.disk_usage(place).free
        except OSError:
            free = None
    return Disk(checkpoint, kept, 2 * model, free)


