"""`bitgen gen-priors`: pictures of a class, made by the base model, which keep the class while a subject is learned.

Picture k is a function of the base model, the class, the templates, the sampling and seed + k alone, so a folder that
is asked for again is topped up or mended, and otherwise never changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bitgen_cli.engine.model_folder import Model, fingerprint, read_model_config
from bitgen_cli.errors import Interrupted
from bitgen_cli.report import Report
from bitgen_cli.runs.class_words import with_article
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.output import Carried, write_picture
from bitgen_cli.runs.prior_artist import Artist, ready_artist
from bitgen_cli.runs.prior_folder import (
    Made,
    Manifest,
    Prior,
    all_priors,
    bad_files,
    default_folder,
    in_words,
    list_pictures,
    open_manifest,
    own_pictures,
    staging,
)
from bitgen_cli.runs.prior_options import PriorOptions, wanted_pictures


@dataclass(frozen=True)
class PriorResult:
    """What a folder holds now, and what this call did.

    Attributes:
        folder: of the pictures.
        class_word: what they show.
        made: pictures drawn by this call.
        remade: names of those among them that had been made before, but were missing or damaged.
        reused: pictures the base model had made before.
        own: pictures of the user.
        pictures: all of them, the user's own last.
        seconds: it took.
    """

    folder: Path
    class_word: str
    made: int
    remade: tuple[str, ...]
    reused: int
    own: int
    pictures: tuple[Prior, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "folder": str(self.folder),
            "class": self.class_word,
            "count": len(self.pictures),
            "made": self.made,
            "remade": list(self.remade),
            "reused": self.reused,
            "own": self.own,
            "pictures": [{"path": str(prior.file), "prompt": prior.prompt} for prior in self.pictures],
            "seconds": round(self.seconds, 3),
        }


def gen_priors(options: PriorOptions, report: Report, model: Model | None = None) -> PriorResult:
    """Makes the pictures that are missing.

    Args:
        options: which.
        report: gets a bar over the missing pictures, and notices of what is reused or made again.
        model: the base model, when it is loaded already, where and in the type it is to draw in; None loads it if there
            is anything to draw.

    Raises:
        UsageError: options that do not fit the model or each other, or a folder with pictures of another base model,
            class, templates, seed or sampling.
        InputError: the model or the folder cannot be read or written.
        ResourceError: no such device, or no space left; the pictures made so far are kept.
        Interrupted: stopped by the user; the pictures made so far are kept.
    """
    started = time.perf_counter()
    base = _without_weights(options.model, report) if model is None else model
    wanted, scales = wanted_pictures(options, base)
    place = default_folder(wanted) if options.output is None else options.output
    place = place.expanduser()
    known = open_manifest(place, wanted)
    own, unreadable = own_pictures(place, known)
    for reason in unreadable:
        report.warning(f"not counted: {reason}")
    bad = bad_files(place, known)
    due = [_Due(made.file, made.prompt, made.seed) for made in known.pictures if made.file in bad]
    due += _new(place, known, options.count - len(own) - len(known.pictures))
    reused = len(known.pictures) - len(bad)
    _tell(place, report, reused=reused, own=len(own), bad=bad, done=not due)
    if due:
        artist = ready_artist(options, base, known.sampling, scales, [one.prompt for one in due], report)
        known = _make(place, known, due, artist, report, before=reused + len(own))
    return PriorResult(
        folder=place,
        class_word=wanted.class_word,
        made=len(due),
        remade=tuple(bad),
        reused=reused,
        own=len(own),
        pictures=tuple(all_priors(place, known, own, wanted.class_word)),
        seconds=time.perf_counter() - started,
    )


def _without_weights(name: str, report: Report) -> Model:
    folder = provide_model(name, report)
    return Model(folder, *read_model_config(folder))


def _tell(place: Path, report: Report, *, reused: int, own: int, bad: Mapping[str, str], done: bool) -> None:
    """Says what is there already and what is made again."""
    pictures = "class picture" if reused + own == 1 else "class pictures"
    yours = f", {own} of them your own" if own else ""
    there = f"{place} holds {reused + own} {pictures}{yours}"
    if done:
        report.notice(f"nothing to make: {there}")
    elif reused + own:
        report.notice(f"reused: {there}")
    if bad:
        report.notice(f"made again: {in_words(bad)}")


@dataclass(frozen=True)
class _Due:
    """A picture to make."""

    file: str
    prompt: str
    seed: int


def _new(place: Path, known: Manifest, count: int) -> list[_Due]:
    """The next `count` pictures that are not listed, under names that nothing in the folder has."""
    listed = {picture.seed for picture in known.pictures}
    found: list[_Due] = []
    number = 0
    while len(found) < count:
        seed = known.seed + number
        if seed not in listed:
            prompt = with_article(known.templates[number % len(known.templates)], known.class_word)
            found.append(_Due(_free_name(place, known, number), prompt, seed))
        number += 1
    return found


def _free_name(place: Path, known: Manifest, number: int) -> str:
    name, copy = f"{number:04d}.png", 1
    while name in known.files or os.path.lexists(place / name):
        copy += 1
        name = f"{number:04d}-{copy}.png"
    return name


def _make(
    place: Path,
    known: Manifest,
    due: Sequence[_Due],
    artist: Artist,
    report: Report,
    *,
    before: int,
) -> Manifest:
    """Draws and writes pictures, and returns the manifest that lists them too.

    Args:
        before: pictures that are there already, for the message when the user stops.
    """
    done = 0
    try:
        known = list_pictures(place, known, [])  # a folder that cannot be written to is told before anything is drawn
        with report.task(f"pictures of {known.class_word}", len(due)) as task:
            for start in range(0, len(due), artist.batch_size):
                some = due[start : start + artist.batch_size]
                images = artist.draw([one.prompt for one in some], [one.seed for one in some], task)
                known = _write(place, known, some, images, artist)
                done += len(some)
                task.advance(len(some))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {place} holds {before + done} of {before + len(due)} class pictures",
            "the same command goes on from there",
        ) from None
    return known


def _write(
    place: Path, known: Manifest, some: Sequence[_Due], images: Sequence[Image.Image], artist: Artist
) -> Manifest:
    """Writes a batch, and returns the manifest that lists it too.

    The manifest goes first: stopped in between, a listed picture is missing and made again. The other way round, a
    picture of ours that is not listed would pass for the user's own.
    """
    with staging(place) as folder:
        made = []
        for one, image in zip(some, images, strict=True):
            file = folder / one.file
            write_picture(file, image, Carried(artist.recipe(one.prompt, one.seed, image)))
            made.append(Made(file=one.file, prompt=one.prompt, seed=one.seed, sha256=fingerprint(file)))
        known = list_pictures(place, known, made)
        for one in some:
            (folder / one.file).replace(place / one.file)
    return known
