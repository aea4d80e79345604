"""How the tiny checkpoint was made: the autoencoder first, then text encoder and UNet together, in SD's own order.

    python -m tinyldm.lab.pretrain                       all stages, then weights/tiny; hours on two cores
    python -m tinyldm.lab.pretrain --stage autoencoder   one stage only
    python -m tinyldm.lab.pretrain --minutes 9           stop after 9 minutes; the same command goes on from there

Everything a stage needs to go on lies in runs/tiny/<stage>/, in files of at most 16 MB, besides its losses (loss.csv)
and sample sheets. The same seed gives the same pictures, captions, timesteps and noise, step by step.
"""

import argparse
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
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.checkpoint import save_checkpoint
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.lab.captions import caption
from tinyldm.lab.things import Picture
from tinyldm.lab.world import make_pictures
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer, learn_merges
from tinyldm.unet import UNet, UNetConfig

AUTOENCODER = AutoencoderConfig(channels=(32, 48, 96, 128), blocks=1, latent_channels=12, norm_groups=4)
TEXT_WIDTH, TEXT_LENGTH = 128, 32
UNET = UNetConfig(
    latent_channels=AUTOENCODER.latent_channels,
    channels=(96, 160),
    attention=(True, True),
    blocks=1,
    context_width=TEXT_WIDTH,
    heads=None,
    head_width=32,
    norm_groups=16,
)
SCHEDULE = NoiseSchedule(prediction="v")  # at high noise v stays well-conditioned where eps says little about z_0
DEFAULTS = Defaults(
    size=64,
    sampler="ddim",
    sampler_steps=25,
    guidance=3.0,
    steps=300,
    batch=16,
    lr=2e-3,
    preview_every=100,
    init_object="circle",
    init_style="sketch",
)

KL_WEIGHT = 1e-3
EMPTY_CAPTIONS = 0.1  # so that the model also knows "no prompt", which guidance needs (arXiv 2207.12598)
EMA_DECAY = 0.999
MAX_FILE_BYTES = 16_000_000

SHEET_PROMPTS = [
    "a photo of a red circle on a blue background",
    "a photo of a green star on a white background",
    "a photo of two yellow hearts on a black background",
    "a photo of a purple and white striped circle on an orange background",
    "a photo of a red star next to a blue square on a gray background",
    "a photo of a lemon on a brown background",
    "a photo of a ladybug on the grass",
    "a photo of a blue donut on a yellow background",
    "a photo of two small teal diamonds in the snow",
    "a photo of a pink crescent in the night sky",
    "a sketch of a heart",
    "an oil painting of a balloon on the sea",
    "pixel art of a pizza on a green background",
    "a neon sign of a yellow star",
    "a watercolor of an orange flower on a green background",
    "a close-up photo of a cookie on a pink background",
]


@dataclass(frozen=True)
class Recipe:
    """How one stage is trained: AdamW, a short warm-up, then a cosine down to zero."""

    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01

    def lr_at(self, step: int) -> float:
        progress = min(step / self.steps, 1.0)
        return self.lr * min((step + 1) / self.warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * progress))


RECIPES = {
    "autoencoder": Recipe(steps=5600, batch=32, lr=2e-3),
    "diffusion": Recipe(steps=17000, batch=64, lr=1e-3),
}


class Training:
    """One stage: parameters, their moving average, the optimiser, and the files to go on from."""

    def __init__(self, folder: Path, model: nn.Module, recipe: Recipe, seed: int, device: str):
        self.folder, self.recipe, self.seed, self.device = folder, recipe, seed, device
        self.model = model.to(device, memory_format=torch.channels_last)
        self.parameters = dict(self.model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.step)
        with sdpa_kernel([SDPBackend.MATH]) if self.device == "cpu" else contextlib.nullcontext():
            # On two cores and 64 positions the plain kernel is a third faster than the fused one.
            losses = loss_of(draw, noise)
            losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
        """All state in 16-bit shards of at most 16 MB: four numbers a parameter, so 8M parameters fit in 64 MB."""
        new, current = self.folder / "state.new", self.folder / "state"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        sections = {
            "weights": {k: p.detach().half() for k, p in self.parameters.items()},
            "average": {k: v.half() for k, v in self.ema.items()},
            # The second moments of unused rows are tiny: bfloat16 keeps their exponents where float16 would not.
            "moment1": {k: m["exp_avg"].bfloat16() for k, m in moments.items() if m},
            "moment2": {k: m["exp_avg_sq"].bfloat16() for k, m in moments.items() if m},
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
        for name, p in self.parameters.items():
            self.ema[name].copy_(average[name])
            if name in moment1:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": torch.empty_like(p).copy_(moment1[name]),
                    "exp_avg_sq": torch.empty_like(p).copy_(moment2[name]),
                }


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


def load_section(folder: Path, section: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((folder / "state").glob(f"{section}-*.safetensors")):
        tensors |= load_file(file)
    return tensors


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16)


# ---- Stage 1: the autoencoder


