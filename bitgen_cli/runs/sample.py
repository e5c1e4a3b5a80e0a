"""`bitgen sample`: prompts to pictures, each with the recipe to draw it again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bitgen_cli.engine.data import load_picture
from bitgen_cli.engine.device import give_back, pick_device
from bitgen_cli.engine.parallel import wait_for_others
from bitgen_cli.errors import BitgenError, InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.place import Place, place
from bitgen_cli.report import Report, Task
from bitgen_cli.runs.drawing import (
    Features,
    Painter,
    Picture,
    batches,
    draw,
    features_of,
    load_painter,
    placement_of,
    setting_of,
)
from bitgen_cli.runs.editing import load_original
from bitgen_cli.runs.jobs import STDOUT, Job, SampleOptions
from bitgen_cli.runs.manifest import Key, Manifest
from bitgen_cli.runs.original_bits import draw_again, given_of, jobs_again, tokenize_others
from bitgen_cli.runs.output import (
    Carried,
    carried_by,
    check_output,
    grid_path,
    named_file,
    output_folder,
    path_of,
    picture_bytes,
    recipe_of,
    require_free,
    write_grid,
    write_picture,
)
from bitgen_cli.runs.placement import Placement
from bitgen_cli.runs.planned import Call, Done, Planned, plan
from bitgen_cli.runs.prompt_file import Failure, Request, requested
from bitgen_cli.runs.prompts import tell_cut
from bitgen_cli.runs.reproduce import load_recipe, tell_differences
from bitgen_cli.runs.sample_result import SampledPicture, SampleResult
from bitgen_cli.runs.scale_pictures import check_format, files_of, scales_path, write_scales

AHEAD = 256
"""Pictures whose text features are in memory: the text encoder is loaded at most once for each so many."""


def sample(
    options: SampleOptions, report: Report, on_picture: Callable[[SampledPicture], None] = lambda _: None
) -> SampleResult:
    """Draws the pictures and writes them.

    The pictures of a prompt file are listed in a manifest, by which the same call goes on where another one was killed.
    Lines that cannot be drawn do not stop the others. Of several processes each draws a share of the lines.

    Args:
        options: what and how.
        report: gets one bar over the pictures and notices about prompts that were cut.
        on_picture: is called with each picture as soon as it is written.

    Raises:
        UsageError: no prompt, an empty prompt, options that do not fit the model or each other.
        InputError: the model or the prompt file cannot be read, the output cannot be written.
        ResourceError: not enough memory or disk.
        Interrupted: stopped by the user in a prompt file, or `on_picture` has nobody to tell; the same call goes on.
    """
    here = place()
    options, recipe = load_recipe(options, report)
    options = load_original(options, recipe, report)
    done = Done()
    requests, done.failures = requested(options, here)
    _check_whole(options, requests, bool(done.failures), here)
    if here.count > 1:
        options = replace(options, device=_own_device(options.device, here))
    setting = setting_of(options, report)
    manifest = None
    if options.prompts_file is not None and options.output != STDOUT:
        manifest = Manifest(output_folder(options.output), anew=options.overwrite and here.count == 1)
        setting.taken.add(manifest.file)
    call = Call(options, setting, manifest, done, report, on_picture)
    planned = list(plan(requests, call))
    if options.grid and len(done.sizes) > 1:
        raise UsageError("--grid needs pictures of one size", "draw the others in another call")
    jobs = [one.job for one in planned]
    _tell_subjects(jobs, report)
    if recipe is not None:
        tell_differences(recipe, jobs, setting, report)
    tell_cut((job.prompt for job in jobs), setting.text.reader, report)
    if done.kept:
        report.notice(f"{done.kept} pictures of {options.prompts_file} are there already")
    seconds = 0.0
    if planned:
        try:
            seconds = _draw(planned, call)
        except (KeyboardInterrupt, BrokenPipeError) as error:  # or nobody listens to the names any more
            if manifest is None:
                raise
            count = f"{len(done.pictures)} of {len(planned)} pictures"
            raise Interrupted(f"stopped after {count}", "the same command goes on") from error
    if here.count > 1:
        with report.task("waiting for the other processes", None):
            wait_for_others()
    _tell_refined([one.recipe["refined"] for one in done.pictures.values() if "refined" in one.recipe], report)
    return SampleResult(
        [done.pictures[index] for index in sorted(done.pictures)],
        _grid(call) if options.grid else None,
        seconds,
        done.kept,
        tuple(sorted(done.failures, key=lambda failure: failure.line)),
        None if manifest is None or not manifest.file.exists() else manifest.file,
        done.png,
    )


def _grid(call: Call) -> Path | None:
    """Writes all pictures as one, those of earlier calls too; where none is new and there is one already, nothing."""
    there, images = call.done.there, call.done.images
    if not (images or there) or (not images and grid_path(call.options).exists()):
        return None
    all_of_them = {index: load_picture(path) for index, path in there.items()} | images
    return write_grid([all_of_them[index] for index in sorted(all_of_them)], call.options, call.setting)


def _check_whole(options: SampleOptions, requests: Sequence[Request], failed: bool, here: Place) -> None:
    """Raises UsageError where options do not go together, before anything is looked for."""
    check_format(options.save_scales)
    if here.count > 1 and (options.prompts_file is None or options.prompts or options.grid or options.overwrite):
        raise UsageError(
            f"{here.count} processes share the lines of a prompt file",
            "give --prompts FILE alone, without --grid and --overwrite",
        )
    if not requests and not failed and here.count == 1:
        raise UsageError("no prompt", 'for example: bitgen sample "a red dog on the moon"')
    if options.output == STDOUT:
        wanted = sum(one.options.num_images for one in requests)
        elsewhere = options.grid or options.save_scales or any(one.options.output != STDOUT for one in requests)
        if wanted > 1 or here.count > 1 or elsewhere:
            raise UsageError("--output - writes one picture to stdout, and that alone", "a folder takes several")
    elif options.output is not None:
        count = sum(one.options.num_images for one in requests if one.options.output == options.output)
        check_output(options.output, count)
        named = named_file(options.output)
        if named is not None and options.prompts_file is None:
            for file in files_of(named, options.save_scales):
                require_free(file, overwrite=options.overwrite)


def _own_device(name: str, here: Place) -> str:
    """The GPU of this process where there are several of both."""
    if name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    own = f"cuda:{here.local_rank % torch.cuda.device_count()}"
    torch.cuda.set_device(pick_device(own))
    return own


def _draw(planned: Sequence[Planned], call: Call) -> float:
    """Draws and writes all pictures; returns the seconds it took."""
    options, setting, report = call.options, call.setting, call.report
    jobs = [one.job for one in planned]
    again = jobs_again(jobs, setting, options, report)
    placement = placement_of([*again, *jobs], setting, options)
    tokenize_others(jobs, again, setting, report)
    loaded: list[Painter] = []
    features = _prepare([*again, *jobs[:AHEAD]], call, placement, loaded)
    draw_again(again, features[: len(again)], jobs, setting, loaded[0], report)
    features = features[len(again) :]
    seconds = 0.0
    with report.task("drawing", len(planned)) as task:
        for start in range(0, len(planned), AHEAD):
            chunk = planned[start : start + AHEAD]
            if start:
                features = _prepare(jobs[start : start + AHEAD], call, placement, loaded)
            started = time.perf_counter()
            _draw_chunk(chunk, features, loaded[0], call, task)
            seconds += time.perf_counter() - started
    return seconds


def _prepare(jobs: Sequence[Job], call: Call, placement: Placement, loaded: list[Painter]) -> list[Features]:
    """Text features of jobs. Loads the model, once more where the text encoder has no room beside it."""
    options, setting, report = call.options, call.setting, call.report
    try:
        features = features_of(jobs, setting, options, report)
    except (ResourceError, torch.OutOfMemoryError):
        if not loaded:
            raise
        loaded.clear()
        give_back(setting.device)
        features = features_of(jobs, setting, options, report)
    if not loaded:
        loaded.append(load_painter(setting, placement, options, report))
    return features


def _draw_chunk(
    chunk: Sequence[Planned], features: Sequence[Features], painter: Painter, call: Call, task: Task
) -> None:
    """Draws pictures whose text features are there, and writes each batch when it is drawn."""
    call = replace(call, setting=replace(call.setting, model=painter.model))
    for batch in batches([one.job for one in chunk], painter.placement.batch_size):
        own = [chunk[i] for i in batch]
        given = given_of(own[0].job, len(own), call.setting)
        drawn = draw([one.job for one in own], [features[i] for i in batch], call.setting, painter, task, given)
        _write(own, drawn, call, task)


def _write(planned: Sequence[Planned], pictures: Sequence[Picture], call: Call, task: Task) -> None:
    """Names the pictures of a batch and writes them; of a prompt file they are listed first."""
    options, done = call.options, call.done
    recipes = [recipe_of(one.job, picture, call.setting) for one, picture in zip(planned, pictures, strict=True)]
    if options.output == STDOUT:
        (one,), (picture,), (recipe,) = planned, pictures, recipes
        done.png = picture_bytes(picture.image, carried_by(one.job, picture, recipe, options))
        done.pictures[one.index] = SampledPicture(Path(STDOUT), one.job.prompt, one.job.drawn_by, recipe)
        return
    paths = _names(planned, recipes, call)
    for one, picture, recipe, path in zip(planned, pictures, recipes, paths, strict=True):
        try:
            carried = carried_by(one.job, picture, recipe, options)
            scales = None if path is None else _write_files(path, picture, carried, options, task)
        except InputError as error:
            _failed(one, error, done)
            path = None
        task.advance()
        if path is None:
            continue
        done.pictures[one.index] = SampledPicture(path, one.job.prompt, one.job.drawn_by, recipe, scales)
        if options.grid:
            done.images[one.index] = picture.image
        call.on_picture(done.pictures[one.index])


def _failed(one: Planned, error: BitgenError, done: Done) -> None:
    """Keeps why a line of a prompt file could not be drawn; of a prompt that was typed it is raised."""
    if one.key is None:
        raise error
    done.failures.append(Failure(one.key.line, str(error)))


def _write_files(
    path: Path, picture: Picture, carried: Carried, options: SampleOptions, task: Task
) -> Path | None:
    """Writes a picture, and before it what it is after each scale; returns the file of that, where it is asked for."""

    def tell(number: int) -> None:
        task.status(f"decoding scale {number} of {len(picture.frames)}")
        task.advance(0)

    scales = scales_path(path, options.save_scales)
    if scales is not None:
        write_scales(scales, picture.frames, tell)
    write_picture(path, picture.image, carried)
    return scales


def _names(planned: Sequence[Planned], recipes: Sequence[dict[str, Any]], call: Call) -> list[Path | None]:
    """Where pictures go; None for those that another process draws, or whose name is not free any more."""
    paths: dict[int, Path | None] = {}
    listed: list[tuple[Key, dict[str, Any]]] = []
    names: list[Callable[[set[Path]], Path | None]] = []
    waiting: list[int] = []
    options, form = call.options, call.options.save_scales
    for number, (one, recipe) in enumerate(zip(planned, recipes, strict=True)):

        def name(taken: set[Path], one: Planned = one) -> Path | None:
            call.setting.taken.update(taken)
            try:
                return path_of(one.job, one.index, call.setting, overwrite=options.overwrite, save_scales=form)
            except UsageError as error:
                _failed(one, error, call.done)
                return None

        if call.manifest is None or one.key is None:
            paths[number] = name(set())
        else:
            listed.append((one.key, {"prompt": one.job.prompt, "seed": one.job.seed, "recipe": recipe}))
            names.append(name)
            waiting.append(number)
    if call.manifest is not None and listed:
        claimed = call.manifest.claim(listed, names, lambda path: scales_path(path, form))
        paths |= zip(waiting, claimed, strict=True)
    return [paths[number] for number in range(len(planned))]


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
    before = sum(one["log_likelihood"][0] for one in refined) / len(refined)
    gain = sum(one["log_likelihood_gain"] for one in refined) / len(refined)
    report.notice(f"refined: {changed} bits changed; log-likelihood of a bit {before:.3f}, now {before + gain:.3f}")
