"""The one reader: layouts are recognised and said, near misses are answered, captions take turns."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_sets import contents, encoded, picture, put, write_coco, write_lines, write_tar

from bitgen_cli.engine.sources import drawn_caption, open_source
from bitgen_cli.errors import InputError, UsageError


def make(kind: str, folder: Path) -> None:
    """A data set of two pictures, `a.png` with the caption "one"."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "splits":
        put(folder, "a.png", "b.png")
        rows = [{"image_path": "a.png", "long_caption": "one"}, {"image_path": "b.png", "long_caption": "two"}]
        write_lines(folder / "0.666_000000002.jsonl", *rows)
    elif kind == "jsonl":
        put(folder, "a.png", "b.png")
        rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png"}]
        write_lines(folder / "metadata.jsonl", *rows)
    elif kind == "csv":
        put(folder, "a.png", "b.png")
        (folder / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,\n")
    elif kind == "coco":
        put(folder / "train2017", "a.png", "b.png")
        write_coco(folder / "annotations" / "captions_train2017.json", {1: "a.png", 2: "b.png"}, [(1, "one")])
    elif kind == "tars":
        write_tar(folder / "shard-000.tar", {"a.png": encoded(0), "a.txt": b"one"})
        write_tar(folder / "shard-001.tar", {"b.png": encoded(1)})
    elif kind == "text files":
        put(folder, "a.png", "b.png")
        (folder / "a.txt").write_text("one")
    elif kind == "classes":
        put(folder, "one/a.png", "two/b.png")
    elif kind == "plain":
        put(folder, "a.png", "b.png")


SAID = {
    "splits": "Infinity's JSONL, 1 split: 2 pictures",
    "jsonl": "metadata.jsonl: 2 pictures",
    "csv": "metadata.csv: 2 pictures",
    "coco": "COCO captions captions_train2017.json: 2 pictures, 1 captions",
    "tars": "WebDataset, 2 tars: 2 pictures, 1 .txt",
    "text files": "pictures with .txt files: 1 of 2 have one",
    "classes": "2 class folders (one, two), 2 pictures: folder names are the captions",
    "plain": "plain folder, 2 pictures without captions",
}


@pytest.mark.parametrize("kind", SAID)
def test_every_layout_is_recognised_and_said(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "data")
    source = open_source(str(tmp_path / "data"))
    assert source.layout == SAID[kind]
    found = contents(source)
    assert next(iter(found.values())) == (() if kind == "plain" else ("one",))
    for number in range(2):
        assert np.array_equal(np.asarray(source.image(number)), np.asarray(picture(number)))


@pytest.mark.parametrize("kind", SAID)
def test_sources_travel_to_other_processes(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "data")
    source = open_source(str(tmp_path / "data"))
    before = contents(source)
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == before
    assert (copy.name, copy.layout, len(copy)) == (source.name, source.layout, 2)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("splits", "0.666_000000002.jsonl"),
        ("jsonl", "metadata.jsonl"),
        ("csv", "metadata.csv"),
        ("coco", "annotations/captions_train2017.json"),
        ("tars", "shard-{000..001}.tar"),
    ],
)
def test_a_file_may_be_given_itself(tmp_path: Path, kind: str, file: str) -> None:
    make(kind, tmp_path / "data")
    whole = contents(open_source(str(tmp_path / "data")))
    assert contents(open_source(str(tmp_path / "data" / file))) == whole


@pytest.mark.parametrize("kind", SAID)
def test_captions_can_be_left_out(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "data")
    assert set(contents(open_source(str(tmp_path / "data"), caption_key="none")).values()) == {()}


@pytest.mark.parametrize("kind", ["splits", "jsonl", "csv", "coco"])
def test_a_caption_key_that_is_not_there_is_refused(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "data")
    with pytest.raises(UsageError, match="has no field 'colour'"):
        open_source(str(tmp_path / "data"), caption_key="colour")


def test_a_caption_key_nearly_right_is_answered(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "blip_caption": "x"})
    with pytest.raises(UsageError, match="did you mean --caption-key blip_caption"):
        open_source(str(tmp_path), caption_key="blip_captions")


