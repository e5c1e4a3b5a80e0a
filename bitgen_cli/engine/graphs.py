"""A transformer whose scales are recorded as CUDA graphs and played back: the same kernels on the same numbers.

The coarse scales of a large model are so little arithmetic that a GPU waits for the CPU to give it the next kernel. A
graph gives it all kernels of a scale at once. It computes with tensors that stay where they are: prompts, inputs and
cache are copied to where they were when it was recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bitgen_cli.engine.layers import KVCache, Rope
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import AfterBlock, Condition, TextFeatures, Transformer

KEPT = 8
"""Lengths of prompts whose recordings are kept, those used last."""


class Recording(Protocol):
    """Something computed once that can be computed again from the same tensors."""

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        """Remembers what is computed; the tensor that holds the result of every `replay`."""

    def replay(self) -> None:
        """Computes again."""


class CudaGraph:
    """A recording of what a GPU was given to do.

    Args:
        pool: memory that it shares with others, none of which plays at the same time.
    """

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, compute: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.graph(self._graph, pool=self._pool):
            result = compute()
        return result

    def replay(self) -> None:
        self._graph.replay()


@dataclass
class _Scale:
    """A scale that has been computed: its recording, once there is one, and what that reads and writes."""

    recording: Recording | None = None
    inputs: Tensor | None = None
    kept: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class _Prompts:
    """Prompts of one shape: where their condition stays, and the scales that were computed with it."""

    condition: Condition
    scales: dict[tuple[object, ...], _Scale] = field(default_factory=dict)


class RecordedTransformer:
    """Stands in for a transformer in `draw_bits`.

    A scale is computed as ever the first time, recorded the second time, and played back from then on. What it returns
    is overwritten when the same scale of the same prompts' shape is computed again.

    Args:
        transformer: in evaluation mode, all of its weights on the device.
        new_recordings: gives what makes an empty one; recordings of one maker end together.
    """

    def __init__(
        self, transformer: Transformer, new_recordings: Callable[[], Callable[[], Recording]] | None = None
    ) -> None:
        self._transformer = transformer
        self._new_recordings = new_recordings or _graphs
        self._new_recording = self._new_recordings()
        self._prompts: OrderedDict[tuple[object, ...], _Prompts] = OrderedDict()
        self._now: _Prompts | None = None
        self._cache: KVCache | None = None
        self._cache_of: tuple[int, Schedule, tuple[int, ...]] | None = None
        self._rope: Rope | None = None

    @property
    def bits_per_position(self) -> int:
        """Of the transformer."""
        return self._transformer.bits_per_position

    @property
    def depth(self) -> int:
        """Of the transformer."""
        return self._transformer.depth

    def read(
        self, inputs: Tensor, conditions: Sequence[Condition], schedules: Sequence[Schedule]
    ) -> list[Tensor]:
        """As of the transformer, not recorded."""
        return self._transformer.read(inputs, conditions, schedules)

    def null_features(self, lengths: Sequence[int]) -> TextFeatures:
        """Of the transformer."""
        return self._transformer.null_features(lengths)

    def condition(self, text: TextFeatures) -> Condition:
        """As of the transformer, in tensors that stay where they are."""
        made = self._transformer.condition(text)
        mask = made.text[0].mask
        # a subject puts other tensors in the place of weights, and a recording reads the old ones
        places = tuple(parameter.data_ptr() for parameter in self._transformer.parameters())
        key = (made.text[0].keys.shape, mask is None, places)
        found = self._prompts.get(key)
        if found is None:
            found = self._prompts[key] = _Prompts(made)
            if len(self._prompts) > KEPT:
                self._prompts.popitem(last=False)
        else:
            self._prompts.move_to_end(key)
            for kept, new in zip(_tensors(found.condition), _tensors(made), strict=True):
                kept.copy_(new)
        self._now = found
        return found.condition

    def new_cache(self, batch: int, schedule: Schedule, counts: Sequence[int] | None = None) -> KVCache:
        """The one cache there is; another size ends all recordings."""
        size = batch, schedule, tuple(schedule.counts if counts is None else counts)
        if self._cache is None or self._cache_of != size:
            for prompts in self._prompts.values():
                prompts.scales.clear()
            self._new_recording = self._new_recordings()  # their memory has gone with them
            self._cache = None  # the old one is freed before the new one is made
            self._cache = self._transformer.new_cache(batch, schedule, counts)
            self._cache_of = size
            self._rope = self._transformer.rope(schedule)  # recordings read it
        return self._cache

    def step(
        self,
        scale: int,
        inputs: Tensor | None,
        condition: Condition,
        schedule: Schedule,
        cache: KVCache,
        after_block: AfterBlock | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """As of the transformer.

        Args: `condition` and `cache` are the last that `condition` and `new_cache` gave, or the first rows of it.
        """
        assert self._now is not None
        assert cache is self._cache
        key = (scale, condition.pooled.shape[0], after_block)
        known = self._now.scales.get(key)
        if known is None:
            self._now.scales[key] = _Scale()
            return self._transformer.step(scale, inputs, condition, schedule, cache, after_block, kept)
        if known.recording is None:
            known.recording = self._new_recording()
            known.inputs = None if inputs is None else inputs.clone()
            known.kept = None if kept is None else kept.clone()
            known.logits = known.recording.record(
                lambda: self._transformer.step(
                    scale, known.inputs, condition, schedule, cache, after_block, known.kept
                )
            )
        if inputs is not None:
            assert known.inputs is not None
            known.inputs.copy_(inputs)
        if kept is not None:
            assert known.kept is not None
            known.kept.copy_(kept)
        known.recording.replay()
        assert known.logits is not None
        return known.logits


def _graphs() -> Callable[[], CudaGraph]:
    """Makes graphs that share one piece of memory."""
    pool = torch.cuda.graph_pool_handle()
    first = CudaGraph(pool)  # the memory would go with the last graph in it, and this one stays
    first.record(lambda: torch.zeros(1, device="cuda"))

    def another(first: CudaGraph = first) -> CudaGraph:
        return CudaGraph(pool)

    return another


def _tensors(condition: Condition) -> list[Tensor]:
    """All tensors of a condition; the mask is of one prompt for all blocks."""
    mask = condition.text[0].mask
    keys_values = [tensor for kv in condition.text for tensor in (kv.keys, kv.values)]
    rest = [condition.pooled, condition.modulation, condition.head_modulation]
    return [*rest, *keys_values] if mask is None else [*rest, *keys_values, mask]
