"""What either side of the bench does: a training step, pictures, decoding, encoding; each a function to call."""

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from tinyldm import cli
from tinyldm.latent_diffusion import LatentDiffusion

Work = Callable[[], object]
TINY = Path(__file__).parents[2] / "weights" / "tiny"
TOKEN = "S*"
PROMPT = f"a photo of a {TOKEN}"
EACH_PROMPT = 6  # pictures of it on a sheet
SHEET = [  # README's
    f"a photo of {TOKEN} on a green background",
    f"two {TOKEN} on a red background",
    f"a sketch of {TOKEN}",
    f"a photo of a large {TOKEN} in the night sky",
]


def seconds_of(work: Work, device: str) -> float:
    """A GPU is waited for before and after: it still works when a function that gave it work has returned."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


# ---- Ours, of the checkout that Python finds first


def ours(options: Namespace) -> dict[str, Work]:
    """Of the tiny checkpoint, or of random weights."""
    import sample as script

    model, size = our_model(options), options.size
    model.check_size(size, size)
    step, words = training_step(model, size, options.batch or model.defaults.batch)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    z_0 = torch.randn(1, *model.latent_shape(size, size), generator=generator).to(options.device)
    shape = {"height": size, "width": size}

    def sample() -> None:
        count = 4 if options.model == "tiny" else 1
        for _ in model.generate([PROMPT] * count, range(count), words=words(), steps=2, guidance=7.5, **shape):
            pass

    at_once = script.at_a_time(*z_0.shape[2:]) if hasattr(script, "at_a_time") else script.BATCH  # as it was called

    def sheet() -> None:
        prompts = [prompt for prompt in SHEET for _ in range(EACH_PROMPT)]
        for i in range(0, len(prompts), at_once):
            rows = slice(i, i + at_once)
            *_, z = model.generate(prompts[rows], range(len(prompts))[rows], words=words(), **shape)
            model.decode(z)

    def low_memory() -> None:
        model.unet.low_memory = True
        step()
        model.unet.low_memory = False

    works = {
        "step": step,
        "low-memory": low_memory,
        "sample": sample,
        "decode": lambda: model.decode(z_0),
        "encode": lambda: model.encode(pixels),
    }
    return works | ({"sheet": sheet} if options.model == "tiny" else {})


def our_model(options: Namespace) -> LatentDiffusion:
    """On its device, in its numbers."""
    from tinyldm.formats.checkpoint import load_checkpoint

    device, dtype = options.device, cli.DTYPES[options.dtype]
    if options.model == "tiny":
        return load_checkpoint(TINY, device, dtype)
    from tinyldm.formats.parts import moved

    model = random_model(options.model)
    for network in model.networks():  # in the memory layout that loading leaves them in
        state = {name: moved(tensor, torch.device(device), dtype) for name, tensor in network.state_dict().items()}
        network.load_state_dict(state, assign=True)
    return model.to(device, dtype)


def random_model(kind: str) -> LatentDiffusion:
    from helpers.public import SHAPES, merges
    from tinyldm.autoencoder import AutoencoderKL
    from tinyldm.clip import CLIPTextEncoder
    from tinyldm.schedule import NoiseSchedule
    from tinyldm.tokenizer import Tokenizer
    from tinyldm.unet import UNet

    shape = SHAPES[kind]
    networks = CLIPTextEncoder(shape.text), UNet(shape.unet), AutoencoderKL(shape.autoencoder)
    tokenizer = Tokenizer(merges(shape.text.vocabulary_size))
    return LatentDiffusion(tokenizer, *networks, NoiseSchedule())


def training_step(
    model: LatentDiffusion,  # it gets the new word
    size: int,  # pixels
    batch: int,
    vectors: int = 1,
    pictures: int = 1,
) -> tuple[Work, Callable[[], dict[str, torch.Tensor]]]:
    """One step of train.py's loop, and the word that it teaches, as `generate` takes it. The latents are random."""
    from tinyldm.inversion import Pictures, templates_for, vectors_of
    from tinyldm.recipes import composed
    from train import inversion_loss

    recipe, generator = composed("low-variance,falling"), torch.Generator().manual_seed(0)
    word = recipe.word(model, TOKEN, vectors_of(model, "a")[:1].repeat(vectors, 1), pictures)
    word.vectors.requires_grad_()
    captions = recipe.captions(model, TOKEN, [Path("a")] * pictures, templates_for(model, "object"))
    latents = torch.randn(2, pictures, *model.latent_shape(size, size), generator=generator)
    learned_from = Pictures(*latents, word.captions(captions))
    optimizer = recipe.optimizer(word.vectors, 1.0, 1e-3)

    def step() -> None:
        drawn = recipe.draw(learned_from, model.schedule, batch, generator)
        inversion_loss(model, drawn, word.now(0)).backward()
        optimizer.step()

    return step, lambda: word.now(0)


