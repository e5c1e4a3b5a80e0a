"""Every reader of bitgen as a function of the bytes of one file, with valid files of each kind to begin from."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path += [str(Path(__file__).parents[1] / name) for name in ("engine", "runs")]

import hostile
import numpy as np
import tiny
import tiny_model
import torch
import yaml
from data_sets import encoded, picture, put, write_coco, write_lines, write_tar
from guard import Box, Outcome, attempt
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from bitgen_cli.engine.checkpoint import Checkpoint, RunFolder
from bitgen_cli.engine.data import load_picture, picture_size, to_tensor
from bitgen_cli.engine.data_report import read_bad
from bitgen_cli.engine.memory import text_geometry
from bitgen_cli.engine.model_folder import Model, load_model, read_model_config, read_origin, read_tensors
from bitgen_cli.engine.sources import open_source
from bitgen_cli.engine.store import TokenStore
from bitgen_cli.engine.store_check import check_store
from bitgen_cli.engine.subject import ROW, START, Header, read_subject, save_subject
from bitgen_cli.engine.text_cache import TextCache, TextKey
from bitgen_cli.engine.text_precision import pick_text_precision
from bitgen_cli.engine.vocabulary import PromptReader, load_vocabulary
from bitgen_cli.engine.weight_files import read_weight_file
from bitgen_cli.errors import BitgenError, InputError
from bitgen_cli.place import Place
from bitgen_cli.report import Silent
from bitgen_cli.runs import inspect_config
from bitgen_cli.runs import sweep as sweeps
from bitgen_cli.runs.carried_bits import digest
from bitgen_cli.runs.drawing import Setting
from bitgen_cli.runs.editing import load_original
from bitgen_cli.runs.inspect_config import InspectOptions, inspect
from bitgen_cli.runs.jobs import SampleOptions, jobs_of
from bitgen_cli.runs.local_files import find_files, model_of
from bitgen_cli.runs.measurements import read_measurements
from bitgen_cli.runs.original import Original, read_mask
from bitgen_cli.runs.original_bits import job_again, take_carried
from bitgen_cli.runs.prior_folder import read_manifest as read_priors
from bitgen_cli.runs.prompt_file import requested
from bitgen_cli.runs.prompts import TextModel
from bitgen_cli.runs.recipe_file import read_recipe
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.tokenize import TokenizeOptions, tokenize


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: of it.
        file: below its folder, that inputs are written to.
        kind: of hostile inputs, as in hostile.inputs.
        prepare: writes everything into the folder that there is besides; returns the valid inputs.
        read: what is tried, of the file.
        share: of the inputs that it gets, against other readers.
        short: inputs in the suite.
        refused: whether valid inputs are too: the reader is for what strangers give in place of something else.
    """

    name: str
    file: str
    kind: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    share: float = 1.0
    short: int = 8
    refused: bool = False


@dataclass
class Prepared:
    """A reader with its folder.

    Attributes:
        reader: which.
        box: with its folder.
        seeds: valid inputs.
    """

    reader: Reader
    box: Box
    seeds: list[bytes] = field(default_factory=list)

    @classmethod
    def of(cls, reader: Reader, folder: Path) -> Prepared:
        """The reader with a folder of its own.

        Args:
            reader: which.
            folder: new and empty.
        """
        prepared = cls(reader, Box(folder))
        prepared.seeds = reader.prepare(prepared.box.data)
        with suppress(BitgenError):  # what is imported now may do what no input may
            prepared.file.write_bytes(prepared.seeds[0])
            reader.read(prepared.file)
        found = [prepared.attempt(seed) for seed in prepared.seeds]
        assert not [outcome.failure for outcome in found if outcome.failure], found
        assert reader.refused or not found[0].refused, f"{reader.name}: the first valid input is refused"
        return prepared

    def attempt(self, content: bytes) -> Outcome:
        """What becomes of an input."""
        return attempt(self.reader.read, self.file, content, self.box)

    @property
    def file(self) -> Path:
        """Where inputs are written."""
        return self.box.data / self.reader.file

    def inputs(self) -> st.SearchStrategy[bytes]:
        """Hostile inputs."""
        return hostile.inputs(self.reader.kind, self.seeds, self.box.names)


