"""`bitgen sample`: prompts to pictures, each with the recipe to draw it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bitgen_cli.engine.device import keep_freed_memory
from bitgen_cli.errors import UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.drawing import Picture, Setting, batches, draw, features_of, load_painter, placement_of, setting_of
from bitgen_cli.runs.jobs import Job, SampleOptions, jobs_of, requested
from bitgen_cli.runs.output import check_output, path_of, recipe_of, write_grid, write_picture
from bitgen_cli.runs.prompts import tell_cut
from bitgen_cli.runs.reproduce import load_recipe, tell_differences


@dataclass(frozen=True)
class SampledPicture:
    """One picture that was written."""

    path: Path
    prompt: str
    seed: int
    recipe: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Its path and recipe."""
        return {"path": str(self.path), **self.recipe}


@dataclass(frozen=True)
class SampleResult:
    """Everything that was written.

    Attributes:
        pictures: in the order of the prompts.
        grid: all of them as one, when asked for.
        seconds: drawing and writing took, without loading.
    """

    pictures: list[SampledPicture]
    grid: Path | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "pictures": [picture.to_json() for picture in self.pictures],
            "grid": None if self.grid is None else str(self.grid),
            "seconds": round(self.seconds, 3),
        }


def sample(options: SampleOptions, report: Report) -> SampleResult:
    """Draws the pictures and writes them.

    Args:
        options: what and how.
        report: gets one bar over the pictures and notices about prompts that were cut.

    Raises:
        UsageError: no prompt, an empty prompt, options that do not fit the model or each other.
        InputError: the model or the prompt file cannot be read, the output cannot be written.
    """
    keep_freed_memory()
    options, recipe = load_recipe(options, report)
    requests = list(requested(options))
    if not requests:
        raise UsageError("no prompt", 'for example: bitgen sample "a red dog on the moon"')
    if not all(request.prompts[0].strip() for request in requests):
        raise UsageError("the prompt is empty", "say what to draw")
    setting = setting_of(options, report)
    jobs = [job for request in requests for job in jobs_of(request, setting.model, setting.text.reader, setting.known)]
    _tell_subjects(jobs, report)
    if recipe is not None:
        tell_differences(recipe, jobs, setting, report)
    if options.output is not None:
        check_output(options.output, len(jobs))
    tell_cut((job.prompt for job in jobs), setting.text.reader, report)
    placement = placement_of(jobs, setting, options)
    features = features_of(jobs, setting, options, report)
    painter = load_painter(setting, placement, options, report)
    setting = replace(setting, model=painter.model)
    started = time.perf_counter()
    pictures: dict[int, SampledPicture] = {}
    images: dict[int, Image.Image] = {}
    with report.task("drawing", len(jobs)) as task:
        for batch in batches(jobs, placement.batch_size):
            drawn = draw([jobs[i] for i in batch], [features[i] for i in batch], setting, painter, task)
            for index, picture in zip(batch, drawn, strict=True):
                pictures[index] = _write(picture, jobs[index], index, options, setting)
                if options.grid:
                    images[index] = picture.image
                task.advance()
    ordered = [pictures[i] for i in range(len(jobs))]
    _tell_refined([picture.recipe["refined"] for picture in ordered if "refined" in picture.recipe], report)
    sheet = write_grid([images[i] for i in range(len(jobs))], options, setting) if options.grid else None
    return SampleResult(ordered, sheet, time.perf_counter() - started)


def _write(picture: Picture, job: Job, index: int, options: SampleOptions, setting: Setting) -> SampledPicture:
    recipe = recipe_of(job, picture, setting)
    path = path_of(job, index, setting)
    write_picture(path, picture.image, recipe if options.metadata else None)
    return SampledPicture(path, job.prompt, job.seed, recipe)


def _tell_subjects(jobs: Sequence[Job], report: Report) -> None:
    """Says which subjects are drawn, each once."""
    drawn = {(worn.subject.file, worn.scale): worn.subject for job in jobs for worn in job.subjects}
    for (file, scale), subject in drawn.items():
        strength = "" if scale == 1 else f", scale {scale:g}"
        report.notice(f"{subject.token} is subject {subject.name}, a {subject.header.class_word}{strength}: {file}")


def _tell_refined(refined: Sequence[dict[str, Any]], report: Report) -> None:
    """Says what refinement did to all pictures together."""
    if not refined:
        return
    changed = sum(sum(one["bits_changed"]) for one in refined)
    before, after = (sum(one["log_likelihood"][at] for one in refined) / len(refined) for at in (0, 1))
    report.notice(f"refined: {changed} bits changed; log-likelihood of a coarse bit {before:.3f}, now {after:.3f}")
