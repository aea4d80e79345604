"""Heat maps of words: the shares of attention they are made of, and what they show."""

import diffusers
import numpy as np
import pytest
import torch
from helpers.reference import unets
from PIL import Image

from tinyldm.heat_maps import HeatMaps, heat_sheet, heated, watched, words_of
from tinyldm.images import to_images
from tinyldm.inversion import add_words
from tinyldm.lab.measure.colours import EDGE, contrast_of


@pytest.fixture
def heat(tiny):
    def heat_of(prompt, words=None, seeds=(0,), guidance=3.0):
        maps = HeatMaps(len(seeds), 8, 8)
        with watched(tiny.unet, maps):
            *_, z = tiny.generate([prompt] * len(seeds), seeds, words=words, steps=6, guidance=guidance)
        return to_images(tiny.decode(z)), maps.mean()

    return heat_of


@pytest.mark.parametrize("kind", ["1.x", "tiny"])
def test_shares_are_those_of_diffusers_attention(kind):
    ours, reference = unets(kind)
    generator = torch.Generator().manual_seed(0)
    channels, size = ours.config.latent_channels, (8, 16)
    z, t = torch.randn(2, channels, *size, generator=generator), torch.tensor([7, 500])
    context = torch.randn(2, 5, 32, generator=generator)
    expected = []

    class Recording(diffusers.models.attention_processor.AttnProcessor):
        """diffusers' plain attention, which has the shares: (b heads) n m."""

        def __call__(self, attention, x, encoder_hidden_states=None, **more):
            if encoder_hidden_states is not None:
                q, k = attention.to_q(x), attention.to_k(encoder_hidden_states)
                shares = attention.get_attention_scores(*(attention.head_to_batch_dim(each) for each in (q, k)))
                shares = shares.unflatten(0, (len(x), -1)).mean(1)  # b n m
                height = int((x.shape[1] / 2) ** 0.5)  # twice as wide
                maps = shares.mT.unflatten(2, (height, 2 * height))
                expected.append(torch.nn.functional.interpolate(maps, size, mode="bicubic").clamp(min=0))
            return super().__call__(attention, x, encoder_hidden_states, **more)

    reference.set_attn_processor(Recording())
    with torch.no_grad():
        reference(z, t, context)
        with watched(ours, HeatMaps(2, *size)) as maps:
            ours(z, t, context)
    assert len(expected) > 3
    torch.testing.assert_close(maps.mean(), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)


def test_without_watching_nothing_is_kept(tiny, heat):
    _, maps = heat("a star")
    assert maps.shape == (1, tiny.tokenizer.length, 8, 8)
    assert not any(module._forward_hooks for module in tiny.unet.modules())


def test_watching_changes_no_picture(tiny, heat):
    (watched_one,), _ = heat("a photo of a red star")
    *_, z = tiny.generate(["a photo of a red star"], [0], steps=6, guidance=3.0)
    assert np.array_equal(np.asarray(watched_one), np.asarray(to_images(tiny.decode(z))[0]))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pixel_shares_out_all_of_its_attention(heat, guidance):
    _, maps = heat("a photo of a red star", seeds=(0, 1), guidance=guidance)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 8, 8), rtol=0, atol=0.02)  # bicubic overshoots a little


def test_a_things_map_covers_the_thing(tiny, heat):
    prompt = "a photo of a red star on a white background"
    images, maps = heat(prompt, seeds=range(6))
    spans = dict(words_of(tiny.tokenizer, prompt))
    for image, of_image in zip(images, maps, strict=True):
        there = torch.from_numpy(contrast_of(np.asarray(image)) > EDGE).float()
        there = torch.nn.functional.interpolate(there[None, None], (8, 8), mode="area")[0, 0] > 0.5
        star = of_image[spans["star"]].mean(0)
        assert star[there].mean() > 1.5 * star[~there].mean()


def test_words_and_their_tokens(tiny):
    add_words(tiny, {"S*": torch.zeros(3, 128), "a toy": torch.zeros(1, 128)})
    prompt = "A photo of S*, zzqx a toy"
    words = words_of(tiny.tokenizer, prompt)
    assert [word for word, _ in words] == ["A", "photo", "of", "S*", ",", "zzqx", "a toy"]
    ids = tiny.tokenizer(prompt)[0].tolist()
    for word, tokens in words:
        assert ids[tokens] == tiny.tokenizer.encode(word)
    assert words[3][1] == slice(4, 7)
    assert words_of(tiny.tokenizer, "star " * 100)[-1][1].stop == tiny.tokenizer.length - 1
    assert [word for word, _ in words_of(tiny.tokenizer, "a \ufeff \x07 star")] == ["a", "star"]  # that have tokens


def test_the_sheet_has_a_tile_for_the_picture_and_one_for_each_word(tiny):
    maps = torch.rand(tiny.tokenizer.length, 8, 8)
    sheet = heat_sheet(
        Image.new("RGB", (64, 64), "red"), "a photo of a red star on a blue background", maps, tiny.tokenizer
    )
    tile, margin = 128 + 4, 20
    assert sheet.size == (6 * tile + 4, 2 * (tile + margin) + 4)
    assert sheet.getpixel((60, 80)) == (255, 0, 0)


def test_hot_is_red_and_cold_is_blue():
    heat = torch.zeros(8, 8)
    heat[:, 4:] = 1
    pixels = np.asarray(heated(Image.new("RGB", (64, 64), "white"), heat)).astype(int)
    assert (pixels[:, :16, 2] > pixels[:, :16, 0] + 40).all() and (pixels[:, -16:, 0] > pixels[:, -16:, 2] + 40).all()
