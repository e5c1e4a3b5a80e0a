"""`bitgen inspect-config`: every value and its origin, and what follows from it: scales, sizes, memory.

The same for a preset, a file, a run folder and a model folder; of a picture, the recipe it was drawn by; of a subject,
how it was learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitgen_cli.config import Config, ModelConfig
from bitgen_cli.config_keys import flatten
from bitgen_cli.engine.device import free_memory, pick_device
from bitgen_cli.engine.memory import BYTES, Parameters, parameters, sampling_memory, store_bytes
from bitgen_cli.engine.model_folder import read_origin
from bitgen_cli.engine.scales import Schedule, nearest_ratio, ratios, schedule
from bitgen_cli.engine.subject import SUFFIX, Subject, find_subject, known_subjects, read_subject, unreadable_subjects
from bitgen_cli.engine.training_memory import (
    LABELS,
    Layout,
    subject_training_memory,
    tokenizer_training_memory,
    transformer_training_memory,
)
from bitgen_cli.errors import ConfigError, InputError, UsageError
from bitgen_cli.files import explain, read_json
from bitgen_cli.presets import EXTENDS, Resolved, preset_names, preset_path, resolve, resolve_stored
from bitgen_cli.report import Report, Table
from bitgen_cli.runs.recipe_file import PICTURES, is_picture, picture_recipe

CAPTION_TOKENS = 16
"""Tokens of a photo's caption that the memory of learning a subject is told for."""
MODEL_FORMAT = 1
"""Of a model folder's config.json."""

_FILES = (".yaml", ".yml", ".json", *PICTURES)


@dataclass(frozen=True)
class InspectOptions:
    """What to look at.

    Attributes:
        target: preset, YAML file, run folder, model folder, subject (name or file) or PNG; not looked at with `schema`.
        overrides: `a.b=1` each, laid over the configuration.
        schema: the JSON schema of a configuration instead.
        config_file: YAML, laid over a preset.
    """

    target: str
    overrides: list[str] = field(default_factory=list)
    schema: bool = False
    config_file: Path | None = None


@dataclass(frozen=True)
class InspectResult:
    """What was found.

    Attributes:
        kind: `preset`, `file`, `run`, `model`, `subject`, `picture` or `schema`.
        facts: everything, as plain JSON values.
        sections: the same as tables.
    """

    kind: str
    facts: dict[str, Any]
    sections: list[Table]

    def to_json(self) -> dict[str, Any]:
        """The facts; for a schema, the schema itself."""
        return self.facts


def inspect(options: InspectOptions, report: Report) -> InspectResult:
    """Looks at a configuration, wherever it is stored, or at a picture's recipe.

    Raises:
        ConfigError: the configuration is wrong; carries every problem.
        UsageError: unknown preset, not YAML, or options that do not belong to the target.
        InputError: missing or unreadable target, a damaged config.json, a picture without a recipe.
    """
    if options.schema:
        return InspectResult("schema", _schema(), [])
    path = Path(options.target).expanduser()
    if options.target in preset_names():
        if path.exists():
            report.notice(
                f"{options.target} is taken as the preset; ./{options.target} would be what lies here"
            )
        return _of_preset(options, report)
    if options.config_file is not None:
        raise UsageError(f"--config belongs to a preset, and {options.target} is none", "use --set")
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if path.is_dir():
        return _of_folder(path, options, report)
    if path.is_file() and path.suffix == SUFFIX:
        return _of_subject(read_subject(path), options)
    if path.is_file():
        return _of_picture(path, options) if is_picture(path) else _of_file(path, options, report)
    if options.target in {file.stem for file in unreadable_subjects()} | {s.name for s in known_subjects()}:
        return _of_subject(find_subject(options.target), options)
    if path.exists() or path.suffix.lower() in _FILES or len(path.parts) > 1:
        raise InputError(f"cannot read {options.target}: no such file or folder")
    preset_path(options.target)
    raise AssertionError("preset_names and preset_path disagree")


def _of_preset(options: InspectOptions, report: Report) -> InspectResult:
    resolved = resolve(options.target, config_file=options.config_file, overrides=options.overrides)
    return _result("preset", options.target, resolved, {}, [], report)


def _of_file(path: Path, options: InspectOptions, report: Report) -> InspectResult:
    resolved = resolve(None, config_file=path, overrides=options.overrides)
    return _result("file", options.target, resolved, {}, [], report)


