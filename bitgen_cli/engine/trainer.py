"""The training loop: optimizer, averages, measurements, checkpoints; a stage is trained.

A step is a pure function of the state and the step's number: the order of pictures comes from (seed, epoch),
every other random number from (seed, step, micro-batch). A resumed run therefore equals an uninterrupted one
bit for bit on the CPU, without saving the state of any generator. How many ranks share a micro-batch changes nothing
but the last digits.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitgen_cli.config import LoopConfig
from bitgen_cli.engine.checkpoint import Checkpoint, RunFolder, SavedCheckpoint
from bitgen_cli.engine.draws import Draws, mix
from bitgen_cli.engine.optimizer import LossScale, Pace, learning_rate, parameter_groups
from bitgen_cli.engine.order import batches
from bitgen_cli.engine.parallel import Ranks, local
from bitgen_cli.errors import DivergedError, InputError, Interrupted
from bitgen_cli.files import write_json
from bitgen_cli.report import Report

LOOK_AHEAD = 8
"""Micro-batches whose pictures are asked for in advance."""
WATCHED = 20
"""Steps whose mean loss tells whether a training diverges."""
NAMED = 3
"""Pictures of a bad batch that the message names; diverged.json has them all."""
DIVERGED = "diverged.json"

_STEP, _LAYERS = 1, 2
"""What a seed is for: a stage's own draws in a step, its layers' draws."""

_TOGETHER = 0.5
"""Seconds within which several signals count as one: a shell and a launcher may both send theirs."""


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

    def share(self, ranks: Ranks) -> None:
        """Lets several ranks train the module together; called before anything else.

        Raises:
            UsageError: this stage cannot be shared so.
        """

    def names(self, indices: Sequence[int]) -> list[str]:
        """What people call these pictures: their files."""

    def captions(self, indices: Sequence[int]) -> list[str]:
        """What tells each of these pictures from the others for the model: a caption, or its name."""

    def ahead(self, indices: list[int]) -> None:
        """Learns which pictures will be asked for soon, so that they can be read beforehand."""

    def loss(self, indices: list[int], draws: Draws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of this rank's part of a micro-batch and detached measurements; all randomness from `draws`."""

    def validate(self) -> dict[str, float]:
        """Measurements on held-out pictures, `val_loss` among them; empty without such pictures."""

    def draw_samples(self, file: Path) -> None:
        """Writes a picture grid that shows how far the training is; the first rank alone is asked to."""

    def export(self, run: RunFolder, *, best: bool) -> None:
        """Writes what the run is for into its folder: a model, a subject; `best` when it is the best so far.

        The first rank alone is asked to.
        """

    def close(self) -> None:
        """Ends what works in the background."""


