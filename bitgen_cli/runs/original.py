"""The picture that is gone on from, and the mask of what may change: read, and nothing computed.

Both may come from strangers: they are pictures, and what they carry is checked as recipes are (recipe_file.py).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from bitgen_cli.engine.captions import printable
from bitgen_cli.engine.data import decode_picture, load_mask, picture_content, to_tensor
from bitgen_cli.engine.scales import Schedule
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.files import explain
from bitgen_cli.report import Report
from bitgen_cli.runs.recipe_file import Recipe, carried

STDIN = "-"
"""As --from: the picture comes from there."""
WHITE = 128
"""Of a mask, what is at least so bright of 255 is drawn anew."""
_NUMBERS = re.compile(r"[\d\s.,+-]*")
_BOX = re.compile(r"\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")


@dataclass(frozen=True)
class FoundBits:
    """The bits of an original.

    Attributes:
        bits: per scale (1, d, h, w) bool.
        how: `carried`, `drawn again` or `tokenized`.
        latent: (1, d, H, W) what they were made of, where they were tokenized.
    """

    bits: list[Tensor]
    how: str
    latent: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Original:
    """A picture that is gone on from.

    Attributes:
        file: where it is.
        sha256: of the file.
        image: RGB.
        recipe: it was drawn by; None where it carries none.
        carried: its bits as they stand in the file; None where it carries none.
        found: its bits, by schedule and bits per latent position, once they are known (editing.py).
    """

    file: Path
    sha256: str
    image: Image.Image
    recipe: Recipe | None
    carried: bytes | None
    found: dict[tuple[Schedule, int], FoundBits] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Mask:
    """What of an original may change.

    Attributes:
        image: L, of the original's size; white may change.
        facts: for recipes: `box`, or `sha256` of the image, which may have come as a stream.
    """

    image: Image.Image
    facts: dict[str, Any]

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """(h, w) bool, resized and cropped as the original is."""
        return to_tensor(self.image.convert("RGB"), size)[0] >= WHITE


@dataclass(frozen=True, eq=False)
class Edit:
    """How a picture is gone on from.

    Attributes:
        original: it.
        mask: what may change; None is all.
        keep_scales: so many of the first scales stay.
    """

    original: Original
    mask: Mask | None = None
    keep_scales: int = 0

    @property
    def draws(self) -> bool:
        """Whether bits are drawn; without, the picture is refined alone."""
        return self.mask is not None or self.keep_scales > 0

    def facts(self, key: tuple[Schedule, int]) -> dict[str, Any]:
        """What of it stands in recipes."""
        original = self.original
        return {
            "original": {
                "name": printable(original.file.name)[:200],
                "sha256": original.sha256,
                "bits": original.found[key].how,
            },
            **({} if self.mask is None else {"mask": self.mask.facts}),
            **({} if not self.keep_scales else {"keep_scales": self.keep_scales}),
        }


def read_original(source: str, report: Report) -> Original:
    """The picture with what it carries; read once, as it may be a stream.

    Args:
        source: a file, or STDIN.
        report: gets a notice where what it carries is no recipe: it is a photo then.

    Raises:
        InputError: it cannot be read.
    """
    file = Path("standard input" if source == STDIN else source)
    try:
        with nullcontext(sys.stdin.buffer) if source == STDIN else file.open("rb") as stream:
            content = picture_content(stream, str(file))
    except OSError as error:
        raise explain(error, file, "read") from error
    image = decode_picture(content, str(file))
    try:
        recipe, bits = carried(content, str(file))
    except InputError as error:
        report.notice(f"{error.message}; it is taken for a photo")
        recipe = bits = None
    return Original(file, hashlib.sha256(content).hexdigest(), image, recipe, bits)


def read_mask(text: str, original: Original) -> Mask:
    """The mask that --mask names.

    Args:
        text: X,Y,WIDTH,HEIGHT in pixels of the original, or a picture of its size.
        original: the picture.

    Raises:
        InputError: it cannot be read, or is partly transparent.
        UsageError: it does not fit the picture, or nothing of it is white.
    """
    width, height = original.image.size
    found = _BOX.fullmatch(text)
    if found is not None:
        x, y, w, h = (int(number) for number in found.groups())
        if not w or not h or x + w > width or y + h > height:
            raise UsageError(
                f"--mask {text}: not within the {width}x{height} pixels of {original.file}",
                "X,Y,WIDTH,HEIGHT from the top left",
            )
        image = Image.new("L", (width, height))
        image.paste(255, (x, y, x + w, y + h))
        return Mask(image, {"box": [x, y, w, h]})
    file = Path(text)
    if (text.count(",") == 3 or _NUMBERS.fullmatch(text)) and not (text and file.exists()):
        raise UsageError(f"--mask {text}: neither a file nor four whole numbers", "X,Y,WIDTH,HEIGHT from the top left")
    image = load_mask(file)
    if image.size != (width, height):
        raise UsageError(
            f"--mask {file} has {image.width}x{image.height} pixels, {original.file} {width}x{height}",
            "paint the mask over the picture itself",
        )
    if image.getextrema()[1] < WHITE:  # type: ignore[operator]
        raise UsageError(f"--mask {file}: nothing of it is white", "white is drawn anew, black stays")
    return Mask(image, {"sha256": hashlib.sha256(image.tobytes()).hexdigest()})


def check_edit(edit: Edit, schedule: Schedule, where: Sequence[Tensor], *, refine: int, pictures: int) -> None:
    """Raises UsageError where nothing would change, or several pictures would be one.

    Args:
        edit: what is done.
        schedule: scales of the picture.
        where: per scale (1, 1, h, w) bool, where bits are drawn.
        refine: rounds of refinement.
        pictures: how many of them.
    """
    if not 0 <= edit.keep_scales < len(schedule):
        raise UsageError(
            f"--keep-scales {edit.keep_scales}: the model has {len(schedule)} scales, of which one at least must be "
            "drawn"
        )
    if edit.draws:
        if not any(bool(grid.any()) for grid in where):
            raise UsageError(
                "nothing of the mask's white is left when the picture is cropped and resized for the model",
                "make it larger, or move it to the middle",
            )
        return
    if not refine:
        raise UsageError(
            f"--from {edit.original.file}: say what to do with it",
            "--mask draws a part anew, --keep-scales varies it, --refine mends it",
        )
    if pictures > 1:
        raise UsageError(f"--from with --refine alone draws nothing: it gives one picture, not {pictures}")


def require_prompt(original: Original, asked: bool) -> None:
    """Raises UsageError where nothing says what the picture shows."""
    if original.recipe is None and not asked:
        raise UsageError(
            f"{original.file} has no recipe that says what it shows",
            'give a prompt, for example: bitgen sample "a red dog" --from ...',
        )


def forgetting(recipe: Recipe) -> Recipe:
    """A recipe without what was done to another picture for it, and with nothing more to refine."""
    sampling = recipe.sampling.model_copy(update={"refine": 0})
    return recipe.model_copy(update={"sampling": sampling, "original": None, "mask": None, "keep_scales": None})


def with_keep_scales(edit: Edit | None, keep_scales: int | None) -> Edit | None:
    """The edit with that many first scales kept.

    Raises:
        UsageError: there is no picture whose scales they could be.
    """
    if edit is None and keep_scales is not None:
        raise UsageError("keep_scales says what of a picture stays", "--from PICTURE says of which")
    return None if edit is None else replace(edit, keep_scales=keep_scales or 0)
