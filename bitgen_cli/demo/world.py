"""The demo world: small pictures of things in places, with captions, all from a seed.

14 object classes x 10 colours x 10 places, drawn with Pillow at four times the size and reduced. The built-in model is
trained on it; a tenth of the class-colour-place triples is held out so that what it draws for them was never shown.

An object is drawn in its own coordinates: about -1 ... 1 from its centre, y downwards, scaled to the picture. Places
draw on the unit square.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageOps

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (214, 36, 36),
    "orange": (250, 140, 20),
    "yellow": (248, 218, 40),
    "green": (44, 160, 60),
    "blue": (38, 84, 220),
    "purple": (128, 48, 184),
    "pink": (250, 142, 192),
    "white": (246, 246, 246),
    "black": (34, 34, 38),
    "brown": (116, 70, 36),
}
PLACES = ("moon", "beach", "grass", "snow", "city", "desert", "underwater", "room", "sky", "road")
FLOATING = ("underwater", "sky")
"""Places without a ground to stand on."""

SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What a picture shows; as text the plainest caption, such as "a red dog on the moon"."""

    object_class: str
    colour: str
    place: str

    def __str__(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.object_class} {PLACE_PHRASES[self.place][0]}"


@dataclass(frozen=True)
class Look:
    """What makes one subject of a class itself: its coat, a second coat colour in patches, and an accessory.

    Only classes of `LOOK_CLASSES` have looks.
    """

    coat: Rgb
    patches: Rgb
    accessory: Rgb