def _inspected(options: InspectOptions) -> object:
    """What inspect-config finds; how much memory trainings need is not asked, which takes seconds and reads nothing."""
    stages = ("tokenizer", "transformer", "subject")
    with ExitStack() as held:
        for stage in stages:
            held.enter_context(mock.patch.object(inspect_config, f"{stage}_training_memory", return_value=None))
        return inspect(options, Silent())


# -- pictures and data sets --------------------------------------------------------------------------------------------


def _pictures(folder: Path) -> list[bytes]:
    image = picture(3, (24, 16))
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(np.arange(96, dtype=np.uint16).reshape(8, 12) * 600)
    palette = image.quantize(16)
    palette.info["transparency"] = 2
    made: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "PNG", {}),
        (image, "PNG", {"exif": turned}),
        (grey, "PNG", {}),
        (palette, "PNG", {}),
        (image, "JPEG", {"exif": turned}),
        (image.convert("CMYK"), "JPEG", {"progressive": True}),
        (image, "WEBP", {}),
        (image, "WEBP", {"save_all": True, "append_images": [picture(4, (24, 16))]}),
        (image, "BMP", {}),
        (image.convert("L"), "BMP", {}),
        (image, "GIF", {}),
        (image, "TIFF", {}),
        (image.convert("RGBA"), "PNG", {}),
    ]
    found = []
    for one, kind, options in made:
        stream = io.BytesIO()
        one.save(stream, format=kind, **options)
        found.append(stream.getvalue())
    return found


def _read_picture(file: Path) -> object:
    size = picture_size(file)
    return size, to_tensor(load_picture(file), (16, 16))


def _read_mask(file: Path) -> object:
    original = Original(file, "0" * 64, Image.new("RGB", (24, 16)), None, None)
    return read_mask(str(file), original).pixels((16, 16))


def _data_set(make: Callable[[Path], Path]) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        put(folder, "a.png", "b.png")
        return [make(folder).read_bytes()]

    return prepare


def _archive(make: Callable[[Path], Path]) -> Callable[[Path], list[bytes]]:
    return lambda folder: [make(folder).read_bytes()]


def _jsonl(folder: Path) -> Path:
    rows = {"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": ["two", "three"]}
    return write_lines(folder / "metadata.jsonl", *rows)


def _csv(folder: Path) -> Path:
    (folder / "metadata.csv").write_text('file_name,text\na.png,"one, two"\nb.png,three\n')
    return folder / "metadata.csv"


def _split(folder: Path) -> Path:
    rows = [{"image_path": "a.png", "h_div_w": 0.6, "long_caption": "x"}, {"image_path": "b.png", "text": "y"}]
    return write_lines(folder / "0.666_000000002.jsonl", *rows)


def _coco(folder: Path) -> Path:
    return write_coco(folder / "captions.json", {1: "a.png", 2: "b.png"}, [(1, "x"), (2, "y"), (1, "z")])


def _tar(folder: Path) -> Path:
    members = {"1.png": encoded(1), "1.txt": b"x", "2.png": encoded(2), "2.json": b'{"caption": "y"}'}
    return write_tar(folder / "a.tar", members)


def _parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": encoded(number), "path": "x"} for number in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "text": ["a", "b", "c"]}), folder / "a.parquet")
    return folder / "a.parquet"


def _text(folder: Path) -> Path:
    (folder / "a.txt").write_text("a caption é")
    return folder / "a.txt"


def _read_data(file: Path) -> object:
    return _all_of(str(file))


def _read_folder(file: Path) -> object:
    return _all_of(str(file.parent))


