"""What stage `transformer` learns from: pictures as bits and latents, by index; stored, or made while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.store_format import StoredText
from bitgen_cli.engine.transformer import TextFeatures


class Tokens(Protocol):
    """Pictures as a tokenizer sees them, each with its captions.

    Attributes:
        keys: one per picture.
        captions: of each picture all of them; empty when it has none.
    """

    keys: list[str]
    captions: list[tuple[str, ...]]

    @property
    def name(self) -> str:
        """What errors call them."""

    @property
    def bit_count(self) -> int:
        """Bits a latent position."""

    @property
    def has_latents(self) -> bool:
        """Whether there are latents beside the bits."""

    @property
    def text(self) -> StoredText | None:
        """What made the text features that are there; None without."""

    @property
    def ratios(self) -> list[float]:
        """Aspect ratios (height / width) that occur, ascending."""

    def __len__(self) -> int: ...

    def ratio(self, index: int) -> float:
        """Aspect ratio of a picture."""

    def schedule(self, ratio: float) -> Schedule:
        """The schedule of an aspect ratio that occurs."""

    def keep(self, device: torch.device) -> None:
        """Learns where the pictures will be asked for, before anything else, and may keep there what it has."""

    def ahead(self, indices: Sequence[int]) -> None:
        """Learns which pictures will be asked for soon."""

    def readable(self, indices: Sequence[int]) -> list[int]:
        """These pictures; in the place of one that cannot be read, another one of its aspect ratio.

        Raises:
            InputError: too many pictures cannot be read.
        """

    def bits(self, indices: Sequence[int]) -> list[Tensor]:
        """Bits per scale, each (B, C, h, w) bool, of readable pictures of one aspect ratio."""

    def latents(self, indices: Sequence[int]) -> Tensor | None:
        """Latents (B, C, H, W) float32 of readable pictures of one aspect ratio; None without."""

    def text_features(self, indices: Sequence[int], captions: Sequence[int] | None = None) -> TextFeatures | None:
        """Features of a caption of each picture, float32; None without. Args: as `TokenStore.text_features`."""

    def close(self) -> None:
        """Ends what works in the background."""
