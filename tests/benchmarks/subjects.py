"""Subjects of the demo world to learn from photos, and small CNNs that recognise one: for the subject benchmark.

A subject is a look (coat, patches, accessory) that no training picture has. Its recogniser answers "is this it?" for a
picture of any size: no to its class as the world paints it, to other looks of its class, and to looks that differ in
one part alone. Pictures drawn by a model have gone through its tokenizer, which blurs and recolours, so the recogniser
learns from pictures, from their reconstructions, and from reconstructions with wrong bits; otherwise the tokenizer and
not the subject would decide. It is trained within a minute or two on one core and kept in the user's cache folder,
together with what it gets right on pictures that it never saw, under a name that follows from this file, the judge's,
the world's, the subject's look and the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitgen_cli.demo import world
from bitgen_cli.demo.world import Look, Scene
from bitgen_cli.engine.data import to_float, to_tensor, to_uint8
from bitgen_cli.engine.model_folder import Model
from bitgen_cli.engine.scales import schedule
from bitgen_cli.files import atomic_path
from tests.benchmarks import judge as judging
from tests.benchmarks.judge import SIDE

PHOTO_SIDE = 256
"""Pixels along a photo's side: more than the demo model draws, so that photos have to be reduced as real ones have."""

SEED = 990_001
"""Of the recognisers' pictures; far from the seeds that models and the judge are trained and tested on."""

STEPS = 300
BATCH = 96
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
WRONG_BITS = 0.04
"""Share of bits turned over in the reconstructions with wrong bits."""
APART = 110.0
"""Distance in RGB from which on two colours are told apart even after the tokenizer."""

POSITIVES_BAR, NEGATIVES_BAR = 0.97, 0.02
"""What a recogniser must reach on reconstructions before its answers are worth printing."""


@dataclass(frozen=True)
class Sitter:
    """A subject of the benchmark.

    Attributes:
        name: it is registered under.
        object_class: of the world's `LOOK_CLASSES`.
        look: what makes it itself.
        photo_places: where its photos were taken, one on each.
        seed: of its photos.
    """

    name: str
    object_class: str
    look: Look
    photo_places: tuple[str, ...]
    seed: int

    @property
    def other_places(self) -> tuple[str, ...]:
        """The places no photo shows."""
        return tuple(place for place in world.PLACES if place not in self.photo_places)

    def photos(self) -> list[Image.Image]:
        """A picture on each of `photo_places`, RGB, PHOTO_SIDE pixels square."""
        return [self._photo(place) for place in self.photo_places]

    def _photo(self, place: str) -> Image.Image:
        scene = Scene(self.object_class, _ANY_COLOUR, place)
        return world.draw(scene, _random(self.seed, place), PHOTO_SIDE, self.look)

    def write_photos(self, folder: Path) -> list[Path]:
        """Writes the photos, JPEG and PNG in turn, without captions, into a new folder; returns the files."""
        folder.mkdir(parents=True)
        files = []
        for number, photo in enumerate(self.photos()):
            files.append(folder / f"photo-{number + 1}{'.png' if number % 2 else '.jpg'}")
            photo.save(files[-1], quality=92)
        return files


SITTERS: dict[str, tuple[Sitter, ...]] = {
    "test": (
        Sitter("rex", "dog", Look((244, 240, 226), (40, 38, 44), (216, 40, 40)), ("grass", "room", "beach", "city"), 1),
        Sitter("tom", "cat", Look((245, 150, 50), (250, 246, 238), (40, 90, 220)), ("room", "snow", "road", "moon"), 2),
        Sitter(
            "bolt", "robot", Look((50, 165, 70), (250, 215, 50), (150, 50, 190)), ("city", "desert", "grass", "sky"), 3
        ),
    ),
    "tuning": (
        Sitter(
            "fido", "dog", Look((150, 98, 56), (250, 236, 205), (50, 170, 70)), ("road", "snow", "desert", "sky"), 11
        ),
        Sitter(
            "felix",
            "cat",
            Look((44, 44, 50), (244, 244, 240), (250, 215, 50)),
            ("beach", "grass", "underwater", "city"),
            12,
        ),
        Sitter(
            "chip", "robot", Look((240, 240, 240), (214, 40, 40), (34, 34, 40)), ("moon", "room", "beach", "road"), 13
        ),
    ),
}
"""Settings are chosen on `tuning`, bars are measured on `test`: other looks, places and seeds."""