@dataclass(frozen=True)
class Progress:
    """Where a training is; saved with every checkpoint.

    Attributes:
        step: steps done.
        best: lowest validation loss so far, and best_step the step it was measured after.
        losses: of the last WATCHED steps.
        first_loss: mean of the first WATCHED ones; None until there are as many.
        scale: of the loss.
    """

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    losses: tuple[float, ...] = ()
    first_loss: float | None = None
    scale: LossScale = field(default_factory=LossScale)

    def to_json(self) -> dict[str, Any]:
        """All but the step as plain JSON values."""
        values = asdict(self) | {"best": None if math.isinf(self.best) else self.best}
        del values["step"]
        return values

    @staticmethod
    def from_json(step: int, values: Mapping[str, Any]) -> Progress:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: something is missing.
        """
        best = values["best"]
        return Progress(
            step,
            math.inf if best is None else float(best),
            values["best_step"],
            tuple(values["losses"]),
            values["first_loss"],
            LossScale(**values["scale"]),
        )

    def watch(self, loss: float) -> Progress:
        """With the loss of one more step."""
        losses = (*self.losses, loss)[-WATCHED:]
        first = sum(losses) / WATCHED if self.first_loss is None and len(losses) == WATCHED else self.first_loss
        return replace(self, losses=losses, first_loss=first)

    def diverges(self, factor: float) -> bool:
        """Whether the loss has risen by `factor` times the size it had at the beginning."""
        if not factor or self.first_loss is None:
            return False
        return sum(self.losses) / WATCHED > self.first_loss + factor * abs(self.first_loss)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


class Trainer:
    """Trains a stage for the configured number of steps, from where `load` left it.

    Args:
        stage: what is trained.
        config: of the loop.
        run: where it is kept.
        report: who listens.
        ranks: who trains together, and where.
    """

    def __init__(
        self,
        stage: Stage,
        config: LoopConfig,
        run: RunFolder,
        report: Report,
        ranks: Ranks,
    ) -> None:
        self.stage = stage
        self.config = config
        self.run = run
        self.report = report
        self.ranks = ranks
        self.device = device = ranks.device
        if ranks.count > 1:
            stage.share(self.ranks)
        self.progress = Progress(scale=LossScale.start(config.precision))
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
        self._stopped_at = 0.0
        self._half_saved = False
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def checkpoint(self) -> Checkpoint:
        """The state after the steps done so far."""
        optimizer = {}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                optimizer[f"{name}/{key}"] = torch.as_tensor(value)
        tensors = {"weights": {name: p.detach() for name, p in self.trained.items()}, "optimizer": optimizer}
        if self.average is not None:
            tensors["ema"] = self.average
        return Checkpoint(self.progress.step, tensors, self.progress.to_json())

    def load(self, saved: SavedCheckpoint) -> None:
        """Continues from a checkpoint of the same stage and configuration, by however many ranks it was written.

        Raises:
            InputError: it belongs to another model, or is damaged.
        """
        if _shapes(self.trained) != saved.shapes("weights"):
            raise InputError(f"checkpoint {saved.step} of {self.run.path} is of another model")
        into: dict[str, dict[str, Tensor]] = {"weights": {n: p.detach() for n, p in self.trained.items()}}
        if self.average is not None:
            if saved.shapes("ema").keys() != self.average.keys():
                raise InputError(f"checkpoint {saved.step} of {self.run.path} has no averaged weights")
            into["ema"] = self.average
        into["optimizer"] = {}
        for key in saved.shapes("optimizer"):
            name, kind = key.rsplit("/", 1)
            parameter = self.trained[name]
            empty = torch.zeros((), device=self._step_counts_on)
            state = empty if kind == "step" else torch.zeros_like(parameter.detach())
            into["optimizer"][key] = self.optimizer.state[parameter][kind] = state
        saved.read(into)
        try:
            self.progress = Progress.from_json(saved.step, saved.state)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {saved.step} of {self.run.path} was written by another bitgen") from error
        # state.json is the last that is written: without it, what follows a checkpoint may be missing
        self._half_saved = self.run.state().get("step") != saved.step

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
            local(parameter).copy_(local(values[name]))

    def fit(self) -> dict[str, float]:
        """Trains to the last step; returns the newest measurements.

        Raises:
            DivergedError: the loss is no longer a number, or far above where it began; the last checkpoint is good.
            Interrupted: the user asked to stop; the step was finished and saved.
        """
        config = self.config
        values: dict[str, float] = {}
        self._announced = self.progress.step * config.accumulation
        self._seen, first, started = 0, self.progress.step, time.perf_counter()
        if self._half_saved:
            self._leave(improved=self.progress.best_step == self.progress.step > 0)
        try:
            with self._stop_on_interrupt():
                while self.progress.step < config.steps:
                    measured = self.step()
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
                        self._save(improved)
                    started += time.perf_counter() - pause
                    if self._stop and not last:
                        self._wait_for_checkpoint()
                        self.ranks.wait()
                        raise Interrupted(
                            f"stopped after step {step} of {config.steps}; everything is saved",
                            f"`bitgen resume {self.run.path}` continues",
                        )
            # whoever is done first waits for the rank that still writes
            self._wait_for_checkpoint()
            self.ranks.wait()
        finally:
            self._wait_for_checkpoint()
        return values

    def step(self) -> dict[str, Tensor]:
        """One optimizer step; returns its loss and gradient norm, and what its last micro-batch measured.

        Raises:
            DivergedError: as `fit`.
        """
        step, config = self.progress.step, self.config
        for group in self.optimizer.param_groups:
            pace = group["pace"]
            group["lr"] = learning_rate(step, config.steps, config.optimizer, pace.start) * pace.rate
            for parameter in group["params"]:
                parameter.requires_grad_(step >= pace.start)
        self.stage.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts: list[tuple[Tensor, list[int]]] = []
        measured: dict[str, Tensor] = {}
        weight = 1.0
        for micro in range(config.accumulation):
            # whatever layers draw by themselves, dropout for example, is other on each rank: nothing here does
            torch.manual_seed(mix(config.seed, _LAYERS, step, micro))
            number = step * config.accumulation + micro
            whole = self._next(number)
            share = self.ranks.share(len(whole))
            indices, weight = whole[share.rows.start : share.rows.stop], share.weight
            seed, epoch = mix(config.seed, _STEP, step, micro), number // self._per_epoch
            draws = Draws(seed, share.rows, weight, epoch)
            with self.ranks.syncing(micro == config.accumulation - 1):
                loss, measured = self.stage.loss(indices, draws, step)
                scaled = loss * (self.progress.scale.value * weight) / config.accumulation
                scaled.backward()  # type: ignore[no-untyped-call]
            parts.append((loss.detach() * weight / config.accumulation, indices))
        total = torch.stack([loss for loss, _ in parts]).sum().to(self.device)
        if self.ranks.count > 1:
            asked = self.ranks.mean(torch.stack((total, torch.full_like(total, float(self._stop)))))
            total, self._stop = asked[0], bool(asked[1] > 0)
        norm = self._clipped_norm()
        # one look at the numbers a step: what is not finite must not reach the weights
        finite = bool(torch.isfinite(norm))
        loss_now = total.item()
        scale = self.progress.scale
        if not math.isfinite(loss_now) or (not finite and (not scale.adapts or scale.value < 2)):
            raise self._diverged("the loss or its gradient is not a finite number", parts)
        if finite:
            self.optimizer.step()
            self._average_in(step)
        self.progress = replace(self.progress.watch(loss_now), step=step + 1, scale=scale.after(not finite))
        if self.progress.diverges(config.divergence):
            rise = f"{self.progress.first_loss:.4g} to {sum(self.progress.losses) / WATCHED:.4g}"
            raise self._diverged(f"the mean loss of {WATCHED} steps has risen from {rise}", parts)
        measured = self.ranks.means(measured, weight) if self._logs_now() else measured
        return measured | {"loss": total, "grad_norm": norm.detach()}

    def _clipped_norm(self) -> Tensor:
        """The norm of all gradients, which are cut down to the largest one allowed."""
        parameters = [p for p in self.trained.values() if p.grad is not None]
        if self.progress.scale.adapts:
            gradients = [local(p.grad) for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.progress.scale.value)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.optimizer.clip_norm)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def _average_in(self, step: int) -> None:
        if self.average is not None:
            # early in training a fixed decay would average in the random start
            decay = min(self.config.ema_decay, (step + 1) / (step + 10))
            weights = [local(p.detach()) for p in self.trained.values()]
            torch._foreach_lerp_([local(average) for average in self.average.values()], weights, 1 - decay)

    def _logs_now(self) -> bool:
        return self.progress.step % self.config.log_every == 0 or self.progress.step == self.config.steps

    def _diverged(self, why: str, parts: Sequence[tuple[Tensor, list[int]]]) -> DivergedError:
        """The error that names the pictures of the step, those of a bad micro-batch where one is; diverged.json too."""
        bad = [indices for loss, indices in parts if not math.isfinite(loss.item())]
        mine = bool(bad), [name for indices in (bad or [i for _, i in parts]) for name in self.stage.names(indices)]
        everyone = self.ranks.gather(mine)
        blamed = [names for is_bad, names in everyone if is_bad] or [names for _, names in everyone]
        files = [name for names in blamed for name in names]
        step = self.progress.step + 1
        saved = max(self.run.steps(), default=None)
        if self.ranks.first:
            write_json(self.run.path / DIVERGED, {"step": step, "reason": why, "pictures": files})
        shown = ", ".join(files[:NAMED]) + (f" and {len(files) - NAMED} more" if len(files) > NAMED else "")
        kept = "nothing had been saved yet" if saved is None else f"checkpoint {saved} is kept"
        return DivergedError(
            f"training diverged: {why} at step {step}, with {shown} (all in {self.run.path / DIVERGED}); {kept}",
            "look at these pictures, or train with a lower learning rate",
        )

    def _next(self, number: int) -> list[int]:
        """Indices of micro-batch `number`; tells the stage which ones follow."""
        while self._announced <= number + LOOK_AHEAD:
            coming = self._batch(self._announced)
            rows = self.ranks.share(len(coming)).rows
            self.stage.ahead(coming[rows.start : rows.stop])
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
        self._write_log({"step": step, **values})
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
        self._write_log({"step": self.progress.step, **values})
        self.report.metrics(self.progress.step, self.config.steps, values)
        improved = values["val_loss"] < self.progress.best
        if improved:
            self.progress = replace(self.progress, best=values["val_loss"], best_step=self.progress.step)
        return values, improved

    def _write_log(self, values: Mapping[str, float]) -> None:
        if self.ranks.first:
            self.run.log(values)

    def _draw_samples(self) -> None:
        file = self.run.samples / f"step-{self.progress.step:07d}.png"
        with self._shown(), self.ranks.whole():
            if self.ranks.first:
                self.stage.draw_samples(file)
        if self.ranks.first:
            self.run.show(self.progress.step, file)

    def _save(self, improved: bool) -> None:
        """Saves a checkpoint; the best one so far and the last one also leave what the run is for."""
        self._wait_for_checkpoint()
        checkpoint, config = self.checkpoint(), self.config
        if self.ranks.sharded:
            writing = self.run.begin_shared(checkpoint, self.ranks)
            self._export(improved)

            def finish() -> None:
                writing.wait()
                if self.ranks.first:
                    folder = self.run.finish_shared(checkpoint, config.keep_last, config.keep_every)
                    if improved:
                        self.run.save_best(folder)
                    self._settle(folder, checkpoint.step, checkpoint.state["best"])

            self._saving = self._background.submit(finish)
            return
        if self.ranks.first:
            self.run.save(checkpoint, config.keep_last, config.keep_every)
            self._leave(improved)

    def _leave(self, improved: bool) -> None:
        """What follows a checkpoint that is whole; done once more when a run was ended in the middle of it."""
        folder = self.run.checkpoint(self.progress.step)
        if improved and self.ranks.first:
            self.run.save_best(folder)
        self._export(improved)
        if self.ranks.first:
            self._settle(folder, self.progress.step, self.progress.to_json()["best"])

    def _export(self, improved: bool) -> None:
        if improved or self.progress.step == self.config.steps:
            with self._shown(), self.ranks.whole():
                if self.ranks.first:
                    self.stage.export(self.run, best=improved)

    def _settle(self, folder: Path, step: int, best: float | None) -> None:
        """Writes state.json, the last that a save writes."""
        self.run.write_state(
            {
                "step": step,
                "steps": self.config.steps,
                "finished": step == self.config.steps,
                "checkpoint": folder.relative_to(self.run.path).as_posix(),
                "best_val_loss": best,
            }
        )

    def _wait_for_checkpoint(self) -> None:
        """Returns when nothing is being written in the background."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

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
            if self._stopped_at:
                if number == signal.SIGTERM or time.monotonic() - self._stopped_at < _TOGETHER:
                    return
                raise KeyboardInterrupt
            self._stop, self._stopped_at = True, time.monotonic()
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
