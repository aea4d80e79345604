"""Beginning with a picture: image to image and inside a mask, against diffusers' pipelines, and what masks become."""

import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from helpers.public import KINDS, PROMPT, SIZE, pipeline, save_folder
from PIL import Image
from test_sampler import LEADING, REFERENCES, SD15

from tinyldm import InputError
from tinyldm.editing import Mask, Source
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.images import to_images, to_tensor
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.masks import mask_of, pasted, read_source
from tinyldm.sampler import SAMPLERS

STEPS = 5
SEEDS = (3, 4)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """diffusers' pipeline, and the same model loaded by us."""
    folder = tmp_path_factory.mktemp(request.param)
    save_folder(folder, request.param)
    return pipeline(request.param), load_checkpoint(folder)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask():
    """White in its middle, of whole cells."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[8:20, 12:28] = 255
    return Image.fromarray(pixels)


def theirs(pipe, kind, sampler, picture, strength, **more):
    prediction = pipe.scheduler.config.prediction_type
    settings = LEADING if sampler == "ddim" else {}
    scheduler = REFERENCES[sampler](prediction_type=prediction, **SD15, **settings)
    edit = kind(**pipe.components | {"scheduler": scheduler}, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    prompts = [PROMPT] * len(SEEDS)
    images = [picture] * len(SEEDS)
    options = {"strength": strength, "num_inference_steps": STEPS, "generator": generators, "output_type": "np"}
    return 255 * edit(prompts, image=images, **options, **more).images


def ours(model, sampler, source):
    *_, z = model.generate(
        [PROMPT] * len(SEEDS), SEEDS, sampler=sampler, steps=STEPS, height=SIZE, width=SIZE, source=source
    )
    return np.stack([np.asarray(image).astype(float) for image in to_images(model.decode(z))])


@pytest.mark.parametrize(
    ("pair", "strength"), [("1.x", 0.3), ("1.x", 0.75), ("1.x", 1.0), ("2.x", 0.75)], indirect=["pair"]
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_is_diffusers(pair, sampler, picture, strength):
    pipe, model = pair
    expected = theirs(pipe, StableDiffusionImg2ImgPipeline, sampler, picture, strength)
    assert np.abs(expected[0] - expected[1]).max() > 5, "the seed makes no difference"
    assert np.abs(ours(model, sampler, Source(to_tensor(picture), strength)) - expected).max() <= 1


@pytest.mark.parametrize("strength", [0.3, 0.9])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m", "dpmpp_2m_karras"])
def test_inside_a_mask_is_diffusers(pair, sampler, picture, mask, strength):
    """Where a sampler draws noise, diffusers mixes two paths of it at the mask's edge; ours is one path."""
    pipe, model = pair
    expected = theirs(pipe, StableDiffusionInpaintPipeline, sampler, picture, strength, mask_image=[mask] * len(SEEDS))
    source = Source(to_tensor(picture), strength, mask_of(np.asarray(mask) > 0, model.autoencoder.config.factor))
    assert np.abs(ours(model, sampler, source) - expected).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_of_the_cells_that_a_mask_covers_all_steps_leave_no_trace_and_fewer_do(tiny, monkeypatch, sampler):
    cells = torch.zeros(1, 1, 8, 8)
    cells[:, :, 2:5, 3:6] = 1

    def changed(covered: float, strength: float) -> torch.Tensor:
        mean = torch.where(cells > 0, covered, 0.3).expand(1, 12, 8, 8)
        monkeypatch.setattr(LatentDiffusion, "encode", lambda *_: (mean, torch.full_like(mean, -30.0)))
        source = Source(torch.zeros(1, 3, 64, 64), strength, Mask(None, cells))
        *_, z = tiny.generate(["a red star"], [1], sampler=sampler, steps=2, source=source)
        return z

    assert torch.equal(changed(-1, 1.0), changed(1, 1.0))
    assert not torch.allclose(changed(-1, 0.5), changed(1, 0.5))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_cells_the_latent_ends_as_the_originals(tiny, sampler):
    picture, cells = torch.rand(1, 3, 64, 64) * 2 - 1, torch.zeros(1, 1, 8, 8)
    cells[:, :, 2:5, 3:6] = 1
    *_, z = tiny.generate(
        ["a red star"] * 2, [1, 2], sampler=sampler, steps=5, source=Source(picture, 0.8, Mask(None, cells))
    )
    noise = torch.cat([torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    original = tiny.autoencoder.sample(*tiny.encode(picture), noise)
    different = (z - original).abs().amax(1, keepdim=True)
    assert different[(1 - cells).expand_as(different) > 0].max() == 0
    assert different[cells.expand_as(different) > 0].min() > 0.01


@pytest.mark.parametrize(("strength", "steps", "skipped"), [(1, 25, 0), (0.8, 25, 5), (0.5, 5, 3), (0.04, 25, 24)])
def test_strength_is_the_share_of_steps_that_are_taken(strength, steps, skipped):
    assert Source(torch.zeros(1, 3, 8, 8), strength).skipped(steps) == skipped


def test_the_strength_that_is_advised_leaves_a_step():
    for steps in range(1, 1001):
        with pytest.raises(InputError) as refused:
            Source(torch.zeros(1, 3, 8, 8), 1e-6).skipped(steps)
        (advised,) = re.findall(r"at least ([\d.]+),", str(refused.value))
        assert Source(torch.zeros(1, 3, 8, 8), float(advised)).skipped(steps) == steps - 1, advised


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(InputError, match=r"strength of 0\.1 leaves none of 5 steps, .* at least 0\.2"):
        Source(torch.zeros(1, 3, 8, 8), 0.1).skipped(5)


def test_less_strength_keeps_more_of_the_picture(tiny):
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distances = []
    for strength in (0.2, 0.6, 1.0):
        *_, z = tiny.generate(["a red star"], [1], steps=5, source=Source(picture, strength))
        distances.append(float((tiny.decode(z) - picture).square().mean()))
    assert distances == sorted(distances) and distances[2] > 1.5 * distances[0]


# ---- Masks


def test_a_cell_changes_if_half_of_it_is_white(recwarn):
    pixels = np.zeros((16, 24), bool)
    pixels[:, :12] = True  # one cell, and half of the next
    mask = mask_of(pixels, 8)
    assert mask.cells.tolist() == [[[[1, 1, 0], [1, 1, 0]]]] and np.array_equal(mask.pixels, pixels)
    pixels[:, 11] = False
    mask = mask_of(pixels, 8)
    assert mask.cells.tolist() == [[[[1, 0, 0], [1, 0, 0]]]] and np.array_equal(mask.pixels, pixels)
    assert not recwarn.list


def test_what_is_too_thin_for_a_cell_is_widened_with_a_warning():
    pixels = np.zeros((32, 32), bool)
    pixels[:16, :16] = True
    pixels[28, 8:32] = True
    with pytest.warns(UserWarning, match="thinner than the latent, which has a cell for 8x8 pixels; they are"):
        mask = mask_of(pixels, 8)
    assert mask.cells.int().tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]]]
    pixels[24:, 8:] = True
    assert np.array_equal(mask.pixels, pixels)