_ANY_COLOUR = "red"
"""A look is drawn the same whatever the scene's colour."""

KINDS = ("subject", "class", "other looks", "near looks", "other classes")
"""What recognisers are shown; only the first is a yes. `near looks` differ from the subject in one part alone."""
TRAINING_PICTURES = dict(zip(KINDS, (700, 300, 250, 250, 100), strict=True))
TEST_PICTURES = dict(zip(KINDS, (300, 300, 100, 100, 50), strict=True))


def differ(a: world.Rgb, b: world.Rgb) -> bool:
    """Whether two colours are clearly apart."""
    return math.dist(a, b) >= APART


def other_look(look: Look, rng: random.Random) -> Look:
    """A look of which at least two parts are clearly others."""
    while True:
        other = Look(*(_colour(rng) for _ in range(3)))
        if sum(differ(a, b) for a, b in zip(astuple(look), astuple(other), strict=True)) >= 2:
            return other


def near_look(look: Look, rng: random.Random) -> Look:
    """The look with one part in another colour, or without patches, or without its accessory."""
    parts = ["coat", "patches", "accessory"]
    part = rng.choice(parts)
    while True:
        missing = part != "coat" and rng.random() < 0.5
        colour = look.coat if missing else _colour(rng)
        if missing or differ(colour, getattr(look, part)):
            return Look(**{**{name: getattr(look, name) for name in parts}, part: colour})


def _colour(rng: random.Random) -> world.Rgb:
    """A colour of the world's or any other."""
    if rng.random() < 0.5:
        return rng.choice(list(world.COLOURS.values()))
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _random(seed: int, what: object) -> random.Random:
    return random.Random(f"subjects:{seed}:{what}")


