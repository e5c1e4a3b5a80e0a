"""`bitgen tokenize`: pictures to a token store, and a look at what the tokenizer keeps of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import bits_in_use
from bitgen_cli.engine.data import to_float, to_pil, to_tensor, to_uint8
from bitgen_cli.engine.data_report import FILE, BadPicture, DataReport, announce, count_captions, data_report
from bitgen_cli.engine.device import pick_device, pick_dtype
from bitgen_cli.engine.losses import psnr, ssim
from bitgen_cli.engine.model_folder import TEXT_FOLDER, Model, find_model, load_model, read_model_config
from bitgen_cli.engine.scales import Schedule, buckets, nearest, schedule
from bitgen_cli.engine.sources import PictureSource, open_source
from bitgen_cli.engine.store import StoreWriter, TokenStore
from bitgen_cli.engine.text import find_vocabulary
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import InputError, Interrupted, ResourceError
from bitgen_cli.files import atomic_folder, write_json
from bitgen_cli.report import Report

BAD_SHARE = 0.01
"""More unreadable pictures than this share are an error."""
BAD_SHARE_EARLY, ENOUGH_READ = 0.05, 100
"""A share that ends the run before all is read, once that many are."""
NAMED = 10
"""Bad pictures named one by one; further ones are only counted."""

RECONSTRUCTIONS = "reconstructions"
_EXACT = 100.0
"""PSNR in dB written for a reconstruction without any error, where it would be infinite."""
_SHEET_COLUMNS, _SHEET_CELL, _GAP = 8, 256, 4


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
        count: pictures in it.
        added: of these, encoded by this run.
        without_caption: of these, with an empty caption.
        bad: pictures skipped by this run.
        ratios: what one picture takes, per aspect ratio.
        bytes_per_image: of the shards, captions included.
        bits_per_image: mean over the pictures.
        psnr: mean of the reconstructions in dB; None where none were asked for.
        ssim: mean of the reconstructions; None where none were asked for.
        seconds: reading, encoding and writing.
        images_per_second: `added` per second.
        report: on the data; also in the store, as data_report.json.
    """

    out: Path
    count: int
    added: int
    without_caption: int
    bad: list[BadPicture]
    ratios: list[RatioCount]
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
        InputError: the data, the model or the store cannot be used, or more than 1 % of the pictures are
            unreadable.
        UsageError: the resolution or the number of bits is not one of the model's.
        ResourceError: no such device, or no space left; whole shards are safe.
        Interrupted: stopped by the user; whole shards are safe.
    """
    device = pick_device(options.device)
    folder = find_model(options.model)
    bits = bits_in_use(read_model_config(folder)[0].tokenizer, options.bits)
    model = load_model(folder, device=device, parts=("tokenizer",))
    assert model.tokenizer is not None
    codec = _Codec(model.tokenizer, bits, device, pick_dtype(options.dtype, device))
    schedules = _schedules(model.config, options.resolution, options.aspects)
    pixels = {ratio: entry.pixels(model.config.tokenizer.patch_size) for ratio, entry in schedules.items()}
    square = pixels[nearest(1.0, tuple(pixels))]
    source = open_source(
        options.data, max(square), caption_key=options.caption_key, image_root=options.image_root
    )
    announce(source, options.data, report)
    writer = StoreWriter(
        options.out,
        tokenizer=model.fingerprints["tokenizer"],
        source=source.name,
        bits=bits,
        patch_size=model.config.tokenizer.patch_size,
        schedules=schedules,
        latents=options.latents,
    )

    stored_before = writer.manifest.count
    pending = [index for index in range(len(source)) if source.key(index) not in writer.done_keys]
    started = time.perf_counter()
    bad: list[BadPicture] = []
    try:
        if pending:
            if stored_before:
                report.notice(f"{options.out} holds {stored_before} of {len(source)} pictures; going on")
            reader = _Reader(source, pending, pixels)
            bad = _fill(writer, reader, codec, schedules, options, report)
        writer.finish()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {options.out} holds {writer.manifest.count} of {len(source)} pictures",
            "the same command goes on from there",
        ) from None
    seconds = time.perf_counter() - started
    added = writer.manifest.count - stored_before
    if not added:
        report.notice(f"nothing to do: {options.out} already holds all {stored_before} readable pictures")

    store = TokenStore.open(options.out)
    told = _report(store, source, bad, pixels, model)
    write_json(options.out / FILE, told.to_json())
    quality = None
    if options.reconstruct:
        quality = _reconstruct(store, source, codec, pixels, options, report)
    per_ratio = _per_ratio(store)
    return TokenizeResult(
        out=options.out,
        count=len(store),
        added=added,
        without_caption=store.captions.count(()),
        bad=bad,
        ratios=per_ratio,
        bytes_per_image=store.manifest.bytes / len(store),
        bits_per_image=sum(entry.count * entry.bits for entry in per_ratio) / len(store),
        psnr=None if quality is None else quality[0],
        ssim=None if quality is None else quality[1],
        seconds=seconds,
        images_per_second=added / seconds if added else 0.0,
        report=told,
    )


def _report(
    store: TokenStore,
    source: PictureSource,
    bad: list[BadPicture],
    pixels: Mapping[float, tuple[int, int]],
    model: Model,
) -> DataReport:
    """The report on the pictures in the store and on those that were skipped."""
    own = model.folder / TEXT_FOLDER
    text = str(own) if own.is_dir() else model.config.text_encoder.source
    limit = model.config.transformer.text_length
    captions = count_captions(store.keys, store.captions, limit, None if text == "new" else find_vocabulary(text))
    return data_report(source, store.keys, store.sizes, bad, pixels, captions)


@dataclass(frozen=True)
class _Codec:
    """A tokenizer with the bits per latent position, the place and the number type it computes in."""

    tokenizer: Tokenizer
    bits: int
    device: torch.device
    dtype: torch.dtype

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.inference_mode()
    def latent(self, pixels: Tensor) -> Tensor:
        """Latents (B, bits, H, W) float32 of pictures (B, 3, h, w) uint8."""
        with self._autocast():
            return self.tokenizer.latent(to_float(pixels.to(self.device)), self.bits).float()

    @torch.inference_mode()
    def decode(self, bits: list[Tensor], entry: Schedule) -> Tensor:
        """Pictures (B, 3, h, w) float32 on the CPU of bits per scale."""
        with self._autocast():
            images = self.tokenizer.decode_bits([grid.to(self.device) for grid in bits], entry)
        return images.float().cpu()


@dataclass(frozen=True)
class _Read:
    """One picture as the reading processes hand it over; without pixels where it could not be read."""

    key: str
    captions: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    ratio: float = 1.0
    pixels: npt.NDArray[np.uint8] | None = None
    reason: str = ""


class _Reader(Dataset[_Read]):
    """Reads, resizes and crops the pending pictures of a source, in its order."""

    def __init__(
        self,
        source: PictureSource,
        pending: list[int],
        pixels: Mapping[float, tuple[int, int]],
    ) -> None:
        self.source = source
        self.pending = pending
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pending)

    def __getitem__(self, number: int) -> _Read:
        index = self.pending[number]
        key = self.source.key(index)
        try:
            image, captions = self.source.image(index), self.source.captions(index)
        except InputError as error:
            return _Read(key, reason=str(error))
        ratio = nearest(image.height / image.width, tuple(self.pixels))
        return _Read(key, captions, image.size, ratio, to_tensor(image, self.pixels[ratio]).numpy())


@dataclass
class _Batch:
    """Pictures of one aspect ratio waiting to be encoded together."""

    keys: list[str] = field(default_factory=list)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: list[Tensor] = field(default_factory=list)


def _fill(
    writer: StoreWriter,
    reader: _Reader,
    codec: _Codec,
    schedules: Mapping[float, Schedule],
    options: TokenizeOptions,
    report: Report,
) -> list[BadPicture]:
    """Encodes everything the reader yields into the writer; returns the pictures that were skipped.

    Batches end where shards end, so that what a shard holds does not depend on where an earlier run stopped.
    """
    waiting: dict[float, _Batch] = {}
    bad: list[BadPicture] = []
    stored_before = writer.manifest.count

    def encode(ratio: float) -> None:
        batch = waiting.pop(ratio)
        latent = codec.latent(torch.stack(batch.pixels))
        if options.latents:
            # Quantise what is kept, so that bits and latents of the store belong together exactly.
            latent = latent.bfloat16().float()
        bits, _ = pyramid.encode(latent, schedules[ratio])
        writer.add(batch.keys, batch.captions, batch.sizes, ratio, bits, latent if options.latents else None)

    with report.task("tokenize", stored_before + len(reader)) as task:
        task.advance(stored_before)
        for read, item in enumerate(_ahead(reader, options.workers), start=1):
            task.advance()
            if item.pixels is None:
                bad.append(BadPicture(item.key, item.reason))
                if len(bad) <= NAMED:
                    report.warning(f"skipped: {item.reason}")
                if read > ENOUGH_READ and len(bad) > BAD_SHARE_EARLY * (stored_before + read):
                    raise _too_many(bad, stored_before + read)
                continue
            batch = waiting.setdefault(item.ratio, _Batch())
            batch.keys.append(item.key)
            batch.captions.append(item.captions)
            batch.sizes.append(item.size)
            batch.pixels.append(torch.from_numpy(item.pixels))
            if len(batch.keys) == min(options.batch_size, writer.room(item.ratio)):
                encode(item.ratio)
        for ratio in sorted(waiting):
            encode(ratio)
    if len(bad) > NAMED:
        report.warning(f"skipped {len(bad)} unreadable pictures in all")
    if len(bad) > BAD_SHARE * (stored_before + len(reader)):
        raise _too_many(bad, stored_before + len(reader))
    return bad


def _ahead(reader: _Reader, workers: int) -> Iterator[_Read]:
    """The reader's pictures in order, read ahead by that many processes."""
    loader = DataLoader(reader, batch_size=8, num_workers=workers, collate_fn=_as_they_are)
    try:
        for several in loader:
            yield from several
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ResourceError("a reading process ended unexpectedly", "use fewer --workers") from error


