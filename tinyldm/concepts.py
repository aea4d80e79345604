"""Many words in one run of train.py: each from a folder of pictures, several of them learned side by side.

    concepts/S*/1.png, 2.png, …                  the word is the folder's name
    concepts/my-cat/1.png, …, token.txt          or what token.txt says

They share the frozen model. Each keeps its own draws, vectors, optimiser and folder, as in a run of its own; only the
UNet gets the pictures of all of them as one batch.
"""

import sys
from argparse import ArgumentTypeError, Namespace
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from tinyldm import InputError, cli
from tinyldm.files import check_unused, read_lines, release_folder
from tinyldm.images import SUFFIXES
from tinyldm.inversion import Batch, Pictures
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.recipes import Adam, OnSphere, Recipe, Word
from tinyldm.run import Run, check_settings, clear_unsaved, is_done, of_one_word, read_settings

TOKEN_FILE = "token.txt"
TOGETHER = 4  # words at a time; of 16 each takes a tenth less time on two cores
SquaredError = Callable[[LatentDiffusion, Batch, Tensor], Tensor]  # train.py's


class Shard(NamedTuple):
    """One part of several that are learned elsewhere, as by the jobs of a cluster's array."""

    number: int  # from 1
    count: int


class Concept(NamedTuple):
    folder: Path
    out: Path  # where its run goes

    def options(self, of_all: Namespace) -> Namespace:
        """train.py's, for a run of this concept alone."""
        if of_all.resume:
            clear_unsaved(self.out)
        goes_on = of_all.resume and (self.out / "settings.json").exists()
        own = {"images": self.folder, "token": self.token(), "out": self.out, "resume": goes_on}
        return Namespace(**vars(of_all) | own)

    def token(self) -> str:
        """Raises InputError if its token.txt can't be read, or has not one line."""
        file = self.folder / TOKEN_FILE
        if not file.exists():
            return self.folder.name
        lines = read_lines(file, "token")
        if len(lines) != 1:
            raise InputError(f"{file} has {len(lines)} lines, expected one, the word; correct it")
        return lines[0]


def find_concepts(folder: Path, out: Path, shard: Shard | None) -> list[Concept]:
    """Those of the shard, or all, sorted by name: of n shards the first has the concepts 1, n + 1, 2n + 1, …

    Hidden folders are none, nor is the one that out is in. Raises InputError if there is no concept in the folder, or
    if out is in one.
    """
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give one with a folder of pictures for each word in it")
    here, there = folder.resolve(), out.resolve()
    written = there.relative_to(here).parts[0] if here in there.parents else None  # it would move the shards about
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if written in names and any(path.suffix.lower() in SUFFIXES for path in (folder / written).iterdir()):
        raise InputError(f"--out is {out}, in {folder / written}, where pictures are; choose another --out")
    folders = [folder / name for name in names if name != written]
    if not folders:
        raise InputError(f"no folder in {folder}, expected one with pictures for each word; or try --images {folder}")
    own = folders[shard.number - 1 :: shard.count] if shard else folders
    return [Concept(path, out / path.name) for path in own]


def parse_shard(text: str) -> Shard:
    """An argparse type: "2/8" is the second of eight."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and len(text) < 20 and 1 <= int(number) <= int(count)):
        raise ArgumentTypeError(f"{text[:40]!r}, expected such as 2/8, the second of eight parts")
    return Shard(int(number), int(count))


def check_new(out: Path) -> None:
    """Raises InputError if a run's folder is neither new nor empty."""
    if (out / "embedding.safetensors").exists():
        found = f"{out} already holds a learned word"
        raise InputError(f"{found}; add --resume to go on, or choose another --out")
    check_unused(out)


def check_same(out: Path, options: Namespace) -> None:
    """Raises InputError if a word that is done was learned with other options, as far as it tells of them."""
    saved: dict[str, object] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):  # it is damaged
        saved = read_settings(out)
    others = {"images", "token"} if options.vectors else {"images", "token", "vectors"}  # they are each word's own
    here = {name: value for name, value in of_one_word(options).items() if name in saved.keys() - others}
    check_settings(out, saved, here)


