"""The parts of a transformer block: rotary positions, attention with a caller-owned cache, cross-attention, FFN.

Source: INFINITY_FORMAT section 4 (infinity/models/basic.py). The residual stream is float32; linear layers run in the
type of their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgen_cli.engine.scales import Schedule, consecutive

LONG = 1024
"""Positions from which a GPU computes longer than it takes to tell it what."""
SHORT = 128
"""Positions from which a CPU does."""
CONVOLVED = 64
"""Positions from which a processor with AVX-512 convolves."""
ROWS = 16
"""Fewest rows of a product on a CPU."""
MAX_LOG_SCALE = math.log(100)
"""Upper limit of the learned attention temperature."""


def attends_at_once(device: torch.device, batch: int, positions: int) -> bool:
    """Whether one masked attention takes less time than one for each scale, which does less arithmetic.

    On a CPU by a picture's positions alone, since it may round otherwise and must not depend on the batch.
    """
    return batch * positions < LONG if device.type == "cuda" else positions < SHORT


@dataclass(frozen=True)
class Rope:
    """Rotary tables of a schedule, one angle per adjacent channel pair.

    Attributes:
        cos, sin: (L, E/2) float32.
        turns: cos + i sin, complex64.
    """

    cos: Tensor
    sin: Tensor
    turns: Tensor

    def __getitem__(self, positions: slice) -> Rope:
        return Rope(self.cos[positions], self.sin[positions], self.turns[positions])

    @staticmethod
    def join(ropes: Sequence[Rope]) -> Rope:
        """One table after the other."""
        if len(ropes) == 1:
            return ropes[0]
        tables = ([rope.cos, rope.sin, rope.turns] for rope in ropes)
        return Rope(*(torch.cat(same) for same in zip(*tables, strict=True)))

    def at(self, kept: Tensor) -> Rope:
        """Of some positions of each picture, kept (B, p): tables (B, 1, p, E/2)."""
        return Rope(*(table[kept].unsqueeze(1) for table in (self.cos, self.sin, self.turns)))


def _rope_angles(schedule: Schedule, head_channels: int) -> Tensor:
    """Angles (L, E/2) float32: the first half of them by row, the second by column."""
    frequency = torch.arange(0, head_channels // 2, 2, dtype=torch.float32) / (head_channels // 2)
    frequency = 1.0 / (10000.0**frequency)
    angles = []
    for h, w in schedule.sizes:
        rows, columns = grid_positions((h, w), schedule.rope_grid)
        by_row = torch.outer(rows, frequency)[:, None].expand(h, w, -1)
        by_column = torch.outer(columns, frequency)[None].expand(h, w, -1)
        angles.append(torch.cat((by_row, by_column), dim=-1).flatten(0, 1))
    return torch.cat(angles)


def grid_positions(size: tuple[int, int], rope_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows (h,) and columns (w,) of a scale on the common grid: round(y * H / h), half to even, float32."""
    (h, w), (full_h, full_w) = size, rope_grid
    rows = (torch.arange(h, dtype=torch.float32) * (full_h / h)).round()
    columns = (torch.arange(w, dtype=torch.float32) * (full_w / w)).round()
    return rows, columns


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def rope_table(schedule: Schedule, head_channels: int, device: torch.device) -> Rope:
    """The rotary tables of a schedule for heads of E channels (INFINITY_FORMAT section 4, RoPE2D).

    Kept on the device, as ordinary tensors, so that a later training may use them too.
    """
    angles = _rope_angles(schedule, head_channels).to(device)
    cos, sin = angles.cos(), angles.sin()
    return Rope(cos, sin, torch.complex(cos, sin))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent channel pairs (a, b) to (a cos - b sin, a sin + b cos); x (B, N, L, E), the result float32.

    Without gradients as a product of complex numbers, which is one pass over x in place of seven.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type == "mps":
        a, b = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
        return torch.stack((a * rope.cos - b * rope.sin, a * rope.sin + b * rope.cos), dim=-1).flatten(-2)
    pairs = torch.view_as_complex(torch.unflatten(x.float().contiguous(), -1, (-1, 2)))
    return torch.view_as_real(pairs * rope.turns).flatten(-2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, L, in) times weight (out, in), plus bias.

    On a CPU without gradients a row is the same to the last bit whatever rows it is computed with, where products run
    as such: MKL has other kernels for few rows, so that few become ROWS. Where a processor has AVX-512, long sequences
    of float32 run as 1x1 convolutions: those are oneDNN's, which measured faster there, and slower elsewhere.
    """
    plain = torch.is_grad_enabled() or x.dtype != torch.float32 or x.device.type != "cpu"
    if plain or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.shape[1] >= CONVOLVED and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return F.conv2d(x.transpose(1, 2).unsqueeze(-1), weight[:, :, None, None], bias).squeeze(-1).transpose(1, 2)
    rows = x.flatten(0, 1)
    filled = F.pad(rows, (0, 0, 0, ROWS - len(rows))) if len(rows) < ROWS else rows
    return torch.unflatten(F.linear(filled, weight, bias)[: len(rows)], 0, x.shape[:2])


class Linear(nn.Linear):
    """A linear layer for sequences (B, L, channels), see `linear`.

    Attributes:
        adapter: what is added to its output, (B, L, in) to (B, L, out); None adds nothing (engine/lora.py).
    """

    adapter: nn.Module | None

    def __init__(self, width: int, out: int, bias: bool = True) -> None:
        super().__init__(width, out, bias)
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.biased(x, self.bias)

    def biased(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias than its own."""
        y = linear(x, self.weight, bias)
        return y if self.adapter is None else y + self.adapter(x).to(y.dtype)


