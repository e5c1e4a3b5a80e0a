"""Tars: read by offset and never unpacked; names in them are keys; what is damaged or compressed is said."""

import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_sets import contents, encoded, picture, write_tar

from bitgen_cli.engine.archives import TarSource
from bitgen_cli.engine.sources import PictureSource, open_source
from bitgen_cli.errors import InputError, UsageError


def shard(file: Path, count: int = 3, first: int = 0) -> Path:
    members = []
    for number in range(first, first + count):
        members += [
            (f"{number:06d}.png", encoded(number)),
            (f"{number:06d}.txt", f"picture {number}".encode()),
            (f"{number:06d}.json", json.dumps({"caption": f"json {number}", "blip": [f"b{number}"]}).encode()),
        ]
    return write_tar(file, members)


def test_pictures_texts_and_json_are_read_by_offset(tmp_path: Path) -> None:
    shard(tmp_path / "s-000.tar", 3)
    shard(tmp_path / "s-001.tar", 2, 3)
    before = sorted(os.listdir(tmp_path))
    source = open_source(str(tmp_path))
    assert contents(source) == {f"s-{n // 3:03d}.tar/{n:06d}": (f"picture {n}",) for n in range(5)}
    for number in range(5):
        assert np.array_equal(np.asarray(source.image(number)), np.asarray(picture(number)))
    assert sorted(os.listdir(tmp_path)) == before, "nothing is unpacked"
    chosen = open_source(str(tmp_path), caption_key="blip")
    assert [chosen.captions(number) for number in range(5)] == [(f"b{number}",) for number in range(5)]
    with pytest.raises(UsageError, match="has no field 'colour'"):
        open_source(str(tmp_path), caption_key="colour")


def test_members_belong_together_by_name_up_to_the_first_dot(tmp_path: Path) -> None:
    members = {
        "deep/a.b/1.txt": b"one",
        "deep/a.b/1.cls": b"3",
        "deep/a.b/1.PNG": encoded(1),
        "deep/a.b/1.mask.png": b"not looked at",
        "2.json": b'{"prompt": "two"}',
        "2.png": encoded(2),
        "3.png": encoded(3),
        "4.caption": b"of nothing",
        "5.webp": b"",
    }
    write_tar(tmp_path / "a.tar", members)
    source = open_source(str(tmp_path / "a.tar"))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["a.tar/deep/a.b/1", "a.tar/2", "a.tar/3", "a.tar/5"]
    assert [source.captions(i) for i in range(3)] == [("one",), ("two",), ()]
    with pytest.raises(InputError, match=r"a\.tar: 5 is not a JPEG"):
        source.image(3)


def test_the_last_of_equal_members_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", b"old"), ("2.png", encoded(2)), ("1.png", encoded(1))])
    assert list(contents(open_source(str(tmp_path / "a.tar")))) == ["a.tar/1", "a.tar/2"]


@pytest.mark.parametrize("name", ["../../escape", "/etc/escape", "a/../../escape", "\x1b[31mescape", "x" * 3000, "é"])
def test_names_are_keys_and_never_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "a.tar", {f"{name}.png": encoded(), f"{name}.txt": b"x"})
    before = sorted(tmp_path.rglob("*"))
    assert contents(open_source(str(tmp_path / "data"))) == {f"a.tar/{name}": ("x",)}
    assert sorted(tmp_path.rglob("*")) == before


def test_links_and_devices_in_a_tar_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded())
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "1.png"), (tarfile.LNKTYPE, "2.png"), (tarfile.CHRTYPE, "3.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            tar.addfile(member)
    with pytest.raises(InputError, match="no pictures in"):
        open_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar", "w:bz2"), (".tar", "w:xz")]
)
def test_compressed_tars_are_refused_with_what_to_do(tmp_path: Path, suffix: str, mode: str) -> None:
    file = write_tar(tmp_path / f"a{suffix}", {"1.png": encoded()}, mode)
    with pytest.raises(InputError, match=r"is compressed.*unpack it"):
        open_source(str(file))


def test_a_tar_cut_short_anywhere_is_refused_or_ends_between_two_members(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", 2).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        ends = {member.offset_data + -(-member.size // 512) * 512 for member in tar}
    cut = tmp_path / "cut.tar"
    refused = 0
    for length in range(1, max(ends), 97):
        cut.write_bytes(whole[:length])
        try:
            source = open_source(str(cut))
        except InputError:
            refused += 1
            continue
        assert any(end - 511 <= length <= end for end in ends), "nothing but padding is missing"
        contents(source)
    assert refused > 20


def test_damage_between_members_is_told(tmp_path: Path) -> None:
    content = bytearray(shard(tmp_path / "a.tar", 2).read_bytes())
    with tarfile.open(tmp_path / "a.tar") as tar:
        header = tar.getmembers()[3].offset
    content[header + 100 : header + 300] = bytes(range(200))
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=rf"is not a whole tar: byte {header} begins no member"):
        open_source(str(tmp_path / "a.tar"))


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 3 << 30
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate(4 << 30)
        with pytest.raises(InputError, match="is not a whole tar: a header of 3221225472 bytes"):
            open_source(str(tmp_path / "a.tar"))


def test_texts_and_pictures_that_are_too_large_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, size in (("1.png", 1 << 30), ("1.txt", 2 << 20), ("2.png", 8), ("2.json", 2)):
            member = tarfile.TarInfo(name)
            member.size = size
            tar.fileobj.write(member.tobuf())  # type: ignore[union-attr]
            tar.fileobj.truncate(tar.fileobj.tell() + -(-size // 512) * 512)  # type: ignore[union-attr]
            tar.fileobj.seek(0, os.SEEK_END)  # type: ignore[union-attr]
            tar.offset = tar.fileobj.tell()  # type: ignore[union-attr]
    source = open_source(str(tmp_path / "a.tar"))
    for read in (source.image, source.size):
        with pytest.raises(InputError, match="1 has 1024 MiB"):
            read(0)
    with pytest.raises(InputError, match=r"1\.txt has more than 1 MiB"):
        source.captions(0)
    with pytest.raises(InputError, match=r"2\.json: not valid JSON"):
        source.captions(1)


def test_a_tar_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    source = open_source(str(shard(tmp_path / "a.tar")))
    os.truncate(tmp_path / "a.tar", 520)
    with pytest.raises(InputError, match="0 is cut short"):
        source.image(0)
    with pytest.raises(InputError):
        source.size(0)


def _read(source: PictureSource) -> list[int]:
    return [int(np.asarray(source.image(index)).sum()) for index in range(len(source))]


def test_processes_share_no_open_file(tmp_path: Path) -> None:
    source = open_source(str(shard(tmp_path / "a.tar")))
    assert isinstance(source, TarSource)
    here = _read(source)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, [source] * 4) == [here] * 4


def test_few_files_are_open_at_once(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02d}.tar", {"1.png": encoded()})
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(40), *range(40)]:
        source.size(index)
    assert len(os.listdir("/proc/self/fd")) <= before + 16