# -- near misses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["splits", "jsonl", "csv", "tars"])
def test_the_folder_above_a_data_set_is_answered_with_the_data_set(tmp_path: Path, kind: str) -> None:
    make(kind, tmp_path / "data" / "train")
    with pytest.raises(InputError, match=f"a folder in it is one .give {tmp_path}/data/train") as caught:
        open_source(str(tmp_path / "data"))
    assert len(open_source(str(caught.value.hint).removeprefix("give "))) == 2


def test_several_data_sets_below_are_all_named(tmp_path: Path) -> None:
    make("jsonl", tmp_path / "train")
    make("jsonl", tmp_path / "test")
    with pytest.raises(InputError, match=r"2 folders in it are .give one of them: .*/test, .*/train"):
        open_source(str(tmp_path))


def test_the_parent_of_the_folder_with_the_pictures_is_read(tmp_path: Path) -> None:
    make("text files", tmp_path / "data" / "images")
    assert contents(open_source(str(tmp_path / "data"))) == {"images/a.png": ("one",), "images/b.png": ()}


@pytest.mark.parametrize("typed", ["phtos", "Photos", "photo"])
def test_a_typing_error_is_answered(tmp_path: Path, typed: str) -> None:
    make("plain", tmp_path / "photos" / "deep")
    with pytest.raises(InputError, match=f"does not exist .did you mean {tmp_path}/photos/deep"):
        open_source(str(tmp_path / typed / "deep"))
    with pytest.raises(InputError, match=r"does not exist .give a folder of pictures"):
        open_source(str(tmp_path / "nothing like it"))


def test_metadata_json_is_not_metadata_jsonl(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "metadata.json").write_text("[]")
    with pytest.raises(InputError, match=r"a listing is called metadata\.jsonl .*one per line"):
        open_source(str(tmp_path))


def test_pictures_without_captions_whose_listing_lies_above_or_beside_them(tmp_path: Path) -> None:
    make("plain", tmp_path / "images")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "images/a.png", "text": "x"})
    (remark,) = open_source(str(tmp_path / "images")).remarks
    assert remark == f"captions may be in {tmp_path}/metadata.jsonl: give {tmp_path} for them"
    make("coco", tmp_path / "coco")
    (remark,) = open_source(str(tmp_path / "coco" / "train2017")).remarks
    assert remark == f"captions may be in {tmp_path}/coco/annotations/captions_train2017.json: give that file for them"
    make("plain", tmp_path / "other")
    write_lines(tmp_path / "other" / "captions.jsonl", {"file_name": "a.png", "text": "x"}, {"file_name": "b.png"})
    remarks = open_source(str(tmp_path / "other")).remarks
    assert remarks == (
        "left out: 1 .jsonl",
        f"captions may be in {tmp_path}/other/captions.jsonl: give that file for them",
    )
    assert len(open_source(str(tmp_path / "other" / "captions.jsonl"))) == 2


def test_a_single_picture_a_zip_a_store_and_other_files(tmp_path: Path) -> None:
    make("plain", tmp_path)
    for name, said in {
        "a.png": f"single picture .give the folder: {tmp_path}",
        "set.zip": "is compressed.*unpack",
        "set.tar.gz": "is compressed.*unpack",
        "notes.md": f"is no data set .give the folder: {tmp_path}",
    }.items():
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(InputError, match=said):
            open_source(str(tmp_path / name))
    store = tmp_path / "store"
    put(store, "manifest.json", "shard-00000.safetensors")
    parts = tmp_path / "parts"
    put(parts, "part-1-of-2/manifest.json", "part-1-of-2/shard-00000.safetensors")
    for folder in (store, parts):
        with pytest.raises(InputError, match="is a token store"):
            open_source(str(folder))
    with pytest.raises(InputError, match="is an address"):
        open_source("https://example.org/photos")


def test_empty_folders_say_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no pictures in .*looked for \.jpg"):
        open_source(str(tmp_path))
    put(tmp_path, "a.gif", "b.heic", "c.heic")
    with pytest.raises(InputError, match=r"no pictures in .*there are 2 \.heic, 1 \.gif"):
        open_source(str(tmp_path))
    put(tmp_path, "photos.zip")
    with pytest.raises(InputError, match=r"no pictures in .*unpack photos\.zip first"):
        open_source(str(tmp_path))


