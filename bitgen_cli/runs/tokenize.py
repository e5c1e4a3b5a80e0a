"""`bitgen tokenize`: pictures to a token store, by one process or by several."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.active_bits import bits_in_use
from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data_report import FILE, BadPicture, DataReport, announce, count_captions, data_report, read_bad
from bitgen_cli.engine.device import keep_freed_memory, pick_device, pick_dtype
from bitgen_cli.engine.model_folder import TEXT_FOLDER, Model, load_model, read_model_config
from bitgen_cli.engine.scales import Schedule, buckets, nearest, schedule
from bitgen_cli.engine.sources import PictureSource, open_source
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_format import Manifest, StoredPart, StoredRow, is_empty, read_rows
from bitgen_cli.engine.store_parts import join, require_division
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.engine.vocabulary import find_vocabulary
from bitgen_cli.engine.weight_files import TOKENIZER
from bitgen_cli.errors import Interrupted, ResourceError, UsageError
from bitgen_cli.files import only_writer, write_json
from bitgen_cli.place import place
from bitgen_cli.report import Report
from bitgen_cli.runs.encoding import Reader, fill
from bitgen_cli.runs.models import provide_model
from bitgen_cli.runs.reconstruct import reconstruct
from bitgen_cli.runs.text_features import add_text_features, find_text


@dataclass(frozen=True)
class TokenizeOptions:
    """What to tokenize and how.

    Attributes:
        data: what `open_source` takes: a folder of pictures, a listing, tars, `world:N[:SEED][:flip]`.
        out: folder of the token store; an unfinished one is continued.
        model: model folder, run folder or `demo`.
        batch_size: pictures encoded at once.
        latents: also keep the latents, which exact self-correction training needs.
        reconstruct: pictures, evenly spaced, that are decoded again and compared; 0 is none.
        resolution: pixel budget of a published schedule; None takes the model's.
        bits: bits per latent position; None takes the most that the model is used with.
        device, dtype: where and in which number type to encode; `auto` chooses.
        workers: processes that read pictures ahead; 0 reads in this one.
        aspects: shapes W:H that pictures are cropped to, the nearest one each; empty is all of the model's.
        caption_key: field that holds the captions; `none` reads none.
        image_root: where listed pictures are, if not beside their listing.
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
    bits: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    workers: int = 0
    aspects: tuple[str, ...] = ()
    caption_key: str | None = None
    image_root: Path | None = None
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
        without_caption: of these, without a caption.
        bad: pictures skipped by this run.
        ratios: what one picture takes, per aspect ratio.
        text_features: whether there are text features of all captions.
        bytes_per_image: of the shards, captions and text features included.
        bits_per_image: mean over the pictures.
        psnr: mean of the reconstructions in dB; None where none were asked for.
        ssim: mean of the reconstructions; None where none were asked for.
        seconds: reading, encoding and writing.
        images_per_second: `added` per second.
        report: on the data; also in the store, as data_report.json.
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
    report: DataReport

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "out": str(self.out)}


