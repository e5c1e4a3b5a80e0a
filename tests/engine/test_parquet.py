"""Parquet files as the hub has them: columns are found, row groups read one at a time, strange files refused."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_sets import contents, encoded, picture

from bitgen_cli.engine.sources import open_source
from bitgen_cli.errors import InputError, UsageError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def write(file: Path, columns: dict[str, Any], group: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file, row_group_size=group)
    return file


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(first, first + count)]


def test_pictures_and_captions_across_files_and_row_groups(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": images(5), "text": list("abcde")})
    write(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": images(2, 5), "text": ["f", None]})
    for data in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-{00000..00001}-of-00002.parquet"):
        source = open_source(str(data))
        assert source.layout == "parquet, 2 files: 7 pictures from image, captions from text"
        found = contents(source)
        assert list(found)[4:6] == ["train-00000-of-00002.parquet/0000004", "train-00001-of-00002.parquet/0000000"]
        assert list(found.values()) == [("a",), ("b",), ("c",), ("d",), ("e",), ("f",), ()]
        for number in (6, 0, 3):
            assert np.array_equal(np.asarray(source.image(number)), np.asarray(picture(number)))
    copy = pickle.loads(pickle.dumps(source))
    assert contents(copy) == found


def test_plain_bytes_lists_of_captions_and_a_chosen_column(tmp_path: Path) -> None:
    columns = {"id": [1, 2], "jpg": [encoded(0), encoded(1)], "alt": [["x", "y"], []], "caption": ["c", "d"]}
    file = write(tmp_path / "a.parquet", columns)
    assert list(contents(open_source(str(file))).values()) == [("c",), ("d",)]
    assert list(contents(open_source(str(file), caption_key="alt")).values()) == [("x", "y"), ()]
    assert list(contents(open_source(str(file), caption_key="none")).values()) == [(), ()]
    with pytest.raises(UsageError, match=r"has no field 'capton' .did you mean --caption-key caption"):
        open_source(str(file), caption_key="capton")


def test_paths_in_a_parquet_file_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, *images(1)]
    source = open_source(str(write(tmp_path / "a.parquet", {"image": rows})))
    for read in (source.image, source.size):
        with pytest.raises(InputError, match=r"0000000 has no picture in it .paths to files elsewhere"):
            read(0)
    assert source.image(1).size == (12, 8)


def test_files_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column of pictures.*there are url, text"):
        open_source(str(write(tmp_path / "a.parquet", {"url": ["x"], "text": ["y"]})))
    empty = pyarrow.array([], pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    with pytest.raises(InputError, match="holds no pictures"):
        open_source(str(write(tmp_path / "a.parquet", {"image": empty})))
    write(tmp_path / "b.parquet", {"image": images(1), "text": ["x"]})
    write(tmp_path / "c.parquet", {"image": images(1)})
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"c\.parquet has other columns than b\.parquet"):
        open_source(str(tmp_path))


def test_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(1), "text": [3]})))
    with pytest.raises(InputError, match="0000000: the caption must be text, not int"):
        source.captions(0)


def test_text_that_is_no_utf8_is_an_error_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": images(1), "text": ["caption"]})
    file.write_bytes(file.read_bytes().replace(b"caption", b"\xc5aption"))
    with pytest.raises(InputError, match=r"a\.parquet is not a whole parquet file"):
        open_source(str(file)).captions(0)


def test_one_row_group_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", {"image": images(6), "text": list("abcdef")})))
    read: list[tuple[int, list[str]]] = []
    original = parquet.ParquetFile.read_row_group

    def watched(self: Any, number: int, columns: list[str], **rest: Any) -> Any:
        read.append((number, columns))
        return original(self, number, columns=columns, **rest)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", watched)
    for index in range(6):
        source.captions(index)
    assert read == [(0, ["text"]), (1, ["text"]), (2, ["text"])], "captions do not read pictures"
    read.clear()
    for index in range(6):
        source.image(index)
    assert read == [(0, ["image"]), (1, ["image"]), (2, ["image"])]


def test_huge_row_groups_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"image": images(2)})
    monkeypatch.setattr("bitgen_cli.engine.parquet.MAX_GROUP", 100)
    with pytest.raises(InputError, match=r"in one row group.*row_group_size=100"):
        open_source(str(file))


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"image": images(1)})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=r"pip install 'bitgen\[parquet\]'"):
        open_source(str(file))
