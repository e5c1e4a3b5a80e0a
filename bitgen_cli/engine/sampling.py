"""From prompt to picture on one page: guidance and the choice of bits as pure functions, and the walk that uses them.

Source: INFINITY_FORMAT section 5 (infinity/models/infinity.py, autoregressive_infer_cfg).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine import pruning, pyramid
from bitgen_cli.engine.active_bits import logits_in_use, widened_positions
from bitgen_cli.engine.bits import codes, to_grid, to_positions
from bitgen_cli.engine.editing import Given
from bitgen_cli.engine.refine import Refined, Said, first_guided, of_one, refine
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import AfterBlock, Condition, Predictor, TextFeatures
from bitgen_cli.errors import UsageError

HOTTEST = 64.0
"""Temperatures are looked for between this and its inverse."""
HALVINGS = 24
"""Of the logarithm: the temperature is then known to a millionth."""


@dataclass(frozen=True)
class SamplingPlan:
    """How each scale's bits are chosen.

    Attributes:
        cfg: guidance per scale; 1 is none.
        cfg_layers: where guidance acts: 0 the logits, n the output of block depth - n; several may be named.
        tau: temperature per scale, above 0.
        top_k: 1 is greedy; every other value keeps both values of a bit.
        top_p: the lesser value is dropped when its probability is at most 1 - top_p.
        confidence: where it is given, each picture's temperature at each scale is the one with which its bits are so
            sure on average, and tau plays no part.
        fast: how much is left out on late scales (pruning.py); 0 is nothing.
        refine: rounds in which unlikely bits of finished pictures are turned over (refine.py).
    """

    cfg: tuple[float, ...]
    cfg_layers: tuple[int, ...]
    tau: tuple[float, ...]
    top_k: int
    top_p: float
    confidence: float | None = None
    fast: int = 0
    refine: int = 0


def plan(config: SamplingConfig, scales: int) -> SamplingPlan:
    """The configured sampling, one number per scale.

    Raises:
        UsageError: a list has another length than the schedule.
    """
    layers = (config.cfg_layer,) if isinstance(config.cfg_layer, int) else tuple(config.cfg_layer)
    return SamplingPlan(
        cfg=_per_scale(config.cfg, scales, "cfg"),
        cfg_layers=layers,
        tau=_per_scale(config.tau, scales, "tau"),
        top_k=config.top_k,
        top_p=config.top_p,
        confidence=config.target_confidence,
        fast=config.fast,
        refine=config.refine,
    )


def _per_scale(value: float | list[float], scales: int, name: str) -> tuple[float, ...]:
    if isinstance(value, list):
        if len(value) != scales:
            raise UsageError(f"{name} has {len(value)} numbers, the model has {scales} scales")
        return tuple(float(v) for v in value)
    return (float(value),) * scales


def guide(both: Tensor, cfg: float) -> Tensor:
    """cfg * conditional + (1 - cfg) * unconditional of a batch (2B, ...) whose first half is conditional; (B, ...)."""
    conditional, unconditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, cfg)


def bit_probabilities(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probability that each bit is 1 after the filters.

    Only the difference of a bit's two logits matters. Exactly equal logits keep both values when greedy.

    Args:
        logits: (B, L, 2K), guided and divided by the temperature.
        top_k: 1 keeps the likelier value alone; other values keep both.
        top_p: the lesser value is dropped when its probability is at most 1 - top_p; 1 keeps both.

    Returns:
        (B, L, K) in [0, 1].
    """
    pairs = torch.unflatten(logits, -1, (-1, 2))
    difference = pairs[..., 1] - pairs[..., 0]
    one = torch.sigmoid(difference)
    likelier = (difference >= 0).to(one.dtype)
    if top_k == 1:
        return torch.where(difference == 0, one, likelier)
    if top_p < 1:
        lesser = torch.sigmoid(-difference.abs())
        return torch.where(lesser <= 1 - top_p, likelier, one)
    return one


def temperatures(logits: Tensor, confidence: float) -> Tensor:
    """Temperature of each picture with which its bits are on average as sure as asked for.

    How sure a bit is, is the probability of its likelier value. The mean falls as the temperature rises: the range is
    halved until it is found. Source: after DiverseAR, which adapts each scale's temperature to how sure its bits are.

    Args:
        logits: (B, L, 2K), guided.
        confidence: above 0.5 and below 1.

    Returns:
        (B, 1, 1), between HOTTEST and its inverse.
    """
    pairs = torch.unflatten(logits, -1, (-1, 2))
    apart = (pairs[..., 1] - pairs[..., 0]).abs()
    low = torch.full((len(logits), 1, 1), -math.log(HOTTEST), device=logits.device)
    high = -low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        too_sure = torch.sigmoid(apart / middle.exp()).mean((1, 2), keepdim=True) > confidence
        low, high = torch.where(too_sure, middle, low), torch.where(too_sure, high, middle)
    return ((low + high) / 2).exp()


