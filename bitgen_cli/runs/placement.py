"""Where the parts of a model are while pictures are drawn: whole on the device, or in turns where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.bands import BAND
from bitgen_cli.engine.device import free_memory
from bitgen_cli.engine.memory import (
    BF16,
    Parameters,
    SamplingMemory,
    recordings_memory,
    sampling_memory,
    waiting_memory,
)
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.streaming import spread
from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.runs.fitting import PROGRAM, size

OFFLOADS = ("auto", "none", "cpu")
"""How much of a model may wait for its turn."""
AT_ONCE = 8
"""Pictures drawn at once when nothing else is asked for and they fit."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn, and with what.

    Attributes:
        model, counts: what is drawn with, and its parameters.
        schedules: of all pictures.
        pictures: how many can be drawn together at most.
        batch_size: how many are to be drawn at once; None leaves it open.
        number: bytes per number.
        tokens: of the longest prompt.
        records: whether scales are to be recorded where there is room for it.
    """

    model: ModelConfig
    counts: Parameters
    schedules: Sequence[Schedule]
    pictures: int
    batch_size: int | None
    number: int
    tokens: int
    records: bool = False


@dataclass(frozen=True)
class Placement:
    """How pictures are drawn so that they fit.

    Attributes:
        batch_size: pictures drawn at once.
        waiting: blocks of the transformer whose weights wait in the CPU's memory for their turn.
        in_bands: whether pictures are decoded in bands of rows.
        memory: what that takes of the device.
        recordings: bytes that recorded scales take of it besides; 0 where they are not recorded.
    """

    batch_size: int
    waiting: tuple[int, ...]
    in_bands: bool
    memory: SamplingMemory
    recordings: int = 0

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return self.memory.total + self.recordings

    def told(self) -> str | None:
        """What waits, for people; None where nothing does."""
        if not self.waiting:
            return None
        return (
            f"the weights of {len(self.waiting)} blocks wait in the CPU's memory; on the GPU about "
            f"{size(self.total)} are used"
        )


def check_offload(name: str) -> None:
    """Raises UsageError when it is none of OFFLOADS."""
    if name not in OFFLOADS:
        raise UsageError(f"--offload {name}: unknown", f"use {', '.join(OFFLOADS)}")


def place(wanted: Wanted, offload: str, device: torch.device) -> Placement:
    """Where the parts go.

    Args:
        wanted: what is drawn.
        offload: one of OFFLOADS: `none` has all on the device; with `auto` what does not fit there takes turns; with
            `cpu` all that can does. Recordings give way first.
        device: where it is drawn.

    Raises:
        ResourceError: it does not fit; says what would.
    """
    free = free_memory(device)
    tried = list(_ways(wanted, offload, device))
    for found in tried:
        if free is None or found.total + PROGRAM <= free:
            _require_room_to_wait(found, wanted, offload)
            return found
    raise _refused(wanted, offload, device, min(tried, key=lambda way: way.total), free or 0)


def _ways(wanted: Wanted, offload: str, device: torch.device) -> Iterator[Placement]:
    """Ways to draw, the quicker ones first."""
    depth = wanted.model.transformer.depth
    streams = device.type == "cuda"  # elsewhere the CPU's memory is the device's
    sizes = [wanted.batch_size] if wanted.batch_size else _halved(min(AT_ONCE, wanted.pictures))
    least = depth if streams and offload == "cpu" else 0
    for records, batch in product((True, False) if wanted.records and not least else (False,), sizes):
        if offload == "none" or (offload == "auto" and not _is_quicker_in_bands(wanted, device)):
            yield _way(wanted, batch, 0, in_bands=False, records=records)
        if offload != "none":
            yield _way(wanted, batch, least, in_bands=True, records=records)
    if offload == "auto" and streams:
        for waiting in range(3, depth + 1):  # two sets of weights are on the device whatever waits
            yield _way(wanted, sizes[-1], waiting, in_bands=True)


def _is_quicker_in_bands(wanted: Wanted, device: torch.device) -> bool:
    """Whether a CPU decodes in bands: what it works on then stays nearer, if there is more than one band."""
    channels = wanted.model.tokenizer.base_channels
    pixels = max(prod(schedule.pixels(wanted.model.tokenizer.patch_size)) for schedule in wanted.schedules)
    return device.type == "cpu" and channels * pixels > BAND


def _halved(size: int) -> list[int]:
    """The number, half of it, and so on to 1."""
    return [size] if size == 1 else [size, *_halved(size // 2)]


def _way(wanted: Wanted, batch: int, waiting: int, *, in_bands: bool, records: bool = False) -> Placement:
    found = [
        sampling_memory(
            wanted.model,
            wanted.counts,
            schedule,
            wanted.number,
            batch,
            text_number=0,  # the text encoder is gone by then
            tokens=wanted.tokens,
            waiting=waiting,
            in_bands=in_bands,
        )
        for schedule in wanted.schedules
    ]
    most = max(found, key=lambda memory: memory.total)
    recordings = max(map(recordings_memory, found)) if records else 0
    return Placement(batch, spread(waiting, wanted.model.transformer.depth), in_bands, most, recordings)


def _require_room_to_wait(placement: Placement, wanted: Wanted, offload: str) -> None:
    """Raises ResourceError where the CPU's memory is too small for the weights that wait there."""
    free = free_memory(torch.device("cpu"))
    needs = len(placement.waiting) * waiting_memory(wanted.model, wanted.number) if placement.waiting else 0
    if free is not None and needs > free:
        raise ResourceError(
            f"the weights of {len(placement.waiting)} blocks would wait in {size(needs)} of the CPU's memory, "
            f"which has {size(free)} free",
            _hint((["--offload auto"] if offload == "cpu" else []) + _less(wanted)),
        )


def _refused(wanted: Wanted, offload: str, device: torch.device, least: Placement, free: int) -> ResourceError:
    """Says what is missing, and what would need less."""
    other = [] if offload != "none" else ["--offload auto"]
    if least.batch_size > 1:
        other.append("--batch-size 1")
    return ResourceError(
        f"drawing needs about {size(least.total + PROGRAM)} of memory, {device} has {size(free)} free",
        _hint(other + _less(wanted)),
    )


def _less(wanted: Wanted) -> list[str]:
    """What needs less memory wherever parts are."""
    other = ["--dtype bf16"] if wanted.number > BF16 else []
    return other if wanted.model.scales.custom is not None else [*other, "a smaller --resolution"]


def _hint(less: list[str]) -> str:
    return f"what needs less: {', '.join(less)}" if less else "another device may have more: --device"
