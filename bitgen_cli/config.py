"""Every configuration value of bitgen: names, types, ranges and the invariants between them. No torch here.

What defines a model has no default: a configuration that leaves it out is wrong, not silently something else.
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

LARGEST = 2**40
"""Beyond any number of anything: what is counted with stays a number of 64 bits, and can become a float."""

WIDEST = 2**20
"""Channels of anything: the square of a number much beyond is none that memory is counted in."""
MOST_BLOCKS = 200
"""Of a transformer: a file that says more would be built for hours before its weights are missed."""


def _countable(number: int) -> int:
    if abs(number) > LARGEST:
        raise ValueError(f"at most {LARGEST}")
    return number


Countable = Annotated[int, AfterValidator(_countable)]
PositiveInt = Annotated[Countable, Field(gt=0)]
Channels = Annotated[int, Field(gt=0, le=WIDEST)]
NonNegativeInt = Annotated[Countable, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PerScale = float | Annotated[list[float], Field(min_length=1)]
PositivePerScale = PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=1)]

Resolution = Literal["0.06M", "0.25M", "0.60M", "1M"]

PUBLISHED_SCALES = 13
"""Scales of the largest published pixel budget."""

INVARIANT = "invariant"
"""Type of the errors that tell in their own words what is wrong between values."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values do not change after validation.

    Numbers are finite, and true or false is no number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        given = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[info.field_name].annotation is not bool and any(
            isinstance(v, bool) for v in given
        ):
            raise PydanticCustomError("bool_as_number", "true or false where something else belongs")
        return value

    def _refuse(self, problems: dict[str, str]) -> None:
        """Raises pydantic's error with every problem under its own dotted key; nothing when there is none."""
        if problems:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError(INVARIANT, "{problem}", {"problem": problem}),
                    loc=tuple(key.split(".")),
                    input=reduce(getattr, key.split("."), self),
                )
                for key, problem in problems.items()
            ]
            raise ValidationError.from_exception_data(type(self).__name__, details)


class TokenizerConfig(Section):
    """Geometry of the autoencoder and its quantiser (INFINITY_FORMAT section 3)."""

    bits: Annotated[int, Field(ge=1, le=64, description="latent channels d; one bit each, vocabulary 2^d")]
    patch_size: Annotated[int, Field(ge=2, le=64, description="pixels per latent position along one side")]
    base_channels: Annotated[int, Field(ge=8, le=WIDEST, description="channels of the first level")]
    channel_multipliers: Annotated[
        list[PositiveInt], Field(min_length=1, description="channels per level / base")
    ]
    res_blocks: Annotated[
        int, Field(ge=1, le=100, description="residual blocks per encoder level; the decoder has one more")
    ]
    norm_groups: PositiveInt | None = Field(
        default=None,
        description="groups of GroupNorm; none: as published, 32 where the channels divide by it, else 24",
    )
    active_bits: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        default=None,
        description="numbers of bits it can be used with, ascending: the first so many channels; none: all bits alone",
    )

    @property
    def bit_counts(self) -> tuple[int, ...]:
        """Numbers of bits it can be used with, ascending."""
        return (self.bits,) if self.active_bits is None else tuple(self.active_bits)

    @property
    def most_bits(self) -> int:
        """Bits it is used with unless fewer are asked for."""
        return self.bit_counts[-1]

    def groups(self, channels: int) -> int:
        """Groups of a GroupNorm over that many channels."""
        return self.norm_groups or (32 if channels % 32 == 0 else 24)

    @model_validator(mode="after")
    def _levels(self) -> TokenizerConfig:
        problems = {}
        levels = math.log2(self.patch_size)
        if levels != int(levels):
            problems["patch_size"] = "must be a power of two"
        elif len(self.channel_multipliers) != int(levels) + 1:
            problems["channel_multipliers"] = (
                f"must have {int(levels) + 1} entries for patch_size {self.patch_size}, "
                f"has {len(self.channel_multipliers)}"
            )
        for multiplier in self.channel_multipliers:
            channels = self.base_channels * multiplier
            if channels > WIDEST:
                product = f"base_channels x {multiplier}"
                problems["channel_multipliers"] = f"{channels} channels ({product}): at most {WIDEST}"
            elif channels % self.groups(channels):
                needed = self.norm_groups or "32 or 24"
                problems["base_channels"] = (
                    f"{channels} channels (base_channels x {multiplier}) must divide by {needed}"
                )
        if self.active_bits is not None:
            if sorted(set(self.active_bits)) != self.active_bits:
                problems["active_bits"] = "must be ascending, each number once"
            elif self.active_bits[-1] > self.bits:
                problems["active_bits"] = f"must be at most bits {self.bits}"
        self._refuse(problems)
        return self