def draw_kind(sitter: Sitter, kind: str, count: int, seed: int) -> Tensor:
    """Pictures (count, 3, SIDE, SIDE) uint8 of one of KINDS, on all places alike."""
    others = [name for name in world.CLASSES if name != sitter.object_class]
    colours = list(world.COLOURS)
    drawn = []
    for number in range(count):
        rng = _random(seed, f"{kind}:{number}")
        place = world.PLACES[number % len(world.PLACES)]
        colour = colours[number // len(world.PLACES) % len(colours)]
        scene, look = Scene(sitter.object_class, colour, place), None
        if kind == "subject":
            look = sitter.look
        elif kind == "other looks":
            look = other_look(sitter.look, rng)
        elif kind == "near looks":
            look = near_look(sitter.look, rng)
        elif kind == "other classes":
            scene = Scene(others[number % len(others)], colour, place)
            same = (sitter.look.coat, sitter.look.patches, sitter.look.accessory)
            look = Look(*same) if scene.object_class in world.LOOK_CLASSES else None
        drawn.append(to_tensor(world.draw(scene, rng, SIDE, look), (SIDE, SIDE)))
    return torch.stack(drawn)


@torch.inference_mode()
def reconstruct(model: Model, pixels: Tensor, wrong_bits: float = 0.0, rng: torch.Generator | None = None) -> Tensor:
    """Pictures (B, 3, h, w) uint8 through the model's tokenizer and back, some bits turned over on the way."""
    assert model.tokenizer is not None
    sizes = schedule(model.config.scales, patchify=model.config.transformer.patchify)
    side = sizes.pixels(model.config.tokenizer.patch_size)[0]
    shown = []
    for part in torch.split(pixels, 50):
        image = to_float(part)
        if image.shape[-1] != side:
            image = F.interpolate(image, (side, side), mode="bilinear", antialias=True)
        bits, total = model.tokenizer.encode(image, sizes)
        if wrong_bits:
            bits = [scale ^ (torch.rand(scale.shape, generator=rng) < wrong_bits) for scale in bits]
            shown.append(to_uint8(model.tokenizer.decode_bits(bits, sizes)))
        else:
            shown.append(to_uint8(model.tokenizer.decode(total)))
    return torch.cat(shown)


class Recogniser(nn.Module):
    """Four convolutions and one linear layer: one answer, or one for each class.

    Args:
        answers: 1 for the recogniser of a subject.
    """

    def __init__(self, answers: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *judging._block(3, 24, 4, 2, 1),
            *judging._block(24, 40, 3, 2, 1),
            *judging._block(40, 56, 3, 1, 1),
            nn.MaxPool2d(2),
            *judging._block(56, 80, 3, 1, 1),
        )
        self.head = nn.Linear(2 * 80, answers)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, answers) of images (B, 3, SIDE, SIDE) in [-1, 1]; a single one is positive for the subject."""
        found = self.features(image)
        answer: Tensor = self.head(torch.cat([found.mean((2, 3)), found.amax((2, 3))], dim=1))
        return answer

    def says_yes(self, pixels: Tensor) -> Tensor:
        """(B,) bool of pictures (B, 3, h, w) uint8 of any square size, by a recogniser of one answer."""
        return self._logits(pixels)[:, 0] > 0

    def names(self, pixels: Tensor) -> Tensor:
        """(B,) indices in `world.CLASSES`, by a recogniser with an answer for each class."""
        return self._logits(pixels).argmax(1)

    @torch.inference_mode()
    def _logits(self, pixels: Tensor) -> Tensor:
        found = []
        for part in torch.split(pixels, 200):
            image = to_float(part)
            if image.shape[-1] != SIDE:
                image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
            found.append(self(image))
        return torch.cat(found)


@dataclass(frozen=True)
class TrainedRecogniser:
    """A recogniser ready for use.

    Attributes:
        recogniser: in evaluation mode.
        yes: share of each of KINDS it says yes to, on reconstructions of pictures it never saw.
    """

    recogniser: Recogniser
    yes: dict[str, float]

    @property
    def trustworthy(self) -> bool:
        """Whether it knows the subject and does not take its class for it."""
        return self.yes["subject"] >= POSITIVES_BAR and self.yes["class"] <= NEGATIVES_BAR


@dataclass(frozen=True)
class TrainedNamer:
    """A recogniser of classes ready for use.

    Attributes:
        namer: in evaluation mode, with an answer for each of `world.CLASSES`.
        right: share it names right, on reconstructions it never saw, of `plain` things and of random `looks`.
    """

    namer: Recogniser
    right: dict[str, float]


Say = Callable[[str], None]


def load_or_train(sitter: Sitter, model: Model, say: Say) -> TrainedRecogniser:
    """The subject's recogniser from the cache, or a newly trained one, which the cache then holds.

    Args:
        sitter: who is recognised.
        model: its tokenizer makes the reconstructions.
        say: gets progress.
    """

    def make() -> tuple[Recogniser, dict[str, float]]:
        drawn = torch.cat([draw_kind(sitter, kind, count, SEED) for kind, count in TRAINING_PICTURES.items()])
        wanted = torch.arange(len(drawn)) < TRAINING_PICTURES[KINDS[0]]
        recogniser = _train(sitter.name, Recogniser(), drawn, wanted, model, say)
        yes = {}
        for kind, count in TEST_PICTURES.items():
            pixels = reconstruct(model, draw_kind(sitter, kind, count, SEED + 1))
            yes[kind] = float(recogniser.says_yes(pixels).float().mean())
        return recogniser, yes

    key = [sitter.object_class, astuple(sitter.look), model.fingerprints["tokenizer"]]
    return TrainedRecogniser(*_cached(f"recogniser-{sitter.name}", key, Recogniser(), make))


def load_or_train_namer(model: Model, say: Say) -> TrainedNamer:
    """Who names classes whatever the look, from the cache or newly trained.

    The judge saw plain things alone and takes dogs and cats with patches for other classes.
    """

    def make() -> tuple[Recogniser, dict[str, float]]:
        plain, looks = (_draw_classes(SEED + 2, which) for which in (False, True))
        drawn, wanted = (torch.cat(parts) for parts in zip(plain, looks, strict=True))
        namer = _train("namer", Recogniser(len(world.CLASSES)), drawn, wanted, model, say)
        right = {}
        for name, which in (("plain", False), ("looks", True)):
            pixels, classes = _draw_classes(SEED + 3, which, rounds=1)
            right[name] = float((namer.names(reconstruct(model, pixels)) == classes).float().mean())
        return namer, right

    key = [model.fingerprints["tokenizer"]]
    return TrainedNamer(*_cached("namer", key, Recogniser(len(world.CLASSES)), make))


def _draw_classes(seed: int, looks: bool, rounds: int = 2) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, SIDE, SIDE) and their classes (B,): of all classes, or of random looks of those that have any."""
    drawn, wanted = [], []
    for name in world.LOOK_CLASSES if looks else world.CLASSES:
        for number in range(rounds * (200 if looks else 60)):
            rng = _random(seed, f"{name}:{looks}:{number}")
            scene = Scene(name, rng.choice(list(world.COLOURS)), world.PLACES[number % len(world.PLACES)])
            look = Look(*(_colour(rng) for _ in range(3))) if looks else None
            drawn.append(to_tensor(world.draw(scene, rng, SIDE, look), (SIDE, SIDE)))
            wanted.append(world.CLASSES.index(name))
    return torch.stack(drawn), torch.tensor(wanted)


