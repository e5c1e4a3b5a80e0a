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
    """A picture that a manifest names.

    Attributes:
        scales: the file beside it that shows it after each scale.
    """

    path: Path
    seed: int
    scales: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All that is written."""
        return [self.path] if self.scales is None else [self.path, self.scales]


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

    def find(self, key: Key) -> Listed | None:
        """What is listed of a picture."""
        return self._listed.get(key)

    def claim(
        self,
        rows: Sequence[tuple[Key, dict[str, Any]]],
        names: Sequence[Callable[[set[Path]], Path | None]],
        scales: Callable[[Path], Path | None] = lambda _: None,
    ) -> list[Path | None]:
        """Lists pictures that are about to be written, and returns where; None for those that are not to be.

        Another process has listed them, or they have no name.

        Args:
            rows: each picture, with its prompt, seed and recipe.
            names: of each a name that is not among those given; None where there is none.
            scales: where what shows a picture after each scale goes, by the picture's name; None where it is not shown.

        Raises:
            InputError, ResourceError: it cannot be written.
        """
        paths: list[Path | None] = []
        try:
            with _alone(self.file) as file:
                self._read(file)
                taken = {path for found in self._listed.values() for path in found.files}
                lines = []
                for (key, row), name in zip(rows, names, strict=True):
                    found = self._listed.get(key)
                    if found is not None and key not in self._before:
                        paths.append(None)
                        continue
                    path = name(taken) if found is None else found.path
                    paths.append(path)
                    if path is None:
                        continue
                    beside = scales(path)
                    if found is None or beside not in (None, found.scales):
                        taken.update(Listed(path, 0, beside).files)
                        whole = {"line": key.line, "of": key.of, "number": key.number, "file": self._place(path)}
                        whole |= {} if beside is None else {"scales": self._place(beside)}
                        lines.append(json.dumps(whole | row, ensure_ascii=False) + "\n")
                if lines:
                    self._append(file, "".join(lines).encode())
        except OSError as error:
            raise explain(error, self.file, "write") from error
        # what was listed now is this process's own, should it come to it again
        self._before |= {key for (key, _), path in zip(rows, paths, strict=True) if path is not None}
        return paths

    def _place(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

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
                beside = PurePosixPath(row["scales"]) if "scales" in row else None
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if all(not path.is_absolute() and ".." not in path.parts for path in (place, beside or place)):
                self._listed[key] = Listed(self.folder / place, seed, None if beside is None else self.folder / beside)


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
