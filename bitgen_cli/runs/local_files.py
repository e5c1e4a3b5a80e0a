"""Files of the user's own in a published layout: which parts they hold, what lies beside them, which model that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import ValidationError

from bitgen_cli.config import Config, ModelConfig, Section, TransformerConfig
from bitgen_cli.engine.conversion import TEXT_CONFIG, VOCABULARY, is_t5
from bitgen_cli.engine.geometry import bits_per_position, tokenizer_geometry, transformer_geometry
from bitgen_cli.engine.model_folder import TOKENIZER_FILE
from bitgen_cli.engine.weight_files import (
    INDEX_SUFFIX,
    SUFFIXES,
    TOKENIZER,
    TRANSFORMER,
    PartWeights,
    find_index,
    is_weight_file,
    read_weight_file,
    shard_names,
)
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain, read_json
from bitgen_cli.presets import preset_names, resolve
from bitgen_cli.runs.published import CATALOGUE, Published

AVERAGED = "ema"
"""Stands behind a file of the published trainer, to take its averaged weights."""
TOKENIZER_WORDS = ("vae", "tokenizer")
"""One of them is in the name of a tokenizer's file."""
PATCHIFIED = 8
"""Stride of the published tokenizer of which a transformer predicts 2x2 positions at once."""
PLAIN = "32bit"
"""Whose sampling defaults and text encoder a model has that no preset describes."""


@dataclass
class Files:
    """What was found.

    Attributes:
        path: as it was given.
        weights: by part.
        text_encoder: a T5's folder beside the weights.
        read: every file whose change makes another model.
    """

    path: Path
    weights: dict[str, PartWeights]
    text_encoder: Path | None = None
    read: list[Path] = field(default_factory=list)


def is_published_layout(path: Path) -> bool:
    """Whether a path is a file of weights, or a folder with some that is no model folder of bitgen."""
    if not path.is_dir():
        return is_weight_file(path)
    own = any((folder / TOKENIZER_FILE).is_file() for folder in (path / "model", path))
    return not own and any(True for _ in _weights_in(path))


def find_files(path: Path, *, averaged: bool = False) -> Files:
    """The parts in a file or folder, and in what lies beside it.

    A file's tokenizer is the one it holds itself, else the published one of its model in the same folder, else the only
    one that fits; a text encoder's folder may lie there too.

    Args:
        path: a file of weights, an index of shards, or a folder with some.
        averaged: take the averaged weights of the published trainer.

    Raises:
        InputError: nothing that is one model, or a file cannot be read.
    """
    main = _main(path)
    found = {weights.part: weights for weights in read_weight_file(main, averaged=averaged)}
    files = Files(path, found, read=_files(main))
    folder = main if main.is_dir() else main.parent
    places = [folder, folder.parent] if main.is_dir() or main.name.endswith(INDEX_SUFFIX) else [folder]
    if TRANSFORMER in found and TOKENIZER not in found:
        beside = _tokenizer_beside(found[TRANSFORMER], places)
        if beside is not None:
            found[TOKENIZER] = beside[1]
            files.read += _files(beside[0])
    prompt = found[TRANSFORMER].renamed.tensors.get("null_text") if TRANSFORMER in found else None
    if prompt is not None and prompt.ndim == 2:
        files.text_encoder = _text_encoder_beside(places, prompt.shape[1])
    return files


def model_of(files: Files) -> tuple[Config, Published | None]:
    """The configuration of files, and the published model it is; None where it is another one.

    Its geometry is what the shapes of the weights say; how it is drawn with is what the preset of that geometry says.

    Raises:
        InputError: a geometry that bitgen does not know, or a tokenizer that is missing or of another number of bits.
    """
    presets = _presets()
    transformer, tokenizer = files.weights.get(TRANSFORMER), files.weights.get(TOKENIZER)
    own_tokenizer = None if tokenizer is None else tokenizer_geometry(tokenizer.renamed.tensors, tokenizer.source)
    if transformer is None:
        return _config(presets[PLAIN], files, tokenizer=own_tokenizer), None
    tensors, source = transformer.renamed.tensors, transformer.source
    predicted = bits_per_position(tensors, source)
    seen = transformer_geometry(tensors, None, source)
    alike = {
        name: config
        for name, config in presets.items()
        if config.model.bits_per_position == predicted and _is_alike(config.model.transformer, seen)
    }
    entries = [entry for entry in CATALOGUE.values() if entry.transformer is not None and entry.preset in alike]
    entries.sort(key=lambda entry: entry.transformer != files.path.name)
    entry = entries[0] if entries else None
    if own_tokenizer is None and entry is None:
        raise InputError(
            f"no tokenizer beside {files.path}", "put its file, with vae in its name, into the same folder"
        )
    base = presets[PLAIN] if not alike else alike[entry.preset] if entry is not None else next(iter(alike.values()))
    bits = (own_tokenizer or base.model.tokenizer).bits
    geometry = transformer_geometry(tensors, bits, source)
    if entry is not None:
        geometry = geometry.model_copy(update={"text_length": base.model.transformer.text_length})
    return _config(base, files, tokenizer=own_tokenizer, transformer=geometry), entry


