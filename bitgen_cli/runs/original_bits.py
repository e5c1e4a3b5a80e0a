"""The bits of a picture that is gone on from: those it carries, else those its recipe draws again.

Else its pixels are tokenized, which loses what the tokenizer cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bitgen_cli.engine import pyramid
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data import cropped_share, to_tensor
from bitgen_cli.engine.device import give_back
from bitgen_cli.engine.editing import Given
from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.errors import BitgenError, InputError
from bitgen_cli.report import Report, Silent
from bitgen_cli.runs.carried_bits import unpacked
from bitgen_cli.runs.drawing import Features, Painter, Picture, Setting, draw
from bitgen_cli.runs.jobs import Job, SampleOptions, jobs_of, where_drawn
from bitgen_cli.runs.original import FoundBits
from bitgen_cli.runs.output import short_dtype
from bitgen_cli.runs.reproduce import recalled

ROUNDING = 2
"""Levels of 255 that a pixel may differ by when the same bits are decoded with another number of threads."""


def jobs_again(jobs: Sequence[Job], setting: Setting, options: SampleOptions, report: Report) -> list[Job]:
    """The jobs that draw originals again, as far as that may find their bits; those that they carry are taken."""
    again = []
    for job in _one_of_each_kind(jobs):
        take_carried(job, setting, report)
        if (found := job_again(job, setting, options)) is not None:
            again.append(found)
    return again


def draw_again(
    again: Sequence[Job],
    features: Sequence[Features],
    jobs: Sequence[Job],
    setting: Setting,
    painter: Painter,
    report: Report,
) -> None:
    """Draws originals again and takes their bits; what is not the same again is tokenized.

    Args:
        again: what `jobs_again` has found of `jobs`.
        features: text features of each.
        jobs: that go on from a picture, or from none.
        setting: with what.
        painter: draws.
        report: gets a bar, and notices.
    """
    for one, own in zip(again, features, strict=True):
        with report.task("drawing the original again", 1) as task:
            (picture,) = draw([one], [own], replace(setting, model=painter.model), painter, task)
        _take_drawn(next(job for job in jobs if job.kind == one.kind), picture, report)
    tokenize_others(jobs, (), setting, report)


def tokenize_others(jobs: Sequence[Job], again: Sequence[Job], setting: Setting, report: Report) -> None:
    """Makes bits of the pixels of originals whose bits are not known, and are not drawn again."""
    kinds = {job.kind for job in again}
    for job in _one_of_each_kind(jobs):
        if job.edit is not None and job.kind not in {*kinds, *job.edit.original.found}:
            _tokenize(job, setting, report)


def _one_of_each_kind(jobs: Sequence[Job]) -> Iterator[Job]:
    """Those that go on from a picture, one for each kind of bits."""
    yield from {job.kind: job for job in jobs if job.edit is not None}.values()


def job_again(job: Job, setting: Setting, options: SampleOptions) -> Job | None:
    """The job that draws the original of another one again, or None where that cannot be, or need not."""
    assert job.edit is not None
    original = job.edit.original
    recipe = original.recipe
    if recipe is None or job.kind in original.found or recipe.original is not None:
        return None
    if any(recipe.fingerprints.get(part) != found for part, found in setting.model.fingerprints.items()):
        return None
    numbers = short_dtype(setting.dtype), setting.precision.name
    if recipe.dtype is not None and (recipe.dtype, recipe.text_dtype or recipe.dtype) != numbers:
        return None
    try:
        again = recalled(SampleOptions(model=options.model, device=options.device), recipe, Silent())
        (found,) = jobs_of(again, setting.model, setting.text.reader, setting.known)
    except BitgenError:
        return None
    return found if found.kind == job.kind else None


def take_carried(job: Job, setting: Setting, report: Report) -> None:
    """Takes the bits that the original carries, where they are its own and this tokenizer's."""
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


def _take_drawn(job: Job, again: Picture, report: Report) -> None:
    """Takes the bits of an original that was drawn again, where it is the same but for the decoder's rounding."""
    assert job.edit is not None
    original = job.edit.original
    then, now = (np.asarray(image).astype(np.int16) for image in (original.image, again.image))
    if then.shape == now.shape and np.abs(then - now).max() <= ROUNDING:
        original.found[job.kind] = FoundBits([grid[None] for grid in again.frames.bits], "drawn again")
    else:
        report.notice(f"{original.file} cannot be drawn again by its recipe")


@torch.inference_mode()
def _tokenize(job: Job, setting: Setting, report: Report) -> None:
    """Makes bits of the original's pixels."""
    assert job.edit is not None
    original = job.edit.original
    height, width = job.schedule.pixels(setting.model.config.tokenizer.patch_size)
    pixels = to_tensor(original.image, (height, width))[None]
    try:
        latent = _latent(pixels, job.bits, setting, setting.device, setting.dtype)
    except torch.OutOfMemoryError:
        give_back(setting.device)
        latent = _latent(pixels, job.bits, setting, torch.device("cpu"), torch.float32)
    bits, _ = pyramid.encode(latent, job.schedule)
    original.found[job.kind] = FoundBits(bits, "tokenized", latent)
    lost = cropped_share(original.image.size, (height, width))
    cut = f" without the {min(lost, 0.99):.0%} of it that is cut off" if lost >= 0.01 else ""
    report.notice(f"{original.file} is tokenized at {width}x{height}{cut}: what the tokenizer cannot show is lost")


def _latent(pixels: Tensor, bits: int, setting: Setting, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, bits, H, W) float32 on the CPU of a picture (1, 3, h, w) uint8; the tokenizer is gone when it is there."""
    tokenizer = load_model(setting.model.folder, device=device, parts=("tokenizer",)).tokenizer
    assert tokenizer is not None
    latent = Codec(tokenizer, bits, device, dtype).latent(pixels).cpu()
    del tokenizer
    give_back(device)
    return latent


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
