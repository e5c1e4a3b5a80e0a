"""A look at what a tokenizer keeps of pictures: originals beside reconstructions, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image

from bitgen_cli.engine.codec import Codec
from bitgen_cli.engine.data import to_float, to_pil, to_tensor, to_uint8
from bitgen_cli.engine.losses import psnr, ssim
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.errors import InputError
from bitgen_cli.files import atomic_folder, write_json
from bitgen_cli.report import Report

RECONSTRUCTIONS = "reconstructions"
_EXACT = 100.0
"""PSNR in dB written for a reconstruction without any error, where it would be infinite."""
_SHEET_COLUMNS, _SHEET_CELL, _GAP = 8, 256, 4


def reconstruct(
    store: TokenStore,
    source: PictureSource,
    codec: Codec,
    pixels: Mapping[float, tuple[int, int]],
    report: Report,
    *,
    count: int,
    batch_size: int,
) -> tuple[float, float]:
    """Mean PSNR and SSIM of evenly spaced pictures, decoded from their stored bits.

    Writes pairs of originals and reconstructions, a contact sheet (originals above) and a JSON file.
    """
    places = {source.key(index): index for index in range(len(source))}
    present = [index for index, key in enumerate(store.keys) if key in places]
    if not present:
        raise InputError(f"none of the pictures in {store.path} is in {source.name} any more")
    count = min(count, len(present))
    chosen = [present[number * len(present) // count] for number in range(count)]
    rows: list[dict[str, Any]] = []
    pairs: list[tuple[Image.Image, Image.Image]] = []
    with atomic_folder(store.path / RECONSTRUCTIONS) as folder, report.task("reconstruct", count) as task:
        for ratio, batch in _batches(store, chosen, batch_size):
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
