"""The training loop: order of pictures, optimizer, averages, measurements, checkpoints; a stage is trained.

A step is a pure function of the state and the step's number: the order of pictures comes from (seed, epoch),
every other random number from (seed, step, micro-batch). A resumed run therefore equals an uninterrupted one
bit for bit on the CPU, without saving the state of any generator.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitgen_cli.config import LoopConfig, OptimizerConfig
from bitgen_cli.engine.checkpoint import Checkpoint, RunFolder
from bitgen_cli.errors import DivergedError, InputError, Interrupted
from bitgen_cli.report import Report

NO_DECAY = ("null_text", "start", "scale_embedding.weight", "modulation", "log_scale", "text_pool.query")
"""Ends of the names of parameters without weight decay, besides biases and vectors.

`modulation` is the table of each block; the layers' weights are called `modulation.weight` and decay.
Source: INFINITY_FORMAT section 6, Recipe.
"""

LOOK_AHEAD = 8
"""Micro-batches whose pictures are asked for in advance."""

_ORDER, _STEP, _LAYERS = range(3)
"""What a seed is for: the order of pictures, a stage's own draws in a step, its layers' draws (drop path)."""


@dataclass(frozen=True)
class Pace:
    """How fast a parameter learns, and from when.

    Attributes:
        rate: what the learning rate is multiplied with.
        start: the first step it learns in; its warm-up begins there.
    """

    rate: float = 1.0
    start: int = 0


class Stage(Protocol):
    """What is trained: a module, its data and its loss.

    Attributes:
        groups: training pictures in groups that may share a batch (same aspect ratio), as indices.
        paces: beginnings of parameter names and the pace of those; the first that fits counts.
    """

    groups: list[list[int]]
    paces: Mapping[str, Pace]

    @property
    def module(self) -> nn.Module:
        """Holds everything with weights; parameters that do not require gradients stay as they are."""

    def ahead(self, indices: list[int]) -> None:
        """Learns which pictures will be asked for soon, so that they can be read beforehand."""

    def loss(
        self, indices: list[int], generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch and detached measurements; all randomness from the generator."""

    def validate(self) -> dict[str, float]:
        """Measurements on held-out pictures, `val_loss` among them; empty without such pictures."""

    def draw_samples(self, file: Path) -> None:
        """Writes a picture grid that shows how far the training is."""

    def export(self, run: RunFolder, *, best: bool) -> None:
        """Writes what the run is for into its folder: a model, a subject; `best` when it is the best so far."""

    def close(self) -> None:
        """Ends what works in the background."""


@dataclass(frozen=True)
class Progress:
    """Where a training is; saved with every checkpoint."""

    step: int = 0
    best: float = math.inf


def learning_rate(step: int, total: int, config: OptimizerConfig, start: int = 0) -> float:
    """The rate of a step: linear warm-up, then constant, or cosine to final_learning_rate x the peak.

    Args:
        step: 0 ... total - 1.
        total: steps of the training.
        config: peak, warm-up and schedule.
        start: the step that the warm-up begins at; before it the rate is 0.
    """
    if step < start:
        return 0.0
    warmed = min(1.0, (step - start + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmed
    share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    floor = config.final_learning_rate
    fallen = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, share))))
    return config.learning_rate * min(warmed, fallen)


