"""Speed and memory beside diffusers, or beside another checkout of this project, both sides in turn.

    python tests/bench.py --beside ../old                 the tiny checkpoint here and there
    python tests/bench.py --model 1.5                     random weights of Stable Diffusion 1.5's size, and diffusers
    python tests/bench.py --model 1.5 --dtype bfloat16 --what step --json step.json

Each side is a process of its own and works while the other waits; a machine that is slower for a while is so for both.
A ratio is the median over the rounds of the other side's seconds over ours. Where ours are told as a share of the peak,
that is of the rate of a product of matrices of 2048x2048 in the same numbers; PyTorch counts the operations. Memory is
the most there was: of a CPU's the anonymous kind, which a mapped file is not; of a GPU's what PyTorch took.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm

TESTS = Path(__file__).parent
if str(TESTS) not in sys.path:  # as pytest sets it; another checkout's own come before it
    sys.path += [str(TESTS), str(TESTS.parent)]

from helpers.memory import Anonymous

from tinyldm import InputError, cli
from tinyldm.latent_diffusion import LatentDiffusion

WORKS = {
    "step": "training step",
    "sample": "two steps of DDIM with guidance",
    "decode": "decoding",
    "encode": "encoding",
}
OURS, DIFFUSERS = "tinyldm", "diffusers"
PROMPT = "a photo of a S*"
MATRIX = 2048

ATTENTION = {  # on a CPU, which the counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}

Work = Callable[[], object]


# ---- One side's works. Each is called once before it counts.


def ours(options: Namespace) -> dict[str, Work]:
    """Of the checkout that Python finds first."""
    from tinyldm.formats.checkpoint import load_checkpoint
    from tinyldm.inversion import Pictures, templates_for, vectors_of
    from tinyldm.recipes import composed
    from train import inversion_loss

    device, dtype = options.device, cli.DTYPES[options.dtype]
    if options.model == "tiny":
        model = load_checkpoint(TESTS.parent / "weights" / "tiny", device, dtype)
        batch = model.defaults.batch
    else:
        model, batch = random_model(options.model).to(device, dtype), 1
    size = options.size
    model.check_size(size, size)
    recipe = composed("low-variance,falling")
    word = recipe.word(model, "S*", vectors_of(model, "circle" if options.model == "tiny" else "a")[:1], 1)
    vectors = word.vectors.requires_grad_()
    captions = word.captions(recipe.captions(model, "S*", [Path("a")], templates_for(model, "object")))
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = Pictures(*(x.cpu() for x in model.encode(pixels)), captions)
    optimizer = torch.optim.AdamW([vectors], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    z_0 = torch.randn(1, *model.latent_shape(size, size), generator=generator).to(device)

    def step() -> None:
        drawn = recipe.draw(pictures, model.schedule, batch, generator)
        inversion_loss(model, drawn, word.now(0)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample() -> None:
        count = 4 if options.model == "tiny" else 1
        shape = {"height": size, "width": size}
        for _ in model.generate([PROMPT] * count, range(count), words=word.now(0), steps=2, guidance=7.5, **shape):
            pass

    return {
        "step": step,
        "sample": sample,
        "decode": lambda: model.decode(z_0),
        "encode": lambda: model.encode(pixels),
    }


def random_model(kind: str) -> LatentDiffusion:
    from helpers.public import SHAPES, merges

    from tinyldm.autoencoder import AutoencoderKL
    from tinyldm.clip import CLIPTextEncoder
    from tinyldm.schedule import NoiseSchedule
    from tinyldm.tokenizer import Tokenizer
    from tinyldm.unet import UNet

    shape = SHAPES[kind]
    networks = CLIPTextEncoder(shape.text), UNet(shape.unet), AutoencoderKL(shape.autoencoder)
    return LatentDiffusion(Tokenizer(merges(shape)), *networks, NoiseSchedule())


def theirs(options: Namespace) -> dict[str, Work]:
    """What diffusers' textual_inversion.py does in a step, and its pipeline."""
    from helpers.public import pipeline

    pipe = pipeline(options.model).to(options.device, cli.DTYPES[options.dtype])
    unet, vae, text, size = pipe.unet, pipe.vae, pipe.text_encoder, options.size
    for part in (unet, vae, text):
        part.requires_grad_(False)
    table = text.get_input_embeddings().weight.requires_grad_()
    optimizer, old = torch.optim.AdamW([table], lr=1e-3), table.detach().clone()
    learned = torch.zeros(len(table), dtype=torch.bool)
    learned[0] = True
    scale = vae.config.scaling_factor
    ids = pipe.tokenizer([PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    ids[0, 1], pixels = 0, (torch.rand(1, 3, size, size) * 2 - 1).to(unet.device, unet.dtype)
    z_0 = vae.encode(pixels).latent_dist.mean

    def step() -> None:
        latents = vae.encode(pixels).latent_dist.sample().detach() * scale
        eps, t = torch.randn_like(latents), torch.randint(1000, (1,), device=latents.device)
        noisy = pipe.scheduler.add_noise(latents, eps, t)
        context = text(ids.to(latents.device))[0].to(latents.dtype)
        F.mse_loss(unet(noisy, t, context).sample.float(), eps.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # all rows but the new one are put back
            table[~learned] = old[~learned]

    @torch.no_grad()
    def sample() -> None:
        pipe(PROMPT, num_inference_steps=2, guidance_scale=7.5, height=size, width=size, output_type="latent")

    return {
        "step": step,
        "sample": sample,
        "decode": torch.no_grad()(lambda: vae.decode(z_0 / scale).sample),
        "encode": torch.no_grad()(lambda: vae.encode(pixels).latent_dist),
    }


# ---- A side's process: the name of a work in, a line of JSON out


def serve(options: Namespace) -> None:
    works = {OURS: ours, DIFFUSERS: theirs}[options.serve](options)
    synchronize = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    for line in sys.stdin:
        if (what := line.strip()) == "peak":
            answer = {"flops": peak(options)}
        elif what.startswith("count "):
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                works[what.removeprefix("count ")]()
            answer = {"operations": counter.get_total_flops()}
        else:
            is_cuda = options.device == "cuda"
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
            with Anonymous() as memory:
                start = time.perf_counter()
                works[what]()
                synchronize()
                answer = {"seconds": time.perf_counter() - start}
            answer["memory"] = torch.cuda.max_memory_allocated() if is_cuda else memory.highest
        print(json.dumps(answer), flush=True)


def peak(options: Namespace) -> float:
    """Operations a second of a product of matrices."""
    a = torch.rand(MATRIX, MATRIX).to(options.device, cli.DTYPES[options.dtype])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(seconds)


# ---- Both sides


class Side:
    """One of the two processes."""

    def __init__(self, kind: str, tree: Path, options: Namespace):
        command = [sys.executable, __file__, "--serve", kind]
        for name in ("model", "dtype", "device", "size"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, what: str) -> dict[str, float]:
        with suppress(BrokenPipeError):
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            if answer := self.process.stdout.readline():
                return json.loads(answer)
        raise InputError("a side ended before its work was done; what it says above tells why")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def compared(options: Namespace) -> list[dict[str, object]]:
    """A row for each work: seconds of each round of both sides, and what comes of them."""
    other = DIFFUSERS if options.beside == DIFFUSERS else OURS
    tree = TESTS.parent if options.beside == DIFFUSERS else Path(options.beside).absolute()
    sides = [Side(OURS, TESTS.parent, options), Side(other, tree, options)]
    try:
        return [row(what, sides, options) for what in options.what]
    finally:
        for side in sides:
            side.end()


def row(what: str, sides: list[Side], options: Namespace) -> dict[str, object]:
    for side in sides:
        side.ask(what)
    answers = [[side.ask(what) for side in sides] for _ in tqdm(range(options.rounds), desc=WORKS[what])]
    seconds = [[answer["seconds"] for answer in of_side] for of_side in zip(*answers, strict=True)]
    operations = sides[0].ask(f"count {what}")["operations"]
    return {
        "what": what,
        "ours": seconds[0],
        "theirs": seconds[1],
        "ratio": median(theirs / ours for ours, theirs in zip(*seconds, strict=True)),
        "share": operations / median(seconds[0]) / sides[0].ask("peak")["flops"],
        "memory": [max(answer["memory"] for answer in of_side) for of_side in zip(*answers, strict=True)],
    }


def as_table(rows: list[dict[str, object]], options: Namespace) -> Iterator[str]:
    yield f"| {options.model}, {options.dtype}, {options.device} | ours | {options.beside} | ratio | peak | GB |"
    yield "|---|---|---|---|---|---|"
    for found in rows:
        sides = " | ".join(
            f"{median(found[side]):.3g} s ({min(found[side]):.3g} to {max(found[side]):.3g})"
            for side in ("ours", "theirs")
        )
        memory = ", ".join(f"{value / 1e9:.2f}" for value in found["memory"])
        yield f"| {WORKS[found['what']]} | {sides} | {found['ratio']:.2f} | {found['share']:.0%} | {memory} |"


def main(arguments: list[str]) -> None:
    options = parse_options(arguments)
    if options.serve:
        return serve(options)
    rows = compared(options)
    print("\n".join(as_table(rows, options)))
    if options.json:
        options.json.write_text(json.dumps(vars(options) | {"json": None, "rows": rows}, indent=1) + "\n")


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=["tiny", "1.5", "2.1", "1.x", "2.x"], default="tiny", help="1.x, 2.x: small ones (tiny)")
    add("--beside", metavar="DIR", help="a checkout of this project (default: diffusers)")
    add("--what", nargs="+", choices=list(WORKS), default=list(WORKS), help="default: all")
    add("--dtype", choices=list(cli.DTYPES), default="float32")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--size", type=cli.whole_number(8), metavar="PIXELS", help="of pictures (default: the model's)")
    add("--rounds", type=cli.whole_number(1), default=5, metavar="N", help="%(default)s")
    add("--json", type=cli.path, metavar="FILE", help="every round's seconds besides")
    add("--serve", choices=[OURS, DIFFUSERS], help="be one side; the command itself starts both so")
    options = parser.parse_args(arguments)
    if options.model == "tiny" and not options.beside and not options.serve:
        raise InputError("diffusers has no tiny checkpoint, expected --beside DIR or --model; try --model 1.5")
    options.beside = options.beside or DIFFUSERS
    if options.beside != DIFFUSERS and not (Path(options.beside) / "tinyldm" / "recipes.py").is_file():
        raise InputError(f"--beside {options.beside} is no checkout of this project; give the folder of one")
    options.size = options.size or {"tiny": 64, "1.5": 512, "2.1": 768}.get(options.model, 32)
    return options


if __name__ == "__main__":
    cli.run(main)
