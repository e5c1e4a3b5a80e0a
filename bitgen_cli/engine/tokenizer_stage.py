"""Training stage `tokenizer`: pictures to bits and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import PictureSource, save_grid, to_float
from bitgen_cli.engine.device import DTYPES
from bitgen_cli.engine.losses import psnr, ssim, tokenizer_loss
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.pictures import Pictures
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trainer import Pace, chunks, grouped, split
from bitgen_cli.report import Report

GRID_COLUMNS = 12


class TokenizerStage:
    """Autoencoder and bits, trained straight through the whole quantised latent.

    Args:
        config: the whole configuration; its training.tokenizer must be there.
        source: pictures; some are held out for validation.
        tokenizer: what is trained.
        device: where it is computed.
        report: hears of pictures that cannot be read; each is replaced by the next readable one.

    Raises:
        InputError: too many pictures cannot be read.
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
        self.paces: Mapping[str, Pace] = {}
        self.training: TokenizerTraining = training
        self.device = device
        self.module = tokenizer.requires_grad_(True).to(device)
        self._pictures = Pictures(source, config, training, report)
        trained, held_out = split(len(source), training.validation_images, training.seed)
        self.groups = grouped(trained, self._pictures.ratio)
        self._validation = chunks(grouped(held_out, self._pictures.ratio), training.batch_size)

    def ahead(self, indices: list[int]) -> None:
        self._pictures.ahead(indices)

    def loss(
        self, indices: list[int], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, structure, entropy and commitment of one micro-batch; nothing in it is random."""
        image, scales = self._images(indices)
        reconstruction, latent, total = self._reconstruct(image, scales)
        return tokenizer_loss(image, reconstruction, latent, total, self.training)

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures: val_loss, val_psnr (dB), val_ssim and val_bit_usage."""
        sums: dict[str, float] = {}
        for indices in self._validation:
            image, scales = self._images(indices)
            reconstruction, latent, total = self._reconstruct(image, scales)
            loss, parts = tokenizer_loss(image, reconstruction, latent, total, self.training)
            shown = reconstruction.clamp(-1, 1)
            measured = {
                "val_loss": loss,
                "val_psnr": psnr(image, shown).mean(),
                "val_ssim": ssim(image, shown).mean(),
                "val_bit_usage": parts["bit_usage"],
            }
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
        count = sum(len(indices) for indices in self._validation)
        return {name: value / count for name, value in sums.items()}

    def draw_samples(self, file: Path) -> None:
        """Originals above their reconstructions: held-out pictures where there are some."""
        indices = next(iter(self._validation or self.groups))[:GRID_COLUMNS]
        image, scales = self._images(indices)
        reconstruction, _, _ = self._reconstruct(image, scales)
        save_grid(torch.cat((image, reconstruction.clamp(-1, 1))), len(indices), file)

    def export(self, run: RunFolder, *, best: bool) -> None:
        """A model folder of the tokenizer alone."""
        dtype = DTYPES[self.training.export_precision]
        save_model(run.model, self.config.model, self.config.sampling, tokenizer=self.module, dtype=dtype)

    def close(self) -> None:
        self._pictures.close()

    def _reconstruct(self, image: Tensor, scales: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        return reconstruct(self.module, image, scales, self.training.precision)

    def _images(self, indices: list[int]) -> tuple[Tensor, Schedule]:
        """Pictures of one aspect ratio, (B, 3, height, width) in [-1, 1], and their schedule."""
        scales = self._pictures.schedule(indices[0])
        pixels = torch.stack([self._pictures[index] for index in indices])
        return to_float(pixels.to(self.device)), scales


def reconstruct(tokenizer: Tokenizer, image: Tensor, scales: Schedule, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction and latent of an image, and the quantised sum.

    The decoder sees the sum; its gradient goes straight to the latent, past all scales at once.
    """
    autocast = torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast:
        latent = tokenizer.latent(image)
    latent = latent.float()
    with torch.no_grad():
        _, total = pyramid.encode(latent, scales)
    with autocast:
        reconstruction = tokenizer.autoencoder.decoder(latent + (total - latent).detach())
    return reconstruction.float(), latent, total