def train_autoencoder(out: Path, pixels: torch.Tensor, recipe: Recipe, seed: int, device: str, stop_at: float) -> bool:
    """Reconstruct pictures through the latent: L1 + MSE + KL_WEIGHT * KL(q(z|x) || N(0, I))."""
    torch.manual_seed(seed)
    training = Training(out / "autoencoder", AutoencoderKL(AUTOENCODER), recipe, seed, device)
    model = training.model

    def loss_of(draw: np.random.Generator, noise: torch.Generator) -> dict[str, torch.Tensor]:
        pictures = batch_of(pixels, draw.integers(len(pixels), size=recipe.batch), device)
        with autocast(device):
            mean, log_variance = model.encode(pictures)
            eps = torch.randn(mean.shape, generator=noise).to(device)
            decoded = model.decode(model.sample(mean.float(), log_variance.float(), eps)).float()
        mean, log_variance = mean.float(), log_variance.float()
        l1, mse = F.l1_loss(decoded, pictures), F.mse_loss(decoded, pictures)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + mse + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    def sheet() -> None:
        with training.averaged(), torch.no_grad():
            pictures = batch_of(pixels, np.arange(12), device)
            decoded = model.decode(model.encode(pictures)[0])
        save_sheet(training, [to_images(pictures), to_images(decoded)], ["pictures", "decoded"])

    return training.run(loss_of, sheet, stop_at)


def batch_of(pixels: torch.Tensor, rows: np.ndarray, device: str) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> (b, 3, h, w) in [-1, 1], in the memory order in which convolutions are fastest."""
    pictures = rearrange(pixels[torch.from_numpy(rows)], "b h w c -> b c h w")
    return pictures.to(device).float() / 127.5 - 1


def standardized_autoencoder(out: Path, pixels: torch.Tensor, device: str) -> AutoencoderKL:
    """The trained autoencoder, its latents brought to zero mean and unit variance in every channel.

    Stable Diffusion does this with one number, 0.18215. Here the 1x1 convolutions around the latent take in a scale
    and a shift per channel, which changes no decoded picture and leaves the scale at 1.
    """
    model = AutoencoderKL(AUTOENCODER).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    model.load_state_dict({k: v.float() for k, v in load_section(out / "autoencoder", "average").items()})
    means, variances = encode_all(model, pixels[:4096], device)
    shift = means.mean(dim=(0, 2, 3)).to(device)
    scale = (means.var(dim=(0, 2, 3)) + variances.mean(dim=(0, 2, 3))).sqrt().to(device)
    both = torch.cat([scale, torch.ones_like(scale)])  # the mean is divided by it, the log-variance is not, ...
    model.quant_conv.weight /= rearrange(both, "c -> c 1 1 1")
    model.quant_conv.bias -= torch.cat([shift, 2 * scale.log()])  # ... it becomes smaller by log(scale^2)
    model.quant_conv.bias /= both
    model.post_quant_conv.bias += torch.einsum("oi,i->o", model.post_quant_conv.weight[:, :, 0, 0], shift)
    model.post_quant_conv.weight *= rearrange(scale, "c -> 1 c 1 1")
    return model


@torch.no_grad()
def encode_all(model: AutoencoderKL, pixels: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of all the latents, each (n, c, h, w), in bfloat16's precision to save memory."""
    means, variances = [], []
    for rows in tqdm(torch.arange(len(pixels)).split(256), desc="encoding", disable=len(pixels) < 5000):
        with autocast(device):
            mean, log_variance = model.encode(batch_of(pixels, rows.numpy(), device))
        means.append(mean.float().cpu())
        variances.append(log_variance.float().exp().cpu())
    return torch.cat(means), torch.cat(variances)


# ---- Stage 2: text encoder and UNet


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together as in the first latent diffusion model (arXiv 2112.10752, 4.3.1)."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.text_encoder = CLIPTextEncoder(
            CLIPTextConfig(vocabulary_size=vocabulary_size, length=TEXT_LENGTH, width=TEXT_WIDTH, layers=3, heads=4)
        )
        self.unet = UNet(UNET)
        nn.init.normal_(self.text_encoder.table, std=0.02)
        nn.init.normal_(self.text_encoder.text_model.embeddings.position_embedding.weight, std=0.01)
        for name, p in self.unet.named_parameters():
            # Every residual branch starts as nothing, so that at first the UNet is a short, easy path.
            if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
                nn.init.zeros_(p)

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(z_t, t, self.text_encoder(ids))


def make_tokenizer(pictures: list[Picture], seed: int) -> Tokenizer:
    """Merges learned from captions until every word of the world is one token."""
    rng = np.random.default_rng([seed, 1])
    captions = [caption(picture, rng) for picture in pictures[:20_000]]
    return Tokenizer(learn_merges(captions, count=2000), length=TEXT_LENGTH)