class TransformerConfig(Section):
    """Geometry of the Infinity transformer (INFINITY_FORMAT sections 4 and 7)."""

    depth: PositiveInt = Field(le=MOST_BLOCKS, description="blocks")
    width: Channels = Field(description="channels of the residual stream")
    heads: PositiveInt = Field(description="attention heads")
    ffn_ratio: PositiveFloat = Field(description="feed-forward width / width, rounded to a multiple of 256")
    text_width: Channels = Field(description="channels of the text features")
    text_length: PositiveInt = Field(description="longest prompt in text tokens")
    patchify: bool = Field(description="predict 2x2 latent positions at once: K = 4 bits")
    scale_embeddings: PositiveInt = Field(default=15, description="rows of the scale embedding, as published")
    block_chunks: PositiveInt = Field(default=1, description="how the published checkpoint groups its blocks")
    drop_path: BelowOne = Field(default=0.0, description="share of residual branches dropped in training")

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width / 256) * 256

    @property
    def text_pool_heads(self) -> int:
        """Heads of the attention that pools the text; part of the published layout."""
        return max(1, self.text_width // (64 if self.width > 4096 else 128))

    @model_validator(mode="after")
    def _divides(self) -> TransformerConfig:
        problems = {}
        if self.width % self.heads:
            problems["heads"] = f"width {self.width} must divide by it"
        elif (self.width // self.heads) % 4:
            problems["heads"] = (
                f"width / heads = {self.width // self.heads} must divide by 4 (2-D rotary embedding)"
            )
        if self.width % self.text_pool_heads:
            problems["width"] = (
                f"must divide by the {self.text_pool_heads} heads that pool text_width {self.text_width}"
            )
        if self.depth % self.block_chunks:
            problems["block_chunks"] = f"depth {self.depth} must divide by it"
        if self.ffn_width == 0:
            problems["ffn_ratio"] = "ffn_ratio x width must be at least 128"
        self._refuse(problems)
        return self


class TextEncoderConfig(Section):
    """Which T5 encoder reads the prompts.

    `source` names a transformers folder or hub repository with fixed weights, or is `new`: an encoder of the
    geometry given here, with a vocabulary learned from the captions and weights trained together with the
    transformer.
    """

    source: str = Field(min_length=1, description="transformers folder, hub repository, or `new`")
    vocabulary: PositiveInt | None = Field(default=None, description="most entries the vocabulary gets")
    width: Channels | None = Field(default=None, description="channels; must equal transformer.text_width")
    layers: Annotated[PositiveInt, Field(le=MOST_BLOCKS)] | None = Field(default=None, description="blocks")
    heads: PositiveInt | None = Field(default=None, description="attention heads; width must divide by it")
    ffn_width: Channels | None = Field(default=None, description="channels inside the feed-forward")

    @model_validator(mode="after")
    def _geometry(self) -> TextEncoderConfig:
        problems = {}
        for name in ("vocabulary", "width", "layers", "heads", "ffn_width"):
            value = getattr(self, name)
            if self.source == "new" and value is None:
                problems[name] = "must be given for source 'new'"
            if self.source != "new" and value is not None:
                problems[name] = "must be null: it belongs to source 'new' alone"
        if self.source == "new" and self.width and self.heads and self.width % self.heads:
            problems["heads"] = f"width {self.width} must divide by it"
        self._refuse(problems)
        return self


def _number_as_text(value: Any) -> Any:
    """Keys of a mapping as text: YAML reads an unquoted 1.0 as a number."""
    if not isinstance(value, dict):
        return value
    return {str(key) if isinstance(key, int | float) else key: sizes for key, sizes in value.items()}


Sizes = Annotated[list[tuple[PositiveInt, PositiveInt]], Field(min_length=1)]
CustomScales = Annotated[dict[str, Sizes], Field(min_length=1), BeforeValidator(_number_as_text)]


class ScalesConfig(Section):
    """The scale schedules a model is used with.

    `published: true` takes Infinity's table (15 aspect ratios, four pixel budgets); otherwise `custom` gives
    the sizes.
    """

    published: bool = Field(description="Infinity's table, or custom sizes")
    resolution: Resolution | None = Field(
        default=None, description="pixel budget used unless another is asked for"
    )
    custom: CustomScales | None = Field(
        default=None,
        description="[h, w] of each scale, from [1, 1] up, per aspect ratio (height / width)",
        examples=[{"1.0": [[1, 1], [2, 2], [3, 3]]}],
    )

    @model_validator(mode="after")
    def _one_of(self) -> ScalesConfig:
        problems = {}
        if self.published:
            if self.custom is not None:
                problems["custom"] = "must be null with published: true"
            if self.resolution is None:
                problems["resolution"] = "must be given with published: true: 0.06M, 0.25M, 0.60M or 1M"
        else:
            if self.resolution is not None:
                problems["resolution"] = "must be null with published: false"
            wrong = (
                "must be given with published: false" if self.custom is None else _wrong_sizes(self.custom)
            )
            if wrong is not None:
                problems["custom"] = wrong
        self._refuse(problems)
        return self


def _wrong_sizes(custom: dict[str, list[tuple[int, int]]]) -> str | None:
    """What is wrong with custom sizes; None when nothing is."""
    known: set[float] = set()
    for ratio, sizes in custom.items():
        try:
            number = float(ratio)
        except ValueError:
            return f"aspect ratio {ratio!r} is not a number (height / width)"
        if not 0 < number < math.inf:
            return f"aspect ratio {ratio} must be above 0"
        if number in known:
            return f"aspect ratio {ratio} is there twice"
        known.add(number)
        if sizes[0] != (1, 1):
            return f"the schedule of ratio {ratio} must start with [1, 1]"
        for (h0, w0), (h1, w1) in pairwise(sizes):
            if h1 < h0 or w1 < w0:
                return f"the schedule of ratio {ratio} must not shrink: {h0}x{w0} to {h1}x{w1}"
    return None


class ModelConfig(Section):
    """Everything that defines a model; stored in config.json of a model folder."""

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    scales: ScalesConfig

    @property
    def bits_per_position(self) -> int:
        """K: bits the transformer predicts per position, with all the bits the tokenizer is used with."""
        return self.tokenizer.most_bits * (4 if self.transformer.patchify else 1)

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        problems = {}
        width, text_width = self.text_encoder.width, self.transformer.text_width
        if width is not None and width != text_width:
            problems["text_encoder.width"] = f"must equal transformer.text_width {text_width}"
        custom = self.scales.custom
        longest = PUBLISHED_SCALES if custom is None else max(len(sizes) for sizes in custom.values())
        if longest > self.transformer.scale_embeddings:
            problems["transformer.scale_embeddings"] = (
                f"must be at least {longest}, the scales of the longest schedule"
            )
        self._refuse(problems)
        return self


class SamplingConfig(Section):
    """Defaults of `bitgen sample`; numbers, or one number per scale."""

    cfg: PerScale = Field(default=3.0, description="guidance: cfg x conditional + (1 - cfg) x unconditional")
    cfg_layer: NonNegativeInt | list[NonNegativeInt] = Field(
        default=0, description="0: guide the logits; n: the output of block depth - n; several may be listed"
    )
    tau: PositivePerScale = Field(default=1.0, description="temperature: logits are divided by it")
    target_confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = Field(
        default=None,
        description="each scale's temperature, in place of tau, is the one with which its bits are so sure on average",
    )
    top_k: NonNegativeInt = Field(
        default=0, description="1 is greedy; 0 or 2 and more keep both values of a bit"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.97, description="a bit's lesser value is dropped when its probability is at most 1 - top_p"
    )
    fast: Annotated[int, Field(ge=0, le=3)] = Field(
        default=0, description="how much is left out on late scales: guidance, and positions that change little"
    )
    refine: Annotated[int, Field(ge=0, le=16)] = Field(
        default=0, description="rounds after drawing in which bits that the model finds unlikely are turned over"
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = Field(description="the peak")
    betas: tuple[BelowOne, BelowOne] = Field(default=(0.9, 0.97), description="of AdamW's two running means")
    epsilon: PositiveFloat = Field(default=1e-8, description="of AdamW: added to what is divided by")
    weight_decay: NonNegativeFloat = Field(default=0.005, description="of AdamW, for matrices alone")
    clip_norm: PositiveFloat = Field(default=5.0, description="longest gradient; longer ones are shortened to it")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps until the peak is reached")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="after the warm-up")
    final_learning_rate: Fraction = Field(default=0.01, description="end of the cosine / learning_rate")


class LoopConfig(Section):
    """What every training stage has."""

    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(description="pictures per micro-batch, over all ranks together")
    accumulation: PositiveInt = Field(default=1, description="micro-batches per step")
    optimizer: OptimizerConfig
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="autocast of the forward pass; fp16 scales the loss so that nothing gets lost"
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="0 keeps no averaged weights"
    )
    seed: int = Field(default=0, description="of everything random")
    workers: NonNegativeInt = Field(default=0, description="processes that read pictures ahead")
    log_every: PositiveInt = Field(default=10, description="steps between two lines of metrics.jsonl")
    validate_every: PositiveInt = Field(default=500, description="steps between looks at the pictures held out")
    validation_images: NonNegativeInt = Field(default=256, description="pictures held out for validation")
    sample_every: NonNegativeInt = Field(
        default=1000, description="steps between picture grids; 0 draws none"
    )
    save_every: PositiveInt = Field(default=500, description="steps between checkpoints")
    keep_last: PositiveInt = Field(default=2, description="checkpoints kept besides the best one")
    keep_every: NonNegativeInt = Field(
        default=0, description="keep the checkpoints of all steps that this divides as well; 0 keeps none"
    )
    divergence: NonNegativeFloat = Field(
        default=2.0,
        description="stop when the mean loss of 20 steps has risen above the first ones' by this times; 0 never does",
    )
    export_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="number type of the model folder the run leaves"
    )


Shapes = list[Annotated[str, Field(pattern=r"^[0-9]{1,6}:[0-9]{1,6}$")]]
_CHECKPOINTED = "compute activations again in the backward pass: less memory, more time"
_SHAPES = "shapes W:H that pictures are cropped to, the nearest one each; empty is all of them"


class TokenizerTraining(LoopConfig):
    """Stage `tokenizer`: the autoencoder and its bits."""

    l1_weight: NonNegativeFloat = Field(default=1.0, description="mean absolute error of the pixels")
    l2_weight: NonNegativeFloat = Field(default=0.0, description="mean squared error of the pixels")
    structural_weight: NonNegativeFloat = Field(default=0.1, description="1 - SSIM")
    perceptual_weight: NonNegativeFloat = Field(
        default=0.0, description="LPIPS on VGG-16; needs `pip install bitgen[lpips]`"
    )
    adversarial_weight: NonNegativeFloat = Field(
        default=0.0, description="of a discriminator of patches; 0 trains none"
    )
    adversarial_start: NonNegativeInt = Field(default=0, description="the step it begins to learn and to count in")
    adversarial_adaptive: bool = Field(
        default=True, description="it moves the decoder's last layer as much as the reconstruction's losses do"
    )
    discriminator_channels: Channels = Field(default=64, description="of its first layer")
    discriminator_layers: Annotated[int, Field(ge=1, le=6)] = Field(default=3, description="that halve the picture")
    discriminator_pace: PositiveFloat = Field(default=1.0, description="its learning rate / the tokenizer's")
    entropy_weight: NonNegativeFloat = Field(default=0.05, description="BSQ: sure bits, evenly used bits")
    commitment_weight: NonNegativeFloat = Field(default=0.02, description="latent near its quantised sum")
    scale_dropout: Fraction = Field(
        default=0.0, description="share of pictures that are decoded without their last scales"
    )
    scale_dropout_keep: PositiveInt = Field(default=1, description="scales that stay in any case")
    resolutions: Annotated[list[Resolution | PositiveInt], Field(min_length=1)] | None = Field(
        default=None,
        description="pixel budgets of which one is drawn per batch, or with custom scales how many of the scales; "
        "none: the model's own",
    )
    every_bit_count: bool = Field(
        default=False,
        description="decode each batch with every number of model.tokenizer.active_bits, not with one that is drawn",
    )
    picture_cache: NonNegativeFloat = Field(
        default=2.0, description="GiB of memory for pictures already read"
    )
    aspects: Shapes = Field(default=[], description=_SHAPES)


ScaleWeighting = Literal["positions", "published", "scales"]
_SCALE_WEIGHTING = (
    "weight of a position: the same everywhere; as published, 1 / sqrt(h w) of its scale; or 1 / (h w), so that all "
    "scales weigh the same and coarse ones count most"
)


class TransformerTraining(LoopConfig):
    """Stage `transformer`: bitwise cross-entropy over all scales (INFINITY_FORMAT section 6)."""

    scale_weighting: ScaleWeighting = Field(default="published", description=_SCALE_WEIGHTING)
    bit_loss: Literal["mean", "sum"] = Field(default="mean", description="over the bits of a position")
    compile: bool = Field(
        default=False,
        description="torch.compile of the blocks: 1.4 times as fast on a CPU; needs a C++ compiler",
    )
    flip_strength: Fraction = Field(
        default=0.3, description="self-correction: bits flip with up to this probability"
    )
    flip_scales: NonNegativeInt = Field(default=13, description="scales that get flips")
    flip_warmup_steps: NonNegativeInt = Field(default=0, description="steps until flip_strength is reached")
    caption_dropout: Fraction = Field(
        default=0.1, description="share of prompts replaced by the unconditional one"
    )
    checkpoint_activations: bool = Field(default=False, description=_CHECKPOINTED)
    picture_cache: NonNegativeFloat = Field(
        default=2.0, description="GiB of memory for pictures already tokenized, where they are so while it trains"
    )
    aspects: Shapes = Field(default=[], description=f"{_SHAPES}; a token store has its own")


SubjectPart = Literal["token", "text", "cross", "ffn", "self", "lora", "all"]
LoraLayer = Literal["cross", "ffn", "self"]


class SubjectTraining(LoopConfig):
    """Stage `subject`: one subject from a few photos (DreamBooth, arXiv 2208.12242), for a bitwise model."""

    steps: PositiveInt = Field(default=400, description="optimizer steps")
    batch_size: PositiveInt = Field(default=1, description="photos per micro-batch; as many class samples join them")
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, weight_decay=0.0, clip_norm=1.0, warmup_steps=10)
    validate_every: PositiveInt = Field(default=100, description="steps between looks at the drift")
    validation_images: NonNegativeInt = Field(default=16, description="pictures per prompt set that drift is told by")
    sample_every: NonNegativeInt = Field(default=100, description="steps between picture grids; 0 draws none")
    save_every: PositiveInt = Field(default=100, description="steps between checkpoints")
    export_precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp16", description="number type of the subject file"
    )
    train: Annotated[list[SubjectPart], Field(min_length=1)] = Field(
        default=["token", "cross", "ffn"], description="what learns the subject; everything else is frozen"
    )
    token_learning_rate: PositiveFloat = Field(default=1e-3, description="the peak for the token's embedding")
    token_head_start: BelowOne = Field(
        default=0.1,
        description="share of the steps in which the token's embedding learns alone: what the model can already draw "
        "is then in the token, which prompts combine with anything, and the weights learn the rest",
    )
    lora_rank: PositiveInt = Field(default=16, description="of the adapters that `lora` in train adds")
    lora_alpha: PositiveFloat = Field(default=16.0, description="the adapter is scaled by lora_alpha / lora_rank")
    lora_layers: Annotated[list[LoraLayer], Field(min_length=1)] = Field(
        default=["cross", "ffn"], description="where they are added"
    )
    prior: Literal["images", "distill", "none"] = Field(
        default="images",
        description="what keeps the class: pictures by the base model, samples of it that stay bits, nothing",
    )
    prior_weight: NonNegativeFloat = Field(default=2.0, description="weight of the class's loss")
    prior_targets: Literal["probabilities", "bits"] = Field(
        default="probabilities",
        description="what the pictures of prior images teach: how likely the base model finds each of their bits, or "
        "the bits themselves as in DreamBooth, which keeps less of the class's variety",
    )
    prior_images: PositiveInt = Field(default=64, description="class samples of the base model")
    photo_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default=["a {subject}", "a photo of a {subject}", "one {subject}", "the {subject}"],
        description="captions of photos without one of their own; {subject} is the token and the class",
    )
    likely_captions: list[str] = Field(
        default=[],
        description="captions with {subject}; photos without one of their own are half of the time learned from with "
        "the one that the base model finds likeliest, so that what stands around the subject is not taken for a part "
        "of it; none leaves that out",
    )
    prior_templates: Annotated[list[str], Field(min_length=1)] = Field(
        default=["a {class}", "a photo of a {class}", "one {class}", "the {class}"],
        description="prompts of the class samples",
    )
    resolution: Resolution | None = Field(
        default=None, description="pixel budget learned and drawn at; null takes the model's own"
    )
    buckets: bool = Field(
        default=False, description="give each photo the aspect ratio nearest to its own; otherwise all are square"
    )
    views: PositiveInt = Field(default=8, description="crops of each photo that are learned from")
    crop: BelowOne = Field(default=0.1, description="share of a photo's side that a crop may leave out")
    flip: bool = Field(default=False, description="mirror half of the crops; wrong for subjects whose sides differ")
    scale_weighting: ScaleWeighting = Field(default="published", description=_SCALE_WEIGHTING)
    bit_loss: Literal["mean", "sum"] = Field(default="mean", description="over the bits of a position")
    flip_strength: Fraction = Field(
        default=0.1, description="self-correction: bits flip with up to this probability"
    )
    flip_scales: NonNegativeInt = Field(default=13, description="scales that get flips")
    caption_dropout: Fraction = Field(
        default=0.25,
        description="share of class batches without captions, for which the base model's bit distributions are kept",
    )
    other_prompts: list[str] = Field(
        default=[],
        description="prompts of other things than the class, whose bit distributions are kept as well; those that name "
        "the class are left out",
    )
    other_images: PositiveInt = Field(default=64, description="samples of the base model of these")
    other_share: Fraction = Field(default=0.25, description="share of class batches that they take the place of")
    unrelated_prompts: Annotated[list[str], Field(min_length=1)] = Field(
        default=[
            "a house in the snow",
            "a red car on the road",
            "a tree on the grass",
            "a blue boat by the sea",
            "a white cat in a room",
            "a yellow flower in a meadow",
            "a green robot in the city",
            "an orange fish underwater",
        ],
        description="prompts that have nothing to do with the subject; their pictures show the drift",
    )
    checkpoint_activations: bool = Field(default=False, description=_CHECKPOINTED)

    @property
    def first_whole_step(self) -> int:
        """The step from which everything that `train` names learns, not only the token."""
        return int(self.token_head_start * self.steps) if {"token", "all"} & set(self.train) else 0

    @property
    def keeps_class(self) -> bool:
        """Whether class samples are learned from; the token alone cannot change what prompts without it mean."""
        return self.prior != "none" and self.prior_weight > 0 and set(self.train) != {"token"}

    @model_validator(mode="after")
    def _templates(self) -> SubjectTraining:
        problems = {}
        fields = {"photo_templates": "{subject}", "likely_captions": "{subject}", "prior_templates": "{class}"}
        for key, field in fields.items():
            wrong = [template for template in getattr(self, key) if field not in template]
            if wrong:
                problems[key] = f"{wrong[0]!r} must contain {field}"
        if self.other_prompts and self.caption_dropout + self.other_share > 1:
            problems["other_share"] = "must leave something to the class: with caption_dropout it is more than 1"
        self._refuse(problems)
        return self


