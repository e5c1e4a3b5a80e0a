"""Every configuration value of bitgen: names, types, ranges and the invariants between them. No torch here.

What defines a model has no default: a configuration that leaves it out is wrong, not silently something else.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PerScale = float | list[float]

Resolution = Literal["0.06M", "0.25M", "0.60M", "1M"]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerConfig(Section):
    """Geometry of the autoencoder and its quantiser (INFINITY_FORMAT section 3)."""

    bits: Annotated[int, Field(ge=1, le=64, description="latent channels d; one bit each, vocabulary 2^d")]
    patch_size: Annotated[int, Field(ge=2, le=64, description="pixels per latent position along one side")]
    base_channels: Annotated[int, Field(ge=8, description="channels of the first level")]
    channel_multipliers: Annotated[list[PositiveInt], Field(min_length=1, description="channels per level / base")]
    res_blocks: Annotated[int, Field(ge=1, description="residual blocks per encoder level; the decoder has one more")]

    @model_validator(mode="after")
    def _levels(self) -> TokenizerConfig:
        levels = math.log2(self.patch_size)
        if levels != int(levels):
            raise ValueError(f"patch_size must be a power of two, not {self.patch_size}")
        if len(self.channel_multipliers) != int(levels) + 1:
            raise ValueError(
                f"channel_multipliers needs {int(levels) + 1} entries for patch_size {self.patch_size}, "
                f"has {len(self.channel_multipliers)}"
            )
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            if channels % 32 and channels % 24:
                raise ValueError(f"{channels} channels (base_channels x {multiplier}) must divide by 32 or 24")
        return self


class TransformerConfig(Section):
    """Geometry of the Infinity transformer (INFINITY_FORMAT sections 4 and 7)."""

    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    ffn_ratio: PositiveFloat = Field(description="feed-forward width / width, rounded to a multiple of 256")
    text_width: PositiveInt = Field(description="channels of the text features")
    text_length: PositiveInt = Field(description="longest prompt in text tokens")
    patchify: bool = Field(description="predict 2x2 latent positions at once: K = 4 bits")
    scale_embeddings: PositiveInt = Field(default=15, description="rows of the scale embedding, as published")
    block_chunks: PositiveInt = Field(default=1, description="how the published checkpoint groups its blocks")
    drop_path: Fraction = Field(default=0.0, description="share of residual branches dropped in training")

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width / 256) * 256

    @property
    def text_pool_heads(self) -> int:
        """Heads of the attention that pools the text; part of the published layout."""
        return max(1, self.text_width // (64 if self.width > 4096 else 128))

    @model_validator(mode="after")
    def _divides(self) -> TransformerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must divide by heads {self.heads}")
        if (self.width // self.heads) % 4:
            raise ValueError(f"width / heads = {self.width // self.heads} must divide by 4 (2-D rotary embedding)")
        if self.width % self.text_pool_heads:
            raise ValueError(f"width {self.width} must divide by text_width // 128 = {self.text_pool_heads}")
        if self.depth % self.block_chunks:
            raise ValueError(f"depth {self.depth} must divide by block_chunks {self.block_chunks}")
        if self.ffn_width == 0:
            raise ValueError("ffn_ratio x width must be at least 128")
        return self


class TextEncoderConfig(Section):
    """Which T5 encoder reads the prompts.

    `source` names a transformers folder or hub repository with fixed weights, or is `new`: an encoder of the geometry
    given here, with a vocabulary learned from the captions and weights trained together with the transformer.
    """

    source: str
    vocabulary: PositiveInt | None = None
    width: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    ffn_width: PositiveInt | None = None

    @model_validator(mode="after")
    def _geometry(self) -> TextEncoderConfig:
        geometry = ("vocabulary", "width", "layers", "heads", "ffn_width")
        missing = [name for name in geometry if getattr(self, name) is None]
        if self.source == "new" and missing:
            raise ValueError(f"source 'new' also needs {', '.join(missing)}")
        if self.source != "new" and len(missing) != len(geometry):
            raise ValueError("vocabulary, width, layers, heads and ffn_width belong to source 'new' alone")
        return self


class ScalesConfig(Section):
    """The scale schedules a model is used with.

    `published: true` takes Infinity's table (15 aspect ratios, four pixel budgets). Otherwise `custom` gives the sizes
    per aspect ratio (height / width, as a string such as "1.0"), each a list of [h, w] from [1, 1] up.
    """

    published: bool
    resolution: Resolution | None = Field(default=None, description="pixel budget used unless another is asked for")
    custom: dict[str, list[tuple[PositiveInt, PositiveInt]]] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> ScalesConfig:
        if self.published:
            if self.custom is not None:
                raise ValueError("custom sizes and published: true exclude each other")
            if self.resolution is None:
                raise ValueError("published scales need a resolution: 0.06M, 0.25M, 0.60M or 1M")
            return self
        if not self.custom:
            raise ValueError("published: false needs custom sizes")
        if self.resolution is not None:
            raise ValueError("resolution belongs to published: true")
        for ratio, sizes in self.custom.items():
            if not sizes or tuple(sizes[0]) != (1, 1):
                raise ValueError(f"the schedule of ratio {ratio} must start with [1, 1]")
            try:
                float(ratio)
            except ValueError:
                raise ValueError(f"aspect ratio {ratio!r} is not a number (height / width)") from None
            for (h0, w0), (h1, w1) in zip(sizes, sizes[1:], strict=False):
                if h1 < h0 or w1 < w0:
                    raise ValueError(f"the schedule of ratio {ratio} must not shrink: {h0}x{w0} to {h1}x{w1}")
        return self


class ModelConfig(Section):
    """Everything that defines a model; stored in config.json of a model folder."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    scales: ScalesConfig

    @property
    def bits_per_position(self) -> int:
        """K: bits the transformer predicts per position."""
        return self.tokenizer.bits * (4 if self.transformer.patchify else 1)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        width = self.text_encoder.width
        if width is not None and width != self.transformer.text_width:
            raise ValueError(
                f"text_encoder.width {width} must equal transformer.text_width {self.transformer.text_width}"
            )
        if self.scales.custom is not None:
            longest = max(len(sizes) for sizes in self.scales.custom.values())
            if longest > self.transformer.scale_embeddings:
                raise ValueError(
                    f"a schedule of {longest} scales needs transformer.scale_embeddings >= {longest}, "
                    f"not {self.transformer.scale_embeddings}"
                )
        return self


