"""Text features of prompts on disk, so that a prompt that is drawn again needs no text encoder.

    text/<key>.safetensors    features (T, width) of one prompt alone

<key> is the sha256 of everything the features depend on; the prompt itself is written nowhere. A file that is not what
was written is not there, and made again. What has not been used for longest goes first when they become too many.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitgen_cli.engine.tensors import save_tensors
from bitgen_cli.files import PARTIAL, atomic_path, cache_folder

FORMAT = 1
"""Changes when features become others for a reason that no key names."""
LIMIT = 256 * 2**20
"""Bytes that stay."""
SUFFIX = ".safetensors"
KEY, CONTENT = "key", "sha256"
"""In a file's header: its own name, and the sha256 of the features."""

_NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}")
_DTYPES = (torch.float32, torch.bfloat16)
_HEADER = 4096
"""Bytes of a file besides its features, at most."""
_ABANDONED = 3600.0
"""Seconds after which nobody writes to a file any more."""


@dataclass(frozen=True)
class TextKey:
    """Everything that the features of a prompt depend on.

    Attributes:
        encoder: fingerprint of its files.
        dtype: number types it computes in.
        device: kind of device.
        libraries: versions of those that compute.
        length: longest prompt in tokens.
        width: channels.
        prompt: the text.
        subjects: sha256 and scale of each that is worn, in any order.
    """

    encoder: str
    dtype: str
    device: str
    libraries: str
    length: int
    width: int
    prompt: str
    subjects: tuple[tuple[str, float], ...] = ()

    @cached_property
    def digest(self) -> str:
        """The key as 64 hexadecimal digits."""
        values = {**asdict(self), "subjects": sorted(self.subjects), "format": FORMAT}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class TextCache:
    """The features in a folder. Several processes may use it at once.

    Args:
        folder: made when something is kept; None is that of the user.
        limit: bytes that stay.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder = cache_folder() / "text" if folder is None else folder
        self.limit = limit

    def find(self, key: TextKey) -> Tensor | None:
        """The features (T, width) of a key, which count as used from now on; None where they are not, or damaged."""
        file = self._file(key)
        try:
            if not file.is_file() or file.stat().st_size > 4 * key.length * key.width + _HEADER:
                return None
            with safe_open(str(file), framework="pt") as stored:
                facts: dict[str, str] = stored.metadata() or {}
                features: Tensor = stored.get_tensor("features").clone()
        except (OSError, RuntimeError, SafetensorError):  # torch's own word for a file that was just deleted
            return None
        if features.dtype not in _DTYPES or features.ndim != 2 or features.shape[1] != key.width:
            return None
        if not 1 <= len(features) <= key.length or facts != _facts(key, features):
            return None
        with suppress(OSError):
            os.utime(file)
        return features

    def keep(self, key: TextKey, features: Tensor) -> None:
        """Writes the features (T, width) of a key, on the CPU.

        Raises:
            ResourceError: no space left.
            InputError: not allowed to write there.
        """
        with atomic_path(self._file(key)) as temporary:
            save_tensors({"features": features}, temporary, metadata=_facts(key, features))

    def prune(self) -> None:
        """Deletes what was not used for longest, until no more than the limit is left, and what was never finished."""
        found = []
        with suppress(OSError):
            for file in self.folder.iterdir():
                with suppress(OSError):  # another process was faster
                    facts = file.stat()
                    if _NAME.fullmatch(file.name):
                        found.append((facts.st_mtime_ns, facts.st_size, file))
                    elif file.name.endswith(PARTIAL) and facts.st_mtime < time.time() - _ABANDONED:
                        file.unlink()
        left = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if left <= self.limit:
                break
            with suppress(OSError):
                file.unlink()
            left -= size

    def _file(self, key: TextKey) -> Path:
        return self.folder / f"{key.digest}{SUFFIX}"


def _facts(key: TextKey, features: Tensor) -> dict[str, str]:
    """The header of a file."""
    content = features.contiguous().view(torch.uint8).numpy()
    return {KEY: key.digest, CONTENT: hashlib.sha256(content.data).hexdigest()}