@pytest.mark.parametrize(
    ("size", "colour", "message"),
    [
        ((48, 40), (100, 100, 100), "mask.png is black all over, expected white where the picture is to change"),
        ((40, 48), (255, 255, 255), "mask.png has 40x48 pixels, expected 48x40 pixels as .*picture.png has"),
    ],
)
def test_a_mask_that_says_nothing_and_one_of_another_size_are_refused(tmp_path, size, colour, message):
    Image.new("RGB", (48, 40), "red").save(tmp_path / "picture.png")
    Image.new("RGB", size, colour).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=message):
        read_source(tmp_path / "picture.png", tmp_path / "mask.png", 0.5, 32, 32, 8)


def test_of_a_mask_on_a_transparent_layer_what_is_painted_is_white(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (16, 16, 32, 48))
    layer.save(tmp_path / "mask.png")
    source = read_source(tmp_path / "picture.png", tmp_path / "mask.png", 0.5, 64, 64, 8)
    assert source.mask.pixels.sum() == 16 * 32 and source.mask.pixels[16:48, 16:32].all()


def test_picture_and_mask_are_cropped_alike(tmp_path):
    """To the middle of what the picture shows, as train.py crops."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:40] = 255  # the left half of the middle
    for name in ("picture.png", "mask.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    source = read_source(tmp_path / "picture.png", tmp_path / "mask.png", 0.5, 64, 64, 8)
    assert source.mask.pixels[:, :32].all() and not source.mask.pixels[:, 32:].any()
    assert torch.equal((source.picture[0, 0] > 0), torch.from_numpy(source.mask.pixels))
    assert source.mask.cells[0, 0].tolist() == [[1] * 4 + [0] * 4] * 8
    wide = read_source(tmp_path / "picture.png", None, 0.5, 32, 64, 8)
    assert wide.picture.shape == (1, 3, 32, 64) and wide.mask is None
    assert (wide.picture[0, 0, :, 17:31] > 0.9).all() and (wide.picture[0, 0, :, 33:] < -0.9).all()


def test_pasting_leaves_all_outside_as_it_is_and_softens_the_edge_inside():
    pixels = np.ones((64, 64), bool)
    pixels[32:, 32:] = False  # a corner that looks inwards
    mask = mask_of(pixels, 8)
    grey = np.asarray(pasted(Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64)), mask))[..., 0].astype(int)
    assert grey[~pixels].max() == 0 and grey[:24, :24].min() == 255
    assert (np.diff(grey[60, 20:40]) <= 0).all() and np.abs(np.diff(grey[60])).max() < 100
