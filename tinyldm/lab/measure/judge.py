"""A judge of generated pictures: a small network, trained on the world's own pictures, that says what it sees.

    python -m tinyldm.lab.measure.judge     train it, write weights/tiny/judge.safetensors, print how often it is right

Colours and plain backgrounds need no judge, colours.py measures them; this one is for shapes and patterns, how many,
where, how large, in which scene and style. It knows the held-out styles too, since nothing that learns ever sees it.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import write_atomically
from tinyldm.formats.untrusted import first_sentence
from tinyldm.images import from_pixels
from tinyldm.lab import TINY, file_to_write
from tinyldm.lab.world.captions import has_background
from tinyldm.lab.world.distribution import RandomPicture, make_pictures, random_picture
from tinyldm.lab.world.scenes import SCENES
from tinyldm.lab.world.styles import HELD_OUT_STYLES, INVENTED_STYLES, STYLES
from tinyldm.lab.world.things import MARKED, PATTERNS, PLACES, SHAPES, Picture, choice

WEIGHTS = TINY / "judge.safetensors"
TRAINING_SEED, TEST_SEED = 2_000_003, 3_000_017  # pictures that no other part of the project draws
BATCH, LR = 96, 2e-3
# Of the pictures it learns from: drawn in a style that was held out, and in one that prompts name, each as often as any
# other. Most pictures of the world are photos, and a judge of those alone takes faint strokes for a photo's.
HELD_OUT_SHARE, NAMED_SHARE = 0.15, 0.2

OUTLINES = (*SHAPES, "balloon", "other")  # other: an invented noun's own
SURFACES = ("plain", *PATTERNS, MARKED)

# One answer a question. A picture of one thing has it both left and right.
ANSWERS = {
    "count": ("one", "two"),
    "shape": OUTLINES,
    "right shape": OUTLINES,
    "pattern": SURFACES,
    "right pattern": SURFACES,
    "size": ("small", "medium", "large"),
    "place": ("middle", *PLACES),
    "scene": ("plain", *SCENES),
    "style": (*STYLES, *HELD_OUT_STYLES, "invented"),
}


def truth(picture: Picture) -> dict[str, str]:
    """The right answer to every question."""
    left, right = picture.things[0], picture.things[-1]
    return {
        "count": ("one", "two")[len(picture.things) - 1],
        "shape": left.shape if left.shape in OUTLINES else "other",
        "right shape": right.shape if right.shape in OUTLINES else "other",
        "pattern": left.pattern or "plain",
        "right pattern": right.pattern or "plain",
        "size": left.size,
        "place": picture.place or "middle",
        "scene": picture.background if picture.background in SCENES else "plain",
        "style": "invented" if picture.style in INVENTED_STYLES else picture.style,
    }


def is_visible(question: str, picture: Picture) -> bool:
    """Whether a person could tell: not the size of what is cropped, nor the scene of a sketch."""
    if question in ("size", "place"):
        return picture.view not in ("close-up", "cropped") and len(picture.things) == 1
    return question != "scene" or has_background(picture.style)


def in_held_out_style(rng: np.random.Generator) -> Picture:
    """A draw of the training distribution, but for its style."""
    return replace(random_picture(rng), style=choice(rng, HELD_OUT_STYLES))


def in_named_style(rng: np.random.Generator) -> Picture:
    """A draw of the training distribution, but as often in one style that prompts name as in another."""
    return replace(random_picture(rng), style=choice(rng, STYLES))


def picture_to_judge(rng: np.random.Generator) -> Picture:
    what = rng.random()
    if what < HELD_OUT_SHARE:
        return in_held_out_style(rng)
    return in_named_style(rng) if what < HELD_OUT_SHARE + NAMED_SHARE else random_picture(rng)


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.skip(x))


class Judge(nn.Module):
    """Pictures (b, 3, 64, 64) in [-1, 1] -> logits, (b, answers) for each question."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            Block(3, 32, 2), Block(32, 64, 2), Block(64, 96, 2), Block(96, 96, 1), nn.Conv2d(96, 24, 1), nn.Flatten()
        )
        self.hidden = nn.Sequential(nn.Linear(24 * 8 * 8, 160), nn.ReLU(), nn.Dropout(0.1))
        self.heads = nn.ModuleDict({question: nn.Linear(160, len(ANSWERS[question])) for question in ANSWERS})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        h = self.hidden(self.body(pictures))
        return {question: head(h) for question, head in self.heads.items()}

    @torch.no_grad()
    def answers(self, pictures: Tensor) -> list[dict[str, str]]:
        """What is in each of the pictures (b, 3, 64, 64) in [-1, 1]."""
        chosen = {question: logits.argmax(dim=1).tolist() for question, logits in self(pictures).items()}
        return [
            {question: ANSWERS[question][rows[i]] for question, rows in chosen.items()} for i in range(len(pictures))
        ]


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge, frozen. Raises InputError if there is none."""
    if not path.is_file():
        raise InputError(f"no judge at {path}; it comes with the project, or: python -m tinyldm.lab.measure.judge")
    judge = Judge()
    try:
        judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        again = "copy it again, or: python -m tinyldm.lab.measure.judge"
        raise InputError(f"{path} does not hold the judge's weights ({first_sentence(error)}); {again}") from error
    return judge.eval().requires_grad_(False)


def softened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them blurred, some hardly, some so that strokes run into each other, and all a little noisy, as generated
    pictures are."""
    blurred = pictures
    for _ in range(2):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand((len(pictures), 1, 1, 1), generator=generator) * torch.randint(
        2, (len(pictures), 1, 1, 1), generator=generator
    )
    amount = 0.06 * torch.rand((len(pictures), 1, 1, 1), generator=generator)
    return pictures.lerp(blurred, share) + amount * torch.randn(pictures.shape, generator=generator)