def _all_of(data: str) -> object:
    """Everything a source says; a picture that cannot be read is an error like any other."""
    source = open_source(data)
    refused: BitgenError | None = None
    for index in range(len(source)):
        for read in (source.key, source.captions, source.size, source.image):
            try:
                read(index)
            except BitgenError as error:
                refused = error
    if refused is not None:
        raise refused
    return source.name, source.layout, source.remarks


# -- models ------------------------------------------------------------------------------------------------------------


def _model(folder: Path) -> Path:
    """A tiny model folder, made once for all readers."""
    global _made
    if _made is None:
        _made = tempfile.TemporaryDirectory()
        tiny_model.save(Path(_made.name) / "model")
    shutil.copytree(Path(_made.name) / "model", folder, dirs_exist_ok=True)
    return folder


_made: Any = None


def _file_of_model(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_model(folder) / name).read_bytes()]


def _origin(folder: Path) -> list[bytes]:
    _model(folder)
    reports = {"transformer": {"part": "transformer", "source": "x", "taken": 3}}
    origin = {"revisions": {"a/b": "0" * 40}, "files": {"/x": [1, 2]}, "reports": reports}
    return [json.dumps(origin).encode()]


def _read_config(file: Path) -> object:
    config, _, _ = read_model_config(file.parent)
    text_geometry(config.text_encoder)
    return _inspected(InspectOptions(str(file.parent)))


def _read_origin(file: Path) -> object:
    read_origin(file.parent)
    return _inspected(InspectOptions(str(file.parent)))


def _read_model(file: Path) -> object:
    return load_model(file.parent)


def _small_tensors(folder: Path) -> list[bytes]:
    save_file(
        {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, folder / "x.safetensors", {"format": "pt"}
    )
    return [(folder / "x.safetensors").read_bytes()]


def _read_small_tensors(file: Path) -> object:
    expected = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty(4, device="meta")}
    return read_tensors(file, expected, torch.device("cpu"), torch.float32)


_PUBLISHED = {
    "pos_start": torch.ones(1, 2, 4),
    "word_embed.weight": torch.ones(4, 2),
    "blocks.0.sa.q_bias": torch.ones(4),
}


def _torch_file(folder: Path) -> list[bytes]:
    found = []
    for content in (
        _PUBLISHED,
        {"trainer": {"gpt_fsdp": _PUBLISHED}},
        {"vae": {"encoder.conv_in.weight": torch.ones(2)}},
    ):
        for new in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=new)
            found.append(stream.getvalue())
    return found


def _published(folder: Path) -> list[bytes]:
    save_file(_PUBLISHED, folder / "infinity.safetensors")
    return [(folder / "infinity.safetensors").read_bytes()]


def _index(folder: Path) -> list[bytes]:
    save_file(_PUBLISHED, folder / "a.safetensors")
    return [json.dumps({"metadata": {}, "weight_map": dict.fromkeys(_PUBLISHED, "a.safetensors")}).encode()]


def _read_published(file: Path) -> object:
    read_weight_file(file)
    found = find_files(file)
    with suppress(BitgenError):  # a few tensors are no model
        model_of(found)
    return None


def _vocabulary(folder: Path) -> list[bytes]:
    return [(_model(folder) / "text_encoder" / "tokenizer.json").read_bytes()]


def _read_vocabulary(file: Path) -> object:
    reader = PromptReader(load_vocabulary(file.parent), 16)
    return reader.tokenise(["a red dog", ""]), reader.knows("[V]"), reader.is_cut("a dog"), reader.has_no_word_for("é")


def _t5(folder: Path) -> list[bytes]:
    return [(_model(folder) / "text_encoder" / "config.json").read_bytes()]


def _read_t5(file: Path) -> object:
    from bitgen_cli.engine.text import load_text_encoder

    source = tiny_model.CONFIG.text_encoder.model_copy(update={"source": str(file.parent)})
    text_geometry(source)
    return load_text_encoder(str(file.parent), 16, torch.device("cpu"), torch.float32)


