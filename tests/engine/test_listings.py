"""Listings: metadata.jsonl and .csv, Infinity's splits, COCO captions; nothing they name is outside of the data."""

import json
from pathlib import Path

import pytest
from data_sets import contents, put, write_coco, write_lines

from bitgen_cli.engine.sources import open_source
from bitgen_cli.errors import InputError

# -- metadata ----------------------------------------------------------------------------------------------------------


def test_metadata_names_pictures_and_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "sub/b.png", "unlisted.png", "c.png", "d.png", "e.png", "f.png")
    write_lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "sub/b.png", "text": "one"},
        {"file_name": "a.png", "caption": "two", "prompt": "not this"},
        "",
        {"file_name": "c.png", "prompt": "three \u2028 lines"},
        {"file_name": "d.png", "other": 1},
        {"file_name": "e.png", "text": None, "long_caption": "four"},
        {"file_name": "./f.png", "text": ["five", "six", "five"]},
    )
    source = open_source(str(tmp_path))
    assert contents(source) == {
        "sub/b.png": ("one",),
        "a.png": ("two",),
        "c.png": ("three lines",),
        "d.png": (),
        "e.png": ("four",),
        "f.png": ("five", "six"),
    }


def test_a_picture_listed_again_has_a_further_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png"}, {"file_name": "./a.png", "text": "two"}]
    write_lines(tmp_path / "metadata.jsonl", *rows)
    source = open_source(str(tmp_path))
    assert contents(source) == {"a.png": ("one", "two"), "b.png": ()}
    assert source.layout == "metadata.jsonl: 2 pictures in 3 rows"


def test_the_caption_key_chooses(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": "one", "blip": "two"})
    assert contents(open_source(str(tmp_path), caption_key="blip")) == {"a.png": ("two",)}
    plain, chosen = open_source(str(tmp_path)), open_source(str(tmp_path), caption_key="blip")
    assert plain.name != chosen.name


def test_csv_with_quotes_lines_in_captions_and_a_byte_order_mark(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    text = '\ufefffile_name,caption\r\na.png,"a dog, a ""cat""\nand a bird"\r\nb.png,plain\r\n'
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8", newline="")
    assert contents(open_source(str(tmp_path))) == {"a.png": ('a dog, a "cat" and a bird',), "b.png": ("plain",)}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file_name": "../secret.png"}, "line 1: '../secret.png' lies outside"),
        ({"file_name": "sub/../../secret.png"}, "line 1: .* lies outside"),
        ({"file_name": "/etc/secret.png"}, "line 1: .* lies outside"),
        ({"file_name": "a\0.png"}, "line 1: .* lies outside"),
        ({"file_name": "\ud800.png"}, "line 1: .* lies outside"),
        ({"file_name": "gone.png"}, "missing: gone.png"),
        ({"text": "no name"}, "line 1: .*file_name.*found text"),
        ({"file_name": 3}, "line 1: .*file_name"),
        ({"file_name": "a.png", "text": 3}, "line 1: the caption must be text, not int"),
        ({"file_name": "a.png", "text": ["x", {}]}, "line 1: the caption must be text, not dict"),
        (["a.png"], "line 1: a JSON array .write one object per line"),
        ("3", "line 1: .*file_name"),
        ("{", "line 1: not valid JSON"),
        ('{"a":' * 200_000, "line 1: JSON nested too deeply"),
        ('{"a":' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ('"' + "x" * (1 << 20), "line 1: longer than 1 MiB"),
        ("", "lists no pictures"),
    ],
)
def test_wrong_metadata_is_named_with_its_line(tmp_path: Path, row: object, said: str) -> None:
    put(tmp_path, "secret.png", "data/a.png")
    write_lines(tmp_path / "data" / "metadata.jsonl", row)
    with pytest.raises(InputError, match=said) as caught:
        open_source(str(tmp_path / "data"))
    assert str(caught.value).encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name;text\na.png;x\n", "needs a column file_name, .*separate the columns with commas"),
        ("name,text\na.png,x\n", "needs a column file_name, found name, text"),
        ("file_name,text\na.png,a dog, a cat\n", "line 2: more fields .*quotes"),
        ('file_name,text\na.png,"open\n', "line 2: unexpected end"),
        ("file_name,text\na.png," + "x" * 200_000, "line 2: field larger"),
        ("", "needs a column file_name, found nothing"),
        ("file_name,text\n", "lists no pictures"),
        ("file_name,text\n,x\n", 'line 2: needs "file_name"'),
    ],
)
def test_wrong_csv_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path))


