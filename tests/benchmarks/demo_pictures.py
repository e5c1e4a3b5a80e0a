"""The demo model, prompts that it was never trained on, and their judge: what benchmarks of drawn bits begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgen_cli.demo import world
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.data import to_uint8
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.sampling import SamplingPlan, draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.text import TextEncoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from tests.benchmarks.demo_quality import Score, picture_seeds
from tests.benchmarks.judge import Judge, load_or_train


@dataclass(frozen=True)
class DemoPictures:
    """Everything to draw pictures of scenes and to judge them.

    Attributes:
        scenes: what is asked for, one per picture: triples that are never trained on, again and again.
        seeds: one per picture.
        text: features of the scenes' prompts.
        how: the demo model's own way of sampling.
        pixels: height and width of a picture.
    """

    judge: Judge
    transformer: Transformer
    tokenizer: Tokenizer
    encoder: TextEncoder
    scenes: list[world.Scene]
    seeds: list[int]
    text: TextFeatures
    sizes: Schedule
    how: SamplingPlan
    pixels: tuple[int, int]

    @staticmethod
    def prepare(pictures: int, seed: int, device: str = "cpu") -> DemoPictures:
        """So many pictures on a device; another seed gives others."""
        judge, model = load_or_train().judge, load_model(find_model("demo"))
        assert model.transformer is not None
        assert model.tokenizer is not None
        assert model.text_encoder is not None
        scenes = (world.scenes(held_out=True) * pictures)[:pictures]
        seeds = [one + seed for one in picture_seeds(0, len(scenes))]
        sizes = schedule(model.config.scales, patchify=False)
        transformer, tokenizer = model.transformer.to(device), model.tokenizer.to(device)
        text = read(model.text_encoder, scenes, device)
        pixels = sizes.pixels(model.config.tokenizer.patch_size)
        how = plan(model.sampling, len(sizes))
        return DemoPictures(
            judge, transformer, tokenizer, model.text_encoder, scenes, seeds, text, sizes, how, pixels
        )  # fmt: skip

    def draw(self) -> list[Tensor]:
        """The bits of all pictures."""
        return draw_bits(self.transformer, self.text, self.sizes, self.how, self.seeds).bits

    @torch.inference_mode()
    def images(self, bits: Sequence[Tensor]) -> Tensor:
        """Pictures (B, 3, height, width) uint8 of bits, in the CPU's memory."""
        total = pyramid.decode(bits, self.sizes)
        return to_uint8(torch.cat([self.tokenizer.decode(one).cpu() for one in total.split(1)]))

    def shares(self, bits: Sequence[Tensor], asked: Sequence[world.Scene] | None = None) -> dict[str, float]:
        """Shares of pictures whose class, colour, place and all three are as asked for: by their prompts, or others."""
        return Score.of(self.judge, self.images(bits), list(asked or self.scenes)).shares()


@torch.inference_mode()
def read(encoder: TextEncoder, scenes: Sequence[world.Scene], device: str = "cpu") -> TextFeatures:
    """Text features of scenes' prompts."""
    text = encoder.encode([str(scene) for scene in scenes])
    return TextFeatures(text.features.to(device), text.lengths)
