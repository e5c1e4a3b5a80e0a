"""A model that draws class pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine.data import to_pil, to_uint8
from bitgen_cli.engine.device import keep_freed_memory, pick_device
from bitgen_cli.engine.memory import parameters
from bitgen_cli.engine.model_folder import TRANSFORMER_FILE, Model, load_model
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.text_precision import pick_text_precision
from bitgen_cli.engine.transformer import TextFeatures
from bitgen_cli.errors import InputError
from bitgen_cli.report import Report, Task
from bitgen_cli.runs.drawing import drawing_dtype
from bitgen_cli.runs.output import base_recipe
from bitgen_cli.runs.pace import Pace
from bitgen_cli.runs.placement import AT_ONCE, Wanted, place
from bitgen_cli.runs.prior_options import PriorOptions, base_name
from bitgen_cli.runs.prompts import Prompt, find_text_model, tell_cut, text_features


@dataclass(frozen=True)
class Artist:
    """A loaded model, and how it draws.

    Attributes:
        model: with its weights.
        name: what recipes call it.
        features: text features (T, width) of its prompts.
        sampling, scales: of all pictures.
        batch_size: pictures drawn at once.
        in_bands: whether they are decoded in bands of rows.
    """

    model: Model
    name: str
    features: Mapping[str, Tensor]
    sampling: SamplingConfig
    scales: Schedule
    batch_size: int
    in_bands: bool = False

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], task: Task) -> list[Image.Image]:
        """One picture of each prompt and seed.

        The bits are predicted together and decoded one by one: a decoder rounds otherwise in a batch of another size,
        and that shows in the pixels, while it decides no bit.
        """
        transformer, tokenizer = self.model.transformer, self.model.tokenizer
        assert transformer is not None
        assert tokenizer is not None
        rows = [self.features[prompt].to(transformer.device, transformer.dtype) for prompt in prompts]
        drawn = draw_bits(
            transformer,
            TextFeatures.from_rows(rows),
            self.scales,
            plan(self.sampling, len(self.scales)),
            seeds,
            on_scale=Pace(task, self.scales, len(seeds)),
        )
        total = drawn.total.to(next(tokenizer.parameters()).dtype)
        images = [tokenizer.decode(one, in_bands=self.in_bands) for one in torch.split(total, 1)]
        return [to_pil(to_uint8(image[0])) for image in images]

    def recipe(self, prompt: str, seed: int, image: Image.Image) -> dict[str, Any]:
        """Everything the picture can be drawn again from, as `bitgen sample` writes it."""
        return {
            **base_recipe(prompt, None, seed, self.name, self.model),
            "subjects": [],
            **self.sampling.model_dump(mode="json"),
            "width": image.width,
            "height": image.height,
            "ratio": self.scales.ratio,
            "resolution": None,
            "bits": self.model.config.tokenizer.most_bits,
        }


def ready_artist(
    options: PriorOptions,
    base: Model,
    sampling: SamplingConfig,
    scales: Schedule,
    prompts: Sequence[str],
    report: Report,
) -> Artist:
    """A model that is ready to draw these prompts; says which of them are too long.

    Args:
        base: with its weights where they are loaded already.

    Raises:
        InputError: it has no transformer or text encoder.
        ResourceError: it does not fit.
    """
    pictures, prompts, name = len(prompts), list(dict.fromkeys(prompts)), base_name(options, base)
    batch_size, in_bands = options.batch_size or AT_ONCE, False
    if base.tokenizer is None and (base.folder / TRANSFORMER_FILE).is_file():
        device = pick_device(options.device)
        dtype = drawing_dtype(options.dtype, base.folder, device)
        text, precision = find_text_model(base, report), pick_text_precision("auto", dtype, device)
        tell_cut(prompts, text.reader, report)
        tokens = max(map(len, text.reader.tokenise(prompts)))
        counts = parameters(base.config)
        wanted = Wanted(base.config, counts, [scales], pictures, options.batch_size, dtype.itemsize, tokens)
        placement = place(wanted, "auto", device)
        keep_freed_memory(placement.total)
        batch_size, in_bands = placement.batch_size, placement.in_bands
        rows = text_features(
            text, [Prompt(prompt) for prompt in prompts], precision, device, report, cached=options.text_cache
        )
        parts, waiting = ("tokenizer", "transformer"), placement.waiting
        model = load_model(base.folder, device=device, dtype=dtype, parts=parts, waiting=waiting)
        if (told := placement.told()) is not None:
            report.notice(told)
    elif base.transformer is None or base.text_encoder is None or base.tokenizer is None:
        raise InputError(f"the model {options.model} has no transformer and text encoder yet", "bitgen train makes one")
    else:
        model = base
        tell_cut(prompts, base.text_encoder, report)
        with torch.inference_mode():
            rows = base.text_encoder.encode_alone(prompts)
    return Artist(model, name, dict(zip(prompts, rows, strict=True)), sampling, scales, batch_size, in_bands)
