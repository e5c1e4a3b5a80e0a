"""Blocks of a transformer whose weights wait in the CPU's memory and take turns on the device, where not all fit there.

While one block computes, the weights of the next one that waits are copied: two sets of them are on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitgen_cli.engine.layers import Block

SETS = 2
"""Of a block's weights that are on the device: those in use, and those that come next."""


def spread(count: int, depth: int) -> tuple[int, ...]:
    """Which blocks wait when `count` of `depth` do: as far apart as they can, so that copies have time."""
    return tuple((turn + 1) * depth // count - 1 for turn in range(count))


class StreamedBlocks:
    """Gives the blocks of a transformer in their order, each with its weights on the device (transformer.in_turn).

    The parameters of a waiting block are on the CPU but while it is in use. Copies go on beside the computation from
    page-locked memory.

    Args:
        blocks: all of them.
        waiting: indices of those whose parameters are on the CPU.
        device: where they compute.
    """

    def __init__(self, blocks: Sequence[Block], waiting: Sequence[int], device: torch.device) -> None:
        self._turns = {index: turn for turn, index in enumerate(waiting)}
        self._waiting = [blocks[index] for index in waiting]
        self._sets = [
            [torch.empty_like(parameter, device=device) for parameter in block.parameters()]
            for block in self._waiting[:SETS]
        ]
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._copying is not None:  # the sets' memory may still be read by what it belonged to
            self._copying.wait_stream(torch.cuda.current_stream(device))
        self._copied = [_Event(device) for _ in self._sets]
        self._used = [_Event(device) for _ in self._sets]

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks; each is to be used before the next is asked for."""
        if self._waiting:
            self._fetch(0)
        for index, block in enumerate(blocks):
            turn = self._turns.get(index)
            if turn is None:
                yield block
            else:
                with self._present(turn):
                    yield block

    @contextmanager
    def _present(self, turn: int) -> Iterator[None]:
        """Puts a waiting block's weights in their place, and begins to copy those of the next."""
        place = turn % len(self._sets)
        parameters = list(self._waiting[turn].parameters())
        homes = [parameter.data for parameter in parameters]
        if turn + 1 < len(self._waiting):
            self._fetch(turn + 1)
        self._copied[place].wait()
        for parameter, here in zip(parameters, self._sets[place], strict=True):
            parameter.data = here
        try:
            yield
        finally:
            for parameter, home in zip(parameters, homes, strict=True):
                parameter.data = home
            self._used[place].record()

    def _fetch(self, turn: int) -> None:
        """Copies a block's weights as soon as the block before it in the same place is done."""
        place = turn % len(self._sets)
        with torch.cuda.stream(self._copying):
            self._used[place].wait()
            for parameter, here in zip(self._waiting[turn].parameters(), self._sets[place], strict=True):
                here.copy_(parameter.data, non_blocking=True)
            self._copied[place].record()


class _Event:
    """A point in the work of a device's stream; elsewhere than on a GPU everything has happened at once."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def record(self) -> None:
        """Marks the end of what the current stream was given."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Lets the current stream wait for the mark, if there was one."""
        if self._event is not None:
            self._event.wait()


def at_home(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor where it waits for a device: page-locked for a GPU, so that copies go on beside the computation."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