_KEY = TextKey("0" * 64, "fp32", "cpu", "x", 8, 4, "a dog")
_FEATURES = torch.arange(12.0).reshape(3, 4)


def _text_cache(folder: Path) -> list[bytes]:
    TextCache(folder).keep(_KEY, _FEATURES)
    (folder / f"{_KEY.digest}.safetensors").rename(folder / "kept")
    return [(folder / "kept").read_bytes()]


def _read_text_cache(file: Path) -> object:
    found = TextCache(file.parent).find(_KEY)
    assert found is None or torch.equal(found, _FEATURES)
    return found


# -- subjects and pictures' recipes ------------------------------------------------------------------------------------


def _subject(folder: Path) -> list[bytes]:
    header = Header(
        token="[V]",
        class_word="dog",
        kind="lora",
        base={"transformer": "0" * 64},
        base_name="demo",
        recipe={"steps": 3, "nested": {"a": [1]}},
        pictures=[{"file": "a.png", "sha256": "0" * 64}],
    )
    save_subject(folder / "dog.safetensors", header, {ROW: torch.ones(4), START: torch.ones(4)}, torch.float32)
    return [(folder / "dog.safetensors").read_bytes()]


def _read_subject(file: Path) -> object:
    subject = read_subject(file)
    subject.tensors()
    assert subject.changes_text_encoder in (True, False)
    return _inspected(InspectOptions(str(file)))


def _recipe(folder: Path) -> list[bytes]:
    stream, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    chunks.add_text("bitgen", json.dumps(hostile.RECIPE))
    picture(1).save(stream, format="PNG", pnginfo=chunks)
    plain = io.BytesIO()
    picture(1).save(plain, format="PNG")
    return [stream.getvalue(), plain.getvalue()]


def _written_recipe(folder: Path) -> list[bytes]:
    return [json.dumps(hostile.RECIPE).encode()]


def _read_recipe(file: Path) -> object:
    return read_recipe(file)


def _original(folder: Path) -> list[bytes]:
    _model(folder)
    return _recipe(folder)


def _read_original(file: Path) -> object:
    """Goes on from a picture as if its recipe were the tiny model's, so that its bits are read too."""
    asked = SampleOptions(prompts=("a dog",), model=str(file.parent), original=str(file), keep_scales=1)
    options = load_original(asked, None, Silent())
    assert options.edit is not None
    model = load_model(file.parent, parts=())
    original = options.edit.original
    if original.recipe is not None:
        known = {"fingerprints": model.fingerprints, "bits": model.config.tokenizer.bits}
        recipe = original.recipe.model_copy(update=known)
        image = original.image.resize((16, 16))
        carried = None if original.carried is None else digest(image) + original.carried
        original = replace(original, recipe=recipe, image=image, carried=carried)
    drawn = replace(options, edit=replace(options.edit, original=original), bits=None, remembered=None, resolution=None)
    cpu, number = torch.device("cpu"), torch.float32
    text = TextModel(model, "", "", PromptReader(load_vocabulary(file.parent / "text_encoder"), 16))
    setting = Setting("tiny", model, text, pick_text_precision("auto", number, cpu), number, cpu, [])
    (job,) = jobs_of(drawn, model, text.reader, [])
    take_carried(job, setting, Silent())
    return job_again(job, setting, drawn)


def _inspect_file(file: Path) -> object:
    return _inspected(InspectOptions(str(file)))


# -- configurations ----------------------------------------------------------------------------------------------------


def _presets(folder: Path) -> list[bytes]:
    presets = Path(__file__).parents[2] / "presets"
    return [(presets / f"{name}.yaml").read_bytes() for name in ("demo", "16bit")] + [b"extends: demo\nname: mine\n"]


