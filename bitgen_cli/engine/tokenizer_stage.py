"""Training stage `tokenizer`: pictures to bits and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine.active_bits import draw
from bitgen_cli.engine.adversary import PatchDiscriminator, adaptive_weight, hinge_loss, least_side
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import save_grid, to_float
from bitgen_cli.engine.device import DTYPES
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.losses import MeanOverRanks, psnr, quantiser_loss, reconstruction_loss, ssim
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.optimizer import Pace
from bitgen_cli.engine.order import chunks, grouped, split
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.perceptual import LEAST_SIDE, perceptual_distance
from bitgen_cli.engine.pictures import Pictures, Unreadable
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trained_tokenizer import Forward, Reconstruction, TrainedTokenizer
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report

GRID_COLUMNS = 12
SSIM_SIDE = 11
"""Pixels along the shorter side of a picture that its structure is measured with."""


class TokenizerStage:
    """Autoencoder and bits, trained straight through the whole quantised latent, with an adversary on demand.

    Args:
        config: the whole configuration; its training.tokenizer must be there.
        source: pictures; some are held out for validation.
        tokenizer: what is trained.
        device: where it is computed.
        report: hears of pictures that cannot be read; each is replaced by the next readable one.

    Raises:
        InputError: too many pictures cannot be read.
        UsageError: some of the bits would never be used, or pictures are too small for the recipe.
        ResourceError: a package that the recipe needs is not installed.
    """

    def __init__(
        self,
        config: Config,
        source: PictureSource,
        tokenizer: Tokenizer,
        device: torch.device,
        report: Report,
    ) -> None:
        training = config.training.tokenizer
        assert training is not None
        self.config = config
        self.training: TokenizerTraining = training
        self.device = device
        self.bit_counts = config.model.tokenizer.bit_counts
        _require_every_bit(config)
        discriminator = None
        self.paces: Mapping[str, Pace] = {}
        if training.adversarial_weight:
            discriminator = PatchDiscriminator(training.discriminator_channels, training.discriminator_layers)
            discriminator.initialise(torch.Generator().manual_seed(training.seed))
            self.paces = {"discriminator.": Pace(training.discriminator_pace, training.adversarial_start)}
        self.module = TrainedTokenizer(tokenizer, discriminator, training.precision).to(device)
        self._perceptual = perceptual_distance(device) if training.perceptual_weight else None
        self._forward: Callable[..., Any] = self.module
        self._ranks = Ranks(device=device)
        self._pictures = Pictures(
            source,
            config.model,
            aspects=training.aspects,
            budgets=training.resolutions,
            workers=training.workers,
            room=int(training.picture_cache * 2**30),
            unreadable=Unreadable(len(source), report),
        )
        trained, held_out = split(len(source), training.validation_images, training.seed)
        self.groups = grouped(trained, self._pictures.ratio)
        self._validation = chunks(grouped(held_out, self._pictures.ratio), training.batch_size)
        self._require_size()

    def share(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # the discriminator takes no part before its first step
        self._forward = ranks.wrap(self.module, (), partly=self.module.discriminator is not None)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self._pictures.name(index) for index in indices]

    def captions(self, indices: Sequence[int]) -> list[str]:
        return self.names(indices)

    def ahead(self, indices: list[int]) -> None:
        self._pictures.ahead(indices)

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, bits and adversary of one micro-batch.

        Drawn are the number of bits and the pixel budget of the batch, and the scales that each picture is decoded
        from; a picture's do not depend on its company.
        """
        training, generator = self.training, draws.shared
        bits = self.bit_counts if training.every_bit_count else (draw(self.bit_counts, generator),)
        image, scales = self._images(indices, _drawn_budget(training, generator))
        kept = kept_scales(indices, len(scales), training, generator)
        judged = bool(training.adversarial_weight) and step >= training.adversarial_start
        mean = self._mean_over_ranks(draws.weight)

        def finish(found: Forward) -> tuple[Tensor, dict[str, Tensor]]:
            return forward_loss(image, found, self.module, training, self._perceptual, mean)

        kept = None if kept is None else kept.to(self.device)
        found: tuple[Tensor, dict[str, Tensor]] = self._forward(
            image, scales, bits, kept, judged=judged, finish=finish
        )
        return found

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures: val_loss, val_psnr (dB), val_ssim and val_bit_usage.

        Where there are several numbers of bits, val_loss is their mean without the adversary, and the others are
        measured with each, as val_psnr_16_bits and so on.
        """

        several = len(self.bit_counts) > 1

        def measure(indices: list[int], weight: float) -> dict[str, Tensor]:
            image, scales = self._images(indices)
            found: list[Reconstruction] = self._forward(image, scales, self.bit_counts).reconstructions
            mean = self._mean_over_ranks(weight)
            likeness, quantisation, parts = picture_losses(
                image, found, self.training, self._perceptual, mean, several=several
            )
            measured = {"val_loss": likeness + quantisation}
            for reconstruction in found:
                shown, suffix = reconstruction.image.clamp(-1, 1), bits_suffix(reconstruction) if several else ""
                measured[f"val_psnr{suffix}"] = psnr(image, shown).mean()
                measured[f"val_ssim{suffix}"] = ssim(image, shown).mean()
                measured[f"val_bit_usage{suffix}"] = parts[f"bit_usage{suffix}"]
            return measured

        return self._ranks.mean_over(self._validation, measure)

    def draw_samples(self, file: Path) -> None:
        """Originals above their reconstructions, with ever more bits; held-out pictures where there are some."""
        indices = next(iter(self._validation or self.groups))[:GRID_COLUMNS]
        image, scales = self._images(indices)
        found = self.module(image, scales, self.bit_counts).reconstructions
        shown = [reconstruction.image.clamp(-1, 1) for reconstruction in found]
        save_grid(torch.cat((image, *shown)), len(indices), file)

    def export(self, run: RunFolder, *, best: bool) -> None:
        """A model folder of the tokenizer alone."""
        dtype = DTYPES[self.training.export_precision]
        save_model(run.model, self.config.model, self.config.sampling, tokenizer=self.module.tokenizer, dtype=dtype)

    def close(self) -> None:
        self._pictures.close()

    def _mean_over_ranks(self, weight: float) -> MeanOverRanks:
        """The mean of a tensor over all pictures of a batch; `weight` is that of this rank's."""
        return lambda tensor: self._ranks.mean(tensor * weight)

    def _images(self, indices: list[int], budget: str | int | None = None) -> tuple[Tensor, Schedule]:
        """Pictures of one aspect ratio, (B, 3, height, width) in [-1, 1], and their schedule.

        Args:
            budget: one of the recipe's; None is the largest, or the model's own where the recipe has none.
        """
        scales = self._pictures.schedule(indices[0], budget)
        image = to_float(torch.stack([self._pictures[index] for index in indices]).to(self.device))
        size = scales.pixels(self.config.model.tokenizer.patch_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return image, scales

    def _require_size(self) -> None:
        """Raises UsageError when pictures are smaller than some loss can bear."""
        training, patch_size = self.training, self.config.model.tokenizer.patch_size
        needed = {"SSIM": SSIM_SIDE}
        if training.perceptual_weight:
            needed["perceptual_weight"] = LEAST_SIDE
        if training.adversarial_weight:
            needed["discriminator_layers"] = least_side(training.discriminator_layers)
        what = max(needed, key=lambda name: needed[name])
        for group in self.groups:
            for budget in training.resolutions or (None,):
                height, width = self._pictures.schedule(group[0], budget).pixels(patch_size)
                if min(height, width) < needed[what]:
                    raise UsageError(
                        f"pictures of {height}x{width} pixels are too small for training.tokenizer: "
                        f"{what} needs {needed[what]} along the shorter side"
                    )


def forward_loss(
    image: Tensor,
    found: Forward,
    module: TrainedTokenizer,
    training: TokenizerTraining,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    mean_over_ranks: MeanOverRanks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that one backward pass is for, and its detached parts.

    Where the discriminator was asked, its gradients are in it, and its value is not: it says nothing of how far the
    training is, and would let the loss jump when it begins.

    Args:
        image: (B, 3, height, width) in [-1, 1].
        found: what `module` made of it.
        module: what is trained.
        training: the weights of the parts.
        perceptual: LPIPS; None without.
        mean_over_ranks: of a tensor, the mean over the processes that share a batch.
    """
    several = len(module.tokenizer.config.bit_counts) > 1
    likeness, quantisation, measured = picture_losses(
        image, found.reconstructions, training, perceptual, mean_over_ranks, several=several
    )
    loss = likeness + quantisation
    if found.real is not None:
        adversarial, parts = _adversarial(likeness, found, module, training, mean_over_ranks)
        loss, measured = loss + (adversarial - adversarial.detach()), measured | parts
    return loss, measured


def picture_losses(
    image: Tensor,
    found: Sequence[Reconstruction],
    training: TokenizerTraining,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    mean_over_ranks: MeanOverRanks,
    *,
    several: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses of the reconstructions and of the bits, means over the numbers of bits, and their parts.

    The names of the parts tell the number of bits where the tokenizer is used with `several`.
    """
    likeness, quantisation = [], []
    measured: dict[str, Tensor] = {}
    for reconstruction in found:
        unlike, looks = reconstruction_loss(image, reconstruction.image, training, perceptual)
        unfit, uses = quantiser_loss(reconstruction.latent, reconstruction.total, training, mean_over_ranks)
        likeness.append(unlike)
        quantisation.append(unfit)
        suffix = bits_suffix(reconstruction) if several else ""
        measured |= {f"{name}{suffix}": value for name, value in (looks | uses).items()}
    return torch.stack(likeness).mean(), torch.stack(quantisation).mean(), measured


def bits_suffix(reconstruction: Reconstruction) -> str:
    """Behind the names of what is measured with this number of bits."""
    return f"_{reconstruction.latent.shape[1]}_bits"


def _adversarial(
    likeness: Tensor,
    found: Forward,
    module: TrainedTokenizer,
    training: TokenizerTraining,
    mean_over_ranks: MeanOverRanks,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the decoder loses to the discriminator and what that loses itself, and their parts."""
    assert found.real is not None
    fooling, seeing = [], []
    for reconstruction in found.reconstructions:
        assert reconstruction.fooling is not None
        assert reconstruction.fake is not None
        fooling.append(-reconstruction.fooling.mean())
        seeing.append(hinge_loss(found.real, reconstruction.fake))
    generator, discriminator = torch.stack(fooling).mean(), torch.stack(seeing).mean()
    weight = torch.full((), training.adversarial_weight, device=generator.device)
    if training.adversarial_adaptive:
        weight = weight * adaptive_weight(
            likeness,
            generator,
            [reconstruction.image for reconstruction in found.reconstructions],
            [reconstruction.features for reconstruction in found.reconstructions],
            module.tokenizer.autoencoder.decoder.conv_out,
            mean_over_ranks,
        )
    parts = {"generator": generator, "discriminator": discriminator, "adversarial_weight": weight}
    return weight * generator + discriminator, {name: part.detach() for name, part in parts.items()}


def kept_scales(
    indices: Sequence[int], scales: int, training: TokenizerTraining, generator: torch.Generator
) -> Tensor | None:
    """How many scales of each picture the decoder sees, (B,); None where no recipe leaves any out.

    Args:
        indices: of the pictures: what is drawn for one depends on it and the generator, not on the others.
        scales: there are.
        training: its scale_dropout and scale_dropout_keep.
        generator: draws once.
    """
    if not training.scale_dropout:
        return None
    seed = int(torch.randint(2**62, (), generator=generator))
    kept = []
    for index in indices:
        own = torch.Generator().manual_seed(seed + index)
        dropped = float(torch.rand((), generator=own)) < training.scale_dropout
        least = min(training.scale_dropout_keep, scales)
        kept.append(int(torch.randint(least, scales, (), generator=own)) if dropped and least < scales else scales)
    return torch.tensor(kept)


def _drawn_budget(training: TokenizerTraining, generator: torch.Generator) -> str | int | None:
    """One of the recipe's pixel budgets, each as likely."""
    if training.resolutions is None:
        return None
    return training.resolutions[int(torch.randint(len(training.resolutions), (), generator=generator))]


def _require_every_bit(config: Config) -> None:
    """Raises UsageError when some of the tokenizer's bits would never be used."""
    tokenizer = config.model.tokenizer
    if tokenizer.most_bits < tokenizer.bits:
        raise UsageError(
            f"model.tokenizer.active_bits ends with {tokenizer.most_bits}: the last of {tokenizer.bits} bits "
            "would learn nothing",
            "end it with model.tokenizer.bits",
        )
