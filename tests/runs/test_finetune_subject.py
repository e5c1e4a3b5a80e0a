"""`bitgen finetune-subject`: from photos to a subject that `bitgen sample` draws, and what a user can get wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from data_sets import write_tar
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitgen_cli.engine.model_folder import load_model
from bitgen_cli.engine.scales import schedule
from bitgen_cli.engine.subject import HEADER, PREFIX, ROW, START, Worn, find_subject, read_subject, tokens_in, wearing
from bitgen_cli.engine.subject_stage import likeliest
from bitgen_cli.errors import BitgenError, ConfigError, InputError, Interrupted, ResourceError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import fitting
from bitgen_cli.runs.finetune_subject import (
    SubjectOptions,
    SubjectResult,
    _whole_model,
    finetune_subject,
    merge_subject,
)
from bitgen_cli.runs.fitting import PROGRAM
from bitgen_cli.runs.gen_priors import gen_priors
from bitgen_cli.runs.inspect_config import InspectOptions, inspect
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.prior_folder import read_manifest
from bitgen_cli.runs.prior_options import PriorOptions
from bitgen_cli.runs.resume import resume
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampledPicture
from bitgen_cli.runs.subject_material import views

pytestmark = pytest.mark.usefixtures("home")
FLAGS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 2,
    "accumulation": 2,
    "log_every": 1,
    "validate_every": 4,
    "validation_images": 2,
    "sample_every": 0,
    "save_every": 3,
    "ema_decay": 0.9,
    "prior_images": 4,
    "views": 2,
    "lora_rank": 2,
    "token_head_start": 0.2,
    "other_prompts": ["a house", "a red dog", "a car"],
    "other_images": 3,
    "unrelated_prompts": ["a house in the snow"],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.photos(tmp_path_factory.mktemp("photos") / "dog")


def learn(
    model: Path, photos: Path, report: Silent | None = None, *, flags: Mapping[str, Any] | None = None, **options: Any
) -> SubjectResult:
    given = {f"training.subject.{key}": value for key, value in {**FLAGS, **(flags or {})}.items()}
    made = SubjectOptions(photos=photos, model=str(model), flags=given, **{"class_word": "dog", **options})
    return finetune_subject(made, report or Silent())


def draw(model: Path, prompt: str, **options: Any) -> SampledPicture:
    (picture,) = sample(SampleOptions(prompts=(prompt,), model=str(model), seed=1, **options), Silent()).pictures
    return picture


def pixels(picture: SampledPicture) -> bytes:
    with Image.open(picture.path) as image:
        return image.tobytes()


def digest(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def test_photos_become_a_subject_that_sample_finds(tiny: Path, photos: Path, home: Path) -> None:
    before = digest(tiny)
    result = learn(tiny, photos, flags={"sample_every": 4})
    assert digest(tiny) == before, "the base model on disk is untouched"
    assert (result.name, result.token, result.steps) == ("v", "[V]", 6)
    assert result.file == home / "subjects" / "v.safetensors"
    measured = {"val_subject_loss", "val_prior_loss", "drift_class_agreement", "drift_class_leak"}
    assert measured <= set(result.validation)
    logged = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "subject_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "prior_loss" in line] == [2, 3, 4, 5, 6], "the token learns first"
    assert (result.run / "samples" / "step-0000004.png").is_file()
    assert read_subject(result.run / "best" / "subject.safetensors").token == "[V]"

    report = Silent()
    options = SampleOptions(prompts=("a [V] dog on the moon", "a dog"), model=str(tiny), seed=1)
    found, plain = sample(options, report).pictures
    assert any("[V] is subject v, a dog" in notice for notice in report.notices)
    assert [subject["name"] for subject in found.recipe["subjects"]] == ["v"]
    assert plain.recipe["subjects"] == []
    # the same call draws the prompt without the token with the base model, as a machine without subjects does
    shutil.rmtree(home / "subjects")
    assert pixels(draw(tiny, "a dog")) == pixels(plain)


def test_the_file_says_everything(tiny: Path, photos: Path) -> None:
    subject = read_subject(learn(tiny, photos).file)
    header = subject.header
    assert (header.token, header.class_word, header.kind, header.base_name) == ("[V]", "dog", "delta", str(tiny))
    assert header.base == load_model(tiny, parts=()).fingerprints
    assert header.recipe["steps"] == 6
    assert [picture["file"] for picture in header.pictures] == ["0.png", "1.png", "2.png"]
    assert header.pictures[0]["sha256"] == hashlib.sha256((photos / "0.png").read_bytes()).hexdigest()
    tensors = subject.tensors()
    assert {ROW, START} < set(tensors)
    assert not torch.equal(tensors[ROW], tensors[START])
    assert all(name.startswith(f"{PREFIX}transformer.blocks.") for name in set(tensors) - {ROW, START})


@pytest.mark.parametrize(
    ("train", "kind", "part"),
    [
        (["token"], "token", None),
        (["token", "lora"], "lora", ".ffn.up.lora_A.weight"),
        (["token", "cross"], "delta", ".cross_attention.q.weight.delta"),
        (["token", "self"], "delta", ".self_attention.proj.weight.delta"),
        (["token", "text"], "delta", "text_encoder.encoder.block.0.layer.0.SelfAttention.q.weight.delta"),
        (["all"], "delta", "transformer.head.weight.delta"),
    ],
)
def test_only_what_was_named_trains(tiny: Path, photos: Path, train: list[str], kind: str, part: str | None) -> None:
    result = learn(tiny, photos, flags={"train": train, "steps": 2, "validate_every": 2})
    subject = find_subject(result.name)
    tensors = subject.tensors()
    others = set(tensors) - {ROW, START}
    assert subject.header.kind == kind
    assert any(name.endswith(part) for name in others) if part else not others
    state = load_file(result.run / "checkpoints" / "step-0000002" / "optimizer.safetensors")
    optimised = {name.rpartition("/")[0] for name in state}
    assert len(optimised) == len(others) + 1, "frozen parts have no optimizer state"
    assert not any("autoencoder" in name or "tokenizer" in name for name in optimised)
    base = load_model(tiny)
    assert base.transformer is not None
    before = [parameter.clone() for parameter in base.transformer.parameters()]

    def unchanged() -> bool:
        assert base.transformer is not None
        return all(torch.equal(p, q) for p, q in zip(before, base.transformer.parameters(), strict=True))

    with wearing(base, [Worn(subject)]):
        assert unchanged() == (not any("transformer." in name for name in others))
    assert unchanged(), "taken off, the model is the base model bit for bit"


def stop(model: Path, photos: Path, flags: Mapping[str, Any], name: str) -> Path:
    """The folder of a run that was interrupted after three steps."""

    class Stopping(Silent):
        def metrics(self, step: int, total_steps: int, values: Mapping[str, float]) -> None:
            if step == 3 and "loss" in values:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        learn(model, photos, Stopping(), flags=flags, name=name, out=Path("stopped"))
    return Path("stopped")


def stopped_and_straight(
    model: Path, photos: Path, flags: Mapping[str, Any]
) -> tuple[SubjectResult, SubjectResult]:
    """The same training without a stop, and with one."""
    straight = learn(model, photos, flags=flags, name="straight")
    result = resume(stop(model, photos, flags, "stopped"), Silent())
    assert isinstance(result, SubjectResult)
    return straight, result


@pytest.mark.parametrize("prior", ["images", "distill", "none"])
@pytest.mark.parametrize("train", [["token", "cross", "ffn"], ["token", "lora", "text"]])
def test_resumed_is_as_never_stopped(
    tiny: Path, photos: Path, prior: str, train: list[str]
) -> None:
    straight, result = stopped_and_straight(tiny, photos, {"prior": prior, "train": train})
    assert result.steps == 6
    whole, halves = (load_file(r.file) for r in (straight, result))
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert straight.validation == result.validation


def test_the_token_learns_alone_first(tiny: Path, photos: Path) -> None:
    """The class, which it cannot change, is not looked at meanwhile."""
    flags = {"steps": 8, "token_head_start": 0.5, "save_every": 1, "keep_last": 8, "ema_decay": 0}
    result = learn(tiny, photos, flags=flags)
    states = [load_file(file) for file in sorted((result.run / "checkpoints").glob("step-*/weights.safetensors"))]
    rows = {name for name in states[0] if name.startswith("text_encoder.rows.")}
    others = set(states[0]) - rows
    assert rows
    assert others
    moved = [
        [any(not torch.equal(state[name], states[0][name]) for name in names) for state in states[1:]]
        for names in (rows, others)
    ]
    assert moved == [[True] * 7, [False] * 3 + [True] * 4]
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "prior_loss" in line] == [5, 6, 7, 8]


def test_the_token_alone_needs_no_class_pictures(tiny: Path, photos: Path, home: Path) -> None:
    """Without it in the prompt nothing differs from the base model, whatever it has become."""
    flags = {"train": ["token"], "steps": 2}
    report = Silent()
    one = learn(tiny, photos, report, flags=flags)
    assert not (home / "priors").exists()
    assert any("no class pictures" in notice for notice in report.notices)
    other = learn(tiny, photos, name="none", flags={**flags, "prior": "none"})
    assert all(torch.equal(load_file(one.file)[name], load_file(other.file)[name]) for name in (ROW, START))


def test_other_things_are_kept_too(tiny: Path, photos: Path) -> None:
    """Samples of other prompts take their share of the class's batches; prompts that name the class are the class's."""

    def others(result: SubjectResult) -> Any:
        return json.loads((result.run / "start" / "lessons.json").read_text())["others"]

    flags = {"validate_every": 100, "caption_dropout": 0.25}
    kept = learn(tiny, photos, name="kept", flags={**flags, "other_share": 0.5})
    assert others(kept) == ["a house", "a car", "a house"]
    without = learn(tiny, photos, name="without", flags={**flags, "other_prompts": []})
    assert others(without) is None
    assert others(learn(tiny, photos, name="none", flags={**flags, "prior": "none"})) is None
    one, other = load_file(kept.file), load_file(without.file)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match="other_share"):
        learn(tiny, photos, name="all", flags={**flags, "other_share": 0.9})


def test_a_class_in_letters_that_the_model_never_saw_is_warned_of(tiny: Path, photos: Path) -> None:
    flags = {"train": ["token"], "steps": 1}
    for word, warned in (("собака", True), ("犬", True), ("corgi", False), ("犬 dog", False)):
        report = Silent()
        learn(tiny, photos, report, name="one", flags=flags, class_word=word, overwrite=True)
        assert any("has no word for" in notice for notice in report.notices) == warned, word


def test_a_prior_of_no_weight_is_no_prior(tiny: Path, photos: Path) -> None:
    flags = {"steps": 3}
    none = learn(tiny, photos, flags={**flags, "prior": "none"}, name="none")
    weightless = learn(tiny, photos, flags={**flags, "prior_weight": 0}, name="weightless")
    one, other = load_file(none.file), load_file(weightless.file)
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = load_file(learn(tiny, photos, flags=flags, name="kept").file)
    assert not all(torch.equal(one[name], kept[name]) for name in one)


@pytest.mark.parametrize("prior", ["images", "distill"])
def test_keeping_the_class_starts_at_nothing(tiny: Path, photos: Path, prior: str) -> None:
    """One step at almost no learning rate leaves the base model's own distributions; a real one does not."""
    flags = {"prior": prior, "steps": 1, "ema_decay": 0, "precision": "fp32"}
    rates = ("training.subject.optimizer.learning_rate=1e-12", "training.subject.token_learning_rate=1e-12")
    still = learn(tiny, photos, flags=flags, name="still", overrides=rates)
    assert abs(still.validation["val_prior_loss"]) < 1e-6
    bits = learn(tiny, photos, flags={**flags, "prior_targets": "bits"}, name="bits", overrides=rates)
    assert (bits.validation["val_prior_loss"] > 0.1) == (prior == "images"), "the loss of the pictures' own bits"
    rates = ("training.subject.optimizer.learning_rate=0.01", "training.subject.optimizer.warmup_steps=0")
    moved = learn(tiny, photos, flags=flags, name="moved", overrides=rates)
    assert moved.validation["val_prior_loss"] > 1e-4


