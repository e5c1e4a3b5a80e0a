"""Memory of sampling against what the engine allocates, and parameter counts against real modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from bitgen_cli.config import Config, TextEncoderConfig
from bitgen_cli.engine import memory
from bitgen_cli.engine.convolution import Conv3, DoublingConv3
from bitgen_cli.engine.rehearsal import Watched, infer
from bitgen_cli.engine.sampling import draw_bits, plan
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.errors import InputError
from bitgen_cli.presets import resolve

GEOMETRY = TextEncoderConfig(source="new", vocabulary=50, width=32, layers=3, heads=4, ffn_width=48)


def config_of(*overrides: str) -> Config:
    return resolve("demo", overrides=overrides, environment={}).config


def square(config: Config) -> Schedule:
    return schedule(config.model.scales, patchify=config.model.transformer.patchify)


def test_sampling_cache_is_that_of_the_engine() -> None:
    config = config_of()
    scales, geometry = square(config), config.model.transformer
    found = memory.sampling_memory(
        config.model, memory.parameters(config.model), scales, memory.FP32, pictures=3
    )
    cache = Transformer(config.model).new_cache(6, scales)
    keys, values = cache.extend(
        0, slice(0, 0), torch.zeros(6, geometry.heads, 0, 48), torch.zeros(6, geometry.heads, 0, 48)
    )
    assert keys.untyped_storage().nbytes() == values.untyped_storage().nbytes() == found.kv_cache
    half = memory.sampling_memory(
        config.model, memory.parameters(config.model), scales, memory.BF16, pictures=3
    )
    assert half.kv_cache * 2 == found.kv_cache
    assert half.transformer * 2 == found.transformer
    assert half.text_encoder * 2 == found.text_encoder
    assert half.total < found.total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_derived_for_decoding_are_counted(dtype: torch.dtype) -> None:
    config = config_of("model.tokenizer.base_channels=128", "model.tokenizer.channel_multipliers=[1,1,1,1]")
    tokenizer = Tokenizer(config.model.tokenizer).requires_grad_(False).to(dtype)
    with torch.inference_mode():
        tokenizer.decode(tokenizer.latent(torch.zeros(1, 3, 64, 64, dtype=dtype)))

    def made(part: nn.Module) -> int:
        derived = [m.derived for m in part.modules() if isinstance(m, Conv3 | DoublingConv3)]
        return sum(weight.numel() for weight in derived if weight is not None)

    encoder, decoder = made(tokenizer.autoencoder.encoder), made(tokenizer.autoencoder.decoder)
    counts, scales = memory.parameters(config.model), square(config)
    assert memory.sampling_memory(config.model, counts, scales, dtype.itemsize).derived == decoder * dtype.itemsize > 0
    both = memory.derived_weights(config.model.tokenizer, scales, dtype.itemsize, encoder=True)
    assert both == (encoder + decoder) * dtype.itemsize
    assert (encoder > 0) == (dtype == torch.float32)


def test_text_encoders_have_the_size_transformers_gives_them() -> None:
    from transformers import T5Config, T5EncoderModel

    xl = memory.KNOWN_TEXT_ENCODERS["google/flan-t5-xl"]
    own = memory.text_geometry(GEOMETRY)
    assert own is not None
    for geometry in (xl, own):
        with torch.device("meta"):
            encoder = T5EncoderModel(
                T5Config(
                    vocab_size=geometry.vocabulary,
                    d_model=geometry.width,
                    d_kv=geometry.head_width,
                    d_ff=geometry.ffn_width,
                    num_layers=geometry.layers,
                    num_heads=geometry.heads,
                    feed_forward_proj="gated-gelu",
                )
            )
        assert geometry.parameters == sum(p.numel() for p in encoder.parameters())
    assert xl.parameters == 1_223_527_424


def test_text_encoder_in_a_folder(tmp_path: Path) -> None:
    described = {"vocab_size": 50, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48}
    (tmp_path / "config.json").write_text(json.dumps(described))
    folder = TextEncoderConfig(source=str(tmp_path))
    assert memory.text_geometry(folder) == memory.text_geometry(GEOMETRY)
    (tmp_path / "config.json").write_text('{"d_model": 32}')
    with pytest.raises(InputError, match="does not describe a T5 encoder"):
        memory.text_geometry(folder)


def test_unknown_text_encoder_has_no_size() -> None:
    config = resolve(
        "32bit", overrides=["model.text_encoder.source=somebody/some-t5"], environment={}
    ).config.model
    counts = memory.parameters(config)
    assert counts.text_encoder is None
    assert counts.total == counts.tokenizer + counts.transformer


def test_store_bytes() -> None:
    model = resolve("infinity-8b", environment={}).config.model
    scales = schedule(model.scales, patchify=True, resolution="0.06M")
    assert memory.store_bytes(model, scales) == memory.StoreBytes(521 * 7, 14 * 32 * 32 * 2)


@pytest.mark.parametrize("preset", ["infinity-2b", "infinity-8b"])
def test_drawing_at_1024_holds_what_is_estimated(preset: str) -> None:
    """The engine's own walk on tensors without contents, with few of the blocks. A GPU held 0.4 % more with all."""
    config = resolve(preset, environment={}).config
    model = memory.with_depth(config.model, 3)
    scales = schedule(model.scales, patchify=model.transformer.patchify)
    how = plan(config.sampling, len(scales))
    with torch.device("meta"):
        transformer = Transformer(model).to(torch.bfloat16).eval().requires_grad_(False)
        text = TextFeatures(torch.zeros(1, 20, model.transformer.text_width, dtype=torch.bfloat16), (20,))
    with Watched() as watched:
        drawn = infer(watched, transformer, lambda: draw_bits(transformer, text, scales, how, [0]))
    found = memory.sampling_memory(model, memory.parameters(model), scales, memory.BF16, tokens=20)
    held = found.kv_cache + found.text_cache + found.transformer_work
    assert drawn == pytest.approx(held, rel=0.05)
