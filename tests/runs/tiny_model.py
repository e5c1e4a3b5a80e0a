"""A tiny whole model, and photos for it, that the tests of the runs share."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from bitgen_cli.config import ModelConfig, SamplingConfig
from bitgen_cli.demo import world
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.text import new_text_encoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import Transformer

SHAPES = {
    "0.5": [[1, 1], [1, 2], [2, 4]],
    "1.0": [[1, 1], [2, 2], [4, 4]],
    "2.0": [[1, 1], [2, 1], [4, 2]],
}


def config(*ratios: str, text_length: int = 16) -> ModelConfig:
    """The tiny model's configuration, of pictures of these ratios of height to width."""
    return ModelConfig.model_validate(
        {
            "tokenizer": {
                "bits": 8,
                "patch_size": 4,
                "base_channels": 8,
                "channel_multipliers": [1, 1, 2],
                "res_blocks": 1,
                "norm_groups": 4,
            },
            "transformer": {
                "depth": 2,
                "width": 64,
                "heads": 2,
                "ffn_ratio": 4,
                "text_width": 32,
                "text_length": text_length,
                "patchify": False,
                "drop_path": 0.1,
            },
            "text_encoder": {"source": "new", "vocabulary": 200, "width": 32, "layers": 1, "heads": 2, "ffn_width": 32},
            "scales": {"published": False, "custom": {ratio: SHAPES[ratio] for ratio in ratios}},
        }
    )


CONFIG = config("1.0", "2.0")


def save(folder: Path, seed: int = 0, config: ModelConfig = CONFIG) -> Path:
    """A model folder with weights of that seed, decided enough that prompts and seeds show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config.tokenizer)
    transformer = Transformer(config)
    transformer.initialise(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        transformer.head.weight.mul_(20)
    captions = ["a red dog on the moon", "a cat on the beach", "a photo of the dog in the snow"]
    text_encoder = new_text_encoder(config.text_encoder, captions, config.transformer.text_length, seed)
    sampling = SamplingConfig(top_p=1.0)
    save_model(folder, config, sampling, tokenizer=tokenizer, transformer=transformer, text_encoder=text_encoder)
    return folder


def photos(folder: Path, count: int = 3, size: int = 48) -> Path:
    """A folder of photos of one dog."""
    folder.mkdir(parents=True, exist_ok=True)
    look = world.Look(coat=(240, 200, 150), patches=(60, 120, 110), accessory=(230, 40, 160))
    for number in range(count):
        scene = world.Scene("dog", "brown", world.PLACES[number])
        world.draw(scene, random.Random(number), size, look).save(folder / f"{number}.png")
    return folder