def test_existing_class_pictures_are_used_again(tiny: Path, photos: Path, home: Path) -> None:
    """Those of gen-priors too, as long as both would draw the same."""
    made = gen_priors(PriorOptions("dog", 4, str(tiny)), Silent())
    before = digest(made.folder)
    report = Silent()
    learn(tiny, photos, report, name="one", flags={"steps": 1})
    assert any("4 class pictures" in notice for notice in report.notices)
    assert list(made.folder.parent.iterdir()) == [made.folder]
    assert digest(made.folder) == before
    learn(tiny, photos, name="two", flags={"steps": 1}, overrides=("sampling.tau=0.5",))
    learn(tiny, photos, name="three", flags={"steps": 1, "prior_templates": ["the {class}"]})
    others = sorted(set(made.folder.parent.iterdir()) - {made.folder})
    manifests = [read_manifest(folder) for folder in others]
    assert {(manifest.sampling.tau, *manifest.templates) for manifest in manifests} == {
        (0.5, *read_manifest(made.folder).templates),
        (read_manifest(made.folder).sampling.tau, "the {class}"),
    }


def test_merged_is_as_worn(tiny: Path, photos: Path, tmp_path: Path) -> None:
    result = learn(tiny, photos, merge=tmp_path / "merged", flags={"train": ["token", "cross", "text"]})
    assert result.merged == tmp_path / "merged"
    worn = draw(tiny, "a [V] dog on the moon")
    # the same file once more, by the command that merges alone
    again = merge_subject("v", str(tiny), tmp_path / "again", Silent())
    assert digest(again) == digest(tmp_path / "merged")
    shutil.rmtree(result.file.parent)
    assert pixels(draw(tmp_path / "merged", "a [V] dog on the moon", output="merged.png")) == pixels(worn)
    with pytest.raises(UsageError, match="is not empty"):
        learn(tiny, photos, name="late", merge=again)
    assert not Path("subject-late").exists(), "told before anything is learned"
    with pytest.raises(UsageError, match="is not empty"):
        merge_subject(str(result.run / "subject.safetensors"), str(tiny), again, Silent())


