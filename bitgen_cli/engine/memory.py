"""How large a model is and how much memory sampling needs: arithmetic on a configuration, nothing is computed.

Parameters are counted on the meta device and exact. Memory is an estimate of what tensors hold, within 15 % of what
was measured on a CPU, without the program, its libraries, the work space of kernels and what the allocator wastes:
allow 0.5 to 1 GiB for those. Prompts are taken to be as long as the model allows. Training: training_memory.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import nn

from bitgen_cli.config import ModelConfig, TextEncoderConfig, TokenizerConfig
from bitgen_cli.engine.autoencoder import Decoder, Encoder
from bitgen_cli.engine.bands import BAND, GPU_BAND
from bitgen_cli.engine.convolution import LEAST_CHANNELS, LEAST_POSITIONS
from bitgen_cli.engine.graphs import KEPT
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.streaming import SETS
from bitgen_cli.engine.tensors import Unfilled
from bitgen_cli.engine.transformer import Transformer
from bitgen_cli.errors import InputError
from bitgen_cli.files import read_json

FP32, BF16 = 4, 2
"""Bytes per number."""
BYTES = {"fp32": FP32, "bf16": BF16, "fp16": BF16}


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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
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
    with torch.device("meta"), Unfilled():
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
    return StoreBytes(packed, model.tokenizer.most_bits * prod(schedule.latent_sizes[-1]) * BF16)


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes needed to draw one batch.

    Attributes:
        text_encoder: its weights, which are gone before the others are loaded.
        transformer, tokenizer: weights.
        derived: weights that a CPU decodes with in place of some convolutions' own (convolution.py); a GPU makes none.
        kv_cache: keys and values of all scales but the last, conditional and unconditional.
        text_cache: keys and values of the prompts in every block.
        transformer_work: what a step of the last scale holds at its peak.
        decoder_work: what the decoder holds at its peak, after the caches are gone.
    """

    text_encoder: int
    transformer: int
    tokenizer: int
    derived: int
    kv_cache: int
    text_cache: int
    transformer_work: int
    decoder_work: int

    @property
    def total(self) -> int:
        """The peak of three phases: text, bits, picture."""
        bits = self.kv_cache + self.text_cache + self.transformer_work
        return max(
            self.text_encoder, self.transformer + self.tokenizer + self.derived + max(bits, self.decoder_work)
        )

    def to_json(self) -> dict[str, int]:
        """All parts and the total."""
        return {**asdict(self), "total": self.total}


def sampling_memory(
    model: ModelConfig,
    counts: Parameters,
    schedule: Schedule,
    number: int,
    pictures: int = 1,
    *,
    text_number: int | None = None,
    tokens: int | None = None,
    waiting: int = 0,
    in_bands: bool = False,
) -> SamplingMemory:
    """Memory of the device to draw pictures with guidance.

    Args:
        model: what is sampled.
        counts: its parameters.
        schedule: scales of the pictures.
        number: bytes per number, `FP32` or `BF16`.
        pictures: drawn at once.
        text_number: bytes per number of the text encoder; None is as of the others, 0 where it is not needed.
        tokens: of the longest prompt; None is as many as the model takes.
        waiting: blocks of the transformer whose weights take turns on the device (streaming.py).
        in_bands: whether pictures are decoded in bands of rows (bands.py).
    """
    geometry = model.transformer
    rows = 2 * pictures
    per_position = rows * geometry.depth * 2 * geometry.width * number
    # the residual stream and the rotary positions are float32 whatever the weights are
    per_channel = 14 + 2 * number
    last = rows * schedule.counts[-1]
    absent = max(0, waiting - SETS) * block_parameters(model)
    if in_bands:
        decoded = decoder_peak_in_bands(model.tokenizer, schedule, GPU_BAND)
    else:
        decoded = decoder_peak(model.tokenizer, schedule)
    return SamplingMemory(
        text_encoder=(counts.text_encoder or 0) * (number if text_number is None else text_number),
        transformer=(counts.transformer - absent) * number,
        tokenizer=counts.tokenizer * number,
        kv_cache=per_position * schedule.kept_positions,
        text_cache=per_position * (geometry.text_length if tokens is None else tokens),
        transformer_work=last * (geometry.width * per_channel + 2 * geometry.ffn_width * number),
        derived=derived_weights(model.tokenizer, schedule, number, encoder=False),
        decoder_work=decoded * number,  # pictures are decoded one at a time
    )