@dataclass(frozen=True)
class Picture:
    """One picture of the world with its caption."""

    image: Image.Image
    caption: str
    scene: Scene


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """The colour that is `share` of b and the rest of a."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Paint:
    """The colours an object is drawn in, derived from its main colour."""

    body: Rgb
    shade: Rgb
    light: Rgb
    rim: Rgb
    eye: Rgb
    look: Look | None

    @staticmethod
    def of(body: Rgb, look: Look | None) -> Paint:
        dark = sum(body) < 150
        return Paint(
            body=body,
            shade=(74, 74, 82) if dark else mix(body, BLACK, 0.3),
            light=mix(body, WHITE, 0.4) if sum(body) < 690 else (214, 216, 222),
            rim=(168, 168, 178) if dark else mix(body, BLACK, 0.68),
            eye=(250, 250, 250) if dark else (20, 20, 20),
            look=look,
        )


class Pen:
    """Draws in an object's coordinates: turned, scaled, and moved to its centre.

    With a `rim` colour everything is drawn in that colour and a little larger: the silhouette behind the object, which
    sets it off from any background.
    """

    def __init__(self, image: Image.Image, centre: Point, scale: float, angle: float) -> None:
        self._draw = ImageDraw.Draw(image)
        self._centre = centre
        self._scale = scale
        self._cos, self._sin = math.cos(angle), math.sin(angle)
        self.rim: Rgb | None = None

    def _place(self, points: Sequence[Point]) -> list[Point]:
        placed = []
        for x, y in points:
            placed.append(
                (
                    self._centre[0] + self._scale * (x * self._cos - y * self._sin),
                    self._centre[1] + self._scale * (x * self._sin + y * self._cos),
                )
            )
        return placed

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        placed = self._place(points)
        if self.rim is None:
            self._draw.polygon(placed, fill=colour)
        else:
            self._draw.polygon(placed, fill=self.rim)
            self._draw.line([*placed, placed[0], placed[1]], self.rim, max(2, round(0.1 * self._scale)), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb, angle: float = 0.0) -> None:
        cos, sin = math.cos(angle), math.sin(angle)
        points = [
            (x + rx * c * cos - ry * s * sin, y + rx * c * sin + ry * s * cos) for c, s in _CIRCLE
        ]
        self.polygon(points, colour)

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        placed = self._place(points)
        if self.rim is not None:
            colour, width = self.rim, width + 0.1
        pixels = max(1, round(width * self._scale))
        self._draw.line(placed, fill=colour, width=pixels, joint="curve")
        for x, y in (placed[0], placed[-1]):
            r = pixels / 2
            self._draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)


_CIRCLE = [(math.cos(2 * math.pi * i / 26), math.sin(2 * math.pi * i / 26)) for i in range(26)]

DrawObject = Callable[[Pen, Paint, float], None]
OBJECTS: dict[str, DrawObject] = {}
LOOK_CLASSES = ("dog", "cat", "robot")


def _object(draw: DrawObject) -> DrawObject:
    OBJECTS[draw.__name__] = draw
    return draw


@_object
def dog(pen: Pen, paint: Paint, sway: float) -> None:
    """From the side, tail up; `sway` moves legs and tail."""
    coat = paint.look.patches if paint.look else paint.shade
    pen.line([(-0.62, -0.1), (-0.94, -0.55 + 0.1 * sway)], 0.18, coat)
    for i, x in enumerate((-0.58, -0.34, 0.2, 0.44)):
        step = 0.1 * sway * (1 if i % 2 else -1)
        pen.line([(x, 0.2), (x + step, 0.8)], 0.2, paint.shade if i % 2 else paint.body)
    pen.ellipse(-0.06, 0.1, 0.7, 0.38, paint.body)
    if paint.look:
        pen.ellipse(-0.36, 0.02, 0.26, 0.24, paint.look.patches)
        pen.ellipse(0.12, 0.2, 0.16, 0.16, paint.look.patches)
    pen.ellipse(0.54, -0.38, 0.38, 0.36, paint.body)
    pen.ellipse(0.84, -0.25, 0.25, 0.19, paint.light)
    pen.ellipse(1.02, -0.32, 0.1, 0.09, (20, 20, 20) if paint.rim[0] < 150 else (240, 240, 240))
    pen.ellipse(0.3, -0.3, 0.17, 0.38, coat, 0.25)
    pen.ellipse(0.64, -0.48, 0.08, 0.09, paint.eye)
    if paint.look:
        pen.line([(0.22, 0.0), (0.46, 0.1), (0.76, 0.02)], 0.2, paint.look.accessory)
        pen.line([(0.34, 0.08), (0.26, 0.46)], 0.2, paint.look.accessory)


@_object
def cat(pen: Pen, paint: Paint, sway: float) -> None:
    """Sitting, from the front, ears up, tail curled; `sway` moves the tail."""
    pen.line([(0.4, 0.74), (0.86, 0.6), (0.88, 0.1 + 0.12 * sway), (0.7, -0.14 + 0.12 * sway)], 0.18, paint.shade)
    pen.ellipse(0, 0.42, 0.5, 0.52, paint.body)
    if paint.look:
        pen.ellipse(-0.22, 0.42, 0.2, 0.3, paint.look.patches)
        pen.ellipse(0.28, 0.6, 0.16, 0.2, paint.look.patches)
    pen.ellipse(-0.22, 0.86, 0.2, 0.12, paint.light)
    pen.ellipse(0.22, 0.86, 0.2, 0.12, paint.light)
    ear = paint.look.patches if paint.look else paint.body
    for side in (-1, 1):
        pen.polygon([(side * 0.5, -0.3), (side * 0.5, -1.0), (side * 0.02, -0.62)], ear)
        pen.polygon([(side * 0.4, -0.5), (side * 0.41, -0.82), (side * 0.17, -0.62)], (244, 150, 170))
    pen.ellipse(0, -0.28, 0.52, 0.43, paint.body)
    for side in (-1, 1):
        pen.ellipse(side * 0.2, -0.34, 0.1, 0.13, paint.eye)
    pen.ellipse(0, -0.12, 0.09, 0.07, (240, 110, 135))
    if paint.look:
        pen.line([(-0.4, 0.1), (0, 0.2), (0.4, 0.1)], 0.18, paint.look.accessory)


@_object
def bird(pen: Pen, paint: Paint, sway: float) -> None:
    """Standing, from the side, one wing up; `sway` moves the wing."""
    leg = (230, 140, 30)
    pen.line([(-0.08, 0.36), (-0.08, 0.82)], 0.1, leg)
    pen.line([(0.18, 0.36), (0.18, 0.82)], 0.1, leg)
    pen.polygon([(-0.36, 0.0), (-1.0, -0.28), (-0.95, 0.22)], paint.shade)
    pen.ellipse(0, 0.06, 0.6, 0.4, paint.body, -0.15)
    pen.ellipse(0.48, -0.34, 0.32, 0.31, paint.body)
    pen.polygon([(0.72, -0.5), (1.1, -0.3), (0.72, -0.16)], (250, 170, 30))
    pen.ellipse(0.56, -0.42, 0.08, 0.09, paint.eye)
    pen.polygon([(0.22, -0.02), (-0.34, 0.06), (-0.6, -0.72 - 0.18 * sway), (-0.14, -0.46 - 0.18 * sway)], paint.shade)


@_object
def fish(pen: Pen, paint: Paint, sway: float) -> None:
    """From the side, tail and back fin; `sway` bends the tail."""
    pen.polygon([(-0.46, 0), (-1.0, -0.54 + 0.12 * sway), (-0.84, 0), (-1.0, 0.54 + 0.12 * sway)], paint.shade)
    pen.polygon([(-0.25, -0.28), (0.02, -0.74), (0.4, -0.28)], paint.shade)
    pen.polygon([(-0.1, 0.3), (0.0, 0.62), (0.25, 0.3)], paint.shade)
    pen.ellipse(0.12, 0, 0.76, 0.45, paint.body)
    for x in (-0.2, 0.1):
        pen.line([(x, -0.28), (x + 0.07, 0), (x, 0.28)], 0.1, paint.light)
    pen.ellipse(0.54, -0.1, 0.14, 0.15, (255, 255, 255))
    pen.ellipse(0.57, -0.1, 0.07, 0.08, (10, 10, 10))


@_object
def car(pen: Pen, paint: Paint, sway: float) -> None:
    """From the side, two windows, two wheels; `sway` moves the roof."""
    glass, roof = (190, 226, 246), 0.06 * sway
    pen.polygon([(-0.62, 0.0), (-0.38 + roof, -0.6), (0.34 + roof, -0.6), (0.66, 0.0)], paint.body)
    pen.polygon([(-0.42, -0.06), (-0.27 + roof, -0.46), (-0.06 + roof, -0.46), (-0.06, -0.06)], glass)
    pen.polygon([(0.08, -0.06), (0.08 + roof, -0.46), (0.27 + roof, -0.46), (0.48, -0.06)], glass)
    pen.polygon([(-1, 0.38), (-1, 0.02), (-0.85, -0.07), (0.78, -0.07), (1.02, 0.08), (1.02, 0.38)], paint.body)
    pen.rectangle(-1, 0.24, 1.02, 0.38, paint.shade)
    pen.ellipse(0.93, 0.1, 0.09, 0.09, (255, 245, 150))
    for x in (-0.55, 0.56):
        pen.ellipse(x, 0.4, 0.27, 0.27, (30, 30, 34))
        pen.ellipse(x, 0.4, 0.12, 0.12, (200, 200, 205))


@_object
def house(pen: Pen, paint: Paint, sway: float) -> None:
    """Gable roof, chimney, door, two windows; `sway` moves the chimney."""
    pen.rectangle(0.36 + 0.06 * sway, -0.86, 0.58 + 0.06 * sway, -0.3, (110, 74, 66))
    pen.rectangle(-0.7, -0.12, 0.7, 0.84, paint.body)
    pen.polygon([(-0.94, -0.08), (0, -0.94), (0.94, -0.08)], paint.shade)
    pen.rectangle(-0.16, 0.3, 0.16, 0.84, (98, 62, 36))
    for x in (-0.44, 0.44):
        pen.rectangle(x - 0.16, 0.1, x + 0.16, 0.42, (255, 240, 150))


@_object
def tree(pen: Pen, paint: Paint, sway: float) -> None:
    """A trunk under a round crown; `sway` bends the crown."""
    lean = 0.06 * sway
    pen.polygon([(-0.17, 0.95), (-0.12, 0.0), (0.12, 0.0), (0.17, 0.95)], (112, 72, 40))
    pen.ellipse(-0.38 + lean, -0.08, 0.42, 0.38, paint.shade)
    pen.ellipse(0.38 + lean, -0.08, 0.42, 0.38, paint.shade)
    pen.ellipse(lean, -0.46, 0.56, 0.5, paint.body)
    pen.ellipse(lean, -0.06, 0.46, 0.34, paint.body)
    pen.ellipse(lean - 0.18, -0.58, 0.18, 0.15, paint.light)


@_object
def boat(pen: Pen, paint: Paint, sway: float) -> None:
    """A hull with a mast and two sails; `sway` moves the sails."""
    pen.line([(0, 0.3), (0, -0.92)], 0.1, (112, 74, 42))
    pen.polygon([(0.09, -0.92), (0.09, 0.14), (0.78 + 0.08 * sway, 0.14)], (252, 250, 240))
    pen.polygon([(-0.09, -0.74), (-0.09, 0.14), (-0.6 + 0.08 * sway, 0.14)], (228, 228, 226))
    pen.polygon([(-1, 0.28), (1.02, 0.28), (0.64, 0.8), (-0.64, 0.8)], paint.body)
    pen.polygon([(-1, 0.28), (1.02, 0.28), (0.92, 0.42), (-0.9, 0.42)], paint.shade)


@_object
def ball(pen: Pen, paint: Paint, sway: float) -> None:
    """A ball with light segments and a highlight; `sway` turns the segments."""
    pen.ellipse(0, 0, 0.82, 0.82, paint.body)
    pen.ellipse(0.14 * sway, 0, 0.34, 0.81, paint.light)
    pen.ellipse(0.14 * sway, 0, 0.14, 0.81, paint.body)
    pen.ellipse(-0.4, -0.42, 0.17, 0.12, (255, 255, 255), -0.6)


@_object
def cup(pen: Pen, paint: Paint, sway: float) -> None:
    """A mug with a handle and steam; `sway` moves the steam."""
    pen.ellipse(0.58, 0.1, 0.36, 0.38, paint.shade)
    pen.ellipse(0.58, 0.1, 0.18, 0.2, paint.light)
    pen.polygon([(-0.66, -0.46), (0.66, -0.46), (0.5, 0.82), (-0.5, 0.82)], paint.body)
    pen.ellipse(0, -0.46, 0.66, 0.18, paint.shade)
    pen.ellipse(0, -0.45, 0.53, 0.12, (92, 54, 28))
    for x in (-0.22, 0.2):
        pen.line([(x, -0.7), (x + 0.1 * sway, -0.84), (x, -0.98)], 0.09, (236, 236, 240))


@_object
def flower(pen: Pen, paint: Paint, sway: float) -> None:
    """Six petals on a stem with two leaves; `sway` turns the petals."""
    pen.line([(0, 0), (0.04, 0.95)], 0.13, (40, 132, 52))
    pen.ellipse(0.28, 0.58, 0.28, 0.13, (60, 152, 62), -0.5)
    pen.ellipse(-0.22, 0.72, 0.26, 0.12, (60, 152, 62), 0.5)
    for i in range(6):
        angle = sway + i * math.pi / 3
        petal = paint.body if i % 2 else mix(paint.body, paint.shade, 0.4)
        pen.ellipse(0.42 * math.cos(angle), -0.36 + 0.42 * math.sin(angle), 0.3, 0.22, petal, angle)
    golden = paint.body[0] > 200 and 120 < paint.body[1] < 235 and paint.body[2] < 100
    pen.ellipse(0, -0.36, 0.25, 0.25, (140, 86, 30) if golden else (250, 206, 50))


@_object
def robot(pen: Pen, paint: Paint, sway: float) -> None:
    """A box with a box for a head, an antenna, arms and legs; `sway` moves the arms."""
    steel = (150, 150, 160)
    pen.line([(0, -0.6), (0, -0.96)], 0.09, steel)
    pen.ellipse(0, -0.96, 0.11, 0.11, (255, 70, 70))
    pen.line([(-0.56, -0.04), (-0.86, 0.3 + 0.26 * sway)], 0.2, steel)
    pen.line([(0.56, -0.04), (0.86, 0.3 - 0.26 * sway)], 0.2, steel)
    pen.rectangle(-0.38, 0.46, -0.1, 0.94, steel)
    pen.rectangle(0.1, 0.46, 0.38, 0.94, steel)
    pen.rectangle(-0.44, -0.78, 0.44, -0.2, paint.body)
    pen.rectangle(-0.34, -0.64, 0.34, -0.36, (30, 36, 48))
    for x in (-0.17, 0.17):
        pen.ellipse(x, -0.5, 0.11, 0.11, (110, 245, 255))
    pen.rectangle(-0.52, -0.14, 0.52, 0.5, paint.body)
    panel = paint.look.patches if paint.look else paint.shade
    pen.rectangle(-0.3, 0.0, 0.3, 0.32, panel)
    if paint.look:
        pen.rectangle(-0.52, -0.2, 0.52, -0.06, paint.look.accessory)
        pen.polygon([(0.1, -0.1), (0.4, -0.1), (0.4, 0.4), (0.2, 0.4)], paint.look.accessory)
    else:
        pen.ellipse(-0.12, 0.16, 0.09, 0.09, (255, 220, 60))
        pen.ellipse(0.14, 0.16, 0.09, 0.09, (90, 240, 110))


@_object
def rocket(pen: Pen, paint: Paint, sway: float) -> None:
    """Upright, with fins, a porthole and a flame; `sway` moves the flame."""
    pen.polygon([(-0.2, 0.56), (0.1 * sway, 0.98), (0.2, 0.56)], (255, 172, 30))
    pen.polygon([(-0.3, 0.06), (-0.72, 0.78), (-0.26, 0.62)], paint.shade)
    pen.polygon([(0.3, 0.06), (0.72, 0.78), (0.26, 0.62)], paint.shade)
    hull = [(0, -1.02), (-0.24, -0.72), (-0.37, -0.3), (-0.37, 0.3), (-0.26, 0.66)]
    pen.polygon([*hull, *((-x, y) for x, y in reversed(hull))], paint.body)
    pen.polygon([(0, -1.02), (-0.24, -0.72), (-0.3, -0.54), (0.3, -0.54), (0.24, -0.72)], paint.shade)
    pen.ellipse(0, -0.16, 0.23, 0.23, (228, 228, 232))
    pen.ellipse(0, -0.16, 0.15, 0.15, (90, 180, 240))


@_object
def mushroom(pen: Pen, paint: Paint, sway: float) -> None:
    """A dotted cap on a pale stem; `sway` moves the dots."""
    pen.polygon([(-0.24, 0.0), (0.24, 0.0), (0.32, 0.86), (-0.32, 0.86)], (242, 230, 206))
    angles = [math.pi + math.pi * i / 20 for i in range(21)]
    dome = [(0.9 * math.cos(angle), 0.14 + 0.92 * math.sin(angle)) for angle in angles]
    pen.polygon(dome, paint.body)
    pen.ellipse(0, 0.12, 0.9, 0.14, paint.shade)
    for x, y, r in ((-0.44, -0.24, 0.16), (0.08, -0.5, 0.18), (0.5, -0.18, 0.14)):
        pen.ellipse(x + 0.06 * sway, y, r, r * 0.85, paint.light)


CLASSES = tuple(OBJECTS)


class Canvas:
    """A square picture that places draw on, in unit coordinates, y downwards."""

    def __init__(self, width: int, rng: random.Random) -> None:
        self.width = width
        self.rng = rng
        self.image = Image.new("RGB", (width, width))
        self._draw = ImageDraw.Draw(self.image)

    def near(self, colour: Rgb, by: int = 8) -> Rgb:
        """A colour at random near the given one."""
        red, green, blue = (max(0, min(255, c + self.rng.randint(-by, by))) for c in colour)
        return red, green, blue

    def gradient(self, top: float, bottom: float, upper: Rgb, lower: Rgb) -> None:
        """Fills a band of the whole width, from colour to colour."""
        first, last = round(top * self.width), round(bottom * self.width)
        share = np.linspace(0, 1, max(1, last - first))[:, None]
        column = (np.array(upper) * (1 - share) + np.array(lower) * share).astype(np.uint8)
        band = np.broadcast_to(column[:, None], (len(column), self.width, 3))
        self.image.paste(Image.fromarray(np.ascontiguousarray(band)), (0, first))

    def sky_and_ground(self, horizon: float, sky: tuple[Rgb, Rgb], ground: tuple[Rgb, Rgb]) -> None:
        self.gradient(0, horizon, self.near(sky[0]), self.near(sky[1]))
        self.gradient(horizon, 1, self.near(ground[0]), self.near(ground[1]))

    def rectangle(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        w = self.width
        self._draw.rectangle([left * w, top * w, right * w, bottom * w], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        w = self.width
        self._draw.ellipse([(x - rx) * w, (y - ry) * w, (x + rx) * w, (y + ry) * w], fill=colour)

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        self._draw.polygon([(x * self.width, y * self.width) for x, y in points], fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        placed = [(x * self.width, y * self.width) for x, y in points]
        self._draw.line(placed, fill=colour, width=max(1, round(width * self.width)), joint="curve")

    def cloud(self, x: float, y: float, size: float) -> None:
        for offset in (-0.09, 0.0, 0.09):
            self.ellipse(x + offset * size, y + abs(offset) * 0.3 * size, 0.09 * size, 0.055 * size, (252, 253, 255))

    def side(self) -> float:
        """An x near the left or the right edge, where the object seldom hides what stands there."""
        return self.rng.choice((self.rng.uniform(0.08, 0.2), self.rng.uniform(0.8, 0.92)))


DrawPlace = Callable[[Canvas, float], None]
_PLACE_DRAWINGS: dict[str, DrawPlace] = {}


def _place(draw: DrawPlace) -> DrawPlace:
    _PLACE_DRAWINGS[draw.__name__] = draw
    return draw


@_place
def moon(canvas: Canvas, horizon: float) -> None:
    """Black sky with stars and the Earth, grey ground with craters."""
    rng = canvas.rng
    canvas.sky_and_ground(horizon, ((6, 6, 22), (22, 22, 50)), ((178, 178, 184), (132, 132, 140)))
    for _ in range(7):
        canvas.ellipse(rng.random(), rng.random() * horizon * 0.9, 0.011, 0.011, (255, 255, 240))
    x = canvas.side()
    canvas.ellipse(x, 0.15, 0.1, 0.1, (50, 110, 210))
    canvas.ellipse(x - 0.03, 0.12, 0.045, 0.035, (70, 170, 90))
    canvas.ellipse(x + 0.03, 0.19, 0.045, 0.03, (70, 170, 90))
    for _ in range(4):
        x, y, r = rng.random(), rng.uniform(horizon + 0.06, 0.97), rng.uniform(0.06, 0.11)
        canvas.ellipse(x, y, r, r * 0.38, (108, 108, 116))
        canvas.ellipse(x, y + 0.01, r * 0.8, r * 0.26, (146, 146, 152))


@_place
def beach(canvas: Canvas, horizon: float) -> None:
    """Sun, sea and sand."""
    canvas.sky_and_ground(horizon, ((110, 190, 245), (190, 228, 250)), ((240, 216, 150), (226, 190, 116)))
    canvas.rectangle(0, horizon - 0.15, 1, horizon, canvas.near((28, 130, 190)))
    canvas.rectangle(0, horizon - 0.02, 1, horizon + 0.02, (240, 250, 252))
    canvas.ellipse(canvas.side(), 0.14, 0.09, 0.09, (255, 236, 110))


@_place
def grass(canvas: Canvas, horizon: float) -> None:
    """A meadow with a hill and a cloud."""
    canvas.sky_and_ground(horizon, ((120, 195, 250), (200, 232, 255)), ((110, 190, 74), (62, 142, 48)))
    canvas.ellipse(canvas.rng.random(), horizon + 0.04, 0.4, 0.13, canvas.near((92, 168, 68)))
    canvas.cloud(canvas.side(), canvas.rng.uniform(0.1, 0.2), 1.0)
    for _ in range(6):
        x, y = canvas.rng.random(), canvas.rng.uniform(horizon + 0.1, 0.98)
        canvas.line([(x, y), (x + 0.014, y - 0.05)], 0.016, (44, 116, 38))


@_place
def snow(canvas: Canvas, horizon: float) -> None:
    """Snow-capped mountains over white ground, a few flakes."""
    rng = canvas.rng
    canvas.sky_and_ground(horizon, ((150, 176, 205), (208, 222, 236)), ((250, 252, 255), (222, 232, 244)))
    for low, high in ((0.0, 0.25), (0.75, 1.0)):
        x, height = rng.uniform(low, high), rng.uniform(0.2, 0.28)
        top = horizon - height
        canvas.polygon([(x - 0.24, horizon), (x, top), (x + 0.24, horizon)], canvas.near((120, 138, 166)))
        cap = top + 0.36 * height
        canvas.polygon([(x - 0.086, cap), (x, top), (x + 0.086, cap)], (252, 252, 255))
    for _ in range(9):
        canvas.ellipse(rng.random(), rng.random(), 0.015, 0.015, (255, 255, 255))


@_place
def city(canvas: Canvas, horizon: float) -> None:
    """Towers with lit windows at night."""
    rng = canvas.rng
    canvas.sky_and_ground(horizon, ((14, 12, 44), (60, 40, 100)), ((66, 66, 76), (42, 42, 50)))
    x = -0.04
    while x < 1:
        width, height = rng.uniform(0.16, 0.22), rng.uniform(0.26, 0.46)
        canvas.rectangle(x, horizon - height, x + width, horizon, canvas.near((34, 34, 62)))
        for column in (x + width * 0.18, x + width * 0.58):
            for row in range(int(height / 0.1)):
                if rng.random() < 0.7:
                    y = horizon - height + 0.03 + row * 0.1
                    canvas.rectangle(column, y, column + width * 0.24, y + 0.05, (252, 216, 100))
        x += width + 0.015


@_place
def desert(canvas: Canvas, horizon: float) -> None:
    """Dunes, a pale sun and a cactus."""
    canvas.sky_and_ground(horizon, ((250, 190, 110), (254, 226, 166)), ((226, 170, 92), (200, 132, 62)))
    canvas.ellipse(canvas.rng.random(), horizon + 0.06, 0.45, 0.12, canvas.near((214, 154, 78)))
    sun = canvas.side()
    canvas.ellipse(sun, 0.15, 0.09, 0.09, (255, 248, 210))
    x, green = 1 - sun, (60, 122, 64)
    canvas.rectangle(x - 0.03, horizon - 0.25, x + 0.03, horizon + 0.04, green)
    canvas.rectangle(x - 0.09, horizon - 0.14, x + 0.03, horizon - 0.09, green)
    canvas.rectangle(x - 0.09, horizon - 0.2, x - 0.045, horizon - 0.09, green)


@_place
def underwater(canvas: Canvas, horizon: float) -> None:
    """Blue water over a sandy bottom, weeds and bubbles."""
    rng = canvas.rng
    canvas.gradient(0, 1, canvas.near((60, 184, 226)), canvas.near((8, 58, 130)))
    canvas.ellipse(rng.random(), 1.06, 0.9, 1.06 - rng.uniform(0.84, 0.9), canvas.near((196, 176, 120)))
    x = canvas.side()
    canvas.line([(x + 0.025 * math.sin(i * 1.3), 1 - 0.05 * i) for i in range(rng.randint(5, 8))], 0.035, (30, 140, 80))
    for _ in range(5):
        r, bx, by = rng.uniform(0.018, 0.03), rng.random(), rng.random() * 0.8
        canvas.ellipse(bx, by, r, r, (176, 230, 248))
        canvas.ellipse(bx, by, r * 0.5, r * 0.5, (80, 180, 220))


@_place
def room(canvas: Canvas, horizon: float) -> None:
    """A wall with a window over floorboards."""
    wall = canvas.near(canvas.rng.choice(((236, 214, 186), (206, 222, 206), (226, 206, 216))), 6)
    canvas.sky_and_ground(horizon, (wall, wall), ((172, 116, 68), (140, 88, 50)))
    for i in range(3):
        y = horizon + (1 - horizon) * (i + 1) / 4
        canvas.line([(0, y), (1, y)], 0.012, (120, 74, 42))
    canvas.rectangle(0, horizon - 0.03, 1, horizon, (246, 240, 230))
    x = canvas.side()
    canvas.rectangle(x - 0.14, 0.08, x + 0.14, 0.38, (250, 246, 240))
    canvas.rectangle(x - 0.115, 0.105, x + 0.115, 0.355, (140, 200, 246))
    canvas.line([(x, 0.1), (x, 0.36)], 0.022, (250, 246, 240))
    canvas.line([(x - 0.12, 0.23), (x + 0.12, 0.23)], 0.022, (250, 246, 240))


@_place
def sky(canvas: Canvas, horizon: float) -> None:
    """Clouds all around."""
    rng = canvas.rng
    canvas.gradient(0, 1, canvas.near((70, 150, 240)), canvas.near((180, 220, 252)))
    for low, high in ((0.02, 0.2), (0.3, 0.7), (0.8, 0.98)):
        canvas.cloud(canvas.side(), rng.uniform(low, high), rng.uniform(1.0, 1.5))


@_place
def road(canvas: Canvas, horizon: float) -> None:
    """Asphalt with a dashed yellow line, a verge, a pale sky."""
    canvas.sky_and_ground(horizon, ((150, 205, 245), (214, 234, 246)), ((120, 170, 84), (90, 140, 64)))
    kerb = horizon + 0.05
    canvas.rectangle(0, kerb, 1, 1, canvas.near((92, 92, 98)))
    canvas.rectangle(0, kerb, 1, kerb + 0.018, (235, 235, 235))
    middle, offset = (kerb + 1) / 2, canvas.rng.random() * 0.28
    for i in range(-1, 4):
        left = i * 0.28 + offset
        canvas.rectangle(left, middle - 0.018, left + 0.16, middle + 0.018, (246, 220, 90))


def draw(scene: Scene, rng: random.Random, size: int = 64, look: Look | None = None) -> Image.Image:
    """A picture of a scene.

    Things face right and stand near the middle, and vary little in size: bits of a scale are predicted independently of
    each other, and what might be anywhere in the picture, either way round, would be drawn a bit of everywhere.

    Args:
        scene: what to draw.
        rng: decides position, size, pose and background; the same state gives the same bytes.
        size: pixels along one side.
        look: draws this subject instead of one of the scene's colour.

    Raises:
        ValueError: the class has no looks.
    """
    if look is not None and scene.object_class not in LOOK_CLASSES:
        raise ValueError(f"{scene.object_class} has no looks; {', '.join(LOOK_CLASSES)} have")
    width = size * SUPERSAMPLING
    canvas = Canvas(width, rng)
    horizon = rng.uniform(0.55, 0.63)
    _PLACE_DRAWINGS[scene.place](canvas, horizon)
    body = canvas.near(look.coat if look else COLOURS[scene.colour])
    scale = rng.uniform(0.34, 0.38)
    x = rng.uniform(0.45, 0.55)
    if scene.place in FLOATING:
        y = rng.uniform(0.45, 0.53)
    else:
        y = min(0.95 - 0.9 * scale, horizon + rng.uniform(0.06, 0.12) - scale * 0.4)
        _shadow(canvas, x, y + 0.86 * scale, scale)
    pen = Pen(canvas.image, (x * width, y * width), scale * width, rng.uniform(-0.05, 0.05))
    paint, sway = Paint.of(body, look), rng.uniform(-1, 1)
    pen.rim = paint.rim
    OBJECTS[scene.object_class](pen, paint, sway)
    pen.rim = None
    OBJECTS[scene.object_class](pen, paint, sway)
    return canvas.image.resize((size, size), Image.Resampling.BOX)


def _shadow(canvas: Canvas, x: float, y: float, scale: float) -> None:
    w = canvas.width
    ground = canvas.image.getpixel((min(w - 1, round(x * w)), min(w - 1, round(y * w))))
    assert isinstance(ground, tuple)
    red, green, blue = ground
    canvas.ellipse(x, y, scale * 0.8, scale * 0.12, mix((red, green, blue), BLACK, 0.28))


CLASS_WORDS: dict[str, tuple[str, ...]] = {
    "dog": ("dog", "puppy", "hound"),
    "cat": ("cat", "kitten", "kitty"),
    "bird": ("bird", "sparrow"),
    "fish": ("fish",),
    "car": ("car", "automobile"),
    "house": ("house", "home", "cottage"),
    "tree": ("tree",),
    "boat": ("boat", "sailboat", "ship"),
    "ball": ("ball",),
    "cup": ("cup", "mug"),
    "flower": ("flower", "blossom"),
    "robot": ("robot", "android"),
    "rocket": ("rocket", "spaceship"),
    "mushroom": ("mushroom", "toadstool"),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    **{colour: (colour,) for colour in COLOURS},
    "red": ("red", "scarlet"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "black": ("black", "dark"),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "moon": ("on the moon", "on the lunar surface", "standing on the moon"),
    "beach": ("on the beach", "at the beach", "by the sea"),
    "grass": ("on the grass", "in a meadow", "in the park"),
    "snow": ("in the snow", "on a snowy mountain", "in winter"),
    "city": ("in the city at night", "in a night city", "in the city"),
    "desert": ("in the desert", "on a sand dune"),
    "underwater": ("underwater", "under the water", "in the ocean"),
    "room": ("in a room", "in the living room", "indoors"),
    "sky": ("in the sky", "among the clouds", "flying in the sky"),
    "road": ("on the road", "on a street", "on the highway"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "moon": ("moon",),
    "beach": ("beach", "sea"),
    "grass": ("grass", "meadow", "park"),
    "snow": ("snow", "winter"),
    "city": ("night city", "city"),
    "desert": ("desert",),
    "underwater": ("underwater", "ocean"),
    "room": ("room", "indoors"),
    "sky": ("sky", "clouds"),
    "road": ("road", "street"),
}
PREFIXES = ("a photo of", "a picture of", "an image of", "a drawing of", "an illustration of")


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption of a scene: synonyms, word orders, sometimes without the colour, the place, or both."""
    noun = _word(CLASS_WORDS[scene.object_class], rng)
    colour = _word(COLOUR_WORDS[scene.colour], rng)
    left_out = rng.random()
    if left_out < 0.13:
        colour = ""
    with_place = not 0.10 <= left_out < 0.19
    thing = f"{colour} {noun}".strip()
    phrase, word = _word(PLACE_PHRASES[scene.place], rng), _word(PLACE_WORDS[scene.place], rng)
    article = rng.choice((_article(thing), _article(thing), _article(thing), "the", "one"))
    order = rng.random()
    if not with_place:
        text = f"{article} {thing}" if order < 0.8 else thing
    elif order < 0.6:
        text = f"{article} {thing} {phrase}"
    elif order < 0.7:
        text = f"{thing}, {word}"
    elif order < 0.8:
        text = f"{phrase}, {article} {thing}"
    elif order < 0.88:
        text = f"{word}, {_article(noun)} {noun}" + (f", {colour}" if colour else "")
    else:
        text = f"{thing} {phrase}"
    if rng.random() < 0.25:
        prefix = rng.choice(PREFIXES)
        if text.startswith(("a ", "an ", "the ", "one ")):
            text = f"{prefix} {text}"
    return _finish(text, rng)


