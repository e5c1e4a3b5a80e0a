"""`bitgen tokenize`: pictures to a token store, by one process or by several."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.data import open_source
from bitgen_cli.engine.device import keep_freed_memory, pick_device, pick_dtype
from bitgen_cli.engine.model_folder import find_model, load_model
from bitgen_cli.engine.scales import Schedule, nearest_ratio, ratios, schedule
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_format import Manifest, StoredPart, is_empty, read_rows
from bitgen_cli.engine.store_parts import join, require_division
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.errors import Interrupted, ResourceError, UsageError
from bitgen_cli.files import only_writer
from bitgen_cli.place import place
from bitgen_cli.report import Report
from bitgen_cli.runs.encoding import BadPicture, Codec, Reader, fill
from bitgen_cli.runs.reconstruct import reconstruct
from bitgen_cli.runs.text_features import add_text_features, find_text


@dataclass(frozen=True)
class TokenizeOptions:
    """What to tokenize and how.

    Attributes:
        data: a folder of pictures, or `world:N[:SEED][:flip]`.
        out: folder of the token store; an unfinished one is continued.
        model: model folder, run folder or `demo`.
        batch_size: pictures encoded at once.
        latents: also keep the latents, which exact self-correction training needs.
        reconstruct: pictures, evenly spaced, that are decoded again and compared; 0 is none.
        resolution: pixel budget of a published schedule; None takes the model's.
        device, dtype: where and in which number type to encode; `auto` chooses.
        workers: processes that read pictures ahead; 0 reads in this one.
        shard: `i/n`: only the i-th of n parts of the store, which other processes may write at the same time; None is
            all, or what torchrun says.
        text_features: also keep what the model's text encoder makes of the captions.
    """

    data: str
    out: Path
    model: str = "demo"
    batch_size: int = 32
    latents: bool = True
    reconstruct: int = 0
    resolution: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    workers: int = 0
    shard: str | None = None
    text_features: bool = False


@dataclass(frozen=True)
class RatioCount:
    """The pictures of one aspect ratio.

    Attributes:
        ratio: height / width.
        count: pictures in the store.
        positions: L, positions of one picture.
        bits: bits of one picture.
    """

    ratio: float
    count: int
    positions: int
    bits: int


@dataclass(frozen=True)
class TokenizeResult:
    """What the store holds now and what this run did.

    Attributes:
        out: folder of the store.
        part: which part of it the numbers below are of, such as `2/4`; None when they are of all.
        missing: parts that are missing or unfinished, in words; the store can be used when there are none.
        count: pictures in it.
        added: of these, encoded by this run.
        without_caption: of these, with an empty caption.
        bad: pictures skipped by this run.
        ratios: what one picture takes, per aspect ratio.
        text_features: whether there are text features of all captions.
        bytes_per_image: of the shards, captions and text features included.
        bits_per_image: mean over the pictures.
        psnr: mean of the reconstructions in dB; None where none were asked for.
        ssim: mean of the reconstructions; None where none were asked for.
        seconds: reading, encoding and writing.
        images_per_second: `added` per second.
    """

    out: Path
    part: str | None
    missing: list[str]
    count: int
    added: int
    without_caption: int
    bad: list[BadPicture]
    ratios: list[RatioCount]
    text_features: bool
    bytes_per_image: float
    bits_per_image: float
    psnr: float | None
    ssim: float | None
    seconds: float
    images_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def tokenize(options: TokenizeOptions, report: Report) -> TokenizeResult:
    """Encodes the pictures of a source into a token store, going on where an earlier run stopped.

    Raises:
        InputError: the data, the model or the store cannot be used, another process writes to it, or more than 1 % of
            the pictures are unreadable.
        UsageError: the resolution is not one of the model's, there is no such part, or its text encoder is not fixed.
        ResourceError: no such device, or no space left; whole shards are safe.
        Interrupted: stopped by the user; whole shards are safe.
    """
    share = _share(options.shard)
    device = _pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(find_model(options.model), device=device, parts=("tokenizer",))
    assert model.tokenizer is not None
    codec = Codec(model.tokenizer, device, pick_dtype(options.dtype, device))
    schedules = _schedules(model.config, options.resolution)
    pixels = {ratio: entry.pixels(model.config.tokenizer.patch_size) for ratio, entry in schedules.items()}
    square = pixels[nearest_ratio(1.0, model.config.scales)]
    source = open_source(options.data, picture_size=max(square))
    part = None if share is None else StoredPart(number=share[0], of=share[1], total=len(source))
    require_division(options.out, None if part is None else part.of)
    text = find_text(model.config) if options.text_features else None
    folder = options.out if part is None else options.out / part.name
    is_empty(folder)
    with only_writer(folder):
        writer = StoreWriter(
            folder,
            tokenizer=model.fingerprints["tokenizer"],
            source=source.name,
            bits=model.config.tokenizer.bits,
            patch_size=model.config.tokenizer.patch_size,
            schedules=schedules,
            latents=options.latents,
            part=part,
        )
        if text is not None:
            writer.require_text(text)
        everything = range(len(source)) if part is None else part.range
        pending = [index for index in everything if source.key(index) not in writer.done_keys]
        stored_before, with_text_before = writer.manifest.count, writer.manifest.has_text
        started = time.perf_counter()
        bad: list[BadPicture] = []
        try:
            if pending:
                if stored_before:
                    report.notice(f"{folder} holds {stored_before} of {len(everything)} pictures; going on")
                reader = Reader(source, pending, model.config, pixels)
                bad = fill(
                    writer, reader, codec, schedules, report, batch_size=options.batch_size, workers=options.workers
                )
            writer.flush()
            seconds = time.perf_counter() - started
            if text is not None:
                add_text_features(
                    writer, model.config, text, device, codec.dtype, report, batch_size=options.batch_size
                )
            writer.finish()
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped: {folder} holds {writer.manifest.count} of {len(everything)} pictures",
                "the same command goes on from there",
            ) from None
        except ResourceError as error:
            safe = f"{writer.manifest.count} pictures are safe, the same command goes on from there"
            raise ResourceError(error.message, f"{error.hint}; {safe}" if error.hint else safe) from error
        quality = None
        if options.reconstruct and writer.manifest.count:
            quality = reconstruct(
                TokenStore.open(folder),
                source,
                codec,
                pixels,
                report,
                count=options.reconstruct,
                batch_size=options.batch_size,
            )
    manifest = writer.manifest
    added = manifest.count - stored_before
    if not added and manifest.has_text == with_text_before:
        report.notice(f"nothing to do: {folder} already holds all {stored_before} readable pictures")
    if manifest.text is not None and not manifest.has_text:
        report.notice(f"{folder} has text features of some pictures only; --text-features adds the others")
    without_caption = _without_caption(folder, manifest)
    if without_caption:
        report.notice(f"{without_caption} of {manifest.count} pictures have no caption")
    per_ratio = _per_ratio(manifest)
    return TokenizeResult(
        out=options.out,
        part=None if part is None else f"{part.number}/{part.of}",
        missing=[] if part is None else _join(options.out, part.of, report),
        count=manifest.count,
        added=added,
        without_caption=without_caption,
        bad=bad,
        ratios=per_ratio,
        text_features=manifest.has_text,
        bytes_per_image=manifest.bytes / max(1, manifest.count),
        bits_per_image=sum(entry.count * entry.bits for entry in per_ratio) / max(1, manifest.count),
        psnr=None if quality is None else quality[0],
        ssim=None if quality is None else quality[1],
        seconds=seconds,
        images_per_second=added / seconds if added else 0.0,
    )


def _share(shard: str | None) -> tuple[int, int] | None:
    """Number and count of the parts: as asked for, or as torchrun says; None is a store in one piece.

    Raises:
        UsageError: there is no such part, or torchrun says something else.
    """
    here = place()
    told = (here.rank + 1, here.count) if here.count > 1 else None
    if shard is None:
        return told
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {shard}: no part of a store", "I/N with I from 1 to N, for example 2/4")
    asked = int(match[1]), int(match[2])
    if told is not None and told != asked:
        raise UsageError(f"--shard {shard} in process {told[0]} of {told[1]}", "leave --shard out with torchrun")
    return asked


def _pick_device(name: str) -> torch.device:
    """The device of that name; processes of one machine take its GPUs in turn."""
    here = place()
    if name in ("auto", "cuda") and here.count > 1 and torch.cuda.is_available():
        return pick_device(f"cuda:{here.local_rank % torch.cuda.device_count()}")
    return pick_device(name)


def _join(out: Path, of: int, report: Report) -> list[str]:
    """Joins the parts of a store if all are complete; what is missing, in words."""
    with only_writer(out, wait=True):
        missing = join(out, of)
    if missing:
        report.notice(f"{out} can be used when all parts are there: {'; '.join(missing)}")
    return missing


def _without_caption(folder: Path, manifest: Manifest) -> int:
    """Pictures with an empty caption."""
    return sum(not caption for shard in manifest.shards for _, caption in read_rows(folder, shard))


def _schedules(config: ModelConfig, resolution: str | None) -> dict[float, Schedule]:
    """The schedule of each aspect ratio of a model."""
    patchify = config.transformer.patchify
    return {
        ratio: schedule(config.scales, patchify=patchify, ratio=ratio, resolution=resolution)
        for ratio in ratios(config.scales)
    }


def _per_ratio(manifest: Manifest) -> list[RatioCount]:
    """What the pictures of each aspect ratio take, ratios ascending."""
    entries = []
    for ratio in sorted({shard.ratio for shard in manifest.shards}):
        positions = manifest.schedule(ratio).positions
        count = sum(shard.count for shard in manifest.shards if shard.ratio == ratio)
        entries.append(RatioCount(ratio, count, positions, positions * manifest.bits_per_position))
    return entries
