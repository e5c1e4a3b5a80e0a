"""Going on from a picture: the options that follow from it, and its bits.

Its bits are those it carries, else those its recipe draws again to the last pixel, else its pixels are tokenized, which
loses what the tokenizer cannot show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data import to_tensor
from bitgen_cli.engine.device import give_back
from bitgen_cli.engine.editing import Given
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.errors import BitgenError, InputError, UsageError
from bitgen_cli.report import Report, Silent
from bitgen_cli.runs.carried_bits import unpacked
from bitgen_cli.runs.drawing import Picture, Setting
from bitgen_cli.runs.jobs import Job, Remembered, SampleOptions, jobs_of, where_drawn
from bitgen_cli.runs.original import (
    Edit,
    FoundBits,
    forgetting,
    read_mask,
    read_original,
    require_prompt,
)
from bitgen_cli.runs.recipe_file import Recipe
from bitgen_cli.runs.reproduce import recalled


def load_original(options: SampleOptions, recipe: Recipe | None, report: Report) -> SampleOptions:
    """The options with the picture they go on from, and with its recipe's values for all that was left open but a seed.

    Args:
        options: of the command line, with those of the recipe that it names.
        recipe: that one; the original's gives nothing then.
        report: gets notices about what cannot be as it was.

    Raises:
        InputError: the picture or the mask cannot be read.
        UsageError: options that do not go together, or a model or subject that the user has not by that name.
    """
    if options.original is None:
        if recipe is not None and recipe.original is not None:
            raise UsageError(
                f"the recipe's picture was made of another one, {recipe.original.name[:60]!r}",
                "--from FILE says where it is",
            )
        for flag, value in (("--mask", options.mask), ("--keep-scales", options.keep_scales)):
            if value is not None:
                raise UsageError(f"{flag} says what of a picture stays", "--from PICTURE says of which")
        return options
    original = read_original(Path(options.original))
    require_prompt(original, bool(options.prompts or options.prompts_file))
    mask = None if options.mask is None else read_mask(options.mask, original)
    edit = Edit(original, mask, options.keep_scales or 0)
    if recipe is None and original.recipe is not None:
        seed = options.seed
        options = replace(recalled(options, forgetting(original.recipe), report), seed=seed)
    elif recipe is None:
        options = replace(options, remembered=Remembered(None, original.image.height / original.image.width))
    return replace(options, edit=edit)


def job_again(job: Job, setting: Setting, options: SampleOptions) -> Job | None:
    """The job that draws the original of another one again, or None where that cannot be."""
    assert job.edit is not None
    original = job.edit.original
    recipe = original.recipe
    if recipe is None or job.kind in original.found or recipe.original is not None:
        return None
    if any(recipe.fingerprints.get(part) != found for part, found in setting.model.fingerprints.items()):
        return None
    try:
        again = recalled(SampleOptions(model=options.model, device=options.device), recipe, Silent())
        (found,) = jobs_of(again, setting.model, setting.text.reader, setting.known)
    except BitgenError:
        return None
    return found if found.kind == job.kind else None


def take_carried(job: Job, setting: Setting, report: Report) -> None:
    """Takes the bits that the original carries, where they are this tokenizer's."""
    assert job.edit is not None
    original = job.edit.original
    if original.carried is None or original.recipe is None or job.kind in original.found:
        return
    size = job.schedule.pixels(setting.model.config.tokenizer.patch_size)
    if original.recipe.fingerprints.get("tokenizer") != setting.model.fingerprints["tokenizer"]:
        return
    if (original.image.height, original.image.width) != size or original.recipe.bits != job.bits:
        return
    try:
        bits = unpacked(original.carried, original.image, job.schedule, job.bits)
        original.found[job.kind] = FoundBits(bits, "carried")
    except InputError as error:
        report.notice(f"the bits that {original.file} carries are left alone: {error}")


def take_drawn(job: Job, again: Picture, report: Report) -> None:
    """Takes the bits of an original that was drawn again, where it is the same to the last pixel."""
    assert job.edit is not None
    original = job.edit.original
    if np.array_equal(np.asarray(original.image), np.asarray(again.image)):
        original.found[job.kind] = FoundBits([grid[None] for grid in again.frames.bits], "drawn again")
    else:
        report.notice(f"{original.file} cannot be drawn again to the last pixel by its recipe")


@torch.inference_mode()
def tokenize_original(job: Job, setting: Setting, report: Report) -> None:
    """Makes bits of the original's pixels."""
    assert job.edit is not None
    original = job.edit.original
    height, width = job.schedule.pixels(setting.model.config.tokenizer.patch_size)
    tokenizer = load_model(setting.model.folder, device=setting.device, parts=("tokenizer",)).tokenizer
    assert tokenizer is not None
    pixels = to_tensor(original.image, (height, width))
    latent = Codec(tokenizer, job.bits, setting.device, setting.dtype).latent(pixels[None]).cpu()
    bits, _ = pyramid.encode(latent, job.schedule)
    original.found[job.kind] = FoundBits(bits, "tokenized", latent)
    report.notice(f"{original.file} is tokenized at {width}x{height}: what the tokenizer cannot show is lost")
    del tokenizer
    give_back(setting.device)


def given_of(job: Job, pictures: int, setting: Setting) -> Given | None:
    """What is given of a batch of pictures that go on from one; None where they do not."""
    if job.edit is None:
        return None
    found = job.edit.original.found[job.kind]

    def each(grid: Tensor) -> Tensor:
        return grid.to(setting.device).expand(pictures, -1, -1, -1)

    where = where_drawn(job, setting.model.config.tokenizer.patch_size)
    return Given(
        [each(grid) for grid in found.bits],
        [grid.to(setting.device) for grid in where],
        None if found.latent is None else each(found.latent),
    )