def _override(folder: Path) -> list[bytes]:
    return [b"training.transformer.steps=3", b"sampling.cfg=[1, 2]", b"name=mine"]


def _read_override(file: Path) -> object:
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    with_others = [text, text.partition("=")[0] + "=7"]
    with suppress(BitgenError):  # not every override is one of a sweep
        sweeps.plan(sweeps.SweepOptions("train", (), (), tuple(with_others), Path("out")))
    return _inspected(InspectOptions("demo", overrides=[text]))


def _swept(folder: Path) -> list[bytes]:
    options = _sweep_options(folder)
    with mock.patch.object(sweeps._Child, "run", return_value=1):
        sweeps.sweep(options, Silent())
    for run in sweeps.plan(options):
        (run.run / "checkpoints" / "step-3").mkdir(parents=True)
        (run.run / "config.json").write_text("{}")
        (run.run / "state.json").write_text('{"finished": true, "step": 3}')
        (run.run / "metrics.jsonl").write_text('{"step": 3, "loss": 0.5}\n')
    return [(folder / "sweep.json").read_bytes()]


def _swept_state(folder: Path) -> list[bytes]:
    _swept(folder)
    return [b'{"finished": true, "step": 3}', b'{"finished": false, "step": 3}']


def _sweep_options(folder: Path) -> sweeps.SweepOptions:
    overrides = ("sampling.cfg=2", "sampling.cfg=3")
    return sweeps.SweepOptions("train", ("--data", "world:9"), (), overrides, folder)


def _read_sweep(file: Path) -> object:
    folder = file.parent if file.name == "sweep.json" else file.parent.parent
    with mock.patch.object(sweeps._Child, "run", return_value=1):
        return sweeps.sweep(_sweep_options(folder), Silent())


def _prompts(folder: Path) -> list[bytes]:
    _model(folder)
    rows = [
        {"prompt": "a dog", "seed": 3, "num_images": 2, "cfg": [1, 2, 3], "tau": 0.5},
        {"prompt": "a red dog", "negative_prompt": "x", "aspect": "1:1", "output": "x.png", "top_k": 3},
    ]
    return ["\n".join([*map(json.dumps, rows), "a cat"]).encode()]


def _read_prompts(file: Path) -> object:
    model = Model(file.parent, *read_model_config(file.parent))
    reader = PromptReader(load_vocabulary(file.parent / "text_encoder"), 16)
    jobs = []
    requests, failures = requested(SampleOptions(prompts_file=str(file)), Place())
    for request in requests:
        if request.options.num_images < 1000:
            jobs += jobs_of(request.options, model, reader, [])
    if failures:
        raise InputError(failures[0].message)
    return jobs


# -- runs and stores ---------------------------------------------------------------------------------------------------


def _run(folder: Path) -> dict[str, Any]:
    """A run folder with a checkpoint; what its config.json says."""
    config = yaml.safe_load((Path(__file__).parents[2] / "presets" / "demo.yaml").read_text())
    run = RunFolder(folder)
    config["model"] = tiny_model.CONFIG.model_dump(mode="json")
    description = {"verb": "train", "stage": "tokenizer", "data": "world:4", "config": config, "origins": {"name": "x"}}
    run.create(description)
    run.save(Checkpoint(3, {"weights": {"a": torch.ones(2)}}, {"steps": 3}), 2)
    run.write_state({"step": 3, "finished": False})
    run.metrics.write_text('{"step": 1, "loss": 0.5, "loss/0": 0.25}\n{"step": 3, "loss": 0.4, "loss/0": 0.2}\n')
    return description