class KVCache:
    """Keys and values of every block, allocated once and owned by the caller.

    The last scale is seen by no other: its keys and values follow those of the cache only while its block attends.

    Args:
        depth: blocks.
        batch, heads, channels: of the (B, N, l, E) tensors.
        counts: positions of each scale that go through the blocks.
        device, dtype: where and as what.

    Attributes:
        slices: where each scale's keys and values lie.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        heads: int,
        counts: Sequence[int],
        channels: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.slices = consecutive(counts)
        shape = (depth, 2, batch, heads, sum(counts[:-1]), channels)
        self._store = torch.empty(shape, device=device, dtype=dtype)

    def extend(self, block: int, positions: slice, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, positions.stop, E) up to and with these (B, N, l, E), which are kept at `positions`.

        A batch smaller than the cache's uses its first rows.
        """
        rows = keys.shape[0]
        stored_keys, stored_values = self._store[block]
        if positions.stop > stored_keys.shape[2]:
            before = slice(positions.start)
            return (
                torch.cat((stored_keys[:rows, :, before], keys), dim=2),
                torch.cat((stored_values[:rows, :, before], values), dim=2),
            )
        stored_keys[:rows, :, positions] = keys
        stored_values[:rows, :, positions] = values
        return stored_keys[:rows, :, : positions.stop], stored_values[:rows, :, : positions.stop]