def recordings_memory(drawing: SamplingMemory) -> int:
    """Bytes that drawing takes besides where scales are recorded (graphs.py).

    Cache, prompts of every length that is kept, and the work of a step then stay where they are while a prompt of a new
    length or the decoder computes.
    """
    stays = drawing.kv_cache + KEPT * drawing.text_cache + drawing.transformer_work
    goes = drawing.kv_cache + drawing.text_cache + drawing.transformer_work
    return stays + max(drawing.transformer_work, drawing.decoder_work) - max(goes, drawing.decoder_work)


def block_parameters(model: ModelConfig) -> int:
    """Parameters of one block of the transformer."""
    with torch.device("meta"), Unfilled():
        return _count(Transformer(with_depth(model, 1)).blocks)


def waiting_memory(model: ModelConfig, number: int) -> int:
    """Bytes of the CPU's memory that a waiting block takes: torch locks its pages in powers of two."""
    with torch.device("meta"):
        block = Transformer(with_depth(model, 1)).blocks
    return sum(1 << (parameter.numel() * number - 1).bit_length() for parameter in block.parameters())


def with_depth(model: ModelConfig, depth: int) -> ModelConfig:
    """The same model with another number of blocks."""
    geometry = model.transformer.model_copy(update={"depth": depth, "block_chunks": 1})
    return model.model_copy(update={"transformer": geometry})


@dataclass(frozen=True)
class _Conv:
    """A 3x3 convolution of the autoencoder.

    Attributes:
        before, after: channels in and out.
        pixels: of what it reads.
        normed: whether a norm and an activation stand before it.
        held: numbers the layers around it hold meanwhile.
        doubles: whether it enlarges what it reads.
        residual: whether it stands in a residual block, which has a shortcut.
    """

    before: int
    after: int
    pixels: int
    normed: bool = False
    held: int = 0
    doubles: bool = False
    residual: bool = False


def decoder_peak(config: TokenizerConfig, schedule: Schedule) -> int:
    """Numbers the decoder holds at once, at most, for one picture, without gradient.

    At a convolution: its input and output, what the residual block holds beside them, and a copy of both in
    the layout the convolution computes in.
    """
    convs = _decoder_convs(config, schedule)
    return max(2 * (conv.before + conv.after) * conv.pixels + conv.held for conv in convs)


def decoder_peak_in_bands(config: TokenizerConfig, schedule: Schedule, numbers: int = BAND) -> int:
    """Numbers the decoder holds at once, at most, where it decodes in bands of rows (bands.py), without gradient.

    At full size what a layer begins with or what it ends with, with the shortcut of a residual block; beside it two
    bands: what the convolution reads with its frame, and what it makes.

    Args:
        config: of the autoencoder.
        schedule: scales of the picture.
        numbers: a band has at most.
    """
    most = 0
    for conv in _decoder_convs(config, schedule):
        read, made = conv.before * conv.pixels // (4 if conv.doubles else 1), conv.after * conv.pixels
        whole = max(read, 2 * made if conv.residual else made)
        most = max(most, whole + 2 * min(max(read, made), numbers))
    return most


def derived_weights(config: TokenizerConfig, schedule: Schedule, number: int, *, encoder: bool) -> int:
    """Bytes of the weights that a CPU infers with in place of some convolutions' own, and keeps beside those.

    Args:
        config: of the autoencoder.
        schedule: scales of the pictures.
        number: bytes per number.
        encoder: whether pictures are encoded too, not only decoded.
    """
    total = 0
    for conv in [*(_encoder_convs(config, schedule) if encoder else ()), *_decoder_convs(config, schedule)]:
        wide = min(conv.before, conv.after) >= LEAST_CHANNELS and conv.pixels >= LEAST_POSITIONS
        if conv.doubles:
            total += 16 * conv.before * conv.after
        elif conv.normed and wide and number == FP32:
            total += 36 * conv.before * conv.after
    return total * number


def _res_block(before: int, after: int, pixels: int) -> list[_Conv]:
    return [
        _Conv(before, after, pixels, True, held=before * pixels, residual=True),
        _Conv(after, after, pixels, True, held=before * pixels, residual=True),
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