def tokenize(options: TokenizeOptions, report: Report) -> TokenizeResult:
    """Encodes the pictures of a source into a token store, going on where an earlier run stopped.

    Raises:
        InputError: the data, the model or the store cannot be used, another process writes to it, or more than 1 % of
            the pictures are unreadable.
        UsageError: the resolution or the number of bits is not one of the model's, there is no such part, or its text
            encoder is not fixed.
        ResourceError: no such device, or no space left; whole shards are safe.
        Interrupted: stopped by the user; whole shards are safe.
    """
    share = _share(options.shard)
    device = _pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    model_folder = provide_model(options.model, report, (TOKENIZER,))
    bits = bits_in_use(read_model_config(model_folder)[0].tokenizer, options.bits)
    model = load_model(model_folder, device=device, parts=("tokenizer",))
    assert model.tokenizer is not None
    codec = Codec(model.tokenizer, bits, device, pick_dtype(options.dtype, device))
    schedules = _schedules(model.config, options.resolution, options.aspects)
    pixels = {ratio: entry.pixels(model.config.tokenizer.patch_size) for ratio, entry in schedules.items()}
    square = pixels[nearest(1.0, tuple(pixels))]
    source = open_source(options.data, max(square), caption_key=options.caption_key, image_root=options.image_root)
    announce(source, options.data, report)
    part = None if share is None else StoredPart(number=share[0], of=share[1], total=len(source))
    require_division(options.out, None if part is None else part.of)
    text = find_text(model.config, report) if options.text_features else None
    folder = options.out if part is None else options.out / part.name
    is_empty(folder)
    with only_writer(folder):
        writer = StoreWriter(
            folder,
            tokenizer=model.fingerprints["tokenizer"],
            source=source.name,
            bits=bits,
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
                reader = Reader(source, pending, pixels)
                bad = fill(
                    writer, reader, codec, schedules, report, batch_size=options.batch_size, workers=options.workers
                )
            writer.flush()
            seconds = time.perf_counter() - started
            if text is not None:
                add_text_features(
                    writer, model.config, text, device, codec.dtype, report, batch_size=options.batch_size
                )
            rows = _rows(folder, writer.manifest)
            told = _report(rows, bad, source, pixels, model)
            write_json(folder / FILE, told.to_json())
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
    per_ratio = _per_ratio(manifest)
    return TokenizeResult(
        out=options.out,
        part=None if part is None else f"{part.number}/{part.of}",
        missing=[] if part is None else _join(options.out, part, source, pixels, model, report),
        count=manifest.count,
        added=added,
        without_caption=sum(not row.captions for row in rows),
        bad=bad,
        ratios=per_ratio,
        text_features=manifest.has_text,
        bytes_per_image=manifest.bytes / max(1, manifest.count),
        bits_per_image=sum(entry.count * entry.bits for entry in per_ratio) / max(1, manifest.count),
        psnr=None if quality is None else quality[0],
        ssim=None if quality is None else quality[1],
        seconds=seconds,
        images_per_second=added / seconds if added else 0.0,
        report=told,
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


def _join(
    out: Path,
    part: StoredPart,
    source: PictureSource,
    pixels: Mapping[float, tuple[int, int]],
    model: Model,
    report: Report,
) -> list[str]:
    """Joins the parts of a store if all are complete, with a report on all pictures; what is missing, in words."""

    def tell(manifest: Manifest) -> None:
        names = [part.model_copy(update={"number": number}).name for number in range(1, part.of + 1)]
        bad = [entry for name in names for entry in read_bad(out / name / FILE)]
        write_json(out / FILE, _report(_rows(out, manifest), bad, source, pixels, model).to_json())

    with only_writer(out, wait=True):
        missing = join(out, part.of, before=tell)
    if missing:
        report.notice(f"{out} can be used when all parts are there: {'; '.join(missing)}")
    return missing


def _rows(folder: Path, manifest: Manifest) -> list[StoredRow]:
    """What is kept of all pictures besides their bits."""
    return [row for shard in manifest.shards for row in read_rows(folder, shard)]


def _report(
    rows: Sequence[StoredRow],
    bad: Sequence[BadPicture],
    source: PictureSource,
    pixels: Mapping[float, tuple[int, int]],
    model: Model,
) -> DataReport:
    """The report on the pictures in the store and on those that were skipped."""
    own = model.folder / TEXT_FOLDER
    text = str(own) if own.is_dir() else model.config.text_encoder.source
    limit = model.config.transformer.text_length
    keys = [row.key for row in rows]
    vocabulary = None if text == "new" else find_vocabulary(text)
    captions = count_captions(keys, [row.captions for row in rows], limit, vocabulary)
    return data_report(source, keys, [row.size for row in rows], bad, pixels, captions)


def _schedules(config: ModelConfig, resolution: str | None, aspects: tuple[str, ...]) -> dict[float, Schedule]:
    """The schedule of each aspect ratio of a model that is used."""
    patchify = config.transformer.patchify
    return {
        ratio: schedule(config.scales, patchify=patchify, ratio=ratio, resolution=resolution)
        for ratio in buckets(config.scales, aspects)
    }


def _per_ratio(manifest: Manifest) -> list[RatioCount]:
    """What the pictures of each aspect ratio take, ratios ascending."""
    entries = []
    for ratio in sorted({shard.ratio for shard in manifest.shards}):
        positions = manifest.schedule(ratio).positions
        count = sum(shard.count for shard in manifest.shards if shard.ratio == ratio)
        entries.append(RatioCount(ratio, count, positions, positions * manifest.bits_per_position))
    return entries
