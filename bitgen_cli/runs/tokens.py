"""What a transformer is trained on: a token store, or pictures that are tokenized meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from bitgen_cli.config import Config, TransformerTraining
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data_report import announce
from bitgen_cli.engine.device import pick_dtype
from bitgen_cli.engine.model_folder import Model, require_same_tokenizer
from bitgen_cli.engine.online import OnlineTokens, online_schedules
from bitgen_cli.engine.scales import nearest
from bitgen_cli.engine.sources import WORLD, PictureSource, open_source
from bitgen_cli.engine.store import TokenStore, is_store
from bitgen_cli.engine.tokens import Tokens
from bitgen_cli.engine.trainer import LOOK_AHEAD
from bitgen_cli.report import Report


@dataclass(frozen=True)
class Data:
    """What --data names, and what belongs to it.

    Attributes:
        name: a token store, or pictures as `open_source` reads them.
        image_root: where listed pictures are, if not beside their listing.
        caption_key: field that holds the captions; `none` reads none.
    """

    name: str
    image_root: Path | None = None
    caption_key: str | None = None

    @property
    def is_store(self) -> bool:
        """Whether it is tokens already."""
        return not self.name.startswith(WORLD) and is_store(Path(self.name))


def open_tokens(config: Config, data: Data, model: Model, device: torch.device, report: Report) -> Tokens:
    """The tokens of a store, or of pictures, which the tokenizer of `model` encodes on the device.

    Raises:
        InputError: there is nothing of that name, or it is broken.
        UsageError: another tokenizer made the store.
    """
    if data.is_store:
        store = TokenStore.open(Path(data.name))
        require_same_tokenizer(model, store.manifest.tokenizer, f"the token store {data.name}")
        return store
    source, training = open_pictures(config, data), _recipe(config)
    announce(source, data.name, report)
    assert model.tokenizer is not None
    codec = Codec(model.tokenizer, config.model.tokenizer.most_bits, device, pick_dtype("auto", device))
    return OnlineTokens(
        source,
        config.model,
        codec,
        aspects=training.aspects,
        workers=training.workers,
        room=_room(training),
        report=report,
    )


def open_pictures(config: Config, data: Data) -> PictureSource:
    """The pictures a transformer learns from. Raises: as `open_source`."""
    pixels = _pixels(config)
    square = pixels[nearest(1.0, tuple(pixels))]
    return open_source(data.name, max(square), caption_key=data.caption_key, image_root=data.image_root)


def kept_of_pictures(config: Config, data: Data, rows: int) -> int:
    """Bytes of main memory for latents that are kept, and for pictures that are read ahead.

    Args:
        rows: pictures of a micro-batch that one process computes.
    """
    training, model = _recipe(config), config.model
    latent = max(
        2 * model.tokenizer.most_bits * math.prod(entry.latent_sizes[-1])
        for entry in online_schedules(model, training.aspects).values()
    )
    kept = min(_room(training), latent * len(open_pictures(config, data)))
    largest = max(3 * height * width for height, width in _pixels(config).values())
    return kept + (LOOK_AHEAD * rows * largest if training.workers else 0)


def _pixels(config: Config) -> dict[float, tuple[int, int]]:
    """(h, w) of the pictures of each aspect ratio in use."""
    schedules = online_schedules(config.model, _recipe(config).aspects)
    return {ratio: entry.pixels(config.model.tokenizer.patch_size) for ratio, entry in schedules.items()}


def _room(training: TransformerTraining) -> int:
    return int(training.picture_cache * 2**30)


def _recipe(config: Config) -> TransformerTraining:
    training = config.training.transformer
    assert training is not None
    return training
