"""What --model names: a folder that is there, or one made once from published files, of the hub or the user's own.

Made folders are kept below `models` where bitgen keeps what belongs to the user, and get their parts when a command
needs them: who tokenizes with infinity-2b fetches no transformer.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitgen_cli.config import Config, ModelConfig
from bitgen_cli.engine import hub
from bitgen_cli.engine.beginning import PartReport
from bitgen_cli.engine.conversion import TEXT_ENCODER, write_text_encoder, write_tokenizer, write_transformer
from bitgen_cli.engine.memory import BF16, FP32, parameters, text_geometry
from bitgen_cli.engine.model_folder import (
    BUILT_IN,
    TEXT_FOLDER,
    TOKENIZER_FILE,
    TRANSFORMER_FILE,
    Origin,
    describe_model,
    find_model,
    fingerprint,
    read_model_config,
    read_origin,
    write_origin,
)
from bitgen_cli.engine.weight_files import SUFFIXES, TOKENIZER, TRANSFORMER, PartWeights, read_weight_file
from bitgen_cli.errors import InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.files import PARTIAL, data_folder, share_folder, taking_turns
from bitgen_cli.presets import resolve
from bitgen_cli.report import Report, Silent, Task
from bitgen_cli.runs.local_files import AVERAGED, find_files, is_published_layout, model_of
from bitgen_cli.runs.published import CATALOGUE, REVISION, Published

PARTS = (TOKENIZER, TRANSFORMER, TEXT_ENCODER)
"""Parts of a model, in the order they are made."""
PLACES = {TOKENIZER: TOKENIZER_FILE, TRANSFORMER: TRANSFORMER_FILE, TEXT_ENCODER: TEXT_FOLDER}
"""Where a model folder has them."""
MODELS = "models"
SPARE = 1.01
"""What files take on a disk, beyond their bytes."""


def provide_model(name: str, report: Report | None = None, parts: Sequence[str] = PARTS) -> Path:
    """The folder of a model with these parts, fetched and converted first where that is not done.

    Args:
        name: `demo`, a model folder, a run folder, a published model as the catalogue calls it (infinity-2b, or
            infinity-2b@REVISION), or files in a published layout: a file, or a folder with some. Behind a file of the
            published trainer may stand `:ema`, for its averaged weights.
        report: gets bars for what takes long.
        parts: that are needed; the others are made when they are. A model folder is given as it is.

    Raises:
        InputError: no such model, a file is not what it should be, or the hub cannot give it.
        UsageError: the model has no such part.
        ResourceError: not enough disk.
        Interrupted: stopped by the user; what was fetched and converted stays.
    """
    told = report or Silent()
    known, _, revision = name.partition("@")
    if known in CATALOGUE:
        return _published(known, revision or REVISION, parts, told)
    place = name.removesuffix(f":{AVERAGED}")
    path = Path(place).expanduser()
    if is_published_layout(path):
        return _of_files(path, place != name, parts, told)
    if name != BUILT_IN and not path.exists():
        models = f"or {BUILT_IN}; published ones are {', '.join(CATALOGUE)}"
        raise InputError(f"no model at {name}", f"give a model folder, a run folder, {models}")
    return find_model(name)


def published_parts(name: str) -> tuple[str, ...]:
    """The parts that there are of a published model; all of them where the name is none of the catalogue's."""
    entry = CATALOGUE.get(name.partition("@")[0])
    return PARTS if entry is None or entry.transformer is not None else (TOKENIZER,)


# -- published models --------------------------------------------------------------------------------------------------


def _published(name: str, revision: str, parts: Sequence[str], report: Report) -> Path:
    entry = CATALOGUE[name]
    if not set(parts) <= set(published_parts(name)):
        raise _tokenizer_alone(name)
    if not re.fullmatch(r"\w[\w.-]{0,99}", revision):
        raise UsageError(f"{revision!r} is no revision", "name a commit, branch or tag: infinity-2b@REVISION")
    folder = data_folder() / MODELS / (name if revision == REVISION else f"{name}@{revision}")
    if not _lacking(folder, parts):
        return folder
    with _one_at_a_time(folder, report):
        config = resolve(entry.preset, overrides=entry.overrides, environment={}).config
        known = read_origin(folder)
        sources = {
            part: _shared(part, folder, config.model, known) or _of_hub(part, entry, config.model, revision, known)
            for part in _lacking(folder, parts)
        }
        _make(name, folder, config, sources, known, report)
    return folder


def _of_hub(part: str, entry: Published | None, model: ModelConfig, revision: str, known: Origin) -> _Source:
    """The hub's files of a part. The commit of a repository stays the same for all parts of a model.

    Args:
        part: which.
        entry: of the catalogue; text encoders need none.
        model: names the text encoder.
        revision: of the catalogue's repository.
        known: what is kept of the model already.
    """
    choose: hub.Choose
    if part == TEXT_ENCODER:
        repository, revision, choose = model.text_encoder.source, REVISION, hub.text_encoder_files
    else:
        assert entry is not None
        file = entry.tokenizer if part == TOKENIZER else entry.transformer
        assert file is not None
        repository = entry.repository
        choose = hub.one_file(file) if Path(file).suffix in SUFFIXES else hub.sharded(file)
    wanted = known.revisions.get(repository, revision)
    snapshot = hub.kept(repository, wanted, choose) or hub.offered(repository, wanted, choose)
    return _Source(part, repository if part == TEXT_ENCODER else f"{repository}/{file}", snapshot)


