"""The whole loss of a tokenizer's training: what reconstructions, bits and the adversary cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine.adversary import PatchDiscriminator, adaptive_weight, hinge_loss
from bitgen_cli.engine.losses import MeanOverRanks, quantiser_loss, reconstruction_loss
from bitgen_cli.engine.perceptual import Perceptual
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trained_tokenizer import Forward, Reconstruction, TrainedTokenizer


def trained_module(config: Config, tokenizer: Tokenizer) -> TrainedTokenizer:
    """What a configuration trains: the tokenizer, and a fresh discriminator where the recipe has one."""
    training = config.training.tokenizer
    assert training is not None
    discriminator = None
    if training.adversarial_weight:
        discriminator = PatchDiscriminator(training.discriminator_channels, training.discriminator_layers)
        discriminator.initialise(torch.Generator().manual_seed(training.seed))
    return TrainedTokenizer(tokenizer, discriminator, training.precision)


@dataclass(frozen=True)
class TokenizerLoss:
    """The loss of a recipe.

    Args:
        training: the recipe.
        several: whether the tokenizer is used with several numbers of bits, which measurements are then named after.
        perceptual: LPIPS; None where it has no weight.
    """

    training: TokenizerTraining
    several: bool
    perceptual: Perceptual | None = None

    def suffix(self, reconstruction: Reconstruction) -> str:
        """Behind the names of what is measured with some number of bits, where there are several."""
        return f"_{reconstruction.latent.shape[1]}_bits" if self.several else ""

    def of_tokenizer(
        self, image: Tensor, found: Sequence[Reconstruction], mean_over_ranks: MeanOverRanks
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Losses of the reconstructions and of the bits, means over the numbers of bits, and their detached parts."""
        likeness, quantisation = [], []
        measured: dict[str, Tensor] = {}
        for reconstruction in found:
            unlike, looks = reconstruction_loss(image, reconstruction.image, self.training, self.perceptual)
            latent, total = reconstruction.latent, reconstruction.total
            unfit, uses = quantiser_loss(latent, total, self.training, mean_over_ranks)
            likeness.append(unlike)
            quantisation.append(unfit)
            suffix = self.suffix(reconstruction)
            measured |= {f"{name}{suffix}": value for name, value in (looks | uses).items()}
        return torch.stack(likeness).mean(), torch.stack(quantisation).mean(), measured

    def whole(
        self, image: Tensor, found: Forward, last: nn.Conv2d, mean_over_ranks: MeanOverRanks
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss that one backward pass is for, and its detached parts.

        Where the adversary was asked, its gradients are in it, and its value is not: it says nothing of how far the
        training is, and would let the loss jump when it begins.

        Args:
            image: (B, 3, height, width) in [-1, 1].
            found: what `TrainedTokenizer` makes of it.
            last: the decoder's last layer.
            mean_over_ranks: of a tensor, the mean over the processes that share a batch.
        """
        likeness, quantisation, measured = self.of_tokenizer(image, found.reconstructions, mean_over_ranks)
        if found.real is None:
            return likeness + quantisation, measured
        adversarial, parts = self._adversarial(likeness, found, last, mean_over_ranks)
        return likeness + quantisation + (adversarial - adversarial.detach()), measured | parts

    def _adversarial(
        self, likeness: Tensor, found: Forward, last: nn.Conv2d, mean_over_ranks: MeanOverRanks
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the decoder loses to the discriminator and what that loses itself, and their parts."""
        assert found.real is not None
        fooling, gradients, seeing = [], [], []
        for reconstruction in found.reconstructions:
            assert reconstruction.fooling is not None
            assert reconstruction.fooling_gradient is not None
            assert reconstruction.fake is not None
            fooling.append(reconstruction.fooling)
            gradients.append(reconstruction.fooling_gradient / len(found.reconstructions))
            seeing.append(hinge_loss(found.real, reconstruction.fake))
        generator, discriminator = torch.stack(fooling).mean(), torch.stack(seeing).mean()
        weight = torch.full((), self.training.adversarial_weight, device=generator.device)
        if self.training.adversarial_adaptive:
            images = [reconstruction.image for reconstruction in found.reconstructions]
            weight = weight * adaptive_weight(
                torch.autograd.grad(likeness, images, retain_graph=True),
                gradients,
                [reconstruction.features for reconstruction in found.reconstructions],
                last,
                mean_over_ranks,
            )
        parts = {"generator": generator, "discriminator": discriminator, "adversarial_weight": weight}
        return weight * generator + discriminator, {name: part.detach() for name, part in parts.items()}
