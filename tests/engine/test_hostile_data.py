"""Every reader against random bytes and damaged files: one clear error or readable pictures, and nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from data_sets import encoded, picture, put, write_coco, write_lines, write_tar

from bitgen_cli.engine.sources import open_source
from bitgen_cli.errors import InputError, UsageError


def jsonl(folder: Path) -> Path:
    return write_lines(folder / "metadata.jsonl", {"file_name": "a.png", "text": "one"}, {"file_name": "b.png"})


def csv(folder: Path) -> Path:
    (folder / "metadata.csv").write_text('file_name,text\na.png,"one, two"\nb.png,three\n')
    return folder / "metadata.csv"


def split(folder: Path) -> Path:
    rows = [{"image_path": "a.png", "h_div_w": 0.6, "long_caption": "x"}, {"image_path": "b.png", "text": "y"}]
    return write_lines(folder / "0.666_000000002.jsonl", *rows)


def coco(folder: Path) -> Path:
    return write_coco(folder / "captions.json", {1: "a.png", 2: "b.png"}, [(1, "x"), (2, "y"), (1, "z")])


def tar(folder: Path) -> Path:
    members = {"1.png": encoded(1), "1.txt": b"x", "2.png": encoded(2), "2.json": b'{"caption": "y"}'}
    return write_tar(folder / "a.tar", members)


def table(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"bytes": encoded(number), "path": "x"} for number in range(3)]
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"image": rows, "text": ["a", "b", "c"]}), folder / "a.parquet"
    )
    return folder / "a.parquet"


def text(folder: Path) -> Path:
    (folder / "a.txt").write_text("a caption é")
    return folder / "a.txt"


def picture_of(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        picture(3, (24, 16)).save(folder / f"a.{suffix}", format={"jpg": "jpeg"}.get(suffix, suffix))
        return folder / f"a.{suffix}"

    return make


MAKERS = {
    **{maker.__name__: maker for maker in (jsonl, csv, split, coco, tar, table, text)},
    **{suffix: picture_of(suffix) for suffix in ("png", "jpg", "webp", "bmp")},
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content cut, with bytes changed, doubled, left out, or nothing of it."""
    kind = rng.randrange(6)
    place = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return rng.randbytes(rng.randrange(2000))
    changed = bytearray(content)
    if kind == 2:
        for _ in range(rng.randrange(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 3:
        changed[place:place] = changed[: rng.randrange(600)]
    elif kind == 4:
        del changed[place : place + rng.randrange(1, 600)]
    else:
        changed[place : place + 8] = rng.choice((b"\xff" * 8, bytes(8), b"77777777", b"[[[[[[[[", b'"\\ud800"'))
    return bytes(changed)


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_files_are_one_clear_error_or_are_read(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.png", "b.png")
    if name in ("tar", "table", "jpg", "webp", "bmp"):
        (tmp_path / "a.png").unlink()
        (tmp_path / "b.png").unlink()
    file = MAKERS[name](tmp_path)
    whole = file.read_bytes()
    rng = random.Random(name)
    data = str(tmp_path if name in ("text", "png", "jpg", "webp", "bmp") else file)
    reads = 0
    refusals: list[str] = []
    for _ in range(60):
        file.write_bytes(damaged(whole, rng))
        try:
            source = open_source(data)
            for index in range(len(source)):
                source.key(index).encode()
                for read in (source.captions, source.size, source.image):
                    try:
                        found = read(index)
                        reads += 1
                        if read == source.captions:
                            assert all(caption.encode() and "\n" not in caption for caption in found)  # type: ignore[union-attr]
                    except InputError as error:
                        refusals.append(str(error))
        except (InputError, UsageError) as error:
            refusals.append(str(error))
    assert reads > 0
    assert refusals
    assert all(text and "\n" not in text and text.encode() for text in refusals)