def _of_folder(path: Path, options: InspectOptions, report: Report) -> InspectResult:
    """A run folder or a model folder, by what its config.json says."""
    file = path / "config.json"
    if not file.is_file():
        raise InputError(f"{path} holds no config.json", "give a run folder or a model folder")
    stored = read_json(file)
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        raise InputError(f"{file} describes neither a run nor a model of bitgen")
    if "verb" in stored:
        origins = stored.get("origins", {})
        resolved = _stored(stored["config"], origins, f"run {path.name}", file, options)
        facts = _run_facts(path, stored)
        return _result("run", options.target, resolved, {"run": facts}, [_facts_table("Run", facts)], report)
    if not isinstance(stored.get("fingerprints"), dict):
        raise InputError(f"{file} describes neither a run nor a model of bitgen")
    if stored.get("format") != MODEL_FORMAT:
        raise InputError(f"{file} is of format {stored.get('format')}, this bitgen reads {MODEL_FORMAT}")
    # a model folder holds what defines the model, not the name it was once trained under
    config = {"name": path.resolve().name, **stored["config"]}
    resolved = _stored(config, {"name": "folder name"}, f"model {path.name}", file, options)
    facts = {"fingerprints": stored["fingerprints"], "files": _file_sizes(path)}
    revisions = read_origin(path).revisions
    facts |= {"revisions": revisions} if revisions else {}
    return _result("model", options.target, resolved, {"model": facts}, _model_tables(facts), report)


def _stored(
    config: Mapping[str, Any], origins: Any, where: str, file: Path, options: InspectOptions
) -> Resolved:
    """A stored configuration with the overrides on top.

    Raises:
        InputError: what is stored is wrong.
        ConfigError: the overrides are.
    """
    if not isinstance(origins, dict):
        raise InputError(f"{file} is damaged: origins must be a mapping")
    known = {str(key): str(origin) for key, origin in origins.items()}
    try:
        resolved = resolve_stored(config, known, where=where)
    except ConfigError as error:
        others = len(error.problems) - 1
        more = f", and {others} more" if others else ""
        raise InputError(f"{file} holds no valid configuration: {error.problems[0]}{more}") from error
    if options.overrides:
        return resolve_stored(config, known, where=where, overrides=options.overrides)
    return resolved


