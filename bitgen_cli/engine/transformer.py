"""The Infinity transformer: text and the scales so far to two logits per bit of the next scale.

Source: INFINITY_FORMAT section 4 (infinity/models/infinity.py). `forward` is teacher-forced over all scales; `step`
predicts one scale with a KV cache. Both give the same logits for the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.layers import (
    LONG,
    Block,
    KVCache,
    Layout,
    Linear,
    Rope,
    TextKV,
    TextPool,
    layout_of,
    modulated_norm,
    rope_table,
)
from bitgen_cli.engine.scales import Schedule

AfterBlock = Callable[[Tensor, int], Tensor]
"""Output (B, l, D) of a block and the block's index, to what the next block gets (guidance at a layer)."""


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts, padded only to the longest of the batch.

    Attributes:
        features: (B, T, text width) float; rows beyond a prompt's length are ignored.
        lengths: text tokens of each prompt, 1 ... T.
    """

    features: Tensor
    lengths: tuple[int, ...]

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, 1, T) bool, True where there is text; None when no prompt is padded."""
        longest = self.features.shape[1]
        if all(length == longest for length in self.lengths):
            return None
        lengths = torch.tensor(self.lengths, device=self.features.device)
        return (torch.arange(longest, device=self.features.device) < lengths[:, None])[:, None, None]

    def repeat(self, times: int) -> TextFeatures:
        """Every prompt `times` times in a row."""
        lengths = tuple(length for length in self.lengths for _ in range(times))
        return TextFeatures(self.features.repeat_interleave(times, dim=0), lengths)

    def part(self, rows: slice) -> TextFeatures:
        """Some rows of the batch."""
        return TextFeatures(self.features[rows], self.lengths[rows])

    @staticmethod
    def join(parts: Sequence[TextFeatures]) -> TextFeatures:
        """One batch of several, padded to the longest."""
        longest = max(part.features.shape[1] for part in parts)
        padded = [F.pad(part.features, (0, 0, 0, longest - part.features.shape[1])) for part in parts]
        return TextFeatures(torch.cat(padded), tuple(length for part in parts for length in part.lengths))

    @staticmethod
    def from_rows(rows: Sequence[Tensor]) -> TextFeatures:
        """A batch of unpadded prompts, each (T, text width)."""
        return TextFeatures.join([TextFeatures(row[None], (row.shape[0],)) for row in rows])


@dataclass(frozen=True)
class Condition:
    """What a prompt becomes for the transformer, computed once and used by every scale.

    Attributes:
        pooled: (B, D).
        modulation: (B, 1, 6, D), shared by the blocks.
        head_modulation: (B, 1, 2, D).
        text: keys and values of each block.
    """

    pooled: Tensor
    modulation: Tensor
    head_modulation: Tensor
    text: list[TextKV]

    def part(self, rows: slice) -> Condition:
        """Some rows of the batch."""
        text = [TextKV(kv.keys[rows], kv.values[rows], None if kv.mask is None else kv.mask[rows]) for kv in self.text]
        return Condition(self.pooled[rows], self.modulation[rows], self.head_modulation[rows], text)


class Predictor(Protocol):
    """What predicts the bits of one scale after another, as the transformer does: see there."""

    @property
    def bits_per_position(self) -> int: ...

    @property
    def depth(self) -> int: ...

    def null_features(self, lengths: Sequence[int]) -> TextFeatures: ...

    def condition(self, text: TextFeatures) -> Condition: ...

    def read(
        self, inputs: Tensor, conditions: Sequence[Condition], schedules: Sequence[Schedule]
    ) -> list[Tensor]: ...

    def new_cache(self, batch: int, schedule: Schedule, counts: Sequence[int] | None = None) -> KVCache: ...

    def step(
        self,
        scale: int,
        inputs: Tensor | None,
        condition: Condition,
        schedule: Schedule,
        cache: KVCache,
        after_block: AfterBlock | None = None,
        kept: Tensor | None = None,
    ) -> Tensor: ...


