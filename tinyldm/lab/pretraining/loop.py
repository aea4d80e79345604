"""How every stage of pretraining is trained: Muon, a moving average of the weights, and files to go on from."""

import contextlib
import csv
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.files import write_atomically
from tinyldm.images import contact_sheet, save_image
from tinyldm.lab.pretraining.muon import Muon

EMA_DECAY = 0.999
MAX_FILE_BYTES = 16_000_000


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained: a short warm-up, then a cosine down to zero.

    With a restart it is zero at that step too, and from there on the rate is that of a cosine over all steps, in the
    middle of it (in SGDR, arXiv 1608.03983, the next cosine starts anew from the top).
    """

    steps: int
    batch: int
    lr: float
    pictures: int = 40_000  # to draw from the world
    warmup: int = 200
    weight_decay: float = 0.01
    restart: int = 0  # a step; 0 is none

    def lr_at(self, step: int) -> float:
        end = self.restart if step < self.restart < self.steps else self.steps
        progress = min(step / end, 1.0)
        return self.lr * min((step + 1) / self.warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


class Training:
    """One stage: parameters, their moving average, the optimisers, and the files to go on from."""

    def __init__(self, folder: Path, model: nn.Module, recipe: Recipe, seed: int, device: str):
        self.folder, self.recipe, self.seed, self.device = folder, recipe, seed, device
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        # Muon is for matrices. An embedding is a table, of whose rows a step sees few; norms and biases are vectors.
        tables = {name for name, p in self.parameters.items() if p.ndim < 2 or "embedding" in name}
        options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
        self.optimizers = [
            Muon([p for name, p in self.parameters.items() if name not in tables], **options),
            torch.optim.AdamW(
                [p for name, p in self.parameters.items() if name in tables], betas=(0.9, 0.99), **options
            ),
        ]
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state").exists():
            self.resume()

    def run(
        self,
        loss_of: Callable[[np.random.Generator, torch.Generator], dict[str, torch.Tensor]],
        sheet: Callable[[], None],
        stop_at: float,
        save_every: int = 250,
        sheet_every: int = 1000,
    ) -> bool:
        """Train until done (True) or the clock says stop (False). `loss_of` draws a batch and gives its losses."""
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.folder.name)
        log = open(self.folder / "loss.csv", "a", newline="")  # noqa: SIM115
        rows, running = csv.writer(log), {}
        try:
            while self.step < self.recipe.steps and time.monotonic() < stop_at:
                losses = self.update(loss_of)
                for name, loss in losses.items():
                    running.setdefault(name, []).append(loss.detach())
                bar.update()
                if self.step % 50 == 0:
                    means = {name: float(torch.stack(values).mean()) for name, values in running.items()}
                    if log.tell() == 0:
                        rows.writerow(["step", *means])
                    rows.writerow([self.step, *(f"{mean:.5f}" for mean in means.values())])
                    log.flush()
                    bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()})
                    running.clear()
                if self.step % save_every == 0:
                    self.save()
                if self.step % sheet_every == 0:
                    sheet()
        finally:  # Ctrl-C included: what was learned is kept
            log.close()
            bar.close()
            self.save()
        return self.step >= self.recipe.steps

    def update(self, loss_of: Callable) -> dict[str, torch.Tensor]:
        # Every step has generators of its own, so a resumed run draws what an uninterrupted one would have drawn.
        draw = np.random.default_rng([self.seed, self.step])
        noise = torch.Generator().manual_seed(int(draw.integers(2**62)))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.recipe.lr_at(self.step)
        with sdpa_kernel([SDPBackend.MATH]) if self.device == "cpu" else contextlib.nullcontext():
            # On two cores and 64 positions the plain kernel is a third faster than the fused one.
            losses = loss_of(draw, noise)
            losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        averages = list(self.ema.values())
        torch._foreach_lerp_(averages, [p.detach() for p in self.parameters.values()], 1 - decay)
        self.step += 1
        return losses

    @contextlib.contextmanager
    def averaged(self):
        """The model with the moving average of its weights, which makes better pictures than the last ones."""
        last = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.load(self.ema)
        self.model.eval()
        yield self.model
        self.load(last)
        self.model.train()

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])

    def save(self) -> None:
        """All state in 16-bit shards of at most 16 MB: three numbers a parameter, four where Adam trains it."""
        new, current = self.folder / "state.new", self.folder / "state"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        states = self.optimizers[0].state | self.optimizers[1].state
        moments = {name: states[p] for name, p in self.parameters.items() if p in states}
        sections = {
            "weights": {k: p.detach().half() for k, p in self.parameters.items()},
            "average": {k: v.half() for k, v in self.ema.items()},
            # The second moments of unused rows are tiny: bfloat16 keeps their exponents where float16 would not.
            "moment1": {k: m["exp_avg"].bfloat16() for k, m in moments.items()},
            "moment2": {k: m["exp_avg_sq"].bfloat16() for k, m in moments.items() if "exp_avg_sq" in m},
        }
        for section, tensors in sections.items():
            for i, shard in enumerate(shards(tensors)):
                save_file({k: v.cpu().contiguous() for k, v in shard.items()}, new / f"{section}-{i}.safetensors")
        (new / "state.json").write_text(json.dumps({"step": self.step, "seed": self.seed}))
        if current.exists():
            current.rename(self.folder / "state.old")
        new.rename(current)
        shutil.rmtree(self.folder / "state.old", ignore_errors=True)

    def resume(self) -> None:
        weights, average = load_section(self.folder, "weights"), load_section(self.folder, "average")
        moment1, moment2 = load_section(self.folder, "moment1"), load_section(self.folder, "moment2")
        self.step = json.loads((self.folder / "state" / "state.json").read_text())["step"]
        self.load(weights)
        muon, adam = (optimizer.state for optimizer in self.optimizers)
        for name, p in self.parameters.items():
            self.ema[name].copy_(average[name])
            if name in moment1:
                (adam if name in moment2 else muon)[p] = {"exp_avg": torch.empty_like(p).copy_(moment1[name])}
            if name in moment2:
                adam[p]["step"] = torch.tensor(float(self.step))
                adam[p]["exp_avg_sq"] = torch.empty_like(p).copy_(moment2[name])


def shards(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Split into dictionaries of at most MAX_FILE_BYTES each."""
    parts, room = [{}], MAX_FILE_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            parts.append({})
            room = MAX_FILE_BYTES
        parts[-1][name] = tensor
        room -= tensor.nbytes
    return parts


