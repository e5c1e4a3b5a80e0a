"""Picture files: every mode with exact pixels, every kind of bad file, sizes without decoding, and tensors."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen_cli.engine.data import (
    covering,
    cropped_share,
    decode_picture,
    grid,
    load_picture,
    picture_size,
    save_grid,
    to_float,
    to_pil,
    to_tensor,
    to_uint8,
)
from bitgen_cli.errors import InputError


def picture(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    """A picture of smooth noise."""
    values = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_rgb_png_comes_back_exactly(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    loaded = load_picture(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    assert np.array_equal(np.asarray(loaded), np.asarray(picture()))


def test_alpha_is_composed_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 51, 255]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = np.asarray(load_picture(tmp_path / "a.png"))[0].tolist()
    assert pixels == [[255, 255, 255], [244, 204, 204], [200, 0, 0]]


def test_palette_with_a_transparent_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(load_picture(tmp_path / "opaque.png"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert np.asarray(load_picture(tmp_path / "clear.png"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert np.asarray(load_picture(tmp_path / "a.png"))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "a.png")
    loaded = load_picture(tmp_path / "a.png")
    assert np.asarray(loaded)[0].tolist() == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]


def deep_png(pixels: list[list[int]], colour: int, extra: bytes = b"") -> bytes:
    """A PNG of one row with 16 bits per channel.

    Args:
        pixels: channels of each.
        colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha.
        extra: chunks before the pixels.
    """
    head = struct.pack(">IIBBBBB", len(pixels), 1, 16, colour, 0, 0, 0)
    row = b"\0" + b"".join(struct.pack(">H", value) for pixel in pixels for value in pixel)
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("pixels", "colour", "extra", "expected"),
    [
        ([[0x1234], [0xFFFF]], 0, b"", [[18, 18, 18], [255, 255, 255]]),
        ([[0x1234], [0x8080]], 0, chunk(b"tRNS", b"\x12\x34"), [[255, 255, 255], [128, 128, 128]]),
        ([[0xFF00, 0x80FF, 0x00FF]], 2, b"", [[255, 128, 0]]),
        ([[0x4000, 0xFFFF], [0x4000, 0]], 4, b"", [[64, 64, 64], [255, 255, 255]]),
        ([[0xC800, 0, 0, 0xFFFF], [0xC800, 0, 0, 0]], 6, b"", [[200, 0, 0], [255, 255, 255]]),
    ],
)
def test_sixteen_bits_per_channel(
    pixels: list[list[int]], colour: int, extra: bytes, expected: list[list[int]]
) -> None:
    assert np.asarray(decode_picture(deep_png(pixels, colour, extra), "a"))[0].tolist() == expected


@pytest.mark.parametrize(
    ("ink", "seen"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 0, 0), (0, 255, 255)),
     ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 128), (127, 127, 127))],
)  # fmt: skip
def test_cmyk_is_read_as_ink(tmp_path: Path, ink: tuple[int, ...], seen: tuple[int, ...]) -> None:
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "a.jpg", quality=100)
    assert np.abs(np.asarray(load_picture(tmp_path / "a.jpg")).astype(int) - seen).max() <= 1


def test_grey_with_alpha_and_palette_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8), "LA").save(tmp_path / "grey.png")
    assert np.asarray(load_picture(tmp_path / "grey.png"))[0].tolist() == [[100, 100, 100], [255, 255, 255]]
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "palette.png", transparency=bytes([255, 0, 51]))
    seen = np.asarray(load_picture(tmp_path / "palette.png"))[0].tolist()
    assert seen == [[10, 20, 30], [255, 255, 255], [204, 204, 204]]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new("RGB", (16, 16), "white").convert(mode).save(path)
    loaded = load_picture(path)
    assert loaded.mode == "RGB"
    assert np.asarray(loaded).min() >= 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = picture(12, 8)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "a.png")), np.asarray(upright))
    assert picture_size(tmp_path / "a.png") == (12, 8)


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_picture(tmp_path / "a.jpg").size == (12, 8)
    assert picture_size(tmp_path / "a.jpg") == (12, 8)


def test_the_size_of_a_png_is_known_without_decoding_even_where_exif_stands_last(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    picture(12, 8).save(path)
    content = path.read_bytes()
    end = content.rindex(b"IEND") - 4
    path.write_bytes(content[:end] + chunk(b"eXIf", exif.tobytes()[6:]) + content[end:])
    assert load_picture(path).size == picture_size(path) == (8, 12)
    # pixels that cannot be decoded are no hindrance: they are not looked at
    start = content.index(b"IDAT") + 4
    broken = bytearray(path.read_bytes())
    broken[start : start + 20] = bytes(20)
    path.write_bytes(broken)
    assert picture_size(path) == (8, 12)
    with pytest.raises(InputError, match="damaged"):
        load_picture(path)


def test_a_picture_in_memory_is_the_same_as_on_disk(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(np.asarray(decode_picture(content, "a")), np.asarray(picture()))
    assert picture_size(io.BytesIO(content), "a") == (12, 8)
    with pytest.raises(InputError, match=r"shard\.tar: 7 is damaged"):
        decode_picture(content[:-40], "shard.tar: 7")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = io.BytesIO()
    picture(64, 64).save(whole, format={"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) * 2 // 3])
    with pytest.raises(InputError, match=r"a\.") as caught:
        load_picture(path)
    assert "\n" not in str(caught.value)


def test_damage_inside_a_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(64, 64).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        load_picture(path)


@pytest.mark.parametrize("pixels", [1.5, 2.5])
def test_decompression_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: float
) -> None:
    """Pillow warns above its limit and raises above twice the limit; both are refused here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("RGB", (100, int(100 * pixels))).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="decompression bomb"):
        load_picture(tmp_path / "a.png")


