"""The demo world: the same bytes from the same seed, an even split, captions that say what is drawn."""

import random
import re
from collections import Counter
from dataclasses import astuple
from itertools import combinations

import pytest

from bitgen_cli.demo import world
from bitgen_cli.demo.world import CLASSES, COLOURS, LOOK_CLASSES, PLACES, Look, Scene

COUNTS = {"object_class": len(CLASSES), "colour": len(COLOURS), "place": len(PLACES)}


def test_it_is_as_large_as_promised() -> None:
    assert tuple(COUNTS.values()) == (14, 10, 10)


def test_a_picture_is_the_same_every_time() -> None:
    for index in range(40):
        first, second = world.picture(index, seed=3), world.picture(index, seed=3)
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.caption, first.scene) == (second.caption, second.scene)
        assert first.image.mode == "RGB"
        assert first.image.size == (64, 64)


def test_other_indices_and_seeds_give_other_pictures() -> None:
    drawn = {world.picture(index, seed).image.tobytes() for index in range(20) for seed in range(3)}
    assert len(drawn) == 60


def test_scene_and_caption_are_those_of_the_picture() -> None:
    for index in range(30):
        for held_out in (False, True):
            picture = world.picture(index, 5, 16, held_out)
            assert picture.scene == world.scene_at(index, 5, held_out)
            assert picture.caption == world.caption_at(index, 5, held_out)


def test_the_split_is_the_whole_world_without_overlap() -> None:
    trained, held_out = world.scenes(held_out=False), world.scenes(held_out=True)
    assert (len(trained), len(held_out)) == (1260, 140)
    assert len({*trained, *held_out}) == 1400
    assert not any(world.is_held_out(scene) for scene in trained)
    assert all(world.is_held_out(scene) for scene in held_out)


