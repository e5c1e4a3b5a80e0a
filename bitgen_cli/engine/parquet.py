"""Parquet files of pictures as the Hugging Face hub keeps them: a column `image` of bytes, and one of captions.

pyarrow comes with the extra `parquet` and is imported when such files are opened.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from bitgen_cli.engine.captions import CAPTION_KEYS, NO_CAPTIONS, captions_of_row, one_line, printable, require_key
from bitgen_cli.engine.data import MAX_BYTES, decode_picture, picture_size
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import explain

IMAGE_KEYS = ("image", "jpg", "png", "webp", "img", "picture")
"""Columns that hold pictures, the first there is."""
MAX_GROUP = 2 << 30
"""Bytes of a column in a row group, which is read whole."""


@dataclass(frozen=True)
class ParquetSource:
    """Pictures in parquet files; one row group at a time is in memory.

    Args:
        files: the files.
        groups: of each row group the number of its file and its number in there.
        starts: index of the first picture of each row group, and behind them how many pictures there are.
        file_starts: index of the first picture of each file.
        image_column, caption_column: their names; without captions None.
        layout, remarks: as in `PictureSource`.
        title: what the source is called.
    """

    files: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    file_starts: tuple[int, ...]
    image_column: str
    caption_column: str | None
    layout: str
    title: str
    remarks: tuple[str, ...] = ()
    _kept: dict[str, tuple[int, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.title + ("" if self.caption_column is None else f", captions from {one_line(self.caption_column)}")

    @property
    def claimed(self) -> None:
        return None

    def __len__(self) -> int:
        return self.starts[-1]

    def key(self, index: int) -> str:
        file = bisect_right(self.file_starts, index) - 1
        return f"{printable(self.files[file].name)}/{index - self.file_starts[file]:07d}"

    def captions(self, index: int) -> tuple[str, ...]:
        if self.caption_column is None:
            return ()
        value = self._value(self.caption_column, index)
        return captions_of_row({self.caption_column: value}, self.caption_column, self.key(index))

    def image(self, index: int) -> Image.Image:
        return decode_picture(self._content(index), self.key(index))

    def size(self, index: int) -> tuple[int, int]:
        return picture_size(io.BytesIO(self._content(index)), self.key(index))

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: each process reads its own."""
        return {**self.__dict__, "_kept": {}}

    def _content(self, index: int) -> bytes:
        value = self._value(self.image_column, index)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise InputError(f"{self.key(index)} has no picture in it", "paths to files elsewhere are not followed")
        if len(content) > MAX_BYTES:
            raise InputError(f"{self.key(index)} has {len(content) >> 20} MiB, more than a picture may have")
        return content

    def _value(self, column: str, index: int) -> Any:
        """One value; the row group it is in stays in memory until another one is needed."""
        group = bisect_right(self.starts, index) - 1
        known, values = self._kept.get(column, (-1, None))
        if known != group:
            self._kept.pop(column, None)
            values = self._read(column, group)
            self._kept[column] = group, values
        with _reading(self.files[self.groups[group][0]]):
            return values[index - self.starts[group]].as_py()

    def _read(self, column: str, group: int) -> Any:
        import pyarrow.parquet

        file, number = self.files[self.groups[group][0]], self.groups[group][1]
        with _reading(file), pyarrow.parquet.ParquetFile(file) as opened:
            table = opened.read_row_group(number, columns=[column], use_threads=False)
            values = table.column(column).combine_chunks()
            if len(values) != self.starts[group + 1] - self.starts[group]:
                raise InputError(f"{file} is damaged: row group {number} has {len(values)} rows")
            return values


def open_parquet(files: Sequence[Path], title: str, *, caption_key: str | None = None) -> ParquetSource:
    """The pictures in parquet files, in the order of their rows.

    Args:
        files: of the same columns.
        title: what the source is called.
        caption_key: column of the captions; None takes the first of CAPTION_KEYS.

    Raises:
        UsageError: pyarrow is not installed, or there is no such column.
        InputError: not a parquet file, no column of pictures, or row groups that are too large to read.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("parquet needs pyarrow, which is not installed", "pip install 'bitgen[parquet]'") from error
    image, caption = "", None
    groups: list[tuple[int, int]] = []
    counts: list[int] = []
    file_starts: list[int] = []
    for number, file in enumerate(files):
        file_starts.append(sum(counts))
        with _reading(file), pyarrow.parquet.ParquetFile(file) as opened:
            columns = opened.schema_arrow
            if number == 0:
                image = _image_column(columns, file)
                require_key(caption_key, columns.names, str(file))
                caption = caption_key or next((key for key in CAPTION_KEYS if key in columns.names), None)
            elif not {image, caption} - {None, NO_CAPTIONS} <= set(columns.names):
                raise InputError(f"{file} has other columns than {files[0].name}", "give one of them alone")
            for group in range(opened.metadata.num_row_groups):
                row_group = opened.metadata.row_group(group)
                if row_group.total_byte_size > MAX_GROUP:
                    raise InputError(
                        f"{file} keeps {row_group.total_byte_size >> 20} MiB in one row group, which is read whole",
                        "write it again with row_group_size=100",
                    )
                if row_group.num_rows:
                    groups.append((number, group))
                    counts.append(row_group.num_rows)
    if not groups:
        raise InputError(f"{files[0]} holds no pictures" if len(files) == 1 else f"{title} holds no pictures")
    starts = (0, *accumulate(counts))
    caption = None if caption == NO_CAPTIONS else caption
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    told = "no captions" if caption is None else f"captions from {one_line(caption)}"
    layout = f"parquet, {count}: {starts[-1]} pictures from {one_line(image)}, {told}"
    return ParquetSource(tuple(files), tuple(groups), starts, tuple(file_starts), image, caption, layout, title)


def _image_column(columns: Any, file: Path) -> str:
    """The column whose values are bytes, or structs with bytes."""
    import pyarrow

    def holds_bytes(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    fitting = [entry.name for entry in columns if holds_bytes(entry.type)]
    if not fitting:
        found = ", ".join(one_line(name) for name in columns.names[:10])
        raise InputError(f"{file} has no column of pictures: none holds bytes", f"there are {found[:200]}")
    return next((name for name in IMAGE_KEYS if name in fitting), fitting[0])


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a bad file into an InputError."""
    import pyarrow

    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise explain(error, file, "read") from error
        raise _broken(file, error) from error
    except (pyarrow.ArrowException, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is not a whole parquet file: {one_line(str(error))[:200]}", "copy it again")