def test_tars_beside_pictures_are_told(tmp_path: Path) -> None:
    make("plain", tmp_path)
    make("tars", tmp_path)
    source = open_source(str(tmp_path))
    assert len(source) == 2
    assert f"shard-000.tar, shard-001.tar not read: give {tmp_path}/shard-000.tar for that" in source.remarks


def test_parquet_splits_are_not_mixed(tmp_path: Path) -> None:
    put(
        tmp_path / "data",
        *(f"train-{n:05d}-of-00002.parquet" for n in range(2)),
        "test-00000-of-00001.parquet",
    )
    with pytest.raises(InputError, match=r"several splits: test, train") as caught:
        open_source(str(tmp_path))
    expected = f"{tmp_path}/data/test-00000-of-00001.parquet, '{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet'"
    assert caught.value.hint == f"give one of them: {expected}"


@pytest.mark.parametrize(
    ("pattern", "error", "said"),
    [
        ("shard-{000..005}.tar", InputError, r"4 of 6 files of .* are missing, .*shard-002\.tar first"),
        ("shrd-{000..001}.tar", InputError, r"2 of 2 files .*did you mean .*shard-000\.tar"),
        ("shard-{001..000}.tar", UsageError, "no range"),
        ("shard-{0..999999}.tar", UsageError, "no range"),
        ("shard-{000..001}.zip", UsageError, "several tar or parquet files"),
    ],
)
def test_wrong_patterns_are_answered(tmp_path: Path, pattern: str, error: type[Exception], said: str) -> None:
    make("tars", tmp_path)
    with pytest.raises(error, match=said):
        open_source(str(tmp_path / pattern))


def test_several_coco_files_are_all_named(tmp_path: Path) -> None:
    make("coco", tmp_path)
    write_coco(tmp_path / "annotations" / "captions_val2017.json", {3: "c.png"}, [])
    with pytest.raises(InputError, match=r"captions_train2017\.json, .*captions_val2017\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "data", ["\0", "a\0b", "x" * 5000, "{" * 300, "-{0..3}", "~no one of this name/x", "./" * 2000, ""]
)
def test_strange_names_are_refused(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((InputError, UsageError)):
        open_source(data)


# -- captions of an epoch ----------------------------------------------------------------------------------------------


def test_captions_take_turns_over_the_epochs() -> None:
    captions = ("a", "b", "c", "d", "e")
    for index in range(20):
        drawn = [drawn_caption(captions, 7, epoch, index) for epoch in range(10)]
        assert Counter(drawn[:5]) == Counter(drawn[5:]) == Counter(captions)
    first = Counter(drawn_caption(captions, 7, 0, index) for index in range(2000))
    assert all(300 < count < 500 for count in first.values()), "each comes first as often as the others"
    one, same, other = ([drawn_caption(captions, seed, 3, i) for i in range(50)] for seed in (7, 7, 8))
    assert one == same != other
    assert drawn_caption(("only",), 1, 999, 3) == "only"


# -- the demo world ----------------------------------------------------------------------------------------------------


def test_world_is_a_pure_function_of_index_and_seed() -> None:
    few, many, other = open_source("world:2", 16), open_source("world:5", 16), open_source("world:5:7", 16)
    assert (len(few), len(many)) == (2, 5)
    assert few.name == many.name != other.name
    assert few.key(1) == many.key(1) != other.key(1)
    assert np.array_equal(np.asarray(few.image(1)), np.asarray(many.image(1)))
    assert not np.array_equal(np.asarray(many.image(1)), np.asarray(other.image(1)))
    assert few.image(0).size == few.size(0) == (16, 16)
    assert len({many.key(i) for i in range(5)}) == 5
    assert all(many.captions(i) for i in range(5))


def test_half_of_a_flipped_world_is_mirrored() -> None:
    """All else is the same: the pictures are those of the world of that seed, or mirror images of them."""
    usual, flipped = open_source("world:40:7", 16), open_source("world:40:7:flip", 16)
    assert usual.name != flipped.name
    mirrored = 0
    for index in range(40):
        plain, other = np.asarray(usual.image(index)), np.asarray(flipped.image(index))
        assert usual.captions(index) == flipped.captions(index)
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
