"""Text features on disk: found as they were kept, by everything they depend on, and never trusted blindly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitgen_cli.engine.text_cache import TextCache, TextKey
from bitgen_cli.errors import InputError

KEY = TextKey("ab" * 32, "bf16 torch.bfloat16", "cpu", "torch 2", 8, 16, "a red dog", (("cd" * 32, 1.0),))
FEATURES = torch.arange(5 * 16, dtype=torch.float32).reshape(5, 16) / 7
CHANGES = {
    "encoder": "ef" * 32,
    "dtype": "fp32 torch.float32",
    "device": "cuda",
    "libraries": "torch 3",
    "length": 9,
    "width": 17,
    "prompt": "a red dog ",
    "subjects": (("cd" * 32, 0.5),),
}


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "text")


def only_file(cache: TextCache) -> Path:
    (file,) = cache.folder.iterdir()
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_to_the_last_bit_and_the_prompt_is_written_nowhere(
    cache: TextCache, dtype: torch.dtype
) -> None:
    assert cache.find(KEY) is None
    cache.keep(KEY, FEATURES.to(dtype))
    found = cache.find(KEY)
    assert found is not None
    assert found.dtype == dtype
    assert torch.equal(found, FEATURES.to(dtype))
    assert b"red dog" not in only_file(cache).read_bytes()


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_is_everything_that_features_depend_on(cache: TextCache, name: str) -> None:
    assert CHANGES.keys() == TextKey.__dataclass_fields__.keys()
    cache.keep(KEY, FEATURES)
    assert cache.find(replace(KEY, **{name: CHANGES[name]})) is None


def test_the_order_of_subjects_is_nothing(cache: TextCache) -> None:
    one, two = ("12" * 32, 1.0), ("34" * 32, 1.0)
    cache.keep(replace(KEY, subjects=(one, two)), FEATURES)
    assert cache.find(replace(KEY, subjects=(two, one))) is not None


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def with_tensors(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda file: save_file(tensors, file, metadata={"key": KEY.digest, "sha256": "00" * 32})


def replaced_by_another(file: Path) -> None:
    other = TextCache(file.parent / "other")
    other.keep(replace(KEY, prompt="a cat"), FEATURES)
    only_file(other).replace(file)


def made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed byte": changed,
    "cut": lambda file: os.truncate(file, 200),
    "empty": lambda file: os.truncate(file, 0),
    "huge": lambda file: os.truncate(file, 2**33),
    "a header that is too long": lambda file: file.write_bytes(b"\xff" * 64),
    "no features": with_tensors(other=FEATURES),
    "too many rows": with_tensors(features=torch.zeros(9, 16)),
    "no rows": with_tensors(features=torch.zeros(0, 16)),
    "another width": with_tensors(features=torch.zeros(5, 8)),
    "another type": with_tensors(features=torch.zeros(5, 16, dtype=torch.int64)),
    "another checksum": with_tensors(features=FEATURES.clone()),
    "another prompt's": replaced_by_another,
    "a folder": made_a_folder,
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_what_is_not_what_was_written_is_not_there(cache: TextCache, damage: Callable[[Path], object]) -> None:
    cache.keep(KEY, FEATURES)
    damage(only_file(cache))
    assert cache.find(KEY) is None


def test_a_damaged_file_is_replaced(cache: TextCache) -> None:
    cache.keep(KEY, FEATURES)
    changed(only_file(cache))
    cache.keep(KEY, FEATURES)
    assert cache.find(KEY) is not None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = TextCache(tmp_path)
    keys = [replace(KEY, prompt=str(number)) for number in range(4)]
    for age, key in enumerate(keys):
        cache.keep(key, FEATURES)
        os.utime(tmp_path / f"{key.digest}.safetensors", (age, age))
    assert cache.find(keys[0]) is not None  # used: it is the youngest now
    size = (tmp_path / f"{keys[0].digest}.safetensors").stat().st_size
    TextCache(tmp_path, 4 * size).prune()
    assert len(list(tmp_path.iterdir())) == 4
    TextCache(tmp_path, 2 * size).prune()
    assert [cache.find(key) is not None for key in keys] == [True, False, False, True]


def test_only_its_own_files_are_deleted(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, 0)
    cache.keep(KEY, FEATURES)
    names = {"notes.txt", "mine.safetensors", f".{KEY.digest}.safetensors.2.partial"}
    for name in (*names, ".old.3.partial"):
        (tmp_path / name).write_bytes(b"x" * 99)
    os.utime(tmp_path / ".old.3.partial", (0, 0))
    cache.prune()
    assert {file.name for file in tmp_path.iterdir()} == names
    TextCache(tmp_path / "missing").prune()


def use(folder: Path) -> None:
    """A process that keeps, finds and deletes what others do too; it fails when it finds what was not kept."""
    found = 0
    for round_ in range(40):
        key = replace(KEY, prompt=str(round_ % 3))
        cache = TextCache(folder, 0 if round_ % 5 == 0 else 2**20)
        cache.keep(key, FEATURES + round_ % 3)
        features = cache.find(key)
        found += features is not None
        assert features is None or torch.equal(features, FEATURES + round_ % 3)
        cache.prune()
    assert found > 10


def test_several_processes_use_it_at_once(tmp_path: Path) -> None:
    processes = [get_context("fork").Process(target=use, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.glob(".*"))


def test_where_nothing_can_be_kept_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a file")
    cache = TextCache(tmp_path / "text")
    assert cache.find(KEY) is None
    with pytest.raises(InputError):
        cache.keep(KEY, FEATURES)
    cache.prune()