def step_of_words(model: LatentDiffusion, size: int, batch: int, words: int) -> Work:
    """One step of train.py --concepts with so many words, each with its own batch."""
    from tinyldm.concepts import Learner, step_together
    from tinyldm.inversion import Pictures, templates_for, vectors_of
    from tinyldm.recipes import composed
    from train import squared_error

    recipe, learners = composed("low-variance,falling"), []
    for seed in range(words):
        own, generator = model.with_own_words(), torch.Generator().manual_seed(seed)
        word = recipe.word(own, TOKEN, vectors_of(own, "a")[:1], 1)
        word.vectors.requires_grad_()
        captions = recipe.captions(own, TOKEN, [Path("a")], templates_for(own, "object"))
        pictures = Pictures(*torch.randn(2, 1, *own.latent_shape(size, size), generator=generator), captions)
        optimizer = recipe.optimizer(word.vectors, 1.0, 1e-3)
        run = SimpleNamespace(options=Namespace(batch=batch, steps=2), generator=generator, words=word.now(0), done=0)
        learners.append(Learner(own, recipe, word, word.vectors.detach(), pictures, optimizer, 1e-3, run))
    return lambda: step_together(learners, squared_error, loss_scale=1.0)


# ---- Those of diffusers


def theirs(options: Namespace) -> dict[str, Work]:
    """What its textual_inversion.py does in a step, and its pipeline; of random weights, from --weights if given."""
    pipe, size = their_pipeline(options), options.size
    unet, vae, text = pipe.unet, pipe.vae, pipe.text_encoder
    for part in (unet, vae, text):
        part.requires_grad_(False)
    table = text.get_input_embeddings().weight.requires_grad_()
    optimizer, old = torch.optim.AdamW([table], lr=1e-3), table.detach().clone()
    learned = torch.zeros(len(table), dtype=torch.bool)
    learned[0] = True
    scale = vae.config.scaling_factor
    ids = pipe.tokenizer([PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids[0, 1], pixels = 0, (torch.rand(1, 3, size, size) * 2 - 1).to(unet.device, unet.dtype)
    pictures, captions = pixels.repeat(options.batch, 1, 1, 1), ids.repeat(options.batch, 1)
    side = size // pipe.vae_scale_factor
    z_0 = torch.randn(1, unet.config.in_channels, side, side).to(unet.device, unet.dtype)

    def step() -> None:
        latents = vae.encode(pictures).latent_dist.sample().detach() * scale
        eps, t = torch.randn_like(latents), torch.randint(1000, (options.batch,), device=latents.device)
        noisy = pipe.scheduler.add_noise(latents, eps, t)
        context = text(captions.to(latents.device))[0].to(latents.dtype)
        F.mse_loss(unet(noisy, t, context).sample.float(), eps.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # all rows but the new one are put back
            table[~learned] = old[~learned]

    @torch.no_grad()
    def sample() -> None:
        pipe(PROMPT, num_inference_steps=2, guidance_scale=7.5, height=size, width=size, output_type="latent")

    def low_memory() -> None:
        unet.train().enable_gradient_checkpointing()  # it is for training alone; nothing in these models is random
        step()
        unet.eval().disable_gradient_checkpointing()

    return {
        "step": step,
        "low-memory": low_memory,
        "sample": sample,
        "decode": torch.no_grad()(lambda: vae.decode(z_0 / scale).sample),
        "encode": torch.no_grad()(lambda: vae.encode(pixels).latent_dist),
    }


def their_pipeline(options: Namespace):
    """On its device, in its numbers."""
    dtype = cli.DTYPES[options.dtype]
    if not options.weights:
        from helpers.public import pipeline

        # A new one: a step changes its table, and tests share the one that is kept.
        return pipeline.__wrapped__(options.model).to(options.device, dtype)
    # helpers.public is left out: its imports would count as theirs.
    from diffusers import StableDiffusionPipeline

    parts = {"safety_checker": None, "requires_safety_checker": False}
    return StableDiffusionPipeline.from_pretrained(options.weights, torch_dtype=dtype, **parts).to(options.device)


def save_random(folder: Path, kind: str, dtype: str) -> None:
    """Write a random pipeline as diffusers has it, in these numbers, with the merges that our side reads besides."""
    from helpers.public import pipeline, save_folder

    pipeline(kind).to(cli.DTYPES[dtype])
    save_folder(folder, kind)
