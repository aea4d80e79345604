"""On a CUDA GPU losses, gradients, words and pictures are those of the CPU; without one, these tests are skipped.

In float32 PyTorch lets cuDNN's convolutions round what they read to TensorFloat-32, 10 bits of mantissa instead of 23.
Where a test compares to the last digits it asks for `full_float32`.
"""

import csv
import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EXAMPLES, WEIGHTS
from PIL import Image

from tinyldm import cli
from tinyldm import run as running
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.inversion import Batch, add_words, vectors_of
from tinyldm.lab.pretraining import loop
from tinyldm.lab.pretraining.stages import STAGES
from tinyldm.lab.world.distribution import make_pictures
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.recipes import RECIPES
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNet, UNetConfig
from train import LOSS_SCALE, inversion_loss

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

HEART = EXAMPLES / "checkered-heart"
INIT = "thing"
CAPTIONS = ["a photo of a S*", "two S* next to a S*", "a sketch of a S* on a blue background", "S*"]
PROMPTS = ["a photo of a red star on a blue background", "two lemons"]
TEXT = CLIPTextConfig(vocabulary_size=958, length=32, width=128, layers=3, heads=2)


@pytest.fixture
def full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def one_picture_a_preview(monkeypatch) -> None:
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


def model_of(kind: str) -> LatentDiffusion:
    """The tiny checkpoint, or a random model with the heads, the groups and the projections of Stable Diffusion's."""
    tiny = load_checkpoint(WEIGHTS)
    if kind == "tiny":
        return tiny
    torch.manual_seed(0)
    is_2x = kind == "2.x"
    text = replace(TEXT, activation="gelu", skip_last=1) if is_2x else TEXT
    heads = {"heads": None, "head_width": 64, "linear_projections": True} if is_2x else {}
    unet = UNetConfig(channels=(64, 128), attention=(True, False), blocks=1, context_width=128, **heads)
    autoencoder = AutoencoderConfig(channels=(32, 64), blocks=1)
    model = LatentDiffusion(
        tiny.tokenizer,
        CLIPTextEncoder(text),
        UNet(unet),
        AutoencoderKL(autoencoder),
        NoiseSchedule(prediction="v" if is_2x else "eps"),
    )
    for network in model.networks():  # what begins at zero would hide all that goes before it
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape)
    return model.to("cpu")


def a_batch(model: LatentDiffusion) -> Batch:
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, len(CAPTIONS), *model.latent_shape(64, 64), generator=generator)
    return Batch(z_0, eps, torch.tensor([10, 300, 600, 950]), CAPTIONS)


def a_word(model: LatentDiffusion, *words: str) -> dict[str, torch.Tensor]:
    """word -> vectors that are to learn, each word added to the model's tokenizer."""
    learning = {word: vectors_of(model, INIT).requires_grad_() for word in words}
    add_words(model, learning)
    return learning


def difference(there: torch.Tensor, here: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value on the CPU."""
    assert there.device.type == DEVICE and there.shape == here.shape and here.abs().max() > 0
    return float((there.detach().float().cpu() - here.detach()).abs().max() / here.detach().abs().max())


def direction(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of the angle between two tensors, each taken as one long vector."""
    return float(F.cosine_similarity(a.detach().float().cpu().flatten(), b.detach().float().cpu().flatten(), dim=0))


# ---- The model


@pytest.mark.parametrize("kind", ["tiny", "1.x", "2.x"])
def test_every_network_gives_what_it_gives_on_the_cpu(full_float32, kind):
    here, there = model_of(kind), model_of(kind).to(DEVICE)
    batch = a_batch(here)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    context = here.context(PROMPTS * 2)
    assert difference(there.context(PROMPTS * 2), context) < 1e-4
    output = here.predict(batch.z_0, batch.t, context)
    assert difference(there.predict(*(x.to(DEVICE) for x in (batch.z_0, batch.t, context))), output) < 2e-4
    assert difference(there.decode(batch.z_0.to(DEVICE)), here.decode(batch.z_0)) < 2e-4
    for ours, theirs in zip(there.encode(pictures), here.encode(pictures), strict=True):
        assert difference(ours, theirs) < 2e-4


def test_half_precision_is_bfloat16_where_the_card_computes_in_it():
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert cli.choose_dtype("auto", cli.choose_device("auto")) == expected


# ---- A training step


@pytest.mark.parametrize("kind", ["tiny", "1.x", "2.x"])
def test_a_steps_loss_and_gradient_are_those_of_the_cpu(full_float32, kind):
    here, there = loss_and_gradient(model_of(kind)), loss_and_gradient(model_of(kind).to(DEVICE))
    assert difference(there[0], here[0]) < 1e-4
    assert difference(there[1], here[1]) < 2e-3
    assert here[1].abs().max(dim=1).values.min() > 0  # every vector learns


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 0.9999), (torch.float16, 0.9999), (torch.bfloat16, 0.998)], ids=str
)
def test_the_gradient_in_any_precision_points_where_that_of_the_cpu_does(dtype, least):
    here = loss_and_gradient(model_of("tiny"))
    there = loss_and_gradient(model_of("tiny").to(DEVICE, dtype), LOSS_SCALE if dtype == torch.float16 else 1.0)
    assert there[1].dtype == torch.float32
    assert difference(there[0], here[0]) < 0.005
    assert direction(there[1], here[1]) > least


