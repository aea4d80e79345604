"""The stages of pretraining: CLIP, autoencoder, text encoder and UNet together, and a better decoder."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderKL
from tinyldm.clip import CLIPTextEncoder
from tinyldm.files import write_atomically
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.formats.native import save_checkpoint
from tinyldm.formats.untrusted import first_sentence
from tinyldm.images import from_pixels, to_images
from tinyldm.lab.measure.report import rows_of_samples
from tinyldm.lab.pretraining.contrastive import train_clip
from tinyldm.lab.pretraining.loop import STATE, Batch, Job, Recipe, Training, autocast, load_average
from tinyldm.lab.pretraining.sizes import AUTOENCODER, DEFAULTS, LATENT, SCHEDULE, UNET, text_config
from tinyldm.lab.world.captions import SHEET_PROMPTS, TEXT_LENGTH, caption, make_tokenizer, trimmed
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet

KL_WEIGHT = 1e-3
FINISHING = 300  # timesteps, of 1000: in the last 300 it is settled what is drawn; only details change
# Of the pictures from which the decoder learns in that stage, these styles are so many; in the world, a twentieth each.
FINE_STYLES = {"pixel art": 0.3, "oil painting": 0.35}  # their blocks and strokes are finer than a latent
EMPTY_CAPTIONS = 0.1  # so that the model also knows "no prompt", which guidance needs (arXiv 2207.12598)


# ---- The autoencoder


def train_autoencoder(job: Job) -> bool:
    """Reconstruct pictures through the latent: L1 + MSE + KL_WEIGHT * KL(q(z|x) || N(0, I))."""
    recipe, device = job.recipe, job.device
    torch.manual_seed(job.seed)
    training = Training(job.stage_folder, AutoencoderKL(AUTOENCODER), recipe, job.seed, device)
    model = training.model

    def draw(_step: int, rng: np.random.Generator, generator: torch.Generator) -> Batch:
        rows = rng.integers(len(job.pixels), size=recipe.batch)
        return {"pixels": job.pixels[rows], "eps": torch.randn(recipe.batch, *LATENT, generator=generator)}

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        pictures = from_pixels(batch["pixels"])
        with autocast(device):
            mean, log_variance = model.encode(pictures)
            decoded = model.decode(model.sample(mean.float(), log_variance.float(), batch["eps"])).float()
        mean, log_variance = mean.float(), log_variance.float()
        l1, mse = F.l1_loss(decoded, pictures), F.mse_loss(decoded, pictures)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + mse + KL_WEIGHT * kl, "mse": mse, "kl": kl}

    def sheet() -> None:
        with training.averaged(), torch.no_grad():
            batch = from_pixels(job.pixels[:12].to(device))
            decoded = model.decode(model.encode(batch)[0])
        training.save_sheet([to_images(batch), to_images(decoded)], ["pictures", "decoded"])

    return training.run(draw, loss_of, sheet, job.stop_at)


def standardized_autoencoder(out: Path, pixels: Tensor, device: str) -> AutoencoderKL:
    """The trained autoencoder, its latents brought to zero mean and unit variance in every channel.

    Stable Diffusion does this with one number, 0.18215. Here the 1x1 convolutions around the latent take in a scale
    and a shift per channel, which changes no decoded picture and leaves the scale at 1.
    """
    model = AutoencoderKL(AUTOENCODER).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    load_average(model, out / "autoencoder")
    means, log_variances = encode_all(model, pixels[:4096], device)
    shift = means.mean(dim=(0, 2, 3)).to(device)
    deviation = (means.var(dim=(0, 2, 3)) + log_variances.exp().mean(dim=(0, 2, 3))).sqrt().to(device)
    both = torch.cat([deviation, torch.ones_like(deviation)])  # the mean is divided by it, the log-variance is not, ...
    model.quant_conv.weight /= rearrange(both, "c -> c 1 1 1")
    model.quant_conv.bias -= torch.cat([shift, 2 * deviation.log()])  # ... it becomes smaller by log(deviation^2)
    model.quant_conv.bias /= both
    model.post_quant_conv.bias += torch.einsum("oi,i->o", model.post_quant_conv.weight[:, :, 0, 0], shift)
    model.post_quant_conv.weight *= rearrange(deviation, "c -> 1 c 1 1")
    return model


@torch.no_grad()
def encode_all(model: AutoencoderKL, pixels: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Means and log-variances of all the latents, each (n, c, h, w) in float32, computed in bfloat16."""
    means, log_variances = [], []
    for batch in tqdm(pixels.split(256), desc="encoding", disable=len(pixels) < 5000):
        with autocast(device):
            mean, log_variance = model.encode(from_pixels(batch.to(device)))
        means.append(mean.float().cpu())
        log_variances.append(log_variance.float().cpu())
    return torch.cat(means), torch.cat(log_variances)


