"""Prompts to text features: kept or not, alone or in company, they are the same, and the encoder is there only then."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitgen_cli.engine import text_precision
from bitgen_cli.engine.model_folder import Model, load_model, read_model_config
from bitgen_cli.engine.subject import PREFIX, ROW, START, Header, Worn, read_subject, save_subject
from bitgen_cli.engine.text import TextEncoder
from bitgen_cli.engine.text_cache import TextCache
from bitgen_cli.engine.text_precision import TextPrecision, load_text_encoder_as, pick_text_precision
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Silent
from bitgen_cli.runs import drawing
from bitgen_cli.runs import prompts as module
from bitgen_cli.runs.gen_priors import gen_priors
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.prior_options import PriorOptions
from bitgen_cli.runs.prompts import Prompt, TextModel, find_text_model, text_features
from bitgen_cli.runs.sample import sample
from bitgen_cli.runs.sample_result import SampledPicture

pytestmark = pytest.mark.usefixtures("home")
CPU = torch.device("cpu")
FP32 = TextPrecision("fp32", torch.float32)
DELTA = f"{PREFIX}text_encoder.encoder.block.0.layer.0.SelfAttention.q.weight.delta"
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")


def kept(home: Path) -> list[Path]:
    return sorted((home / "cache" / "text").glob("*.safetensors"))


def draw(model: Path, *prompts: str, **options: Any) -> list[SampledPicture]:
    return sample(SampleOptions(prompts=prompts, model=str(model), **options), Silent()).pictures


def pixels(picture: SampledPicture) -> bytes:
    with Image.open(picture.path) as image:
        return image.tobytes()


def forbid_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_text_encoder_as", lambda *given: pytest.fail("the encoder is not needed"))


def text_model(folder: Path) -> TextModel:
    return find_text_model(load_model(folder, parts=()), Silent())


def subject(folder: Path, file: Path, **more: torch.Tensor) -> Path:
    """A subject of the model, whose token is [V]."""
    header = Header(
        token="[V]",
        class_word="dog",
        kind="delta" if more else "token",
        base=read_model_config(folder)[2],
        base_name="tiny",
        recipe={},
        pictures=[],
    )
    generator = torch.Generator().manual_seed(3)
    row, start = torch.randn(2, 32, generator=generator).unbind()
    save_subject(file, header, {ROW: row, START: start, **more}, torch.float32)
    return file


# -- the same pictures -------------------------------------------------------------------------------------------------


def test_kept_features_draw_the_same_pictures_without_the_encoder(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {"seed": 1, "cfg": "3", "negative_prompt": "a cat on the beach in the snow"}
    plain = draw(tiny, "a red dog", "the moon", text_cache=False, **wanted)
    assert kept(home) == []
    first = draw(tiny, "a red dog", "the moon", **wanted)
    assert len(kept(home)) == 3
    forbid_encoder(monkeypatch)
    second = draw(tiny, "a red dog", "the moon", **wanted)
    (alone,) = draw(tiny, "the moon", **wanted)
    assert [pixels(p) for p in plain] == [pixels(p) for p in first] == [pixels(p) for p in second]
    assert pixels(alone) == pixels(plain[1])
    assert pixels(plain[0]) != pixels(draw(tiny, "a red dog", seed=1, cfg="3")[0])  # the negative prompt shows
    monkeypatch.undo()


def test_features_do_not_depend_on_their_company(tiny: Path) -> None:
    text = text_model(tiny)
    prompts = [Prompt("dog"), Prompt("a red dog on the moon and a cat"), Prompt("a cat"), Prompt("dog")]
    together = text_features(text, prompts, FP32, CPU, Silent(), cached=False)
    for prompt, features in zip(prompts, together, strict=True):
        (alone,) = text_features(text, [prompt], FP32, CPU, Silent(), cached=False)
        assert torch.equal(features, alone)
        assert features.shape == (len(text.reader.tokenise([prompt.text])[0]), 32)


def test_a_damaged_file_is_made_again(tiny: Path, home: Path) -> None:
    before = pixels(draw(tiny, "a red dog", seed=1)[0])
    (file,) = kept(home)
    good = load_file(file)["features"].clone()
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    assert pixels(draw(tiny, "a red dog", seed=1)[0]) == before
    assert torch.equal(load_file(file)["features"], good)


def test_what_was_read_before_ctrl_c_is_kept(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, read = TextEncoder.encode_alone, []

    def stop_at_the_third(encoder: TextEncoder, prompts: list[str]) -> list[torch.Tensor]:
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(prompts)
        return encode(encoder, prompts)

    monkeypatch.setattr(TextEncoder, "encode_alone", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny, "a red dog", "the moon", "a cat", seed=1)
    assert len(kept(home)) == 2


def test_an_encoder_that_was_replaced_by_hand_reads_prompts_anew(tiny: Path, home: Path, tmp_path: Path) -> None:
    """The fingerprint that config.json lists is that of the encoder before."""
    model = Path(shutil.copytree(tiny, tmp_path / "copy"))
    before = pixels(draw(model, "a red dog", seed=1)[0])
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    after = pixels(draw(model, "a red dog", seed=1)[0])
    assert after == pixels(draw(model, "a red dog", seed=1, text_cache=False)[0]) != before


def test_a_cache_that_cannot_be_written_to_is_told_and_done_without(tiny: Path, home: Path) -> None:
    home.mkdir()
    (home / "cache").write_text("a file")
    report = Silent()
    options = SampleOptions(prompts=("a red dog",), model=str(tiny), seed=1)
    assert sample(options, report).pictures
    assert [notice for notice in report.notices if notice.startswith("text features are not kept: cannot write")]


def test_class_pictures_share_what_is_kept(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"class_word": "dog", "count": 2, "model": str(tiny), "templates": ("a photo of a {class}",)}
    gen_priors(PriorOptions(output=Path("a"), text_cache=False, **options), Silent())  # type: ignore[arg-type]
    assert kept(home) == []
    gen_priors(PriorOptions(output=Path("b"), **options), Silent())  # type: ignore[arg-type]
    assert len(kept(home)) == 1
    forbid_encoder(monkeypatch)
    draw(tiny, "a photo of a dog", seed=0)
    gen_priors(PriorOptions(output=Path("c"), **options), Silent())  # type: ignore[arg-type]
    for name in ("0000.png", "0001.png"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes() == Path("c", name).read_bytes()


# -- subjects ----------------------------------------------------------------------------------------------------------


def test_subjects_and_their_scales_have_features_of_their_own(
    tiny: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = subject(tiny, tmp_path / "token.safetensors")
    whole = subject(tiny, tmp_path / "whole.safetensors", **{DELTA: torch.full((32, 32), 0.3)})
    asked = [(f"{token}",), (f"{token}:0.5",), (f"{whole}",)]
    plain = [pixels(draw(tiny, "a [V] dog", seed=1, subjects=a, text_cache=False)[0]) for a in asked]
    assert len(set(plain)) == 3
    first = [pixels(draw(tiny, "a [V] dog", seed=1, subjects=a)[0]) for a in asked]
    assert len(kept(home)) == 3
    forbid_encoder(monkeypatch)
    second = [pixels(draw(tiny, "a [V] dog", seed=1, subjects=a)[0]) for a in asked]
    assert plain == first == second


def test_one_encoder_reads_prompts_with_different_subjects_one_after_the_other(tiny: Path, tmp_path: Path) -> None:
    text = text_model(tiny)
    whole = read_subject(subject(tiny, tmp_path / "whole.safetensors", **{DELTA: torch.full((32, 32), 0.3)}))
    prompts = [Prompt("a [V] dog", (Worn(whole),)), Prompt("a dog"), Prompt("a [V] dog", (Worn(whole, 0.5),))]
    together = text_features(text, prompts, FP32, CPU, Silent(), cached=False)
    for prompt, features in zip(prompts, together, strict=True):
        (alone,) = text_features(text, [prompt], FP32, CPU, Silent(), cached=False)
        assert torch.equal(features, alone)


# -- the encoder's place -----------------------------------------------------------------------------------------------


def test_the_encoder_is_gone_before_the_transformer_comes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[TextEncoder]] = []

    def load(*given: Any) -> TextEncoder:
        encoder = load_text_encoder_as(*given)
        alive.append(weakref.ref(encoder))
        return encoder

    def check(*given: Any, **named: Any) -> Model:
        if "transformer" in named["parts"]:
            assert [found() for found in alive] == [None]
        return load_model(*given, **named)

    monkeypatch.setattr(module, "load_text_encoder_as", load)
    monkeypatch.setattr(drawing, "load_model", check)
    gc.disable()
    try:
        draw(tiny, "a red dog", seed=1, text_cache=False)
    finally:
        gc.enable()
    assert len(alive) == 1


def test_a_second_call_loads_no_transformers(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from bitgen_cli.__main__ import main; code = main(sys.argv[1:]); "
        "slow = ('transformers', 'huggingface_hub', 'torch._dynamo'); "
        "print(code, *(name for name in slow if name in sys.modules), file=sys.stderr)"
    )
    words = [sys.executable, "-c", program, "sample", "a red dog", "--model", str(tiny), "--seed", "1", "--json"]
    draw(tiny, "a red dog", seed=1)
    done = subprocess.run([*words, "-o", str(tmp_path / "b.png")], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["0"]


# -- number types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "device", "expected"),
    [
        ("auto", torch.float32, "cpu", FP32),
        ("auto", torch.bfloat16, "cpu", TextPrecision("bf16", torch.bfloat16)),
        ("auto", torch.float16, "cpu", FP32),
        ("auto", torch.float16, "cuda", TextPrecision("bf16", torch.bfloat16)),
        ("auto", torch.float16, "mps", FP32),
        ("fp32", torch.bfloat16, "cuda", FP32),
        ("bf16", torch.float32, "cpu", TextPrecision("bf16", torch.bfloat16)),
    ],
)
def test_no_text_encoder_computes_in_fp16(
    name: str, dtype: torch.dtype, device: str, expected: TextPrecision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_precision, "bf16_is_fast", lambda device: True)
    assert pick_text_precision(name, dtype, torch.device(device)) == expected


def test_a_recipe_says_a_text_encoder_of_another_type(tiny: Path) -> None:
    assert "text_dtype" not in draw(tiny, "a red dog", seed=1)[0].recipe
    assert "text_dtype" not in draw(tiny, "a red dog", seed=1, text_dtype="fp32")[0].recipe
    (picture,) = draw(tiny, "a red dog", seed=1, text_dtype="bf16")
    assert (picture.recipe["text_dtype"], picture.recipe["dtype"]) == ("bf16", "fp32")


@pytest.mark.parametrize(("name", "says"), [("fp16", "T5 cannot compute in fp16"), ("int3", "unknown text dtype")])
def test_other_types_are_refused(tiny: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=rf"{says}.*auto, fp32, bf16, int8"):
        draw(tiny, "a red dog", text_dtype=name)


def test_int8_without_torchao_is_told(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_precision, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'int8 needs the package torchao \(pip install "bitgen\[int8\]"\)'):
        draw(tiny, "a red dog", text_dtype="int8")
    assert not list(Path().glob("*.png"))


@needs_torchao
def test_int8_weights_are_a_quarter_and_nearly_say_the_same(tiny: Path) -> None:
    text = text_model(tiny)
    plain = load_text_encoder_as(FP32, text.source, 16, CPU)
    rounded = load_text_encoder_as(pick_text_precision("int8", torch.float32, CPU), text.source, 16, CPU)
    sizes = []
    for encoder in (plain, rounded):
        weight = encoder.model.encoder.block[0].layer[1].DenseReluDense.wo.weight
        sizes.append(sum(part.nbytes for part in ((weight.qdata, weight.scale) if encoder is rounded else (weight,))))
    assert sizes[1] < 0.4 * sizes[0]
    with torch.inference_mode():
        (before,), (after,) = (encoder.encode_alone(["a red dog on the moon"]) for encoder in (plain, rounded))
    assert not torch.equal(before, after)
    assert torch.cosine_similarity(before, after, dim=-1).min() > 0.999


@needs_torchao
def test_int8_draws_and_is_kept_apart(tiny: Path, home: Path, tmp_path: Path) -> None:
    draw(tiny, "a red dog", seed=1)
    (picture,) = draw(tiny, "a red dog", seed=1, text_dtype="int8")
    assert picture.recipe["text_dtype"] == "int8"
    assert len(kept(home)) == 2
    token = subject(tiny, tmp_path / "token.safetensors")
    assert draw(tiny, "a [V] dog", seed=1, subjects=(str(token),), text_dtype="int8")
    whole = subject(tiny, tmp_path / "whole.safetensors", **{DELTA: torch.full((32, 32), 0.3)})
    with pytest.raises(UsageError, match="changes weights of the text encoder"):
        draw(tiny, "a [V] dog", seed=1, subjects=(str(whole),), text_dtype="int8")


def test_a_text_encoder_without_a_vocabulary_is_told(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    (tmp_path / "copy" / "text_encoder" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no vocabulary .tokenizer\.json is missing"):
        draw(tmp_path / "copy", "a red dog")


def test_the_cache_of_the_user_is_below_bitgens_home(home: Path) -> None:
    assert TextCache().folder == home / "cache" / "text"
