"""Training stage `subject`: one thing from a few photos, while its class stays what the base model knows.

Source: DreamBooth, arXiv 2208.12242, section 3: a token of its own, and a second loss on class samples that the base
model made (prior preservation). Here the photos' loss is the bitwise cross-entropy of next-scale prediction. The
class's is how far the model's bit distributions have moved from the base model's (distillation), on class pictures or
on class samples that are there as bits; on class pictures it can be DreamBooth's own, the cross-entropy of their bits.

A batch is named: photos first, then as many class samples, or now and then others, through one forward pass to two
losses. The token learns alone at first, from photos only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bitgen_cli.config import Config, SubjectTraining
from bitgen_cli.engine import lora, pyramid
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.engine.data import save_grid
from bitgen_cli.engine.device import DTYPES, autocast
from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.losses import bit_loss, distillation_loss, position_weights
from bitgen_cli.engine.model_folder import Model
from bitgen_cli.engine.optimizer import Pace
from bitgen_cli.engine.order import grouped
from bitgen_cli.engine.parallel import Ranks
from bitgen_cli.engine.parts import ADAPTER, is_trained
from bitgen_cli.engine.sampling import Drawn, SamplingPlan, draw_bits, plan
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.engine.self_correction import flipper
from bitgen_cli.engine.subject import DELTA, PREFIX, ROW, START, Header, save_subject
from bitgen_cli.engine.text import TextEncoder
from bitgen_cli.engine.transformer import TextFeatures, Transformer
from bitgen_cli.engine.transformer_stage import as_positions, attention
from bitgen_cli.errors import UsageError
from bitgen_cli.files import write_text
from bitgen_cli.report import Task

GRID_COLUMNS = 8
AT_ONCE = 8
"""Pictures that go through the model together when no gradient is asked for."""
VALIDATED = 16
"""Class samples whose loss is measured in a validation."""
LEARNED = 0.05
"""Share of the photos' first loss that must be gone before anything is said about where it went."""
SUBJECT, CLASS, UNRELATED = "subject", "class", "unrelated"
ROWS = "text_encoder.rows."
"""Beginning of the names of token embeddings."""


@dataclass(frozen=True)
class Lesson:
    """A picture to learn from.

    Attributes:
        latent: (C, H, W).
        captions: what it may be called; one is drawn each time.
        schedule: its scales.
    """

    latent: Tensor
    captions: tuple[str, ...]
    schedule: Schedule


@dataclass(frozen=True)
class ClassBits:
    """Samples of the base model as bits, of a class or of other things, with how sure it was of them.

    Attributes:
        bits: per scale (M, C, h, w) bool.
        margins: (M, L, K) logit of "bit = 1" minus that of "bit = 0", without guidance.
        captions: M prompts.
        schedule: of all of them.
    """

    bits: list[Tensor]
    margins: Tensor
    captions: tuple[str, ...]
    schedule: Schedule


@dataclass(frozen=True)
class Material:
    """Everything a subject is learned from.

    Attributes:
        photos: views of the photos.
        priors: class samples as pictures; empty for other kinds of prior.
        distilled: class samples as bits, for `prior: distill`.
        others: samples of other things, which are to stay what they are.
    """

    photos: Sequence[Lesson]
    priors: Sequence[Lesson] = ()
    distilled: ClassBits | None = None
    others: ClassBits | None = None


@dataclass(frozen=True)
class Probe:
    """A set of prompts whose pictures at fixed seeds show how far the model has moved."""

    name: str
    prompts: tuple[str, ...]


