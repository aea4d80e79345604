"""How every stage of pretraining is trained: Muon, a moving average of the weights, and files to go on from."""

import contextlib
import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.files import write_atomically
from tinyldm.formats.untrusted import first_sentence
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab.pretraining.muon import Muon
from tinyldm.lab.world.things import Picture

EMA_DECAY = 0.999
STATE = "state.safetensors"  # in the folder of every stage
SAVE_EVERY, SHEET_EVERY = 250, 1000  # steps


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained: a short warm-up, then a cosine down to zero.

    With a restart the rate falls to zero at that step. Then it jumps to where a cosine over all steps would be, and
    follows that one (in SGDR, arXiv 1608.03983, the next cosine starts anew from the top).
    """

    steps: int
    batch: int
    lr: float
    pictures: int = 40_000  # to draw from the world
    warmup: int = 200
    weight_decay: float = 0.01
    restart: int = 0  # a step; 0 is none
    beginning_of: int = 0  # so many steps, of which these are the first and have the rates; 0: it is no beginning

    def lr_at(self, step: int) -> float:
        steps = self.beginning_of or self.steps
        end = self.restart if step < self.restart < steps else steps
        progress = min(step / end, 1.0)
        return self.lr * min((step + 1) / self.warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Job:
    """One stage's work."""

    out: Path  # the folder of the whole pretraining,
    stage: str  # and the name of the stage, whose own folder in it keeps everything to go on from
    recipe: Recipe
    pixels: Tensor  # (n, 64, 64, 3) uint8, of
    pictures: list[Picture]  # these n
    seed: int
    device: str
    stop_at: float = math.inf  # by time.monotonic()

    @property
    def stage_folder(self) -> Path:
        return self.out / self.stage


Batch = dict[str, Tensor]
Draw = Callable[[int, np.random.Generator, torch.Generator], Batch]  # everything random in a step, on the CPU
Loss = Callable[[Batch], dict[str, Tensor]]  # of a batch on the device: "loss", and what else is to be logged


class Batches(Dataset):
    """The batch of every step. Each has generators of its own, so it is the same whichever process draws it, and a
    resumed run draws what an uninterrupted one would have drawn."""

    def __init__(self, draw: Draw, seed: int):
        self.draw, self.seed = draw, seed

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        return self.draw(step, rng, torch.Generator().manual_seed(int(rng.integers(2**62))))


class Recorded:
    """A step on a GPU, recorded as a CUDA graph and replayed: most of its three thousand kernels take less time than
    Python takes to start one. It is recorded anew for a batch of other names or shapes."""

    EAGER_STEPS = 3  # before it is recorded: in them libraries choose their kernels, and optimisers make their state

    def __init__(self, step: Loss):
        self.step, self.steps, self.shapes = step, 0, None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """batch: on the CPU."""
        if (shapes := {name: x.shape for name, x in batch.items()}) != self.shapes:
            self.shapes, self.steps, self.graph = shapes, 0, None
        self.steps += 1
        if self.steps <= self.EAGER_STEPS:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                losses = self.step({name: x.to("cuda") for name, x in batch.items()})
            torch.cuda.current_stream().wait_stream(side)
            return losses
        if self.graph is None:
            self.batch = {name: x.to("cuda") for name, x in batch.items()}
            self.graph = torch.cuda.CUDAGraph()
            # The thread that brings the next batches may meanwhile ask CUDA for memory.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.losses = self.step(self.batch)
        for name, x in batch.items():
            self.batch[name].copy_(x, non_blocking=True)
        self.graph.replay()
        return {name: loss.clone() for name, loss in self.losses.items()}


