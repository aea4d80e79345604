"""How the small world looks: `draw(picture, size)` makes the pixels of a Picture, the same ones every time.

All lengths are in picture widths, so that it works at any size.

To add a style: write `style(picture, spots, size, rng) -> Image`, enter it in STYLES, and say in captions.py how a
caption names it (MEDIUMS) and whether there is a background to speak of (WITHOUT_BACKGROUND).
"""

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.things import COLOURS, OUTLINES, PLACES, Picture, Spot, Thing, arc, choice, corners, moved

SIZE = 64
OVERSAMPLE = 4  # drawn this much larger, then averaged down: antialiasing


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
    mask = Image.new("L", (width, width))
    pen = ImageDraw.Draw(mask)
    for i, outline in enumerate(OUTLINES[thing.shape]):
        pen.polygon(spot.to_pixels(outline, width), fill=0 if i else 255)
    return mask


def patches(pattern: str, radius: float) -> list[np.ndarray]:
    """The areas of the second colour in the shape's coordinates; a large thing has more, not much larger ones."""
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
        for patch in patches(thing.pattern, spot.radius):
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
        for patch in patches(thing.pattern, spot.radius):
            trace(pen, spot.to_pixels(patch, width), 255, 0.7 * line * width)
    canvas.paste(colour2, mask=ImageChops.multiply(inner, shape_mask(thing, spot, width)))
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        trace(pen, outline, colour, line * width)


def shade(colour: str | None, rng: np.random.Generator) -> tuple[int, int, int] | None:
    """A slightly different red for every red thing."""
    jitter = rng.integers(-6, 7) + rng.integers(-4, 5, 3)
    return colour and tuple(int(value) for value in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))


# ---- Styles


def blank(size: int, colour: tuple[int, int, int]) -> Image.Image:
    """A canvas to draw on, OVERSAMPLE times as large as the picture."""
    return Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE), colour)


