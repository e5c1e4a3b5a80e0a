"""Folders of pictures: text files beside them, folders as classes, links, and many files."""

import os
from pathlib import Path
from typing import Any

import pytest
from data_sets import contents, put, write_lines

from bitgen_cli.engine.folders import class_of
from bitgen_cli.engine.sources import open_source
from bitgen_cli.errors import InputError


def test_a_folder_is_read_recursively_sorted_without_hidden_files(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.JPG", "deep/er/c.webp", "d.bmp", ".hidden.png", ".git/e.png", "__MACOSX/f.png", "f.gif")
    (tmp_path / "b.txt").write_text("\ufeffa  red\n dog\n", encoding="utf-8")
    (tmp_path / "d.caption").write_text("a cat")
    (tmp_path / "note.txt").write_text("nothing")
    source = open_source(str(tmp_path))
    assert contents(source) == {"a.JPG": (), "b.png": ("a red dog",), "d.bmp": ("a cat",), "deep/er/c.webp": ()}
    assert source.layout == "pictures with .txt or .caption files: 2 of 4 have one"
    assert source.remarks == (
        "left out: 1 .gif",
        "1 text file has no picture of the same name, for example note.txt",
    )


def test_a_txt_file_goes_before_a_caption_file_and_an_empty_one_says_nothing(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "a.caption").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text(" \n ")
    assert contents(open_source(str(tmp_path))) == {"a.png": ("first",), "b.png": ()}


@pytest.mark.parametrize(
    ("content", "said"), [(b"caf\xe9", "is not UTF-8"), (b"x" * ((1 << 20) + 1), "has more than 1 MiB")]
)
def test_a_caption_that_is_not_text_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.txt {said}"):
        open_source(str(tmp_path)).captions(0)


def test_class_folders_are_captions_where_all_pictures_have_one(tmp_path: Path) -> None:
    put(tmp_path, "train/golden_retriever/1.png", "train/golden_retriever/deep/2.png", "val/tabby-cat/1.png")
    (tmp_path / "val/tabby-cat/1.txt").write_text("a tabby on a wall")
    source = open_source(str(tmp_path))
    assert contents(source) == {
        "train/golden_retriever/1.png": ("golden retriever",),
        "train/golden_retriever/deep/2.png": ("golden retriever",),
        "val/tabby-cat/1.png": ("a tabby on a wall",),
    }
    assert source.layout.startswith("2 class folders (golden retriever, tabby cat), 3 pictures")
    assert any("--caption-key none" in remark for remark in source.remarks)
    put(tmp_path, "at the top.png")
    assert set(contents(open_source(str(tmp_path))).values()) == {(), ("a tabby on a wall",)}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.png", None),
        ("cat/a.png", "cat"),
        ("train/cat/x/a.png", "cat"),
        ("train/a.png", None),
        ("2021/a.png", None),
        ("Images/07/a.png", None),
        ("black_cat/a.png", "black cat"),
        ("кошка/a.png", "кошка"),
    ],
)
def test_the_class_a_path_names(file: str, name: str | None) -> None:
    assert class_of(file) == name


def test_folders_without_names_of_their_own_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "test/2.png", "2021/3.png")
    assert open_source(str(tmp_path)).layout == "plain folder, 3 pictures without captions"


def test_names_that_are_no_text_are_keys_that_can_be_stored(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    source = open_source(str(tmp_path))
    assert source.key(0) == "caf\\xe9.png"
    assert source.key(0).encode()
    assert source.image(0).size == (12, 8)


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder `data` with a link inside it, and links to a picture, a text and a folder outside of it."""
    put(tmp_path, "secret/out.png", "data/a.png", "data/b.png")
    (tmp_path / "secret" / "words.txt").write_text("secret words")
    folder = tmp_path / "data"
    (folder / "inside.png").symlink_to("a.png")
    (folder / "out.png").symlink_to(tmp_path / "secret" / "out.png")
    (folder / "b.txt").symlink_to(tmp_path / "secret" / "words.txt")
    (folder / "all").symlink_to(tmp_path / "secret")
    (folder / "dead.png").symlink_to("nowhere.png")
    return folder


def test_links_that_lead_out_of_the_folder_are_not_read(linked: Path) -> None:
    source = open_source(str(linked))
    assert [source.key(i) for i in range(len(source))] == ["a.png", "b.png", "dead.png", "inside.png", "out.png"]
    assert source.image(3).size == (12, 8)
    assert source.captions(1) == (), "nor are captions"
    for read in (source.image, source.size):
        with pytest.raises(InputError, match=f"out.png leads out of .*--image-root {linked.parent}/secret"):
            read(4)
        with pytest.raises(InputError, match=r"dead\.png"):
            read(2)
    assert "links to folders are not followed: all" in source.remarks


def test_an_image_root_allows_links_to_it(linked: Path) -> None:
    source = open_source(str(linked), image_root=linked.parent / "secret")
    assert source.image(4).size == source.size(4) == (12, 8)
    assert source.captions(1) == ("secret words",)


def test_the_hub_cache_is_made_of_links_and_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--somebody--cats"
    put(repository / "blobs", "0.png", "1.png")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number in range(2):
        (snapshot / f"cat{number}.png").symlink_to(f"../../blobs/{number}.png")
    assert set(contents(open_source(str(snapshot)))) == {"cat0.png", "cat1.png"}
    write_lines(snapshot / "metadata.jsonl", {"file_name": "cat1.png", "text": "one"})
    assert contents(open_source(str(snapshot))) == {"cat1.png": ("one",)}


def test_things_that_only_look_like_pictures_are_never_opened(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "folder.png").mkdir()
    assert contents(open_source(str(tmp_path))) == {"a.png": ()}


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    put(tmp_path, "deep/a.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "round.png").symlink_to("round.png")
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["deep/a.png", "round.png"]
    with pytest.raises(InputError):
        source.image(1)


# -- many files --------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_without_a_look_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names alone are read, so that 100000 pictures take seconds: no file is opened, and none asked for its state."""
    for number in range(100):
        for suffix in (".jpg", ".txt"):
            (tmp_path / f"{number:03d}{suffix}").touch()
    looks: list[object] = []
    for name in ("stat", "lstat", "open"):
        call = getattr(os, name)

        def watched(path: object, *rest: Any, call: Any = call, **more: Any) -> Any:
            looks.append(path)
            return call(path, *rest, **more)

        monkeypatch.setattr(os, name, watched)
    source = open_source(str(tmp_path))
    monkeypatch.undo()
    assert source.layout == "pictures with .txt files: 100 of 100 have one"
    assert len(looks) < 30
    assert not [path for path in looks if str(path).endswith((".jpg", ".txt"))]
