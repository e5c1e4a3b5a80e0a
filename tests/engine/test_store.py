"""The token store: exact round trips, resuming, and refusing what is damaged or foreign."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitgen_cli.engine import pyramid, store_writer
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_check import Fault, check_store
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.errors import InputError, ResourceError
from bitgen_cli.report import Silent

TOKENIZER = "ab" * 32


def schedules(cell: int = 1) -> dict[float, Schedule]:
    return {
        1.0: Schedule(1.0, ((1, 1), (2, 2), (3, 3)), (3, 3), cell),
        2.0: Schedule(2.0, ((1, 1), (4, 2)), (8, 4), cell),
    }


def open_writer(path: Path, cell: int = 1, **changes: Any) -> StoreWriter:
    values: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "source": "test",
        "bits": 11,
        "patch_size": 8,
        "schedules": schedules(cell),
        "latents": True,
        "shard_size": 4,
    }
    return StoreWriter(path, **{**values, **changes})


def pictures(count: int, ratio: float, cell: int = 1, bits: int = 11) -> tuple[list[Tensor], Tensor]:
    """Bits per scale and latents of made-up pictures, the same every time."""
    schedule = schedules(cell)[ratio]
    generator = torch.Generator().manual_seed(int(ratio * 10))
    latents = torch.randn(count, bits, *schedule.latent_sizes[-1], generator=generator).bfloat16().float()
    return pyramid.encode(latents, schedule)[0], latents


def fill(writer: StoreWriter, count: int = 6, cell: int = 1, bits: int = 11, batch: int = 2) -> None:
    """Adds that many pictures of each ratio, ratios taking turns, leaving out those already there."""
    for start in range(0, count, batch):
        for ratio in schedules(cell):
            grids, latents = pictures(count, ratio, cell, bits)
            numbers = [
                n for n in range(start, min(start + batch, count)) if f"{ratio}/{n}" not in writer.done_keys
            ]
            if numbers:
                writer.add(
                    [f"{ratio}/{n}" for n in numbers],
                    [captions(n) for n in numbers],
                    [(10 + n, 20) for n in numbers],
                    ratio,
                    [grid[numbers] for grid in grids],
                    latents[numbers] if writer.manifest.latents else None,
                )


def captions(number: int) -> tuple[str, ...]:
    """None, one and several in turn."""
    return tuple(f"caption \u2028 {number}.{place}" for place in range(number % 3))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("bits", [3, 8, 11, 14])
def test_bits_and_latents_come_back_exactly(tmp_path: Path, cell: int, bits: int) -> None:
    writer = open_writer(tmp_path / "s", cell, bits=bits)
    fill(writer, 6, cell, bits)
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    assert check_store(tmp_path / "s", Silent()).faults == []
    assert len(store) == 12
    assert store.ratios == [1.0, 2.0]
    for ratio in store.ratios:
        grids, latents = pictures(6, ratio, cell, bits)
        indices = store.indices_of(ratio)
        assert [store.keys[i] for i in indices] == [f"{ratio}/{n}" for n in range(6)]
        assert [store.captions[i] for i in indices] == [captions(n) for n in range(6)]
        assert [store.sizes[i] for i in indices] == [(10 + n, 20) for n in range(6)]
        assert {store.ratio(i) for i in indices} == {ratio}
        # across shards, unordered, with a repetition
        order = [5, 0, 3, 3, 4]
        chosen = [indices[n] for n in order]
        read = store.bits(chosen)
        assert all(grid.dtype == torch.bool for grid in read)
        assert len(read) == len(grids)
        assert all(torch.equal(got, grid[order]) for got, grid in zip(read, grids, strict=True))
        stored = store.latents(chosen)
        assert stored is not None
        assert stored.dtype == torch.float32
        assert torch.equal(stored, latents[order])
        assert store.schedule(ratio) == schedules(cell)[ratio]


def test_bytes_per_position_are_as_few_as_possible(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "s")
    fill(writer)
    writer.finish()
    tensors = load_file(tmp_path / "s" / "shard-00000.safetensors")
    assert tensors["bits"].shape == (4, 14, 2)
    assert tensors["bits"].dtype == torch.uint8
    assert tensors["latents"].dtype == torch.bfloat16


def test_a_store_without_latents_says_none(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "s", latents=False)
    fill(writer)
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    assert store.latents([0]) is None
    assert set(load_file(tmp_path / "s" / "shard-00000.safetensors")) == {"bits"}


def test_pictures_of_two_ratios_are_not_one_batch(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "s")
    fill(writer)
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    with pytest.raises(ValueError, match="2 aspect ratios"):
        store.bits([store.indices_of(1.0)[0], store.indices_of(2.0)[0]])


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 3])
def test_interrupted_and_continued_equals_straight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """Killed while writing any of the four shards: the store ends byte for byte the same."""
    straight = open_writer(tmp_path / "straight")
    fill(straight)
    straight.finish()
    assert len(straight.manifest.shards) == 4

    class Killed(Exception):
        pass

    write, written = StoreWriter._write_file, []

    def write_or_die(self: StoreWriter, name: str, content: bytes) -> Any:
        if len(written) == 2 * stopped_after + 1:
            raise Killed
        written.append(name)
        return write(self, name, content)

    monkeypatch.setattr(StoreWriter, "_write_file", write_or_die)
    stopped = open_writer(tmp_path / "stopped")
    with pytest.raises(Killed):  # noqa: PT012 - either of the two is stopped
        fill(stopped)
        stopped.finish()
    monkeypatch.undo()
    with pytest.raises(InputError, match="unfinished"):
        TokenStore.open(tmp_path / "stopped")

    again = open_writer(tmp_path / "stopped")
    assert len(again.done_keys) == again.manifest.count < 12
    fill(again)
    again.finish()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_large_batch_is_spread_over_shards(tmp_path: Path) -> None:
    one, many = open_writer(tmp_path / "one"), open_writer(tmp_path / "many")
    assert one.room(1.0) == 4
    fill(one, 11, batch=11)
    assert one.room(1.0) == 1
    fill(many, 11, batch=1)
    for writer in (one, many):
        writer.finish()
    first, second = TokenStore.open(tmp_path / "one"), TokenStore.open(tmp_path / "many")
    assert [shard.count for shard in first.manifest.shards] == [4, 4, 4, 4, 3, 3]
    for ratio in first.ratios:
        pairs = zip(first.bits(first.indices_of(ratio)), second.bits(second.indices_of(ratio)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_finishing_twice_changes_nothing(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "s")
    fill(writer)
    writer.finish()
    before = contents(tmp_path / "s")
    again = open_writer(tmp_path / "s")
    assert len(again.done_keys) == 12
    again.finish()
    assert contents(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "cd" * 32}, "another tokenizer: abababababab, not cdcdcdcdcdcd"),
        ({"source": "other"}, "another pictures' source"),
        ({"bits": 12}, "another number of bits: 11, not 12"),
        ({"patch_size": 16}, "another patch size"),
        ({"latents": False}, "another choice of latents"),
        ({"schedules": schedules(2)}, "another cell size"),
        ({"schedules": {1.0: schedules()[1.0]}}, "another choice of aspect ratios"),
        (
            {"schedules": {**schedules(), 2.0: Schedule(2.0, ((1, 1), (4, 2)), (4, 2), 1)}},
            "another schedule of ratio 2.0",
        ),
    ],
)
def test_another_store_is_not_continued(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    fill(open_writer(tmp_path / "s"))
    before = contents(tmp_path / "s")
    with pytest.raises(InputError, match=said):
        open_writer(tmp_path / "s", **changes)
    assert contents(tmp_path / "s") == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and not a token store"):
        open_writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_and_loses_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = open_writer(tmp_path / "s")
    fill(writer, 4)
    assert writer.manifest.count == 8

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_writer, "sha256", full)
    fill(writer, 6)
    with pytest.raises(ResourceError, match="no space left"):
        writer.finish()
    monkeypatch.undo()
    assert open_writer(tmp_path / "s").manifest.count == 8


def finished(path: Path) -> Path:
    writer = open_writer(path)
    fill(writer)
    writer.finish()
    return path


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone does not exist"):
        TokenStore.open(tmp_path / "gone")
    with pytest.raises(InputError, match="is not a token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(InputError, match=r"manifest\.json does not describe a token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not valid JSON"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(version=1), "version 1, this bitgen reads version 2.*tokenize"),
        (lambda m: m.update(bits=0), "bits"),
        (lambda m: m.update(count=13), "counts do not add up"),
        (lambda m: m.update(schedules=m["schedules"][:1]), "no schedule"),
        (
            lambda m: m["shards"][0]["tokens"].update(file="../../secret.safetensors"),
            r"shards\.0\.tokens\.file",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = finished(tmp_path / "s")
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=said) as caught:
        TokenStore.open(path)
    assert "\n" not in str(caught.value)


def test_missing_and_shortened_files_are_named_at_once(tmp_path: Path) -> None:
    path = finished(tmp_path / "s")
    shard = path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is corrupt: it has \d+ bytes instead of"):
        TokenStore.open(path)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is corrupt: it is missing"):
        TokenStore.open(path)


def test_verify_finds_a_changed_byte(tmp_path: Path) -> None:
    path = finished(tmp_path / "s")
    shard = path / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    TokenStore.open(path)
    fault = Fault("shard-00002.safetensors", "its contents are not what was written")
    assert check_store(path, Silent()).faults == [fault]


def test_a_broken_header_and_foreign_tensors_are_refused_when_read(tmp_path: Path) -> None:
    path = finished(tmp_path / "s")
    shard = path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(b"\xff" * 16 + whole[16:])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is corrupt"):
        TokenStore.open(path).bits([0])
    save_file({"weights": torch.zeros(3)}, shard)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["tokens"]["bytes"] = shard.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not those the manifest promises"):
        TokenStore.open(path).bits([0])


def test_broken_captions_are_named(tmp_path: Path) -> None:
    path = finished(tmp_path / "s")
    captions = path / "shard-00000.jsonl"
    size = captions.stat().st_size
    captions.write_bytes(b"x" * size)
    with pytest.raises(InputError, match=r"shard-00000\.jsonl is corrupt"):
        TokenStore.open(path)
    captions.write_bytes(b"{}".ljust(size))
    with pytest.raises(InputError, match=r"shard-00000\.jsonl is corrupt"):
        TokenStore.open(path)


def test_captions_are_lists_of_text(tmp_path: Path) -> None:
    for number, wrong in enumerate(("ab", [1], None)):
        path = finished(tmp_path / f"s{number}")
        file = path / "shard-00000.jsonl"
        size, lines = file.stat().st_size, file.read_text().split("\n")
        row = json.loads(lines[1])
        lines[1] = json.dumps({**row, "captions": wrong})
        file.write_bytes("\n".join(lines).encode().ljust(size, b"\n")[:size])
        with pytest.raises(InputError, match="corrupt"):
            TokenStore.open(path)


def test_texts_are_all_captions_of_all_pictures(tmp_path: Path) -> None:
    store = TokenStore.open(finished(tmp_path / "s"))
    assert len([text for several in store.captions for text in several]) == 12


def test_a_moved_store_opens(tmp_path: Path) -> None:
    shutil.move(finished(tmp_path / "s"), tmp_path / "elsewhere")
    assert len(TokenStore.open(tmp_path / "elsewhere")) == 12
