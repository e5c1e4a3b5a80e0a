"""Low-rank adapters: small matrices beside frozen ones, which a subject is learned into.

Source: arXiv 2106.09685, section 4.1: y = W x + alpha / rank * B A x. B starts at zero: nothing changes at first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitgen_cli.engine.layers import Linear
from bitgen_cli.engine.transformer import Transformer

LAYERS = {"cross": "cross_attention", "ffn": "ffn", "self": "self_attention"}
"""What a configuration calls the layers of a block, and what the block calls them."""


class Lora(nn.Module):
    """scale * B A x for x (B, L, in), with A (rank, in) and B (out, rank) in float32.

    Args:
        width, out: channels in and out.
        rank: of the product.
        scale: alpha / rank.
    """

    def __init__(self, width: int, out: int, rank: int, scale: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.zeros(rank, width, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(low, self.lora_B.to(low.dtype)) * self.scale


def targets(transformer: Transformer, layers: Sequence[str]) -> Iterator[tuple[str, Linear]]:
    """Names in the transformer and linear layers of its blocks that adapters of those `LAYERS` belong to."""
    wanted = tuple(f".{LAYERS[layer]}." for layer in layers)
    for name, module in transformer.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks.") and any(part in name for part in wanted):
            yield name, module


def attach(transformer: Transformer, layers: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Gives the layers adapters that change nothing yet; A is drawn from the seed on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for _, module in targets(transformer, layers):
        out, width = module.weight.shape
        adapter = Lora(width, out, rank, alpha / rank, module.weight.device)
        bound = 1 / math.sqrt(width)
        with torch.no_grad():
            drawn = torch.empty(rank, width, device="cpu").uniform_(-bound, bound, generator=generator)
            adapter.lora_A.copy_(drawn)
        module.adapter = adapter


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What an adapter adds to the weight (out, in) of its layer, float32."""
    return scale * (b.float() @ a.float())
