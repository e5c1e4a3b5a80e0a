"""Weight files: published layouts in their containers, ours, shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitgen_cli.engine.infinity_weights import renamed_tokenizer, renamed_transformer
from bitgen_cli.engine.weight_files import PartWeights, is_weight_file, read_weight_file
from bitgen_cli.errors import InputError

PUBLISHED = Path(__file__).parents[1] / "parity" / "weights"
TRANSFORMER, TOKENIZER = PUBLISHED / "transformer_tiny.safetensors", PUBLISHED / "tok_d32.safetensors"


def same(found: PartWeights, expected: dict[str, Tensor]) -> bool:
    own = found.renamed.tensors
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


@pytest.fixture(scope="module")
def transformer() -> dict[str, Tensor]:
    return load_file(TRANSFORMER)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def test_published_files_hold_the_part_their_names_say(transformer: dict[str, Tensor]) -> None:
    (found,) = read_weight_file(TRANSFORMER)
    assert (found.part, found.source) == ("transformer", str(TRANSFORMER))
    assert same(found, renamed_transformer(transformer).tensors)
    assert found.renamed.unknown == []
    assert all(key.endswith("zero_k_bias") for key in found.renamed.unneeded)
    (found,) = read_weight_file(TOKENIZER)
    assert found.part == "tokenizer"
    assert "autoencoder.encoder.conv_in.weight" in found.renamed.tensors
    assert set(found.renamed.unneeded) == {"quantizer.lfq.mask", "quantize.lfq.mask"}


def test_chunked_and_plain_names_are_the_same_blocks(transformer: dict[str, Tensor]) -> None:
    """How many blocks a chunk has is what the file says, whatever the configuration."""
    expected = renamed_transformer(transformer).tensors
    plain = {}
    per_chunk = 1 + max(int(key.split(".")[3]) for key in transformer if key.startswith("block_chunks."))
    for key, tensor in transformer.items():
        if key.startswith("block_chunks."):
            _, chunk, _, index, rest = key.split(".", 4)
            key = f"blocks.{int(chunk) * per_chunk + int(index)}.{rest}"
        plain[key] = tensor
    assert same(PartWeights("transformer", "", renamed_transformer(plain)), expected)
    assert {name.split(".")[1] for name in expected if name.startswith("blocks.")} == {"0", "1", "2", "3"}


def test_containers_of_the_published_programs(tmp_path: Path, transformer: dict[str, Tensor]) -> None:
    tokenizer = load_file(TOKENIZER)
    averaged = {key: tensor + 1 if key == "pos_start" else tensor for key, tensor in transformer.items()}
    expected = renamed_transformer(transformer).tensors
    flat = saved(tmp_path / "infinity_2b_reg.pth", transformer)
    assert same(read_weight_file(flat)[0], expected)
    vae = saved(tmp_path / "infinity_vae_d32.pth", {"vae": tokenizer})
    assert same(read_weight_file(vae)[0], renamed_tokenizer(tokenizer).tensors)
    inner = {"config": {"x": 1}, "vae_local": tokenizer, "gpt_fsdp": transformer, "gpt_ema_fsdp": averaged}
    whole = saved(tmp_path / "ar-ckpt.pth", {"epoch": 1, "args": {"seed": 0}, "trainer": inner})
    parts = {found.part: found for found in read_weight_file(whole)}
    assert same(parts["transformer"], expected)
    assert same(parts["tokenizer"], renamed_tokenizer(tokenizer).tensors)
    parts = {found.part: found for found in read_weight_file(whole, averaged=True)}
    assert same(parts["transformer"], renamed_transformer(averaged).tensors)
    without = saved(tmp_path / "no-ema.pth", {"trainer": {"gpt_wo_ddp": transformer}})
    assert same(read_weight_file(without)[0], expected)
    with pytest.raises(InputError, match="holds no averaged transformer"):
        read_weight_file(without, averaged=True)
    old = saved(tmp_path / "old.pth", transformer, _use_new_zipfile_serialization=False)
    assert same(read_weight_file(old)[0], expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_with_an_index(tmp_path: Path, transformer: dict[str, Tensor], suffix: str) -> None:
    names, weight_map = sorted(transformer), {}
    for number, part in enumerate((names[:40], names[40:])):
        file = tmp_path / f"model-{number}{suffix}"
        shard = {name: transformer[name] for name in part}
        save_file(shard, file) if suffix == ".safetensors" else torch.save(shard, file)
        weight_map |= dict.fromkeys(part, file.name)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, index):
        assert is_weight_file(path)
        assert same(read_weight_file(path)[0], renamed_transformer(transformer).tensors)
    index.write_text(json.dumps({"weight_map": weight_map | {"more": f"model-0{suffix}"}}))
    with pytest.raises(InputError, match="lack 1 tensors: more"):
        read_weight_file(tmp_path)
    for outside in (f"../model-0{suffix}", f"/tmp/model-0{suffix}", "x.py"):
        index.write_text(json.dumps({"weight_map": {"pos_start": outside}}))
        with pytest.raises(InputError, match="no weight file beside it"):
            read_weight_file(tmp_path)


class Harmful:
    """What a pickle may do when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_nothing_but_tensors_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate((Harmful(), {"pos_start": torch.zeros(1), "args": Harmful()})):
        with pytest.raises(InputError, match="other things than tensors"):
            read_weight_file(saved(tmp_path / f"{number}.pth", content))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": torch.zeros(1)}, "neither a tokenizer nor a transformer: it has a"),
        ({}, "it is empty"),
        ([torch.zeros(1)], "no named tensors"),
        ({"pos_start": torch.zeros(1), "step": 3}, "'step' is no plain tensor"),
        ({"pos_start": torch.eye(3).to_sparse()}, "no plain tensor"),
        ({"blocks.0.sa.zero_k_bias": torch.ones(1), "pos_start": torch.zeros(1)}, "is not zero"),
    ],
)
def test_files_without_a_part_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_weight_file(saved(tmp_path / "file.pth", content))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04]q\x00.", b"x" * 999])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_weight_file(tmp_path / name)
    with pytest.raises(InputError, match="no file of weights"):
        read_weight_file(tmp_path / f"absent-{name}")