def test_scale_zero_is_the_base_model(tiny: Path, photos: Path) -> None:
    learn(tiny, photos, flags={"train": ["token", "lora"]})
    weak = draw(tiny, "a [V] dog", subjects=("v:0",))
    strong = draw(tiny, "a [V] dog", subjects=("v:1",))
    assert pixels(weak) != pixels(strong)
    base = load_model(tiny)
    assert base.text_encoder is not None
    base.text_encoder.learn("[V]", base.text_encoder.embedding_of("dog"))
    assert weak.recipe["subjects"][0]["scale"] == 0
    assert pixels(weak) == pixels(draw(tiny, "a dog dog"))


def test_two_subjects_in_one_prompt(tiny: Path, photos: Path) -> None:
    for name in ("rex", "tom"):
        learn(tiny, photos, token=f"[{name}]", flags={"train": ["token", "lora"], "seed": len(name)})
    both = draw(tiny, "a [rex] dog beside a [tom] dog")
    assert [subject["name"] for subject in both.recipe["subjects"]] == ["rex", "tom"]
    learn(tiny, photos, token="[max]")
    with pytest.raises(UsageError, match="max changes whole weights"):
        draw(tiny, "a [rex] dog beside a [max] dog")


def test_nothing_is_silently_not_applied(tiny: Path, photos: Path, tmp_path: Path) -> None:
    result = learn(tiny, photos)
    with pytest.raises(UsageError, match=r"no subject is called \[W\].*\[V\] \(v, a dog\).*finetune-subject"):
        draw(tiny, "a [W] dog")
    with pytest.raises(UsageError, match=r"does not name \[V\]"):
        draw(tiny, "a dog", subjects=("v",))
    with pytest.raises(UsageError, match="no subject 'rex'"):
        draw(tiny, "a [V] dog", subjects=("rex",))
    other = tiny_model.save(tmp_path / "other", seed=9)
    with pytest.raises(UsageError, match="another base model"):
        draw(other, "a [V] dog")
    with pytest.raises(UsageError, match="was learned on another base model"):
        draw(other, "a [V] dog", subjects=(str(result.file),))
    learn(tiny, photos, name="second")
    with pytest.raises(UsageError, match="stands for several subjects: second, v"):
        draw(tiny, "a [V] dog")
    assert draw(tiny, "a [V] dog", subjects=("second",)).recipe["subjects"][0]["name"] == "second"
    with pytest.raises(UsageError, match=r"--subject names \[V\] 2 times"):
        draw(tiny, "a [V] dog", subjects=("v", "v:0.5"))
    for prompt, negative in (("a [ V ] dog", None), ("a [my dog]", None), ("a dog", "a [W] dog")):
        with pytest.raises(UsageError, match="no subject is called"):
            draw(tiny, prompt, negative_prompt=negative)
    far = "a dog " * 20
    with pytest.raises(UsageError, match=r"\[V\] stands behind the first 16 tokens"):
        draw(tiny, f"{far}[V] dog", subjects=("v",))
    kept = draw(tiny, "a dog", negative_prompt="a [V] dog", subjects=("v",))
    assert [subject["name"] for subject in kept.recipe["subjects"]] == ["v"]
    result.file.write_bytes(result.file.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"no subject is called \[W\].*unreadable: .*v.safetensors"):
        draw(tiny, "a [W] dog")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        inspect(InspectOptions("v"), Silent())


