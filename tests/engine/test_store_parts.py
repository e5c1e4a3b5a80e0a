"""A store of several parts: joined the same whoever finishes last, and refused where parts do not belong together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_store import contents, open_writer, pictures

from bitgen_cli.engine import store_writer
from bitgen_cli.engine.scales import PUBLISHED, Schedule
from bitgen_cli.engine.store import TokenStore, is_store
from bitgen_cli.engine.store_check import check_store
from bitgen_cli.engine.store_format import StoredPart
from bitgen_cli.engine.store_parts import join, require_division
from bitgen_cli.errors import InputError
from bitgen_cli.files import only_writer
from bitgen_cli.report import Silent

TOTAL = 11


def write_part(path: Path, number: int, of: int = 3, *, finish: bool = True, **changes: Any) -> None:
    """A part of a source of 11 pictures whose aspect ratios take turns."""
    part = StoredPart(number=number, of=of, total=TOTAL)
    writer = open_writer(path / part.name, part=part, **changes)
    for index in part.range:
        ratio = 1.0 + index % 2
        if str(index) not in writer.done_keys:
            grids, latents = pictures(TOTAL, ratio)
            here = slice(index, index + 1)
            bits = [grid[here] for grid in grids]
            writer.add([str(index)], [(f"caption {index}",)], [(64, 48)], ratio, bits, latents[here])
    writer.flush()
    if finish:
        writer.finish()


@pytest.mark.parametrize("total", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("of", [1, 2, 7, 9])
def test_parts_are_ranges_that_cover_the_source(total: int, of: int) -> None:
    ranges = [StoredPart(number=number, of=of, total=total).range for number in range(1, of + 1)]
    assert [index for part in ranges for index in part] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_whoever_finishes_last_the_joined_store_is_the_same(tmp_path: Path) -> None:
    for name, order in {"a": (1, 2, 3), "b": (3, 1, 2)}.items():
        for place, number in enumerate(order):
            write_part(tmp_path / name, number)
            missing = join(tmp_path / name, 3)
            assert len(missing) == 2 - place
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    assert join(tmp_path / "a", 3) == []
    assert contents(tmp_path / "a") == before
    store = TokenStore.open(tmp_path / "a")
    assert sorted(store.keys, key=int) == [str(index) for index in range(TOTAL)]
    part_of = {index: number for number in (1, 2, 3) for index in StoredPart(number=number, of=3, total=TOTAL).range}
    assert [part_of[int(key)] for key in store.keys] == sorted(part_of.values())
    for ratio in store.ratios:
        grids, latents = pictures(TOTAL, ratio)
        indices = store.indices_of(ratio)
        rows = [int(store.keys[index]) for index in indices]
        assert all(torch.equal(a, b[rows]) for a, b in zip(store.bits(indices), grids, strict=True))
        stored = store.latents(indices)
        assert stored is not None
        assert torch.equal(stored, latents[rows])
    assert check_store(tmp_path / "a", Silent()).faults == []


def test_missing_and_unfinished_parts_are_named(tmp_path: Path) -> None:
    write_part(tmp_path, 1)
    write_part(tmp_path, 3, finish=False)
    assert is_store(tmp_path)
    said = r"unfinished: part 2 of 3 is missing; part 3 of 3 is unfinished \(4 pictures so far\).*--shard I/3"
    with pytest.raises(InputError, match=said):
        TokenStore.open(tmp_path)
    with pytest.raises(InputError, match=said):
        check_store(tmp_path, Silent())
    write_part(tmp_path, 2)
    write_part(tmp_path, 3)
    with pytest.raises(InputError, match="its parts are not joined"):
        TokenStore.open(tmp_path)
    assert join(tmp_path, 3) == []
    assert len(TokenStore.open(tmp_path)) == TOTAL


def test_pictures_in_folders_named_like_parts_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "part-1-of-2").mkdir()
    (tmp_path / "part-1-of-2" / "dog.jpg").write_bytes(b"")
    assert not is_store(tmp_path)


def test_more_parts_than_pictures_leave_empty_ones(tmp_path: Path) -> None:
    for number in range(1, 14):
        write_part(tmp_path, number, 13)
    assert join(tmp_path, 13) == []
    assert len(TokenStore.open(tmp_path)) == TOTAL


def test_divisions_are_not_mixed(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 1)
    open_writer(tmp_path / "whole").finish()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for name, of, said in (
        ("parts", 2, "made in 3 parts, not in 2"),
        ("parts", None, "made in 3 parts .*--shard 1/3"),
        ("whole", 2, "one piece, not in 2 parts"),
        ("mine", 2, "not empty and not a token store"),
    ):
        with pytest.raises(InputError, match=said):
            require_division(tmp_path / name, of)
    for name, of in (("parts", 3), ("whole", None), ("new", 3), ("new", None)):
        require_division(tmp_path / name, of)


def test_a_part_of_another_source_is_not_gone_on_with(tmp_path: Path) -> None:
    write_part(tmp_path, 1)
    with pytest.raises(InputError, match="part-1-of-3 of 11 pictures, not part-1-of-3 of 12 pictures"):
        open_writer(tmp_path / "part-1-of-3", part=StoredPart(number=1, of=3, total=12))


def test_parts_that_do_not_belong_together_are_not_joined(tmp_path: Path) -> None:
    write_part(tmp_path / "a", 1, 2)
    write_part(tmp_path / "a", 2, 2, tokenizer="cd" * 32)
    with pytest.raises(InputError, match=r"part 2 .* has another tokenizer than part 1"):
        join(tmp_path / "a", 2)
    write_part(tmp_path / "b", 1, 2)
    (tmp_path / "b" / "part-1-of-2").rename(tmp_path / "b" / "part-2-of-2")
    write_part(tmp_path / "b", 1, 2)
    with pytest.raises(InputError, match=r"part 2 .* has another number"):
        join(tmp_path / "b", 2)
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_picture_in_two_parts_is_found(tmp_path: Path) -> None:
    write_part(tmp_path, 1, 2)
    part = StoredPart(number=2, of=2, total=TOTAL)
    writer = open_writer(tmp_path / part.name, part=part)
    grids, latents = pictures(1, 1.0)
    writer.add(["2"], [("again",)], [(64, 64)], 1.0, grids, latents)
    writer.finish()
    with pytest.raises(InputError, match=r"hold the same pictures: 2 \(the source changed"):
        join(tmp_path, 2)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_part(tmp_path, number)
    join(tmp_path, 3)
    shard = tmp_path / "part-2-of-3" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (tmp_path / "part-3-of-3" / "shard-00001.jsonl").unlink()
    faults = check_store(tmp_path, Silent()).faults
    assert [(fault.file, fault.reason) for fault in faults] == [
        ("part-2-of-3/shard-00000.safetensors", "its contents are not what was written"),
        ("part-3-of-3/shard-00001.jsonl", "it is missing"),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "../part-1-of-3/shard-00000.jsonl",
        "part-1-of-3/../shard-00000.jsonl",
        "part-1-of-3/part-1-of-3/shard-00000.jsonl",
        "/part-1-of-3/shard-00000.jsonl",
        "part-0-of-3/shard-00000.jsonl",
        "shard-00000.jsonl\n",
    ],
)
def test_a_manifest_names_no_file_outside_its_parts(tmp_path: Path, name: str) -> None:
    for number in (1, 2, 3):
        write_part(tmp_path, number)
    join(tmp_path, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["captions"]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"shards\.0\.captions\.file"):
        TokenStore.open(tmp_path)


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom bitgen_cli.files import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(InputError, match="another process is writing to"), only_writer(tmp_path):
            pass
        other.kill()
        other.wait()
        with only_writer(tmp_path):
            refused = subprocess.run(command, input="", capture_output=True, text=True)
            assert "another process is writing" in refused.stderr
    started = time.perf_counter()
    with only_writer(tmp_path, wait=True):
        assert time.perf_counter() - started < 10


def test_all_buffers_together_stay_below_their_bound(tmp_path: Path) -> None:
    """64 bits at 1024x1024 in 15 aspect ratios: a shard of 1024 pictures each would be 8 GB."""
    schedules = {ratio: Schedule(ratio, sizes, sizes[-1]) for ratio, sizes in PUBLISHED.items()}
    writer = open_writer(tmp_path / "s", bits=64, schedules=schedules, shard_size=store_writer.SHARD_SIZE)
    waiting = 0
    for ratio, schedule in schedules.items():
        height, width = schedule.full
        waiting += writer.room(ratio) * (2 * 64 * height * width + 8 * schedule.positions)
        assert 1 < writer.room(ratio) < store_writer.SHARD_SIZE
    assert 0.9 * store_writer.BUFFERED < waiting <= store_writer.BUFFERED


def test_smaller_buffers_make_smaller_shards_of_the_same_pictures(tmp_path: Path) -> None:
    small = open_writer(tmp_path / "small", buffered=2 * 2 * (14 * 2 + 2 * 11 * 9), shard_size=100)
    assert [small.room(ratio) for ratio in (1.0, 2.0)] == [2, 2]
    grids, latents = pictures(5, 1.0)
    small.add(list("abcde"), [()] * 5, [(8, 8)] * 5, 1.0, grids, latents)
    small.finish()
    store = TokenStore.open(tmp_path / "small")
    assert [shard.count for shard in store.manifest.shards] == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(store.bits(range(5)), grids, strict=True))
