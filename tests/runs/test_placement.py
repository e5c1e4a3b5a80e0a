"""Where parts go on the hardware people have, and what is said where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitgen_cli.engine.memory import BF16, FP32, parameters
from bitgen_cli.engine.scales import schedule
from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.presets import resolve
from bitgen_cli.report import Silent
from bitgen_cli.runs import placement, prompts
from bitgen_cli.runs.fitting import PROGRAM
from bitgen_cli.runs.jobs import SampleOptions
from bitgen_cli.runs.placement import AT_ONCE, Placement, Wanted, place
from bitgen_cli.runs.sample import sample

GIB = 1 << 30
CONTEXT = 0.6
"""GiB that a program on a GPU takes before it takes any: of a card of 8 so much less is free."""
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def wanted(preset: str, resolution: str = "1M", **changes: object) -> Wanted:
    model = resolve(preset, environment={}).config.model
    scales = schedule(model.scales, patchify=model.transformer.patchify, resolution=resolution)
    asked = Wanted(model, parameters(model), [scales], pictures=20, batch_size=None, number=BF16, tokens=40)
    return replace(asked, **changes)  # type: ignore[arg-type]


def placed(monkeypatch: pytest.MonkeyPatch, free: float | None, asked: Wanted, how: str, on: torch.device) -> Placement:
    """With so many GiB free; whatever is found fits in them."""
    left = None if free is None else int(free * GIB)
    monkeypatch.setattr(placement, "free_memory", lambda _: left)
    found = place(asked, how, on)
    assert left is None or found.memory.total + found.recordings + PROGRAM <= left
    return found


def test_recordings_have_room_or_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they read and write stays while the decoder computes."""
    asked = wanted("infinity-2b", records=True)
    large = placed(monkeypatch, 79, asked, "auto", GPU)
    plain = placed(monkeypatch, 79, wanted("infinity-2b"), "auto", GPU)
    assert (large.batch_size, plain.batch_size, plain.recordings) == (AT_ONCE, AT_ONCE, 0)
    assert large.recordings >= large.memory.decoder_work
    fewer = placed(monkeypatch, large.memory.total / GIB + 1, asked, "auto", GPU)
    assert fewer.recordings
    assert fewer.batch_size < AT_ONCE
    small = placed(monkeypatch, 9, asked, "auto", GPU)
    assert (small.recordings, small.waiting) == (0, ())
    assert not placed(monkeypatch, 79, asked, "cpu", GPU).recordings


def test_a_large_card_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (79, None):
        found = placed(monkeypatch, free, wanted("infinity-2b"), "auto", GPU)
        assert (found.batch_size, found.waiting, found.in_bands) == (AT_ONCE, (), False)
        assert found.told() is None
    assert placed(monkeypatch, 79, wanted("infinity-2b", pictures=3), "auto", GPU).batch_size == 3


def test_fewer_pictures_at_once_before_anything_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = placed(monkeypatch, 24 - CONTEXT, wanted("infinity-2b"), "auto", GPU)
    assert 1 < found.batch_size < AT_ONCE
    assert not found.waiting


def test_2b_at_1024_in_8_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = placed(monkeypatch, 8 - CONTEXT, wanted("infinity-2b"), "auto", GPU)
    assert found.batch_size == 1
    assert 2 < len(found.waiting) < 32
    assert found.in_bands
    assert f"{len(found.waiting)} blocks wait" in (found.told() or "")
    with pytest.raises(ResourceError, match=r"needs about 8\.\d GiB of memory, cuda has 7\.4 GiB free") as refused:
        placed(monkeypatch, 8 - CONTEXT, wanted("infinity-2b"), "none", GPU)
    assert "--offload auto" in (refused.value.hint or "")


def test_8b_at_1024_in_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = placed(monkeypatch, 24 - CONTEXT, wanted("infinity-8b"), "auto", GPU)
    assert found.batch_size == 1
    assert 2 < len(found.waiting) < 40