def _shared(part: str, folder: Path, model: ModelConfig, known: Origin) -> _Source | None:
    """The same text encoder in the folder of another model, whole as it was made; None where there is none.

    Args:
        part: which; all but text encoders are a model's own.
        folder: of the model that is made.
        model: names the text encoder.
        known: what is kept of the model already.
    """
    repository = model.text_encoder.source
    for other in sorted(folder.parent.glob("*")) if part == TEXT_ENCODER else ():
        with suppress(InputError, OSError):
            origin, (theirs, _, prints) = read_origin(other), read_model_config(other)
            commit = origin.revisions.get(repository)
            if other == folder or commit is None or commit != known.revisions.get(repository, commit):
                continue
            same = theirs.transformer.text_width == model.transformer.text_width and part in origin.reports
            if same and prints.get(part) == fingerprint(other / TEXT_FOLDER):
                return _Source(part, repository, twin=_Twin(other, commit, origin.reports[part]))
    return None


# -- files of the user's own -------------------------------------------------------------------------------------------


def _of_files(path: Path, averaged: bool, parts: Sequence[str], report: Report) -> Path:
    place = str(path.resolve()) + (f":{AVERAGED}" if averaged else "")
    folder = data_folder() / MODELS / f"{path.stem}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    if _is_current(folder) and not _lacking(folder, parts):
        return folder
    with _one_at_a_time(folder, report):
        if folder.exists() and not _is_current(folder):
            shutil.rmtree(folder)
        files = find_files(path, averaged=averaged)
        if TRANSFORMER in parts and TRANSFORMER not in files.weights:
            raise _tokenizer_alone(str(path))
        config, entry = model_of(files)
        known = replace(read_origin(folder), files={str(file): _stamp(file) for file in files.read})
        sources = {}
        for part in _lacking(folder, parts):
            if part in files.weights:
                sources[part] = _Source(part, files.weights[part].source, weights=files.weights[part])
            elif part == TEXT_ENCODER and files.text_encoder is not None:
                sources[part] = _Source(part, str(files.text_encoder), text_encoder=files.text_encoder)
            else:
                if part == TEXT_ENCODER:
                    _require_published_width(path, config.model)
                shared = _shared(part, folder, config.model, known)
                sources[part] = shared or _of_hub(part, entry, config.model, REVISION, known)
        _make(str(path), folder, config, sources, known, report)
    return folder


def _require_published_width(path: Path, model: ModelConfig) -> None:
    """Raises InputError where the published text encoder cannot take the place of one beside the user's files."""
    width, text = model.transformer.text_width, text_geometry(model.text_encoder)
    if text is not None and text.width != width:
        raise InputError(
            f"no text encoder of {width} channels beside {path}", "put its folder, as transformers writes it, there"
        )


def _is_current(folder: Path) -> bool:
    """Whether the user's files are still those that a folder was made from."""
    known = read_origin(folder).files
    return bool(known) and all(_stamp(Path(file)) == stamp for file, stamp in known.items())


