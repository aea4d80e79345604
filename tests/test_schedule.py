"""NoiseSchedule: against diffusers' tables and formulas, and against the papers' identities."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tinyldm import InputError
from tinyldm.schedule import NoiseSchedule

KINDS = {"scaled_linear": "scaled_linear", "linear": "linear"}


def reference(kind="scaled_linear", **options):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=KINDS[kind], clip_sample=False, **options)


@pytest.fixture
def latents():
    """z_0, eps and t for the first, the last and two timesteps between."""
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(2, 4, 4, 8, 6, generator=generator)
    return z_0, eps, torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_diffusers(kind):
    ours, theirs = NoiseSchedule(kind=kind), reference(kind)
    assert ours.betas.shape == ours.alphas_cumprod.shape == ours.sigmas.shape == (1000,)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == ours.sigmas.dtype == torch.float32
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_known_values_of_stable_diffusion():
    schedule = NoiseSchedule()
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-6)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.0046602, abs=1e-6)
    assert schedule.sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert schedule.sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 10])
def test_short_schedules(kind, steps):
    schedule = NoiseSchedule(steps, kind=kind)
    assert schedule.betas.shape == (steps,)
    assert schedule.timesteps(steps).tolist() == list(range(steps))[::-1]


def test_config_round_trip():
    schedule = NoiseSchedule(500, 0.001, 0.02, "linear", "v")
    again = NoiseSchedule(**schedule.config())
    assert again.config() == schedule.config()
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_add_noise_and_targets_are_diffusers(latents):
    z_0, eps, t = latents
    theirs = reference()
    torch.testing.assert_close(NoiseSchedule().add_noise(z_0, eps, t), theirs.add_noise(z_0, eps, t))
    torch.testing.assert_close(NoiseSchedule(prediction="v").target(z_0, eps, t), theirs.get_velocity(z_0, eps, t))
    assert torch.equal(NoiseSchedule().target(z_0, eps, t), eps)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_prediction_inverts_add_noise(latents, prediction):
    z_0, eps, t = latents
    schedule = NoiseSchedule(prediction=prediction)
    z_t, output = schedule.add_noise(z_0, eps, t), schedule.target(z_0, eps, t)
    predicted = schedule.predict_z_0(z_t, output, *schedule.scales(t, z_t))
    torch.testing.assert_close(predicted, z_0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_one_int_means_the_whole_batch(latents, prediction):
    z_0, eps, _ = latents
    schedule, t = NoiseSchedule(prediction=prediction), torch.full((4,), 321)
    z_t = schedule.add_noise(z_0, eps, t)
    assert torch.equal(schedule.add_noise(z_0, eps, 321), z_t)
    assert torch.equal(schedule.target(z_0, eps, 321), schedule.target(z_0, eps, t))
    of_one, of_many = (schedule.predict_z_0(z_t, eps, *schedule.scales(each, z_t)) for each in (321, t))
    assert torch.equal(of_one, of_many)
    for one, many in zip(schedule.posterior(z_t, z_0, 321, 301), schedule.posterior(z_t, z_0, t, t - 20), strict=True):
        assert torch.equal(one.expand_as(many), many)


def test_tables_go_where_t_and_the_latents_are(latents):
    z_0, eps, t = (x.to("meta") for x in latents)
    for prediction in ("eps", "v"):
        schedule = NoiseSchedule(prediction=prediction)
        for time in (t, 321):
            outputs = [schedule.add_noise(z_0, eps, time), schedule.target(z_0, eps, time)]
            outputs += [schedule.predict_z_0(z_0, eps, *schedule.scales(time, z_0))]
            outputs += [schedule.posterior(z_0, eps, time)[0]]
            assert all(output.is_meta and output.shape == z_0.shape for output in outputs)


def test_add_noise_keeps_the_gradient_of_the_latent(latents):
    z_0, eps, t = latents
    schedule = NoiseSchedule()
    schedule.add_noise(z_0.requires_grad_(), eps, t).sum().backward()
    torch.testing.assert_close(z_0.grad[:, 0, 0, 0], schedule.alphas_cumprod[t].sqrt())


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_is_ddpm_equation_7(latents, t):
    z_0, z_t = (x.double() for x in latents[:2])
    schedule = NoiseSchedule()
    beta, bar, bar_previous = (x.double() for x in (schedule.betas[t], *schedule.alphas_cumprod[[t, t - 1]]))
    mean, variance = schedule.posterior(z_t, z_0, t)
    expected = (bar_previous.sqrt() * beta * z_0 + (1 - beta).sqrt() * (1 - bar_previous) * z_t) / (1 - bar)
    torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-4)
    assert variance.item() == pytest.approx((beta * (1 - bar_previous) / (1 - bar)).item(), rel=1e-3)


def test_posterior_of_a_stride_is_bayes_rule(latents):
    """q(z_s | z_t, z_0) is proportional to q(z_t | z_s) q(z_s | z_0): two Gaussians, their precisions add."""
    z_0, z_t = (x.double() for x in latents[:2])
    schedule, t, s = NoiseSchedule(), 500, 300
    bar_t, bar_s = schedule.alphas_cumprod[[t, s]].double()
    alpha = bar_t / bar_s
    prior, likelihood = 1 / (1 - bar_s), alpha / (1 - alpha)
    mean, variance = schedule.posterior(z_t, z_0, t, s)
    expected = (prior * bar_s.sqrt() * z_0 + likelihood * z_t / alpha.sqrt()) / (prior + likelihood)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    assert variance.item() == pytest.approx(1 / (prior + likelihood).item(), rel=1e-4)


def test_posterior_before_the_first_timestep_is_the_clean_latent(latents):
    z_0, z_t, t = latents
    for arguments in [(0,), (1, -1), (t, torch.full((4,), -1))]:
        mean, variance = NoiseSchedule().posterior(z_t, z_0, *arguments)
        torch.testing.assert_close(mean, z_0)
        assert variance.abs().max() == 0


def test_timesteps_of_fifty_steps():
    schedule = NoiseSchedule()
    assert schedule.timesteps(50).tolist() == list(range(981, 0, -20))
    linspace = schedule.timesteps(50, "linspace")
    assert linspace[[0, -1]].tolist() == [999, 0] and linspace[1].item() == pytest.approx(978.612, abs=1e-3)
    open_end = schedule.timesteps(50, "linspace_open").tolist()
    assert (open_end[:2], open_end[-2:]) == ([999, 979], [40, 20])


@pytest.mark.parametrize("n", [1, 3, 7, 10, 25, 50, 333, 501, 999])
def test_leading_timesteps_are_diffusers(n):
    theirs = DDIMScheduler(steps_offset=1, timestep_spacing="leading")
    theirs.set_timesteps(n)
    assert NoiseSchedule().timesteps(n).tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "linspace_open"])
@pytest.mark.parametrize("n", [1, 2, 999, 1000])
def test_timesteps_stay_inside_the_table(n, spacing):
    timesteps = NoiseSchedule().timesteps(n, spacing)
    assert len(timesteps) == n
    assert timesteps.min() >= 0 and timesteps.max() <= 999
    assert (timesteps.diff() <= 0).all()


@pytest.mark.parametrize("n", [0, -1, 1001, 2.5, 10.0, "10", None, True])
def test_bad_numbers_of_timesteps(n):
    with pytest.raises(InputError, match="1 to 1000"):
        NoiseSchedule().timesteps(n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "quadratic"}, "scaled_linear, linear"),
        ({"prediction": "x0"}, "eps, v"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 10.5}, "at least 1"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start"),
        ({"beta_end": 1.0}, "beta_start"),
        ({"beta_end": float("nan")}, "beta_start"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(InputError, match=message):
        NoiseSchedule(**options)


def test_unknown_spacing():
    with pytest.raises(InputError, match="leading, linspace"):
        NoiseSchedule().timesteps(10, "trailing")


@pytest.mark.parametrize("count", [1, 7, 16, 1500])
def test_drawn_timesteps_are_spread_out_and_all_equally_likely(count):
    schedule, generator = NoiseSchedule(steps=1000), torch.Generator().manual_seed(0)
    drawn = torch.stack([schedule.draw_timesteps(count, generator) for _ in range(60_000 // count)])
    first = torch.arange(count) * 1000 // count
    assert ((drawn >= first) & (drawn <= first + 1000 // count + 1) & (drawn < 1000)).all()
    shares = drawn.flatten().bincount(minlength=1000) / drawn.numel()
    assert len(shares) == 1000 and (shares - 0.001).abs().max() < 5 * (0.001 / drawn.numel()) ** 0.5
