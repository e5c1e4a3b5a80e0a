"""Published weights on their way into a model folder: the file that is streamed, and the geometry read off shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitgen_cli.engine.geometry import tokenizer_geometry, transformer_geometry
from bitgen_cli.engine.infinity_weights import renamed_tokenizer, renamed_transformer
from bitgen_cli.engine.tensors import save_tensors, stream_tensors
from bitgen_cli.errors import InputError

PUBLISHED = Path(__file__).parents[1] / "parity" / "weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_streamed_files_are_those_that_are_saved(
    tmp_path: Path, dtype: torch.dtype, metadata: dict[str, str] | None
) -> None:
    tensors = {"b.weight": torch.randn(3, 5).T, "a": torch.randn(7).half(), "c": torch.tensor(2.0), "é": torch.ones(2)}
    written: list[int] = []
    stream_tensors(tensors, tmp_path / "streamed", dtype, metadata, written.append)
    save_tensors(tensors, tmp_path / "saved", dtype, metadata)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes()
    assert sum(written) == sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Tensors mapped from a file are read when their turn comes, and what was converted is gone by the next turn."""
    tensors = {str(number): torch.full((1 << 20,), float(number)) for number in range(24)}
    torch.save(tensors, tmp_path / "file.pth")
    del tensors
    mapped = torch.load(tmp_path / "file.pth", mmap=True, weights_only=True)
    before, most = _own_memory(), 0

    def look(count: int) -> None:
        nonlocal most
        most = max(most, _own_memory() - before)

    stream_tensors(mapped, tmp_path / "out", torch.bfloat16, advance=look)
    assert most < 8 * (2 << 20), "of 24 tensors of 2 MB, in 24 mapped ones of 4 MB"
    assert set(load_file(tmp_path / "out")) == set(mapped)


def _own_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def shapes(name: str) -> dict[str, Tensor]:
    stored = load_file(PUBLISHED / f"{name}.safetensors")
    renamed = renamed_tokenizer if name.startswith("tok") else renamed_transformer
    return renamed(stored).tensors


def test_geometry_is_what_the_shapes_say() -> None:
    plain = tokenizer_geometry(shapes("tok_d32"), "x")
    assert (plain.bits, plain.patch_size, plain.base_channels, plain.res_blocks) == (32, 16, 32, 1)
    assert plain.channel_multipliers == [1, 1, 1, 2, 1]
    assert tokenizer_geometry(shapes("tok_d14_f8"), "x").patch_size == 8
    found = transformer_geometry(shapes("transformer_tiny"), 32, "x")
    assert (found.depth, found.width, found.heads, found.ffn_ratio, found.patchify) == (4, 128, 2, 4, False)
    assert (found.text_width, found.text_length, found.scale_embeddings) == (256, 32, 15)
    patchified = transformer_geometry(shapes("transformer_patchify"), 14, "x")
    assert (patchified.depth, patchified.patchify) == (3, True)
    other = {**shapes("transformer_tiny"), "blocks.0.ffn.up.weight": torch.empty(768, 128, device="meta")}
    assert transformer_geometry(other, 32, "x").ffn_width == 768


def test_shapes_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="x predicts 32 bits per position, the tokenizer has 14"):
        transformer_geometry(shapes("transformer_tiny"), 14, "x")
    with pytest.raises(InputError, match="x holds no transformer of a geometry that bitgen knows"):
        transformer_geometry({"bit_embedding.weight": torch.empty(4, 2)}, None, "x")
    with pytest.raises(InputError, match="x holds no tokenizer of a geometry that bitgen knows"):
        tokenizer_geometry({"autoencoder.encoder.conv_in.weight": torch.empty(7, 3, 3, 3)}, "x")