def test_of_overlapping_tokens_the_longest_counts() -> None:
    assert tokens_in("a [V] dog, [rex]", ["[", "[V", "[V]"]) == ["[V]", "[rex]"]
    assert tokens_in("a rex and a rexy, rex", ["rex"]) == ["rex"]
    assert tokens_in("[a] [b] [a]", []) == ["[a]", "[b]"]


@pytest.mark.parametrize("train", [["token", "lora"], ["token", "cross", "ffn"], ["all"]])
def test_bfloat16_with_recomputed_activations_resumes_exactly_too(
    tiny: Path, photos: Path, train: list[str]
) -> None:
    changes = {"precision": "bf16", "checkpoint_activations": True, "train": train}
    straight, result = stopped_and_straight(tiny, photos, changes)
    whole, halves = (load_file(r.file) for r in (straight, result))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert straight.validation == result.validation


def test_more_steps_go_on_where_the_first_ended(tiny: Path, photos: Path) -> None:
    """With a constant rate: what learned does not wait again because there are more steps now."""
    constant = ("training.subject.optimizer.schedule=constant", "training.subject.optimizer.learning_rate=0.001")
    flags = {"validate_every": 100}
    longer = {**flags, "steps": 12, "token_head_start": 0.25}
    straight = learn(tiny, photos, name="straight", flags=longer, overrides=constant)
    first = learn(tiny, photos, name="first", flags={**flags, "steps": 6, "token_head_start": 0.5}, overrides=constant)
    more = resume(first.run, Silent(), steps=6)
    assert isinstance(more, SubjectResult)
    one, other = load_file(straight.file), load_file(more.file)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_only_used_is_kept_in_the_number_type_of_the_training(tiny: Path) -> None:
    """Half the memory of a model whose weights are frozen in bfloat16."""
    frozen = _whole_model(tiny, str(tiny), torch.device("cpu"), "bf16")
    assert frozen.transformer is not None
    assert {p.dtype for p in frozen.transformer.parameters()} == {torch.bfloat16}


