"""Pictures on disk: names, recipes, and all of them as one."""

from __future__ import annotations

import base64
import io
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from bitgen_cli import __version__
from bitgen_cli.engine.data import grid, to_tensor
from bitgen_cli.engine.device import DTYPES, hardware
from bitgen_cli.engine.model_folder import Model
from bitgen_cli.errors import UsageError
from bitgen_cli.files import atomic_path
from bitgen_cli.runs.carried_bits import packed
from bitgen_cli.runs.drawing import Picture, Setting
from bitgen_cli.runs.jobs import Job, SampleOptions
from bitgen_cli.runs.recipe_file import BITS, PICTURES, RECIPE
from bitgen_cli.runs.scale_pictures import files_of


def recipe_of(job: Job, picture: Picture, setting: Setting) -> dict[str, Any]:
    """Everything the picture can be drawn again from."""
    return {
        **base_recipe(job.prompt, job.negative, job.seed, setting.name, setting.model),
        **({"text_dtype": text} if (text := setting.precision.name) != short_dtype(setting.dtype) else {}),
        "subjects": [
            {"name": worn.subject.name, "token": worn.subject.token, "scale": worn.scale, "sha256": worn.subject.sha256}
            for worn in job.subjects
        ],
        **job.sampling.model_dump(mode="json"),
        "width": picture.image.width,
        "height": picture.image.height,
        "ratio": job.schedule.ratio,
        "resolution": job.resolution,
        "bits": job.bits,
        **({} if job.edit is None else job.edit.facts(job.kind)),
        **({} if picture.refined is None else {"refined": picture.refined}),
    }


def base_recipe(prompt: str, negative: str | None, seed: int, name: str, model: Model) -> dict[str, Any]:
    """The part of a recipe that says what was drawn, by which model, computed how."""
    assert model.transformer is not None
    libraries = versions()
    return {
        "bitgen": libraries.pop("bitgen"),
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
        "model": name,
        "fingerprints": model.fingerprints,
        **({"revisions": dict(model.revisions)} if model.revisions else {}),
        "dtype": short_dtype(model.transformer.dtype),
        "device": model.transformer.device.type,
        "hardware": hardware(model.transformer.device),
        "libraries": libraries,
    }


def versions() -> dict[str, str]:
    """Of bitgen, and of the libraries that compute a picture."""
    return {"bitgen": __version__, **{name: version(name) for name in ("torch", "transformers")}}


def short_dtype(dtype: torch.dtype) -> str:
    """A number type as options name it."""
    return next(name for name, other in DTYPES.items() if other == dtype)


def _parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe as other tools read it from the `parameters` key."""
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    target = recipe["target_confidence"]
    temperature = recipe["tau"] if target is None else f"for a confidence of {target}"
    return (
        f"{recipe['prompt']}{negative}\n"
        f"CFG scale: {recipe['cfg']}, Temperature: {temperature}, "
        f"Top k: {recipe['top_k']}, Top p: {recipe['top_p']}, "
        f"Seed: {recipe['seed']}, Size: {recipe['width']}x{recipe['height']}, Model: {recipe['model']}, "
        f"Version: bitgen {recipe['bitgen']}"
    )


@dataclass(frozen=True)
class Carried:
    """What a picture carries.

    Attributes:
        recipe: as JSON and as other tools read it; None leaves it out.
        bits: per scale (d, h, w) bool, from which the next command goes on; None leaves them out.
    """

    recipe: Mapping[str, Any] | None
    bits: Sequence[Tensor] | None = None


def carried_by(job: Job, picture: Picture, recipe: Mapping[str, Any], options: SampleOptions) -> Carried:
    """What a picture carries by what the options say; one that was made of another one always its bits."""
    if not options.metadata:
        return Carried(None)
    return Carried(recipe, picture.frames.bits if options.embed_bits or job.edit is not None else None)


def write_picture(path: Path, image: Image.Image, carried: Carried) -> None:
    """Writes a PNG whole or not at all, with what it carries.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=_info(image, carried))


