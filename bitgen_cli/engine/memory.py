"""How large a model is and how much memory it needs: arithmetic on a configuration, nothing is computed.

Parameters are counted on the meta device and exact. Memory is an estimate of what tensors hold, without the
program, its libraries, the work space of kernels and what the allocator wastes: allow 0.5 to 1 GB for those.

Activations are counted operation by operation, as autograd keeps them. Checked on a CPU against the tensors
really kept and the allocator's peak, for small models in float32 and bfloat16: training within 5 %, working
memory of sampling within 15 %. In bfloat16 the estimate follows CUDA's rules, where autocast computes norms
in float32; on a CPU the transformer's activations are about 10 % smaller, the tokenizer's about 35 %. Nothing
was measured on a GPU. Prompts are taken to be as long as the model allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitgen_cli.config import (
    Config,
    ModelConfig,
    SubjectTraining,
    TextEncoderConfig,
    TokenizerConfig,
    TransformerTraining,
)
from bitgen_cli.engine import lora
from bitgen_cli.engine.autoencoder import Decoder, Encoder
from bitgen_cli.engine.convolution import LEAST_CHANNELS, LEAST_POSITIONS
from bitgen_cli.engine.lora import LAYERS
from bitgen_cli.engine.parts import is_trained
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError
from bitgen_cli.files import read_json

FP32, BF16 = 4, 2
"""Bytes per number."""
BYTES = {"fp32": FP32, "bf16": BF16}

_ADAM = 8
"""Bytes AdamW keeps per trained parameter: two float32 averages."""
_BLOCK_BYTES = {FP32: (81, 8), BF16: (65, 4)}
"""Bytes kept per position and block: for each channel of the width, and of the feed-forward width."""
_T5_BYTES = {FP32: (40, 28), BF16: (40, 14)}
"""Bytes kept per text token and T5 layer: for each channel of the width, and of the feed-forward width."""
_LOSS_IMAGES = 16
"""Float32 images kept by the loss of the tokenizer, most of them by SSIM."""


@dataclass(frozen=True)
class TextGeometry:
    """A T5 v1.1 encoder (gated feed-forward): what its size follows from."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int
    ffn_width: int

    @property
    def parameters(self) -> int:
        """Parameters of embedding and encoder."""
        attention = 4 * self.width * self.heads * self.head_width
        layer = attention + 3 * self.width * self.ffn_width + 2 * self.width
        return self.vocabulary * self.width + self.layers * layer + 32 * self.heads + self.width


_FLAN = {
    "small": TextGeometry(32128, 512, 8, 6, 64, 1024),
    "base": TextGeometry(32128, 768, 12, 12, 64, 2048),
    "large": TextGeometry(32128, 1024, 24, 16, 64, 2816),
    "xl": TextGeometry(32128, 2048, 24, 32, 64, 5120),
    "xxl": TextGeometry(32128, 4096, 24, 64, 64, 10240),
}
KNOWN_TEXT_ENCODERS = {
    f"google/{family}{size}": geometry
    for family in ("flan-t5-", "t5-v1_1-")
    for size, geometry in _FLAN.items()
}
"""Hub repositories whose geometry is known without asking the hub."""


def text_geometry(config: TextEncoderConfig) -> TextGeometry | None:
    """The geometry of the text encoder; None for a hub repository that is not known here.

    The vocabulary of a new one is taken as large as it may get.

    Raises:
        InputError: a folder whose config.json does not describe a T5.
    """
    if config.source == "new":
        assert config.vocabulary is not None
        assert config.width is not None
        assert config.layers is not None
        assert config.heads is not None
        assert config.ffn_width is not None
        head_width = config.width // config.heads
        return TextGeometry(
            config.vocabulary, config.width, config.layers, config.heads, head_width, config.ffn_width
        )
    file = Path(config.source) / "config.json"
    if file.is_file():
        stored = read_json(file)
        try:
            names = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")
            return TextGeometry(*(int(stored[name]) for name in names))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file} does not describe a T5 encoder") from error
    return KNOWN_TEXT_ENCODERS.get(config.source)