class Taught(nn.Module):
    """Everything of the model that a subject can be learned into."""

    def __init__(self, transformer: Transformer, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def train(self, mode: bool = True) -> Taught:
        """The text encoder keeps out of it: features with dropout would be another thing than a prompt's when drawn."""
        super().train(mode)
        self.text_encoder.eval()
        return self


class SubjectStage:
    """Learns a subject into the chosen parts of a model.

    Args:
        config: the whole configuration; its training.subject must be there.
        model: the base model with all parts; changed in place.
        material: what is learned from.
        header: of the subject file; says token and class.
        probes: prompts to watch, of the names SUBJECT, CLASS and UNRELATED.
        device: where it is computed.
        at_once: pictures drawn at once.
        first_whole_step: from which everything learns, not only the token; None takes the recipe's. More steps than
            at first leave it where it was.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        material: Material,
        header: Header,
        probes: Sequence[Probe],
        scales: Schedule,
        device: torch.device,
        at_once: int = AT_ONCE,
        first_whole_step: int | None = None,
    ) -> None:
        training = config.training.subject
        assert training is not None
        assert model.transformer is not None
        assert model.text_encoder is not None
        assert model.tokenizer is not None
        self.training: SubjectTraining = training
        self.device = device
        self.at_once = at_once
        self.header = header
        self.module = Taught(model.transformer.to(device), model.text_encoder.to(device))
        self._tokenizer = model.tokenizer
        self._photos, self._priors, self._others = material.photos, material.priors, material.others
        self._distilled = distilled = material.distilled
        self._probes = {probe.name: probe for probe in probes}
        self._scales = scales
        self._plan = plan(config.sampling, len(scales))
        self._choose()
        token_rate = training.token_learning_rate / training.optimizer.learning_rate
        self._start = training.first_whole_step if first_whole_step is None else first_whole_step
        self.paces: Mapping[str, Pace] = {ROWS: Pace(rate=token_rate), "": Pace(start=self._start)}
        self.groups = grouped(range(len(self._photos)), lambda index: self._photos[index].schedule.ratio)
        self._of_prompt: dict[str, list[int]] = {}
        prompts = [prior.captions[0] for prior in self._priors] if distilled is None else distilled.captions
        for index, prompt in enumerate(prompts):
            self._of_prompt.setdefault(_bare(header.token, prompt), []).append(index)
        self._features_of: dict[str, Tensor] = {}
        self._first: dict[str, tuple[Drawn, float]] = {}
        self._first_loss = 0.0
        self._margins: Tensor | None = None
        if self._priors and training.prior_targets == "probabilities":
            self._margins = self._base_margins(captioned=True)
        if self._has_prior and training.caption_dropout > 0:
            self._null_margins = self._base_margins(captioned=False)

    # -- what trains ---------------------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Freezes everything, then opens what `train` names; that is kept in float32, with the base's values aside."""
        training, parts = self.training, set[str](self.training.train)
        self.module.requires_grad_(False)
        self.module.transformer.checkpoint_activations = training.checkpoint_activations
        if "lora" in parts:
            lora.attach(
                self.module.transformer, training.lora_layers, training.lora_rank, training.lora_alpha, training.seed
            )
        for name, parameter in self.module.named_parameters():
            if is_trained(name, parts):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
            else:
                parameter.requires_grad_(False)
        self.text_is_trained = bool(parts & {"text", "all"})
        self._base = {n: p.detach().clone() for n, p in self.module.named_parameters() if p.requires_grad}

    @contextmanager
    def base(self) -> Iterator[None]:
        """The base model for the length of the block, the token read as what it was begun with."""
        named = dict(self.module.named_parameters())
        own = {name: named[name].data for name in self._base}
        try:
            for name, value in self._base.items():
                named[name].data = value
            yield
        finally:
            for name, value in own.items():
                named[name].data = value

    # -- the loss ------------------------------------------------------------------------------------------------------

    def ahead(self, indices: list[int]) -> None:
        """Nothing to do: all latents are there."""

    def share(self, ranks: Ranks) -> None:
        raise UsageError("a subject is learned by one process", "leave out --devices and torchrun")

    def names(self, indices: Sequence[int]) -> list[str]:
        """The captions of these photos."""
        return self.captions(indices)

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self._photos[index].captions[0] for index in indices]

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The photos' loss and the class's, of one micro-batch; all randomness comes from the draws."""
        photos = [self._photos[index] for index in indices]
        captions = [_drawn_from(photo.captions, draws.shared) for photo in photos]
        taught = self._subject_batch(photos, captions, draws)
        kept = self._class_batch(captions, draws) if self._has_prior and step >= self._start else None
        together = kept is not None and kept.schedule == taught.schedule
        class_logits: Tensor | None = None
        with self._autocast():
            if kept is not None and together:
                logits, class_logits = self._forward(_Batch.join(taught, kept)).chunk(2)
            else:
                logits = self._forward(taught)
                class_logits = None if kept is None else self._forward(kept)
        loss, accuracy, _ = bit_loss(logits, taught.targets, taught.schedule, self.training)
        measured = {"subject_loss": loss.detach()}
        measured |= {f"bit_accuracy/{k}": value for k, value in enumerate(accuracy.unbind())}
        if kept is not None and class_logits is not None:
            class_loss = self._class_loss(class_logits, kept)
            measured["prior_loss"] = class_loss.detach()
            loss = loss + self.training.prior_weight * class_loss
        return loss, measured

    @property
    def _has_prior(self) -> bool:
        return self.training.keeps_class

    def _subject_batch(
        self, photos: Sequence[Lesson], captions: Sequence[str], draws: Draws | None
    ) -> _Batch:
        scales = photos[0].schedule
        latents = torch.stack([photo.latent for photo in photos]).to(self.device).float()
        flips = None
        if draws is not None and self.training.flip_strength > 0:
            flips = flipper(self.training.flip_strength, self.training.flip_scales, draws)
        targets, inputs = as_positions(*pyramid.teacher_inputs(latents, scales, flips), scales)
        return _Batch(scales, targets, inputs, self._features(captions), None)

    def _class_batch(self, captions: Sequence[str], draws: Draws) -> _Batch:
        """A class sample for each photo's caption; now and then all without a caption of their own, or other things."""
        generator = draws.shared
        chosen = [self._counterpart(caption, generator) for caption in captions]
        kind = float(torch.rand((), generator=generator))
        if kind < self.training.caption_dropout:
            return replace(self._without_captions(chosen), margins=self._null_margins[chosen].to(self.device))
        if self._others is not None and kind >= 1 - self.training.other_share:
            count = len(self._others.captions)
            return self._bits_batch(self._others, torch.randint(count, (len(chosen),), generator=generator).tolist())
        return self._class_samples(chosen, draws)

    def _counterpart(self, caption: str, generator: torch.Generator) -> int:
        """A class sample of the same prompt but for the token; any, when there is none.

        What else stands in the prompt then says nothing about whether the subject is meant: only the token does, and it
        keeps its meaning beside words that no photo had.
        """
        fitting = self._of_prompt.get(_bare(self.header.token, caption)) or range(self._class_count)
        return fitting[int(torch.randint(len(fitting), (), generator=generator))]

    @property
    def _class_count(self) -> int:
        return len(self._priors) if self._distilled is None else len(self._distilled.captions)

    def _class_samples(self, chosen: Sequence[int], draws: Draws | None) -> _Batch:
        """Class samples with their captions; only those that are learned from as photos are get flipped bits."""
        if self._distilled is not None:
            return self._bits_batch(self._distilled, chosen)
        lessons = [self._priors[index] for index in chosen]
        captions = [lesson.captions[0] for lesson in lessons]
        if self._margins is None:
            return self._subject_batch(lessons, captions, draws)
        batch = self._subject_batch(lessons, captions, None)
        return replace(batch, margins=self._margins[list(chosen)].to(self.device))

    def _bits_batch(self, samples: ClassBits, chosen: Sequence[int]) -> _Batch:
        """Samples that are there as bits, with what the base model finds likely."""
        bits = [scale[list(chosen)].to(self.device) for scale in samples.bits]
        targets, inputs = as_positions(bits, pyramid.inputs_from_bits(bits, samples.schedule), samples.schedule)
        text = self._features([samples.captions[index] for index in chosen])
        return _Batch(samples.schedule, targets, inputs, text, samples.margins[list(chosen)].to(self.device))

    def _without_captions(self, chosen: Sequence[int]) -> _Batch:
        """Class samples with the unconditional prompt."""
        batch = self._class_samples(chosen, None)
        return replace(batch, text=self._drop(batch.text, [True] * len(chosen)), margins=None)

    @torch.no_grad()
    def _base_margins(self, *, captioned: bool) -> Tensor:
        """Margins (M, L, K) of the base model for the bits of the class samples, with their captions or without.

        Those without are kept because guidance subtracts what is predicted without a caption. Were that learned from
        pictures of the class alone, or left to drift, it would push all other prompts elsewhere than before.
        """
        self.module.eval()
        found = []
        with self._autocast():
            for start in range(0, self._class_count, self.at_once):
                chosen = list(range(start, min(start + self.at_once, self._class_count)))
                batch = self._class_samples(chosen, None) if captioned else self._without_captions(chosen)
                pairs = torch.unflatten(self._forward(batch).float(), -1, (-1, 2))
                found.append((pairs[..., 1] - pairs[..., 0]).cpu())
        return torch.cat(found)

    def _class_loss(self, logits: Tensor, batch: _Batch) -> Tensor:
        if batch.margins is None:
            return bit_loss(logits, batch.targets, batch.schedule, self.training)[0]
        return distillation_loss(logits, batch.margins, batch.schedule, self.training)

    def _forward(self, batch: _Batch) -> Tensor:
        recomputed = self.training.checkpoint_activations
        with attention(self.device, self.training.precision, batch.schedule, recomputed=recomputed):
            logits: Tensor = self.module.transformer(batch.inputs, batch.text, batch.schedule)
        return logits

    def _features(self, captions: Sequence[str]) -> TextFeatures:
        """Text features; those that training cannot change are encoded once."""
        if self.text_is_trained:
            return self._encode(captions)
        learned = "token" in self.training.train
        fixed = [c for c in dict.fromkeys(captions) if c not in self._features_of]
        fixed = [c for c in fixed if not (learned and self.header.token in c)]
        for caption in fixed:
            # alone, so that its last digits hang on no neighbour: a resumed run meets captions in other company
            with torch.no_grad():
                encoded = self._encode([caption])
            self._features_of[caption] = encoded.features[0, : encoded.lengths[0]].detach()
        moving = [c for c in dict.fromkeys(captions) if c not in self._features_of]
        rows = dict(self._features_of)
        if moving:
            encoded = self._encode(moving)
            for caption, row, length in zip(moving, encoded.features, encoded.lengths, strict=True):
                rows[caption] = row[:length]
        return TextFeatures.from_rows([rows[caption] for caption in captions])

    def _encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features by the encoder's own number type, or by mixed ones while it learns, wherever this is called from."""
        with autocast(self.device, self.training.precision if self.text_is_trained else "fp32"):
            return self.module.text_encoder.encode(prompts)

    def _drop(self, text: TextFeatures, dropped: Sequence[bool]) -> TextFeatures:
        """The unconditional prompt of the same length in place of the dropped ones."""
        null = self.module.transformer.null_features(text.lengths).features.to(text.features.dtype)
        chosen = torch.tensor(dropped, device=self.device)[:, None, None]
        return TextFeatures(torch.where(chosen, null, text.features), text.lengths)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.training.precision)

    # -- how far it is -------------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """The losses without chance, and the drift: how far pictures of fixed seeds have moved from the base model's.

        `drift_class_agreement` and `drift_unrelated_agreement` are the share of bits that are still the base model's;
        `drift_SET_adherence` is how much better the base model explains the pictures with their prompts than without,
        in relation to its own pictures: 1 is as good as before. `drift_class_leak` is how much of what has been learned
        about the photos is there without the token too: 0 is nothing, at 1 the class has become the subject.
        """
        values = self._validation_losses()
        if self.training.validation_images:
            values |= {f"drift_{name}": value for name, value in self.drift().items()}
        return values

    def _validation_losses(self) -> dict[str, float]:
        values = {"val_subject_loss": self._photo_loss(named=True)}
        if self._has_prior:
            with self._autocast():
                values["val_prior_loss"] = self._validation_prior()
        values["val_loss"] = values["val_subject_loss"] + self.training.prior_weight * values.get("val_prior_loss", 0.0)
        return values

    def _photo_loss(self, *, named: bool) -> float:
        """The photos' loss without chance, each under its first caption, with the token or without it."""
        total, count = 0.0, 0
        for group in self.groups:
            for start in range(0, len(group), self.at_once):
                photos = [self._photos[index] for index in group[start : start + self.at_once]]
                captions = [photo.captions[0] for photo in photos]
                if not named:
                    captions = [_without(self.header.token, caption) for caption in captions]
                with self._autocast():
                    batch = self._subject_batch(photos, captions, None)
                    loss = bit_loss(self._forward(batch), batch.targets, batch.schedule, self.training)[0]
                total, count = total + loss.item() * len(photos), count + len(photos)
        return total / count

    def _validation_prior(self) -> float:
        chosen = list(range(min(self._class_count, VALIDATED)))
        loss = 0.0
        for start in range(0, len(chosen), self.at_once):
            part = chosen[start : start + self.at_once]
            batch = self._class_samples(part, None)
            loss += self._class_loss(self._forward(batch), batch).item() * len(part)
        return loss / len(chosen)

    def drift(self) -> dict[str, float]:
        """The drift as in `validate`, without the losses: shares of 1."""
        drawn = {name: self._draw(probe) for name, probe in self._probes.items()}
        self._remember_base()
        values = {}
        for name, (bits, _) in self._first.items():
            if name != SUBJECT:
                values[f"{name}_agreement"] = agreement(drawn[name].bits, bits.bits)
        learned = self._first_loss - self._photo_loss(named=True)
        if learned > LEARNED * self._first_loss:
            values["class_leak"] = (self._first_loss - self._photo_loss(named=False)) / learned
        with self.base():
            for name, probe in self._probes.items():
                before = self._first[name][1]
                values[f"{name}_adherence"] = self._adherence(drawn[name], probe) / before if before > 0 else 1.0
        return values

    def _remember_base(self) -> None:
        """Draws the base model's pictures of the probes and judges the photos with it, once."""
        if not self._first:
            with self.base():
                self._first_loss = self._photo_loss(named=False)
                for name, probe in self._probes.items():
                    drawn = self._draw(probe)
                    self._first[name] = drawn, self._adherence(drawn, probe)

    @torch.no_grad()
    def _draw(self, probe: Probe) -> Drawn:
        """Pictures of the probe's prompts at seeds 0, 1 ..."""
        parts = []
        with self._autocast():
            for start in range(0, len(probe.prompts), self.at_once):
                prompts = probe.prompts[start : start + self.at_once]
                text = self._encode(prompts)
                seeds = range(start, start + len(prompts))
                parts.append(draw_bits(self.module.transformer, text, self._scales, self._plan, seeds))
        bits = [torch.cat(scale) for scale in zip(*(part.bits for part in parts), strict=True)]
        return Drawn(bits, torch.cat([part.total for part in parts]))

    @torch.no_grad()
    def _adherence(self, drawn: Drawn, probe: Probe) -> float:
        """How much likelier the bits are with their prompts than without: mean nats per bit."""
        gains = []
        transformer = self.module.transformer
        for start in range(0, len(probe.prompts), self.at_once):
            rows = slice(start, start + self.at_once)
            # drawing happens in inference mode; these bits go through autograd-free training code
            bits = [scale[rows].clone() for scale in drawn.bits]
            targets, inputs = as_positions(bits, pyramid.inputs_from_bits(bits, self._scales), self._scales)
            with self._autocast():
                text = self._encode(probe.prompts[rows])
                null = transformer.null_features(text.lengths)
                likely = [
                    _log_likelihood(self._forward(_Batch(self._scales, targets, inputs, features, None)), targets)
                    for features in (text, null)
                ]
            gains.append((likely[0] - likely[1]).mean((1, 2)))
        return float(torch.cat(gains).mean())

    def draw_samples(self, file: Path) -> None:
        """A row of pictures for each probe; prompts.txt beside them names the prompts."""
        shown = [replace(probe, prompts=probe.prompts[:GRID_COLUMNS]) for probe in self._probes.values()]
        rows = [self._decode(self._draw(probe).total) for probe in shown]
        save_grid(torch.cat(rows), rows[0].shape[0], file)
        named = "".join(f"{probe.name}: {prompt}\n" for probe in shown for prompt in probe.prompts)
        write_text(file.with_name("prompts.txt"), named)

    @torch.inference_mode()
    def _decode(self, total: Tensor) -> Tensor:
        """Images (B, 3, H, W); the autoencoder is on the device for this alone."""
        tokenizer = self._tokenizer.to(self.device)
        dtype = next(tokenizer.parameters()).dtype
        images = [tokenizer.decode(part.to(dtype)).float().cpu() for part in torch.split(total, self.at_once)]
        self._tokenizer = tokenizer.to("cpu")
        return torch.cat(images)

    # -- the result ----------------------------------------------------------------------------------------------------

    def export(self, run: RunFolder, *, best: bool) -> None:
        """The subject file: what the trained parts have become, as differences from the base model."""
        for file in (run.subject, run.best_subject) if best else (run.subject,):
            save_subject(file, self.header, self.tensors(), DTYPES[self.training.export_precision])

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """What goes into the subject file, by its name there."""
        encoder, token = self.module.text_encoder, self.header.token
        row = encoder.row(token)
        key = next(name for name, parameter in self.module.named_parameters() if parameter is row)
        found = {ROW: row.detach(), START: self._base.get(key, row.detach())}
        for name, parameter in self.module.named_parameters():
            if parameter is row or name not in self._base:
                continue
            if ADAPTER in name:
                found[f"{PREFIX}{name.replace(ADAPTER, '.')}.weight"] = parameter.detach()
            else:
                own = name.replace("text_encoder.model.", "text_encoder.", 1)
                found[f"{PREFIX}{own}{DELTA}"] = parameter.detach() - self._base[name]
        return found

    def close(self) -> None:
        """Nothing works in the background."""


