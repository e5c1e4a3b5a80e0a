"""Training stage `transformer`: prompts and coarser scales to the bits of the next scale."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitgen_cli.config import Config, TransformerTraining
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.bits import to_positions
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import grid, to_uint8
from bitgen_cli.engine.device import DTYPES
from bitgen_cli.engine.losses import bit_loss
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.pyramid import ChangeBits
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.scales import RESOLUTIONS, Schedule, schedule
from bitgen_cli.engine.self_correction import flipper
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.text import TextEncoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.trainer import Pace, chunks, grouped, split
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.files import atomic_path, write_text

GRID_COLUMNS = 8
IN_MEMORY = 2 << 30
"""Bytes of latents that are kept in memory; larger stores are read as they are needed."""
SHORT = 128
"""Positions of a picture up to which attention is computed as plain products on the CPU."""


class Trained(nn.Module):
    """What the stage trains: the transformer, and the text encoder when that is trained with it."""

    def __init__(self, transformer: Transformer, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(True)
        self.text_encoder = None if text_encoder is None else text_encoder.requires_grad_(True)


class TransformerStage:
    """Bitwise cross-entropy over all scales of the pictures of a token store.

    Args:
        config: the whole configuration; its training.transformer must be there.
        store: bits, captions and, for self-correction, latents.
        tokenizer: the one that made the store; draws the picture grids.
        tokenizer_file: its weights, copied into the model folder byte for byte.
        transformer: what is trained.
        text_encoder: trained too when the configuration's source is `new`, else fixed; None takes the store's text
            features, which the same encoder has made.
        device: where it is computed.

    Raises:
        UsageError: the store's scales are not the model's, or it has no latents and flips are asked for.
        ResourceError: compilation is asked for where there is no compiler.
    """

    def __init__(
        self,
        config: Config,
        store: TokenStore,
        tokenizer: Tokenizer,
        tokenizer_file: Path,
        transformer: Transformer,
        text_encoder: TextEncoder | None,
        device: torch.device,
    ) -> None:
        training = config.training.transformer
        assert training is not None
        self.config = config
        self.paces: Mapping[str, Pace] = {}
        self.training: TransformerTraining = training
        self.store = store
        self.device = device
        self.tokenizer = tokenizer.requires_grad_(False).to(device).eval()
        self.tokenizer_file = tokenizer_file
        self.text_encoder = None if text_encoder is None else text_encoder.to(device).requires_grad_(False)
        self.text_is_trained = config.model.text_encoder.source == "new"
        transformer.checkpoint_activations = training.checkpoint_activations
        if training.compile:
            _compile(transformer, device)
        self.module = Trained(transformer.to(device), self.text_encoder if self.text_is_trained else None)
        self._require_fit()
        trained, held_out = split(len(store), training.validation_images, training.seed)
        self.groups = grouped(trained, store.ratio)
        self._validation = chunks(grouped(held_out, store.ratio), training.batch_size)
        self._ids = None if text_encoder is None else text_encoder.tokenise(store.captions)
        self._latents = _Latents(store, device)
        shown = next(iter(self._validation or self.groups))
        self._shown = shown[:: max(1, len(shown) // GRID_COLUMNS)][:GRID_COLUMNS]

    def ahead(self, indices: list[int]) -> None:
        """Nothing to do: a token store needs no reading ahead."""

    def loss(
        self, indices: list[int], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Bitwise cross-entropy of one micro-batch; caption dropout and flips come from the generator."""
        dropped = torch.rand(len(indices), generator=generator) < self.training.caption_dropout
        strength = self._flip_strength(step)
        flips = flipper(strength, self.training.flip_scales, generator) if strength > 0 else None
        loss, accuracy, per_scale = self._losses(indices, flips, dropped)
        measured = {f"bit_accuracy/{k}": value for k, value in enumerate(accuracy.unbind())}
        return loss, measured | {f"loss/{k}": value for k, value in enumerate(per_scale.unbind())}

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures, unchanged: val_loss, val_bit_accuracy/k, val_loss/k."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for indices in self._validation:
            loss, accuracy, per_scale = self._losses(indices, None, None)
            measured = {"val_loss": loss.item()}
            measured |= {f"val_bit_accuracy/{k}": value for k, value in enumerate(accuracy.tolist())}
            measured |= {f"val_loss/{k}": value for k, value in enumerate(per_scale.tolist())}
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value * len(indices)
                counts[name] = counts.get(name, 0) + len(indices)
        return {name: value / counts[name] for name, value in sums.items()}

    def draw_samples(self, file: Path) -> None:
        """Stored pictures, decoded, above pictures drawn from their captions; captions.txt names those."""
        scales = self.store.schedule(self.store.ratio(self._shown[0]))
        captions = [self.store.captions[index] for index in self._shown]
        bits = [grid.to(self.device) for grid in self.store.bits(self._shown)]
        stored = self.tokenizer.decode_bits(bits, scales)
        text = self._text(self._shown)
        steps = plan(self.config.sampling, len(scales))
        seeds = range(len(captions))
        drawn, _ = generate(self.module.transformer, self.tokenizer, text, scales, steps, seeds)
        with atomic_path(file) as temporary:
            both = to_uint8(torch.cat((stored.float(), drawn))).cpu()
            grid(both, len(captions)).save(temporary, format="PNG")
        write_text(file.with_name("captions.txt"), "\n".join(captions) + "\n")

    def export(self, run: RunFolder, *, best: bool) -> None:
        """A whole model folder; a text encoder that is not trained is left where it is."""
        save_model(
            run.model,
            self.config.model,
            self.config.sampling,
            tokenizer=self.tokenizer_file,
            transformer=self.module.transformer,
            text_encoder=self.module.text_encoder,
            dtype=DTYPES[self.training.export_precision],
        )

    def close(self) -> None:
        """Nothing works in the background."""

    def _losses(
        self, indices: list[int], flips: ChangeBits | None, dropped: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, bit accuracy per scale and loss per scale."""
        scales = self.store.schedule(self.store.ratio(indices[0]))
        targets, inputs = self._teacher(indices, scales, flips)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            text = self._text(indices)
            if dropped is not None:
                text = self._drop(text, dropped)
            recomputed = self.training.checkpoint_activations
            with attention(self.device, self.training.precision, scales, recomputed=recomputed):
                logits = self.module.transformer(inputs, text, scales)
        return bit_loss(logits, targets, scales, self.training)

    def _teacher(
        self, indices: list[int], scales: Schedule, flips: ChangeBits | None
    ) -> tuple[Tensor, Tensor]:
        """Targets (B, L, K) bool and inputs (B, L - 1, K)."""
        latent = self._latents(indices)
        if latent is not None:
            return as_positions(*pyramid.teacher_inputs(latent, scales, flips), scales)
        targets = [bits.to(self.device) for bits in self.store.bits(indices)]
        return as_positions(targets, pyramid.inputs_from_bits(targets, scales), scales)

    def _text(self, indices: list[int]) -> TextFeatures:
        """Features of the captions: as the text encoder makes them, or as they are stored."""
        if self.text_encoder is None or self._ids is None:
            stored = self.store.text_features(indices)
            assert stored is not None
            return TextFeatures(stored.features.to(self.device), stored.lengths)
        ids = [self._ids[index] for index in indices]
        if self.text_is_trained:
            return self.text_encoder.encode_ids(ids)
        with torch.no_grad():
            return self.text_encoder.encode_ids(ids)

    def _drop(self, text: TextFeatures, dropped: Tensor) -> TextFeatures:
        """The unconditional prompt of the same length in place of the dropped ones."""
        null = self.module.transformer.null_features(text.lengths).features
        features = torch.where(dropped.to(self.device)[:, None, None], null, text.features)
        return TextFeatures(features, text.lengths)

    def _flip_strength(self, step: int) -> float:
        warmup = self.training.flip_warmup_steps
        return self.training.flip_strength * (min(1.0, step / warmup) if warmup else 1.0)

    def _require_fit(self) -> None:
        model = self.config.model
        if self.training.flip_strength > 0 and not self.store.manifest.latents:
            raise UsageError(
                f"the token store {self.store.path} has no latents, which self-correction flips need",
                "tokenize again with latents, or set training.transformer.flip_strength=0",
            )
        budgets = [None] if model.scales.custom is not None else list(RESOLUTIONS)
        for ratio in self.store.ratios:
            known = [
                schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio, resolution=budget)
                for budget in budgets
            ]
            own = self.store.schedule(ratio)
            if own not in known:
                raise UsageError(
                    f"the token store {self.store.path} and the model differ in the scales of ratio {ratio}",
                    "tokenize again with this configuration's tokenizer and scales",
                )
            plan(self.config.sampling, len(own))


def as_positions(targets: list[Tensor], inputs: list[Tensor], scales: Schedule) -> tuple[Tensor, Tensor]:
    """Targets (B, L, K) bool and inputs (B, L - 1, K) of grids (B, C, h, w) per scale."""
    target_positions = torch.cat([to_positions(bits, scales.cell) for bits in targets], dim=1)
    # a schedule of one scale has no inputs
    empty = targets[0].new_zeros((target_positions.shape[0], 0, target_positions.shape[-1]), dtype=torch.float32)
    return target_positions, torch.cat([empty, *(to_positions(seen, scales.cell) for seen in inputs)], dim=1)


def _compile(transformer: Transformer, device: torch.device) -> None:
    """Compiles the blocks' teacher-forced pass; sampling's steps stay as they are.

    Raises:
        ResourceError: there is no compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ResourceError(
            f"there is no C++ compiler {compiler}, which torch.compile needs",
            "install one, or set training.transformer.compile=false",
        )
    for block in transformer.blocks:
        block.compile()


def attention(
    device: torch.device, precision: str, scales: Schedule, *, recomputed: bool
) -> AbstractContextManager[None]:
    """Makes attention plain products for short bfloat16 sequences on the CPU, else leaves it to torch.

    Activations that are recomputed in the backward pass are so outside of this context, and must come out the same.

    The fused attention of the CPU takes 2 to 3 times as long there in bfloat16, measured forward and backward
    at 30 positions; in float32 it is the faster one.
    """
    if device.type == "cpu" and precision == "bf16" and scales.positions <= SHORT and not recomputed:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class _Latents:
    """Latents of a store, in memory where they fit.

    Args:
        store: where they are read.
        device: where they are handed out.
    """

    def __init__(self, store: TokenStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._kept: dict[float, Tensor] = {}
        self._row = torch.zeros(len(store), dtype=torch.long)
        if not store.manifest.latents:
            return
        groups = {ratio: store.indices_of(ratio) for ratio in store.ratios}
        shapes = {
            ratio: torch.Size((len(group), store.manifest.bits, *store.schedule(ratio).latent_sizes[-1]))
            for ratio, group in groups.items()
        }
        if sum(2 * shape.numel() for shape in shapes.values()) > IN_MEMORY:
            return
        for ratio, group in groups.items():
            self._row[group] = torch.arange(len(group))
            # they are stored as bfloat16 too: nothing is lost
            kept = torch.empty(shapes[ratio], dtype=torch.bfloat16, device=device)
            for start in range(0, len(group), 1024):
                part = store.latents(group[start : start + 1024])
                assert part is not None
                kept[start : start + 1024] = part
            self._kept[ratio] = kept

    def __call__(self, indices: list[int]) -> Tensor | None:
        """(B, C, H, W) float32 of pictures of one aspect ratio; None where the store has none."""
        kept = self._kept.get(self._store.ratio(indices[0]))
        if kept is not None:
            return kept[self._row[indices].to(self._device)].float()
        latents = self._store.latents(indices)
        return None if latents is None else latents.to(self._device)