def test_a_few_missing_files_are_bad_pictures_and_many_an_error_with_their_place(tmp_path: Path) -> None:
    put(tmp_path, *(f"{n:03d}.png" for n in range(100)), "elsewhere/gone.png")
    rows = [{"file_name": f"{n:03d}.png", "text": "x"} for n in range(100)]
    write_lines(tmp_path / "metadata.jsonl", *rows, {"file_name": "gone.png"})
    source = open_source(str(tmp_path))
    assert source.remarks == (f"{tmp_path}/metadata.jsonl names 1 file that is missing: gone.png",)
    with pytest.raises(InputError, match=r"gone\.png"):
        source.image(100)
    write_lines(tmp_path / "metadata.jsonl", {"file_name": "gone.png"})
    with pytest.raises(InputError, match=f"missing: gone.png .--image-root {tmp_path}/elsewhere has them"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), image_root=tmp_path / "elsewhere")) == 1


def test_listed_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "secret/a.png", "data/b.png")
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret" / "a.png")
    (tmp_path / "data" / "deep").symlink_to(tmp_path / "secret")
    for name in ("a.png", "deep/a.png"):
        write_lines(tmp_path / "data" / "metadata.jsonl", {"file_name": name, "text": "x"})
        with pytest.raises(InputError, match=f"a.png leads out of .*--image-root {tmp_path}/secret"):
            open_source(str(tmp_path / "data"))


# -- Infinity's splits -------------------------------------------------------------------------------------------------


def splits(folder: Path, prefix: str = "images/") -> None:
    put(folder, "images/a.png", "images/b.png", "images/c.png")
    write_lines(
        folder / "0.666_000000002.jsonl",
        {
            "image_path": f"{prefix}a.png",
            "h_div_w": 0.666,
            "long_caption": "a long one",
            "long_caption_type": "caption-InternVL2.0",
            "text": "short",
            "short_caption_type": "blip2",
        },
        {"image_path": f"{prefix}b.png", "h_div_w": 0.67, "long_caption": "only long", "text": ""},
    )
    write_lines(folder / "1.000_000000001.jsonl", {"image_path": f"{prefix}c.png", "h_div_w": 1.0, "text": "short c"})


def test_infinity_splits_have_a_long_and_a_short_caption(tmp_path: Path) -> None:
    splits(tmp_path)
    source = open_source(str(tmp_path))
    assert contents(source) == {
        "images/a.png": ("a long one", "short"),
        "images/b.png": ("only long",),
        "images/c.png": ("short c",),
    }
    assert source.layout == "Infinity's JSONL, 2 splits: 3 pictures"
    assert list(source.claimed or ()) == [0.666, 0.666, 1.0]
    assert source.remarks == ()
    assert contents(open_source(str(tmp_path), caption_key="text"))["images/a.png"] == ("short",)


@pytest.mark.parametrize(("promised", "rows"), [(3, 2), (1, 2), (0, 2)])
def test_the_count_in_a_splits_name_is_checked(tmp_path: Path, promised: int, rows: int) -> None:
    splits(tmp_path)
    (tmp_path / "0.666_000000002.jsonl").rename(tmp_path / f"0.666_{promised:09d}.jsonl")
    said = rf"holds {rows} rows, its name says {promised} .*rename it to 0\.666_{rows:09d}\.jsonl"
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path))


def test_the_ratio_in_a_splits_name_is_checked(tmp_path: Path) -> None:
    splits(tmp_path)
    (tmp_path / "0.666_000000002.jsonl").rename(tmp_path / "2.000_000000002.jsonl")
    source = open_source(str(tmp_path))
    (remark,) = source.remarks
    assert "another h_div_w than their split's name says" in remark
    assert "2.000_000000002.jsonl, line 1" in remark