class Training:
    """One stage: parameters, their moving average, the optimisers, and the files to go on from."""

    def __init__(self, folder: Path, model: nn.Module, recipe: Recipe, seed: int, device: str):
        self.folder, self.recipe, self.seed, self.device = folder, recipe, seed, device
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Muon is for matrices. An embedding is a table, of whose rows a step sees few; norms and biases are vectors.
        tables = {name for name, p in self.parameters.items() if p.ndim < 2 or "embedding" in name}
        # A recorded step reads the rate from where it was when it was recorded, so there it is a number on the GPU.
        on_gpu = device == "cuda"
        self.lr = torch.tensor(recipe.lr, device=device) if on_gpu else recipe.lr
        options = {"lr": self.lr, "weight_decay": recipe.weight_decay}
        self.optimizers = [
            Muon([p for name, p in self.parameters.items() if name not in tables], **options),
            torch.optim.AdamW(
                [p for name, p in self.parameters.items() if name in tables],
                betas=(0.9, 0.99),
                capturable=on_gpu,
                **options,
            ),
        ]
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            self.resume()

    def run(self, draw: Draw, loss_of: Loss, sheet: Callable[[], None], stop_at: float) -> bool:
        """Train until done (True) or the clock says stop (False)."""
        take_step = partial(self.take_step, loss_of)
        if self.device == "cuda":
            take_step = Recorded(take_step)
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.folder.name)
        log = open(self.folder / "loss.csv", "a", newline="")  # noqa: SIM115
        rows, running = csv.writer(log), {}
        try:
            for batch in self.batches(draw):
                if time.monotonic() >= stop_at:
                    break
                losses = self.update(batch, take_step)
                for name, loss in losses.items():
                    running.setdefault(name, []).append(loss)
                bar.update()
                if self.step % 50 == 0:
                    means = {name: float(torch.stack(values).mean()) for name, values in running.items()}
                    if log.tell() == 0:
                        rows.writerow(["step", *means])
                    rows.writerow([self.step, *(f"{mean:.5f}" for mean in means.values())])
                    log.flush()
                    bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                    running.clear()
                if self.step % SAVE_EVERY == 0:
                    self.save()
                if self.step % SHEET_EVERY == 0:
                    sheet()
        finally:  # Ctrl-C included: what was learned is kept
            log.close()
            bar.close()
            self.save()
        return self.step >= self.recipe.steps

    def batches(self, draw: Draw) -> DataLoader:
        """Those of the steps to come. A GPU would wait for captions and ids longer than it computes, so there other
        processes draw ahead; on a CPU they would take its cores."""
        steps, ahead = range(self.step, self.recipe.steps), {}
        if self.device == "cuda":
            workers = max(1, min(8, (os.cpu_count() or 2) - 2))
            ahead = {"num_workers": workers, "prefetch_factor": 8, "multiprocessing_context": "fork"}
        batches = Batches(draw, self.seed)
        return DataLoader(batches, batch_size=None, sampler=steps, pin_memory=self.device == "cuda", **ahead)

    def update(self, batch: Batch, take_step: Loss) -> dict[str, Tensor]:
        """A step on the parameters and on their average. -> its losses"""
        if self.device == "cuda":
            self.lr.fill_(self.recipe.lr_at(self.step))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.lr if self.device == "cuda" else self.recipe.lr_at(self.step)
        losses = take_step(batch)
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        averages = list(self.ema.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)
        self.step += 1
        return losses

    def take_step(self, loss_of: Loss, batch: Batch) -> dict[str, Tensor]:
        with sdpa_kernel([SDPBackend.MATH]) if self.device == "cpu" else contextlib.nullcontext():
            # On two cores and 64 positions the plain kernel is a third faster than the fused one.
            losses = loss_of({name: x.to(self.device) for name, x in batch.items()})
            losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return {name: loss.detach() for name, loss in losses.items()}

    @contextlib.contextmanager
    def averaged(self):
        """The model with the moving average of its weights, which makes better pictures than the last ones."""
        last = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.load(self.ema)
        self.model.eval()
        yield self.model
        self.load(last)
        self.model.train()

    def load(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])

    def save(self) -> None:
        """All state in 16-bit numbers: three a parameter, four where Adam trains it."""
        states = self.optimizers[0].state | self.optimizers[1].state
        moments = {name: states[p] for name, p in self.parameters.items() if p in states}
        sections = {
            "weights": {name: p.detach().half() for name, p in self.parameters.items()},
            "average": {name: average.half() for name, average in self.ema.items()},
            # The second moments of unused rows are tiny: bfloat16 keeps their exponents where float16 would not.
            "moment1": {name: m["exp_avg"].bfloat16() for name, m in moments.items()},
            "moment2": {name: m["exp_avg_sq"].bfloat16() for name, m in moments.items() if "exp_avg_sq" in m},
        }
        tensors = {
            f"{section}/{name}": tensor.cpu().contiguous()
            for section, of_names in sections.items()
            for name, tensor in of_names.items()
        }
        with write_atomically(self.folder / STATE) as temporary:  # one file: never half of the old, half of the new
            save_file(tensors, temporary, metadata={"step": str(self.step)})

    def save_sheet(self, rows: list[list[Image.Image]], labels: list[str]) -> None:
        """What the stage makes by now, a row a label, as step-….png in its folder."""
        save_image(contact_sheet(rows, labels=labels, tile=64), self.folder / f"step-{self.step:06d}.png")

    def resume(self) -> None:
        weights, average = load_section(self.folder, "weights"), load_section(self.folder, "average")
        moment1, moment2 = load_section(self.folder, "moment1"), load_section(self.folder, "moment2")
        self.step = saved_step(self.folder)
        names = self.parameters.keys()
        fits = names == weights.keys() == average.keys() and names >= moment1.keys() >= moment2.keys()
        shapes = {name: p.shape for name, p in self.parameters.items()}
        sections = (weights, average, moment1, moment2)
        if not fits or any(p.shape != shapes[name] for section in sections for name, p in section.items()):
            raise broken(self.folder, ValueError("names or shapes differ"))
        self.load(weights)
        muon, adam = (optimizer.state for optimizer in self.optimizers)
        for name, p in self.parameters.items():
            self.ema[name].copy_(average[name])
            if name in moment1:
                (adam if name in moment2 else muon)[p] = {"exp_avg": torch.empty_like(p).copy_(moment1[name])}
            if name in moment2:
                adam[p]["step"] = torch.tensor(float(self.step), device=self.device)
                adam[p]["exp_avg_sq"] = torch.empty_like(p).copy_(moment2[name])