class SamplingConfig(Section):
    """Defaults of `bitgen sample`; numbers, or one number per scale."""

    cfg: PerScale = Field(default=3.0, description="guidance: cfg x conditional + (1 - cfg) x unconditional")
    cfg_layer: NonNegativeInt | list[NonNegativeInt] = Field(
        default=0, description="0: guide the logits; n: the output of block depth - n; several may be listed"
    )
    tau: PerScale = Field(default=1.0, description="temperature: logits are divided by it")
    top_k: NonNegativeInt = Field(default=0, description="1 is greedy; 0 or 2 and more keep both values of a bit")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.97, description="a bit's lesser value is dropped when its probability is at most 1 - top_p"
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.97)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.005
    clip_norm: PositiveFloat = 5.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: Fraction = Field(default=0.01, description="end of the cosine / learning_rate")


class LoopConfig(Section):
    """What every training stage has."""

    steps: PositiveInt
    batch_size: PositiveInt
    accumulation: PositiveInt = Field(default=1, description="micro-batches per step")
    optimizer: OptimizerConfig
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="autocast of the forward pass")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="0 keeps no averaged weights")
    seed: int = 0
    workers: NonNegativeInt = 0
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 500
    validation_images: NonNegativeInt = Field(default=256, description="pictures held out for validation")
    sample_every: NonNegativeInt = Field(default=1000, description="steps between picture grids; 0 draws none")
    save_every: PositiveInt = 500
    keep_last: PositiveInt = Field(default=2, description="checkpoints kept besides the best one")
    export_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="number type of the model folder the run leaves"
    )


class TokenizerTraining(LoopConfig):
    """Stage `tokenizer`: the autoencoder and its bits."""

    l1_weight: NonNegativeFloat = 1.0
    structural_weight: NonNegativeFloat = Field(default=0.1, description="1 - SSIM")
    entropy_weight: NonNegativeFloat = Field(default=0.1, description="BSQ: sure bits, evenly used bits")
    commitment_weight: NonNegativeFloat = Field(default=0.25, description="latent near its quantised sum")


class TransformerTraining(LoopConfig):
    """Stage `transformer`: bitwise cross-entropy over all scales (INFINITY_FORMAT section 6)."""

    scale_weighting: Literal["positions", "published"] = Field(
        default="published",
        description="token weights: equal, or proportional to 1 / sqrt(h w) as published (reweight_loss_by_scale)",
    )
    bit_loss: Literal["mean", "sum"] = Field(default="mean", description="over the bits of a position")
    flip_strength: Fraction = Field(default=0.3, description="self-correction: bits flip with up to this probability")
    flip_scales: NonNegativeInt = Field(default=13, description="scales that get flips")
    flip_warmup_steps: NonNegativeInt = Field(default=0, description="steps until flip_strength is reached")
    caption_dropout: Fraction = Field(default=0.1, description="share of prompts replaced by the unconditional one")
    checkpoint_activations: bool = False


class TrainingConfig(Section):
    """Recipes of the two stages; a preset may carry one or both."""

    tokenizer: TokenizerTraining | None = None
    transformer: TransformerTraining | None = None


class Config(Section):
    """A whole preset or --config file."""

    name: str
    description: str = ""
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