def test_absolute_paths_must_lie_below_the_splits_or_the_image_root(tmp_path: Path) -> None:
    splits(tmp_path / "data", f"{tmp_path}/data/images/")
    assert "images/a.png" in contents(open_source(str(tmp_path / "data")))
    splits(tmp_path / "other")
    splits(tmp_path / "data", f"{tmp_path}/other/images/")
    with pytest.raises(InputError, match=f"lies outside .*--image-root {tmp_path}/other/images allows it"):
        open_source(str(tmp_path / "data"))
    found = contents(open_source(str(tmp_path / "data"), image_root=tmp_path / "other" / "images"))
    assert found["a.png"] == ("a long one", "short")


def test_paths_relative_to_where_the_splits_were_made_are_answered(tmp_path: Path) -> None:
    """As in the published toy data: relative to the folder that training was started in."""
    splits(tmp_path / "data" / "toy", "data/toy/images/")
    with pytest.raises(InputError, match=f"missing: .*--image-root {tmp_path} has them"):
        open_source(str(tmp_path / "data" / "toy"))
    assert "data/toy/images/a.png" in contents(open_source(str(tmp_path / "data" / "toy"), image_root=tmp_path))


# -- COCO --------------------------------------------------------------------------------------------------------------


def test_coco_has_several_captions_per_picture(tmp_path: Path) -> None:
    put(tmp_path / "train2017", "a.png", "b.png", "c.png")
    file = tmp_path / "annotations" / "captions_train2017.json"
    captions = [(7, "one"), (9, "b"), (7, "two\nlines"), (7, "one"), (55, "of nothing")]
    write_coco(file, {7: "a.png", 9: "b.png", 11: "c.png"}, captions)
    for given in (file, tmp_path):
        source = open_source(str(given))
        assert contents(source) == {"a.png": ("one", "two lines"), "b.png": ("b",), "c.png": ()}
        assert source.layout == "COCO captions captions_train2017.json: 3 pictures, 3 captions"
        assert source.remarks == ("captions of 1 pictures that captions_train2017.json does not list",)


@pytest.mark.parametrize("place", ["annotations", "annotations/images", "images", "images/val", "val"])
def test_coco_pictures_are_found_where_they_usually_are(tmp_path: Path, place: str) -> None:
    put(tmp_path / place, "a.png")
    file = write_coco(tmp_path / "annotations" / "captions_val.json", {1: "a.png"}, [(1, "x")])
    assert contents(open_source(str(file))) == {"a.png": ("x",)}
    assert contents(open_source(str(file), image_root=tmp_path / place)) == {"a.png": ("x",)}


def test_coco_instances_are_answered_with_the_captions(tmp_path: Path) -> None:
    put(tmp_path / "val", "a.png")
    captions = write_coco(tmp_path / "annotations" / "captions_val.json", {1: "a.png"}, [(1, "x")])
    boxes = tmp_path / "annotations" / "instances_val.json"
    row = {"image_id": 1, "bbox": [0, 0, 1, 1]}
    boxes.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [row]}))
    with pytest.raises(InputError, match=f"annotations without captions .give {captions}"):
        open_source(str(boxes))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "is no COCO captions file"),
        ('{"images": [], "annotations": {}}', "is no COCO captions file"),
        ('{"images": [1], "annotations": []}', "is no COCO captions file"),
        ('{"images": [], "annotations": []}', "lists no pictures"),
        ('{"images": [{"file_name": "a.png"}], "annotations": []}', "image 0: needs 'id'"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0: needs \"file_name\""),
        ('{"images": [{"id": 1, "file_name": "../a.png"}], "annotations": []}', "image 0: .* lies outside"),
        ('{"images": [{"id": [], "file_name": "a.png"}], "annotations": []}', "image 0: needs 'id'"),
        ('{"images": [], "annotations": [{"caption": "x"}]}', "annotation 0: needs 'image_id'"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": 2}]}', "annotation 0: the caption must be text"),
        ("[" * 200_000, "nested too deeply"),
        ("{", "not valid JSON"),
        ('{"images": "\xe9', "not valid JSON"),
    ],
)
def test_wrong_coco_files_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "captions.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=said):
        open_source(str(tmp_path / "captions.json"))


def test_a_json_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "captions.json").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(InputError, match="3072 MiB, more than the 1024 MiB"):
        open_source(str(tmp_path / "captions.json"))
