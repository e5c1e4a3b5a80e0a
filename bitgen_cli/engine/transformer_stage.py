"""Training stage `transformer`: prompts and coarser scales to the bits of the next scale."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitgen_cli.config import Config, TransformerTraining
from bitgen_cli.engine import pyramid
from bitgen_cli.engine.active_bits import active, draw, logits_in_use, widened_positions
from bitgen_cli.engine.bits import to_positions
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import grid, to_uint8
from bitgen_cli.engine.device import DTYPES, autocast
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.losses import bit_loss
from bitgen_cli.engine.model_folder import save_model
from bitgen_cli.engine.optimizer import Pace
from bitgen_cli.engine.order import chunks, grouped, split
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.pyramid import ChangeBits
from bitgen_cli.engine.sampling import generate, plan
from bitgen_cli.engine.scales import RESOLUTIONS, Schedule, schedule
from bitgen_cli.engine.self_correction import flipper
from bitgen_cli.engine.sources import drawn_caption
from bitgen_cli.engine.text import TextEncoder
from bitgen_cli.engine.tokenizer import Tokenizer
from bitgen_cli.engine.tokens import Tokens
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.files import atomic_path, write_text

GRID_COLUMNS = 8
SHORT = 128
"""Positions of a picture up to which attention is computed as plain products on the CPU."""


class Trained(nn.Module):
    """What the stage trains: the transformer, and the text encoder when that is trained with it."""

    def __init__(self, transformer: Transformer, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.transformer = transformer.requires_grad_(True)
        self.text_encoder = None if text_encoder is None else text_encoder.requires_grad_(True)

    def forward(
        self,
        inputs: Tensor,
        text: TextFeatures | Sequence[Sequence[int]],
        scales: Schedule,
        dropped: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, L, 2K) of all scales.

        Args:
            inputs: (B, L - 1, K).
            text: features of B prompts, or their token ids for a text encoder that is trained too.
            scales: of the batch.
            dropped: (B,) bool, which prompts give way to the unconditional one of the same length; None is none.
            kept: as in `Transformer.forward`.
        """
        features = text if isinstance(text, TextFeatures) else self.features(text)
        if dropped is not None:
            null = self.transformer.null_features(features.lengths).features
            chosen = dropped.to(features.features.device)[:, None, None]
            features = TextFeatures(torch.where(chosen, null, features.features), features.lengths)
        logits: Tensor = self.transformer(inputs, features, scales, kept)
        return logits

    def features(self, ids: Sequence[Sequence[int]]) -> TextFeatures:
        """What the text encoder that is trained too makes of token ids."""
        assert self.text_encoder is not None
        return self.text_encoder.encode_ids(ids)