@dataclass(frozen=True)
class Parameters:
    """Parameters per part; the text encoder's are None when its geometry is not known."""

    tokenizer_encoder: int
    tokenizer_decoder: int
    transformer: int
    text_encoder: int | None

    @property
    def tokenizer(self) -> int:
        """Both halves."""
        return self.tokenizer_encoder + self.tokenizer_decoder

    @property
    def total(self) -> int:
        """All parts that are known."""
        return self.tokenizer + self.transformer + (self.text_encoder or 0)


def parameters(model: ModelConfig) -> Parameters:
    """Parameters per part, counted on the meta device."""
    geometry = text_geometry(model.text_encoder)
    with torch.device("meta"):
        return Parameters(
            tokenizer_encoder=_count(Encoder(model.tokenizer)),
            tokenizer_decoder=_count(Decoder(model.tokenizer)),
            transformer=_count(Transformer(model)),
            text_encoder=None if geometry is None else geometry.parameters,
        )


@dataclass(frozen=True)
class StoreBytes:
    """Bytes one picture takes in a token store, besides its caption."""

    bits: int
    latents: int


def store_bytes(model: ModelConfig, schedule: Schedule) -> StoreBytes:
    """Bytes of a picture's packed bits, ceil(K / 8) a position, and of its bfloat16 latents."""
    packed = schedule.positions * -(-model.bits_per_position // 8)
    return StoreBytes(packed, model.tokenizer.bits * prod(schedule.latent_sizes[-1]) * BF16)


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes needed to draw one batch.

    Attributes:
        weights: of all parts.
        derived: weights that a CPU decodes with in place of some convolutions' own (convolution.py); a GPU makes none.
        kv_cache: keys and values of all positions, conditional and unconditional.
        text_cache: keys and values of the prompts in every block.
        transformer_work: what a step of the last scale holds at its peak.
        decoder_work: what the decoder holds at its peak, after the caches are gone.
    """

    weights: int
    derived: int
    kv_cache: int
    text_cache: int
    transformer_work: int
    decoder_work: int

    @property
    def total(self) -> int:
        """The peak: weights, and the larger of the two phases."""
        caches = self.kv_cache + self.text_cache
        return self.weights + self.derived + max(caches + self.transformer_work, self.decoder_work)

    def to_json(self) -> dict[str, int]:
        """All parts and the total."""
        return {**asdict(self), "total": self.total}


def sampling_memory(
    model: ModelConfig, counts: Parameters, schedule: Schedule, number: int, pictures: int = 1
) -> SamplingMemory:
    """Memory to draw pictures with guidance.

    Args:
        model: what is sampled.
        counts: its parameters.
        schedule: scales of the pictures.
        number: bytes per number, `FP32` or `BF16`.
        pictures: drawn at once.
    """
    geometry = model.transformer
    rows = 2 * pictures
    per_position = rows * geometry.depth * 2 * geometry.width * number
    # the residual stream and the rotary positions are float32 whatever the weights are
    per_channel = 18 + 2 * number
    last = rows * schedule.counts[-1]
    return SamplingMemory(
        weights=counts.total * number,
        kv_cache=per_position * schedule.positions,
        text_cache=per_position * geometry.text_length,
        transformer_work=last * (geometry.width * per_channel + 2 * geometry.ffn_width * number),
        derived=_derived(_decoder_convs(model.tokenizer, schedule), number) * number,
        decoder_work=_decoder_peak(model.tokenizer, schedule) * number,  # pictures are decoded one at a time
    )


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes a training stage needs.

    Attributes:
        weights: of what is trained, float32.
        gradients: float32.
        optimizer: AdamW's two averages.
        average: averaged weights; 0 without.
        frozen: weights of the parts that are only used.
        activations: what a micro-batch keeps for its backward pass, bfloat16 copies of weights included.
        together: whether gradients and activations are there at once: with several micro-batches per step, or
            recomputed activations. Otherwise the ones come as the others go.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    activations: int
    together: bool

    @property
    def total(self) -> int:
        """The peak of a step, or of a validation, which keeps the weights aside and uses averaged ones."""
        both = self.gradients + self.activations
        step = both if self.together else max(self.gradients, self.activations)
        validation = self.gradients + self.average
        return self.weights + self.optimizer + self.average + self.frozen + max(step, validation)

    def to_json(self) -> dict[str, int]:
        """All parts and the total."""
        parts: dict[str, Any] = asdict(self)
        del parts["together"]
        return {**parts, "total": self.total}


def tokenizer_training_memory(
    config: Config, counts: Parameters, schedule: Schedule
) -> TrainingMemory | None:
    """Memory of stage `tokenizer`; None when the configuration has no recipe for it."""
    training = config.training.tokenizer
    if training is None:
        return None
    number = BYTES[training.precision]
    normed, plain = _autoencoder_kept(config.model.tokenizer, schedule)
    image = 3 * prod(schedule.pixels(config.model.tokenizer.patch_size))
    per_picture = normed * FP32 + plain * number + _LOSS_IMAGES * image * FP32
    copies = 0 if number == FP32 else counts.tokenizer * number
    return TrainingMemory(
        weights=counts.tokenizer * FP32,
        gradients=counts.tokenizer * FP32,
        optimizer=counts.tokenizer * _ADAM,
        average=counts.tokenizer * FP32 if training.ema_decay else 0,
        frozen=0,
        activations=training.batch_size * per_picture + copies,
        together=training.accumulation > 1,
    )


def transformer_training_memory(
    config: Config, counts: Parameters, schedule: Schedule
) -> TrainingMemory | None:
    """Memory of stage `transformer`; None when the configuration has no recipe for it.

    The tokenizer is there for picture grids; a new text encoder is trained too, another one only used.
    """
    training = config.training.transformer
    if training is None:
        return None
    text = counts.text_encoder or 0
    text_is_trained = config.model.text_encoder.source == "new"
    trained = counts.transformer + (text if text_is_trained else 0)
    copies = 0 if training.precision == "fp32" else trained * BF16
    return TrainingMemory(
        weights=trained * FP32,
        gradients=trained * FP32,
        optimizer=trained * _ADAM,
        average=trained * FP32 if training.ema_decay else 0,
        frozen=(counts.tokenizer + (0 if text_is_trained else text)) * FP32,
        activations=training.batch_size * _transformer_kept(config.model, training, schedule) + copies,
        together=training.accumulation > 1 or training.checkpoint_activations,
    )


def subject_training_memory(
    config: Config, counts: Parameters, schedule: Schedule, text_tokens: int, *, autoencoder: bool
) -> TrainingMemory:
    """Memory of learning a subject; only what `train` names has gradients and optimizer state.

    Args:
        config: its training.subject must be there.
        counts: parameters of the model.
        schedule: scales of the photos and class samples.
        text_tokens: of the longest caption.
        autoencoder: whether it shares the device; on a GPU it comes for picture grids alone, when gradients are gone.
    """
    training = config.training.subject
    assert training is not None
    number = BYTES[training.precision]
    parts = set[str](training.train)
    trained = _subject_parameters(config.model, training, counts)
    text = counts.text_encoder or 0
    frozen = counts.transformer + text
    if autoencoder:
        tokenizer = config.model.tokenizer
        convs = [*_encoder_convs(tokenizer, schedule), *_decoder_convs(tokenizer, schedule)]
        frozen += counts.tokenizer + _derived(convs, number)
    if training.train != ["token"]:
        frozen -= 0 if "lora" in parts and parts <= {"lora", "token"} else trained
    rows = training.batch_size * (2 if training.keeps_class else 1)
    kept = rows * _subject_kept(config.model, training, schedule, text_tokens)
    copies = 0 if number == FP32 else trained * BF16
    return TrainingMemory(
        weights=2 * trained * FP32,  # the base model's values are kept beside them
        gradients=trained * FP32,
        optimizer=trained * _ADAM,
        average=trained * FP32 if training.ema_decay else 0,
        frozen=max(0, frozen) * number,
        activations=kept + copies,
        together=training.accumulation > 1 or training.checkpoint_activations,
    )


def _subject_parameters(model: ModelConfig, training: SubjectTraining, counts: Parameters) -> int:
    """Parameters that learn a subject; the token's row is left out."""
    parts = set[str](training.train)
    with torch.device("meta"):
        transformer = Transformer(model)
        if "lora" in parts:
            lora.attach(transformer, training.lora_layers, training.lora_rank, training.lora_alpha, seed=0)
    found = sum(p.numel() for name, p in transformer.named_parameters() if is_trained(f"transformer.{name}", parts))
    if parts & {"text", "all"} and counts.text_encoder is not None:
        geometry = text_geometry(model.text_encoder)
        assert geometry is not None
        found += counts.text_encoder - geometry.vocabulary * geometry.width
    return found


def _subject_kept(model: ModelConfig, training: SubjectTraining, schedule: Schedule, text_tokens: int) -> int:
    """Bytes a picture keeps for the backward pass when some layers are frozen.

    A frozen linear layer does not keep its input: two tensors of the width in self-attention and in cross-attention,
    one and the hidden one in the feed-forward layer. Without a gradient to the text four more tensors of the width need
    not be kept: what the gates and the norms' scales multiply. What comes before the first layer that learns is not
    kept at all; without self-attention that saves about two more.
    """
    geometry = model.transformer
    number = BYTES[training.precision]
    parts = set[str](training.train)
    learning = set(LAYERS) if "all" in parts else parts & set(LAYERS)
    if "lora" in parts:
        learning |= set(training.lora_layers)
    to_text = bool(parts & {"token", "text", "all"})
    for_width, for_ffn = _BLOCK_BYTES[number]
    for_width -= number * (2 * ("self" not in learning) + 2 * ("cross" not in learning) + ("ffn" not in learning))
    for_width -= 0 if to_text else number * (4 if "self" in learning else 6)
    for_ffn -= number * ("ffn" not in learning)
    positions = schedule.positions
    block = positions * (geometry.width * for_width + geometry.ffn_width * for_ffn)
    text_kv = geometry.depth * 2 * text_tokens * geometry.width * number
    around = positions * (3 * geometry.width + 6 * model.bits_per_position) * FP32
    if training.checkpoint_activations:
        blocks = geometry.depth * positions * geometry.width * FP32 + block
    else:
        blocks = geometry.depth * block
    return blocks + text_kv + around + (_t5_kept(model, number, text_tokens) if to_text else 0)


def _transformer_kept(model: ModelConfig, training: TransformerTraining, schedule: Schedule) -> int:
    """Bytes a picture keeps for the backward pass of the transformer and of a text encoder trained with it.

    A block keeps 20 tensors of its width in float32: inputs of norms and linear layers, queries and keys
    before and after each of their changes, values, what the attentions return and what the gates multiply;
    and two of the feed-forward width. In bfloat16 the residual stream, the norms and the inputs of the
    rotation stay float32. Recomputed blocks keep their input, and one of them everything.
    """
    geometry = model.transformer
    number = BYTES[training.precision]
    positions = schedule.positions
    for_width, for_ffn = _BLOCK_BYTES[number]
    block = positions * (geometry.width * for_width + geometry.ffn_width * for_ffn)
    text_kv = geometry.depth * 2 * geometry.text_length * geometry.width * number
    around = positions * (3 * geometry.width + 6 * model.bits_per_position) * FP32
    if training.checkpoint_activations:
        blocks = geometry.depth * positions * geometry.width * FP32 + block
    else:
        blocks = geometry.depth * block
    return blocks + text_kv + around + _text_kept(model, number)


def _text_kept(model: ModelConfig, number: int) -> int:
    """Bytes a prompt keeps for the backward pass of a text encoder that is trained."""
    return _t5_kept(model, number, model.transformer.text_length) if model.text_encoder.source == "new" else 0


def _t5_kept(model: ModelConfig, number: int, tokens: int) -> int:
    """Bytes a prompt of so many tokens keeps for the backward pass of its encoder; 0 where that is not known."""
    geometry = text_geometry(model.text_encoder)
    if geometry is None:
        return 0
    for_width, for_ffn = _T5_BYTES[number]
    attention = geometry.heads * tokens * FP32
    return geometry.layers * tokens * (geometry.width * for_width + geometry.ffn_width * for_ffn + attention)


@dataclass(frozen=True)
class _Conv:
    """A 3x3 convolution of the autoencoder.

    Attributes:
        before, after: channels in and out.
        pixels: of what it reads.
        normed: whether a norm and an activation stand before it.
        held: numbers the layers around it hold meanwhile.
        doubles: whether it enlarges what it reads.
    """

    before: int
    after: int
    pixels: int
    normed: bool = False
    held: int = 0
    doubles: bool = False


def _autoencoder_kept(config: TokenizerConfig, schedule: Schedule) -> tuple[int, int]:
    """Numbers a picture keeps for the backward pass of encoder and decoder: of norms, and of convolutions.

    A norm keeps its input, the activation behind it keeps its own, the convolution behind that its own.
    """
    normed = plain = 0
    for conv in [*_encoder_convs(config, schedule), *_decoder_convs(config, schedule)]:
        size = conv.before * conv.pixels
        plain += size
        normed += 2 * size if conv.normed else 0
    return normed, plain


def _decoder_peak(config: TokenizerConfig, schedule: Schedule) -> int:
    """Numbers the decoder holds at once, at most, for one picture, without gradient.

    At a convolution: its input and output, what the residual block holds beside them, and a copy of both in
    the layout the convolution computes in.
    """
    convs = _decoder_convs(config, schedule)
    return max(2 * (conv.before + conv.after) * conv.pixels + conv.held for conv in convs)


def _derived(convs: Sequence[_Conv], number: int) -> int:
    """Numbers of the weights that a CPU infers with in place of these convolutions' own, and keeps beside those."""
    total = 0
    for conv in convs:
        wide = min(conv.before, conv.after) >= LEAST_CHANNELS and conv.pixels >= LEAST_POSITIONS
        if conv.doubles:
            total += 16 * conv.before * conv.after
        elif conv.normed and wide and number == FP32:
            total += 36 * conv.before * conv.after
    return total


def _res_block(before: int, after: int, pixels: int) -> list[_Conv]:
    return [
        _Conv(before, after, pixels, True, held=before * pixels),
        _Conv(after, after, pixels, True, held=(before + after) * pixels),
    ]


def _encoder_convs(config: TokenizerConfig, schedule: Schedule) -> list[_Conv]:
    widths = [config.base_channels * m for m in config.channel_multipliers]
    pixels = prod(schedule.pixels(config.patch_size))
    convs = [_Conv(3, config.base_channels, pixels)]
    before = config.base_channels
    for level, width in enumerate(widths):
        for _ in range(config.res_blocks):
            convs += _res_block(before, width, pixels)
            before = width
        if level < len(widths) - 1:
            convs.append(_Conv(width, width, pixels))
            pixels //= 4
    convs += 2 * _res_block(before, before, pixels)
    return [*convs, _Conv(before, config.bits, pixels, True)]


def _decoder_convs(config: TokenizerConfig, schedule: Schedule) -> list[_Conv]:
    widths = [config.base_channels * m for m in config.channel_multipliers]
    pixels = prod(schedule.latent_sizes[-1])
    before = widths[-1]
    convs = [_Conv(config.bits, before, pixels), *(2 * _res_block(before, before, pixels))]
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.res_blocks + 1):
            convs += _res_block(before, width, pixels)
            before = width
        if level > 0:
            held = width * pixels
            pixels *= 4
            convs.append(_Conv(width, width, pixels, held=held, doubles=True))
    return [*convs, _Conv(before, 3, pixels, True)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
