"""The autoencoder against diffusers' with the same weights, and against the public checkpoints' list of weights."""

import pytest
import torch
from helpers.reference import autoencoder_reference, count, difference, digest, randomise

from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL, Downsample

CONFIGS = {
    "Stable Diffusion's four levels": AutoencoderConfig(channels=(32, 64, 64, 64), norm_groups=8),
    "three levels to eight channels": AutoencoderConfig(
        channels=(16, 32, 48), blocks=1, latent_channels=8, norm_groups=4
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Ours and diffusers', of the same shape and with the same random weights."""
    ours = AutoencoderKL(CONFIGS[request.param])
    randomise(ours)
    return ours.eval(), autoencoder_reference(ours)


def random_pictures(height=40, width=24):
    return 2 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) - 1


def random_latents(config, height=5, width=3):
    return torch.randn(2, config.latent_channels, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_encode_is_diffusers(pair):
    ours, reference = pair
    pictures = random_pictures()
    mean, log_variance = ours.encode(pictures)
    expected = reference.encode(pictures).latent_dist
    assert mean.shape == (2, ours.config.latent_channels, 40 // ours.config.factor, 24 // ours.config.factor)
    assert difference(mean, expected.mean) < 1e-5
    assert difference(log_variance, expected.logvar) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(5, 3), (1, 1), (1, 4)])
def test_decode_is_diffusers_down_to_a_latent_of_one_pixel(pair, height, width):
    ours, reference = pair
    z = random_latents(ours.config, height, width)
    pictures = ours.decode(z)
    assert pictures.shape == (2, 3, height * ours.config.factor, width * ours.config.factor)
    assert difference(pictures, reference.decode(z).sample) < 1e-5


@torch.no_grad()
def test_sample_is_diffusers_from_the_same_noise(pair):
    ours, reference = pair
    pictures = random_pictures()
    mean, log_variance = ours.encode(pictures)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    expected = reference.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(3))
    assert difference(ours.sample(mean, log_variance, eps), expected) < 1e-5


def test_sample_is_the_mean_plus_sigma_times_eps():
    mean, variance, eps = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0, 0.25, 1.0]), torch.tensor([0.5, 2.0, 0.0])
    expected = torch.tensor([1 + 2 * 0.5, -2 + 0.5 * 2, 3.0])
    torch.testing.assert_close(AutoencoderKL.sample(mean, variance.log(), eps), expected)


@torch.no_grad()
def test_log_variance_is_clamped_where_exp_would_overflow():
    ours = AutoencoderKL(CONFIGS["Stable Diffusion's four levels"])
    randomise(ours)
    ours.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, -5.0, 5.0])  # of the four log-variances
    reference = autoencoder_reference(ours)
    pictures = random_pictures()
    mean, log_variance = ours.encode(pictures)
    assert (log_variance[:, 0] == -30).all() and (log_variance[:, 1] == 20).all()
    assert difference(log_variance, reference.encode(pictures).latent_dist.logvar) < 1e-5
    assert ours.sample(mean, log_variance, torch.ones_like(mean)).isfinite().all()


@torch.no_grad()
def test_the_way_down_pads_right_and_bottom_only():
    step = Downsample(1)
    step.conv.bias.zero_()
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)

    def reads(i, j):
        """What a kernel with a single one, at row i and column j, picks out of the pixels."""
        step.conv.weight.zero_()
        step.conv.weight[0, 0, i, j] = 1
        return step(pixels)[0, 0].tolist()

    assert reads(0, 0) == [[0, 2], [8, 10]]  # padding on all sides would begin with a zero here
    assert reads(1, 1) == [[5, 7], [13, 15]]
    assert reads(2, 2) == [[10, 0], [0, 0]]  # the last row and column read the padding


def test_gradients_reach_every_weight_and_the_pictures_as_in_diffusers(pair):
    ours, reference = pair
    pictures = random_pictures().requires_grad_()
    eps = random_latents(ours.config, 40 // ours.config.factor, 24 // ours.config.factor)

    ours.zero_grad()
    loss = (ours.decode(ours.sample(*ours.encode(pictures), eps)) - pictures).square().mean()
    loss.backward()
    for name, p in ours.named_parameters():
        # A constant added to every key shifts all logits of a query alike, which softmax does not see.
        if not name.endswith("attn_1.k.bias"):
            assert p.grad.isfinite().all() and p.grad.any(), name

    posterior = reference.encode(pictures).latent_dist
    loss = (reference.decode(posterior.mean + posterior.std * eps).sample - pictures).square().mean()
    (expected,) = torch.autograd.grad(loss, pictures)
    assert difference(pictures.grad, expected) < 1e-4


def test_names_and_shapes_are_the_public_checkpoints():
    with torch.device("meta"):
        model = AutoencoderKL()
    assert count(model) == 83_653_863
    assert digest(model) == "5c5821b036193b0effb3adf049e2c1c81c13c11351273652c09fab3be5aa1501"