def loss_and_gradient(model: LatentDiffusion, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    words = a_word(model, "S*")
    loss = inversion_loss(model, a_batch(model), words)
    (scale * loss).backward()
    return loss, words["S*"].grad / scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_change_the_word_of_the_captions_and_no_other_bit(dtype):
    model = model_of("tiny").to(DEVICE, dtype)
    words = a_word(model, "S*", "<other>")
    before = {name: vectors.detach().clone() for name, vectors in words.items()}
    weights = [{name: p.clone() for name, p in network.state_dict().items()} for network in model.networks()]
    optimizer = torch.optim.AdamW(words.values(), lr=0.01, weight_decay=0)
    for _ in range(5):
        inversion_loss(model, a_batch(model), words).backward()
        assert words["<other>"].grad.abs().max() == 0
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(words["<other>"], before["<other>"])
    assert (words["S*"] - before["S*"]).abs().amax(dim=1).min() > 0
    for network, old in zip(model.networks(), weights, strict=True):
        assert all(torch.equal(p, old[name]) for name, p in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())


def test_the_unets_way_there_and_back_never_waits_for_the_gpu():
    """Only the copies to the GPU before it and the reading of the loss after it may."""
    model = model_of("tiny").to(DEVICE, torch.bfloat16)
    words, batch = a_word(model, "S*"), a_batch(model)
    z_0, eps, t = (x.to(DEVICE) for x in (batch.z_0, batch.eps, batch.t))
    z_t = model.schedule.add_noise(z_0, eps, t)
    context = model.context(batch.captions, words).detach().requires_grad_()

    def there_and_back() -> None:
        F.mse_loss(model.predict(z_t, t, context), eps).backward()

    there_and_back()  # once before: libraries wait while they start
    torch.cuda.set_sync_debug_mode("error")
    try:
        there_and_back()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert context.grad.isfinite().all()


# ---- train.py


def train(run, folder, *words: object, steps: int = 40, status: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """The vectors that train.py learned in so many steps, and the loss of each step that it took."""
    command = ("train.py", "--images", HEART, "--token", "S*", "--batch", 4, "--steps", steps, "--lr", 0.01)
    outcome = run(*command, "--preview-every", 1000, "--out", folder, *words)
    assert outcome.status == status, outcome
    assert (folder / "preview.png").exists()
    rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return load_embeddings(folder / "embedding.safetensors")["S*"], np.array([float(row["loss"]) for row in rows])


@pytest.mark.parametrize(("dtype", "near"), [("float32", 0.005), ("float16", 0.005), ("bfloat16", 0.02)])
def test_a_word_is_learned_as_on_the_cpu(run, tmp_path, dtype, near):
    """Both draw the same batches, so that the losses of every step can be compared."""
    expected, losses_here = train(run, tmp_path / "here", "--device", "cpu")
    vectors, losses = train(run, tmp_path / "there", "--device", DEVICE, "--dtype", dtype)
    start = vectors_of(model_of("tiny"), INIT)
    assert np.isfinite(losses).all() and vectors.isfinite().all()
    assert np.abs(losses / losses_here - 1).max() < near
    assert losses[-10:].mean() < losses[:10].mean()
    assert direction(vectors - start, expected - start) > 0.99


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - {"captions"}))
def test_every_recipe_learns_there_what_it_learns_on_the_cpu(run, tmp_path, full_float32, recipe):
    words = ("--recipe", recipe)
    expected, losses_here = train(run, tmp_path / "here", *words, "--device", "cpu", steps=12)
    vectors, losses = train(run, tmp_path / "there", *words, "--device", DEVICE, steps=12)
    assert len(losses) == len(losses_here) and np.abs(losses / losses_here - 1).max() < 0.01
    assert direction(vectors, expected) > 0.99


@pytest.mark.parametrize(("first", "second"), [(DEVICE, DEVICE), ("cpu", DEVICE), (DEVICE, "cpu")])
def test_interrupted_and_resumed_is_as_uninterrupted(run, tmp_path, monkeypatch, full_float32, first, second):
    words = ("--dtype", "float32", "--device")
    whole, losses = train(run, tmp_path / "whole", *words, DEVICE, steps=6)
    log = running.Run.log

    def interrupted_log(self, loss):
        log(self, loss)
        if self.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", interrupted_log)
        part, losses_of_part = train(run, tmp_path / "parts", *words, first, steps=6, status=130)
    assert len(losses_of_part) == 3 and not torch.allclose(part, whole, atol=2e-3)
    resumed, losses_resumed = train(run, tmp_path / "parts", *words, second, "--resume", steps=6)
    assert len(losses_resumed) == 6
    assert np.allclose(losses_resumed, losses, rtol=1e-3)
    assert torch.allclose(resumed, whole, atol=2e-3)  # a step of AdamW changes a number by up to 1e-2