def _cached(
    name: str, key: object, empty: Recogniser, make: Callable[[], tuple[Recogniser, dict[str, float]]]
) -> tuple[Recogniser, dict[str, float]]:
    """A recogniser in evaluation mode and what it gets right, from the cache, else made and put there."""
    code = b"".join(Path(file).read_bytes() for file in (__file__, judging.__file__, world.__file__))
    digest = hashlib.sha256(code + json.dumps(key).encode()).hexdigest()[:16]
    file = Path(platformdirs.user_cache_dir("bitgen")) / f"{name}-{digest}.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as stored:
            empty.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
            shares = json.loads(stored.metadata()["shares"])
        empty.eval()
        return empty, shares
    made, shares = make()
    with atomic_path(file) as temporary:
        state = {name: value.contiguous() for name, value in made.state_dict().items()}
        save_file(state, temporary, {"shares": json.dumps(shares)})
    return made, shares


def _train(name: str, network: Recogniser, drawn: Tensor, wanted: Tensor, model: Model, say: Say) -> Recogniser:
    """The network trained from scratch, in evaluation mode.

    Args:
        name: progress is told under.
        network: gives its shape; its weights are drawn anew.
        drawn: pictures (N, 3, SIDE, SIDE) uint8.
        wanted: (N,) bool for one answer, classes otherwise.
        model: its tokenizer makes the reconstructions.
        say: gets progress.
    """
    started = time.perf_counter()
    rng = torch.Generator().manual_seed(SEED)
    pictures = torch.stack([drawn, reconstruct(model, drawn), reconstruct(model, drawn, WRONG_BITS, rng)])
    say(f"{name}: {len(drawn)} pictures are ready after {time.perf_counter() - started:.0f} s")
    answers = network.head.out_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        trained: Recogniser = Recogniser(answers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.15)
    losses: list[float] = []
    for step in range(STEPS):
        chosen = torch.randint(len(drawn), (BATCH,), generator=rng)
        version = torch.randint(len(pictures), (BATCH,), generator=rng)
        image = judging._worsen(to_float(pictures[version, chosen]), rng)
        found = trained(image.contiguous(memory_format=torch.channels_last))
        if answers == 1:
            loss = F.binary_cross_entropy_with_logits(found[:, 0], wanted[chosen].float())
        else:
            loss = F.cross_entropy(found, wanted[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            say(f"{name}: step {step + 1}/{STEPS}, loss {sum(losses[-100:]) / 100:.3f}")
    trained.eval()
    return trained


def find_sitters(split: str, classes: Sequence[str]) -> list[Sitter]:
    """The subjects of a split, of these classes, in this order."""
    by_class = {sitter.object_class: sitter for sitter in SITTERS[split]}
    return [by_class[name] for name in classes]
