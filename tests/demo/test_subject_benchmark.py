"""The subject benchmark's own parts: what it asks for, and that its bars can be missed."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from PIL import Image

from bitgen_cli.demo import world
from tests.benchmarks import subject_quality, subjects
from tests.benchmarks.subject_quality import Absolute, Asks, Result, Spent, check_bars, entropy
from tests.benchmarks.subjects import SITTERS, Sitter, differ, near_look, other_look

EVERYONE = [sitter for split in SITTERS.values() for sitter in split]


def test_settings_are_chosen_on_other_subjects_than_bars_are_measured_on() -> None:
    assert len({sitter.look for sitter in EVERYONE}) == len({sitter.seed for sitter in EVERYONE}) == len(EVERYONE)
    for split in SITTERS.values():
        assert [sitter.object_class for sitter in split] == list(world.LOOK_CLASSES)
    test, tuning = (Asks.of(SITTERS[split][0], split, 100) for split in ("test", "tuning"))
    for one, other in ((test.subject, tuning.subject), (test.without_token(), tuning.without_token())):
        assert not {ask.seed for ask in one} & {ask.seed for ask in other}


@pytest.mark.parametrize("sitter", EVERYONE, ids=lambda sitter: sitter.name)
def test_photos_are_files_on_four_places_without_captions(sitter: Sitter, tmp_path: Path) -> None:
    files = sitter.write_photos(tmp_path / "photos")
    assert sorted(files) == sorted((tmp_path / "photos").iterdir())
    assert len(files) == len(set(sitter.photo_places)) == 4
    assert not set(sitter.photo_places) & set(sitter.other_places)
    assert {*sitter.photo_places, *sitter.other_places} == set(world.PLACES)
    for file in files:
        with Image.open(file) as photo:
            assert photo.size == (subjects.PHOTO_SIDE, subjects.PHOTO_SIDE)


def test_the_subject_is_asked_for_where_no_photo_was_taken() -> None:
    sitter = SITTERS["test"][0]
    asks = Asks.of(sitter, "test", 3)
    assert {ask.place for ask in asks.subject} == set(sitter.other_places)
    assert all(subject_quality.TOKEN in ask.prompt for ask in asks.subject)
    plain = asks.plain_subject + asks.without_token() + asks.more_colours
    assert not any(subject_quality.TOKEN in ask.prompt for ask in plain)
    assert [ask.seed for ask in asks.subject] == [ask.seed for ask in asks.plain_subject]
    assert len(asks.colours) == 64
    assert all(ask.object_class != sitter.object_class for ask in asks.unrelated)
    assert len(asks.unrelated) == 130


@pytest.mark.parametrize("sitter", EVERYONE, ids=lambda sitter: sitter.name)
def test_other_looks_are_told_apart(sitter: Sitter) -> None:
    rng = random.Random(0)
    for _ in range(200):
        near, other = near_look(sitter.look, rng), other_look(sitter.look, rng)
        assert sum(a != b for a, b in zip(astuple(sitter.look), astuple(near), strict=True)) == 1
        assert sum(differ(a, b) for a, b in zip(astuple(sitter.look), astuple(other), strict=True)) >= 2


def test_entropy_is_in_bits() -> None:
    assert entropy([3] * 8) == 0
    assert entropy([0, 1, 2, 3]) == pytest.approx(2)


def _result(variant: str, base: Absolute, tuned: Absolute, seconds: float) -> Result:
    return Result(SITTERS["test"][0], variant, tuned, tuned.against(base), Spent(seconds, seconds, 500.0), {})


BASE = Absolute(yes=0.0, leak=0.0, place=0.98, class_share=0.97, class_prior=0.96, entropy=3.0, unrelated=0.9)


def _tuned(**changed: float) -> Absolute:
    return Absolute(**{**vars(BASE), "yes": 0.9, **changed})


def test_a_good_subject_passes_every_bar() -> None:
    assert all(bar["pass"] for bar in check_bars([_result("default", BASE, _tuned(), 300.0)]))


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"yes": 0.8}, "fidelity"),
        ({"leak": 0.06}, "leak"),
        ({"place": 0.85}, "place"),
        ({"class_share": 0.9}, "class"),
        ({"class_prior": 0.9}, "class prior"),
        ({"entropy": 2.8}, "diversity"),
        ({"unrelated": 0.84}, "unrelated"),
    ],
)
def test_each_measure_can_miss_its_bar(changed: dict[str, float], missed: str) -> None:
    bars = check_bars([_result("default", BASE, _tuned(**changed), 300.0)])
    assert [bar["measure"] for bar in bars if not bar["pass"]] == [missed]


def test_every_subject_has_to_be_learned_in_time() -> None:
    results = [_result("default", BASE, _tuned(), seconds) for seconds in (100.0, 361.0)]
    assert [bar["measure"] for bar in check_bars(results) if not bar["pass"]] == ["seconds"]


def test_a_loss_of_diversity_that_does_not_show_is_a_miss() -> None:
    good = _result("default", BASE, _tuned(), 300.0)
    shows = check_bars([good, _result("none", BASE, _tuned(entropy=1.0), 300.0)])
    hidden = check_bars([good, _result("none", BASE, _tuned(), 300.0)])
    assert all(bar["pass"] for bar in shows)
    assert [bar["measure"] for bar in hidden if not bar["pass"]] == ["diversity with --prior none"]


def test_the_recogniser_answers_for_any_square_size() -> None:
    answers = subjects.Recogniser().eval().says_yes(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert answers.shape == (3,)
    assert answers.dtype == torch.bool
