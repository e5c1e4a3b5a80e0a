"""manifest.jsonl: every picture of a prompt file, listed before it is written, so that a killed job goes on.

A line is appended whole and fsynced, under a lock that processes which share the job take in turn. A picture is listed
with its name and seed first and appears under that name at once, whole; so what is listed and there is done, what is
listed and not there is drawn again by the same seed to the same name, and nothing lies there unlisted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from bitgen_cli.files import explain

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Key:
    """Which picture of a job.

    Attributes:
        line: of the prompt file.
        of: hash of the line, the options it is drawn by and the model.
        number: among the line's pictures.
    """

    line: int
    of: str
    number: int


@dataclass(frozen=True)
class Listed:
    """A picture that a manifest names."""

    path: Path
    seed: int


class Manifest:
    """The manifest in a folder.

    Args:
        folder: all pictures lie below it.
        anew: removes an older one.

    Raises:
        InputError: it cannot be read.
    """

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self.folder = folder
        self.file = folder / MANIFEST
        self._listed: dict[Key, Listed] = {}
        self._read_to = 0
        try:
            if anew:
                self.file.unlink(missing_ok=True)
            elif self.file.is_file():
                with self.file.open("rb") as file:
                    self._read(file)
        except OSError as error:
            raise explain(error, self.file, "read") from error
        self._before = frozenset(self._listed)

    def is_done(self, key: Key) -> bool:
        """Whether the picture is listed and there."""
        found = self._listed.get(key)
        return found is not None and found.path.is_file()

    def seed_of(self, key: Key) -> int | None:
        """The seed a picture was listed with."""
        found = self._listed.get(key)
        return None if found is None else found.seed

    def claim(
        self, rows: Sequence[tuple[Key, dict[str, Any]]], names: Sequence[Callable[[set[Path]], Path]]
    ) -> list[Path | None]:
        """Lists pictures that are about to be written, and returns where; None for one that another process has listed.

        Args:
            rows: each picture, with its prompt, seed and recipe.
            names: of each a name that is not among those given.

        Raises:
            InputError, ResourceError: it cannot be written.
        """
        paths: list[Path | None] = []
        try:
            with _alone(self.file) as file:
                self._read(file)
                taken = {found.path for found in self._listed.values()}
                lines = []
                for (key, row), name in zip(rows, names, strict=True):
                    found = self._listed.get(key)
                    if found is not None:
                        paths.append(found.path if key in self._before else None)
                        continue
                    path = name(taken)
                    taken.add(path)
                    paths.append(path)
                    place = path.relative_to(self.folder).as_posix()
                    whole = {"line": key.line, "of": key.of, "number": key.number, "file": place, **row}
                    lines.append(json.dumps(whole, ensure_ascii=False) + "\n")
                if lines:
                    self._append(file, "".join(lines).encode())
        except OSError as error:
            raise explain(error, self.file, "write") from error
        # what was listed now is this process's own, should it come to it again
        self._before |= {key for (key, _), path in zip(rows, paths, strict=True) if path is not None}
        return paths

    def _append(self, file: IO[bytes], data: bytes) -> None:
        end = file.seek(0, os.SEEK_END)
        if end > self._read_to:
            data = b"\n" + data  # the torn end of a process that was killed becomes a line of its own
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(self._read_to)
        self._read(file)

    def _read(self, file: IO[bytes]) -> None:
        """Takes in the whole lines behind those that are known; what says nothing sensible is left out."""
        file.seek(self._read_to)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._read_to += len(line)
            try:
                row = json.loads(line)
                key = Key(int(row["line"]), str(row["of"]), int(row["number"]))
                place, seed = PurePosixPath(row["file"]), int(row["seed"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if not place.is_absolute() and ".." not in place.parts:
                self._listed[key] = Listed(self.folder / place, seed)


@contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """The file, to be read and appended to while other processes wait; where there are no locks they do not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX)
        except ImportError:
            pass
        yield file