def test_a_real_bomb_is_refused_without_decoding(tmp_path: Path) -> None:
    """A PNG of some bytes that claims 60000 x 60000 pixels, under Pillow's own limit."""
    path = tmp_path / "a.png"
    picture().save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_picture(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.jpg", b"hello", "not a JPEG, PNG, WebP or BMP"),
        ("empty.png", b"", "not a JPEG, PNG, WebP or BMP"),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG, WebP or BMP"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_picture(tmp_path / name)


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.png"):
        load_picture(tmp_path / "gone.png")


def reference_transform(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize and crop as INFINITY_FORMAT section 6 words it."""
    if image.width / image.height <= width / height:
        size = (width, int(width / (image.width / image.height)))
    else:
        size = (int(image.width / image.height * height), height)
    pixels = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize("source", [(40, 30), (30, 40), (33, 33), (100, 7), (5, 4)])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 48)])
def test_to_tensor_is_the_published_transform(source: tuple[int, int], size: tuple[int, int]) -> None:
    image = picture(*source)
    pixels = to_tensor(image, size)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), reference_transform(image, *size))


@pytest.mark.parametrize(("side", "exact"), [(95, True), (160, False), (1000, False)])
def test_much_shrunk_pictures_are_nearly_the_published_ones(side: int, exact: bool) -> None:
    """Less than six times shrunk they are the same; further, averages over whole pixels come first."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = Image.blend(Image.fromarray(noise), picture(side, side), 0.7)
    difference = to_tensor(image, (16, 16)).permute(1, 2, 0).numpy().astype(int) - reference_transform(image, 16, 16)
    assert np.abs(difference).max() <= (0 if exact else 6)
    assert np.abs(difference).mean() <= 1


def test_to_tensor_always_has_the_size_asked_for() -> None:
    """Rounding never leaves a picture one pixel short, whatever the proportions."""
    for width in range(1, 60, 7):
        for height in range(1, 60, 7):
            assert to_tensor(picture(width, height), (11, 13)).shape == (3, 11, 13)


@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000), (3000, 9)])
def test_extreme_proportions_cost_no_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """To cover 128 x 64, 40000 x 1 pixels would become 655 million."""
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **named: object) -> Image.Image:
        asked.append(size)
        return resize(self, size, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels = to_tensor(Image.new("RGB", size, (9, 8, 7)), (128, 64))
    assert pixels.shape == (3, 128, 64)
    assert pixels.flatten(1).unique(dim=1).flatten().tolist() == [9, 8, 7]
    assert all(width * height <= 65 * 128 * 64 for width, height in asked)


def test_the_cropped_share_is_what_is_cut_off() -> None:
    assert covering((200, 100), (50, 50)) == (100, 50)
    assert cropped_share((200, 100), (50, 50)) == 0.5
    assert cropped_share((30, 30), (64, 64)) == 0
    assert cropped_share((100, 300), (20, 10)) == pytest.approx(1 - 2 / 3)


def test_to_tensor_leaves_a_fitting_picture_as_it_is() -> None:
    assert np.array_equal(np.asarray(to_pil(to_tensor(picture(), (8, 12)))), np.asarray(picture()))


def test_uint8_and_float_are_inverse_and_float_is_cut_off() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    # A little above: the float of a level may lie a rounding error below it, and cutting off would lose one.
    assert torch.equal(to_uint8(to_float(values) + 1e-5), values)
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_uint8(torch.tensor([-3.0, 0.0, 0.999, 3.0])).tolist() == [0, 127, 254, 255]


def test_grid_places_pictures_in_rows(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 2, 4), shade, dtype=torch.uint8) for shade in (10, 20, 30)])
    sheet = np.asarray(grid(images, 2))
    assert sheet.shape == (4, 8, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[2, 0, 0], sheet[2, 4, 0]] == [10, 20, 30, 0]
    save_grid(torch.ones(1, 3, 2, 2), 1, tmp_path / "grid.png")
    assert np.asarray(load_picture(tmp_path / "grid.png")).min() == 255
