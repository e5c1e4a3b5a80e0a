"""What of a call is still to be drawn: the pictures that no manifest lists as done, and the names that they keep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Report
from bitgen_cli.runs.drawing import Setting
from bitgen_cli.runs.jobs import STDOUT, Job, SampleOptions, jobs_of
from bitgen_cli.runs.manifest import Key, Manifest
from bitgen_cli.runs.output import check_output, named_file, require_free
from bitgen_cli.runs.prompt_file import Failure, Request
from bitgen_cli.runs.sample_result import SampledPicture
from bitgen_cli.runs.scale_pictures import files_of


@dataclass(frozen=True)
class Planned:
    """A picture to draw.

    Attributes:
        job: what.
        index: among all that were asked for, the done ones too.
        key: in the manifest; None for a prompt that was typed.
    """

    job: Job
    index: int
    key: Key | None = None


@dataclass
class Done:
    """What has become of a call so far; pictures by their index.

    Attributes:
        images: what is drawn, for --grid.
        there: where those of --grid lie that were drawn by an earlier call.
        sizes: (h, w) of all of them in pixels.
    """

    pictures: dict[int, SampledPicture] = field(default_factory=dict)
    images: dict[int, Image.Image] = field(default_factory=dict)
    there: dict[int, Path] = field(default_factory=dict)
    sizes: set[tuple[int, int]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    kept: int = 0
    png: bytes | None = None


@dataclass(frozen=True)
class Call:
    """What the steps of one call share.

    Attributes:
        options: what was asked for.
        setting: what pictures are drawn with.
        manifest: of a prompt file whose pictures are written to disk.
        done: what has become of it.
        report: gets bars and notices.
        on_picture: is called with each picture as soon as it is written.
    """

    options: SampleOptions
    setting: Setting
    manifest: Manifest | None
    done: Done
    report: Report
    on_picture: Callable[[SampledPicture], None]


def plan(requests: Sequence[Request], call: Call) -> Iterator[Planned]:
    """The pictures that are not there yet; lines that cannot be drawn become failures."""
    setting, manifest, done = call.setting, call.manifest, call.done
    for request in requests:
        own = request.options
        try:
            if own.output is not None and own.output != call.options.output:
                check_output(own.output, own.num_images)
            jobs = jobs_of(own, setting.model, setting.text.reader, setting.known)
            keys = [None] * len(jobs) if manifest is None or not request.line else _keys(request, jobs, setting)
            if manifest is not None:
                jobs = _with_known_seeds(jobs, keys, manifest)
            done_already = [key is not None and manifest is not None and manifest.is_done(key) for key in keys]
            for key, is_done in zip(keys, done_already, strict=True):
                if not is_done:
                    _take_name(own.output, key, call)
        except (UsageError, InputError) as error:
            if not request.line:
                raise
            done.failures.append(Failure(request.line, str(error)))
            continue
        done.kept += sum(done_already)
        done.sizes.add(jobs[0].schedule.pixels(setting.model.config.tokenizer.patch_size))
        for number, (job, key) in enumerate(zip(jobs, keys, strict=True)):
            index = request.first + number
            if not done_already[number]:
                yield Planned(job, index, key)
            elif manifest is not None and key is not None and (listed := manifest.find(key)) is not None:
                done.there[index] = listed.path


def _take_name(output: str | None, key: Key | None, call: Call) -> None:
    """Keeps the files of a picture for it, where its name is known already.

    Raises:
        UsageError: they are there, another line's, or the manifest. What a killed job has written is the picture's own.
    """
    listed = None if key is None or call.manifest is None else call.manifest.find(key)
    path = named_file(output) if listed is None else listed.path
    if path is None or output == STDOUT:
        return
    files = files_of(path, call.options.save_scales)
    for file in files:
        if call.manifest is not None and file.resolve() == call.manifest.file.resolve():
            raise UsageError(f"{file} lists the pictures of the job", "give the picture another name")
        if listed is None or file != listed.scales:
            require_free(file, overwrite=call.options.overwrite)
        if file in call.setting.taken:
            raise UsageError(f"{file} is the output of another line")
    call.setting.taken.update(files)


def _keys(request: Request, jobs: Sequence[Job], setting: Setting) -> list[Key | None]:
    """Of the pictures of a line, by all that they are drawn by but a seed that was drawn at random."""
    job = jobs[0]
    content: list[Any] = [
        request.text,
        request.options.seed,
        job.negative,
        job.sampling.model_dump(mode="json"),
        [job.schedule.ratio, job.schedule.sizes],
        job.bits,
        job.output,
        [[worn.subject.sha256, worn.scale] for worn in job.subjects],
        sorted(setting.model.fingerprints.items()),
        [str(setting.dtype), setting.precision.name],
    ]
    if (edit := job.edit) is not None:
        content.append([edit.original.sha256, None if edit.mask is None else edit.mask.facts, edit.keep_scales])
    of = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return [Key(request.line, of, number) for number in range(len(jobs))]


def _with_known_seeds(jobs: list[Job], keys: Sequence[Key | None], manifest: Manifest) -> list[Job]:
    """The pictures of a line by the seeds that were drawn for it when it was begun."""
    for number, key in enumerate(keys):
        listed = None if key is None else manifest.find(key)
        if listed is not None:
            return [replace(job, seed=listed.seed - number + k) for k, job in enumerate(jobs)]
    return jobs