class Transformer(nn.Module):
    """Next-scale bit prediction.

    Args:
        config: geometry of the whole model: the tokenizer's bits decide the inputs and outputs.

    Attributes:
        in_turn: gives the blocks one by one, each ready for use (streaming.py); all of them always are as they come.
    """

    in_turn: Callable[[Iterable[Block]], Iterator[Block]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        geometry = config.transformer
        width, bits = geometry.width, config.bits_per_position
        self.config = geometry
        self.bits_per_position = bits
        self.checkpoint_activations = False
        self.in_turn = iter
        self.null_text = nn.Parameter(torch.zeros(geometry.text_length, geometry.text_width))
        self.text_norm = nn.Parameter(torch.ones(geometry.text_width))
        self.text_pool = TextPool(geometry.text_width, width, geometry.text_pool_heads)
        self.text_proj = nn.Sequential(
            Linear(geometry.text_width, width), nn.GELU(approximate="tanh"), Linear(width, width)
        )
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.bit_embedding = Linear(bits, width)
        # torch's own start of an embedding on the meta device loads a library for algebra, which takes seconds
        rows = torch.zeros(geometry.scale_embeddings, width)
        self.scale_embedding = nn.Embedding(geometry.scale_embeddings, width, _weight=rows)
        self.modulation = Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            Block(width, geometry.heads, geometry.ffn_width) for _ in range(geometry.depth)
        )
        self.head_modulation = Linear(width, 2 * width)
        self.head = Linear(width, 2 * bits)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights; the residual stream is float32."""
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def each_block(self) -> Iterator[Block]:
        """The blocks with their own type, which ModuleList forgets."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def null_features(self, lengths: Sequence[int]) -> TextFeatures:
        """The unconditional prompt of each length, as published: the first rows of a learned table."""
        rows = self.null_text[: max(lengths)]
        return TextFeatures(rows.expand(len(lengths), -1, -1), tuple(lengths))

    def condition(self, text: TextFeatures) -> Condition:
        """Everything that `step` needs from the prompts."""
        projected, pooled, modulation, head_modulation = self._read(text)
        mask = text.mask
        text_kv = [block.cross_attention.text_kv(projected, mask) for block in self.in_turn(self.each_block)]
        return Condition(pooled, modulation, head_modulation, text_kv)

    def _read(self, text: TextFeatures) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Projected features (B, T, D), the pooled condition (B, D), modulation of the blocks and of the head."""
        features = text.features.to(self.text_norm.dtype).float()
        features = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-6) * self.text_norm
        features = features.to(self.dtype)
        pooled = self.text_pool(features, text.mask)
        projected = self.text_proj(features)
        activated = F.silu(pooled).unsqueeze(1)
        modulation = torch.unflatten(self.modulation(activated).float(), -1, (6, -1))
        head_modulation = torch.unflatten(self.head_modulation(activated).float(), -1, (2, -1))
        return projected, pooled, modulation, head_modulation

    def forward(
        self, inputs: Tensor, text: TextFeatures, schedule: Schedule, kept: Tensor | None = None
    ) -> Tensor:
        """Logits of all scales for known coarser scales (teacher forcing).

        Args:
            inputs: (B, L - 1, K) what scales 1 and up see: the sum so far at their size (pyramid.next_input).
            text: B prompts.
            schedule: scales of the batch.
            kept: (depth, 3, B) factors of the residual branches (drop path); None keeps all as they are.

        Returns:
            (B, L, 2K): channels 2j and 2j + 1 are the logits of "bit j = 0" and "bit j = 1".
        """
        projected, pooled, modulation, head_modulation = self._read(text)
        mask = text.mask
        x = self._embedded(inputs, pooled, schedule)
        layout = self._layout([schedule])
        branches = [None] * len(self.blocks) if kept is None else kept.unbind()
        for block, factors in zip(self.in_turn(self.each_block), branches, strict=True):
            seen = (x, modulation, projected, mask, layout, factors)
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, *seen, use_reentrant=False)
            else:
                x = block(*seen)
        return self._logits(x, head_modulation)

    def read(
        self, inputs: Tensor, conditions: Sequence[Condition], schedules: Sequence[Schedule]
    ) -> list[Tensor]:
        """As `forward`, of prompts that were read: the logits of the same pictures after each of several prompts.

        Where the positions are few they are one sequence: that takes less time than one call for each.

        Args:
            inputs: (B, L - 1, K) of the longest schedule.
            conditions: each of B prompts.
            schedules: for each the scales that are wanted, the same ones or the first of them.

        Returns:
            For each (B, L, 2K) of its schedule.
        """
        if len(conditions) > 1 and sum(schedule.positions for schedule in schedules) >= LONG:
            each = zip(conditions, schedules, strict=True)
            return [self.read(inputs, [condition], [schedule])[0] for condition, schedule in each]
        layout = self._layout(schedules)
        modulation = torch.cat([condition.modulation for condition in conditions], dim=1)
        x = torch.cat(
            [
                self._embedded(inputs[:, : schedule.positions - 1], condition.pooled, schedule)
                for condition, schedule in zip(conditions, schedules, strict=True)
            ],
            dim=1,
        )
        for index, block in enumerate(self.in_turn(self.each_block)):
            x = block(x, modulation, [condition.text[index] for condition in conditions], None, layout, None)
        each_part = zip(torch.split(x, list(layout.counts), dim=1), conditions, strict=True)
        return [self._logits(part, condition.head_modulation) for part, condition in each_part]

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
        """Logits of one scale; the cache holds the coarser ones and gets this one.

        Args:
            scale: index of the scale.
            inputs: (B, l, K) the sum so far at this scale's size; None at scale 0.
            condition: of B prompts.
            schedule: scales of the batch.
            cache: from `new_cache`.
            after_block: guidance at a layer.
            kept: (B, l) the positions that are predicted (pruning.py), as many as the cache was made for; None
                predicts all, l = h*w.

        Returns:
            (B, l, 2K).
        """
        x = self._start(condition.pooled) if inputs is None else self.bit_embedding(inputs.to(self.dtype)).float()
        x = x + self.scale_embedding.weight[scale]
        rope = self.rope(schedule)[schedule.slices[scale]]
        if kept is not None:
            rope = rope.at(kept)
        for index, block in enumerate(self.in_turn(self.each_block)):
            x = block.step(x, condition.modulation, condition.text[index], rope, cache, index, cache.slices[scale])
            if after_block is not None:
                x = after_block(x, index)
        return self._logits(x, condition.head_modulation)

    def new_cache(self, batch: int, schedule: Schedule, counts: Sequence[int] | None = None) -> KVCache:
        """An empty cache for a batch of that many rows, and `counts` positions of each scale; None is all of them."""
        heads = self.config.heads
        channels = self.config.width // heads
        counts = schedule.counts if counts is None else counts
        return KVCache(len(self.blocks), batch, heads, counts, channels, self.device, self.dtype)

    def _embedded(self, inputs: Tensor, pooled: Tensor, schedule: Schedule) -> Tensor:
        """What the first block sees (B, L, D): the start, and inputs (B, L - 1, K), each with its scale's embedding."""
        counts = torch.tensor(schedule.counts, device=inputs.device)
        rows = self.scale_embedding.weight[: len(schedule)]
        scales = rows.repeat_interleave(counts, dim=0, output_size=schedule.positions)
        return torch.cat((self._start(pooled), self.bit_embedding(inputs.to(self.dtype)).float()), dim=1) + scales

    def _layout(self, schedules: Sequence[Schedule]) -> Layout:
        return layout_of(tuple(schedules), self.config.width // self.config.heads, self.device)

    def _start(self, pooled: Tensor) -> Tensor:
        return pooled.float()[:, None] + self.start

    def rope(self, schedule: Schedule) -> Rope:
        """Rotary tables of all positions of a schedule."""
        return rope_table(schedule, self.config.width // self.config.heads, self.device)

    def _logits(self, x: Tensor, head_modulation: Tensor) -> Tensor:
        scale, shift = head_modulation.unbind(2)
        logits: Tensor = self.head(modulated_norm(x, scale, shift, self.dtype))
        return logits.float()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights by the published recipe (INFINITY_FORMAT section 6, Init)."""
        width, depth = self.config.width, self.config.depth
        std = math.sqrt(1 / width / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.null_text, std=1.2 / math.sqrt(self.config.text_width), generator=generator)
        nn.init.trunc_normal_(self.start, std=std, generator=generator)
        nn.init.trunc_normal_(self.text_pool.query, std=std, generator=generator)
        self.head.weight.mul_(0.02)
        self.head_modulation.weight.mul_(1e-3)
        for block in self.each_block:
            nn.init.trunc_normal_(block.modulation, generator=generator)
            block.modulation[:, :, :2].mul_(5e-6)
            block.modulation[:, :, 2:].mul_(1e-3)
            for linear in (block.self_attention.proj, block.cross_attention.proj, block.ffn.down):
                linear.weight.div_(math.sqrt(2 * depth))
