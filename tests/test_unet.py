"""The UNet against diffusers' with the same weights, and against the public checkpoints' lists of weights."""

import pytest
import torch
from helpers.reference import UNETS, count, difference, digest, unets

from tinyldm.unet import UNet, UNetConfig, timestep_embedding

STABLE_DIFFUSION = {  # configuration, number of parameters, digest of the names and shapes in the public checkpoints
    "1.x": (
        UNetConfig(),
        859_520_964,
        "b0828585f6719ebf3393cd4f537c8b83e90dbddbb12e34b197798bc05c43a9ca",
    ),
    "2.x": (
        UNetConfig(heads=None, head_width=64, context_width=1024, linear_projections=True),
        865_910_724,
        "c8627f6484f9e606308235560f06d49f18758da5f08376a6dd87691ed7728d27",
    ),
}


def random_inputs(kind, height=16, width=24):
    """Four noisy latents that are not square, at four timesteps, with four prompts of 11 tokens."""
    config, _ = UNETS[kind]
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(4, config.latent_channels, height, width, generator=generator)
    t = torch.tensor([0.0, 999.0, 500.0, 20.4])
    context = torch.randn(4, 11, config.context_width, generator=generator)
    return z_t, t, context


@pytest.mark.parametrize("kind", UNETS)
def test_output_is_diffusers(kind):
    ours, reference = unets(kind)
    z_t, t, context = random_inputs(kind)
    with torch.no_grad():
        assert difference(ours(z_t, t, context), reference(z_t, t, context).sample) < 1e-5


@pytest.mark.parametrize("kind", UNETS)
def test_whole_timesteps_are_the_same_as_integers_and_as_floats(kind):
    ours, _ = unets(kind)
    z_t, t, context = random_inputs(kind)
    t = t.round()
    with torch.no_grad():
        assert ours(z_t, t.long(), context).equal(ours(z_t, t, context))


@pytest.mark.parametrize("kind", UNETS)
def test_gradient_with_respect_to_the_prompt_and_the_latent_is_diffusers(kind):
    ours, reference = unets(kind)
    z_t, t, context = random_inputs(kind)
    inputs = [z_t.requires_grad_(), context.requires_grad_()]
    gradients = torch.autograd.grad(ours(z_t, t, context).square().mean(), inputs)
    expected = torch.autograd.grad(reference(z_t, t, context).sample.square().mean(), inputs)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert difference(gradient, wanted) < 1e-5


def test_low_memory_gives_the_same_gradient_and_keeps_less_than_a_third_for_it():
    ours, _ = unets("1.x")
    z_t, t, context = random_inputs("1.x")
    gradients, kept = [], []
    for low_memory in (False, True):
        ours.low_memory, storages = low_memory, {}
        context = context.detach().requires_grad_()

        def keep(x: torch.Tensor, storages: dict = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x  # two that share it count once
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = ours(z_t, t, context).square().mean()
        own = {weight.untyped_storage().data_ptr() for weight in ours.parameters()}
        kept.append(sum(x.untyped_storage().nbytes() for pointer, x in storages.items() if pointer not in own))
        gradients += torch.autograd.grad(loss, context)
    ours.low_memory = False
    assert torch.equal(*gradients)
    assert kept[1] < kept[0] / 3


def test_each_picture_listens_to_its_own_latent_timestep_and_prompt():
    ours, _ = unets("1.x")
    z_t, t, context = random_inputs("1.x")
    with torch.no_grad():
        together = ours(z_t, t, context)
        alone = torch.cat([ours(z_t[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(4)])
        rolled = [ours(z_t.roll(1, 0), t, context), ours(z_t, t.roll(1), context), ours(z_t, t, context.roll(1, 0))]
    assert difference(together, alone) < 1e-5
    assert all(difference(together, other) > 1e-3 for other in rolled)


def test_the_smallest_latent_is_one_pixel_at_the_coarsest_level():
    ours, reference = unets("1.x")
    z_t, t, context = random_inputs("1.x", height=ours.config.factor, width=ours.config.factor)
    with torch.no_grad():
        assert difference(ours(z_t, t, context), reference(z_t, t, context).sample) < 1e-5


def test_timestep_embedding_is_cosines_then_sines_from_fast_to_slow():
    t = torch.tensor([0.0, 1.5])
    slow = 10_000**-0.5  # the second of two frequencies: half way from 1 to 1/10000
    expected = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.5, 1.5 * slow, 1.5, 1.5 * slow]])
    expected[1, :2].cos_()
    expected[1, 2:].sin_()
    torch.testing.assert_close(timestep_embedding(t, 4), expected)


@pytest.mark.parametrize("version", STABLE_DIFFUSION)
def test_names_and_shapes_are_the_public_checkpoints(version):
    config, parameters, expected = STABLE_DIFFUSION[version]
    with torch.device("meta"):
        model = UNet(config)
    assert count(model) == parameters
    assert digest(model) == expected


def test_heads_are_8_at_every_level_in_1x_and_64_wide_in_2x():
    config, _, _ = STABLE_DIFFUSION["1.x"]
    assert [config.heads_for(channels) for channels in config.channels] == [8, 8, 8, 8]
    config, _, _ = STABLE_DIFFUSION["2.x"]
    assert [config.heads_for(channels) for channels in config.channels] == [5, 10, 20, 20]
