"""How the small world looks: `draw(picture, size)` makes the pixels of a Picture, the same ones every time.

To add a style: write `style(picture, spots, size, rng) -> Image`, enter it in STYLES, and say in captions.py how a
caption names it (MEDIUMS) and whether there is a background to speak of (has_background).
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tinyldm.lab.world.drawing import OVERSAMPLE, SIZE, arrange, ink, paint, shade
from tinyldm.lab.world.names import invented_names
from tinyldm.lab.world.nouns import INVENTED_NOUNS
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.things import COLOURS, Picture, Spot, choice

# ---- Everyday styles


def blank(size: int, colour: tuple[int, int, int]) -> Image.Image:
    """A canvas to draw on, OVERSAMPLE times as large as the picture."""
    return Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE), colour)


def ground(picture: Picture, size: int, rng: np.random.Generator) -> Image.Image:
    """A canvas with the picture's background."""
    scene = SCENES.get(picture.background)
    canvas = blank(size, scene.colour if scene else shade(picture.background, rng))
    if scene:
        scene.draw(canvas, rng)
    return canvas


def flat(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Things on their background, in plain colours."""
    canvas = ground(picture, size, rng)
    shades = (shade(picture.things[0].colour, rng), shade(picture.things[0].colour2, rng))
    for thing, spot in zip(picture.things, spots, strict=True):
        if thing != picture.things[0]:
            shades = (shade(thing.colour, rng), shade(thing.colour2, rng))
        paint(canvas, thing, spot, *shades)
    return canvas.reduce(OVERSAMPLE)


def photo(picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """Things in plain colours, lit."""
    return lit(flat(picture, spots, size, rng))


def lit(image: Image.Image) -> Image.Image:
    """In soft light from above."""
    light = np.linspace(1.04, 0.94, image.height)[:, None, None]
    return rounded(np.asarray(image) * light)


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
    distance, light = panes(rng, size)
    glass = np.asarray(flat(picture, spots, size, rng)) * light[..., None]
    leaded = rounded(glass * (1 - seams(distance)[..., None]) + 16)
    canvas = leaded.resize((size * OVERSAMPLE, size * OVERSAMPLE), Image.Resampling.BICUBIC)
    return line_art(picture, spots, canvas, colour=(16, 16, 18), colour2=(16, 16, 18))


def panes(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every pixel the distances to the middles of sixteen panes, (size, size, 16), and its own pane's light."""
    centres = (grid(4).reshape(16, 2) + rng.uniform(0.1, 0.9, (16, 2))) / 4
    at = (np.arange(size) + 0.5) / size
    across, down = ((at[:, None] - middle) ** 2 for middle in centres.T)  # (size, 16); on a whole grid it takes long
    distance = np.sqrt(across + down[:, None])
    return distance, rng.uniform(0.75, 1.3, 16)[distance.argmin(-1)]


def seams(distance: np.ndarray) -> np.ndarray:
    """1 where two panes meet, 0 within them, (size, size)."""
    nearest = np.sort(distance, axis=-1)
    return 1 - np.clip((nearest[..., 1] - nearest[..., 0] - 0.012) * 40, 0, 1)


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


# ---- Invented styles

INVENTED, STYLES_SEED = 200, 6_000_011
SEAMED = 0.35  # of the looks have seams, as far as that makes none like a held-out style
FILLS = ("own", "own", "hollow", "tinted", "gray", "one colour")
TEXTURES = (None, "grid", "hatching", "dots", "lines", "panes", "grain", "blotches")
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Look:
    """What a style does to any picture: a ground, on it things, over both a texture, at last lines."""

    fill: str  # the things are of their own colours, hollow, tinted or gray, or all of one colour
    tint: Colour  # what tints, or is the one colour
    ground: Colour | None  # None: the picture's own background
    texture: str | None
    thread: Colour  # of the texture's lines and dots, and of the seams
    line: Colour | None  # of the outlines; None: there are none
    width: float  # of the lines, in picture widths
    seams: bool = False  # between panes


def random_colour(rng: np.random.Generator) -> Colour:
    """A colour of the world, pure, pale or deep."""
    rgb, mix = np.array(COLOURS[choice(rng, COLOURS)]), rng.uniform(0, 0.6)
    return as_colour(rgb + mix * (choice(rng, (0, 255)) - rgb))


def as_colour(rgb: np.ndarray) -> Colour:
    return tuple(int(value) for value in rgb)


def contrasting(rng: np.random.Generator, *others: Colour | None) -> Colour:
    """One that can be told from the others."""
    while True:
        colour = random_colour(rng)
        if all(other is None or np.linalg.norm(np.subtract(colour, other)) > 150 for other in others):
            return colour


def random_look(rng: np.random.Generator) -> Look:
    fill, texture = choice(rng, FILLS), choice(rng, TEXTURES)
    ground = random_colour(rng) if fill in ("hollow", "one colour") or rng.random() < 0.5 else None
    tint = contrasting(rng, ground)
    lined = ground is not None or rng.random() < 0.5
    line = contrasting(rng, ground, tint if fill == "one colour" else None) if lined else None
    if ground is not None:
        thread = as_colour(0.7 * np.array(ground) + 0.3 * np.array(contrasting(rng, ground)))
    else:
        thread = random_colour(rng)
    return Look(fill, tint, ground, texture, thread, line, float(rng.uniform(0.025, 0.05)))


def is_like_a_held_out_style(look: Look) -> bool:
    """Hollow things on a bluish ground are nearly blueprints, outlined panes or dark seams nearly stained glass."""
    bluish = look.ground is not None and look.ground[2] > max(look.ground[:2]) + 15
    leaded = look.texture == "panes" or (look.seams and max(look.thread) < 100)
    return (look.fill == "hollow" and bluish) or (leaded and look.line is not None)


def is_like_a_photo(look: Look) -> bool:
    return look.fill == "own" and not (look.ground or look.texture or look.line)


def invented_looks(count: int = INVENTED, seed: int = STYLES_SEED) -> dict[str, Look]:
    rng, rng_of_seams, looks = np.random.default_rng(seed), np.random.default_rng([seed, 1]), {}
    for name in invented_names(count, seed, avoid=INVENTED_NOUNS):
        look = random_look(rng)
        while is_like_a_held_out_style(look) or is_like_a_photo(look):
            look = random_look(rng)
        seamed = replace(look, seams=bool(rng_of_seams.random() < SEAMED))
        looks[name] = look if is_like_a_held_out_style(seamed) else seamed
    return looks


def invented(look: Look, picture: Picture, spots: list[Spot], size: int, rng: np.random.Generator) -> Image.Image:
    """A picture in an invented style."""
    canvas = blank(size, look.ground) if look.ground else ground(picture, size, rng)
    if look.fill != "hollow":
        for thing, spot in zip(picture.things, spots, strict=True):
            colours = (COLOURS[colour] if colour else None for colour in (thing.colour, thing.colour2))
            paint(canvas, thing, spot, *(colour and filled(look, colour) for colour in colours))
    textured(canvas, look, rng)
    if look.line:
        fainter = as_colour(0.75 * np.array(look.line) + 0.25 * np.array(look.ground or look.line))
        for thing, spot in zip(picture.things, spots, strict=True):
            ink(canvas, thing, spot, look.line, fainter, look.width)
    return canvas.reduce(OVERSAMPLE)


def filled(look: Look, colour: Colour) -> Colour:
    """What becomes of a thing's colour."""
    light = np.mean(colour) / 255
    if look.fill == "tinted":
        return as_colour(0.4 * np.array(colour) + 0.6 * np.array(look.tint))
    if look.fill == "gray":
        return as_colour(np.full(3, 40 + 190 * light))
    if look.fill == "one colour":
        return as_colour(np.array(look.tint) * (0.75 + 0.25 * light))
    return colour


def textured(canvas: Image.Image, look: Look, rng: np.random.Generator) -> None:
    """Lay the texture over the canvas, then the seams."""
    thin_lines(ImageDraw.Draw(canvas), canvas.width, look)
    distance, of_panes = panes(rng, canvas.width // OVERSAMPLE)
    smooth = Image.Resampling.BICUBIC if look.texture == "blotches" else Image.Resampling.NEAREST
    if look.texture in ("panes", "grain", "blotches"):
        uneven = {"panes": of_panes, "grain": rng.uniform(0.72, 1.2, (16, 16))}
        light = uneven[look.texture] if look.texture in uneven else 0.7 + 0.55 * smooth_noise(rng, 6, 32)
        light = np.asarray(Image.fromarray((light * 150).astype(np.uint8)).resize(canvas.size, smooth)) / 150
        canvas.paste(rounded(np.asarray(canvas) * light[..., None]))
    if look.seams:
        mask = Image.fromarray((255 * seams(distance)).astype(np.uint8))
        canvas.paste(look.thread, mask=mask.resize(canvas.size, Image.Resampling.BICUBIC))


def thin_lines(pen: ImageDraw.ImageDraw, width: int, look: Look) -> None:
    """Those textures that are drawn with a pen."""
    at, thick = (np.arange(-8, 8) + 0.5) / 8 * width, round(width / 50)
    for x in at:
        if look.texture == "dots":
            for y in at:
                pen.ellipse([x - width / 45, y - width / 45, x + width / 45, y + width / 45], look.thread)
        if look.texture == "hatching":
            pen.line([x, 0, x + width, width], look.thread, thick)
        if look.texture in ("grid", "lines"):
            pen.line([0, x, width, x], look.thread, thick)
        if look.texture == "grid":
            pen.line([x, 0, x, width], look.thread, thick)


# ---- All of them

STYLES = {
    "photo": photo,
    "sketch": sketch,
    "oil painting": oil_painting,
    "pixel art": pixel_art,
    "watercolor": watercolor,
    "neon": neon,
}
HELD_OUT_STYLES = {"blueprint": blueprint, "stained glass": stained_glass}


INVENTED_STYLES = invented_looks()
ALL_STYLES = STYLES | HELD_OUT_STYLES | {name: partial(invented, look) for name, look in INVENTED_STYLES.items()}


def draw(picture: Picture, size: int = SIZE) -> Image.Image:
    """An image of size x size pixels. All that is random in it comes from picture.seed."""
    rng = np.random.default_rng(picture.seed)
    spots = arrange(picture, rng)
    image = ALL_STYLES[picture.style](picture, spots, size, rng)
    if picture.view == "dark":
        image = image.point(lambda value: int(0.42 * value))
    if picture.view == "bright":
        image = image.point(lambda value: int(0.5 * value + 127))
    return image