def _file_of_run(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        _run(folder)
        return [(folder / name).read_bytes()]

    return prepare


def _read_run(file: Path) -> object:
    run = RunFolder(file.parent)
    run.description()
    run.state()
    return _inspected(InspectOptions(str(file.parent)))


def _read_metrics(file: Path) -> object:
    RunFolder(file.parent).cut_log(10)
    return read_measurements(file.parent)


def _read_checkpoint(file: Path) -> object:
    saved = RunFolder(file.parents[2]).load_last(Silent(), clean=False)
    return saved.shapes("weights")


def _checkpoint(folder: Path) -> list[bytes]:
    _run(folder)
    return [(folder / "checkpoints" / "step-0000003" / "state.json").read_bytes()]


def _resumed(folder: Path) -> list[bytes]:
    _run(folder)
    stored = json.loads((folder / "config.json").read_bytes())
    (folder / "whole.json").write_text(json.dumps(stored.pop("config")))
    shutil.rmtree(folder / "checkpoints")
    return [json.dumps(stored).encode()]


def _read_resumed(file: Path) -> object:
    """All of config.json is the stranger's but the configuration: one of a huge model is as good as any other."""
    try:
        stored = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        stored = None
    if isinstance(stored, dict):
        stored["config"] = json.loads((file.parent / "whole.json").read_bytes())
        file.write_text(json.dumps(stored))
    return resume(file.parent, Silent(), device="cpu")


def _store(folder: Path) -> Path:
    """A token store of two pictures; what it is made of is gone."""
    parts = folder.with_name("home")
    _model(parts / "model")
    encoder = tiny.text_encoder_folder(parts / "encoder", width=tiny_model.CONFIG.transformer.text_width)
    shutil.rmtree(parts / "model" / "text_encoder")
    config = parts / "model" / "config.json"
    stored = json.loads(config.read_bytes())
    stored["config"]["model"]["text_encoder"] = {"source": str(encoder)}
    config.write_text(json.dumps(stored))
    put(parts / "data", "a.png", "b.png", size=(32, 32))
    (parts / "data" / "a.txt").write_text("a dog")
    options = TokenizeOptions(
        data=str(parts / "data"), out=folder, model=str(parts / "model"), device="cpu", text_features=True
    )
    tokenize(options, Silent())
    return folder


def _file_of_store(name: str) -> Callable[[Path], list[bytes]]:
    def prepare(folder: Path) -> list[bytes]:
        return [(_store(folder) / name).read_bytes()]

    return prepare


def _read_store(file: Path) -> object:
    _say_its_size(file)
    check_store(file.parent, Silent())
    store = TokenStore.open(file.parent)
    indices = store.indices_of(store.ratios[0])
    return store.bits(indices), store.latents(indices), store.text_features(indices)


def _say_its_size(file: Path) -> None:
    """Lets the manifest say the size that the input has, or it would never be read."""
    manifest = file.parent / "manifest.json"
    if file == manifest:
        return
    stored = json.loads(manifest.read_bytes())
    for shard in stored["shards"]:
        for part in ("tokens", "captions", "text"):
            if shard.get(part, {}).get("file") == file.name:
                shard[part]["bytes"] = file.stat().st_size or 1
    manifest.write_text(json.dumps(stored))


def _priors(folder: Path) -> list[bytes]:
    put(folder, "0003.png", size=(16, 16))
    made = {"file": "0003.png", "seed": 3, "prompt": "a dog", "sha256": "0" * 64}
    manifest = {
        "base": {"transformer": "0" * 64},
        "base_name": "demo",
        "class_word": "dog",
        "templates": ["a {class}"],
        "seed": 3,
        "sampling": {},
        "size": [16, 16],
        "pictures": [made],
    }
    return [json.dumps(manifest).encode()]


READERS = {
    reader.name: reader
    for reader in (
        Reader("picture", "a.png", "bytes", _pictures, _read_picture, share=3),
        Reader("metadata.jsonl", "metadata.jsonl", "lines", _data_set(_jsonl), _read_data, share=2),
        Reader("metadata.csv", "metadata.csv", "bytes", _data_set(_csv), _read_data),
        Reader("split", "0.666_000000002.jsonl", "lines", _data_set(_split), _read_data),
        Reader("coco", "captions.json", "json", _data_set(_coco), _read_data, share=2),
        Reader("caption", "a.txt", "bytes", _data_set(_text), _read_folder),
        Reader("tar", "a.tar", "tar", _archive(_tar), _read_data, share=3),
        Reader("parquet", "a.parquet", "bytes", _archive(_parquet), _read_data, share=2),
        Reader("tensors", "x.safetensors", "safetensors", _small_tensors, _read_small_tensors, share=2),
        Reader("weights.safetensors", "infinity.safetensors", "safetensors", _published, _read_published, share=2),
        Reader("weights.pth", "infinity.pth", "torch", _torch_file, _read_published, share=3),
        Reader("weights index", "x.safetensors.index.json", "json", _index, _read_published),
        Reader("model config", "config.json", "json", _file_of_model("config.json"), _read_config, share=2),
        Reader("model weights", "config.json", "json", _file_of_model("config.json"), _read_model, share=0.3, short=10),
        Reader("origin.json", "origin.json", "json", _origin, _read_origin, share=0.5),
        Reader("vocabulary", "tokenizer.json", "json", _vocabulary, _read_vocabulary, short=10),
        Reader("text encoder", "text_encoder/config.json", "json", _t5, _read_t5, share=0.5, short=0),
        Reader("text cache", f"{_KEY.digest}.safetensors", "safetensors", _text_cache, _read_text_cache),
        Reader("subject", "dog.safetensors", "safetensors", _subject, _read_subject, share=3),
        Reader("recipe", "a.png", "png", _recipe, _inspect_file, share=3),
        Reader("recipe to draw again", "a.png", "png", _recipe, _read_recipe, share=2),
        Reader("mask", "a.png", "bytes", _pictures, _read_mask, share=2),
        Reader("picture gone on from", "a.png", "png", _original, _read_original, share=2),
        Reader("recipe in JSON", "recipe.json", "json", _written_recipe, _read_recipe, share=2),
        Reader("yaml", "mine.yaml", "yaml", _presets, _inspect_file, share=2),
        Reader("override", "override", "yaml", _override, _read_override),
        Reader("sweep.json", "sweep.json", "json", _swept, _read_sweep, share=0.5, short=10),
        Reader("sweep state", "cfg=2/state.json", "json", _swept_state, _read_sweep, share=0.5, short=10),
        Reader("prompts", "prompts.jsonl", "lines", _prompts, _read_prompts, share=2),
        Reader("run config", "config.json", "json", _file_of_run("config.json"), _read_run, share=2),
        Reader("run state", "state.json", "json", _file_of_run("state.json"), _read_run, share=0.5),
        Reader("metrics.jsonl", "metrics.jsonl", "lines", _file_of_run("metrics.jsonl"), _read_metrics),
        Reader("checkpoint", "checkpoints/step-0000003/state.json", "json", _checkpoint, _read_checkpoint),
        Reader("resume", "config.json", "json", _resumed, _read_resumed, share=0.5, short=10, refused=True),
        Reader("store manifest", "manifest.json", "json", _file_of_store("manifest.json"), _read_store, share=2),
        Reader(
            "store bits",
            "shard-00000.safetensors",
            "safetensors",
            _file_of_store("shard-00000.safetensors"),
            _read_store,
        ),
        Reader("store captions", "shard-00000.jsonl", "lines", _file_of_store("shard-00000.jsonl"), _read_store),
        Reader(
            "store text",
            "shard-00000.text.safetensors",
            "safetensors",
            _file_of_store("shard-00000.text.safetensors"),
            _read_store,
        ),
        Reader("data report", "data_report.json", "json", _file_of_store("data_report.json"), read_bad, share=0.5),
        Reader("class pictures", "manifest.json", "json", _priors, lambda file: read_priors(file.parent), share=0.5),
    )
}
"""By their names."""
