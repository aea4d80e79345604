"""CLIP's towers and preprocessing against transformers', and load_clip: public files read, broken ones refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from helpers.reference import CLIPS, clip_reference, clips, count, difference, random_ids
from PIL import Image
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.clip import CLIPTextConfig
from tinyldm.clip_image import CLIP, CLIPConfig, CLIPVisionConfig, normalize, preprocess
from tinyldm.formats.checkpoint import load_clip
from tinyldm.formats.names import clip_sizes
from tinyldm.images import to_tensor

WORDS = CLIPS["openai"].text.vocabulary_size  # the first id that is not a word of the vocabulary

# ---- Both towers


VIT_B_32 = CLIPConfig(
    CLIPTextConfig(width=512, heads=8),
    CLIPVisionConfig(patch=32, width=768, layers=12, heads=12),
    projection=512,
)


def random_prompts():
    ids = random_ids()
    ids[:, -1] = WORDS - 1  # the longest one needs its end, too
    return ids


def random_pixels(config, batch=4):
    return torch.randn(batch, 3, config.vision.size, config.vision.size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("kind", CLIPS)
def test_features_and_logits_are_transformers(kind):
    ours, reference = clips(kind)
    pixels, ids = random_pixels(ours.config), random_prompts()
    expected = reference(input_ids=ids, pixel_values=pixels)
    assert difference(ours.image_features(pixels), expected.image_embeds) < 1e-5
    assert difference(ours.text_features(ids), expected.text_embeds) < 1e-5
    assert difference(ours(pixels, ids), expected.logits_per_image) < 1e-5
    assert ours(pixels, ids).shape == (4, 3)


@pytest.mark.parametrize(
    "config, parameters", [(VIT_B_32, 151_277_313), (CLIPConfig(), 427_616_513)], ids=["ViT-B/32", "ViT-L/14"]
)
def test_names_shapes_and_sizes_are_the_public_clips(config, parameters):
    with torch.device("meta"):
        ours, reference = CLIP(config), clip_reference(config)
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert shapes == {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    assert count(ours) == parameters
    assert clip_sizes(shapes) == config


@torch.no_grad()
def test_a_text_is_read_at_its_first_end_token_whatever_pads_it():
    model, _ = clips("openai")
    ids = torch.tensor([[WORDS - 2, 5, 7, WORDS - 1, WORDS - 1, WORDS - 1]])
    zeros = torch.tensor([[WORDS - 2, 5, 7, WORDS - 1, 0, 0]])
    expected = model.text_features(ids[:, :4])
    assert difference(model.text_features(ids), expected) < 1e-5
    assert difference(model.text_features(zeros), expected) < 1e-5


@torch.no_grad()
def test_a_new_word_is_in_the_features_of_its_prompt():
    """Its id is larger than the end token's, which must not be mistaken for the end."""
    model, _ = clips("openai")
    table = model.text_model.embeddings.token_embedding.weight
    old = torch.tensor([[WORDS - 2, 5, 7, WORDS - 1]])
    new = torch.tensor([[WORDS - 2, 5, WORDS, WORDS - 1]])
    assert difference(model.text_features(new, table[7:8]), model.text_features(old)) < 1e-5
    assert difference(model.text_features(new, table[9:10]), model.text_features(old)) > 1e-3


def test_a_prompt_without_its_end_has_no_features():
    model, _ = clips("openai")
    with pytest.raises(ValueError, match="without its end token"):
        model.text_features(torch.tensor([[WORDS - 2, 5, 7]]))


@torch.no_grad()
def test_the_last_patch_reaches_the_class_token_in_front_of_it():
    """The layers are the text tower's, but a picture is not read from left to right."""
    model, _ = clips("openai")
    pixels = random_pixels(model.config)
    changed = pixels.clone()
    changed[:, :, -8:, -8:] += 1
    assert difference(model.image_features(changed), model.image_features(pixels)) > 1e-3


# ---- Preprocessing


