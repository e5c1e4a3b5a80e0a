"""`bitgen tokenize --verify`: whether a token store still is what was written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitgen_cli.engine.store_check import Fault, check_store
from bitgen_cli.report import Report


@dataclass(frozen=True)
class VerifyResult:
    """What was found in a token store.

    Attributes:
        store: its folder.
        faults: every file that is not what was written, and why; empty when the store is whole.
        count: pictures.
        shards: pieces they are stored in.
        parts: folders of their own that several processes made; 1 for a store in one piece.
        bytes: that were read.
        latents: whether they are kept.
        text_features: whether they are kept.
        seconds: it took.
    """

    store: Path
    faults: list[Fault]
    count: int
    shards: int
    parts: int
    bytes: int
    latents: bool
    text_features: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {**asdict(self), "store": str(self.store)}


def verify(path: Path, report: Report) -> VerifyResult:
    """Reads a token store from its beginning to its end.

    Raises:
        InputError: there is no store, or its manifest is broken.
    """
    started = time.perf_counter()
    found = check_store(path, report)
    manifest = found.manifest
    return VerifyResult(
        store=path,
        faults=found.faults,
        count=manifest.count,
        shards=len(manifest.shards),
        parts=manifest.parts or 1,
        bytes=manifest.bytes,
        latents=manifest.latents,
        text_features=manifest.has_text,
        seconds=time.perf_counter() - started,
    )