class TransformerStage:
    """Bitwise cross-entropy over all scales of pictures, of a token store or tokenized while it trains.

    Args:
        config: the whole configuration; its training.transformer must be there.
        tokens: bits, captions and, for self-correction, latents.
        tokenizer: the one that makes or made the bits; draws the picture grids.
        tokenizer_file: its weights, copied into the model folder byte for byte.
        transformer: what is trained.
        text_encoder: trained too when the configuration's source is `new`, else fixed; None takes the text
            features of the store, which the same encoder has made.
        device: where it is computed.

    Raises:
        UsageError: a store's scales are not the model's, it has too few bits, or it has no latents where flips or
            other numbers of bits need them.
        ResourceError: compilation is asked for where there is no compiler.
    """

    def __init__(
        self,
        config: Config,
        tokens: Tokens,
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
        self.bit_counts = config.model.tokenizer.bit_counts
        self.tokens = tokens
        self.device = device
        self.tokenizer = tokenizer.requires_grad_(False).to(device).eval()
        self.tokenizer_file = tokenizer_file
        self.text_encoder = None if text_encoder is None else text_encoder.to(device).requires_grad_(False)
        self.text_is_trained = config.model.text_encoder.source == "new"
        transformer.checkpoint_activations = training.checkpoint_activations
        if training.compile:
            _compile(transformer, device)
        self.module = Trained(transformer.to(device), self.text_encoder if self.text_is_trained else None)
        self._forward: Callable[..., Tensor] = self.module
        self._ranks = Ranks(device=device)
        self._require_fit()
        trained, held_out = split(len(tokens), training.validation_images, training.seed)
        self.groups = grouped(trained, tokens.ratio)
        self._validation = chunks(grouped(held_out, tokens.ratio), training.batch_size)
        # a picture without captions is learned with an empty prompt
        self._captions = [captions or ("",) for captions in tokens.captions]
        self._ids: list[list[list[int]]] | None = None
        if text_encoder is not None:
            ids = iter(text_encoder.tokenise([text for captions in self._captions for text in captions]))
            self._ids = [[next(ids) for _ in captions] for captions in self._captions]
        tokens.keep(device)
        shown = next(iter(self._validation or self.groups))
        self._shown = shown[:: max(1, len(shown) // GRID_COLUMNS)][:GRID_COLUMNS]

    def share(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._forward = ranks.wrap(self.module, list(self.module.transformer.blocks))

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self.tokens.keys[index] for index in self.tokens.readable(indices)]

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self._captions[index][0] for index in indices]

    def ahead(self, indices: list[int]) -> None:
        self.tokens.ahead(indices)

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Bitwise cross-entropy of one micro-batch.

        Caption dropout, drop path, flips and the number of bits come from the draws; of several captions of a picture
        each epoch has its own.
        """
        indices = self.tokens.readable(indices)
        bits = draw(self.bit_counts, draws.shared)
        dropped = draws.uniform() < self.training.caption_dropout
        strength = self._flip_strength(step)
        flips = flipper(strength, self.training.flip_scales, draws) if strength > 0 else None
        seed, counts = self.training.seed, [len(self._captions[index]) for index in indices]
        which = [drawn_caption(range(n), seed, draws.epoch, index) for index, n in zip(indices, counts, strict=True)]
        loss, accuracy, per_scale = self._losses(indices, which, bits, flips, dropped, self._kept_branches(draws))
        measured = {f"bit_accuracy/{k}": value for k, value in enumerate(accuracy.unbind())}
        return loss, measured | {f"loss/{k}": value for k, value in enumerate(per_scale.unbind())}

    def validate(self) -> dict[str, float]:
        """Means over the held-out pictures, unchanged: val_loss, val_bit_accuracy/k, val_loss/k.

        Where the model is used with several numbers of bits, val_loss is the mean of val_loss_16_bits and so on, and
        what is measured per scale is so with the most.
        """

        def measure(indices: list[int], weight: float) -> dict[str, Tensor]:
            indices = self.tokens.readable(indices)
            found = {bits: self._losses(indices, [0] * len(indices), bits) for bits in self.bit_counts}
            losses = {bits: loss for bits, (loss, _, _) in found.items()}
            measured = {"val_loss": torch.stack(list(losses.values())).mean()}
            if len(losses) > 1:
                measured |= {f"val_loss_{bits}_bits": loss for bits, loss in losses.items()}
            _, accuracy, per_scale = found[max(found)]
            measured |= {f"val_bit_accuracy/{k}": value for k, value in enumerate(accuracy.unbind())}
            return measured | {f"val_loss/{k}": value for k, value in enumerate(per_scale.unbind())}

        return self._ranks.mean_over(self._validation, measure)

    def draw_samples(self, file: Path) -> None:
        """Pictures as their bits tell them above pictures drawn from their captions; captions.txt names those.

        There is a row of drawn ones for each number of bits, in ascending order.
        """
        shown = self.tokens.readable(self._shown)
        scales = self.tokens.schedule(self.tokens.ratio(shown[0]))
        captions = [self._captions[index][0] for index in shown]
        bits = [grid.to(self.device) for grid in self.tokens.bits(shown)]
        stored = self.tokenizer.decode_bits(bits, scales)
        text = self._text(shown, [0] * len(shown))
        features = text if isinstance(text, TextFeatures) else self.module.features(text)
        steps = plan(self.config.sampling, len(scales))
        seeds = range(len(captions))
        drawn = [
            generate(self.module.transformer, self.tokenizer, features, scales, steps, seeds, bits=bits)[0]
            for bits in self.bit_counts
        ]
        with atomic_path(file) as temporary:
            all_rows = to_uint8(torch.cat((stored.float(), *drawn))).cpu()
            grid(all_rows, len(captions)).save(temporary, format="PNG")
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
        self.tokens.close()

    def _losses(
        self,
        indices: list[int],
        which: list[int],
        bits: int,
        flips: ChangeBits | None = None,
        dropped: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, bit accuracy per scale and loss per scale of the first `bits` bits, with one caption of each."""
        scales = self.tokens.schedule(self.tokens.ratio(indices[0]))
        targets, inputs = self._teacher(indices, scales, bits, flips)
        recomputed = self.training.checkpoint_activations
        with (
            autocast(self.device, self.training.precision),
            attention(self.device, self.training.precision, scales, recomputed=recomputed),
        ):
            logits = self._forward(inputs, self._text(indices, which), scales, dropped, kept)
        return bit_loss(logits_in_use(logits, targets.shape[-1]), targets, scales, self.training)

    def _teacher(
        self, indices: list[int], scales: Schedule, bits: int, flips: ChangeBits | None
    ) -> tuple[Tensor, Tensor]:
        """Targets (B, L, d) bool, or 4d when patchified, and inputs (B, L - 1, K), of the first `bits` bits d."""
        latent = self.tokens.latents(indices)
        if latent is None:
            grids = [grid.to(self.device) for grid in self.tokens.bits(indices)]
            targets, inputs = as_positions(grids, pyramid.inputs_from_bits(grids, scales), scales)
        else:
            latent = active(latent.to(self.device), bits)
            targets, inputs = as_positions(*pyramid.teacher_inputs(latent, scales, flips), scales)
        return targets, widened_positions(inputs, self.module.transformer.bits_per_position)

    def _text(self, indices: list[int], which: list[int]) -> TextFeatures | list[list[int]]:
        """What `Trained.forward` takes: features of a fixed text encoder, made here or stored, or token ids.

        Args:
            indices: of pictures.
            which: of each picture's captions.
        """
        if self.text_encoder is None or self._ids is None:
            stored = self.tokens.text_features(indices, which)
            assert stored is not None
            return TextFeatures(stored.features.to(self.device), stored.lengths)
        ids = [self._ids[index][caption] for index, caption in zip(indices, which, strict=True)]
        if self.text_is_trained:
            return ids
        with torch.no_grad():
            return self.text_encoder.encode_ids(ids)

    def _kept_branches(self, draws: Draws) -> Tensor | None:
        """Factors (depth, 3, B) of the residual branches: 0 where one is dropped, else what keeps the mean."""
        geometry = self.config.model.transformer
        if geometry.drop_path == 0:
            return None
        kept = draws.uniform(geometry.depth, 3) >= geometry.drop_path
        return (kept.float() / (1 - geometry.drop_path)).permute(1, 2, 0).to(self.device)

    def _flip_strength(self, step: int) -> float:
        warmup = self.training.flip_warmup_steps
        return self.training.flip_strength * (min(1.0, step / warmup) if warmup else 1.0)

    def _require_fit(self) -> None:
        model, tokens = self.config.model, self.tokens
        if self.training.flip_strength > 0 and not tokens.has_latents:
            raise UsageError(
                f"{tokens.name} has no latents, which self-correction flips need",
                "tokenize again with latents, or set training.transformer.flip_strength=0",
            )
        stored, most = tokens.bit_count, self.bit_counts[-1]
        if stored < most:
            raise UsageError(
                f"{tokens.name} holds {stored} bits a latent position, the model has {most}",
                f"tokenize again with --bits {most}, or set model.tokenizer.active_bits",
            )
        if self.bit_counts != (stored,) and not tokens.has_latents:
            raise UsageError(
                f"{tokens.name} has no latents, which other numbers of bits than its {stored} need",
                "tokenize again with latents, or set model.tokenizer.active_bits",
            )
        budgets = [None] if model.scales.custom is not None else list(RESOLUTIONS)
        for ratio in tokens.ratios:
            known = [
                schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio, resolution=budget)
                for budget in budgets
            ]
            own = tokens.schedule(ratio)
            if own not in known:
                raise UsageError(
                    f"{tokens.name} and the model differ in the scales of ratio {ratio}",
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