def test_2b_at_1024_on_a_cpu_with_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which every processor computes in; nothing can wait elsewhere."""
    found = placed(monkeypatch, 22, wanted("infinity-2b", number=FP32), "auto", CPU)
    assert (found.batch_size, found.waiting, found.in_bands) == (1, (), True)


def test_all_that_can_waits_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = placed(monkeypatch, 79, wanted("infinity-2b"), "cpu", GPU)
    assert found.waiting == tuple(range(32))
    assert found.batch_size == AT_ONCE
    least = placed(monkeypatch, 79, wanted("infinity-2b", batch_size=1), "cpu", GPU)
    assert least.memory.total < 5 * GIB


def test_weights_do_not_wait_in_a_memory_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked pieces are powers of two: a block of 8B, of 392 MiB, takes 544."""
    free = {"cuda": 15 * GIB, "cpu": 4 * GIB}
    monkeypatch.setattr(placement, "free_memory", lambda device: free[device.type])
    with pytest.raises(ResourceError, match=r"26 blocks would wait in 13\.8 GiB of the CPU's .* 4\.0 GiB free") as no:
        place(wanted("infinity-8b"), "auto", GPU)
    assert no.value.hint == "what needs less: a smaller --resolution"
    with pytest.raises(ResourceError, match="40 blocks would wait") as no:
        place(wanted("infinity-8b"), "cpu", GPU)
    assert (no.value.hint or "").startswith("what needs less: --offload auto, ")
    free["cpu"] = 15 * GIB
    assert len(place(wanted("infinity-8b"), "auto", GPU).waiting) == 26


def test_small_pictures_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve("demo", environment={}).config.model
    asked = replace(
        wanted("infinity-2b"), model=model, counts=parameters(model), schedules=[schedule(model.scales, patchify=False)]
    )
    assert not placed(monkeypatch, 8, asked, "auto", CPU).in_bands


def test_what_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"cuda has 2\.0 GiB free") as refused:
        placed(monkeypatch, 2, wanted("infinity-2b"), "auto", GPU)
    assert refused.value.hint == "what needs less: a smaller --resolution"
    with pytest.raises(ResourceError) as refused:
        placed(monkeypatch, 8, wanted("infinity-2b", number=FP32, batch_size=4), "auto", GPU)
    assert refused.value.hint == "what needs less: --batch-size 1, --dtype bf16, a smaller --resolution"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"offload": "disk"}, "--offload disk: unknown"),
        ({"compile": True}, "the device is cpu"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"text_dtype": "fp16"}, "T5 cannot compute in fp16"),
    ],
)
def test_options_of_computing_are_refused_before_a_model_is_fetched(
    options: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitgen_cli.runs.drawing.provide_model", lambda *given: pytest.fail("nothing is to be fetched"))
    with pytest.raises(UsageError, match=told):
        sample(SampleOptions(prompts=("a red dog",), model="infinity-2b", device="cpu", **options), Silent())


def test_sample_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda _: PROGRAM)
    monkeypatch.setattr("bitgen_cli.runs.drawing.load_model", only_configuration)
    options = SampleOptions(prompts=("a red dog",), output=str(tmp_path / "a.png"), seed=1)
    with pytest.raises(ResourceError, match="drawing needs about"):
        sample(options, Silent())
    assert not any(tmp_path.iterdir())


def only_configuration(folder: Path, **options: object) -> object:
    from bitgen_cli.engine.model_folder import load_model

    assert options == {"parts": ()}
    return load_model(folder, parts=())


def test_a_text_encoder_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompts, "free_memory", lambda _: PROGRAM)
    options = SampleOptions(prompts=("a red dog",), output=str(tmp_path / "a.png"), seed=1, text_cache=False)
    with pytest.raises(ResourceError, match=r"the text encoder needs about .* in fp32") as refused:
        sample(options, Silent())
    assert refused.value.hint == "--text-dtype bf16 or int8"
    assert not any(tmp_path.iterdir())