# ---- Learning them


class Learner(NamedTuple):
    """One word, and all that it is learned with."""

    model: LatentDiffusion  # that knows the word
    recipe: Recipe
    word: Word  # its vectors are all that learns
    first: Tensor  # the vectors, (count, width), before the first step
    pictures: Pictures
    optimizer: Adam | OnSphere  # of the vectors alone
    lr: float  # of the first step
    run: Run  # how far it has come, and its folder


def learn_together(
    model: LatentDiffusion,
    options: Namespace,
    begin: Callable[[LatentDiffusion, Namespace], Learner],
    squared_error: SquaredError,
    loss_scale: float,  # see train.py
) -> int:
    """Learn those of options.concepts, options.together at a time, and return the status to exit with.

    When one is done, the next takes its place. One that can't be learned is named and left out.
    """
    concepts = find_concepts(options.concepts, options.out, options.shard)
    if not options.resume:
        for concept in concepts:
            check_new(concept.out)
    done = [concept for concept in concepts if is_done(concept.out, options.steps)]
    waiting = deque(concept for concept in concepts if concept not in done)
    left_out, learning = 0, {}
    with cli.stop_on_signal() as stopping, tqdm(total=len(concepts), desc="words") as bar:

        @contextmanager
        def leaving_out(concept: Concept) -> Iterator[None]:
            nonlocal left_out
            try:
                yield
            except (InputError, PermissionError) as error:
                left_out += 1
                learning.pop(concept, None)
                release_folder(concept.out)
                bar.write(f"left out {cli.printable(concept.folder)}: {cli.printable(error)}", file=sys.stderr)

        for concept in done:
            with leaving_out(concept):
                check_same(concept.out, options)
                bar.update()
        bar.initial = bar.n  # for how long the others take
        while learning or (waiting and not stopping()):
            while waiting and len(learning) < options.together and not stopping():
                with leaving_out(concept := waiting.popleft()):
                    learner = begin(model.with_own_words(), concept.options(options))
                    learning[concept] = learner, learner.run.steps_until(stopping, learner.model)
            for concept, (learner, steps) in [*learning.items()]:
                with leaving_out(concept):
                    if next(steps, None) is None:
                        learner.run.end(learner.model)
                        del learning[concept]
                        release_folder(concept.out)
                        bar.update(learner.run.finished)
            if not learning:
                continue
            losses = step_together([learner for learner, _ in learning.values()], squared_error, loss_scale)
            for (concept, (learner, _)), loss in zip([*learning.items()], losses, strict=True):
                with leaving_out(concept):
                    learner.run.log(loss)
    more = "; type the same again with --resume to go on" if bar.n + left_out < len(concepts) else ""
    print(f"{bar.n} of {len(concepts)} words are learned, in {cli.printable(options.out)}{more}")
    return stopping() or (2 if left_out else 0)


def step_together(learners: list[Learner], squared_error: SquaredError, loss_scale: float) -> Tensor:
    """A step of each -> the loss of each, (words,), of its own pictures alone."""
    model, words = learners[0].model, len(learners)
    batches, contexts, penalties = [], [], []
    for own in learners:
        batches.append(own.recipe.draw(own.pictures, model.schedule, own.run.options.batch, own.run.generator))
        contexts.append(own.model.context(batches[-1].captions, own.run.words))
        penalties.append(own.recipe.penalty(own.word.vectors, own.first))
    *numbers, captions = zip(*batches, strict=True)
    together = Batch(*map(torch.cat, numbers), [*chain(*captions)])
    losses = rearrange(
        squared_error(model, together, torch.cat(contexts)), "(word b) c h w -> word (b c h w)", word=words
    )
    losses = losses.mean(dim=1)
    (loss_scale * (losses + torch.stack(penalties)).sum()).backward()
    for own in learners:
        own.word.vectors.grad /= loss_scale
        own.optimizer.lr = own.lr * own.recipe.rate(own.run.done / own.run.options.steps)
        own.optimizer.step()
    return losses
