"""The recipe that a picture carries, or a JSON file holds: read and checked, and nothing in it opened.

A recipe may come from anybody. What it says is bounded here, and names no file: models and subjects are names, which
`reproduce` looks up among those the user has.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitgen_cli.config import SamplingConfig
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain

RECIPE = "bitgen"
"""Text chunk of a PNG that holds its recipe as JSON."""
BITS = "bitgen-bits"
"""Text chunk of a PNG that holds its bits in base64 (carried_bits.packed)."""
LARGEST = 1 << 20
"""Bytes of a recipe in a file of its own; Pillow has the same bound for one in a picture."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Suffixes of pictures, first that of those which can carry a recipe."""

OUTCOMES = ("refined",)
"""Keys that say what came of a recipe, and draw nothing."""
_PNG = b"\x89PNG\r\n\x1a\n"

Text = Annotated[str, Field(max_length=LARGEST)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Names = Annotated[dict[Name, Name], Field(max_length=20)]
Pixel = Annotated[int, Field(ge=0, le=1 << 20)]
Pixels = Annotated[int, Field(ge=1, le=1 << 20)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RecipeSubject(BaseModel):
    """A subject that a picture was drawn with."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    name: Name
    token: Name
    scale: Annotated[float, Field(ge=0, le=2)] = 1.0
    sha256: Sha256


class RecipeOriginal(BaseModel):
    """The picture that was gone on from; its name opens nothing."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: Name
    sha256: Sha256
    bits: Literal["carried", "drawn again", "tokenized"]


class RecipeMask(BaseModel):
    """What of it could change: a box in its pixels, or what a file said."""

    model_config = ConfigDict(strict=True, frozen=True)

    box: Annotated[tuple[Pixel, Pixel, Pixels, Pixels], Field(strict=False)] | None = None
    sha256: Sha256 | None = None


class Recipe(BaseModel):
    """What a picture was drawn by. What versions before have not recorded is None.

    Attributes:
        sampling: every value of the section.
        unknown: keys that mean nothing here.
        others: as they stand in the file (`output.recipe_of`).
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    prompt: Text
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]
    model: Name
    fingerprints: Names
    ratio: Annotated[float, Field(gt=0, le=100)]
    bits: Annotated[int, Field(ge=1, le=1024)]
    bitgen: Name | None = None
    negative_prompt: Text | None = None
    revisions: Names = Field(default_factory=dict)
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    text_dtype: Literal["fp32", "bf16", "int8"] | None = None
    device: Literal["cpu", "cuda", "mps"] | None = None
    hardware: Name | None = None
    libraries: Names | None = None
    subjects: Annotated[tuple[RecipeSubject, ...], Field(max_length=20, strict=False)] = ()
    width: Pixels | None = None
    height: Pixels | None = None
    resolution: Name | None = None
    original: RecipeOriginal | None = None
    mask: RecipeMask | None = None
    keep_scales: Annotated[int, Field(ge=1, le=100)] | None = None
    sampling: SamplingConfig
    unknown: tuple[str, ...] = ()


def is_picture(path: Path) -> bool:
    """Whether a file is a picture, by its first bytes or its name.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_PNG))
    except OSError as error:
        raise explain(error, path, "read") from error
    return start == _PNG or path.suffix.lower() in PICTURES


def picture_recipe(path: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """The recipe inside a PNG as it stands there, and width and height; the pixels are not decoded.

    Raises:
        InputError: unreadable, or without a recipe.
    """
    kind, size, texts = _texts(path, str(path))
    text = texts.get(RECIPE)
    if not isinstance(text, str):
        why = "" if kind == "PNG" else f"; only PNG pictures can, and this is {kind}"
        raise InputError(
            f"{path} carries no recipe of bitgen{why}", "it was made or saved by another program"
        )
    return _keys_and_values(text, f"{path} carries a damaged recipe"), size


def carried(content: bytes, name: str) -> tuple[Recipe | None, bytes | None]:
    """The recipe that a picture carries, and its bits as they stand there; None where it carries none.

    Args:
        content: of the file.
        name: what errors call it.

    Raises:
        InputError: it is no readable picture, or carries what no recipe is.
    """
    _, _, texts = _texts(io.BytesIO(content), name)
    text = texts.get(RECIPE)
    if not isinstance(text, str):
        return None, None
    recipe = checked(_keys_and_values(text, f"{name} carries a damaged recipe"), name)
    try:
        return recipe, base64.b64decode(texts.get(BITS, ""), validate=True) or None
    except (TypeError, ValueError):
        return recipe, None


def _texts(file: Path | BinaryIO, name: str) -> tuple[str | None, tuple[int, int], Mapping[Any, Any]]:
    """Format, width and height, and what a picture says of itself; its pixels are not decoded."""
    try:
        with warnings.catch_warnings():
            # the pixels are not read, however many they are
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return image.format, image.size, dict(image.info)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is not a readable picture: {error}") from error


def read_recipe(path: Path) -> Recipe:
    """The recipe in a picture, or in a JSON file: by itself, or as `inspect-config --json` shows it.

    Raises:
        InputError: there is none, or it says what no recipe can say.
    """
    if is_picture(path):
        found, _ = picture_recipe(path)
    else:
        try:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
        except OSError as error:
            raise explain(error, path, "read") from error
        if len(data) > LARGEST:
            raise InputError(f"{path} is no recipe: it has more than {LARGEST} bytes")
        found = _keys_and_values(data.decode("utf-8", errors="replace"), f"{path} is no recipe")
        if isinstance(found.get("recipe"), dict):
            found = found["recipe"]
    return checked(found, str(path))


def _keys_and_values(text: str, problem: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{problem}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{problem}: it must hold keys and values")
    return found


def checked(stored: Mapping[str, Any], where: str) -> Recipe:
    """The recipe, with all values of types and sizes that recipes have.

    Args:
        stored: its keys and values.
        where: names the file.

    Raises:
        InputError: a value is missing or of another kind.
    """
    plain = {key: value for key, value in stored.items() if key in Recipe.model_fields}
    sampling = {key: value for key, value in stored.items() if key in SamplingConfig.model_fields}
    unknown = tuple(key for key in stored if key not in {*plain, *sampling, *OUTCOMES})
    for key in ("sampling", "unknown"):
        if key in plain:
            raise InputError(f"{where}: a recipe has no {key}")
    try:
        return Recipe.model_validate({**plain, "sampling": SamplingConfig.model_validate(sampling), "unknown": unknown})
    except ValidationError as error:
        problem = error.errors()[0]
        # of a value that may be of several kinds, pydantic names the kind too
        key = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) or part.isidentifier())
        raise InputError(f"{where}: the recipe's {key}: {problem['msg']}", "was it made by bitgen sample?") from error