def train_diffusion(
    out: Path, pixels: torch.Tensor, pictures: list[Picture], recipe: Recipe, seed: int, device: str, stop_at: float
) -> bool:
    """|| target - UNet(z_t, t, text) ||^2 over pictures, captions, timesteps and noise (arXiv 2112.10752, eq. 3)."""
    folder = out / "diffusion"
    if not (folder / "merges.txt").exists():  # both are needed again: to go on, and for the checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        weights = standardized_autoencoder(out, pixels, device).state_dict()
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "autoencoder.safetensors")
        make_tokenizer(pictures, seed).write_merges(folder / "merges.txt")
    autoencoder, tokenizer = load_first_stage(folder)
    autoencoder.to(device, memory_format=torch.channels_last)
    means, variances = encode_all(autoencoder, pixels, device)
    deviations = variances.sqrt()
    torch.manual_seed(seed)
    training = Training(folder, Denoiser(tokenizer.vocabulary_size), recipe, seed, device)
    model = training.model

    def loss_of(draw: np.random.Generator, noise: torch.Generator) -> dict[str, torch.Tensor]:
        rows = draw.integers(len(pictures), size=recipe.batch)
        captions = ["" if draw.random() < EMPTY_CAPTIONS else caption(pictures[i], draw) for i in rows]
        ids = tokenizer(captions)
        ids = ids[:, : int((ids != tokenizer.end).sum(dim=1).max()) + 1] if device == "cpu" else ids
        z_0 = means[rows] + deviations[rows] * torch.randn(means[rows].shape, generator=noise)
        eps = torch.randn(z_0.shape, generator=noise)
        t = torch.randint(SCHEDULE.steps, (len(rows),), generator=noise)
        z_t, target = SCHEDULE.add_noise(z_0, eps, t), SCHEDULE.target(z_0, eps, t)
        with autocast(device):
            output = model(z_t.to(device), t.to(device), ids.to(device))
        return {"loss": F.mse_loss(output.float(), target.to(device))}

    def sheet() -> None:
        with training.averaged() as averaged:
            parts = LatentDiffusion(
                tokenizer, averaged.text_encoder, averaged.unet, autoencoder, SCHEDULE, 1.0, DEFAULTS
            )
            rows = []
            for prompt in SHEET_PROMPTS:
                *_, z_0 = parts.generate([prompt] * 8, range(8))
                rows.append(to_images(parts.decode(z_0)))
        save_sheet(training, rows, SHEET_PROMPTS)

    return training.run(loss_of, sheet, stop_at)


def save_sheet(training: Training, rows: list, labels: list[str]) -> None:
    save_image(contact_sheet(rows, labels=labels, tile=64), training.folder / f"step-{training.step:06d}.png")


# ---- Stage 3: the checkpoint


def load_first_stage(folder: Path) -> tuple[AutoencoderKL, Tokenizer]:
    """The frozen autoencoder, its latents standardized, and the tokenizer that the second stage is trained with."""
    autoencoder = AutoencoderKL(AUTOENCODER).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    return autoencoder, Tokenizer.read(folder / "merges.txt", length=TEXT_LENGTH)


def export(out: Path, folder: Path) -> None:
    """Both stages' averaged weights, as far as they have come, as one checkpoint in the public key names."""
    autoencoder, tokenizer = load_first_stage(out / "diffusion")
    denoiser = Denoiser(tokenizer.vocabulary_size)
    denoiser.load_state_dict({k: v.float() for k, v in load_section(out / "diffusion", "average").items()})
    parts = (tokenizer, denoiser.text_encoder, denoiser.unet, autoencoder, SCHEDULE)
    save_checkpoint(folder, LatentDiffusion(*parts, scale=1.0, defaults=DEFAULTS))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="states, losses and sheets (%(default)s)")
    parser.add_argument("--weights", type=Path, default=Path("weights/tiny"), help="the checkpoint (%(default)s)")
    parser.add_argument("--stage", choices=["all", "autoencoder", "diffusion", "export"], default="all")
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures to draw (%(default)s)")
    parser.add_argument("--steps", type=int, help="of the stage; default: the recipe's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then; run again to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    stop_at = time.monotonic() + 60 * args.minutes
    stages = ["autoencoder", "diffusion", "export"] if args.stage == "all" else [args.stage]
    recipes = {name: Recipe(args.steps or r.steps, r.batch, r.lr) for name, r in RECIPES.items()}
    if stages != ["export"]:
        array, pictures = make_pictures(args.pictures, args.seed, workers=torch.get_num_threads())
        pixels = torch.from_numpy(array)
    done = True
    for stage in stages:
        if stage == "autoencoder":
            done = train_autoencoder(args.out, pixels, recipes[stage], args.seed, args.device, stop_at)
        elif stage == "diffusion":
            done = train_diffusion(args.out, pixels, pictures, recipes[stage], args.seed, args.device, stop_at)
        else:
            export(args.out, args.weights)
        if not done:
            print(f"stopped before the end of stage {stage}; the same command goes on from here")
            return


if __name__ == "__main__":
    main()