def _finish(text: str, rng: random.Random) -> str:
    if rng.random() < 0.05:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.05 else text


def _word(words: tuple[str, ...], rng: random.Random) -> str:
    """The plain word most often, one of its synonyms otherwise."""
    return words[0] if len(words) == 1 or rng.random() < 0.65 else rng.choice(words[1:])


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def is_held_out(scene: Scene) -> bool:
    """Whether the triple is never trained on: one in ten.

    Every class with every place lacks one colour, every class with every colour one place, and so on, so each pair is
    still seen in nine of ten combinations.
    """
    klass = CLASSES.index(scene.object_class)
    colour = list(COLOURS).index(scene.colour)
    place = PLACES.index(scene.place)
    return (klass * 7 + colour * 3 + place) % 10 == 0


def scenes(held_out: bool) -> list[Scene]:
    """All triples of one part of the split, in a fixed order."""
    every = (Scene(*triple) for triple in product(CLASSES, COLOURS, PLACES))
    return [scene for scene in every if is_held_out(scene) == held_out]


_SPLIT = {held_out: scenes(held_out) for held_out in (False, True)}


def scene_at(index: int, seed: int = 0, held_out: bool = False) -> Scene:
    """The scene of picture `index`, drawn evenly from one part of the split."""
    return _scene(_random(index, seed), held_out)


def caption_at(index: int, seed: int = 0, held_out: bool = False) -> str:
    """The caption of picture `index`, without drawing it."""
    rng = _random(index, seed)
    scene = _scene(rng, held_out)
    return caption(scene, rng)


def picture(index: int, seed: int = 0, size: int = 64, held_out: bool = False, *, flips: bool = False) -> Picture:
    """Picture `index` of the world of that seed; a pure function of its arguments.

    With `flips`, half of the pictures are mirrored: things then face either way. Captions say nothing of it.
    """
    rng = _random(index, seed)
    scene = _scene(rng, held_out)
    text = caption(scene, rng)
    image = draw(scene, rng, size)
    if flips and _random(index, f"{seed}:flip").random() < 0.5:
        image = ImageOps.mirror(image)
    return Picture(image, text, scene)


def _scene(rng: random.Random, held_out: bool) -> Scene:
    return rng.choice(_SPLIT[held_out])


def _random(index: int, seed: int | str) -> random.Random:
    return random.Random(f"{seed}:{index}")
