"""Training stage `tokenizer`: pictures to bits and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine.active_bits import draw
from bitgen_cli.engine.adversary import least_side
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import PictureSource, save_grid, to_float
from bitgen_cli.engine.device import DTYPES
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.losses import MeanOverRanks, psnr, ssim
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.optimizer import Pace
from bitgen_cli.engine.order import chunks, grouped, split
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.perceptual import LEAST_SIDE, perceptual_distance
from bitgen_cli.engine.pictures import Pictures
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_loss import TokenizerLoss, trained_module
from bitgen_cli.engine.trained_tokenizer import Forward
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
        self.paces: Mapping[str, Pace] = {
            "discriminator.": Pace(training.discriminator_pace, training.adversarial_start)
        }
        self.module = trained_module(config, tokenizer).to(device)
        self._forward: Callable[..., Forward] = self.module
        self._ranks = Ranks(device=device)
        perceptual = perceptual_distance(device) if training.perceptual_weight else None
        self._loss = TokenizerLoss(training, len(self.bit_counts) > 1, perceptual)
        self._pictures = Pictures(source, config, training, report)
        trained, held_out = split(len(source), training.validation_images, training.seed)
        self.groups = grouped(trained, self._pictures.ratio)
        self._validation = chunks(grouped(held_out, self._pictures.ratio), training.batch_size)
        self._require_size()

    def share(self, ranks: Ranks) -> None:
        self._ranks = ranks
        late = bool(self.training.adversarial_weight) and self.training.adversarial_start > 0
        self._forward = ranks.wrap(self.module, [], some_unused=late)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self._pictures.name(index) for index in indices]

    def ahead(self, indices: list[int]) -> None:
        self._pictures.ahead(indices)

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction, bits and adversary of one micro-batch.

        Drawn are the number of bits and the pixel budget of the batch, and the scales that each picture is decoded
        from.
        """
        training = self.training
        bits = self.bit_counts if training.every_bit_count else (draw(self.bit_counts, draws.shared),)
        image, scales = self._images(indices, _drawn_budget(training, draws))
        kept = kept_scales(len(scales), training, draws)
        judged = bool(training.adversarial_weight) and step >= training.adversarial_start
        found = self._forward(image, scales, bits, None if kept is None else kept.to(self.device), judged=judged)
        last = self.module.tokenizer.autoencoder.decoder.conv_out
        return self._loss.whole(image, found, last, self._mean_over_ranks(draws.weight))

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures: val_loss, val_psnr (dB), val_ssim and val_bit_usage.

        Where there are several numbers of bits, val_loss is their mean without the adversary, and the others are
        measured with each, as val_psnr_16_bits and so on.
        """
        weights = iter([self._ranks.share(len(whole)).weight for whole in self._validation])

        def measure(indices: list[int]) -> dict[str, Tensor]:
            image, scales = self._images(indices)
            found = self._forward(image, scales, self.bit_counts).reconstructions
            mean = self._mean_over_ranks(next(weights))
            likeness, quantisation, parts = self._loss.of_tokenizer(image, found, mean)
            measured = {"val_loss": likeness + quantisation}
            for reconstruction in found:
                shown, suffix = reconstruction.image.clamp(-1, 1), self._loss.suffix(reconstruction)
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
        """The mean over the ranks of what each measures on its part of a batch, which weighs so much here."""
        return lambda mean: self._ranks.mean(mean * weight)

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


def kept_scales(scales: int, training: TokenizerTraining, draws: Draws) -> Tensor | None:
    """How many scales of each picture the decoder sees, (B,); None where the recipe leaves none out.

    Args:
        scales: there are.
        training: its scale_dropout and scale_dropout_keep.
        draws: of the pictures.
    """
    if not training.scale_dropout:
        return None
    least = min(training.scale_dropout_keep, scales)
    drawn, which = draws.uniform(2).unbind(1)
    fewer = least + (which * (scales - least)).long()
    return torch.where(drawn < training.scale_dropout, fewer, scales)


def _drawn_budget(training: TokenizerTraining, draws: Draws) -> str | int | None:
    """One of the recipe's pixel budgets, each as likely."""
    if training.resolutions is None:
        return None
    return training.resolutions[int(torch.randint(len(training.resolutions), (), generator=draws.shared))]


def _require_every_bit(config: Config) -> None:
    """Raises UsageError when some of the tokenizer's bits would never be used."""
    tokenizer = config.model.tokenizer
    if tokenizer.most_bits < tokenizer.bits:
        raise UsageError(
            f"model.tokenizer.active_bits ends with {tokenizer.most_bits}: the last of {tokenizer.bits} bits "
            "would learn nothing",
            "end it with model.tokenizer.bits",
        )
