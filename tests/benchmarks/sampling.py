"""How fast a picture is drawn: transformer and decoder of the 32bit preset, against a plain eager form of both.

    python -m tests.benchmarks.sampling [--repeat N]

The plain form is written out here and shares only the weights with the engine: a cache that is concatenated, keys and
values of a prompt padded to its full length made anew at every scale, guidance as two halves of one batch, a decoder of
separate normalisation, activation, enlarging and convolution; all in fp32. Both must compute the same. The best of the
repetitions counts. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgen_cli.engine import autoencoder, layers, pyramid
from bitgen_cli.engine.bits import codes, to_grid, to_positions
from bitgen_cli.engine.device import keep_freed_memory
from bitgen_cli.engine.sampling import Drawn, bit_probabilities, choose_bits, draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.presets import resolve

PROMPT_LENGTH = 20
GUIDANCE = 3.0
GOALS = {torch.float32: 1.5, torch.bfloat16: 2.5}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Difference allowed, root mean square as a share of the value's: the plain decoder in bfloat16 is itself 0.035 off."""


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def plain_rotate(x: Tensor, rope: layers.Rope) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * rope.cos - b * rope.sin, a * rope.sin + b * rope.cos), dim=-1).flatten(-2)


def plain_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def plain_block(
    block: layers.Block,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    mask: Tensor,
    rope: layers.Rope,
    cache: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One block over one scale; returns its output and the longer cache."""
    attention, cross, ffn = block.self_attention, block.cross_attention, block.ffn
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (block.modulation + modulation).unbind(2)

    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (scale1 + 1) + shift1
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    q, k, v = (heads_first(part, attention.heads) for part in F.linear(h, attention.qkv.weight, bias).chunk(3, dim=-1))
    q = F.normalize(q, dim=-1) * attention.log_scale.clamp_max(layers.MAX_LOG_SCALE).exp()
    q, k = (plain_rotate(part, rope).to(v.dtype) for part in (q, F.normalize(k, dim=-1)))
    if cache is not None:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    h = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
    x = x + F.linear(h, attention.proj.weight, attention.proj.bias) * gamma1

    cross_weight, cross_bias = (parameter.to(x.dtype) for parameter in (block.cross_norm.weight, block.cross_norm.bias))
    h = F.layer_norm(x, x.shape[-1:], cross_weight, cross_bias, 1e-6)
    q = heads_first(F.linear(h, cross.q.weight, cross.q.bias), cross.heads)
    bias = torch.cat((torch.zeros_like(cross.v_bias), cross.v_bias))
    text_k, text_v = (heads_first(p, cross.heads) for p in F.linear(text, cross.kv.weight, bias).chunk(2, dim=-1))
    h = F.scaled_dot_product_attention(q, text_k, text_v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + F.linear(h, cross.proj.weight, cross.proj.bias)

    h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (scale2 + 1) + shift2
    h = F.gelu(F.linear(h, ffn.up.weight, ffn.up.bias), approximate="tanh")
    return x + F.linear(h, ffn.down.weight, ffn.down.bias) * gamma2, (k, v)


@torch.no_grad()
def plain_draw(
    transformer: Transformer, text: TextFeatures, scales: Schedule, given: list[Tensor] | None = None
) -> list[Tensor]:
    """Guided logits (B, l, 2K) of each scale of pictures whose prompts are of one length.

    With `given`, they follow those bits.
    """
    geometry, batch = transformer.config, len(text.lengths)
    padded = F.pad(text.features, (0, 0, 0, geometry.text_length - text.features.shape[1]))
    null = transformer.null_text[None].expand(batch, -1, -1)
    features = torch.cat((padded, null))
    mask = (torch.arange(geometry.text_length, device=features.device) < text.lengths[0]).expand(2 * batch, 1, 1, -1)
    features = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-6) * transformer.text_norm
    pool = transformer.text_pool
    bias = torch.cat((torch.zeros_like(pool.v_bias), pool.v_bias))
    keys, values = (heads_first(part, pool.heads) for part in F.linear(features, pool.kv.weight, bias).chunk(2, dim=-1))
    queries = pool.query.unsqueeze(2).expand(2 * batch, -1, -1, -1)
    pooled = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(1)
    pooled = plain_linear(pool.proj, pooled)
    modulation = plain_linear(transformer.modulation, F.silu(pooled)).float().unflatten(-1, (6, -1)).unsqueeze(1)
    head_modulation = plain_linear(transformer.head_modulation, F.silu(pooled)).float()[:, None]
    head_scale, head_shift = head_modulation.chunk(2, dim=-1)
    widen, activate, mix = transformer.text_proj
    projected = plain_linear(mix, activate(plain_linear(widen, features)))

    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    caches: list[tuple[Tensor, Tensor] | None] = [None] * geometry.depth
    total: Tensor | None = None
    logits_of_scales = []
    for k, size in enumerate(scales.sizes):
        if total is None:
            x = pooled.float()[:, None] + transformer.start
        else:
            seen = to_positions(pyramid.next_input(total, scales.latent_sizes[k]), scales.cell)
            x = plain_linear(transformer.bit_embedding, seen.repeat(2, 1, 1).to(transformer.dtype)).float()
        x = x + transformer.scale_embedding.weight[k]
        rope = layers.rope_table(scales, geometry.width // geometry.heads, x.device)[scales.slices[k]]
        for index, block in enumerate(transformer.blocks):
            block = cast(layers.Block, block)
            x, caches[index] = plain_block(block, x, modulation, projected, mask, rope, caches[index])
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (head_scale + 1) + head_shift
        conditional, unconditional = plain_linear(transformer.head, h).chunk(2)
        logits = GUIDANCE * conditional + (1 - GUIDANCE) * unconditional
        logits_of_scales.append(logits)
        if given is None:
            grid = to_grid(choose_bits(bit_probabilities(logits), generators), size, scales.cell)
        else:
            grid = given[k]
        total = pyramid.accumulate(total, codes(grid), scales.latent_sizes[-1])
    return logits_of_scales


def plain_activation(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def plain_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=1)


def plain_residual(x: Tensor, block: autoencoder.ResBlock) -> Tensor:
    h = plain_conv(plain_activation(x, block.norm1), block.conv1)
    h = plain_conv(plain_activation(h, block.norm2), block.conv2)
    return (x if block.nin_shortcut is None else block.nin_shortcut(x)) + h


@torch.no_grad()
def plain_decode(decoder: autoencoder.Decoder, total: Tensor) -> Tensor:
    x = plain_conv(total, decoder.conv_in)
    x = plain_residual(plain_residual(x, decoder.mid.block_1), decoder.mid.block_2)
    for level in reversed(decoder.up):
        level = cast(autoencoder.DecoderLevel, level)
        for block in level.block:
            x = plain_residual(x, cast(autoencoder.ResBlock, block))
        if level.upsample is not None:
            x = plain_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), level.upsample.conv)
    image = plain_conv(plain_activation(x, decoder.norm_out), decoder.conv_out)
    return image.clamp(-1, 1)


def best(repeat: int, function: Callable[[], object]) -> float:
    """Seconds of the fastest of `repeat` calls, after one to warm up."""
    function()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def difference(ours: Tensor, plain: Tensor) -> float:
    """Root mean square of the difference as a share of the plain values'."""
    return ((ours.float() - plain).square().mean() / plain.square().mean()).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="calls of each; the fastest counts")
    repeat = parser.parse_args().repeat

    config = resolve("32bit", environment={}).config
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.model.tokenizer).eval().requires_grad_(False)
    transformer = Transformer(config.model).eval().requires_grad_(False)
    transformer.initialise(generator)
    scales = schedule(config.model.scales, patchify=config.model.transformer.patchify)
    how = plan(config.sampling.model_copy(update={"cfg": GUIDANCE, "cfg_layer": 0, "tau": 1.0}), len(scales))
    features = torch.randn(1, PROMPT_LENGTH, config.model.transformer.text_width, generator=generator)
    text = TextFeatures(features, (PROMPT_LENGTH,))

    def draw(logits: list[Tensor]) -> Drawn:
        return draw_bits(transformer, text, scales, how, [0], on_logits=lambda _, one: logits.append(one))

    @torch.inference_mode()
    def decode(total: Tensor) -> Tensor:
        return tokenizer.decode(total.to(next(tokenizer.parameters()).dtype))

    total = draw([]).total.clone()
    plain_image = plain_decode(tokenizer.autoencoder.decoder, total)
    plain = (
        best(repeat, lambda: plain_draw(transformer, text, scales)),
        best(repeat, lambda: plain_decode(tokenizer.autoencoder.decoder, total)),
    )
    weights = [{name: t.clone() for name, t in m.state_dict().items()} for m in (transformer, tokenizer)]
    keep_freed_memory()

    print(f"one picture of {' x '.join(map(str, scales.pixels(config.model.tokenizer.patch_size)))}, "
          f"guidance {GUIDANCE:g}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    print(f"{'':12} {'number type':12} {'plain fp32':>10} {'bitgen':>8} {'ratio':>6} {'goal':>5} {'difference':>11}")
    for dtype, goal in GOALS.items():
        transformer.to(dtype)
        tokenizer.to(dtype)
        logits: list[Tensor] = []
        drawn = draw(logits)
        image = decode(total)
        ours = (best(repeat, lambda: draw([])), best(repeat, lambda: decode(total)))
        for module, stored in zip((transformer, tokenizer), weights, strict=True):
            module.float().load_state_dict(stored)
        expected = plain_draw(transformer, text, scales, [grid.clone() for grid in drawn.bits])
        apart = (difference(torch.cat(logits, 1), torch.cat(expected, 1)), difference(image, plain_image))
        for part, before, after, error in zip(("transformer", "decoder"), plain, ours, apart, strict=True):
            print(f"{part:12} {str(dtype).removeprefix('torch.'):12} {before:8.2f} s {after:6.2f} s "
                  f"{before / after:6.2f} {goal:5.1f} {error:11.1e}")  # fmt: skip
            assert error < TOLERANCES[dtype], f"{part} in {dtype} computes something else"


if __name__ == "__main__":
    main()