def picture_bytes(image: Image.Image, carried: Carried) -> bytes:
    """The PNG that `write_picture` writes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_info(image, carried))
    return buffer.getvalue()


def _info(image: Image.Image, carried: Carried) -> PngImagePlugin.PngInfo | None:
    if carried.recipe is None:
        return None
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", _parameters(carried.recipe))
    info.add_itxt(RECIPE, json.dumps(carried.recipe, ensure_ascii=False))
    if carried.bits is not None:
        info.add_text(BITS, base64.b64encode(packed(carried.bits, image)).decode(), zip=True)
    return info


def grid_path(options: SampleOptions) -> Path:
    """Where all pictures go as one, if that is free."""
    return output_folder(options.output) / "grid.png"


def write_grid(images: Sequence[Image.Image], options: SampleOptions, setting: Setting) -> Path:
    """Writes pictures of one size as one, in rows, and returns where.

    Raises:
        ResourceError: no space left.
        InputError: not allowed to write there.
    """
    columns = min(len(images), max(1, round(len(images) ** 0.5)) if len(images) > 8 else len(images))
    stacked = torch.stack([to_tensor(image, (image.height, image.width)) for image in images])
    path = _free(grid_path(options), setting.taken, overwrite=options.overwrite)
    with atomic_path(path) as temporary:
        grid(stacked, columns).save(temporary, format="PNG")
    return path


def check_output(output: str, count: int) -> None:
    """Raises UsageError where pictures cannot be named by what --output says.

    Args:
        output: a file, a folder or a template.
        count: pictures that it names.
    """
    parts = _fields(output)
    fields = {name for _, name, _, _ in parts if name is not None}
    unknown = fields - {"prompt", "seed", "index", "model"}
    known = "known: {prompt} {seed} {index} {model}"
    if unknown:
        raise UsageError(f"--output {output}: unknown field {{{min(unknown)}}}", known)
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise UsageError(f"--output {output}: a field is its name alone", known)
    if fields and ".." in Path(output[output.index("{") :]).parts:
        raise UsageError(f"--output {output} leads out of its folder", "leave .. out behind a field")
    if count > 1 and not fields and not _is_folder(output):
        hint = "give a folder, or a template with {index}"
        raise UsageError(f"--output {output} is one file for {count} pictures", hint)
    if not _is_folder(output) and Path(output).suffix.lower() in PICTURES[1:]:
        raise UsageError(
            f"--output {output}: pictures are written as PNGs, which can carry their recipe",
            f"name it {Path(output).with_suffix(PICTURES[0])}",
        )


def _fields(output: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(output))
    except ValueError as error:
        raise UsageError(f"--output {output}: {error}", "write {{ for a brace of the file name") from None


def _is_folder(output: str | None) -> bool:
    return output is None or output.endswith(("/", "\\")) or Path(output).is_dir() or not Path(output).suffix


def output_folder(output: str | None) -> Path:
    """The folder that all pictures lie in or below, by what --output says."""
    if output is None or _is_folder(output):
        return Path(output or ".")
    return Path(f"{output.partition('{')[0]}_").parent


def below(folder: Path, output: str) -> str:
    """What a line of a prompt file says for --output, below a folder.

    Raises:
        UsageError: it leads out of there.
    """
    given = Path(output)
    place = folder / given
    try:
        inside = place.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"output {output[:60]!r} cannot be a path: {error}") from None
    if given.is_absolute() or ".." in given.parts or not inside:
        raise UsageError(f"output {output[:60]!r} leads out of {folder}", "lines name paths below the output folder")
    return f"{place}/" if output.endswith(("/", "\\")) else str(place)


def named_file(output: str | None) -> Path | None:
    """The one file that --output names, or None for a folder or a template."""
    if output is None or _is_folder(output) or any(name is not None for _, name, _, _ in _fields(output)):
        return None
    return Path(output.replace("{{", "{").replace("}}", "}"))


def require_free(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError where a picture that a user has named would replace what is there."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already", "--output gives another name, --overwrite replaces it")


def path_of(
    job: Job, index: int, setting: Setting, *, overwrite: bool = False, save_scales: str | None = None
) -> Path:
    """Where a picture goes: the file that was named, else a free name; with `overwrite` one that this run has not used.

    With `save_scales` what goes beside it is free as well.

    Raises:
        UsageError: the file is there.
    """
    output = job.output
    named = named_file(output)
    if named is not None:
        for file in files_of(named, save_scales):
            require_free(file, overwrite=overwrite)
        return named
    if output is not None and not _is_folder(output):
        prompt, model = slug(job.prompt), slug(setting.name)
        values = {"prompt": prompt, "seed": str(job.seed), "index": f"{index:04d}", "model": model}
        path = Path(string.Formatter().vformat(output, (), values))
    else:
        path = Path(output or ".") / f"{slug(job.prompt)}-{job.seed}.png"
    return _free(path, setting.taken, overwrite=overwrite, save_scales=save_scales)


def _free(path: Path, taken: set[Path], *, overwrite: bool, save_scales: str | None = None) -> Path:
    """The path, or the same with -2, -3 ... when there is such a file already, or what would go beside it."""
    number, candidate = 1, path
    while any(
        file in taken or (file.exists() and not overwrite) for file in files_of(candidate, save_scales)
    ):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    taken.update(files_of(candidate, save_scales))
    return candidate


def slug(text: str) -> str:
    """A text as part of a file name: letters, digits and dashes, at most 60 characters."""
    words = re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60].rstrip("-")
    return words or "picture"
