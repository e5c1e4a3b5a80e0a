"""Watches over one input: how long it takes, what it raises, what it opens, and what the terminal is told of it."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import bitgen_cli
from bitgen_cli.console.tables import show_tables
from bitgen_cli.console.terminal import show_error, show_json
from bitgen_cli.errors import BitgenError

SLOW = 5.0
"""Seconds of computing that no input may take."""
HANGS = 10.0
"""Seconds after which an input is given up."""
SECRET = "secret.txt"
"""A file beside the reader's folder that nobody may read, whatever the input says."""

_PACKAGE = str(Path(bitgen_cli.__file__).parent)
_CHANGES = {
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "shutil.rmtree": 1,
}
"""Events that change files, and how many paths they begin with."""
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "webbrowser.open",
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Stopped(BaseException):
    """What was read is given up; no reader may catch it."""


@dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        refused: with one clear error.
        failure: what must not happen, with its place; None where nothing did.
        seconds: of computing.
    """

    refused: bool
    failure: str | None
    seconds: float


class Box:
    """A folder with all that readers may touch, and a secret beside it.

    Args:
        folder: new and empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.data, self.home, self.here = (self.folder / name for name in ("data", "home", "here"))
        for inside in (self.data, self.home, self.here):
            inside.mkdir()
        self.secret = self.folder / SECRET
        self.secret.write_text("secret")

    @property
    def names(self) -> tuple[str, ...]:
        """Hostile names of what lies outside of the reader's folder."""
        outside = [str(self.folder / "escaped"), str(self.secret), "../escaped", f"../{SECRET}", f"a/../../{SECRET}"]
        return (*outside, f"file://{self.secret}", f"../../{self.folder.name}/{SECRET}")

    def trespassed(self) -> str | None:
        """What has appeared beside the reader's folder."""
        found = {entry.name for entry in os.scandir(self.folder)} - {"data", "home", "here", SECRET}
        found |= {entry.name for entry in os.scandir(self.here)}
        return f"made {sorted(found)} outside of its folder" if found else None


class _Watch:
    """Hears of everything Python opens, changes or starts while an input is read."""

    def __init__(self) -> None:
        self.box: Box | None = None
        self.breach: str | None = None
        self._installed = False

    @contextmanager
    def over(self, box: Box) -> Iterator[None]:
        """Inside, what leads out of the box is stopped and kept as `breach`."""
        if not self._installed:
            sys.addaudithook(self._hear)  # for the rest of the process: it can only be made deaf
            self._installed = True
        self.breach, self.box = None, box
        try:
            yield
        finally:
            self.box = None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        box = self.box
        if box is None:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes):
                return
            if flags & _WRITES and not self._inside(path, box):
                self._stop(f"writes {os.fsdecode(path)}")
            if os.path.realpath(os.fsdecode(path)) == str(box.secret):
                self._stop(f"reads {os.fsdecode(path)}")
        elif event in _CHANGES:
            descriptors = [one for one in arguments[_CHANGES[event] :] if isinstance(one, int) and one > 2]
            within = f"/proc/self/fd/{descriptors[0]}" if descriptors and event != "os.chmod" else ""
            for path in arguments[: _CHANGES[event]]:
                place = os.path.join(within, os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else None
                if place is not None and not self._inside(place, box):
                    self._stop(f"{event} {os.fsdecode(path)}")
        elif event in _FORBIDDEN:
            self._stop(f"{event} {arguments!r:.200}")

    def _inside(self, path: str | bytes | os.PathLike[str], box: Box) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real == os.devnull or f"{real}/".startswith((f"{box.data}/", f"{box.home}/"))

    def _stop(self, what: str) -> None:
        self.breach = what
        raise Stopped(what)


_watch = _Watch()


def attempt(read: Callable[[Path], object], file: Path, content: bytes, box: Box) -> Outcome:
    """Lets a reader read an input, and shows its result or its error as the commands do.

    Args:
        read: gets the file, or the folder it was made for.
        file: where the input is written before.
        content: the input.
        box: around the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    refused, failure = False, None
    started = time.process_time()
    try:
        with _time_limit(), _watch.over(box):
            try:
                failure = _unseemly(_shown(read(file)))
            except BitgenError as error:
                refused = True
                failure = _unseemly(_shown(error))
    except (Exception, Stopped) as error:
        failure = f"{type(error).__name__}: {str(error)[:300]!r} at {_place(error)}"
    seconds = time.process_time() - started
    if failure is None and seconds > SLOW:
        failure = f"took {seconds:.1f} s"
    failure = failure or _watch.breach or box.trespassed()
    return Outcome(refused, failure, seconds)


def _shown(result: object) -> str:
    """What the terminal is told of a result that has tables, or of an error; nothing of any other."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        if isinstance(result, BitgenError):
            show_error(str(result))
        elif hasattr(result, "sections"):
            show_tables(result.sections)
            show_json(result.to_json())  # type: ignore[attr-defined]
    return out.getvalue() + err.getvalue()


def _unseemly(text: str) -> str | None:
    """What of a text commands the terminal."""
    found = sorted({c for c in text if not c.isprintable() and c != "\n"})
    return f"sends {found!r} to the terminal" if found else None


def _place(error: BaseException) -> str:
    """The innermost line of this package, and that of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(_PACKAGE)]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [frames[-1], *own[-1:]])


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(f"hangs: more than {HANGS:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