@pytest.mark.parametrize("part", COUNTS)
def test_what_is_held_out_is_even(part: str) -> None:
    counts = Counter(getattr(scene, part) for scene in world.scenes(held_out=True))
    assert counts == {name: 140 // COUNTS[part] for name in counts}
    assert len(counts) == COUNTS[part]


@pytest.mark.parametrize("parts", list(combinations(COUNTS, 2)))
def test_every_pair_is_trained_on(parts: tuple[str, str]) -> None:
    """A class lacks one colour of each place and one place of each colour; a colour in a place one or two classes."""
    pairs = Counter((getattr(scene, parts[0]), getattr(scene, parts[1])) for scene in world.scenes(held_out=False))
    third = next(count for part, count in COUNTS.items() if part not in parts)
    lacking = {third - count for count in pairs.values()}
    assert len(pairs) == COUNTS[parts[0]] * COUNTS[parts[1]]
    assert lacking == ({1, 2} if parts == ("colour", "place") else {1})


@pytest.mark.parametrize("seed", [0, 1])
def test_no_index_reaches_a_held_out_scene(seed: int) -> None:
    drawn = [world.scene_at(index, seed) for index in range(6000)]
    assert not any(map(world.is_held_out, drawn))
    assert len(set(drawn)) > 1230
    for part, count in COUNTS.items():
        often = Counter(getattr(scene, part) for scene in drawn)
        assert min(often.values()) > 0.8 * 6000 / count
        assert max(often.values()) < 1.2 * 6000 / count


def test_indices_of_the_held_out_part_reach_no_other() -> None:
    drawn = {world.scene_at(index, held_out=True) for index in range(2000)}
    assert drawn == set(world.scenes(held_out=True))


def test_words_are_there_for_everything() -> None:
    assert set(world.CLASS_WORDS) == set(CLASSES)
    assert set(world.COLOUR_WORDS) == set(COLOURS)
    assert set(world.PLACE_PHRASES) == set(world.PLACE_WORDS) == set(PLACES)
    for words in (world.CLASS_WORDS, world.COLOUR_WORDS):
        given = [word for synonyms in words.values() for word in synonyms]
        assert len(given) == len(set(given))


def test_a_prefix_is_followed_by_an_article() -> None:
    captions = [world.caption_at(index) for index in range(2000)]
    prefixed = [caption for caption in captions if caption.lower().startswith(world.PREFIXES)]
    assert len(prefixed) > 200
    for caption in prefixed:
        assert re.match(r"(a|an) \w+ of (a|an|the|one) ", caption.lower()), caption


def test_captions_name_the_class_and_nothing_that_is_not_there() -> None:
    every = {word: name for name, words in world.CLASS_WORDS.items() for word in words}
    hues = {word: name for name, words in world.COLOUR_WORDS.items() for word in words}
    with_colour = with_place = 0
    for index in range(6000):
        scene, caption = world.scene_at(index), world.caption_at(index)
        words = re.findall(r"[a-z]+", caption.lower())
        assert {every[word] for word in words if word in every} == {scene.object_class}, caption
        colours = {hues[word] for word in words if word in hues}
        assert colours <= {scene.colour}, caption
        with_colour += bool(colours)
        places = (*world.PLACE_PHRASES[scene.place], *world.PLACE_WORDS[scene.place])
        with_place += any(place in caption.lower() for place in places)
        assert caption == caption.strip()
        assert "  " not in caption
    assert 0.83 < with_colour / 6000 < 0.91
    assert 0.88 < with_place / 6000 < 0.94


def test_captions_use_every_word_and_every_order() -> None:
    captions = [world.caption_at(index).lower() for index in range(6000)]
    text = "\n".join(captions)
    for words in (world.CLASS_WORDS, world.COLOUR_WORDS, world.PLACE_PHRASES, world.PLACE_WORDS):
        for synonyms in words.values():
            assert all(re.search(rf"\b{word}\b", text) for word in synonyms)
    for prefix in world.PREFIXES:
        assert any(caption.startswith(prefix) for caption in captions)
    assert len(set(captions)) > 4000


def test_articles_fit_the_next_word() -> None:
    for index in range(6000):
        for article, following in re.findall(r"\b(an?) (\w)", world.caption_at(index).lower()):
            assert (article == "an") == (following in "aeiou"), world.caption_at(index)


def test_the_plain_caption() -> None:
    assert str(Scene("dog", "red", "moon")) == "a red dog on the moon"
    assert str(Scene("cup", "orange", "underwater")) == "an orange cup underwater"
    assert str(Scene("house", "blue", "city")) == "a blue house in the city at night"


def test_every_class_in_every_place_is_drawn_and_seen() -> None:
    """The same random state with another class gives other pixels, so the object is visible."""
    for place in PLACES:
        seen = set()
        for number, name in enumerate(CLASSES):
            colour = list(COLOURS)[number % len(COLOURS)]
            image = world.draw(Scene(name, colour, place), random.Random(f"{name} {place}"))
            assert image.size == (64, 64)
            assert len(image.getcolors(64 * 64) or ()) > 50
            seen.add(world.draw(Scene(name, "red", place), random.Random(7), 32).tobytes())
        assert len(seen) == len(CLASSES)


@pytest.mark.parametrize("place", PLACES)
def test_every_class_and_place_is_drawn_at_128_pixels(place: str) -> None:
    for number, name in enumerate(CLASSES):
        colour = list(COLOURS)[(number + PLACES.index(place)) % len(COLOURS)]
        image = world.draw(Scene(name, colour, place), random.Random(number), 128)
        assert (image.mode, image.size) == ("RGB", (128, 128))
        assert len(image.getcolors(128 * 128) or ()) > 50


def test_a_larger_picture_shows_the_same() -> None:
    scene = Scene("boat", "white", "beach")
    small, large = (world.draw(scene, random.Random(1), size) for size in (64, 128))
    assert large.size == (128, 128)
    pairs = zip(small.tobytes(), large.resize((64, 64)).tobytes(), strict=True)
    assert sum(abs(a - b) for a, b in pairs) / (64 * 64 * 3) < 12


@pytest.mark.parametrize("name", LOOK_CLASSES)
def test_a_look_is_one_subject_whatever_the_colour(name: str) -> None:
    look = Look(coat=(240, 240, 230), patches=(120, 70, 30), accessory=(40, 90, 220))
    plain = world.draw(Scene(name, "red", "grass"), random.Random(2))
    drawn = [world.draw(Scene(name, colour, "grass"), random.Random(2), look=look) for colour in ("red", "blue")]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert drawn[0].tobytes() != plain.tobytes()
    for part in astuple(look):
        other = Look(**{**vars(look), **{k: (10, 200, 90) for k, v in vars(look).items() if v == part}})
        changed = world.draw(Scene(name, "red", "grass"), random.Random(2), look=other)
        assert changed.tobytes() != drawn[0].tobytes()


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in LOOK_CLASSES])
def test_other_classes_have_no_looks(name: str) -> None:
    look = Look((240, 240, 230), (120, 70, 30), (40, 90, 220))
    with pytest.raises(ValueError, match=f"{name} has no looks; dog, cat, robot have"):
        world.draw(Scene(name, "red", "grass"), random.Random(0), look=look)
