"""Where measurements go besides metrics.jsonl: TensorBoard and Weights & Biases, imported only when asked for.

A run remembers its logs in config.json, so that it goes on in the same places when it is resumed. A log that fails
is left out with a warning: no training ends for it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitgen_cli.config import Config
from bitgen_cli.config_keys import flatten
from bitgen_cli.engine.checkpoint import RunFolder
from bitgen_cli.errors import Interrupted, UsageError
from bitgen_cli.report import MetricsLog, Report

TENSORBOARD, WANDB = "tensorboard", "wandb"
LOGS = (TENSORBOARD, WANDB)
"""What can be asked for; each is the name of its package, and of the extra that installs it."""
UPLOAD_SECONDS = 60.0
"""Longest wait at the end for what has not reached W&B yet; it stays on disk."""


def plan_logs(names: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """What a run's config.json remembers of the logs asked for: where each goes on.

    Raises:
        UsageError: an unknown one, one whose package is not installed, or W&B without a login.
    """
    for name in names:
        if name not in LOGS:
            raise UsageError(f"--log {name}: no such log", " or ".join(LOGS))
        if not _installed(name):
            raise UsageError(f"--log {name} needs the package {name}", f'pip install "bitgen[{name}]"')
    plans: dict[str, dict[str, str | None]] = {}
    if TENSORBOARD in names:
        plans[TENSORBOARD] = {}
    if WANDB in names:
        _require_login()
        plans[WANDB] = {
            "id": secrets.token_hex(4),
            "project": os.environ.get("WANDB_PROJECT") or "bitgen",
            "entity": os.environ.get("WANDB_ENTITY") or None,
        }
    return plans


def add_logs(run: RunFolder, description: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The description of a run with further logs, written to its config.json.

    Raises:
        UsageError: as `plan_logs`.
    """
    known = description.get("logs", {})
    more = {name: plan for name, plan in plan_logs(names).items() if name not in known}
    described = {**description, "logs": {**known, **more}}
    if more:
        run.describe(described)
    return described


@contextmanager
def logged(run: RunFolder, report: Report, step: int, heard: int) -> Iterator[None]:
    """Lets the logs that the run remembers listen to it for the length of the block.

    Args:
        run: the run.
        report: hears where they are, and of those that fail.
        step: the block begins after.
        heard: the last step the logs may have been told before; beyond `step` after a crash.
    """
    description = run.description()
    opened: dict[str, Callable[..., MetricsLog]] = {TENSORBOARD: _TensorBoard, WANDB: _WandB}
    plans = description.get("logs", {})
    for name, kind in opened.items():
        if name in plans:
            log = _Guarded(name, report)
            log.open(partial(kind, run, plans[name], report, step, heard))
            log.configuration(step, description)
            run.listeners.append(log)
    failed = True
    try:
        yield
        failed = False
    except Interrupted:
        failed = False
        raise
    finally:
        for listener in run.listeners:
            listener.close(failed=failed)
        run.listeners.clear()


def _installed(name: str) -> bool:
    """Whether there is a package; a folder of that name, as W&B makes them, is none."""
    found = find_spec(name)
    return found is not None and found.origin is not None


def _require_login() -> None:
    """Raises UsageError where W&B would ask for a login; one that W&B refuses, or cannot check, is not looked at."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        known = wandb.login(prompt=False)
    except Exception:
        return
    if not known:
        raise UsageError("--log wandb: nobody is logged in", "`wandb login`, or WANDB_MODE=offline to upload later")


class _Guarded:
    """A log that is left out with one warning when it fails.

    Args:
        name: for the warning.
        report: hears it.
    """

    def __init__(self, name: str, report: Report) -> None:
        self._name, self._report = name, report
        self._log: MetricsLog | None = None

    def open(self, make: Callable[[], MetricsLog]) -> None:
        """Takes the log that `make` gives."""
        try:
            self._log = make()
        except Exception as error:
            self._leave_out(error)

    def configuration(self, step: int, description: Mapping[str, Any]) -> None:
        self._tell(lambda log: log.configuration(step, description))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(lambda log: log.scalars(step, values))

    def picture(self, step: int, file: Path) -> None:
        self._tell(lambda log: log.picture(step, file))

    def close(self, *, failed: bool) -> None:
        self._tell(lambda log: log.close(failed=failed))
        self._log = None

    def _tell(self, tell: Callable[[MetricsLog], None]) -> None:
        if self._log is None:
            return
        try:
            tell(self._log)
        except Exception as error:
            self._leave_out(error)

    def _leave_out(self, error: Exception) -> None:
        self._log = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._report.warning(f"{self._name} is left out from here on: {reason}")


class _TensorBoard:
    """Event files in the run folder. Those of steps that a resumed run does again are purged by their reader."""

    def __init__(self, run: RunFolder, plan: Mapping[str, Any], report: Report, step: int, heard: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.path / TENSORBOARD), purge_step=step + 1 if step else None)
        report.notice(f"`tensorboard --logdir {run.path}` shows the training")

    def configuration(self, step: int, description: Mapping[str, Any]) -> None:
        """As two texts: what runs, and every value with its origin."""
        facts = {key: value for key, value in description.items() if key not in ("config", "origins")}
        self._writer.add_text("run", _markdown(["", ""], [[key, _code(value)] for key, value in facts.items()]), step)
        origins = description.get("origins", {})
        values = flatten(Config.model_validate(description["config"]))
        rows = [[key, _code(value), origins.get(key, "")] for key, value in values]
        self._writer.add_text("configuration", _markdown(["key", "value", "origin"], rows), step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # what metrics.jsonl holds, a killed run leaves here too
        self._writer.flush()

    def picture(self, step: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class _WandB:
    """A run at Weights & Biases, or on disk with WANDB_MODE=offline.

    Its steps cannot go back: those that a resumed run does again, and that W&B has heard of, are not told twice.
    """

    def __init__(self, run: RunFolder, plan: Mapping[str, Any], report: Report, step: int, heard: int) -> None:
        import wandb

        self._heard = heard
        self._image = wandb.Image
        self._run: Any = wandb.init(
            id=plan["id"],
            project=plan["project"],
            entity=plan["entity"],
            name=run.path.resolve().name,
            dir=os.environ.get("WANDB_DIR") or run.path,
            resume="allow",
            settings=wandb.Settings(
                console="off", silent=True, finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True
            ),
        )
        if self._run.offline:
            report.notice(f"`wandb sync {Path(self._run.dir).parent}` uploads the measurements")
        elif self._run.url:
            report.notice(f"{self._run.url} shows the training")

    def configuration(self, step: int, description: Mapping[str, Any]) -> None:
        """What config.json says, with the values of the configuration at the top."""
        facts = {key: value for key, value in description.items() if key not in ("config", "logs")}
        self._run.config.update({**description["config"], **facts}, allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._heard:
            self._run.log(dict(values), step=step)

    def picture(self, step: int, file: Path) -> None:
        if step > self._heard:
            self._run.log({"samples": self._image(str(file))}, step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for TensorBoard."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: Any) -> str:
    """A value as one cell of a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text.replace('|', '/').replace('`', ' ').replace(chr(10), ' ')}`" if text else ""
