"""The samplers: whole trajectories against diffusers' schedulers, and what must hold for any of them."""

from functools import cache, partial

import diffusers
import numpy as np
import pytest
import torch

from tinyldm import InputError
from tinyldm.sampler import SAMPLERS, Between, denoiser, first_noise, guided, noise_like, slerp
from tinyldm.schedule import NoiseSchedule

SEEDS = (3, 4)
SHAPE = (4, 6, 6)
PREDICTIONS = ("eps", "v")

# diffusers' schedulers as SD 1.5's scheduler_config.json (ddim, ddpm) and k-diffusion (the others) set them up
SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
REFERENCES = {
    "ddim": partial(diffusers.DDIMScheduler, set_alpha_to_one=False, **LEADING),
    "ddpm": partial(diffusers.DDPMScheduler, **LEADING),
    "euler": partial(diffusers.EulerDiscreteScheduler, timestep_spacing="linspace"),
    "euler_a": partial(diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="linspace"),
    "dpmpp_2m": partial(diffusers.DPMSolverMultistepScheduler, timestep_spacing="linspace"),
    "dpmpp_2m_karras": partial(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True),
}


@cache
def small_net():
    """A fixed random model whose output depends on z, on t and on neighbouring pixels, and is roughly z as eps is."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 30

    def model(z, t):
        assert z.dtype == torch.float32 and t.shape == (len(z),)
        wave = torch.cos(t.float() / 300).reshape(-1, 1, 1, 1)
        return 0.9 * z + torch.nn.functional.conv2d(z, weight, padding=1) + 0.2 * wave * torch.tanh(z)

    return model


def run(name, steps, prediction="eps", model=None, seeds=SEEDS):
    z, generators = first_noise(SHAPE, seeds)
    return list(sampled(name, z, steps, generators, prediction, model))


def sampled(name, z, steps, generators, prediction="eps", model=None, skip=None):
    schedule = NoiseSchedule(prediction=prediction)
    return SAMPLERS[name](denoiser(model or small_net(), schedule), z, schedule, steps, generators, skip)


def run_diffusers(name, steps, prediction, settings=None):
    """The same with the same noise, divided by sqrt(1 + σ²) where the scheduler works in x = z_0 + σ eps."""
    names = {"eps": "epsilon", "v": "v_prediction"}
    scheduler = REFERENCES[name](prediction_type=names[prediction], **SD15 | (settings or {}))
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # two equal timesteps (Karras, many steps) would make it skip the first
    z, generators = first_noise(SHAPE, SEEDS)
    noise = {"generator": generators} if name in ("ddpm", "euler_a") else {}
    x, trajectory = z * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        output = small_net()(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, **noise).prev_sample
        trajectory.append(x / (1 + scheduler.sigmas[i + 1] ** 2) ** 0.5 if name.startswith("euler") else x)
    return trajectory


def assert_same_trajectory(ours, theirs):
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).norm() <= 1e-4 * b.norm(), f"step {step}"


# ---- Against diffusers


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 200])
@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectory_is_diffusers(name, steps, prediction):
    assert_same_trajectory(run(name, steps, prediction), run_diffusers(name, steps, prediction))


@pytest.mark.parametrize("name", SAMPLERS)
def test_as_many_steps_as_timesteps(name):
    """diffusers' offset would make ddim's and ddpm's timesteps 1 … 1000, of which the last does not exist; and its
    dpmpp_2m divides 0 by 0 where two of its points fall on one timestep (see below), so that has one step less."""
    settings = {"steps_offset": 0} if name in ("ddim", "ddpm") else None
    steps = 999 if name == "dpmpp_2m" else 1000
    assert_same_trajectory(run(name, steps), run_diffusers(name, steps, "eps", settings))


def test_dpmpp_2m_survives_a_repeated_timestep():
    """1001 points rounded onto 1000 timesteps give one twice, a step of no length; diffusers divides 0 by 0 there."""
    assert_same_trajectory(run("dpmpp_2m", 1000)[-1:], run("dpmpp_2m", 999)[-1:])


# ---- What must hold for any sampler


@cache
def oracle(prediction, shape):
    """The model that knows z_0, drawn from N(0, I): it returns the true eps or v at every noise level."""
    z_0 = torch.randn((1, *shape), generator=torch.Generator().manual_seed(7))
    sigmas = NoiseSchedule().sigmas

    def model(z, t):
        sigma = torch.tensor(np.interp(t, np.arange(1000), sigmas), dtype=torch.float32).reshape(-1, 1, 1, 1)
        signal = (1 + sigma**2) ** -0.5
        eps = (z - signal * z_0) / (sigma * signal)
        return eps if prediction == "eps" else signal * eps - sigma * signal * z_0

    return z_0, model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_truth_is_recovered(name, prediction):
    z_0, model = oracle(prediction, SHAPE)
    z = run(name, 20, prediction, model)[-1]
    # ddim stops at timestep 0 and keeps its trace of noise, σ = 0.03
    torch.testing.assert_close(z, z_0.expand_as(z), rtol=0, atol=0.15 if name == "ddim" else 1e-3)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_of_the_truth_is_add_noise(prediction):
    """With a true eps, every step is q(z_t | z_0) with the eps of the first one."""
    z_0, model = oracle(prediction, SHAPE)
    schedule, (z, _) = NoiseSchedule(prediction=prediction), first_noise(SHAPE, SEEDS)
    signal, noise = schedule.scales(951, z)
    eps = (z - signal * z_0) / noise
    for t, z_t in zip([*range(901, 0, -50), 0], run("ddim", 20, prediction, model), strict=True):
        torch.testing.assert_close(z_t, schedule.add_noise(z_0, eps, t), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_latent_has_variance_one(name):
    """So what is yielded on the way is a z_t, in the model's own coordinates, for each of them."""
    _, model = oracle("eps", (4, 32, 32))
    z, generators = first_noise((4, 32, 32), SEEDS)
    for z_t in sampled(name, z, 20, generators, model=model):
        assert z_t.shape == z.shape
        assert z_t.std().item() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    together = run(name, 8, seeds=(5, 6, 7))
    alone = run(name, 8, seeds=(6,))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras"])
