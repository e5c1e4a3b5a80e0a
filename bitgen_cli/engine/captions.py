"""What is said about a picture: text files beside it, and fields of the rows that describe it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import explain

TEXT_SUFFIXES = (".txt", ".caption")
"""Files of a picture's name that hold its caption, the first there is."""
CAPTION_KEYS = ("text", "caption", "prompt", "long_caption")
"""Fields that hold a caption, the first there is."""
NO_CAPTIONS = "none"
"""In place of a field's name: captions are not read at all."""
MAX_TEXT = 1 << 20
"""Bytes of a text that may be a caption, or of a row that describes a picture."""


def one_line(text: str) -> str:
    """A text in one line, white space joined; what no UTF-8 file could hold is replaced."""
    return " ".join(text.split()).encode("utf-8", "replace").decode()


def several(*texts: str) -> tuple[str, ...]:
    """The texts that say something, each once, in one line each."""
    return tuple(dict.fromkeys(filter(None, map(one_line, texts))))


def read_text_file(path: Path) -> str:
    """The text of a file somebody wrote.

    Raises:
        InputError: it cannot be read, has more than MAX_TEXT bytes, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise explain(error, path, "read") from error
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
        InputError: more than MAX_TEXT of them, or not UTF-8.
    """
    if len(content) > MAX_TEXT:
        raise InputError(f"{name} has more than {MAX_TEXT >> 20} MiB: that is no caption")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text", "save it as UTF-8") from error


def text_beside(picture: Path) -> Path | None:
    """The text file of a picture's name that lies beside it, if there is one."""
    found = (picture.with_suffix(suffix) for suffix in TEXT_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def captions_beside(picture: Path) -> tuple[str, ...]:
    """What the text file beside a picture says: one caption, or none.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    path = text_beside(picture)
    return () if path is None else several(read_text_file(path))


def captions_of_row(row: Mapping[str, Any], key: str | None, where: str) -> tuple[str, ...]:
    """The captions a row holds.

    Args:
        row: fields by name.
        key: the field; None takes the first of CAPTION_KEYS that is there; NO_CAPTIONS none.
        where: what errors call the row.

    Raises:
        InputError: the field holds something else than text or a list of texts.
    """
    if key == NO_CAPTIONS:
        return ()
    chosen = key if key is not None else next((k for k in CAPTION_KEYS if row.get(k) not in (None, "")), None)
    value = None if chosen is None else row.get(chosen)
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        kind = type(next(text for text in texts if not isinstance(text, str))).__name__
        raise InputError(f"{where}: the caption must be text, not {kind}")
    return several(*texts)


def require_key(key: str | None, known: Iterable[str], where: str) -> None:
    """Raises UsageError when captions are asked for from a field that is not among the known ones."""
    names = list(dict.fromkeys(known))
    if key in (None, NO_CAPTIONS) or key in names:
        return
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean --caption-key {close[0]}?" if close else f"there are {', '.join(names[:10]) or 'none'}"
    raise UsageError(f"{where} has no field {key!r}", hint)


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from error


def printable(name: str) -> str:
    """A name from a file system or an archive as text that can be stored, one to one but for undecodable bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