# ---- Text encoder and UNet


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together as in the first latent diffusion model (arXiv 2112.10752, 4.3.1)."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.text_encoder = CLIPTextEncoder(text_config(vocabulary_size))
        self.unet = UNet(UNET)
        nn.init.normal_(self.text_encoder.table, std=0.02)
        nn.init.normal_(self.text_encoder.text_model.embeddings.position_embedding.weight, std=0.01)
        for name, p in self.unet.named_parameters():
            # Every residual branch starts as nothing, so that at first the UNet is a short, easy path.
            if ".out_layers.3." in name or ".proj_out." in name or name.startswith("out.2."):
                nn.init.zeros_(p)

    def forward(self, z_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z_t, t, self.text_encoder(ids))


def train_diffusion(job: Job, frozen_text_encoder: dict[str, Tensor] | None = None) -> bool:
    """|| target - UNet(z_t, t, text) ||^2 over pictures, captions, timesteps and noise (arXiv 2112.10752, eq. 3).

    frozen_text_encoder: weights that the text encoder is to have and keep; None: it is trained with the UNet.
    """
    folder, recipe, device = job.stage_folder, job.recipe, job.device
    if not (folder / "merges.txt").exists():  # both are needed again: to go on, and for the checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        weights = standardized_autoencoder(job.out, job.pixels, device).state_dict()
        with write_atomically(folder / "autoencoder.safetensors") as temporary:
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, temporary)
        write_merges(folder / "merges.txt", make_tokenizer(job.pictures, job.seed).merges)
    autoencoder, tokenizer = load_first_stage(folder)
    autoencoder.to(device, memory_format=torch.channels_last)
    means, log_variances = encode_all(autoencoder, job.pixels, device)
    torch.manual_seed(job.seed)
    denoiser = Denoiser(tokenizer.vocabulary_size)
    if frozen_text_encoder:
        denoiser.text_encoder.load_state_dict(frozen_text_encoder)
        denoiser.text_encoder.requires_grad_(False)
    training = Training(folder, denoiser, recipe, job.seed, device)
    model = training.model

    def draw(_step: int, rng: np.random.Generator, generator: torch.Generator) -> Batch:
        rows = rng.integers(len(job.pictures), size=recipe.batch)
        captions = ["" if rng.random() < EMPTY_CAPTIONS else caption(job.pictures[i], rng) for i in rows]
        ids = tokenizer(captions)
        ids = trimmed(ids, tokenizer) if device == "cpu" else ids
        mean, log_variance = means[rows], log_variances[rows]
        z_0 = autoencoder.sample(mean, log_variance, torch.randn(mean.shape, generator=generator))
        eps = torch.randn(z_0.shape, generator=generator)
        t = SCHEDULE.draw_timesteps(len(rows), generator)
        return {"z_t": SCHEDULE.add_noise(z_0, eps, t), "target": SCHEDULE.target(z_0, eps, t), "t": t, "ids": ids}

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        with autocast(device):
            output = model(batch["z_t"], batch["t"], batch["ids"])
        return {"loss": F.mse_loss(output.float(), batch["target"])}

    def sheet() -> None:
        with training.averaged() as averaged:
            parts = LatentDiffusion(
                tokenizer, averaged.text_encoder, averaged.unet, autoencoder, SCHEDULE, 1.0, DEFAULTS
            )
            rows = rows_of_samples(parts)
        training.save_sheet(rows, SHEET_PROMPTS)

    return training.run(draw, loss_of, sheet, job.stop_at)


# ---- A decoder of what the UNet makes