def _as_they_are(several: list[_Read]) -> list[_Read]:
    return several


def _too_many(bad: list[BadPicture], read: int) -> InputError:
    names = ", ".join(entry.key for entry in bad[:NAMED])
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return InputError(
        f"{len(bad)} of {read} pictures are unreadable, more than 1 %: {names}{more}",
        "repair or remove them and run the same command again",
    )


def _schedules(config: ModelConfig, resolution: str | None, aspects: tuple[str, ...]) -> dict[float, Schedule]:
    """The schedule of each aspect ratio of a model that is used."""
    patchify = config.transformer.patchify
    return {
        ratio: schedule(config.scales, patchify=patchify, ratio=ratio, resolution=resolution)
        for ratio in buckets(config.scales, aspects)
    }


def _per_ratio(store: TokenStore) -> list[RatioCount]:
    entries = []
    for ratio in store.ratios:
        positions = store.schedule(ratio).positions
        count = len(store.indices_of(ratio))
        entries.append(RatioCount(ratio, count, positions, positions * store.manifest.bits_per_position))
    return entries


def _reconstruct(
    store: TokenStore,
    source: PictureSource,
    codec: _Codec,
    pixels: Mapping[float, tuple[int, int]],
    options: TokenizeOptions,
    report: Report,
) -> tuple[float, float]:
    """Mean PSNR and SSIM of evenly spaced pictures, decoded from their stored bits.

    Writes pairs of originals and reconstructions, a contact sheet (originals above) and a JSON file.
    """
    places = {source.key(index): index for index in range(len(source))}
    present = [index for index, key in enumerate(store.keys) if key in places]
    if not present:
        raise InputError(f"none of the pictures in {options.out} is in {options.data} any more")
    count = min(options.reconstruct, len(present))
    chosen = [present[number * len(present) // count] for number in range(count)]
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[Image.Image, Image.Image]] = []
    with atomic_folder(options.out / RECONSTRUCTIONS) as folder, report.task("reconstruct", count) as task:
        for ratio, batch in _batches(store, chosen, options.batch_size):
            height, width = pixels[ratio]
            originals = torch.stack(
                [to_tensor(source.image(places[store.keys[index]]), (height, width)) for index in batch]
            )
            decoded = codec.decode(store.bits(batch), store.schedule(ratio))
            shown = to_uint8(decoded)
            noise = psnr(to_float(originals), to_float(shown)).clamp(max=_EXACT).tolist()
            likeness = ssim(to_float(originals), to_float(shown)).tolist()
            for place, index in enumerate(batch):
                pair = to_pil(originals[place]), to_pil(shown[place])
                name = f"{len(pairs):05d}.png"
                _side_by_side(*pair).save(folder / name)
                pairs.append(pair)
                measured = {"psnr": noise[place], "ssim": likeness[place]}
                rows.append({"file": name, "key": store.keys[index], **measured})
                task.advance()
        _contact_sheet(pairs).save(folder / "contact_sheet.png")
        means = tuple(sum(row[name] for row in rows) / count for name in ("psnr", "ssim"))
        write_json(folder / "reconstructions.json", {"psnr": means[0], "ssim": means[1], "pictures": rows})
    return means[0], means[1]


def _batches(store: TokenStore, chosen: list[int], batch_size: int) -> Iterator[tuple[float, list[int]]]:
    """The chosen pictures in batches of one aspect ratio."""
    for ratio in store.ratios:
        same = [index for index in chosen if store.ratio(index) == ratio]
        for start in range(0, len(same), batch_size):
            yield ratio, same[start : start + batch_size]


def _side_by_side(original: Image.Image, reconstruction: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (original.width * 2 + _GAP, original.height), "white")
    sheet.paste(original, (0, 0))
    sheet.paste(reconstruction, (original.width + _GAP, 0))
    return sheet


def _contact_sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """All pairs on one picture, each reconstruction below its original; large ones are reduced."""
    shown = [tuple(_reduced(image) for image in pair) for pair in pairs]
    columns = min(_SHEET_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width = max(original.width for original, _ in shown) + _GAP
    height = max(original.height for original, _ in shown) + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * 2 * height + _GAP), "white")
    for number, pair in enumerate(shown):
        row, column = divmod(number, columns)
        for below, image in enumerate(pair):
            sheet.paste(image, (_GAP + column * width, _GAP + (row * 2 + below) * height))
    return sheet


def _reduced(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest <= _SHEET_CELL:
        return image
    size = tuple(max(1, round(side * _SHEET_CELL / longest)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