class TrainingConfig(Section):
    """Recipes of the stages; a preset may carry some or all."""

    tokenizer: TokenizerTraining | None = None
    transformer: TransformerTraining | None = None
    subject: SubjectTraining | None = None


class Config(Section):
    """A whole preset or --config file."""

    name: str = Field(min_length=1, description="what it is called")
    description: str = Field(default="", description="one line")
    model: ModelConfig
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        layers, depth = self.sampling.cfg_layer, self.model.transformer.depth
        if max([layers] if isinstance(layers, int) else layers, default=0) > depth:
            self._refuse({"sampling.cfg_layer": f"must be at most model.transformer.depth {depth}"})
        tokenizer = self.training.tokenizer
        if tokenizer is not None:
            self._refuse(_wrong_recipe(tokenizer, self.model.scales))
        return self


def _wrong_recipe(recipe: TokenizerTraining, scales: ScalesConfig) -> dict[str, str]:
    """What of a tokenizer's recipe does not fit the model's scales, by dotted key."""
    problems = {}
    budgets = recipe.resolutions or []
    numbers = [budget for budget in budgets if isinstance(budget, int)]
    shortest = PUBLISHED_SCALES
    if scales.custom is not None:
        shortest = min(len(sizes) for sizes in scales.custom.values())
        if len(numbers) < len(budgets) or max(numbers, default=1) > shortest:
            problems["training.tokenizer.resolutions"] = f"must be numbers of scales, at most {shortest}"
    elif numbers:
        problems["training.tokenizer.resolutions"] = "must be pixel budgets: 0.06M, 0.25M, 0.60M or 1M"
    if recipe.scale_dropout and recipe.scale_dropout_keep > shortest:
        problems["training.tokenizer.scale_dropout_keep"] = f"must be at most {shortest}, the scales there are"
    return problems