def test_deterministic_samplers_draw_nothing(name):
    z, generators = first_noise(SHAPE, SEEDS)
    states = [generator.get_state() for generator in generators]
    for _ in sampled(name, z, 5, generators):
        pass
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_noise_is_left_as_it_was(name):
    z, generators = first_noise(SHAPE, SEEDS)
    list(sampled(name, z, 5, generators))
    assert torch.equal(z, first_noise(SHAPE, SEEDS)[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_graph_is_kept_and_the_caller_keeps_its_gradients(name):
    z, generators = first_noise(SHAPE, SEEDS)
    weight = torch.ones((), requires_grad=True)
    for z_t in sampled(name, z, 3, generators, model=lambda z, t: weight * z):
        assert not z_t.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_everything_happens_where_the_latents_are(name, prediction):
    """The meta device stands for a GPU: it refuses to be mixed with the CPU's tensors, and to be waited for."""
    z, generators = first_noise(SHAPE, SEEDS)

    def model(z, t):
        assert z.is_meta and t.is_meta
        return z

    for z_t in sampled(name, z.to("meta"), 4, generators, prediction, model):
        assert z_t.is_meta and z_t.shape == z.shape


@pytest.mark.parametrize("steps", [0, -3, 1001, 10.5, "10", None])
@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_steps(name, steps):
    with pytest.raises(InputError, match="1 to 1000"):
        run(name, steps)


# ---- Noise


def test_first_noise_is_as_documented():
    z, generators = first_noise(SHAPE, SEEDS)
    expected = [torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    assert torch.equal(z, torch.cat(expected))
    again = noise_like(z, generators)
    assert again.shape == z.shape and again.dtype == torch.float32
    assert not torch.allclose(again, z) and not torch.allclose(again[0], again[1])
    assert torch.equal(noise_like(z.bfloat16(), first_noise(SHAPE, SEEDS)[1]), again)


def test_between_two_seeds_the_noise_turns_and_keeps_its_variance():
    shape = (4, 32, 32)
    ends, _ = first_noise(shape, [3, 4])
    noise, generators = first_noise(shape, [Between(3, 4, share) for share in (0, 0.25, 0.5, 0.75, 1)])
    assert torch.equal(noise[[0, -1]], ends)
    assert ((noise.std(dim=(1, 2, 3)) - 1).abs() < 0.03).all()
    to_first, to_other = ((noise * end).mean(dim=(1, 2, 3)) for end in ends)
    assert (to_first.diff() < -0.05).all() and (to_other.diff() > 0.05).all()
    again, ends = noise_like(noise, generators), noise_like(ends, first_noise(shape, [3, 4])[1])
    assert torch.equal(again[[0, -1]], ends)  # so the way ends at the other's picture, whatever more is drawn
    assert ((again.std(dim=(1, 2, 3)) - 1).abs() < 0.03).all() and (again[2] - again[3]).abs().mean() > 0.1


def test_slerp_goes_along_the_arc_in_equal_angles_and_the_length_in_a_line():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    half = torch.tensor([[2**0.5, 2**0.5], [1.5, 0.0]])
    for share, expected in ((0.0, a), (0.5, half), (1.0, b)):
        torch.testing.assert_close(slerp(a, b, share), expected)
    third = slerp(a[:1], b[:1], 1 / 3)[0]
    assert torch.atan2(third[1], third[0]).item() == pytest.approx(np.pi / 6)
    nothing = torch.zeros(2, 2)  # has no direction
    for ends in ((nothing, b), (b, nothing), (nothing, nothing)):
        assert slerp(*ends, 0.5).isfinite().all()
        for share, expected in enumerate(ends):
            torch.testing.assert_close(slerp(*ends, share), expected)


def test_noise_needs_one_generator_per_picture():
    z, generators = first_noise(SHAPE, SEEDS)
    with pytest.raises(ValueError, match="shorter"):
        noise_like(z, generators[:1])


# ---- Guidance


class RecordingUNet:
    """A UNet whose output tells which latent, timestep and context each row was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, z, t, context):
        self.batches.append(len(z))
        assert t.shape == (len(z),) and len(context) == len(z)
        return z * context.sum((1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("uncond_rows", [1, 3])
@pytest.mark.parametrize(("scale", "batches"), [(1, [3]), (1.0, [3]), (0.0, [6]), (7.5, [6]), (-1.0, [6])])
def test_guidance_goes_from_unconditional_to_conditional(scale, batches, uncond_rows):
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn((3, *SHAPE), generator=generator), torch.tensor([1, 20, 300])
    context = torch.randn(3, 5, 8, generator=generator)
    uncond_context = torch.randn(uncond_rows, 5, 8, generator=generator)
    unet = RecordingUNet()
    guided_output = guided(unet, context, uncond_context, scale)(z, t)
    assert unet.batches == batches
    cond, uncond = (RecordingUNet()(z, t, c) for c in (context, uncond_context.expand(3, -1, -1)))
    torch.testing.assert_close(guided_output, uncond + scale * (cond - uncond), rtol=1e-5, atol=1e-4)


def test_scale_one_needs_no_unconditional_context():
    z, context = first_noise(SHAPE, SEEDS)[0], torch.ones(2, 5, 8)
    assert guided(RecordingUNet(), context, None, 1)(z, torch.tensor([7, 8])).shape == z.shape