def random_picture(width, height):
    pixels = np.random.default_rng(width).integers(256, size=(height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [224, 61])
@pytest.mark.parametrize(
    "width, height", [(224, 224), (333, 221), (221, 333), (97, 331), (640, 427), (225, 224), (59, 41), (1001, 64)]
)
def test_pixels_are_those_of_transformers_preprocessing(width, height, size):
    """Pillow resizes in both; transformers' other backend, torchvision, rounds its resized pixels differently."""
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    picture = random_picture(width, height)
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    assert difference(preprocess([picture], size), expected) < 1e-5


def test_pictures_of_different_sizes_make_one_batch_in_their_order():
    pictures = [random_picture(80, 50), random_picture(33, 77).convert("L")]
    both = preprocess(pictures, 32)
    assert both.shape == (2, 3, 32, 32)
    assert both[1:].equal(preprocess(pictures[1:], 32))


def test_a_picture_of_the_right_size_is_only_normalized():
    picture = random_picture(32, 32)
    assert preprocess([picture], 32).equal(normalize(to_tensor(picture)))


# ---- Reading a CLIP


@pytest.fixture
def written(tmp_path):
    """written(tensors, config) writes a safetensors file, with the configuration in its metadata if there is one."""

    def write(tensors, config=None):
        path = tmp_path / "clip.safetensors"
        save_file(tensors, path, metadata=config and {"tinyldm": json.dumps(asdict(config))})
        return path

    return write


POSITIONS = "model.embeddings.position_ids"


@torch.no_grad()
def test_a_public_file_loads_by_its_shapes_without_the_stored_position_ids(written):
    _, reference = clips("openai")
    positions = {f"text_{POSITIONS}": torch.arange(16)[None], f"vision_{POSITIONS}": torch.arange(17)[None]}
    path = written({**reference.state_dict(), **positions})
    model = load_clip(path)
    assert model.config == CLIPS["openai"]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    pixels, ids = random_pixels(model.config), random_prompts()
    assert difference(model(pixels, ids), reference(input_ids=ids, pixel_values=pixels).logits_per_image) < 1e-5
    assert load_clip(path, dtype=torch.bfloat16).logit_scale.dtype == torch.bfloat16


@torch.no_grad()
def test_what_shapes_cannot_tell_comes_from_the_metadata(written):
    ours, _ = clips("openclip")
    model = load_clip(written(ours.state_dict(), ours.config))
    assert model.config == ours.config
    pixels, ids = random_pixels(ours.config), random_prompts()
    assert model(pixels, ids).equal(ours(pixels, ids))


KEY = "vision_model.encoder.layers.1.mlp.fc1.bias"


@pytest.mark.parametrize("stored", [True, False], ids=["by its metadata", "by its shapes"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(KEY), f"lacks {KEY}"),
        (lambda tensors: tensors.pop("logit_scale"), "lacks logit_scale"),
        (lambda tensors: tensors.update({f"{KEY}2": torch.zeros(1)}), f"holds {KEY}2"),
        (lambda tensors: tensors.update({KEY: torch.zeros(5)}), rf"{KEY} is \(5,\), expected \(512,\)"),
    ],
    ids=["missing", "missing scalar", "extra", "misshaped"],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(written, stored, change, message):
    model, _ = clips("openai")
    tensors = model.state_dict()
    change(tensors)
    with pytest.raises(InputError, match=message) as error:
        load_clip(written(tensors, model.config if stored else None))
    assert "\n" not in str(error.value)


def test_sizes_that_would_keep_the_computer_busy_are_refused(written):
    model, _ = clips("openai")
    names = {"text_model.encoder.layers.999.mlp.fc1.bias": torch.zeros(1)}
    with pytest.raises(InputError, match=r"text\.layers is 1000, expected a whole number from 1 to 100"):
        load_clip(written({**model.state_dict(), **names}))


def test_a_file_whose_heads_have_another_width_is_refused():
    """Its names are the same, and what it would say of a picture is nonsense."""
    config = replace(VIT_B_32, vision=replace(VIT_B_32.vision, width=1280, heads=16, layers=1))
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in CLIP(config).state_dict().items()}
    with pytest.raises(ValueError, match="1280 wide has heads of 80"):
        clip_sizes(shapes)


def test_a_file_with_the_text_tower_alone_is_refused(written):
    model, _ = clips("openai")
    tensors = {name: value for name, value in model.state_dict().items() if name.startswith("text_")}
    with pytest.raises(InputError, match=r"vision_model.*expected the file of both towers"):
        load_clip(written(tensors))


def test_other_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(InputError, match=f"{path} can't be read.*expected a file of weights"):
            load_clip(path)
    (tmp_path / "clip.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="neither a safetensors nor a PyTorch file"):
        load_clip(tmp_path / "clip.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"tinyldm": '{"unet": {}}'})
    with pytest.raises(InputError, match=r"its configuration is broken \(text is missing"):
        load_clip(tmp_path / "other.safetensors")
