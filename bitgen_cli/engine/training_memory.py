"""How much memory a training needs, by rehearsing its step on tensors without contents (rehearsal.py).

The estimate is of what tensors hold. The program and its libraries, the work space of kernels and what an allocator
wastes come on top: allow 0.5 to 1 GiB for those. Autocast follows the rules of the device. Text encoders are counted,
not rehearsed, and picture grids are estimated as in memory.py. Prompts are taken to be as long as the model allows.

Blocks are alike: a transformer is rehearsed with one and with two of them, which says what each further one adds.

`python -m tests.benchmarks.memory` compares with real trainings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from bitgen_cli.config import Config, LoopConfig, ModelConfig, SubjectTraining
from bitgen_cli.engine import lora
from bitgen_cli.engine.adversary import PatchDiscriminator
from bitgen_cli.engine.codec import Codec, Division
from bitgen_cli.engine.device import DTYPES, autocast
from bitgen_cli.engine.losses import bit_loss, distillation_loss, one_rank
from bitgen_cli.engine.memory import (
    BYTES,
    FP32,
    Parameters,
    TextGeometry,
    block_parameters,
    decoder_peak,
    derived_weights,
    sampling_memory,
    text_geometry,
    with_depth,
)
from bitgen_cli.engine.online import TOGETHER
from bitgen_cli.engine.parts import is_trained
from bitgen_cli.engine.rehearsal import FORWARD, Rehearsal, Rehearsed, infer, rehearsal, rehearse
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokenizer_stage import forward_loss
from bitgen_cli.engine.trained_tokenizer import TrainedTokenizer
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.engine.transformer_stage import GRID_COLUMNS, SHORT, attention

_ADAM = 8
"""Bytes AdamW keeps per trained parameter: two float32 averages."""
_BLAS_WORKSPACE = {9: 32 << 20, 10: 32 << 20}
_BLAS_WORKSPACE_ELSE = 8_519_680
"""Bytes torch gives cuBLAS on a GPU, by the major number of its capability (torch: ATen/cuda/CublasHandlePool.cpp)."""
_T5_BYTES = {"fp32": (40, 28), "bf16": (40, 14), "fp16": (40, 14)}
"""Bytes kept per text token and T5 layer: for each channel of the width, and of the feed-forward width."""


@dataclass(frozen=True)
class Layout:
    """Where a training is computed.

    Attributes:
        device: of each rank.
        ranks: processes, each with a device of its own, which share every micro-batch.
        sharded: whether weights, gradients, optimizer and averages are divided among the ranks (FSDP), or each has all
            of them (DDP).
    """

    device: torch.device
    ranks: int = 1
    sharded: bool = False

    def share(self, size: int) -> int:
        """Bytes on each rank of what may be divided."""
        return -(-size // self.ranks) if self.sharded else size

    def rows(self, batch_size: int) -> int:
        """Pictures of a micro-batch on each rank."""
        return -(-batch_size // self.ranks)


CPU = Layout(torch.device("cpu"))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that each rank of a training needs.

    Attributes:
        weights: of what is trained, float32.
        gradients: float32.
        optimizer: AdamW's two averages.
        average: averaged weights; 0 without.
        frozen: weights of the parts that are only used.
        gathered: where ranks divide the weights, those of one block and its gradients, whole; else 0.
        workspace: of a GPU's matrix products; 0 elsewhere.
        activations: what a micro-batch holds at its peak, bfloat16 copies of weights included.
        step: activations and gradients at their common peak; without accumulation the ones come as the others go.
        validation: gradients, weights put aside while averaged ones are looked at, and pictures without gradients.
        drawing: the same while a picture grid is drawn; 0 without.
        encoding: the same while pictures are tokenized; 0 where they are in a store.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    gathered: int
    workspace: int
    activations: int
    step: int
    validation: int
    drawing: int
    encoding: int = 0

    @property
    def total(self) -> int:
        """The peak of everything."""
        kept = self.weights + self.optimizer + self.average + self.frozen + self.gathered + self.workspace
        return kept + max(self.step, self.validation, self.drawing, self.encoding)

    def to_json(self) -> dict[str, int]:
        """All parts and the total."""
        return {**asdict(self), "total": self.total}


LABELS = {
    "weights": "Trained weights",
    "gradients": "Gradients",
    "optimizer": "AdamW",
    "average": "Averaged weights",
    "frozen": "Weights only used",
    "gathered": "One block of all ranks",
    "workspace": "Work space of matrix products",
    "activations": "Activations of a micro-batch",
    "step": "Gradients and activations at once",
    "validation": "While validating",
    "drawing": "While drawing a picture grid",
    "encoding": "While tokenizing pictures",
}
"""Parts of TrainingMemory, for people."""


@dataclass(frozen=True)
class _Passes:
    """What pictures hold on their way through a module: in a training step, and without gradients."""

    step: Rehearsed
    looked: int

    def deeper(self, before: _Passes, times: int) -> _Passes:
        looked = self.looked + times * (self.looked - before.looked)
        return _Passes(self.step.deeper(before.step, times), looked)


def tokenizer_training_memory(
    config: Config, counts: Parameters, schedule: Schedule, layout: Layout = CPU
) -> TrainingMemory | None:
    """Memory of stage `tokenizer`, that of LPIPS aside; None when the configuration has no recipe for it."""
    training = config.training.tokenizer
    if training is None:
        return None
    height, width = schedule.pixels(config.model.tokenizer.patch_size)
    scales = _merged(schedule)
    counted = config.model.tokenizer.bit_counts
    bits, judged = (counted if training.every_bit_count else counted[-1:]), bool(training.adversarial_weight)
    with rehearsal(layout.device) as entered:
        discriminator = None
        if judged:
            discriminator = PatchDiscriminator(training.discriminator_channels, training.discriminator_layers)
        module = TrainedTokenizer(Tokenizer(config.model.tokenizer), discriminator, training.precision)
        judging = 0 if discriminator is None else sum(p.numel() for p in discriminator.parameters())

        def loss() -> Tensor:
            image = torch.empty(layout.rows(training.batch_size), 3, height, width)
            seen = module(image, scales, bits, judged=judged and torch.is_grad_enabled())
            return forward_loss(image, seen, module, training, None, one_rank)[0]

        found = _passes(entered, module, loss, training, layout)
    return _memory(
        training,
        layout,
        trained=counts.tokenizer + judging,
        block=max(counts.tokenizer_encoder, counts.tokenizer_decoder),
        passes=found,
        drawn=found.looked if training.sample_every else None,
    )


def transformer_training_memory(
    config: Config,
    counts: Parameters,
    schedule: Schedule,
    layout: Layout = CPU,
    *,
    stored_text: bool = False,
    tokenized: torch.dtype | None = None,
) -> TrainingMemory | None:
    """Memory of stage `transformer`; None when the configuration has no recipe for it.

    The tokenizer is there for picture grids, and for pictures that are tokenized while it trains; a new text encoder is
    trained too, another one only used, and not there at all where the store has its features.

    Args:
        config: the whole configuration.
        counts: parameters of the model.
        schedule: scales of the pictures.
        layout: where it is computed.
        stored_text: whether the features of the text encoder are in the store.
        tokenized: number type in which pictures are tokenized while it trains; None: they are in a store.
    """
    training = config.training.transformer
    if training is None:
        return None
    geometry = config.model.transformer
    rows, length, scales = layout.rows(training.batch_size), geometry.text_length, _merged(schedule)
    text = text_geometry(config.model.text_encoder)
    learns_text = config.model.text_encoder.source == "new"
    known = counts.text_encoder or 0

    def of(depth: int) -> _Passes:
        with rehearsal(layout.device) as entered:
            transformer = Transformer(with_depth(config.model, depth))
            transformer.checkpoint_activations = training.checkpoint_activations

            def loss() -> Tensor:
                inputs, targets = _bits(rows, scales, config.model)
                prompts = _prompts(rows, length, geometry.text_width, torch.float32, learn=learns_text)
                logits = _forward(transformer, inputs, prompts, scales, training)
                entered.mark(FORWARD)
                return bit_loss(logits, targets, scales, training)[0]

            return _passes(entered, transformer, loss, training, layout, transformer.blocks)

    passes = _deep(of, geometry.depth)
    if learns_text and text is not None:
        passes = _with_text(passes, text, rows * _t5_kept(text, length, training.precision), training, layout)
    shown = min(GRID_COLUMNS, rows) if training.validation_images else GRID_COLUMNS
    frozen = (counts.tokenizer + (0 if learns_text or stored_text else known)) * FP32
    if training.sample_every and layout.device.type == "cpu":
        frozen += derived_weights(config.model.tokenizer, schedule, FP32, encoder=False)
    encoded = 0
    if tokenized is not None:
        derived, encoded = _encoding(config.model, schedule, rows, layout, tokenized)
        frozen += derived
    memory = _memory(
        training,
        layout,
        trained=counts.transformer + (known if learns_text else 0),
        block=block_parameters(config.model),
        passes=passes,
        drawn=_drawing(config.model, counts, schedule, FP32, shown) if training.sample_every else None,
        frozen=frozen,
        workspace=_workspace(layout.device),
    )
    # pictures are tokenized for the validation too, when weights are put aside
    return replace(memory, encoding=memory.weights + memory.average + encoded) if encoded else memory


def subject_training_memory(
    config: Config,
    counts: Parameters,
    schedule: Schedule,
    text_tokens: int,
    layout: Layout = CPU,
    *,
    at_once: int = 1,
) -> TrainingMemory:
    """Memory of learning a subject; only what `train` names has gradients and optimizer state.

    On a CPU the autoencoder is there all the time; elsewhere it comes for picture grids alone.

    Args:
        config: its training.subject must be there.
        counts: parameters of the model.
        schedule: scales of the photos and class samples.
        text_tokens: of the longest caption.
        layout: where it is computed.
        at_once: pictures that are drawn together.
    """
    training = config.training.subject
    assert training is not None
    parts, number, dtype = set[str](training.train), BYTES[training.precision], DTYPES[training.precision]
    geometry = config.model.transformer
    scales = _merged(schedule)
    rows = layout.rows(training.batch_size) * (2 if training.keeps_class else 1)
    text, known = text_geometry(config.model.text_encoder), counts.text_encoder or 0
    to_text = bool(parts & {"token", "text", "all"})

    def of(depth: int) -> _Passes:
        with rehearsal(layout.device) as entered:
            transformer = _taught(with_depth(config.model, depth), training)

            def loss() -> Tensor:
                inputs, targets = _bits(rows, scales, config.model)
                prompts = _prompts(rows, text_tokens, geometry.text_width, dtype, learn=to_text)
                logits = _forward(transformer, inputs, prompts, scales, training)
                entered.mark(FORWARD)
                return _subject_loss(logits, targets, scales, training)

            # looking at pictures without gradients holds less than drawing them
            return _Passes(_step(entered, transformer, loss, training, layout, transformer.blocks), 0)

    passes = _deep(of, geometry.depth)
    if to_text and text is not None:
        passes = _with_text(passes, text, rows * _t5_kept(text, text_tokens, training.precision), training, layout)
    trained = _subject_parameters(config.model, training, counts)
    frozen = counts.transformer + known - (0 if training.train == ["token"] or parts <= {"lora", "token"} else trained)
    kept = max(0, frozen) * number
    if layout.device.type == "cpu":
        kept += counts.tokenizer * number
        kept += derived_weights(config.model.tokenizer, schedule, number, encoder=True)
    memory = _memory(
        training,
        layout,
        trained=trained,
        block=block_parameters(config.model),
        passes=passes,
        drawn=subject_drawing(config, counts, schedule, layout, at_once),
        frozen=kept,
        workspace=_workspace(layout.device),
    )
    # the base model's values are kept beside the trained ones
    return replace(memory, weights=2 * memory.weights)


def subject_drawing(config: Config, counts: Parameters, schedule: Schedule, layout: Layout, at_once: int) -> int:
    """Bytes that drawing so many pictures at once holds while a subject is learned, gradients and weights aside."""
    training = config.training.subject
    assert training is not None
    number = BYTES[training.precision]
    drawn = _drawing(config.model, counts, schedule, number, at_once)
    return drawn + (0 if layout.device.type == "cpu" else counts.tokenizer * number)


def _memory(
    training: LoopConfig,
    layout: Layout,
    *,
    trained: int,
    block: int,
    passes: _Passes,
    drawn: int | None,
    frozen: int = 0,
    workspace: int = 0,
) -> TrainingMemory:
    """The parts of a stage that trains so many parameters.

    Args:
        trained: parameters.
        block: parameters of the largest unit that is gathered whole where ranks divide the weights.
        passes: on each rank.
        drawn: bytes a picture grid holds; None when none is drawn.
        frozen: bytes of weights that are only used.
        workspace: bytes that libraries hold.
    """
    weights = layout.share(trained * FP32)
    average = weights if training.ema_decay else 0
    between = weights + average  # gradients of the last step, and weights put aside
    return TrainingMemory(
        weights=weights,
        gradients=weights,
        optimizer=layout.share(trained * _ADAM),
        average=average,
        frozen=frozen,
        gathered=2 * block * FP32 if layout.sharded else 0,
        workspace=workspace,
        activations=passes.step.peak.working,
        step=passes.step.peak.step,
        validation=between + passes.looked,
        drawing=0 if drawn is None else between + drawn,
    )


def _workspace(device: torch.device) -> int:
    """Bytes that matrix products keep on a GPU."""
    if device.type != "cuda":
        return 0
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0
    return _BLAS_WORKSPACE.get(major, _BLAS_WORKSPACE_ELSE)


# -- rehearsals --------------------------------------------------------------------------------------------------------


def _passes(
    entered: Rehearsal,
    module: nn.Module,
    loss: Callable[[], Tensor],
    training: LoopConfig,
    layout: Layout,
    blocks: nn.ModuleList | None = None,
) -> _Passes:
    looked = infer(entered, module.eval(), loss)
    return _Passes(_step(entered, module, loss, training, layout, blocks), looked)


def _step(
    entered: Rehearsal,
    module: nn.Module,
    loss: Callable[[], Tensor],
    training: LoopConfig,
    layout: Layout,
    blocks: nn.ModuleList | None,
) -> Rehearsed:
    share = 1 / layout.ranks if layout.sharded else 1.0
    kept = _keeps_gradients(training, layout)
    return rehearse(entered, module.train(), loss, blocks=blocks, gradients_kept=kept, gradient_share=share)


def _keeps_gradients(training: LoopConfig, layout: Layout) -> bool:
    """Whether gradients are there before a backward pass: of the micro-batch before, or in the buckets of DDP."""
    return training.accumulation > 1 or (layout.ranks > 1 and not layout.sharded)


def _deep(of: Callable[[int], _Passes], depth: int) -> _Passes:
    if depth <= 2:
        return of(depth)
    return of(2).deeper(of(1), depth - 2)


def _encoding(
    model: ModelConfig, schedule: Schedule, rows: int, layout: Layout, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes of the weights that a CPU encodes with in place of some convolutions' own, and of what pictures hold.

    Args:
        rows: pictures of a micro-batch on each rank.
        dtype: number type of the encoder's products.
    """
    height, width = schedule.pixels(model.tokenizer.patch_size)
    division = Division.of(layout.device, model.tokenizer.base_channels, height * width, TOGETHER)
    at_once = min(rows, division.at_once or rows)
    threads = min(division.threads, -(-rows // at_once))
    with rehearsal(layout.device) as entered:
        tokenizer = Tokenizer(model.tokenizer).requires_grad_(False)
        codec = Codec(tokenizer, model.tokenizer.most_bits, next(tokenizer.parameters()).device, dtype)

        def encode() -> Tensor:
            return codec.latent(torch.empty(at_once, 3, height, width, dtype=torch.uint8))

        encode()  # makes the derived weights
        held = infer(entered, tokenizer, encode)
    if layout.device.type != "cpu" or dtype != torch.float32:
        return 0, threads * held
    derived = [derived_weights(model.tokenizer, schedule, FP32, encoder=encoder) for encoder in (True, False)]
    return derived[0] - derived[1], threads * held


def _merged(schedule: Schedule) -> Schedule:
    """As many positions in three scales: fused attention to prefixes holds the same, and there is less to rehearse."""
    if schedule.positions <= SHORT or len(schedule) <= 3:
        return schedule
    between = sum(schedule.counts[1:-1])
    sizes = (schedule.sizes[0], (1, between), schedule.full)
    return Schedule(schedule.ratio, sizes, schedule.rope_grid, schedule.cell)


def _taught(model: ModelConfig, training: SubjectTraining) -> Transformer:
    """A transformer of which a subject's parts learn, those in float32."""
    transformer = Transformer(model)
    parts = set[str](training.train)
    if "lora" in parts:
        lora.attach(transformer, training.lora_layers, training.lora_rank, training.lora_alpha, training.seed)
    transformer.checkpoint_activations = training.checkpoint_activations
    for prefix, module in transformer.named_modules(prefix="transformer"):
        for name, parameter in module.named_parameters(recurse=False):
            learns = is_trained(f"{prefix}.{name}", parts)
            weight = parameter.detach().to(torch.float32 if learns else DTYPES[training.precision])
            setattr(module, name, nn.Parameter(weight, requires_grad=learns))
    return transformer


def _bits(rows: int, schedule: Schedule, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Inputs (B, L - 1, K) and targets (B, L, K)."""
    bits = model.bits_per_position
    inputs = torch.empty(rows, schedule.positions - 1, bits)
    return inputs, torch.empty(rows, schedule.positions, bits, dtype=torch.bool)


def _prompts(rows: int, length: int, width: int, dtype: torch.dtype, *, learn: bool) -> TextFeatures:
    return TextFeatures(torch.empty(rows, length, width, dtype=dtype, requires_grad=learn), (length,) * rows)


def _forward(
    transformer: Transformer, inputs: Tensor, text: TextFeatures, schedule: Schedule, training: LoopConfig
) -> Tensor:
    device, precision = transformer.device, training.precision
    with (
        autocast(device, precision),
        attention(device, precision, schedule, recomputed=transformer.checkpoint_activations),
    ):
        logits: Tensor = transformer(inputs, text, schedule)
    return logits


def _subject_loss(logits: Tensor, targets: Tensor, schedule: Schedule, training: SubjectTraining) -> Tensor:
    """The photos' loss and the class's, half of the batch each."""
    if not training.keeps_class or logits.shape[0] == 1:
        return bit_loss(logits, targets, schedule, training)[0]
    photos, others = logits.chunk(2)
    loss = bit_loss(photos, targets[: photos.shape[0]], schedule, training)[0]
    margins = torch.empty(others.shape[0], *targets.shape[1:])
    return loss + training.prior_weight * distillation_loss(others, margins, schedule, training)


# -- what is counted ---------------------------------------------------------------------------------------------------


def _with_text(passes: _Passes, text: TextGeometry, kept: int, training: LoopConfig, layout: Layout) -> _Passes:
    """The passes with those of a text encoder in front, whose activations go last and whose gradients come last."""
    layers = text.parameters - text.vocabulary * text.width
    more = kept + (layers * BYTES[training.precision] if training.precision != "fp32" else 0)
    gradients = layout.share(text.parameters * FP32)
    first = gradients if _keeps_gradients(training, layout) else 0
    *others, last = passes.step.windows
    windows = (*(window.with_more(more, first) for window in others), last.with_more(more, gradients))
    return _Passes(Rehearsed(windows), passes.looked)


def _t5_kept(text: TextGeometry, tokens: int, precision: str) -> int:
    """Bytes a prompt of so many tokens keeps for the backward pass of its encoder."""
    for_width, for_ffn = _T5_BYTES[precision]
    attention_weights = text.heads * tokens * FP32
    return text.layers * tokens * (text.width * for_width + text.ffn_width * for_ffn + attention_weights)


def _drawing(model: ModelConfig, counts: Parameters, schedule: Schedule, number: int, pictures: int) -> int:
    """Bytes that drawing pictures with guidance and decoding them together holds beside the weights."""
    found = sampling_memory(model, counts, schedule, number, pictures)
    decoded = pictures * decoder_peak(model.tokenizer, schedule) * number
    return max(found.kv_cache + found.text_cache + found.transformer_work, decoded)


def _subject_parameters(model: ModelConfig, training: SubjectTraining, counts: Parameters) -> int:
    """Parameters that learn a subject; the token's row is left out."""
    with torch.device("meta"):
        found = sum(p.numel() for p in _taught(model, training).parameters() if p.requires_grad)
    if set(training.train) & {"text", "all"} and counts.text_encoder is not None:
        geometry = text_geometry(model.text_encoder)
        assert geometry is not None
        found += counts.text_encoder - geometry.vocabulary * geometry.width
    return found
