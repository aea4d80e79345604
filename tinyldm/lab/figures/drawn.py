"""Figures that are pictures of the model's own."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyldm.heat_maps import HeatMaps, heat_sheet, watched
from tinyldm.images import contact_sheet, save_image, to_images
from tinyldm.lab.figures.subject import TOKEN, Subject
from tinyldm.sampler import SAMPLERS, first_noise

TIMESTEPS = (1, 100, 200, 300, 450, 600, 750, 999)
GUIDANCES = (0.0, 1.0, 2.0, 3.0, 4.5, 7.0, 10.0)
STEPS = 24  # of every sampler, of which are shown every third


def noise(subject: Subject, file: Path) -> None:
    """A picture noised at 8 timesteps, and what the UNet takes for the clean one, in one step."""
    model = subject.model
    z_0 = model.encode(subject.pictures[:1])[0]
    eps, _ = first_noise(z_0.shape[1:], [0])
    rows = {"noised": [], f"what the model sees in it, told “a photo of {TOKEN}”": [], "told nothing": []}
    for t in TIMESTEPS:
        z_t = model.schedule.add_noise(z_0, eps, t)
        seen = [predicted(subject, z_t, t, prompt) for prompt in (f"a photo of {TOKEN}", "")]
        for row, z in zip(rows.values(), (z_t, *seen), strict=True):
            row += pictures_of(subject, z)
    labels = [*rows]
    labels[0] = "noised, t = " + ", ".join(map(str, TIMESTEPS))
    save_image(contact_sheet([*rows.values()], labels=labels), file)


def predicted(subject: Subject, z_t: Tensor, t: int, prompt: str) -> Tensor:
    """The clean latent that the UNet sees in a noisy one."""
    model = subject.model
    output = model.predict(z_t, torch.full((len(z_t),), t), model.context([prompt], subject.words))
    return model.schedule.predict_z_0(z_t, output, *model.schedule.scales(t, z_t))


def pictures_of(subject: Subject, z: Tensor) -> list[Image.Image]:
    return to_images(subject.model.decode(z))


def latents(subject: Subject, file: Path) -> None:
    """Two pictures, and each channel of their latents: from dark to light what is -3 to 3."""
    z_0 = subject.model.encode(subject.pictures[:2])[0]
    rows = [
        [picture, *(in_grey(channel) for channel in latent)]
        for picture, latent in zip(to_images(subject.pictures[:2]), z_0, strict=True)
    ]
    save_image(contact_sheet(rows, tile=64), file)


def in_grey(channel: Tensor) -> Image.Image:
    return Image.fromarray(((channel + 3) / 6 * 255).clamp(0, 255).numpy().astype(np.uint8)).convert("RGB")


def attention(subject: Subject, file: Path) -> None:
    """Where each word of a prompt goes."""
    model, prompt = subject.model, f"a photo of {TOKEN} next to a red star on a purple background"
    maps = HeatMaps(1, *model.latent_shape(model.defaults.size, model.defaults.size)[1:])
    with watched(model.unet, maps):
        *_, z = model.generate([prompt], [0], words=subject.words)
    save_image(heat_sheet(pictures_of(subject, z)[0], prompt, maps.mean()[0], model.tokenizer), file)


def guidance(subject: Subject, file: Path) -> None:
    """The same noise with more and more guidance."""
    rows, prompt = [], f"a photo of {TOKEN} on a green background"
    for scale in GUIDANCES:
        *_, z = subject.model.generate([prompt] * 6, range(6), words=subject.words, guidance=scale)
        rows.append(pictures_of(subject, z))
    save_image(contact_sheet(rows, labels=[f"guidance {scale:g}" for scale in GUIDANCES]), file)


def samplers(subject: Subject, file: Path) -> None:
    """The way of each sampler from the same noise, every third of its steps decoded."""
    rows, prompt = [], f"a photo of {TOKEN} on a green background"
    for name in SAMPLERS:
        way = [*subject.model.generate([prompt], [0], words=subject.words, sampler=name, steps=STEPS)]
        rows.append([image for z in way[2::3] for image in pictures_of(subject, z)])
    save_image(contact_sheet(rows, labels=[*SAMPLERS]), file)