def train(count: int, steps: int) -> Judge:
    """Cross-entropy over all the questions that a person could answer too."""
    torch.manual_seed(0)
    pixels, pictures = make_pictures(count, TRAINING_SEED, workers=2, random=picture_to_judge)
    truths = [truth(picture) for picture in pictures]
    labels = {
        question: torch.tensor(
            [
                answers.index(true[question]) if is_visible(question, picture) else -100  # ignored by cross_entropy
                for true, picture in zip(truths, pictures, strict=True)
            ]
        )
        for question, answers in ANSWERS.items()
    }
    judge = Judge().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=0.02)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    bar = tqdm(range(steps), desc="judge")
    for step in bar:
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = rng.integers(count, size=BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(softened(from_pixels(torch.from_numpy(pixels[rows])), generator))
        loss = sum(F.cross_entropy(logits[question].float(), labels[question][rows]) for question in ANSWERS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def shares_right(judge: Judge, count: int = 3000, random: RandomPicture = random_picture) -> dict[str, float]:
    """How often each question is answered rightly, on pictures that it never saw. Shape and pattern: of one thing that
    is not small and whose shape has a name, as prompts ask for, on photos and in held-out styles."""
    pixels, pictures = make_pictures(count, TEST_SEED, random=random)
    said = [
        answer
        for rows in np.array_split(np.arange(count), count // 100)
        for answer in judge.answers(from_pixels(torch.from_numpy(pixels[rows])))
    ]
    shares = {}
    for question in ANSWERS:
        hits = [
            answer[question] == truth(picture)[question]
            for answer, picture in zip(said, pictures, strict=True)
            if is_visible(question, picture)
            and (("shape" not in question and "pattern" not in question) or is_plain(picture))
        ]
        shares[question] = float(np.mean(hits))
    return shares


def is_plain(picture: Picture) -> bool:
    thing = picture.things[0]
    in_full_view = not picture.view and len(picture.things) == 1 and thing.size != "small"
    return in_full_view and thing.shape in OUTLINES and picture.style in ("photo", *HELD_OUT_STYLES)


def main(arguments: list[str]) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--pictures", type=cli.whole_number(100, 1_000_000), default=60_000, metavar="N", help="to draw (%(default)s)")
    add("--steps", type=cli.whole_number(1), default=6000, metavar="N", help="of training (%(default)s)")
    add("--out", type=file_to_write, default=str(WEIGHTS), metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    judge = train(options.pictures, options.steps)
    state = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    with write_atomically(options.out) as temporary:
        save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    judge = load_judge(options.out)
    for question, share in shares_right(judge).items():
        print(f"{question}: {share:.1%} right on pictures it never saw")
    for question, share in shares_right(judge, 1000, in_held_out_style).items():
        print(f"{question}: {share:.1%} right on such pictures in {' and '.join(HELD_OUT_STYLES)}")


if __name__ == "__main__":
    cli.run(main)