def test_resume_leaves_another_subject_of_that_name(tiny: Path, photos: Path) -> None:
    run = stop(tiny, photos, {"prior": "none"}, name="v")
    other = learn(tiny, photos, name="v", class_word="cat", flags={"steps": 1, "prior": "none"})
    before = other.file.read_bytes()
    report = Silent()
    result = resume(run, report)
    assert isinstance(result, SubjectResult)
    assert other.file.read_bytes() == before
    assert result.file == run / "subject.safetensors"
    assert any("v is another subject by now" in warning for warning in report.notices)


def test_a_run_that_had_not_saved_anything_says_so(tiny: Path, photos: Path) -> None:
    run = stop(tiny, photos, {"prior": "none"}, name="v")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(UsageError, match="had not saved anything yet"):
        learn(tiny, photos, out=run)
    with pytest.raises(InputError, match="no whole checkpoint"):
        resume(run, Silent())


def test_hostile_and_broken_subject_files(tiny: Path, photos: Path, tmp_path: Path) -> None:
    result = learn(tiny, photos)
    with safe_open(str(result.file), "pt") as stored:
        header = json.loads(stored.metadata()[HEADER])
    tensors = load_file(result.file)

    def altered(name: str, tensors: dict[str, torch.Tensor] = tensors, **changes: Any) -> str:
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file, metadata={HEADER: json.dumps({**header, **changes})})
        return str(file)

    (tmp_path / "cut.safetensors").write_bytes(result.file.read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    some = next(name for name in tensors if name.endswith(".delta"))
    for file, problem in {
        str(tmp_path / "cut.safetensors"): "not a readable safetensors file",
        str(tmp_path / "foreign.safetensors"): "is not a subject file",
        str(tmp_path / "missing.safetensors"): "missing.safetensors",
        altered("unknown-key", surprise=1): "surprise",
        altered("kind", kind="pickle"): "kind",
        altered("format", format=99): "format",
        altered("width", {**tensors, ROW: torch.zeros(3), START: torch.zeros(3)}): "another width",
        altered("rowless", {k: v for k, v in tensors.items() if k != ROW}): "does not fit",
        altered("shape", {**tensors, some: torch.zeros(2)}): "another shape",
        altered("stranger", {**tensors, f"{PREFIX}transformer.x.delta": torch.zeros(2)}): "does not fit",
    }.items():
        with pytest.raises(BitgenError, match=problem):
            draw(tiny, "a [V] dog", subjects=(file,))


def test_odd_photos(tiny: Path, tmp_path: Path) -> None:
    folder = tiny_model.photos(tmp_path / "odd", 1)
    picture = Image.open(folder / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.resize((70, 40)).save(folder / "turned.JPG", exif=exif)
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.webp")
    (folder / "notes.md").write_text("no photo")
    (folder / "0.txt").write_text("my {subject} on the moon")
    report = Silent()
    result = learn(tiny, folder, report, flags={"steps": 1, "prior": "none"})
    assert any("left out: notes.md" in notice for notice in report.notices)
    assert len(find_subject(result.name).header.pictures) == 4
    stored = json.loads((result.run / "start" / "lessons.json").read_text())
    assert stored["photos"][0]["captions"] == ["my [V] dog on the moon"]


def test_captions_of_photos_may_stand_in_a_listing(tiny: Path, tmp_path: Path) -> None:
    folder = tiny_model.photos(tmp_path / "listed", 3)
    rows = [{"file_name": "2.png", "text": "my dog at home"}, {"file_name": "0.png", "text": ["a dog", "the dog"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = Silent()
    result = learn(tiny, folder, report, flags={"steps": 1, "prior": "none", "views": 1})
    stored = json.loads((result.run / "start" / "lessons.json").read_text())["photos"]
    assert [photo["captions"] for photo in stored] == [["my [V] dog at home"], ["a [V] dog", "the [V] dog"]]
    assert f"{folder}: metadata.jsonl: 2 pictures" in report.notices
    told = json.loads((result.run / "data_report.json").read_text())
    assert (told["used"], told["captions"]["count"], told["captions"]["several"]) == (2, 3, 1)
    write_tar(tmp_path / "a.tar", {"1.png": (folder / "1.png").read_bytes()})
    with pytest.raises(UsageError, match="is an archive"):
        learn(tiny, tmp_path / "a.tar", name="x")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("my {subject} on the moon", "my [V] dog on the moon"),
        ("[V] at home", "[V] at home"),
        ("A Dog and a dogma", "A [V] dog and a dogma"),
        ("at home", "[V] dog, at home"),
        ("", "[V] dog"),
    ],
)
def test_captions_name_the_subject(tiny: Path, tmp_path: Path, written: str, read: str) -> None:
    folder = tiny_model.photos(tmp_path / "captioned", 1)
    (folder / "0.txt").write_text(written)
    result = learn(tiny, folder, flags={"steps": 1, "prior": "none"})
    stored = json.loads((result.run / "start" / "lessons.json").read_text())
    assert stored["photos"][0]["captions"] == [read]


def test_a_class_that_turns_into_the_subject_is_warned_of_once_while_it_trains(tiny: Path, photos: Path) -> None:
    """With nothing to keep the class and far too much learned at once, "a dog" is the subject as well."""
    fast = ("training.subject.optimizer.learning_rate=0.01", "training.subject.optimizer.warmup_steps=0")
    report = Silent()
    flags = {"prior": "none", "train": ["all"], "steps": 12, "validate_every": 4}
    result = learn(tiny, photos, report, flags=flags, overrides=fast)
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    leaks = {line["step"]: line["drift_class_leak"] for line in lines if "drift_class_leak" in line}
    first = min(step for step, leak in leaks.items() if leak > 0.75)
    (warned,) = [text for text in report.notices if "turn into [V]" in text]
    assert first < 12
    assert f"after {first} steps" in warned

    report = Silent()
    learn(tiny, photos, report, name="still", flags={**flags, "train": ["token"]})
    assert not [text for text in report.notices if "turn into" in text]


def test_class_pictures_answer_the_photos_captions(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """A photo "on the moon" meets the class on the moon, so that only the token says which of the two is meant."""
    captioned = shutil.copytree(photos, tmp_path / "captioned")
    for file in captioned.glob("*.png"):
        file.with_suffix(".txt").write_text("an {subject} on the moon")

    def learned(name: str, photos: Path, changed: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The subject, with class pictures 0 and 1 on the moon, 2 and 3 in the snow, some of them other than usual."""
        own = tiny_model.photos(tmp_path / name, 4)
        for number in range(4):
            place = "on the moon" if number < 2 else "in the snow"
            (own / f"{number}.txt").write_text(f"a dog {place}")
        for number in changed:
            Image.new("RGB", (48, 48), (90, 200, 10 * number)).save(own / f"{number}.png")
        flags = {"validate_every": 100, "prior_images": 4, "caption_dropout": 0.5}
        return load_file(learn(tiny, photos, name=name, flags=flags, priors=own).file)

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    usual = learned("usual", captioned, ())
    assert same(usual, learned("snow", captioned, (2, 3))), "the class in the snow answers no photo"
    assert not same(usual, learned("moon", captioned, (0, 1)))
    # captions that no class picture answers meet all of them
    assert not same(learned("any", photos, ()), learned("any-snow", photos, (2, 3)))


def test_photos_without_captions_get_the_likeliest_prompt(tiny: Path, photos: Path) -> None:
    """Half of the time, so that the places in the photos are not taken for the subject."""
    templates = ["a {subject}", "the {subject} on the moon", "one {subject} in the snow"]
    flags = {"steps": 1, "prior": "none", "likely_captions": templates}
    result = learn(tiny, photos, flags={**flags, "photo_templates": ["my {subject}"]})
    stored = json.loads((result.run / "start" / "lessons.json").read_text())["photos"]
    assert all(lesson["captions"][1] == "my [V] dog" for lesson in stored)
    chosen = [lesson["captions"][0] for lesson in stored]
    assert set(chosen) <= {template.replace("{subject}", "[V] dog") for template in templates}
    # what was chosen explains the photo better than the others do
    base = load_model(tiny)
    assert base.text_encoder is not None
    prompts = [template.replace("{subject}", "dog") for template in templates]
    scales = schedule(base.config.scales, patchify=False, ratio=1.0)
    latent = load_file(result.run / "start" / "lessons.safetensors")["photos.0"]
    assert prompts[likeliest(base, latent, prompts, scales, torch.device("cpu"))] == chosen[0].replace("[V] ", "")
    orders = [likeliest(base, latent, order, scales, torch.device("cpu")) for order in (prompts, prompts[::-1])]
    assert orders[0] == 2 - orders[1], "whatever their order"

    plain = learn(tiny, photos, name="plain", flags={**flags, "likely_captions": []})
    stored = json.loads((plain.run / "start" / "lessons.json").read_text())["photos"]
    assert all(lesson["captions"][0] == "a [V] dog" for lesson in stored)


def test_buckets_give_photos_their_own_shape(tiny: Path, tmp_path: Path) -> None:
    folder = tiny_model.photos(tmp_path / "tall", 1)
    Image.open(folder / "0.png").resize((30, 62)).save(folder / "tall.png")
    result = learn(tiny, folder, flags={"steps": 2, "buckets": True})
    stored = json.loads((result.run / "start" / "lessons.json").read_text())
    assert [photo["ratio"] for photo in stored["photos"]] == [1.0, 1.0, 2.0, 2.0]


def test_few_photos_warn_and_none_is_an_error(tiny: Path, tmp_path: Path) -> None:
    report = Silent()
    learn(tiny, tiny_model.photos(tmp_path / "one", 1), report, flags={"steps": 1, "prior": "none"})
    assert any("only 1 photo" in notice for notice in report.notices)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no photos in"):
        learn(tiny, tmp_path / "empty", name="x")
    with pytest.raises(InputError, match="does not exist"):
        learn(tiny, tmp_path / "nowhere", name="x")
    broken = tiny_model.photos(tmp_path / "broken", 3)
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:200])
    with pytest.raises(InputError, match=r"1\.png"):
        learn(tiny, broken, name="x")
    assert not Path("subject-x").exists(), "a run that never began leaves nothing"


def test_what_a_user_can_get_wrong(tiny: Path, photos: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[BitgenError], str]] = [
        ({"token": "dog"}, UsageError, "ordinary word"),
        ({"token": "my dog"}, UsageError, "cannot be a token"),
        ({"token": ""}, UsageError, "token"),
        ({"token": "[]"}, UsageError, "no name"),
        ({"class_word": "  "}, UsageError, "class"),
        ({"name": "../evil"}, UsageError, "cannot be the name"),
        ({"name": "a/b"}, UsageError, "cannot be the name"),
        ({"flags": {"train": ["everything"]}}, ConfigError, "training.subject.train"),
        ({"flags": {"prior": "hope"}}, ConfigError, "training.subject.prior"),
        ({"flags": {"photo_templates": ["a dog"]}}, ConfigError, "subject"),
        ({"overrides": ("model.transformer.depth=9",)}, UsageError, "cannot be changed"),
        ({"model": "nowhere"}, InputError, "no model at nowhere"),
    ]
    for options, kind, problem in wrong:
        with pytest.raises(kind, match=problem):
            learn(**{"model": tiny, "photos": photos, **options})
    learn(tiny, photos, flags={"steps": 1, "prior": "none"})
    with pytest.raises(UsageError, match="known already"):
        learn(tiny, photos)
    with pytest.raises(UsageError, match="already holds a run"):
        learn(tiny, photos, overwrite=True, out=Path("subject-v"))
    again = learn(tiny, photos, overwrite=True, flags={"steps": 1, "prior": "none"})
    assert (again.name, again.run) == ("v", Path("subject-v-2")), "the run that was there is kept"


def test_a_doomed_run_is_refused_before_anything_is_made(
    tiny: Path, photos: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitgen_cli.runs import fitting

    monkeypatch.setattr(fitting, "free_memory", lambda device: 300 * 2**20)
    with pytest.raises(ResourceError, match=r"what needs less, but not little enough: .*--prior none: 5\d\d MiB"):
        learn(tiny, photos)
    assert not Path("subject-v").exists()
    assert not home.exists()


def test_the_memory_of_other_choices_is_told_where_it_is_scarce(
    tiny: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(free: int | None) -> tuple[str, int]:
        monkeypatch.setattr(fitting, "free_memory", lambda device: free)
        report, out = Silent(), Path(str(free))
        learn(tiny, photos, report, flags={"steps": 1, "prior": "none"}, overwrite=True, out=out)
        (line,) = [line for line in report.notices if line.startswith("memory for --train token,cross,ffn: about ")]
        return line, inspect(InspectOptions(str(out)), Silent()).facts["memory"]["training"]["subject"]["total"]

    line, needed = told(None)
    assert "it would be" not in line
    line, _ = told(PROGRAM + needed * 3 // 2)
    assert all(choice in line for choice in ("token,lora ", "token ", "all "))
    line, _ = told(PROGRAM + needed * 3)
    assert "it would be" not in line


def test_a_subject_can_be_inspected(tiny: Path, photos: Path) -> None:
    result = learn(tiny, photos, flags={"steps": 1, "prior": "none"})
    for target in ("v", str(result.file)):
        found = inspect(InspectOptions(target), Silent())
        assert found.kind == "subject"
        assert (found.facts["token"], found.facts["class"], found.facts["changes"]) == ("[V]", "dog", "delta")
        assert found.facts["recipe"]["steps"] == 1
        assert len(found.facts["pictures"]) == 3
        json.dumps(found.to_json())
    run = inspect(InspectOptions(str(result.run)), Silent())
    assert run.facts["memory"]["training"]["subject"]["total"] > 0
    with pytest.raises(UsageError):
        inspect(InspectOptions("v", overrides=["a=1"]), Silent())


def test_views_are_crops_of_the_photo(tiny: Path) -> None:
    training = load_training(views=6, crop=0.3)
    photo = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 40).convert("RGB")
    crops = views(photo, (16, 16), training, 0)
    assert [tuple(crop.shape) for crop in crops] == [(3, 16, 16)] * 6
    assert len({crop.numpy().tobytes() for crop in crops}) == 6
    again = views(photo, (16, 16), training, 0)
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    mirrored = views(photo, (16, 16), load_training(views=6, crop=0.3, flip=True), 0)
    assert [torch.equal(a, b) for a, b in zip(crops, mirrored, strict=True)] == [True, False] * 3


def load_training(**changes: Any) -> Any:
    from bitgen_cli.config import SubjectTraining

    return SubjectTraining.model_validate(changes)
