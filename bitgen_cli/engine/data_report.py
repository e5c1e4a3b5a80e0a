"""What a data set holds and what becomes of it: counts, bad files, shapes, what is cut off, captions that are missing.

Everything here follows from the pictures alone, so that a run in several pieces ends with the same report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Vocabulary

from bitgen_cli.engine.data import covering, cropped_share
from bitgen_cli.engine.scales import aspect_of, nearest
from bitgen_cli.engine.sources import PictureSource
from bitgen_cli.errors import InputError
from bitgen_cli.files import read_json
from bitgen_cli.report import Report

FILE = "data_report.json"
WORST = 10
"""Pictures named of which most is cut off, or whose caption is."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class BadPicture:
    """A picture that was skipped, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Bucket:
    """The pictures of one shape.

    Attributes:
        aspect: W:H.
        ratio: height / width.
        width, height: what they are resized to, in pixels.
        count: pictures.
        cropped: mean share of their area that is cut off.
        enlarged: pictures with fewer pixels than that.
    """

    aspect: str
    ratio: float
    width: int
    height: int
    count: int
    cropped: float
    enlarged: int


@dataclass(frozen=True)
class Cropped:
    """A picture and the share of its area that is cut off."""

    key: str
    share: float


@dataclass(frozen=True)
class CaptionCounts:
    """What there is of captions.

    Attributes:
        count: captions in all.
        missing: pictures without one.
        several: pictures with more than one.
        limit: tokens that the text encoder reads of a caption.
        cut: captions that are longer; None where the vocabulary is not there to tell.
        longest: tokens of the longest one; None as above.
        cut_of: pictures of such captions, the first WORST.
    """

    count: int
    missing: int
    several: int
    limit: int
    cut: int | None
    longest: int | None
    cut_of: list[str]


@dataclass(frozen=True)
class DataReport:
    """What a data set holds and what becomes of it.

    Attributes:
        source, layout, remarks: as the source says.
        found: pictures found.
        used: pictures that can be read.
        bad: the others.
        buckets: shapes that occur, widest first.
        cropped: mean share of a picture's area that is cut off.
        most_cropped: the pictures of which most is, the worst first.
        enlarged: pictures that are enlarged.
        misclaimed: pictures of another shape than the data says; None where it says nothing.
        captions: None where they are not used.
    """

    source: str
    layout: str
    remarks: list[str]
    found: int
    used: int
    bad: list[BadPicture]
    buckets: list[Bucket]
    cropped: float
    most_cropped: list[Cropped]
    enlarged: int
    misclaimed: int | None
    captions: CaptionCounts | None

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """The report in one line."""
        shapes = ", ".join(f"{bucket.count} of {bucket.aspect}" for bucket in self.buckets)
        bad = f", {len(self.bad)} unreadable" if self.bad else ""
        return f"{self.used} pictures ({shapes}){bad}; {100 * self.cropped:.1f} % of their area is cut off"


def announce(source: PictureSource, data: str, report: Report) -> None:
    """Says what was recognised."""
    report.notice(f"{data}: {source.layout}")
    for remark in source.remarks:
        report.notice(remark)


def data_report(
    source: PictureSource,
    keys: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    bad: Sequence[BadPicture],
    pixels: Mapping[float, tuple[int, int]],
    captions: CaptionCounts | None = None,
) -> DataReport:
    """The report on a source, or on a part of it.

    Args:
        source: the pictures.
        keys: of those that can be read.
        sizes: (w, h) of the same, in pixels.
        bad: the others.
        pixels: aspect ratios in use, and the (h, w) that their pictures are resized to.
        captions: what was counted of captions.
    """
    ratios = [nearest(height / width, tuple(pixels)) for width, height in sizes]
    shares = [cropped_share(size, pixels[ratio]) for size, ratio in zip(sizes, ratios, strict=True)]
    small = [covering(size, pixels[ratio])[0] > size[0] for size, ratio in zip(sizes, ratios, strict=True)]
    found: list[Bucket] = []
    for ratio in sorted(set(ratios)):
        here = [number for number, other in enumerate(ratios) if other == ratio]
        height, width = pixels[ratio]
        cropped = sum(shares[number] for number in here) / len(here)
        enlarged = sum(small[number] for number in here)
        found.append(Bucket(aspect_of(ratio), ratio, width, height, len(here), cropped, enlarged))
    worst = nsmallest(WORST, ((-share, key) for share, key in zip(shares, keys, strict=True) if share > 0))
    return DataReport(
        source=source.name,
        layout=source.layout,
        remarks=list(source.remarks),
        found=len(keys) + len(bad),
        used=len(keys),
        bad=list(bad),
        buckets=found,
        cropped=sum(shares) / max(1, len(shares)),
        most_cropped=[Cropped(key, -share) for share, key in worst],
        enlarged=sum(small),
        misclaimed=_misclaimed(source, keys, ratios, tuple(pixels)),
        captions=captions,
    )


def count_captions(
    keys: Sequence[str], captions: Sequence[tuple[str, ...]], limit: int, vocabulary: Vocabulary | None
) -> CaptionCounts:
    """What there is of captions.

    Args:
        keys: of pictures.
        captions: of each all of them.
        limit: tokens that the text encoder reads of a caption, </s> included.
        vocabulary: of the text encoder; None where it is not there.
    """
    texts = [(key, text) for key, several in zip(keys, captions, strict=True) for text in several]
    cut: list[str] = []
    longest = 0
    for start in range(0, len(texts) if vocabulary is not None else 0, _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        assert vocabulary is not None
        lengths = [len(encoding.ids) for encoding in vocabulary.encode_batch([text for _, text in part])]
        cut += [key for (key, _), length in zip(part, lengths, strict=True) if length > limit]
        longest = max(longest, *lengths)
    return CaptionCounts(
        count=len(texts),
        missing=sum(1 for several in captions if not several),
        several=sum(1 for several in captions if len(several) > 1),
        limit=limit,
        cut=None if vocabulary is None else len(cut),
        longest=None if vocabulary is None else longest,
        cut_of=list(dict.fromkeys(cut))[:WORST],
    )


def read_bad(file: Path) -> list[BadPicture]:
    """The unreadable pictures that a report names.

    Raises:
        InputError: the file is missing, or no report.
    """
    try:
        return [BadPicture(str(entry["key"]), str(entry["reason"])) for entry in read_json(file)["bad"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} is no report on data", "tokenize again into a new folder") from error


def measure(source: PictureSource, report: Report) -> tuple[list[str], list[tuple[int, int]], list[BadPicture]]:
    """Keys and sizes of the pictures whose heads can be read, and the others."""
    keys: list[str] = []
    sizes: list[tuple[int, int]] = []
    bad: list[BadPicture] = []
    with report.task("looking at pictures", len(source)) as task:
        for index in range(len(source)):
            task.advance()
            try:
                sizes.append(source.size(index))
                keys.append(source.key(index))
            except InputError as error:
                bad.append(BadPicture(source.key(index), str(error)))
    return keys, sizes, bad


def _misclaimed(
    source: PictureSource, keys: Sequence[str], ratios: Sequence[float], known: Sequence[float]
) -> int | None:
    claimed = source.claimed
    if claimed is None:
        return None
    claims = {source.key(index): nearest(claim, known) for index, claim in enumerate(claimed)}
    return sum(1 for key, ratio in zip(keys, ratios, strict=True) if claims.get(key, ratio) != ratio)