def train_decoder(job: Job) -> bool:
    """Train the decoder on, L1 + MSE, from latents as the UNet finishes them: noised, then denoised in one step.

    They are a little blurred, which a decoder of the encoder's own latents takes for what was meant: pixel art lost its
    blocks. The latents stay as they are, so the UNet need not change. (Stable Diffusion's decoder was also trained on
    by itself, though from the encoder's latents: stabilityai/sd-vae-ft-mse.)
    """
    recipe, device = job.recipe, job.device
    autoencoder, tokenizer = load_first_stage(job.out / "diffusion")
    autoencoder.to(device, memory_format=torch.channels_last)
    denoiser = load_denoiser(job.out, tokenizer).to(device, memory_format=torch.channels_last)
    decoder = nn.ModuleDict({name: getattr(autoencoder, name) for name in ("post_quant_conv", "decoder")})
    training = Training(job.stage_folder, decoder.requires_grad_(True), recipe, job.seed, device)
    styles = [picture.style if picture.style in FINE_STYLES else None for picture in job.pictures]
    shares, counts = {None: 1 - sum(FINE_STYLES.values()), **FINE_STYLES}, Counter(styles)
    chances = np.array([shares[style] / counts[style] for style in styles])
    chances /= chances.sum()  # of a few pictures none may be of a fine style

    def draw(_step: int, rng: np.random.Generator, generator: torch.Generator) -> Batch:
        rows = rng.choice(len(job.pictures), size=recipe.batch, p=chances)
        ids = tokenizer([caption(job.pictures[i], rng) for i in rows])
        return {"pixels": job.pixels[rows], "ids": ids} | finishing_noise(len(rows), generator)

    def as_the_unet_makes_it(pictures: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad(), autocast(device):
            mean, log_variance = autoencoder.encode(pictures)
            z_0 = autoencoder.sample(mean.float(), log_variance.float(), batch["eps_0"])
            z_t = batch["signal"] * z_0 + batch["noise"] * batch["eps"]
            v = denoiser(z_t, batch["t"], batch["ids"]).float()
            return SCHEDULE.predict_z_0(z_t, v, batch["signal"], batch["noise"])

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        pictures = from_pixels(batch["pixels"])
        z_0 = as_the_unet_makes_it(pictures, batch)
        with autocast(device):
            decoded = autoencoder.decode(z_0).float()
        l1, mse = F.l1_loss(decoded, pictures), F.mse_loss(decoded, pictures)
        return {"loss": l1 + mse, "mse": mse}

    def sheet() -> None:
        with training.averaged(), torch.no_grad():
            pictures = from_pixels(job.pixels[:12].to(device))
            batch = finishing_noise(len(pictures), torch.Generator().manual_seed(job.seed))
            batch |= {"ids": tokenizer([""] * len(pictures))}
            finished = as_the_unet_makes_it(pictures, {name: x.to(device) for name, x in batch.items()})
            rows = [to_images(x) for x in (pictures, autoencoder.decode(finished))]
        training.save_sheet(rows, ["pictures", "noised, denoised and decoded"])

    return training.run(draw, loss_of, sheet, job.stop_at)


def finishing_noise(count: int, generator: torch.Generator) -> Batch:
    """What is random in a decoder's batch besides its pictures and captions."""
    t = torch.randint(FINISHING, (count,), generator=generator)
    eps_0, eps = torch.randn(2, count, *LATENT, generator=generator)
    signal, noise = SCHEDULE.scales(t, eps)
    return {"t": t, "signal": signal, "noise": noise, "eps_0": eps_0, "eps": eps}


# ---- All stages, in their order

# CLIP comes first with larger patches: a quarter as many, so a step is faster.
STAGES: dict[str, tuple[Recipe, Callable[[Job], bool]]] = {
    "clip": (Recipe(steps=5000, batch=128, lr=2e-3), train_clip),
    "fine-clip": (Recipe(steps=2800, batch=128, lr=1.5e-3, pictures=120_000), train_clip),
    "autoencoder": (Recipe(steps=2000, batch=32, lr=2e-3), train_autoencoder),
    "diffusion": (Recipe(steps=13_000, batch=128, lr=2e-3, pictures=120_000, restart=9000), train_diffusion),
    "decoder": (Recipe(steps=3500, batch=32, lr=1e-3), train_decoder),
}


# ---- The checkpoint


def load_first_stage(folder: Path) -> tuple[AutoencoderKL, Tokenizer]:
    """The frozen autoencoder, its latents standardized, and the tokenizer that text encoder and UNet are trained with.

    Raises InputError if the folder, that of their stage, does not hold them yet.
    """
    if not (folder / "merges.txt").exists():
        found = f"{folder} holds no merges.txt, expected that of the stage"
        raise InputError(f"{found}; run it first: python -m tinyldm.lab.pretraining --stage diffusion")
    tokenizer = Tokenizer(read_merges(folder / "merges.txt"), length=TEXT_LENGTH)
    autoencoder = AutoencoderKL(AUTOENCODER).eval().requires_grad_(False)
    try:
        autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        found = f"{folder / 'autoencoder.safetensors'} is broken ({first_sentence(error)})"
        raise InputError(f"{found}; delete {folder} and run the stage again") from error
    return autoencoder, tokenizer


def load_denoiser(out: Path, tokenizer: Tokenizer) -> Denoiser:
    """Text encoder and UNet with their averaged weights, frozen."""
    denoiser = Denoiser(tokenizer.vocabulary_size).eval().requires_grad_(False)
    load_average(denoiser, out / "diffusion")
    return denoiser


def export(out: Path, folder: Path) -> None:
    """The stages' averaged weights, as far as they have come, as one checkpoint in the public key names."""
    autoencoder, tokenizer = load_first_stage(out / "diffusion")
    if (out / "decoder" / STATE).exists():
        load_average(autoencoder, out / "decoder", strict=False)
    denoiser = load_denoiser(out, tokenizer)
    parts = (tokenizer, denoiser.text_encoder, denoiser.unet, autoencoder, SCHEDULE)
    save_checkpoint(folder, LatentDiffusion(*parts, scale=1.0, defaults=DEFAULTS))
