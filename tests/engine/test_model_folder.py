"""The model folder: written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError
from tiny import config

from bitgen_cli.config import SamplingConfig
from bitgen_cli.engine import tensors as tensors_module
from bitgen_cli.engine.model_folder import TOKENIZER_FILE, save_model
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.errors import ResourceError


def test_a_full_disk_leaves_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    model = config()
    tokenizer = Tokenizer(model.tokenizer)
    save_model(tmp_path / "model", model, SamplingConfig(), tokenizer=tokenizer)
    before = (tmp_path / "model" / TOKENIZER_FILE).read_bytes()
    monkeypatch.setattr(tensors_module, "save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        save_model(tmp_path / "model", model, SamplingConfig(), tokenizer=tokenizer)
    assert (tmp_path / "model" / TOKENIZER_FILE).read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