def is_finished(folder: Path, recipe: Recipe) -> bool:
    state = folder / "state" / "state.json"
    return state.exists() and json.loads(state.read_text())["step"] >= recipe.steps


def load_section(folder: Path, section: str) -> dict[str, torch.Tensor]:
    if not (folder / "state").exists():
        raise InputError(f"{folder} holds no state, expected that of a stage; run it first: --stage {folder.name}")
    tensors = {}
    for file in sorted((folder / "state").glob(f"{section}-*.safetensors")):
        tensors |= load_file(file)
    return tensors


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


def batch_of(pixels: torch.Tensor, rows: np.ndarray, device: str) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (b, 3, h, w) in [-1, 1], in the memory order in which convolutions are fastest."""
    pictures = rearrange(pixels[torch.from_numpy(rows)], "b h w c -> b c h w")
    return pictures.to(device).float() / 127.5 - 1


def save_sheet(training: Training, rows: list, labels: list[str]) -> None:
    save_image(contact_sheet(rows, labels=labels, tile=64), training.folder / f"step-{training.step:06d}.png")


def plot_losses(folders: list[Path], file: Path) -> None:
    """A picture of the losses of these stages, a panel each. Raises ImportError if matplotlib is not installed."""
    from matplotlib.figure import Figure  # only this needs it

    figure = Figure(figsize=(4 * len(folders), 3), layout="constrained")
    for axes, folder in zip(figure.subplots(1, len(folders), squeeze=False)[0], folders, strict=True):
        with open(folder / "loss.csv", newline="") as rows:
            points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(rows)]
        axes.plot(*zip(*points, strict=True), linewidth=0.8)
        axes.set(title=folder.name, xlabel="step", yscale="log")
    with write_atomically(file) as temporary:
        figure.savefig(temporary, dpi=120)
