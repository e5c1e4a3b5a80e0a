"""Training stage `tokenizer`: pictures to bits and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bitgen_cli.config import Config, TokenizerTraining
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import PictureSource, save_grid, to_float
from bitgen_cli.engine.device import DTYPES
from bitgen_cli.engine.losses import psnr, ssim, tokenizer_loss
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.pictures import Pictures
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trained_tokenizer import TrainedTokenizer
from bitgen_cli.engine.trainer import Pace, chunks, grouped, split
from bitgen_cli.errors import UsageError
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
        UsageError: some of the bits would never be used.
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
        self.module = TrainedTokenizer(tokenizer, training.precision).to(device)
        self.bit_counts = config.model.tokenizer.bit_counts
        if self.bit_counts[-1] < config.model.tokenizer.bits:
            raise UsageError(
                f"model.tokenizer.active_bits ends with {self.bit_counts[-1]}: the last of "
                f"{config.model.tokenizer.bits} bits would learn nothing",
                "end it with model.tokenizer.bits",
            )
        self._pictures = Pictures(source, config, training, report)
        trained, held_out = split(len(source), training.validation_images, training.seed)
        self.groups = grouped(trained, self._pictures.ratio)
        self._validation = chunks(grouped(held_out, self._pictures.ratio), training.batch_size)

    def ahead(self, indices: list[int]) -> None:
        self._pictures.ahead(indices)

    def loss(self, indices: list[int], generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """L1, structure, entropy and commitment of one micro-batch; the generator draws the number of bits."""
        image, scales = self._images(indices)
        drawn = int(torch.randint(len(self.bit_counts), (), generator=generator))
        bits = self.bit_counts if self.training.every_bit_count else (self.bit_counts[drawn],)
        losses, measured = [], {}
        for found in self.module(image, scales, bits):
            loss, parts = tokenizer_loss(image, found.image, found.latent, found.total, self.training)
            losses.append(loss)
            measured |= {f"{name}{self._suffix(found.bits)}": value for name, value in parts.items()}
        return torch.stack(losses).mean(), measured

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures: val_loss of all numbers of bits; val_psnr (dB), val_ssim, val_bit_usage.

        Where there are several numbers of bits these three are measured with each, as val_psnr/16 and so on.
        """
        sums: dict[str, float] = {}
        for indices in self._validation:
            image, scales = self._images(indices)
            measured = {"val_loss": torch.zeros(())}
            for found in self.module(image, scales, self.bit_counts):
                loss, parts = tokenizer_loss(image, found.image, found.latent, found.total, self.training)
                shown, suffix = found.image.clamp(-1, 1), self._suffix(found.bits)
                measured["val_loss"] = measured["val_loss"] + loss.cpu() / len(self.bit_counts)
                measured[f"val_psnr{suffix}"] = psnr(image, shown).mean()
                measured[f"val_ssim{suffix}"] = ssim(image, shown).mean()
                measured[f"val_bit_usage{suffix}"] = parts["bit_usage"]
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
        count = sum(len(indices) for indices in self._validation)
        return {name: value / count for name, value in sums.items()}

    def draw_samples(self, file: Path) -> None:
        """Originals above their reconstructions, with ever more bits; held-out pictures where there are some."""
        indices = next(iter(self._validation or self.groups))[:GRID_COLUMNS]
        image, scales = self._images(indices)
        shown = [found.image.clamp(-1, 1) for found in self.module(image, scales, self.bit_counts)]
        save_grid(torch.cat((image, *shown)), len(indices), file)

    def export(self, run: RunFolder, *, best: bool) -> None:
        """A model folder of the tokenizer alone."""
        dtype = DTYPES[self.training.export_precision]
        save_model(run.model, self.config.model, self.config.sampling, tokenizer=self.module.tokenizer, dtype=dtype)

    def close(self) -> None:
        self._pictures.close()

    def _suffix(self, bits: int) -> str:
        """Behind the names of what is measured with some number of bits, where there are several."""
        return f"/{bits}" if len(self.bit_counts) > 1 else ""

    def _images(self, indices: list[int]) -> tuple[Tensor, Schedule]:
        """Pictures of one aspect ratio, (B, 3, height, width) in [-1, 1], and their schedule."""
        scales = self._pictures.schedule(indices[0])
        pixels = torch.stack([self._pictures[index] for index in indices])
        return to_float(pixels.to(self.device)), scales