def load_section(folder: Path, section: str) -> dict[str, Tensor]:
    """{parameter's name: tensor} of a stage's weights, average, moment1 or moment2, in 16 bits as they were saved.

    Raises InputError if the stage was not begun, or its file is broken.
    """
    with opened_state(folder) as file:
        names = [name for name in file.keys() if name.startswith(f"{section}/")]  # noqa: SIM118
        return {name.removeprefix(f"{section}/"): file.get_tensor(name) for name in names}


def saved_step(folder: Path) -> int:
    """How many steps a stage has done by its last save; 0 if it was not begun."""
    if not (folder / STATE).exists():
        return 0
    with opened_state(folder) as file:
        try:
            return int(file.metadata()["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise broken(folder, error) from error


def opened_state(folder: Path) -> safe_open:
    if not (folder / STATE).exists():
        found = f"{folder} holds no state, expected that of a stage"
        raise InputError(f"{found}; run it first: python -m tinyldm.lab.pretraining --stage {folder.name}")
    try:
        return safe_open(folder / STATE, "pt")
    except SafetensorError as error:
        raise broken(folder, error) from error


def load_average(network: nn.Module, folder: Path, strict: bool = True) -> None:
    """Put the average of a stage's weights into the network; strict: it must be all of them.

    Raises InputError if the stage was not begun, or its file is of another network.
    """
    try:
        network.load_state_dict({k: v.float() for k, v in load_section(folder, "average").items()}, strict=strict)
    except RuntimeError as error:
        raise broken(folder, error) from error


def broken(folder: Path, error: Exception) -> InputError:
    again = f"delete {folder} and run the stage again"
    return InputError(f"{folder / STATE} is broken or of another network ({first_sentence(error)}); {again}")


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


def plot_losses(folders: list[Path], file: Path) -> None:
    """A picture of the losses of these stages, a panel each. Raises InputError if it can't be drawn."""
    try:
        from matplotlib.figure import Figure  # only this needs it
    except ImportError:
        raise InputError('matplotlib is not installed, which draws the losses; type pip install -e ".[plot]"') from None

    figure = Figure(figsize=(4 * len(folders), 3), layout="constrained")
    if file.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise InputError(f"losses can't be drawn as {file}, expected the name of a picture; try {file.stem}.png")
    for axes, folder in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders, strict=True):
        try:
            with open(folder / "loss.csv", newline="") as rows:
                points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(rows)]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{folder / 'loss.csv'} is no log of losses ({error!r}); run the stage again") from error
        axes.plot(*zip(*points, strict=True), linewidth=0.8)
        axes.set(title=folder.name, xlabel="step", yscale="log")
    with write_atomically(file) as temporary:
        figure.savefig(temporary, dpi=120)