def choose_bits(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Bits (B, L, K) bool drawn with the given probabilities of 1.

    Picture b draws from generator b alone, on the CPU, so its bits depend neither on the batch nor on the device.

    Args:
        probabilities: (B, L, K); 0 and 1 are certain.
        generators: B CPU generators.
    """
    noise = torch.stack([torch.rand(probabilities.shape[1:], generator=generator) for generator in generators])
    return noise.to(probabilities.device) < probabilities


@dataclass(frozen=True)
class Drawn:
    """Bits of a batch.

    Attributes:
        bits: per scale (B, d, h, w) bool.
        total: their quantised sum (B, d, H, W) float32.
        refined: what refinement has changed, where there was any.
        condition: what became of the prompts, and of those that are guided away from, where refinement needs it.
        said: of the bits, where refinement needs it and all were predicted from the same prompts by whole scales.
    """

    bits: list[Tensor]
    total: Tensor
    refined: Refined | None = None
    condition: Condition | None = None
    said: Said | None = None


@torch.inference_mode()
def draw_bits(
    transformer: Predictor,
    text: TextFeatures,
    schedule: Schedule,
    plan: SamplingPlan,
    seeds: Sequence[int],
    *,
    bits: int | None = None,
    negative: TextFeatures | None = None,
    given: Given | None = None,
    on_scale: Callable[[int], None] | None = None,
    on_logits: Callable[[int, Tensor], None] | None = None,
) -> Drawn:
    """Predicts the bits of B pictures scale by scale.

    Args:
        transformer: in evaluation mode, or what stands in for it.
        text: B prompts.
        schedule: scales of the pictures.
        plan: how bits are chosen; as many entries as scales.
        seeds: one per picture.
        bits: d, the first bits of a latent position that are drawn; None draws all.
        negative: B prompts to guide away from; None takes the learned unconditional prompt.
        given: B pictures that are gone on from (editing.py), on the transformer's device; None draws all bits.
        on_scale: called with each scale's index when it is done.
        on_logits: called with the index and the logits (B, l, 2K) the bits are chosen from, of those drawn.

    Returns:
        Bits and their sum.
    """
    batch = len(seeds)
    every = transformer.bits_per_position
    drawn = every if bits is None else bits * schedule.cell**2
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cfgs, taus = pruning.unguided(plan.cfg, plan.tau, pruning.late_scales(schedule, plan.fast))
    counts = pruning.kept_counts(schedule, plan.fast)
    guided_scales = [k for k, cfg in enumerate(cfgs) if cfg != 1]
    last_guided = max(guided_scales, default=-1)
    if guided_scales:
        text = TextFeatures.join([text, negative or transformer.null_features(text.lengths)])
    condition = whole = transformer.condition(text)
    cache = transformer.new_cache(len(text.lengths), schedule, counts)
    total: Tensor | None = None
    before: Tensor | None = None
    grids: list[Tensor] = []
    said: list[Tensor] = []
    for k, size in enumerate(schedule.sizes):
        rows = 2 * batch if k <= last_guided else batch
        if rows < condition.pooled.shape[0]:
            condition = condition.part(slice(rows))
        inputs = kept = None
        if total is not None:
            seen = pyramid.next_input(total, schedule.latent_sizes[k])
            inputs = widened_positions(to_positions(seen, schedule.cell), every)
            if counts[k] < schedule.counts[k]:
                kept = pruning.pivotal(seen, counts[k], schedule.cell)
                inputs = pruning.gather(inputs, kept)
            inputs = inputs.repeat(rows // batch, 1, 1)
        cfg = cfgs[k]
        at_blocks = _guide_at_blocks(cfg, plan.cfg_layers, transformer.depth)
        kept_of_rows = None if kept is None else kept.repeat(rows // batch, 1)
        logits = transformer.step(k, inputs, condition, schedule, cache, at_blocks, kept_of_rows)
        logits = logits_in_use(logits, drawn)
        if plan.refine:
            said.append(of_one(logits))
        logits = guide(logits, cfg) if cfg != 1 and 0 in plan.cfg_layers else logits[:batch]
        logits = logits / (taus[k] if plan.confidence is None else temperatures(logits, plan.confidence))
        if kept is not None:
            assert before is not None
            logits = pruning.restored(logits, kept, before, schedule.sizes[k - 1], size)
        before = logits
        if on_logits is not None:
            on_logits(k, logits)
        chosen = choose_bits(bit_probabilities(logits, plan.top_k, plan.top_p), generators)
        grid = to_grid(chosen, size, schedule.cell)
        if given is not None:
            grid = torch.where(given.drawn[k], grid, given.bits[k])
        grids.append(grid)
        total = pyramid.accumulate(total, codes(grid), schedule.latent_sizes[-1])
        if on_scale is not None:
            on_scale(k)
    assert total is not None
    if not plan.refine:
        return Drawn(grids, total)
    return Drawn(grids, total, condition=whole, said=_all_said(said, schedule, plan, batch))


def _all_said(said: Sequence[Tensor], schedule: Schedule, plan: SamplingPlan, batch: int) -> Said | None:
    """What a pass over the drawn bits would say, from what drawing them has seen; None where that was something else.

    Args:
        said: per scale (rows, l, K), of the prompts and, until guidance ends, of those to guide away from.
    """
    guided = [of[batch:] for of in said if len(of) > batch]
    at_blocks = bool(guided) and plan.cfg_layers != (0,)
    if plan.fast or at_blocks or 0 < len(guided) < len(first_guided(schedule)):
        return None
    return Said(torch.cat([of[:batch] for of in said], dim=1), torch.cat(guided, dim=1) if guided else None)


@dataclass(frozen=True)
class _GuideAtBlocks:
    """Guidance on the output of some blocks: both halves of the batch become the guided state."""

    cfg: float
    blocks: frozenset[int]

    def __call__(self, x: Tensor, block: int) -> Tensor:
        return guide(x, self.cfg).repeat(2, 1, 1) if block in self.blocks else x


def _guide_at_blocks(cfg: float, layers: Sequence[int], depth: int) -> AfterBlock | None:
    """Guidance on the output of blocks depth - n, where a scale has any."""
    blocks = frozenset(depth - layer for layer in layers if layer > 0)
    return _GuideAtBlocks(cfg, blocks) if cfg != 1 and blocks else None


@torch.inference_mode()
def generate(
    transformer: Predictor,
    tokenizer: Tokenizer,
    text: TextFeatures,
    schedule: Schedule,
    plan: SamplingPlan,
    seeds: Sequence[int],
    *,
    bits: int | None = None,
    negative: TextFeatures | None = None,
    given: Given | None = None,
    on_scale: Callable[[int], None] | None = None,
    in_bands: bool = False,
) -> tuple[Tensor, Drawn]:
    """Pictures of prompts: bits scale by scale, refined where asked for, then the decoder.

    Args: as `draw_bits`; `tokenizer` decodes, `in_bands` of rows where memory is scarce. Of given pictures refinement
        changes what may be drawn, or, where nothing may, everything.

    Returns:
        Images (B, 3, height, width) float32 RGB in [-1, 1], and the bits they came from.
    """
    if given is None or given.draws:
        drawn = draw_bits(
            transformer, text, schedule, plan, seeds, bits=bits, negative=negative, given=given, on_scale=on_scale
        )
    else:
        drawn = Drawn(list(given.bits), pyramid.decode(list(given.bits), schedule))
    if plan.refine:
        where = given.drawn if given is not None and given.draws else None
        latent = given.latent if given is not None and where is None else None
        guidance = max(plan.cfg)
        prompts = drawn.condition or _read(transformer, text, negative, guidance)
        refined = refine(
            transformer,
            prompts,
            schedule,
            drawn.bits,
            plan.refine,
            guidance=guidance,
            said=drawn.said,
            where=where,
            latent=latent,
        )
        drawn = Drawn(refined.bits, pyramid.decode(refined.bits, schedule), refined)
    dtype = next(tokenizer.parameters()).dtype
    # one at a time: convolutions of a batch round differently, and a picture must not depend on its company
    images = [tokenizer.decode(total, in_bands=in_bands).float() for total in torch.split(drawn.total.to(dtype), 1)]
    return torch.cat(images), drawn


def _read(
    transformer: Predictor, text: TextFeatures, negative: TextFeatures | None, guidance: float
) -> Condition:
    """Prompts, and where there is guidance those that are guided away from, as `draw_bits` reads them."""
    if guidance != 1:
        text = TextFeatures.join([text, negative or transformer.null_features(text.lengths)])
    return transformer.condition(text)
