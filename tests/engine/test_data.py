"""Pictures from disk: every mode, every kind of bad file, folders and their captions."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen_cli.engine.data import (
    grid,
    load_picture,
    open_source,
    save_grid,
    to_float,
    to_pil,
    to_tensor,
    to_uint8,
)
from bitgen_cli.errors import InputError, UsageError


def picture(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    """A picture of smooth noise."""
    values = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


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
    assert open_source(str(tmp_path)).size(0) == (12, 8)


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_picture(tmp_path / "a.jpg").size == (12, 8)
    assert open_source(str(tmp_path)).size(0) == (12, 8)


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


def test_to_tensor_always_has_the_size_asked_for() -> None:
    """Rounding never leaves a picture one pixel short, whatever the proportions."""
    for width in range(1, 60, 7):
        for height in range(1, 60, 7):
            assert to_tensor(picture(width, height), (11, 13)).shape == (3, 11, 13)


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


def test_folder_is_read_recursively_sorted_without_hidden_files(tmp_path: Path) -> None:
    for name in (
        "b.png",
        "a.JPG",
        "deep/er/c.webp",
        "d.bmp",
        ".hidden.png",
        ".git/e.png",
        "note.txt",
        "f.gif",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".txt":
            picture().save(path, format={".jpg": "jpeg"}.get(path.suffix.lower()))
    (tmp_path / "b.txt").write_text("\ufeffa  red\n dog\n", encoding="utf-8")
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["a.JPG", "b.png", "d.bmp", "deep/er/c.webp"]
    assert [source.caption(i) for i in range(len(source))] == ["", "a red dog", "", ""]
    assert source.image(3).size == (12, 8)


def test_a_caption_that_is_not_text_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        open_source(str(tmp_path)).caption(0)


def test_missing_and_empty_folders_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(InputError, match=r"no pictures in .*looked for \.jpg"):
        open_source(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        open_source(str(tmp_path / "file"))


def write_metadata(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_metadata_names_pictures_and_captions(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "unlisted.png", "c.png", "d.png"):
        picture().save(tmp_path / name)
    write_metadata(
        tmp_path,
        {"file_name": "sub/b.png", "text": "one"},
        {"file_name": "a.png", "caption": "two"},
        "",
        {"file_name": "c.png", "prompt": "three \u2028 lines"},
        {"file_name": "d.png", "other": 1},
    )
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["sub/b.png", "a.png", "c.png", "d.png"]
    assert [source.caption(i) for i in range(len(source))] == ["one", "two", "three lines", ""]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "../secret.png"}, "line 1: '../secret.png' lies outside"),
        ({"file_name": "sub/../../secret.png"}, "line 1: .* lies outside"),
        ({"file_name": "/etc/secret.png"}, "line 1: .* lies outside"),
        ({"file_name": "gone.png"}, "missing: gone.png"),
        ({"text": "no name"}, "line 1: .*file_name"),
        ({"file_name": 3}, "line 1: .*file_name"),
        ({"file_name": "a.png", "text": 3}, "line 1: the caption must be text"),
        (["a.png"], "line 1: .*file_name"),
        ("{", "line 1: not valid JSON"),
        ("", "lists no pictures"),
    ],
)
def test_wrong_metadata_is_named_with_its_line(tmp_path: Path, row: object, said: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    picture().save(tmp_path / "secret.png")
    picture().save(folder / "a.png")
    write_metadata(folder, row)
    with pytest.raises(InputError, match=said):
        open_source(str(folder))


def test_a_picture_listed_twice_is_refused(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png"}, {"file_name": "./a.png"})
    with pytest.raises(InputError, match=r"line 2: 'a\.png' is listed twice"):
        open_source(str(tmp_path))


def test_world_is_a_pure_function_of_index_and_seed() -> None:
    few, many, other = open_source("world:2", 16), open_source("world:5", 16), open_source("world:5:7", 16)
    assert (len(few), len(many)) == (2, 5)
    assert few.name == many.name != other.name
    assert few.key(1) == many.key(1) != other.key(1)
    assert np.array_equal(np.asarray(few.image(1)), np.asarray(many.image(1)))
    assert not np.array_equal(np.asarray(many.image(1)), np.asarray(other.image(1)))
    assert few.image(0).size == few.size(0) == (16, 16)
    assert len({many.key(i) for i in range(5)}) == 5
    assert all(many.caption(i) for i in range(5))


def test_half_of_a_flipped_world_is_mirrored() -> None:
    """All else is the same: the pictures are those of the world of that seed, or mirror images of them."""
    usual, flipped = open_source("world:40:7", 16), open_source("world:40:7:flip", 16)
    assert usual.name != flipped.name
    mirrored = 0
    for index in range(40):
        plain, other = np.asarray(usual.image(index)), np.asarray(flipped.image(index))
        assert usual.caption(index) == flipped.caption(index)
        assert usual.key(index) != flipped.key(index)
        if not np.array_equal(plain, other):
            assert np.array_equal(plain[:, ::-1], other)
            mirrored += 1
    assert 10 < mirrored < 30
    assert open_source("world:3:flip").name == open_source("world:9:0:flip").name


@pytest.mark.parametrize(
    "data",
    [
        *("world:", "world:0", "world:x", "world:-3", "world:1:2:3", "world:3:", "world:²"),
        *("world:flip", "world:3:flip:1", "world:0:flip"),
    ],
)
def test_a_wrong_world_is_refused(data: str) -> None:
    with pytest.raises(UsageError, match="world:N"):
        open_source(data)
