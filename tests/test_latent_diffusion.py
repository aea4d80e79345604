"""The five parts together: words find their ids, half precision stays inside, and sizes must fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tinyldm import InputError, latent_diffusion
from tinyldm.images import to_images
from tinyldm.inversion import add_words
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.sampler import SAMPLERS, denoiser, first_noise, guided
from tinyldm.schedule import NoiseSchedule


def test_every_word_brings_its_own_vectors_in_whatever_order_the_words_are_given(tiny):
    star, lemon = (tiny.text_encoder.table[tiny.tokenizer.encode(word)] for word in ("star", "lemon"))
    add_words(tiny, {"S*": star, "<l>": lemon})
    expected = tiny.context(["a star next to a lemon"])
    for words in ({"S*": star, "<l>": lemon}, {"<l>": lemon, "S*": star}):
        assert torch.equal(tiny.context(["a S* next to a <l>"], words), expected)


def test_a_word_without_its_vectors_is_an_error(tiny):
    vectors = torch.zeros(1, 128)
    add_words(tiny, {"S*": vectors, "<l>": vectors})
    with pytest.raises(KeyError, match="<l>"):
        tiny.context(["a S*"], {"S*": vectors})
    with pytest.raises(ValueError, match="pass its vectors"):
        tiny.context(["a S*"])


class HalfUNet(torch.nn.Module):
    """Answers with most of what it is given, which must be in this dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, z, t, context):
        assert z.dtype == context.dtype == self.dtype
        return 0.9 * z


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 3.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_models_are_sampled_in_float32(tiny, name, scale, dtype):
    model = replace(tiny.to("cpu", dtype), unet=HalfUNet(dtype))
    z, generators = first_noise((4, 6, 6), [3, 4])
    context = torch.zeros(2, 5, 8, dtype=dtype)
    denoise = denoiser(guided(model.predict, context, context[:1], scale), NoiseSchedule())
    for z_t in SAMPLERS[name](denoise, z, NoiseSchedule(), 4, generators):
        assert z_t.dtype == torch.float32 and z_t.isfinite().all()


def test_the_autoencoders_maps_have_their_channels_last_whatever_its_kernels_and_the_latents_have_not(tiny):
    kernels, seen = tiny.autoencoder.to(memory_format=torch.contiguous_format), []
    for module in kernels.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    latents = tiny.encode(torch.rand(2, 3, 64, 64))
    tiny.decode(latents[0])
    assert len(seen) > 10 and all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
    assert all(x.is_contiguous() for x in latents)


def test_large_pictures_are_decoded_one_by_one_and_small_ones_together(tiny, monkeypatch):
    z_0, sizes = torch.randn(3, 12, 8, 12, generator=torch.Generator().manual_seed(0)), []
    decode = tiny.autoencoder.decode
    monkeypatch.setattr(tiny.autoencoder, "decode", lambda z: sizes.append(len(z)) or decode(z))
    together = tiny.decode(z_0)
    monkeypatch.setattr(latent_diffusion, "DECODED", 2 * 64 * 96)
    in_two_parts = tiny.decode(z_0)
    monkeypatch.setattr(latent_diffusion, "DECODED", 100)
    one_by_one = tiny.decode(z_0)
    assert sizes == [3, 2, 1, 1, 1, 1]
    assert (together - in_two_parts).abs().max() < 1e-5 and (together - one_by_one).abs().max() < 1e-5


def test_sampling_takes_what_is_given_and_the_defaults_for_the_rest():
    defaults = Defaults(size=64, sampler="ddim", sampler_steps=25, guidance=3.0)
    assert defaults.sampling() == ("ddim", 25, 3.0, 64, 64)
    assert defaults.sampling("euler", 4, 0.5, 96, 32) == ("euler", 4, 0.5, 96, 32)


def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_does(tiny):
    tiny.check_size(96, 64)
    with pytest.raises(InputError, match=r"50x64 pixels does not fit .* multiples of 16; try 48x64"):
        tiny.check_size(50, 64)
    with pytest.raises(InputError, match="multiples of 16"):
        next(tiny.generate(["a star"], [0], height=50))


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmpp_2m_karras"])
def test_a_picture_alone_is_that_of_a_batch_within_1_of_255(tiny, sampler):
    """Not bit for bit: a matrix product of more rows adds up in another order, 1e-6 in a call of the UNet."""

    def pixels(seeds):
        *_, z_0 = tiny.generate(["a red star"] * len(seeds), seeds, sampler=sampler, steps=3)
        return np.stack([np.asarray(image, int) for image in to_images(tiny.decode(z_0))])

    together = pixels(range(8))
    assert np.abs(together[0] - together[1]).max() > 50
    assert np.abs(pixels([5])[0] - together[5]).max() <= 1


def test_pictures_that_cannot_fit_are_refused_but_on_a_gpu_its_allocator_says_so(tiny, monkeypatch):
    side = 2**16
    with pytest.raises(InputError, match=r"65536x65536 pixels take more than \d+ GiB .* make the pictures smaller$"):
        tiny.check_size(side, side)
    tiny.check_size(64, 64, 16)
    with pytest.raises(InputError, match=r"64x64 pixels in a batch of 100000 take .* smaller, or the batch$"):
        tiny.check_size(64, 64, 100_000)
    monkeypatch.setattr(LatentDiffusion, "device", torch.device("cuda"))
    tiny.check_size(side, side)


def test_the_gradient_of_prompts_that_repeat_has_the_same_bits_every_time(tiny, monkeypatch):
    """With two threads too, which could each add to what the other adds to."""
    generator = torch.Generator().manual_seed(0)
    read = torch.zeros(6, 32, 128, requires_grad=True)  # by the text encoder, whatever the prompts
    monkeypatch.setattr(tiny.text_encoder, "forward", lambda *_: read)
    prompts = [f"prompt {i}" for i in (0, 1, 2, 0, 1, 0, 3, 0, 1, 2, 0, 0, 1, 4, 5, 0)]
    above = torch.randn(16, 32, 128, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(tiny.context(prompts), read, above)[0] for _ in range(100)]
    finally:
        torch.set_num_threads(threads)
    assert all(gradient.equal(gradients[0]) for gradient in gradients)
