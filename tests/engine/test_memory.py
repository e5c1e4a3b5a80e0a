"""Memory estimates against the tensors autograd really keeps, and parameter counts against real modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitgen_cli.config import Config, TextEncoderConfig
from bitgen_cli.engine import lora, memory
from bitgen_cli.engine.convolution import Conv3, DoublingConv3
from bitgen_cli.engine.losses import bit_loss, one_rank
from bitgen_cli.engine.parts import is_trained
from bitgen_cli.engine.scales import Schedule, schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_loss import TokenizerLoss, trained_module
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.errors import InputError
from bitgen_cli.presets import resolve

GEOMETRY = TextEncoderConfig(source="new", vocabulary=50, width=32, layers=3, heads=4, ffn_width=48)


def config_of(*overrides: str) -> Config:
    return resolve("demo", overrides=overrides, environment={}).config


def square(config: Config) -> Schedule:
    return schedule(config.model.scales, patchify=config.model.transformer.patchify)


def kept_bytes(module: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes of the storages autograd keeps, without the module's own weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def transformer_bytes(config: Config, batch: int) -> int:
    training, scales = config.training.transformer, square(config)
    assert training is not None
    transformer = Transformer(config.model)
    transformer.initialise(torch.Generator().manual_seed(0))
    transformer.checkpoint_activations = training.checkpoint_activations
    geometry, bits = config.model.transformer, config.model.bits_per_position
    inputs = torch.randn(batch, scales.positions - 1, bits)
    targets = torch.rand(batch, scales.positions, bits) < 0.5
    text = TextFeatures(
        torch.randn(batch, geometry.text_length, geometry.text_width), (geometry.text_length,) * batch
    )

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
            logits = transformer.train()(inputs, text, scales)
        return bit_loss(logits, targets, scales, training)[0]

    return kept_bytes(transformer, loss)


def tokenizer_bytes(config: Config, batch: int) -> int:
    training, scales = config.training.tokenizer, square(config)
    assert training is not None
    module = trained_module(config, Tokenizer(config.model.tokenizer))
    bits, last = config.model.tokenizer.bit_counts, module.tokenizer.autoencoder.decoder.conv_out
    image = torch.rand(batch, 3, *scales.pixels(config.model.tokenizer.patch_size)) * 2 - 1

    def loss() -> Tensor:
        return TokenizerLoss(training, False).whole(image, module(image, scales, bits), last, one_rank)[0]

    return kept_bytes(module, loss)


TEXT_OUTSIDE = ("model.text_encoder.layers=1", "model.text_encoder.ffn_width=1", "model.text_encoder.heads=1")
"""The smallest trained text encoder: the transformer is measured without one."""
WIDE = ("model.transformer.ffn_ratio=8", "model.transformer.depth=3")


@pytest.mark.parametrize("changes", [(), WIDE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_the_transformer(precision: str, changes: tuple[str, ...]) -> None:
    config = config_of(
        f"training.transformer.precision={precision}",
        "training.transformer.batch_size=4",
        *TEXT_OUTSIDE,
        *changes,
    )
    counts = memory.parameters(config.model)
    estimate = memory.transformer_training_memory(config, counts, square(config))
    assert estimate is not None
    ratio = estimate.activations / transformer_bytes(config, 4)
    low, high = {"fp32": (0.97, 1.08), "bf16": (0.97, 1.25)}[precision]
    assert low < ratio < high


def test_recomputed_blocks_keep_less() -> None:
    sizes = {}
    for recomputed in ("true", "false"):
        config = config_of(
            f"training.transformer.checkpoint_activations={recomputed}", "training.transformer.precision=fp32"
        )
        estimate = memory.transformer_training_memory(config, memory.parameters(config.model), square(config))
        assert estimate is not None
        sizes[recomputed] = estimate.activations
    assert sizes["true"] < 0.6 * sizes["false"]


@pytest.mark.parametrize(
    "changes", [(), ("model.tokenizer.res_blocks=2", "model.tokenizer.base_channels=48")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_the_tokenizer(precision: str, changes: tuple[str, ...]) -> None:
    config = config_of(
        f"training.tokenizer.precision={precision}", "training.tokenizer.batch_size=2", *changes
    )
    counts = memory.parameters(config.model)
    estimate = memory.tokenizer_training_memory(config, counts, square(config))
    assert estimate is not None
    ratio = estimate.activations / tokenizer_bytes(config, 2)
    low, high = {"fp32": (0.97, 1.03), "bf16": (1.0, 1.6)}[precision]
    assert low < ratio < high


def test_training_adds_up() -> None:
    config = config_of("training.tokenizer.accumulation=2", "training.tokenizer.ema_decay=0")
    counts = memory.parameters(config.model)
    found = memory.tokenizer_training_memory(config, counts, square(config))
    assert found is not None
    assert found.weights == found.gradients == found.optimizer // 2 == counts.tokenizer * 4
    assert found.total == counts.tokenizer * 16 + found.activations
    averaged = config_of("training.tokenizer.ema_decay=0.9", "training.tokenizer.accumulation=1")
    other = memory.tokenizer_training_memory(averaged, counts, square(averaged))
    assert other is not None
    assert other.total == counts.tokenizer * 16 + max(other.activations, counts.tokenizer * 8)


def test_no_recipe_no_estimate() -> None:
    config = config_of("training.tokenizer=null", "training.transformer=null")
    counts = memory.parameters(config.model)
    assert memory.tokenizer_training_memory(config, counts, square(config)) is None
    assert memory.transformer_training_memory(config, counts, square(config)) is None


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
    assert half.weights * 2 == found.weights
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
    assert memory._derived(memory._encoder_convs(config.model.tokenizer, scales), dtype.itemsize) == encoder
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


CHOICES = [
    ["token"],
    ["token", "lora"],
    ["token", "cross", "ffn"],
    ["cross"],
    ["ffn"],
    ["self"],
    ["lora"],
    ["token", "self", "cross"],
]


def subject_bytes(config: Config, batch: int, tokens: int) -> int:
    training, scales = config.training.subject, square(config)
    assert training is not None
    transformer = Transformer(config.model)
    transformer.initialise(torch.Generator().manual_seed(0))
    transformer.checkpoint_activations = training.checkpoint_activations
    parts = set[str](training.train)
    if "lora" in parts:
        lora.attach(transformer, training.lora_layers, training.lora_rank, training.lora_alpha, 0)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(is_trained(f"transformer.{name}", parts))
    bits = config.model.bits_per_position
    inputs = torch.randn(batch, scales.positions - 1, bits)
    targets = torch.rand(batch, scales.positions, bits) < 0.5
    features = torch.randn(batch, tokens, config.model.transformer.text_width, requires_grad="token" in parts)
    text = TextFeatures(features, (tokens,) * batch)
    return kept_bytes(
        transformer, lambda: bit_loss(transformer.train()(inputs, text, scales), targets, scales, training)[0]
    )


@pytest.mark.parametrize("parts", CHOICES, ids="+".join)
def test_activations_of_learning_a_subject(parts: list[str]) -> None:
    """Within 15 %: what a choice of parts saves is real."""
    config = config_of(f"training.subject.train={json.dumps(parts)}", "training.subject.batch_size=2", *TEXT_OUTSIDE)
    counts = memory.parameters(config.model)
    estimate = memory.subject_training_memory(config, counts, square(config), 6, autoencoder=True)
    batch = 2 if parts == ["token"] else 4  # the token alone learns without class samples
    assert 0.87 < estimate.activations / subject_bytes(config, batch, 6) < 1.15


def test_learning_a_subject_adds_up() -> None:
    found = {}
    for parts in ('["token"]', '["token", "lora"]', '["token", "cross", "ffn"]', '["all"]'):
        config = config_of(f"training.subject.train={parts}")
        counts = memory.parameters(config.model)
        found[parts] = memory.subject_training_memory(config, counts, square(config), 6, autoencoder=True)
    assert found['["token"]'].optimizer == 0
    totals = [estimate.total for estimate in found.values()]
    assert totals == sorted(totals)
    everything = found['["all"]']
    counts = memory.parameters(config_of().model)
    assert counts.text_encoder is not None
    table = 512 * 128
    assert everything.gradients == 4 * (counts.transformer + counts.text_encoder - table)
    derived = memory.sampling_memory(config.model, counts, square(config), 4).derived
    assert everything.frozen == 4 * (counts.tokenizer + table) + derived
    alone = config_of("training.subject.prior=none")
    fewer = memory.subject_training_memory(alone, counts, square(alone), 6, autoencoder=True)
    both = memory.subject_training_memory(config_of(), counts, square(config_of()), 6, autoencoder=True)
    assert both.activations == 2 * fewer.activations


def test_the_2b_model_learns_a_subject_on_one_card() -> None:
    """LoRA, one photo and one class sample, recomputed activations, bfloat16: within 16 GB at 1024 px."""
    config = resolve("infinity-2b", environment={}).config
    scales = schedule(config.model.scales, patchify=False, resolution="1M")
    counts = memory.parameters(config.model)
    estimate = memory.subject_training_memory(config, counts, scales, 12, autoencoder=False)
    assert estimate.total < 16 * 2**30
