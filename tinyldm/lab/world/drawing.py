"""How things look: where they stand, their outlines, patterns and marks; as areas of colour, or as line drawings.

All lengths are in picture widths, so that it works at any size. What a whole picture looks like is in styles.py.
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from tinyldm.lab.world.nouns import OUTLINES
from tinyldm.lab.world.things import COLOURS, MARKED, PLACES, Picture, Spot, Thing, arc, choice, corners, moved

SIZE = 64
OVERSAMPLE = 4  # drawn this much larger, then averaged down: antialiasing
MARK = 0.5  # how large a mark is, of its thing


# ---- Where things stand, their masks and patterns


def arrange(picture: Picture, rng: np.random.Generator) -> list[Spot]:
    """A spot for each thing: two stand side by side, one alone where the place and the view say."""

    def angle() -> float:
        return np.radians(rng.uniform(-12, 12))

    if len(picture.things) == 2:
        radii = {"small": (0.115, 0.135), "medium": (0.17, 0.2), "large": (0.21, 0.225)}
        return [
            Spot(x + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.06, 0.06), rng.uniform(*radii[thing.size]), angle())
            for thing, x in zip(picture.things, (0.265, 0.735), strict=True)
        ]
    radii = {"small": (0.125, 0.155), "medium": (0.2, 0.26 if picture.place else 0.31), "large": (0.36, 0.41)}
    size = picture.things[0].size
    radius = rng.uniform(*radii[size])
    x, y = 0.5 + rng.uniform(-1, 1, 2) * {"small": 0.09, "medium": 0.05, "large": 0.02}[size]
    if picture.place:
        step = 0.46 - radius
        dx, dy = PLACES[picture.place]
        x, y = (0.5 + dx * step if dx else x), (0.5 + dy * step if dy else y)
    if picture.view == "close-up":
        x, y, radius = 0.5, 0.5, rng.uniform(0.47, 0.51)
    if picture.view == "cropped":
        dx, dy = PLACES[choice(rng, PLACES)]
        radius = rng.uniform(0.28, 0.34)
        x, y = (0.5 + 0.4 * dx if dx else x), (0.5 + 0.4 * dy if dy else y)
    return [Spot(x, y, radius, angle())]


def shape_mask(thing: Thing, spot: Spot, width: int) -> Image.Image:
    """White where the thing is, black elsewhere: width x width, of mode L."""
    return mask_of(OUTLINES[thing.shape], spot, width)


def mask_of(outlines: list[np.ndarray], spot: Spot, width: int) -> Image.Image:
    """Of the first outline, without the holes that the others are."""
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)
    for i, outline in enumerate(outlines):
        pen.polygon(spot.to_pixels(outline, width), fill=0 if i else 255)
    return mask


def patches(thing: Thing, radius: float) -> list[np.ndarray]:
    """The areas of the second colour in the shape's coordinates; a large thing has more, not much larger ones."""
    pattern = thing.pattern
    if pattern == MARKED:
        return [outline * MARK for outline in OUTLINES[thing.mark][:1]]
    pitch = (0.06 + 0.64 * radius) / radius  # from stripe to stripe: 10 pixels of 64 on a small thing, 14 on a medium
    steps = range(-4, 5)
    if pattern == "striped":
        bar = corners("-1.2,-1 1.2,-1 1.2,1 -1.2,1") * (1, pitch / 4)
        return [moved(bar, 0, pitch * i) for i in steps]
    if pattern == "halved":
        return [corners("0,-1.2 1.2,-1.2 1.2,1.2 0,1.2")]
    if pattern == "dotted":
        dot = arc(0.26 * pitch)[::3]
        return [moved(dot, 0.92 * pitch * (i + j % 2 / 2), 0.8 * pitch * j) for i in steps for j in steps]
    cell = 0.62 * pitch
    square = corners("-1,-1 0,-1 0,0 -1,0") * cell
    return [moved(square, cell * i, cell * j) for i in steps for j in steps if (i + j) % 2 == 0]


def trace(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], fill, width: float) -> None:
    """A closed line with round corners."""
    pen.line([*points, *points[:2]], fill=fill, width=max(1, round(width)), joint="curve")


def paint(canvas: Image.Image, thing: Thing, spot: Spot, colour: tuple, colour2: tuple | None) -> None:
    """The thing as an area of its one or two colours."""
    width = canvas.width
    layer = Image.new("RGB", canvas.size, colour)
    pen = ImageDraw.Draw(layer)
    if thing.pattern == "rimmed":
        for outline in OUTLINES[thing.shape]:
            trace(pen, spot.to_pixels(outline, width), colour2, 2 * rim(spot) * width)
    elif thing.pattern:
        for patch in patches(thing, spot.radius):
            pen.polygon(spot.to_pixels(patch, width), fill=colour2)
    canvas.paste(layer, mask=shape_mask(thing, spot, width))


def rim(spot: Spot) -> float:
    """How wide the rim of a rimmed thing is, in picture widths."""
    return 0.016 + 0.12 * spot.radius


def ink(canvas: Image.Image, thing: Thing, spot: Spot, colour: tuple, colour2: tuple, line: float = 0.034) -> None:
    """The thing as a line drawing: its outline, and the borders of its pattern."""
    width = canvas.width
    outlines = [spot.to_pixels(outline, width) for outline in OUTLINES[thing.shape]]
    inner = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(inner)
    if thing.pattern == "rimmed":
        for grow, fill in ((1, 255), (-1, 0)):
            for outline in outlines:
                trace(pen, outline, fill, (2 * rim(spot) + (grow + 0.6) * line) * width)
    elif thing.pattern:
        for patch in patches(thing, spot.radius):
            trace(pen, spot.to_pixels(patch, width), 255, 0.7 * line * width)
    canvas.paste(colour2, mask=ImageChops.multiply(inner, shape_mask(thing, spot, width)))
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        trace(pen, outline, colour, line * width)


def shade(colour: str | None, rng: np.random.Generator) -> tuple[int, int, int] | None:
    """A slightly different red for every red thing."""
    jitter = rng.integers(-6, 7) + rng.integers(-4, 5, 3)
    return colour and tuple(int(value) for value in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))