@dataclass(frozen=True)
class _Batch:
    """Known scales of some pictures, their prompts, and what is to be predicted.

    Attributes:
        targets: (B, L, K) bool.
        inputs: (B, L - 1, K).
        margins: (B, L, K) of the teacher, for distillation.
    """

    schedule: Schedule
    targets: Tensor
    inputs: Tensor
    text: TextFeatures
    margins: Tensor | None

    @staticmethod
    def join(first: _Batch, second: _Batch) -> _Batch:
        """Both, for one forward pass."""
        targets = torch.cat((first.targets, second.targets))
        inputs = torch.cat((first.inputs, second.inputs))
        return _Batch(first.schedule, targets, inputs, TextFeatures.join([first.text, second.text]), None)


def agreement(bits: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean over the scales of the share of equal bits; both (B, C, h, w) bool per scale."""
    shares = [(a == b).float().mean().item() for a, b in zip(bits, others, strict=True)]
    return math.fsum(shares) / len(shares)


@torch.no_grad()
def class_bits(
    model: Model,
    prompts: Sequence[str],
    scales: Schedule,
    steps: SamplingPlan,
    seed: int,
    task: Task,
    at_once: int = AT_ONCE,
) -> ClassBits:
    """Samples of a model as bits, drawn with seeds seed, seed + 1 ..., with its own certainty of each bit."""
    assert model.transformer is not None
    assert model.text_encoder is not None
    parts, margins = [], []
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        text = model.text_encoder.encode(some)
        seeds = range(seed + start, seed + start + len(some))
        drawn = draw_bits(model.transformer, text, scales, steps, seeds)
        bits = [scale.clone() for scale in drawn.bits]
        _, inputs = as_positions(bits, pyramid.inputs_from_bits(bits, scales), scales)
        pairs = torch.unflatten(model.transformer(inputs, text, scales), -1, (-1, 2))
        parts.append([scale.cpu() for scale in bits])
        margins.append((pairs[..., 1] - pairs[..., 0]).cpu())
        task.advance(len(some))
    joined = [torch.cat(scale) for scale in zip(*parts, strict=True)]
    return ClassBits(joined, torch.cat(margins), tuple(prompts), scales)


@torch.no_grad()
def likeliest(model: Model, latent: Tensor, prompts: Sequence[str], scales: Schedule, device: torch.device) -> int:
    """Which prompt explains a picture best, by the likelihood of its bits.

    Args:
        model: in evaluation mode; it knows nothing of the subject yet.
        latent: (C, H, W) of the picture.
        prompts: to choose from.
        scales: of the picture.
    """
    assert model.transformer is not None
    assert model.text_encoder is not None
    targets, inputs = as_positions(*pyramid.teacher_inputs(latent[None].to(device).float(), scales, None), scales)
    weights = position_weights(scales, "scales").to(device)
    likely = []
    for prompt in prompts:
        logits = model.transformer(inputs, model.text_encoder.encode([prompt]), scales)
        likely.append(float((_log_likelihood(logits, targets).mean(-1) * weights).sum()))
    return max(range(len(prompts)), key=likely.__getitem__)


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability (B, L, K) of each bit, in nats."""
    pairs = torch.unflatten(logits.float(), -1, (-1, 2))
    margin = pairs[..., 1] - pairs[..., 0]
    return nn.functional.logsigmoid(torch.where(targets, margin, -margin))


def _without(token: str, caption: str) -> str:
    return " ".join(caption.replace(token, "").split())


def _bare(token: str, caption: str) -> str:
    """The caption without the token, the same whether `a` or `an` goes before what is left."""
    return " ".join("a" if word == "an" else word for word in _without(token, caption).split())


def _drawn_from(captions: Sequence[str], generator: torch.Generator) -> str:
    return captions[int(torch.randint(len(captions), (), generator=generator))]
