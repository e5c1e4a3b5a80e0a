"""A tiny model and batch that the engine's tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitgen_cli.config import ModelConfig, TextEncoderConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.bits import to_positions
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.text import new_text_encoder
from bitgen_cli.engine.transformer import TextFeatures, Transformer


def config(bits: int = 6, patchify: bool = False) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "tokenizer": {
                "bits": bits,
                "patch_size": 4,
                "base_channels": 8,
                "channel_multipliers": [1, 1, 2],
                "res_blocks": 1,
                "norm_groups": 4,
            },
            "transformer": {
                "depth": 3,
                "width": 32,
                "heads": 2,
                "ffn_ratio": 8,
                "text_width": 16,
                "text_length": 10,
                "patchify": patchify,
            },
            "text_encoder": {"source": "none"},
            "scales": {"published": False, "custom": {"1.0": [[1, 1], [2, 2], [3, 3], [4, 4]]}},
        }
    )


def transformer(of: ModelConfig) -> Transformer:
    """Random weights, all of them: none at zero, so that nothing cancels."""
    model = Transformer(of)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def text(batch: int, lengths: tuple[int, ...] | None = None) -> TextFeatures:
    lengths = lengths or (5,) * batch
    generator = torch.Generator().manual_seed(2)
    return TextFeatures.from_rows([torch.randn(length, 16, generator=generator) for length in lengths])


def random_bits(batch: int, channels: int, schedule: Schedule, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, channels, *size, generator=generator) < 0.5 for size in schedule.latent_sizes]


def inputs(bits: list[Tensor], schedule: Schedule) -> Tensor:
    grids = pyramid.inputs_from_bits(bits, schedule)
    return torch.cat([to_positions(grid, schedule.cell) for grid in grids], dim=1)


def text_encoder_folder(folder: Path, width: int = 16) -> Path:
    """A transformers folder of a T5 with random weights, such as a configuration's text_encoder.source names."""
    geometry = {"source": "new", "vocabulary": 120, "width": width, "layers": 1, "heads": 2, "ffn_width": 32}
    captions = ["a red dog on the moon", "a cat in the snow", "a picture of a caption"]
    encoder = new_text_encoder(TextEncoderConfig.model_validate(geometry), captions, 16, seed=0)
    folder.mkdir(parents=True)
    encoder.model.save_pretrained(folder)
    encoder.vocabulary.save(str(folder / "tokenizer.json"))
    return folder
