"""Writing files so that nothing the user had is lost: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bitgen_cli.errors import BitgenError, InputError, ResourceError

PARTIAL = ".partial"
"""Suffix of what is being written; such files are never read and may be deleted."""
LOCK = ".lock"
"""Name of the empty file that keeps a folder for one process (`only_writer`)."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk, or what a user may have of it, is full."""
HOME = "BITGEN_HOME"
"""Environment variable: another folder for what bitgen keeps of the user."""


def data_folder() -> Path:
    """Where what a user makes is kept by name: subjects and class pictures. BITGEN_HOME moves it."""
    import platformdirs

    home = os.environ.get(HOME)
    return Path(home).expanduser() if home else Path(platformdirs.user_data_dir("bitgen", appauthor=False))


def cache_folder() -> Path:
    """Where what can be made again is kept, and may be deleted. BITGEN_HOME moves it."""
    import platformdirs

    home = os.environ.get(HOME)
    return Path(home).expanduser() / "cache" if home else Path(platformdirs.user_cache_dir("bitgen", appauthor=False))


def explain(error: OSError, path: Path, doing: str) -> BitgenError:
    """The one-line error for an operating system error met while `doing` (for example "write") something at `path`."""
    if error.errno in NO_SPACE:
        return ResourceError(f"cannot {doing} {path}: no space left", "free some space or choose another folder")
    if isinstance(error, PermissionError):
        return InputError(f"cannot {doing} {path}: permission denied", "choose a place you may write to")
    return InputError(f"cannot {doing} {path}: {error.strerror or error}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well it is fsynced and renamed to `path`.

    Raises:
        ResourceError: no space left; `path` is as it was.
        InputError: not allowed to write there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, "write") from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; when the block ends well its files are fsynced and it is renamed.

    An older folder at `path` is replaced only when the new one is complete.

    Raises:
        ResourceError: no space left; `path` is as it was.
        InputError: not allowed to write there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        finish_folder(temporary, path)
    except OSError as error:
        raise explain(error, path, "write") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(temporary: Path, path: Path) -> None:
    """Fsyncs the files of a folder that is complete and renames it; an older one at `path` goes only then.

    Raises:
        OSError: as usual.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old{PARTIAL}")
        path.replace(old)
        temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(path)
    _sync_folder(path.parent)


@contextmanager
def only_writer(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from writing into a folder in the same way while the block runs.

    The lock ends with the process, however it ends, and processes that it has started do not hold it. Where the system
    or the file system has no locks there is none.

    Args:
        folder: made when it is not there.
        wait: for another process that writes there.

    Raises:
        InputError: another process writes there and is not waited for, or it may not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise explain(error, folder, "write") from error
    with file:
        try:
            import fcntl

            # not flock: that is kept by forked readers, which outlive a killed process by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"another process is writing to {folder}", "wait for it, or stop it") from error
        yield


@contextmanager
def taking_turns(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes from writing into a folder while the block runs, which begins when they have done so.

    Args:
        folder: as in `only_writer`.
        waiting: is called when another one writes there.

    Raises:
        InputError: it may not be written to.
    """
    with ExitStack() as held:
        try:
            held.enter_context(only_writer(folder))
        except InputError:
            waiting()
            held.enter_context(only_writer(folder, wait=True))
        yield


def share_folder(source: Path, path: Path) -> None:
    """Gives a folder's files to another folder too, whole or not at all. They take their space once.

    Each is a hard link, so that deleting one folder leaves the other; where the file system has none it is a copy.

    Raises:
        ResourceError: no space left for copies.
        InputError: a file cannot be read, or not written there.
    """
    with atomic_folder(path) as temporary:
        for file in sorted(source.rglob("*")):
            place = temporary / file.relative_to(source)
            if file.is_dir():
                place.mkdir()
                continue
            try:
                os.link(file, place)
            except OSError:
                shutil.copyfile(file, place)


def sha256(path: Path) -> str:
    """The sha256 of a file as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_path(path) as temporary:
        # halves of characters, as in names that are no UTF-8, are what JSON can escape
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        InputError: missing, unreadable, not JSON or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise explain(error, path, "read") from error
    except RecursionError as error:
        raise InputError(f"{path} is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
