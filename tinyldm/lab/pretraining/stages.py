"""The stages of pretraining: CLIP, autoencoder, text encoder and UNet together, and a better decoder."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.formats.native import save_checkpoint
from tinyldm.images import to_images
from tinyldm.lab.pretraining import contrastive
from tinyldm.lab.pretraining.loop import (
    Recipe,
    Training,
    autocast,
    batch_of,
    load_section,
    save_sheet,
)
from tinyldm.lab.world.captions import SHEET_PROMPTS, TEXT_LENGTH, caption, make_tokenizer
from tinyldm.lab.world.things import VIEWS, Picture
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet, UNetConfig

AUTOENCODER = AutoencoderConfig(channels=(32, 48, 96, 128), blocks=1, latent_channels=12, norm_groups=4)
TEXT_WIDTH = 128
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
    steps=600,
    batch=16,
    lr=3.5e-3,
    preview_every=100,
    # Vectors for surface and shape. None starts as a colour, which would not let "a blue S*" say one.
    init_object="striped halved square",
    init_style="sketch",
    taken_literally=(*VIEWS, "small", "large"),
)

KL_WEIGHT = 1e-3
FINISHING = 300  # timesteps, of 1000: in the last of them what is drawn is settled, and only how is not
# Of the pictures from which the decoder learns in that stage, these styles are so many; in the world, a fifteenth each.
FINE_STYLES = {"pixel art": 0.35, "oil painting": 0.2}  # their blocks and strokes are finer than a latent
EMPTY_CAPTIONS = 0.1  # so that the model also knows "no prompt", which guidance needs (arXiv 2207.12598)

RECIPES = {  # a stage each, in this order
    **contrastive.RECIPES,
    "autoencoder": Recipe(steps=2000, batch=32, lr=2e-3),
    "diffusion": Recipe(steps=15_000, batch=64, lr=2e-3, restart=9000),
    "decoder": Recipe(steps=3500, batch=32, lr=1e-3),
}


# ---- The autoencoder


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


# ---- Text encoder and UNet


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


def train_diffusion(
    out: Path, pixels: torch.Tensor, pictures: list[Picture], recipe: Recipe, seed: int, device: str, stop_at: float
) -> bool:
    """|| target - UNet(z_t, t, text) ||^2 over pictures, captions, timesteps and noise (arXiv 2112.10752, eq. 3)."""
    folder = out / "diffusion"
    if not (folder / "merges.txt").exists():  # both are needed again: to go on, and for the checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        weights = standardized_autoencoder(out, pixels, device).state_dict()
        save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / "autoencoder.safetensors")
        write_merges(folder / "merges.txt", make_tokenizer(pictures, seed).merges)
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
        t = SCHEDULE.draw_timesteps(len(rows), noise)
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


# ---- A decoder of what the UNet makes


def train_decoder(
    out: Path, pixels: torch.Tensor, pictures: list[Picture], recipe: Recipe, seed: int, device: str, stop_at: float
) -> bool:
    """Train the decoder on, L1 + MSE, from latents as the UNet finishes them: noised, then denoised in one step.

    They are a little blurred, which a decoder of the encoder's own latents takes for what was meant: pixel art lost its
    blocks. The latents stay as they are, so the UNet need not change. (Stable Diffusion's decoder was also trained on
    by itself, though from the encoder's latents: stabilityai/sd-vae-ft-mse.)
    """
    autoencoder, tokenizer = load_first_stage(out / "diffusion")
    autoencoder.to(device, memory_format=torch.channels_last)
    denoiser = load_denoiser(out, tokenizer).to(device, memory_format=torch.channels_last)
    decoder = nn.ModuleDict({name: getattr(autoencoder, name) for name in ("post_quant_conv", "decoder")})
    training = Training(out / "decoder", decoder.requires_grad_(True), recipe, seed, device)
    styles = [picture.style if picture.style in FINE_STYLES else None for picture in pictures]
    shares, counts = {None: 1 - sum(FINE_STYLES.values()), **FINE_STYLES}, Counter(styles)
    chances = np.array([shares[style] / counts[style] for style in styles])
    chances /= chances.sum()  # of a few pictures none may be of a fine style

    def as_the_unet_makes_it(batch: torch.Tensor, captions: list[str], noise: torch.Generator) -> torch.Tensor:
        with torch.no_grad(), autocast(device):
            mean, log_variance = autoencoder.encode(batch)
            eps, eps_0 = torch.randn(2, *mean.shape, generator=noise).to(device)
            z_0 = autoencoder.sample(mean.float(), log_variance.float(), eps_0)
            t = torch.randint(FINISHING, (len(z_0),), generator=noise).to(device)
            z_t = SCHEDULE.add_noise(z_0, eps, t)
            return SCHEDULE.predict_z_0(z_t, denoiser(z_t, t, tokenizer(captions).to(device)).float(), t)

    def loss_of(draw: np.random.Generator, noise: torch.Generator) -> dict[str, torch.Tensor]:
        rows = draw.choice(len(pictures), size=recipe.batch, p=chances)
        batch = batch_of(pixels, rows, device)
        z_0 = as_the_unet_makes_it(batch, [caption(pictures[i], draw) for i in rows], noise)
        with autocast(device):
            decoded = autoencoder.decode(z_0).float()
        l1, mse = F.l1_loss(decoded, batch), F.mse_loss(decoded, batch)
        return {"loss": l1 + mse, "mse": mse}

    def sheet() -> None:
        with training.averaged(), torch.no_grad():
            batch = batch_of(pixels, np.arange(12), device)
            finished = as_the_unet_makes_it(batch, [""] * 12, torch.Generator().manual_seed(seed))
            rows = [to_images(x) for x in (batch, autoencoder.decode(finished))]
        save_sheet(training, rows, ["pictures", "noised, denoised and decoded"])

    return training.run(loss_of, sheet, stop_at)


# ---- The checkpoint


def load_first_stage(folder: Path) -> tuple[AutoencoderKL, Tokenizer]:
    """The frozen autoencoder, its latents standardized, and the tokenizer that the second stage is trained with."""
    tokenizer = Tokenizer(read_merges(folder / "merges.txt"), length=TEXT_LENGTH)
    autoencoder = AutoencoderKL(AUTOENCODER).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    return autoencoder, tokenizer


def load_denoiser(out: Path, tokenizer: Tokenizer) -> Denoiser:
    """The second stage's averaged weights, frozen."""
    denoiser = Denoiser(tokenizer.vocabulary_size).eval().requires_grad_(False)
    denoiser.load_state_dict({k: v.float() for k, v in load_section(out / "diffusion", "average").items()})
    return denoiser


def export(out: Path, folder: Path) -> None:
    """The stages' averaged weights, as far as they have come, as one checkpoint in the public key names."""
    autoencoder, tokenizer = load_first_stage(out / "diffusion")
    if (out / "decoder").exists():
        autoencoder.load_state_dict(load_section(out / "decoder", "average"), strict=False)
    denoiser = load_denoiser(out, tokenizer)
    parts = (tokenizer, denoiser.text_encoder, denoiser.unet, autoencoder, SCHEDULE)
    save_checkpoint(folder, LatentDiffusion(*parts, scale=1.0, defaults=DEFAULTS))
