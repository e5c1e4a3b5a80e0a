"""What `bitgen sample` has written."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bitgen_cli.runs.prompt_file import Failure

MOST_SEEDS = 8
"""Runs of seeds that are told."""


@dataclass(frozen=True)
class SampledPicture:
    """One picture that was written.

    Attributes:
        seed: None where nothing of it was drawn, but another picture refined.
        scales: the file that shows it after each scale, when asked for.
    """

    path: Path
    prompt: str
    seed: int | None
    recipe: dict[str, Any]
    scales: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that was written of it."""
        return [self.path] if self.scales is None else [self.path, self.scales]

    def to_json(self) -> dict[str, Any]:
        """Its paths and recipe."""
        return {"path": str(self.path), "scales": None if self.scales is None else str(self.scales), **self.recipe}


@dataclass(frozen=True)
class SampleResult:
    """Everything that was written.

    Attributes:
        pictures: in the order of the prompts.
        grid: all of them as one, when asked for.
        seconds: drawing and writing took, without loading.
        kept: pictures of the prompt file that were there already.
        failures: lines of the prompt file that could not be drawn, in their order.
        manifest: lists all pictures of the prompt file.
        png: the picture, where it is not written to disk.
    """

    pictures: list[SampledPicture]
    grid: Path | None
    seconds: float
    kept: int = 0
    failures: tuple[Failure, ...] = ()
    manifest: Path | None = None
    png: bytes | None = None

    @property
    def seeds(self) -> str | None:
        """The seeds that were drawn with, in words."""
        seeds = sorted({picture.seed for picture in self.pictures if picture.seed is not None})
        groups = groupby(enumerate(seeds), key=lambda place: place[1] - place[0])
        runs = [[seed for _, seed in group] for _, group in groups]
        shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:MOST_SEEDS]]
        more = f" and {len(runs) - MOST_SEEDS} more" if len(runs) > MOST_SEEDS else ""
        return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(shown)}{more}" if seeds else None

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object."""
        return {
            "pictures": [picture.to_json() for picture in self.pictures],
            "grid": None if self.grid is None else str(self.grid),
            "seconds": round(self.seconds, 3),
            "kept": self.kept,
            "failed": [{"line": failure.line, "error": failure.message} for failure in self.failures],
            "manifest": None if self.manifest is None else str(self.manifest),
        }
