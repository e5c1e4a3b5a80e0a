"""The forward pass of a tokenizer's training in one module, so that it can be wrapped whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import active, widened
from bitgen_cli.engine.adversary import PatchDiscriminator
from bitgen_cli.engine.device import autocast
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer


class Reconstruction(NamedTuple):
    """What pictures become with some number of bits d.

    Attributes:
        image: (B, 3, height, width) float32, not clamped.
        features: (B, channels, height, width) what the decoder's last layer made it of.
        latent: (B, d, H, W) float32 before quantisation.
        total: (B, d, H, W) its quantised sum over all scales, without gradient.
        fake: (B, 1, h, w) what the discriminator learns from: its verdict, without gradient for the image.
        fooling: what the decoder loses by that verdict (scalar), without gradient for the discriminator.
        fooling_gradient: (B, 3, height, width) gradient of `fooling` for the image.
    """

    image: Tensor
    features: Tensor
    latent: Tensor
    total: Tensor
    fake: Tensor | None
    fooling: Tensor | None
    fooling_gradient: Tensor | None


class Forward(NamedTuple):
    """Everything the loss of a batch is computed from.

    Attributes:
        reconstructions: one for each number of bits.
        real: (B, 1, h, w) the discriminator's verdict on the pictures themselves; None where it is not asked.
    """

    reconstructions: list[Reconstruction]
    real: Tensor | None


class TrainedTokenizer(nn.Module):
    """What stage `tokenizer` trains.

    Args:
        tokenizer: autoencoder and quantiser.
        discriminator: its adversary; None where there is none.
        precision: `fp32`, `bf16` or `fp16`, the number type of the convolutions.
    """

    def __init__(self, tokenizer: Tokenizer, discriminator: PatchDiscriminator | None, precision: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(True)
        self.discriminator = discriminator
        self._precision = precision

    def forward(
        self,
        image: Tensor,
        schedule: Schedule,
        bits: tuple[int, ...],
        kept: Tensor | None = None,
        *,
        judged: bool = False,
    ) -> Forward:
        """Pictures decoded again, once with each number of bits, from one pass through the encoder.

        The decoder sees the quantised sum; its gradient goes straight to the latent, past all scales at once.

        Args:
            image: (B, 3, height, width) in [-1, 1].
            schedule: its scales.
            bits: numbers of bits d.
            kept: (B,) how many scales of each picture the decoder sees; None is all.
            judged: whether the discriminator is asked.
        """
        with autocast(image.device, self._precision):
            whole = self.tokenizer.autoencoder.encode(image).float()
            found = [self._reconstruct(whole, schedule, count, kept, judged) for count in bits]
            real = self.discriminator(image).float() if judged and self.discriminator is not None else None
        return Forward(found, real)

    def _reconstruct(
        self, whole: Tensor, schedule: Schedule, bits: int, kept: Tensor | None, judged: bool
    ) -> Reconstruction:
        latent = active(whole, bits)
        with torch.no_grad():
            totals = [total for _, total in pyramid.walk(latent, schedule)]
            seen = totals[-1]
            if kept is not None:
                seen = torch.stack(totals)[kept - 1, torch.arange(len(kept), device=kept.device)]
        straight = latent + (seen - latent).detach()
        decoder = self.tokenizer.autoencoder.decoder
        features = decoder.features(widened(straight, whole.shape[1]))
        image = decoder.conv_out(features).float()
        fake = fooling = gradient = None
        if judged and self.discriminator is not None:
            fake = self.discriminator(image.detach()).float()
            fooling = -self.discriminator.unmoved(image).float().mean()
            if image.requires_grad:
                # here, and not from outside: what wraps this module may put something between image and loss
                (gradient,) = torch.autograd.grad(fooling, image, retain_graph=True)
        return Reconstruction(image, features, latent, totals[-1], fake, fooling, gradient)