def batches(groups: list[list[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches, each of one group, in an order that (seed, epoch) decides.

    What is left of a group after its last whole batch waits for another epoch, unless it is all there is.
    """
    generator = torch.Generator().manual_seed(_mix(seed, _ORDER, epoch))
    found: list[list[int]] = []
    for group in groups:
        order = torch.randperm(len(group), generator=generator).tolist()
        shuffled = [group[i] for i in order]
        whole = max(batch_size, len(shuffled) - len(shuffled) % batch_size)
        found += [shuffled[i : i + batch_size] for i in range(0, min(whole, len(shuffled)), batch_size)]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[i] for i in order]


def _mix(*numbers: int) -> int:
    """A seed from several numbers: distinct tuples give unrelated seeds (splitmix64 steps)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices 0 ... count - 1 for training and for validation, both ascending; chosen by the seed.

    Args:
        held_out: pictures for validation; at most a tenth are taken.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, _ORDER))).tolist()
    taken = min(held_out, count // 10)
    return sorted(order[taken:]), sorted(order[:taken])


def grouped(indices: Iterable[int], key: Callable[[int], float]) -> list[list[int]]:
    """The indices in groups of equal keys, in order of first appearance."""
    groups: dict[float, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return list(groups.values())


def chunks(groups: list[list[int]], size: int) -> list[list[int]]:
    """Batches of at most `size`, each of one group, nothing left out."""
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def parameter_groups(module: nn.Module, weight_decay: float, paces: Mapping[str, Pace]) -> list[dict[str, Any]]:
    """Trainable parameters with and without weight decay, in the order of their names in the module.

    Args:
        module: what is trained.
        weight_decay: of matrices.
        paces: as in `Stage`; parameters with a pace of their own are in groups of their own.
    """
    usual = Pace()
    groups: dict[tuple[Pace, float], list[nn.Parameter]] = {(usual, weight_decay): [], (usual, 0.0): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            pace = next((pace for start, pace in paces.items() if name.startswith(start)), usual)
            decay = 0.0 if _undecayed(name, parameter) else weight_decay
            groups.setdefault((pace, decay), []).append(parameter)
    return [{"params": found, "weight_decay": decay, "pace": pace} for (pace, decay), found in groups.items()]


def _undecayed(name: str, parameter: Tensor) -> bool:
    ends = ("bias", *(f".{end}" for end in NO_DECAY))
    return parameter.ndim <= 1 or f".{name}".endswith(ends)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class Trainer:
    """Trains a stage for the configured number of steps, from where `load` left it.

    Args:
        stage: what is trained.
        config: of the loop.
        run: where it is kept.
        report: who listens.
        device: where it is computed.
    """

    def __init__(
        self, stage: Stage, config: LoopConfig, run: RunFolder, report: Report, device: torch.device
    ) -> None:
        self.stage = stage
        self.config = config
        self.run = run
        self.report = report
        self.device = device
        self.progress = Progress()
        self.trained = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            parameter_groups(stage.module, config.optimizer.weight_decay, stage.paces),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.epsilon,
            fused=fused,
        )
        self.average: dict[str, Tensor] | None = None
        if config.ema_decay:
            self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self._step_counts_on = device if fused else torch.device("cpu")
        self._epochs: dict[int, list[list[int]]] = {}
        self._per_epoch = len(self._batches_of(0))
        self._announced = 0
        self._seen = 0
        self._stop = False

    def checkpoint(self) -> Checkpoint:
        """The state after the steps done so far."""
        optimizer = {}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                optimizer[f"{name}/{key}"] = torch.as_tensor(value)
        tensors = {"weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": optimizer}
        if self.average is not None:
            tensors["ema"] = self.average
        best = None if math.isinf(self.progress.best) else self.progress.best
        return Checkpoint(self.progress.step, tensors, {"best": best})

    def load(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint of the same stage and configuration.

        Raises:
            InputError: it belongs to another model.
        """
        weights = checkpoint.tensors["weights"]
        if _shapes(self.trained) != _shapes(weights):
            raise InputError(f"checkpoint {checkpoint.step} of {self.run.path} is of another model")
        self._set(weights)
        for key, value in checkpoint.tensors["optimizer"].items():
            name, field = key.rsplit("/", 1)
            parameter = self.trained[name]
            place = self._step_counts_on if field == "step" else parameter.device
            self.optimizer.state[parameter][field] = value.to(place)
        if self.average is not None:
            for name, value in checkpoint.tensors["ema"].items():
                self.average[name].copy_(value)
        best = checkpoint.state["best"]
        self.progress = Progress(checkpoint.step, math.inf if best is None else float(best))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights into the module for the length of the block."""
        if self.average is None:
            yield
            return
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def fit(self) -> dict[str, float]:
        """Trains to the last step; returns the newest measurements.

        Raises:
            DivergedError: the loss is no longer a number; the last checkpoint is good.
            Interrupted: the user asked to stop; the step was finished and saved.
        """
        config = self.config
        values: dict[str, float] = {}
        self._announced = self.progress.step * config.accumulation
        self._seen, first, started = 0, self.progress.step, time.perf_counter()
        with self._stop_on_interrupt():
            while self.progress.step < config.steps:
                measured = self._step()
                self.progress = Progress(self.progress.step + 1, self.progress.best)
                step, last = self.progress.step, self.progress.step == config.steps
                if step % config.log_every == 0 or last:
                    values = self._log(measured, step - first, time.perf_counter() - started)
                    self._seen, first, started = 0, step, time.perf_counter()
                pause = time.perf_counter()
                improved = False
                if step % config.validate_every == 0 or last:
                    validated, improved = self._validate()
                    values |= validated
                if config.sample_every and (step % config.sample_every == 0 or last):
                    self._draw_samples()
                if step % config.save_every == 0 or last or improved or self._stop:
                    self._save(improved, last)
                started += time.perf_counter() - pause
                if self._stop and not last:
                    raise Interrupted(
                        f"stopped after step {step} of {config.steps}; everything is saved",
                        f"`bitgen resume {self.run.path}` continues",
                    )
        return values

    def _step(self) -> dict[str, Tensor]:
        """One optimizer step; returns its loss and gradient norm, and what its last micro-batch measured."""
        step = self.progress.step
        for group in self.optimizer.param_groups:
            pace = group["pace"]
            group["lr"] = learning_rate(step, self.config.steps, self.config.optimizer, pace.start) * pace.rate
            for parameter in group["params"]:
                parameter.requires_grad_(step >= pace.start)
        self.stage.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        measured: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        for micro in range(self.config.accumulation):
            torch.manual_seed(_mix(self.config.seed, _LAYERS, step, micro))
            generator = torch.Generator().manual_seed(_mix(self.config.seed, _STEP, step, micro))
            indices = self._next(step * self.config.accumulation + micro)
            loss, measured = self.stage.loss(indices, generator, step)
            (loss / self.config.accumulation).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / self.config.accumulation
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.config.optimizer.clip_norm)
        # one look at the numbers a step: what is not finite must not reach the weights
        if not math.isfinite((total + norm).item()):
            raise DivergedError(
                f"training diverged: the loss or its gradient is not a finite number at step {step + 1}",
                f"the checkpoints in {self.run.path} are good; train again with a lower learning rate",
            )
        self.optimizer.step()
        if self.average is not None:
            # early in training a fixed decay would average in the random start
            decay = min(self.config.ema_decay, (step + 1) / (step + 10))
            weights = [p.detach() for p in self.trained.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)
        return measured | {"loss": total, "grad_norm": norm.detach()}

    def _next(self, number: int) -> list[int]:
        """Indices of micro-batch `number`; tells the stage which ones follow."""
        while self._announced <= number + LOOK_AHEAD:
            self.stage.ahead(self._batch(self._announced))
            self._announced += 1
        indices = self._batch(number)
        self._seen += len(indices)
        return indices

    def _batch(self, number: int) -> list[int]:
        """Indices of micro-batch `number`, counted from the start of the training."""
        return self._batches_of(number // self._per_epoch)[number % self._per_epoch]

    def _batches_of(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            recent = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            order = batches(self.stage.groups, self.config.batch_size, self.config.seed, epoch)
            self._epochs = {**recent, epoch: order}
        return self._epochs[epoch]

    def _log(self, measured: dict[str, Tensor], steps: int, seconds: float) -> dict[str, float]:
        """Writes and shows the measurements of the newest step, and the speed of the last `steps` ones."""
        step = self.progress.step
        values = {name: float(value) for name, value in measured.items()}
        values["learning_rate"] = learning_rate(step - 1, self.config.steps, self.config.optimizer)
        values["images_per_second"] = self._seen / seconds
        values["epoch"] = step * self.config.accumulation / self._per_epoch
        self.run.log({"step": step, **values})
        self.report.metrics(
            step, self.config.steps, values | {"seconds_left": (self.config.steps - step) * seconds / steps}
        )
        return values

    def _validate(self) -> tuple[dict[str, float], bool]:
        """Measurements on held-out pictures with averaged weights, and whether they are the best so far."""
        with self._shown():
            values = self.stage.validate()
        if not values:
            return values, False
        self.run.log({"step": self.progress.step, **values})
        self.report.metrics(self.progress.step, self.config.steps, values)
        improved = values["val_loss"] < self.progress.best
        if improved:
            self.progress = Progress(self.progress.step, values["val_loss"])
        return values, improved

    def _draw_samples(self) -> None:
        file = self.run.samples / f"step-{self.progress.step:07d}.png"
        with self._shown():
            self.stage.draw_samples(file)
        self.run.show(self.progress.step, file)

    def _save(self, improved: bool, last: bool) -> None:
        """Saves a checkpoint; the best one so far and the last one also leave the model folder."""
        checkpoint = self.checkpoint()
        folder = self.run.save(checkpoint, self.config.keep_last)
        if improved:
            self.run.save_best(folder)
        if improved or last:
            with self._shown():
                self.stage.export(self.run, best=improved)
        self.run.write_state(
            {
                "step": checkpoint.step,
                "steps": self.config.steps,
                "finished": last,
                "checkpoint": folder.relative_to(self.run.path).as_posix(),
                "best_val_loss": checkpoint.state["best"],
            }
        )

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The module as others will see it: averaged weights, evaluation mode, no gradients."""
        self.stage.module.eval()
        with self.averaged(), torch.no_grad():
            yield

    @contextmanager
    def _stop_on_interrupt(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) finishes the step and saves; a further Ctrl-C ends at once.

        A further SIGTERM does not: those who end jobs send it to a process and once more through its parents.
        """

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop:
                if number == signal.SIGTERM:
                    return
                raise KeyboardInterrupt
            self._stop = True
            self.report.notice("finishing this step and saving; Ctrl-C again stops at once, without saving")

        previous: dict[int, Callable[..., object] | int | None] = {}
        try:
            for number in (signal.SIGINT.value, signal.SIGTERM.value):
                previous[number] = signal.signal(number, ask)
        except ValueError:
            pass  # not the main thread: signals are somebody else's
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