class Sight(NamedTuple):
    """Positions start ... stop - 1 of a sequence, each of which sees those from `first` on up to the last of them."""

    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """Where the positions of a sequence lie in the picture, and what they see.

    Attributes:
        rope: rotary tables of the L positions.
        sights: of each scale: itself and the coarser ones.
        counts: how many positions belong to each prompt, in this order; most sequences have one prompt.
    """

    rope: Rope
    sights: tuple[Sight, ...]
    counts: tuple[int, ...]

    def spread(self, of_prompts: Tensor) -> Tensor:
        """To each position what its prompt has: (B, prompts, 6, D) to (B, L, 6, D), or the same where there is one."""
        if len(self.counts) == 1:
            return of_prompts
        each = zip(torch.split(of_prompts, 1, dim=1), self.counts, strict=True)
        return torch.cat([one.expand(-1, count, -1, -1) for one, count in each], dim=1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def layout_of(schedules: tuple[Schedule, ...], head_channels: int, device: torch.device) -> Layout:
    """The layout of a picture that is read once for each prompt, up to that prompt's last scale."""
    ropes = [rope_table(schedule, head_channels, device) for schedule in schedules]
    counts = tuple(schedule.positions for schedule in schedules)
    firsts = [part.start for part in consecutive(counts)]
    sights = tuple(
        Sight(first, first + scale.start, first + scale.stop)
        for first, schedule in zip(firsts, schedules, strict=True)
        for scale in schedule.slices
    )
    return Layout(Rope.join(ropes), sights, counts)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mask(sights: tuple[Sight, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """What is added to attention's logits (L, L), so that positions see what they may.

    Rows lie a multiple of 8 numbers apart, as the kernels on a GPU want them: else each call would copy it.
    """
    length = sights[-1].stop
    mask = torch.full((length, -(-length // 8) * 8), -math.inf, device=device, dtype=dtype)
    for first, start, stop in sights:
        mask[start:stop, first:stop] = 0
    return mask[:, :length]


class SelfAttention(nn.Module):
    """Attention with l2-normalised queries and keys, a learned temperature per head, and rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = Linear(width, width)

    def _qkv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = torch.unflatten(self.qkv.biased(x, bias), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.log_scale.clamp_max(MAX_LOG_SCALE).exp().to(q.dtype)
        return rotate(q, rope).to(v.dtype), rotate(F.normalize(k, dim=-1), rope).to(v.dtype), v

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """All scales at once; a position sees its own scale and the coarser ones.

        A scale sees a run of the sequence, so one unmasked call per scale is exact. Where the calls would take longer
        than what they compute, one with a mask.

        Args:
            x: (B, L, D).
            layout: of the L positions.
        """
        q, k, v = self._qkv(x, layout.rope)
        if attends_at_once(x.device, *x.shape[:2]) and not torch.is_grad_enabled():
            mask = _mask(layout.sights, q.device, q.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        else:
            each = [(q[:, :, at:end], k[:, :, first:end], v[:, :, first:end]) for first, at, end in layout.sights]
            attended = torch.cat([F.scaled_dot_product_attention(*some, scale=1.0) for some in each], dim=2)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed

    def step(self, x: Tensor, rope: Rope, cache: KVCache, block: int, positions: slice) -> Tensor:
        """One scale (B, l, D) after the scales the cache holds."""
        q, k, v = self._qkv(x, rope)
        keys, values = cache.extend(block, positions, k, v)
        attended = F.scaled_dot_product_attention(q, keys, values, scale=1.0)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


@dataclass(frozen=True)
class TextKV:
    """Keys and values (B, N, T, E) of a prompt for one block; `mask` (B, 1, 1, T) bool, None when no row is padded."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None


class CrossAttention(nn.Module):
    """Attention from positions to text; its keys and values are made once per prompt."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def text_kv(self, text: Tensor, mask: Tensor | None) -> TextKV:
        """Keys and values of projected text features (B, T, D)."""
        keys, values = _keys_values(text, self.kv, self.v_bias, self.heads)
        return TextKV(keys, values, mask)

    def forward(self, x: Tensor, texts: Sequence[TextKV], counts: Sequence[int] | None = None) -> Tensor:
        """Of x (B, L, D) so many positions attend to each text; without `counts` all of them to the one there is."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        parts = zip(torch.split(q, list(counts or [q.shape[2]]), dim=2), texts, strict=True)
        each = [F.scaled_dot_product_attention(of, kv.keys, kv.values, attn_mask=kv.mask) for of, kv in parts]
        attended = each[0] if len(each) == 1 else torch.cat(each, dim=2)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


class TextPool(nn.Module):
    """One learned query per head attends to the text features: the pooled condition (B, D).

    Args:
        text_width: channels of the features.
        width: D.
        heads: pooling heads, text_width // 128 as published.
    """

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.kv = Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        keys, values = _keys_values(features, self.kv, self.v_bias, self.heads)
        query = self.query.unsqueeze(2).expand(features.shape[0], -1, -1, -1).to(keys.dtype)
        pooled = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        condition: Tensor = self.proj(pooled.transpose(1, 2).flatten(2))
        return condition.squeeze(1)


def _keys_values(text: Tensor, kv: Linear, v_bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys (without bias) and values (with) of text (B, T, channels), each (B, N, T, E)."""
    bias = torch.cat((torch.zeros_like(v_bias), v_bias))
    keys, values = torch.unflatten(kv.biased(text, bias), -1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return keys, values


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form.

    On a CPU torch takes twice as long for it as for the same by a sigmoid: (1 + tanh(u)) / 2 = sigmoid(2 u).
    """
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    steep = 2 * math.sqrt(2 / math.pi)
    return torch.sigmoid_((x * x).mul_(0.044715 * steep).add_(steep).mul_(x)).mul_(x)


class FeedForward(nn.Module):
    """down(gelu(up(x))), GELU in its tanh form."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(gelu(self.up(x)))
        return y


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm without affine, times (1 + scale), plus shift; x (B, L, D), scale and shift (B, 1 or L, D)."""
    if x.device.type == "cuda" and x.shape[1] >= LONG and scale.shape[1] == 1 and not torch.is_grad_enabled():
        # norm, scale and shift of a row of the batch in one pass, where passes over memory are what takes time
        y = torch.empty(x.shape, device=x.device, dtype=dtype)
        for row, (weight, bias) in enumerate(zip((scale + 1).unbind(), shift.unbind(), strict=True)):
            y[row] = F.layer_norm(x[row], x.shape[-1:], weight[0], bias[0], 1e-6)
        return y
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale + 1).to(dtype)


def drop_path(branch: Tensor, kept: Tensor | None) -> Tensor:
    """The residual branch (B, L, D) of each sample times its factor of `kept` (B,); unchanged when that is None."""
    return branch if kept is None else branch * kept[:, None, None]


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the pooled text.

    Args:
        width, heads, hidden: D, N and the feed-forward width.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, width))
        self.self_attention = SelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, heads)
        self.ffn = FeedForward(width, hidden)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor | Sequence[TextKV],
        mask: Tensor | None,
        layout: Layout,
        kept: Tensor | None,
    ) -> Tensor:
        """Teacher-forced over all scales.

        Args:
            x: (B, L, D).
            modulation: (B, prompts, 6, D).
            text: projected text features (B, T, D) and their mask, or of each prompt what has become of them.
            layout: of the L positions.
            kept: (3, B) factors of the three residual branches (drop path); None keeps all as they are.
        """
        modulation = layout.spread(self.modulation + modulation)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        self_kept, cross_kept, ffn_kept = (None, None, None) if kept is None else kept.unbind()
        h = modulated_norm(x, scale1, shift1, self._dtype)
        x = self._add(x, drop_path(self.self_attention(h, layout), self_kept), gamma1)
        texts = [self.cross_attention.text_kv(text, mask)] if isinstance(text, Tensor) else text
        x = x + drop_path(self.cross_attention(self._before_text(x), texts, layout.counts), cross_kept)
        return self._ffn(x, gamma2, scale2, shift2, ffn_kept)

    def step(
        self, x: Tensor, modulation: Tensor, text: TextKV, rope: Rope, cache: KVCache, block: int, positions: slice
    ) -> Tensor:
        """One scale with a cache: x (B, l, D)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (self.modulation + modulation).unbind(2)
        h = modulated_norm(x, scale1, shift1, self._dtype)
        x = self._add(x, self.self_attention.step(h, rope, cache, block, positions), gamma1)
        x = x + self.cross_attention(self._before_text(x), [text])
        return self._ffn(x, gamma2, scale2, shift2)

    def _before_text(self, x: Tensor) -> Tensor:
        norm = self.cross_norm
        h = F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return h.to(self._dtype)

    def _ffn(self, x: Tensor, gamma: Tensor, scale: Tensor, shift: Tensor, kept: Tensor | None = None) -> Tensor:
        return self._add(x, drop_path(self.ffn(modulated_norm(x, scale, shift, self._dtype)), kept), gamma)

    def _add(self, x: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
        return torch.addcmul(x, branch.to(x.dtype), gamma.to(x.dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return self.ffn.up.weight.dtype