def _run_facts(path: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is, and how far."""
    facts = {name: value for name, value in stored.items() if name not in ("config", "origins", "format")}
    state = path / "state.json"
    progress = read_json(state) if state.is_file() else {}
    if not isinstance(progress, dict):
        raise InputError(f"{state} is damaged: it must hold keys and values")
    return {**facts, **progress}


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder, by its path inside."""
    try:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    except OSError as error:
        raise explain(error, folder, "read") from error


def _model_tables(facts: Mapping[str, Any]) -> list[Table]:
    files = [[name, _bytes(size)] for name, size in facts["files"].items()]
    prints = [[str(part), str(value)] for part, value in facts["fingerprints"].items()]
    tables = [
        Table("Files", ["File", "Size"], files),
        Table("Fingerprints (sha256)", ["Part", "Fingerprint"], prints),
    ]
    commits = [[str(name), str(commit)] for name, commit in facts.get("revisions", {}).items()]
    return [*tables, Table("Fetched from the hub", ["Repository", "Commit"], commits)] if commits else tables


def _of_picture(path: Path, options: InspectOptions) -> InspectResult:
    """The recipe inside a PNG; the pixels are not decoded."""
    if options.overrides:
        raise UsageError("--set belongs to configurations, not to a picture's recipe")
    recipe, size = picture_recipe(path)
    facts = {
        "kind": "picture",
        "target": options.target,
        "width": size[0],
        "height": size[1],
        "recipe": recipe,
    }
    table = _facts_table("Recipe", recipe)
    return InspectResult(
        "picture", facts, [Table("Picture", ["", "Pixels"], [["Size", f"{size[0]}x{size[1]}"]]), table]
    )


def _of_subject(subject: Subject, options: InspectOptions) -> InspectResult:
    """What a subject file says of itself: what it is called, learned on and from, and how."""
    if options.overrides:
        raise UsageError("--set belongs to configurations, not to a subject's recipe")
    header = subject.header
    known = {
        "name": subject.name,
        "file": str(subject.file),
        "token": header.token,
        "class": header.class_word,
        "kind": header.kind,
        "base": header.base_name,
        "bytes": subject.file.stat().st_size,
    }
    facts = {
        "kind": "subject",
        "target": options.target,
        **{key: value for key, value in known.items() if key != "kind"},
        "changes": header.kind,
        "fingerprints": header.base,
        "pictures": header.pictures,
        "recipe": header.recipe,
    }
    tables = [
        _facts_table("Subject", {**known, "bytes": _bytes(subject.file.stat().st_size)}),
        Table("Photos", ["File", "sha256"], [[p.get("file", ""), p.get("sha256", "")] for p in header.pictures]),
        Table("Base model (sha256)", ["Part", "Fingerprint"], [[part, value] for part, value in header.base.items()]),
        _facts_table("Recipe", header.recipe),
    ]
    return InspectResult("subject", facts, tables)


def _schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    schema = Config.model_json_schema()
    base = {"type": "string", "description": "the preset beneath this file", "examples": preset_names()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "bitgen configuration",
        "properties": {EXTENDS: base, **schema["properties"]},
    }


def _result(
    kind: str,
    target: str,
    resolved: Resolved,
    more_facts: Mapping[str, Any],
    more_tables: list[Table],
    report: Report,
) -> InspectResult:
    """Everything that follows from a configuration."""
    config, model = resolved.config, resolved.config.model
    patchify = model.transformer.patchify
    scales = schedule(model.scales, patchify=patchify, ratio=nearest_ratio(1.0, model.scales))
    counts = parameters(model)
    if counts.text_encoder is None:
        report.notice(f"the size of text encoder {model.text_encoder.source} is not known; sums leave it out")
    values = {
        key: {"value": value, "origin": resolved.origins[key]} for key, value in flatten(resolved.config)
    }
    picture = _picture_facts(model, scales)
    # fp16 needs what bf16 does
    sampling = {name: _sampling_facts(model, counts, scales, BYTES[name]) for name in ("fp32", "bf16")}
    device = pick_device("auto")
    layout = Layout(device)
    stages = {
        "tokenizer": tokenizer_training_memory(config, counts, scales, layout),
        "transformer": transformer_training_memory(config, counts, scales, layout),
        "subject": None,
    }
    if config.training.subject is not None:
        tokens = min(CAPTION_TOKENS, model.transformer.text_length)
        stages["subject"] = subject_training_memory(config, counts, scales, tokens, layout)
    training = {name: None if memory is None else memory.to_json() for name, memory in stages.items()}
    facts: dict[str, Any] = {
        "kind": kind,
        "target": target,
        **more_facts,
        "config": config.model_dump(mode="json"),
        "values": values,
        "scales": _scale_facts(model, scales),
        "picture": picture,
        "ratios": _ratio_facts(model),
        "parameters": {**asdict(counts), "total": counts.total},
        "memory": {"sampling": sampling, "training": training, "free": {device.type: free_memory(device)}},
    }
    tables = [
        *more_tables,
        Table(
            "Values",
            ["Key", "Value", "Origin"],
            [[k, _value(v["value"]), v["origin"]] for k, v in values.items()],
        ),
        _scale_table(facts["scales"], picture),
        _picture_table(picture),
        *([_ratio_table(facts["ratios"])] if len(facts["ratios"]) > 1 else []),
        _parameter_table(counts),
        _sampling_table(sampling, picture, facts["memory"]["free"]),
        *([_training_table(config, training)] if any(training.values()) else []),
    ]
    return InspectResult(kind, facts, tables)


def _sampling_facts(model: ModelConfig, counts: Parameters, scales: Schedule, number: int) -> dict[str, int]:
    """Memory of all parts, and `offloaded`: what a GPU needs when all that can waits (runs/placement.py)."""
    depth = model.transformer.depth
    least = sampling_memory(model, counts, scales, number, waiting=depth, in_bands=True)
    return {**sampling_memory(model, counts, scales, number).to_json(), "offloaded": least.total}


def _scale_facts(model: ModelConfig, scales: Schedule) -> list[dict[str, int]]:
    """Each scale: size in positions, positions of it and up to it, bits of it."""
    return [
        {
            "scale": index,
            "height": h,
            "width": w,
            "positions": h * w,
            "positions_so_far": scales.slices[index].stop,
            "bits": h * w * model.bits_per_position,
        }
        for index, (h, w) in enumerate(scales.sizes)
    ]


def _picture_facts(model: ModelConfig, scales: Schedule) -> dict[str, Any]:
    """One picture of the model's size: pixels, positions, bits, bytes in a token store."""
    height, width = scales.pixels(model.tokenizer.patch_size)
    bits = scales.positions * model.bits_per_position
    stored = store_bytes(model, scales)
    return {
        "ratio": scales.ratio,
        "height": height,
        "width": width,
        "scales": len(scales),
        "positions": scales.positions,
        "bits_per_position": model.bits_per_position,
        "bits": bits,
        "bits_per_pixel": bits / (height * width),
        "bits_with": {str(d): bits // model.tokenizer.most_bits * d for d in model.tokenizer.bit_counts},
        "store_bytes": {"bits": stored.bits, "latents": stored.latents},
    }


def _ratio_facts(model: ModelConfig) -> list[dict[str, Any]]:
    """Every aspect ratio the model can draw: pixels and positions."""
    found = []
    for ratio in ratios(model.scales):
        scales = schedule(model.scales, patchify=model.transformer.patchify, ratio=ratio)
        height, width = scales.pixels(model.tokenizer.patch_size)
        found.append({"ratio": ratio, "height": height, "width": width, "positions": scales.positions})
    return found


def _scale_table(scales: list[dict[str, int]], picture: Mapping[str, Any]) -> Table:
    rows = [
        [
            str(scale["scale"]),
            f"{scale['height']}x{scale['width']}",
            f"{scale['positions']:,}",
            f"{scale['positions_so_far']:,}",
            f"{scale['bits']:,}",
        ]
        for scale in scales
    ]
    title = f"Scales of a picture of {picture['height']}x{picture['width']} pixels (height x width)"
    return Table(title, ["Scale", "Size", "Positions", "So far", "Bits"], rows)


def _picture_table(picture: Mapping[str, Any]) -> Table:
    stored = picture["store_bytes"]
    fewer = {d: bits for d, bits in picture["bits_with"].items() if bits < picture["bits"]}
    rows = [
        ["Positions", f"{picture['positions']:,}"],
        ["Bits per position", str(picture["bits_per_position"])],
        ["Bits", f"{picture['bits']:,}"],
        *([f"Bits with --bits {d}", f"{bits:,}"] for d, bits in fewer.items()),
        ["Bits per pixel", f"{picture['bits_per_pixel']:.3f}"],
        ["Token store: packed bits", _bytes(stored["bits"])],
        ["Token store: latents in bf16", _bytes(stored["latents"])],
    ]
    return Table("One picture", ["", "Amount"], rows)


def _ratio_table(found: list[dict[str, Any]]) -> Table:
    rows = [[str(r["ratio"]), f"{r['height']}x{r['width']}", f"{r['positions']:,}"] for r in found]
    return Table("Aspect ratios (height / width)", ["Ratio", "Pixels", "Positions"], rows)


def _parameter_table(counts: Parameters) -> Table:
    parts = {
        "Tokenizer encoder": counts.tokenizer_encoder,
        "Tokenizer decoder": counts.tokenizer_decoder,
        "Transformer": counts.transformer,
        "Text encoder": counts.text_encoder,
        "Total" if counts.text_encoder is not None else "Total without text encoder": counts.total,
    }
    rows = [
        [name, "not known", ""] if count is None else [name, f"{count:,}", _millions(count)]
        for name, count in parts.items()
    ]
    return Table("Parameters", ["Part", "Count", ""], rows)


_SAMPLING_ROWS = {
    "text_encoder": "Text encoder, gone before the others come",
    "transformer": "Transformer",
    "tokenizer": "Tokenizer",
    "kv_cache": "Keys and values of all scales but the last",
    "derived": "Weights made for a CPU's decoder",
    "text_cache": "Keys and values of the prompt",
    "transformer_work": "Work of the transformer, last scale",
    "decoder_work": "Work of the decoder, after the transformer",
    "total": "Peak",
    "offloaded": "Peak on a GPU with --offload cpu",
}


def _sampling_table(
    sampling: Mapping[str, Mapping[str, int]], picture: Mapping[str, Any], free: Mapping[str, int | None]
) -> Table:
    rows = [
        [label, *(_bytes(sampling[number][name]) for number in sampling)]
        for name, label in _SAMPLING_ROWS.items()
    ]
    told = {device: _bytes(left) for device, left in free.items() if left is not None}
    rows += [[f"Free now ({device})", *[left] * len(sampling)] for device, left in told.items()]
    size = f"{picture['height']}x{picture['width']}"
    return Table(f"Memory for sampling one picture of {size} with guidance, estimated", ["", *sampling], rows)


def _training_table(config: Config, training: Mapping[str, Mapping[str, int] | None]) -> Table:
    stages = {name: memory for name, memory in training.items() if memory is not None}
    rows = [
        [label, *(_bytes(memory[name]) for memory in stages.values())]
        for name, label in {**LABELS, "total": "Peak"}.items()
        if any(memory[name] for memory in stages.values())
    ]
    heads = []
    for name in stages:
        recipe = getattr(config.training, name)
        heads.append(f"{name}, batch of {recipe.batch_size} in {recipe.precision}")
    return Table("Memory for training, estimated", ["", *heads], rows)


def _facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    rows: list[list[str]] = []

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(f"{prefix}{name}.", value)
            else:
                rows.append([f"{prefix}{name}", _value(value)])

    add("", facts)
    return Table(title, ["Key", "Value"], rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _bytes(size: int) -> str:
    if size >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    if size >= 1 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size / (1 << 10):.1f} KiB" if size >= 1 << 10 else f"{size} bytes"