def _stamp(file: Path) -> list[int]:
    """Bytes and time of the last change in nanoseconds; nothing where there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


# -- making a folder ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Twin:
    """A text encoder in the folder of another model.

    Attributes:
        folder: of that model.
        commit: of the repository it was made from.
        report: what became of every key then.
    """

    folder: Path
    commit: str
    report: Any


@dataclass(frozen=True)
class _Source:
    """Where a part comes from: a snapshot of the hub, weights or a text encoder of the user's own, or another model.

    Attributes:
        part: which.
        name: for people; of what another model has, the repository.
        snapshot, weights, text_encoder, twin: one of them.
    """

    part: str
    name: str
    snapshot: hub.Snapshot | None = None
    weights: PartWeights | None = None
    text_encoder: Path | None = None
    twin: _Twin | None = None

    def convert(self, model: ModelConfig, target: Path, advance: Callable[[int], None]) -> PartReport:
        """Writes the part into a model folder."""
        if self.part == TEXT_ENCODER:
            folder = self.snapshot.path("") if self.snapshot is not None else self.text_encoder
            assert folder is not None
            return write_text_encoder(folder, self.name, model.transformer.text_width, target, advance)
        write = write_tokenizer if self.part == TOKENIZER else write_transformer
        return write(self.weights or self._fetched(), model, target, advance)

    def _fetched(self) -> PartWeights:
        """The weights in the snapshot."""
        assert self.snapshot is not None
        first = next(iter(self.snapshot.files))
        found = {weights.part: weights for weights in read_weight_file(self.snapshot.path(first))}
        if self.part not in found:
            raise InputError(
                f"{self.name} is a {' and a '.join(found)}, not a {self.part}", "is it the right revision?"
            )
        return replace(found[self.part], source=self.name)


def _make(
    name: str, folder: Path, config: Config, sources: Mapping[str, _Source], known: Origin, report: Report
) -> None:
    """Adds parts to a model folder, each whole or not at all."""
    sizes = _converted_bytes(config.model)
    snapshots = {part: source.snapshot for part, source in sources.items() if source.snapshot is not None}
    own = {part: sizes[part] for part, source in sources.items() if source.twin is None}
    _require_disk(name, folder, own, list(snapshots.values()))
    # kept before the first byte, so that all parts are of one commit whatever happens
    commits = {snapshot.repository: snapshot.commit for snapshot in snapshots.values()}
    commits |= {source.name: source.twin.commit for source in sources.values() if source.twin is not None}
    origin = replace(known, revisions={**known.revisions, **commits})
    write_origin(folder, origin)
    for part, source in sources.items():
        if source.twin is not None:
            share_folder(source.twin.folder / TEXT_FOLDER, folder / TEXT_FOLDER)
            origin = _add(part, source.twin.report, folder, config, origin)
            report.notice(f"{name} shares the text encoder of {source.twin.folder.name}")
            continue
        if source.snapshot is not None:
            hub.fetch(source.snapshot, report)
            if part == TEXT_ENCODER:
                hub.remember(source.snapshot)  # trainings and stores find it too
        with report.task(f"converting the {part.replace('_', ' ')} (MB)", round(sizes[part] / hub.MEGABYTE, 1)) as task:
            try:
                found = source.convert(config.model, folder / PLACES[part], _Megabytes(task))
            except KeyboardInterrupt as error:
                raise Interrupted(
                    f"stopped by Ctrl-C while converting {source.name}",
                    "what was fetched stays; the same command goes on",
                ) from error
        origin = _add(part, found.to_json(), folder, config, origin)
        report.notice(found.summary())
    if snapshots:
        kept = sum(sum(snapshot.files.values()) for snapshot in snapshots.values())
        report.notice(
            f"{name} is in {folder}; the {amount(kept)} it was made of are not needed any more, "
            f"and lie in {hub.cache_folder()}"
        )


def _add(part: str, found: Any, folder: Path, config: Config, origin: Origin) -> Origin:
    """Lists a part that is made in its model folder, and returns where the model comes from now."""
    origin = replace(origin, reports={**origin.reports, part: found})
    write_origin(folder, origin)
    prints = read_model_config(folder)[2] if (folder / "config.json").is_file() else {}
    prints[part] = fingerprint(folder / PLACES[part])
    describe_model(folder, config.model, config.sampling, prints)
    return origin


class _Megabytes:
    """Moves a bar on by bytes."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, count: int) -> None:
        self._task.advance(count / hub.MEGABYTE)


def _lacking(folder: Path, parts: Sequence[str]) -> list[str]:
    """The parts that a model folder has not, in the order they are made; the tokenizer is always there first."""
    prints = read_model_config(folder)[2] if (folder / "config.json").is_file() else {}
    wanted = {TOKENIZER, *parts}
    return [part for part in PARTS if part in wanted and not (part in prints and (folder / PLACES[part]).exists())]


@contextmanager
def _one_at_a_time(folder: Path, report: Report) -> Iterator[None]:
    """Keeps other processes from making models, and deletes what a killed one has left of this."""
    with taking_turns(folder.parent, lambda: report.notice("another process makes a model: waiting for it")):
        for left in [*folder.parent.glob(f".{folder.name}.*{PARTIAL}"), *folder.glob(f".*{PARTIAL}")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _converted_bytes(model: ModelConfig) -> dict[str, int]:
    """Bytes of each part in a model folder."""
    counts = parameters(model)
    return {
        TOKENIZER: counts.tokenizer * FP32,
        TRANSFORMER: counts.transformer * BF16,
        TEXT_ENCODER: (counts.text_encoder or 0) * BF16,
    }


def _require_disk(name: str, folder: Path, made: Mapping[str, int], snapshots: Sequence[hub.Snapshot]) -> None:
    """Raises ResourceError where the files to fetch and the parts to make do not fit."""
    needs: dict[int, tuple[Path, int]] = {}
    fetched = sum(sum(snapshot.missing.values()) for snapshot in snapshots)
    for place, size in ((hub.cache_folder(), fetched), (folder, sum(made.values()))):
        there = next(parent for parent in (place, *place.parents) if parent.is_dir())
        first, others = needs.get(there.stat().st_dev, (there, 0))
        needs[there.stat().st_dev] = (first, others + size)
    for there, size in needs.values():
        free = shutil.disk_usage(there).free
        if size * SPARE > free:
            raise ResourceError(
                f"{name} takes {amount(size)} of disk while it is made, and {amount(free)} are free at {there}",
                "HF_HOME moves what is fetched, BITGEN_HOME what is made of it",
            )


def amount(size: int) -> str:
    """Bytes that are fetched for people, as hubs and browsers count them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _tokenizer_alone(name: str) -> UsageError:
    return UsageError(f"{name} is a tokenizer alone", "bitgen tokenize takes it, and bitgen train --init")