@cache
def _presets() -> dict[str, Config]:
    """Every preset, whatever the environment says."""
    return {name: resolve(name, environment={}).config for name in preset_names()}


def _config(base: Config, files: Files, **sections: Section | None) -> Config:
    """A configuration with sections of its model replaced by those that are given."""
    changed = base.model.model_copy(update={name: section for name, section in sections.items() if section})
    try:
        model = ModelConfig.model_validate(changed.model_dump())
    except ValidationError as error:
        raise InputError(f"{files.path} holds no model that bitgen knows: {error.errors()[0]['msg']}") from error
    return base.model_copy(update={"name": files.path.stem, "model": model})


def _is_alike(known: TransformerConfig, seen: TransformerConfig) -> bool:
    """Whether a preset's transformer is the one that was seen."""
    return all(getattr(known, name) == getattr(seen, name) for name in ("depth", "width", "heads", "text_width"))


# -- looking around ----------------------------------------------------------------------------------------------------


def _main(path: Path) -> Path:
    """The one file, index or folder that holds the model: a transformer's, or the only tokenizer's."""
    if not path.is_dir():
        return path
    found = list(_weights_in(path))
    transformers = [one for one in found if not _is_called_tokenizer(one)]
    chosen = transformers or found
    if len(chosen) != 1:
        names = ", ".join(one.name for one in sorted(chosen)[:4])
        raise InputError(f"{path} holds {len(chosen)} models: {names}", "name one of the files")
    return chosen[0]


def _weights_in(folder: Path) -> Iterator[Path]:
    """Weights in a folder: itself where it has an index, else files and folders with an index that are no T5."""
    if is_weight_file(folder):
        yield folder
        return
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise explain(error, folder, "read") from error
    for one in inside:
        if (one.is_dir() and is_weight_file(one) and not _is_text_encoder(one)) or (
            one.is_file() and one.name.endswith(SUFFIXES)
        ):
            yield one


def _is_called_tokenizer(file: Path) -> bool:
    return any(word in file.name.lower() for word in TOKENIZER_WORDS)


def _tokenizer_beside(transformer: PartWeights, places: Iterable[Path]) -> tuple[Path, PartWeights] | None:
    """The tokenizer that belongs to a transformer, and its file; None where there is none, or nobody knows which."""
    predicted = bits_per_position(transformer.renamed.tensors, transformer.source)
    published = {entry.tokenizer for entry in CATALOGUE.values() if entry.transformer is not None}
    fitting = []
    for file in (file for place in places for file in sorted(place.iterdir())):
        if not (file.is_file() and file.name.endswith(SUFFIXES) and _is_called_tokenizer(file)):
            continue
        for weights in read_weight_file(file):
            if weights.part == TOKENIZER:
                geometry = tokenizer_geometry(weights.renamed.tensors, weights.source)
                if predicted == geometry.bits * (4 if geometry.patch_size == PATCHIFIED else 1):
                    fitting.append((file, weights))
    named = [found for found in fitting if found[0].name in published]
    return named[0] if named else fitting[0] if len(fitting) == 1 else None


def _text_encoder_beside(places: Iterable[Path], width: int) -> Path | None:
    """The folder of a T5 of that width."""
    for folder in (folder for place in places for folder in (place, *sorted(place.iterdir()))):
        if folder.is_dir() and _is_text_encoder(folder) and read_json(folder / TEXT_CONFIG).get("d_model") == width:
            return folder
    return None


def _is_text_encoder(folder: Path) -> bool:
    names = (folder / TEXT_CONFIG, folder / VOCABULARY)
    return all(file.is_file() for file in names) and is_t5(read_json(folder / TEXT_CONFIG))


def _files(main: Path) -> list[Path]:
    """Every file that is read of a file, index or folder."""
    if main.is_dir() or main.name.endswith(INDEX_SUFFIX):
        index = find_index(main).resolve()
        return [index, *(index.parent / name for name in shard_names(index))]
    return [main.resolve()]