def flat(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Things on their background, in plain colours."""
    scene = SCENES.get(picture.background)
    canvas = blank(size, scene.colour if scene else shade(picture.background, rng))
    if scene:
        scene.draw(canvas, rng)
    shades = (shade(picture.things[0].colour, rng), shade(picture.things[0].colour2, rng))
    for thing, spot in zip(picture.things, spots, strict=True):
        if thing != picture.things[0]:
            shades = (shade(thing.colour, rng), shade(thing.colour2, rng))
        paint(canvas, thing, spot, *shades)
    return canvas.reduce(OVERSAMPLE)


def photo(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Soft light from above."""
    light = np.linspace(1.04, 0.94, size)[:, None, None]
    return rounded(np.asarray(flat(picture, spots, size, rng)) * light)


def line_art(picture: Picture, spots: list[Spot], canvas: Image.Image, **colours) -> Image.Image:
    """All things as line drawings on the canvas, which becomes the picture."""
    for thing, spot in zip(picture.things, spots, strict=True):
        ink(canvas, thing, spot, **colours)
    return canvas.reduce(OVERSAMPLE)


def sketch(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Pencil on white paper; a darker colour is a darker gray."""
    canvas = blank(size, (246, 246, 243))
    for thing, spot in zip(picture.things, spots, strict=True):
        paint(canvas, thing, spot, pencil(thing.colour), thing.colour2 and pencil(thing.colour2))
    return line_art(picture, spots, canvas, colour=(70, 70, 74), colour2=(110, 110, 114))


def pencil(colour: str) -> tuple[int, int, int]:
    """The gray of a sketch for this colour."""
    return (int(246 - 0.35 * (246 - np.mean(COLOURS[colour]))),) * 3


def oil_painting(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Short thick strokes along a swirling field, each in the colour beneath it."""
    plain, width = flat(picture, spots, size, rng), size * OVERSAMPLE
    canvas = plain.resize((width, width), Image.Resampling.NEAREST)
    pen, (a, b, c) = ImageDraw.Draw(canvas), rng.uniform(0, 2 * np.pi, 3)
    starts = rng.permutation([(i / 19, j / 19) for i in range(20) for j in range(20)])
    for x, y in np.clip(starts + rng.uniform(-0.02, 0.02, starts.shape), 0, 0.999):
        angle = a + 1.6 * np.sin(4 * x + b) + 1.6 * np.cos(4 * y + c)
        dx, dy = 0.045 * np.cos(angle), 0.045 * np.sin(angle)
        light = rng.uniform(0.8, 1.15)
        fill = tuple(int(min(255, light * value + 8)) for value in plain.getpixel((int(x * size), int(y * size))))
        ends = np.array([x - dx, y - dy, x + dx, y + dy]) * width
        pen.line(ends.tolist(), fill, round(0.045 * width))
    return canvas.reduce(OVERSAMPLE)


def pixel_art(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Sixteen blocks a side; things stand upright and on the grid, as sprites do."""
    snapped = [
        Spot(round(16 * spot.x) / 16, round(16 * spot.y) / 16, radius=round(16 * spot.radius) / 16, angle=0)
        for spot in spots
    ]
    blocks = flat(picture, snapped, SIZE, rng).resize((16, 16), Image.Resampling.NEAREST)
    return blocks.resize((size, size), Image.Resampling.NEAREST)


def watercolor(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Pale, soft, of uneven wetness, with the paper's white border."""
    plain = flat(picture, spots, size, rng).filter(ImageFilter.GaussianBlur(size * 0.014))
    wet = smooth_noise(rng, 6, size) * 0.28 + 0.5
    edge = np.abs(np.linspace(-1, 1, size))
    inside = np.maximum(edge[:, None], edge[None, :]) + 0.08 * (smooth_noise(rng, 9, size) - 0.5)
    wet = wet * np.clip((0.86 - inside) * 12, 0, 1)
    paper = np.array((252, 250, 244))
    return rounded(paper + wet[..., None] * (np.asarray(plain) - paper))


def neon(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Glowing tubes in the dark."""
    canvas = blank(size, (0, 0, 0))
    for thing, spot in zip(picture.things, spots, strict=True):
        ink(canvas, thing, spot, tube(thing.colour), tube(thing.colour2 or thing.colour), line=0.05)
    tubes = canvas.reduce(OVERSAMPLE)
    glow = tubes.filter(ImageFilter.GaussianBlur(size * 0.05))
    return rounded(np.array((6, 6, 14)) + np.asarray(tubes) + 0.9 * np.asarray(glow))


def tube(colour: str) -> tuple[int, ...]:
    """The colour of a glowing tube: never quite dark."""
    return tuple(max(50, c) for c in COLOURS[colour])


def blueprint(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """White lines on a blue grid."""
    canvas = blank(size, (24, 62, 138))
    pen, width = ImageDraw.Draw(canvas), canvas.width
    for at in np.arange(1, 16, 2) / 16 * width:
        pen.line([at, 0, at, width], (60, 98, 172), width // 64)
        pen.line([0, at, width, at], (60, 98, 172), width // 64)
    return line_art(picture, spots, canvas, colour=(240, 246, 255), colour2=(200, 216, 244))


def stained_glass(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Panes of uneven light between strips of lead."""
    centres = (grid(4).reshape(16, 2) + rng.uniform(0.1, 0.9, (16, 2))) / 4
    points = (grid(size) + 0.5) / size
    distance = np.linalg.norm(points[:, :, None] - centres, axis=-1)
    nearest = np.sort(distance, axis=-1)
    light = rng.uniform(0.75, 1.3, 16)[distance.argmin(-1)]
    lead = np.clip((nearest[..., 1] - nearest[..., 0] - 0.012) * 40, 0, 1)
    panes = rounded(np.asarray(flat(picture, spots, size, rng)) * light[..., None] * lead[..., None] + 16)
    canvas = panes.resize((size * OVERSAMPLE, size * OVERSAMPLE), Image.Resampling.BICUBIC)
    return line_art(picture, spots, canvas, colour=(16, 16, 18), colour2=(16, 16, 18))


def grid(side: int) -> np.ndarray:
    """The column and row of every cell, (side, side, 2)."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1)


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Random values in [0, 1] at cells x cells points, and smoothly between them: (size, size)."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255


def rounded(array: np.ndarray) -> Image.Image:
    """An image of (h, w, 3) values of 0 to 255; what is outside is clamped."""
    return Image.fromarray(np.clip(array + 0.5, 0, 255).astype(np.uint8))


STYLES = {
    "photo": photo,
    "sketch": sketch,
    "oil painting": oil_painting,
    "pixel art": pixel_art,
    "watercolor": watercolor,
    "neon": neon,
}
HELD_OUT_STYLES = {"blueprint": blueprint, "stained glass": stained_glass}


def draw(picture: Picture, size: int = SIZE) -> Image.Image:
    """An image of size x size pixels. All that is random in it comes from picture.seed."""
    rng = np.random.default_rng(picture.seed)
    spots = arrange(picture, rng)
    image = (STYLES | HELD_OUT_STYLES)[picture.style](picture, spots, size, rng)
    if picture.view == "dark":
        image = image.point(lambda value: int(0.42 * value))
    if picture.view == "bright":
        image = image.point(lambda value: int(0.5 * value + 127))
    return image