# ---- Pretraining


def losses_of_a_stage(folder, stage: str, monkeypatch, eager: bool) -> list[float]:
    """Of ten steps of a stage, each recorded from the fourth on; eager: none is."""
    pixels, pictures = make_pictures(80, seed=0)
    recipe = loop.Recipe(steps=10, batch=16, lr=1e-3, warmup=5)
    losses, update = [], loop.Training.update

    def noted_update(*arguments):
        found = update(*arguments)
        losses.append(float(found["loss"]))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "update", noted_update)
        if eager:
            patch.setattr(loop, "Recorded", lambda step: step)
        _, train_stage = STAGES[stage]
        assert train_stage(loop.Job(folder, stage, recipe, torch.from_numpy(pixels), pictures, seed=0, device=DEVICE))
    return losses


@pytest.mark.parametrize("stage", ["clip", "autoencoder"])
def test_the_losses_of_recorded_steps_are_those_of_eager_ones(tmp_path, monkeypatch, stage):
    """A recording that kept its first batch, its first rate or old moments would give others."""
    recorded, eager = (losses_of_a_stage(tmp_path / str(way), stage, monkeypatch, eager=way) for way in (False, True))
    assert len(recorded) == len(eager) == 10
    assert np.allclose(recorded, eager, rtol=0.01)
    assert len(set(recorded)) == 10


def test_a_step_is_recorded_anew_when_the_batchs_shapes_change():
    """Recorded once for all batches of a shape; every step counts, none is taken twice."""
    total, calls = torch.zeros(1, device=DEVICE), []

    def step(batch):
        calls.append({name: tuple(x.shape) for name, x in batch.items()})
        for x in batch.values():
            total.add_(x.sum())
        return {"loss": total.sum()}

    recorded, expected, fresh_calls = loop.Recorded(step), 0.0, loop.Recorded.EAGER_STEPS + 1
    for i, names in enumerate((("x",), ("x", "kept"), ("x",))):
        for j in range(8):
            batch = {name: torch.full((2 + i,), float(j)) for name in names}
            expected += sum(float(x.sum()) for x in batch.values())
            assert float(recorded(batch)["loss"]) == expected
        assert len(calls) == (i + 1) * fresh_calls
        assert calls[-1] == {name: (2 + i,) for name in names}


# ---- sample.py


def sampled(run, folder, *words: object, prompts: list[str] = PROMPTS) -> np.ndarray:
    """The prompts' pictures in 25 steps of DDIM, (prompts, h, w, 3) in 0..255."""
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    outcome = run("sample.py", *asked, "--steps", 25, "--sampler", "ddim", "--seed", 5, "--out", folder, *words)
    assert outcome.status == 0, outcome
    return np.stack([np.asarray(Image.open(folder / f"{i:04d}.png"), dtype=int) for i in range(len(prompts))])


def test_the_same_seed_is_the_same_picture_as_on_the_cpu(run, tmp_path, full_float32):
    here = sampled(run, tmp_path / "here", "--device", "cpu")
    there = sampled(run, tmp_path / "there", "--device", DEVICE, "--dtype", "float32")
    assert np.abs(there - here).max() <= 1
    assert np.abs(here[0] - here[1]).mean() > 20


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.1), ("float16", 0.2), ("bfloat16", 1.0), ("auto", 1.0)])
def test_in_any_precision_it_is_nearly_the_same_picture(run, tmp_path, dtype, most):
    here = sampled(run, tmp_path / "here", "--device", "cpu")
    there = sampled(run, tmp_path / "there", "--device", DEVICE, "--dtype", dtype)
    assert np.abs(there - here).mean() < most  # of 255


def test_a_word_that_was_learned_there_is_drawn_as_on_the_cpu(run, tmp_path):
    train(run, tmp_path / "word", "--device", DEVICE)
    words = ("--embedding", tmp_path / "word" / "embedding.safetensors")
    prompts = ["a photo of S*", "S* next to a circle"]
    here = sampled(run, tmp_path / "here", *words, "--device", "cpu", prompts=prompts)
    there = sampled(run, tmp_path / "there", *words, "--device", DEVICE, prompts=prompts)
    assert np.abs(there - here).mean() < 2.0  # of 255


def test_on_a_full_gpu_a_run_stops_with_one_line(run):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(150 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        size = ("--height", 1024, "--width", 1024)
        outcome = run("sample.py", "--prompt", "two lemons", "--num", 4, "--steps", 1, *size, "--device", DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "not enough memory; make the pictures smaller, or fewer at once" in outcome.error
