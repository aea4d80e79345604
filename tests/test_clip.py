"""Both towers against transformers' with the same weights, and the masked lookup against the obvious slow way."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers
from helpers.reference import CLIPS, TEXTS, clip_reference, clips, count, difference, digest, randomise, text_encoders
from PIL import Image
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.clip_image import CLIP, CLIPConfig, CLIPVisionConfig, normalize, preprocess
from tinyldm.formats.checkpoint import load_clip
from tinyldm.formats.names import clip_sizes
from tinyldm.images import to_tensor

WORDS = TEXTS["1.x"].vocabulary_size  # the first id that is not a word of the vocabulary
WIDTH = TEXTS["1.x"].width


def random_ids(length=16, batch=3):
    """Prompts of different lengths, each padded with the vocabulary's last word, the end token."""
    ids = torch.randint(WORDS - 2, (batch, length), generator=torch.Generator().manual_seed(1))
    for row, words in enumerate([length, 1, length // 2]):
        ids[row, words:] = WORDS - 1
    return ids


def random_vectors(rows):
    return 0.01 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))


def loss_of(context):
    """A number that every value of the context has a different say in."""
    return (context * torch.linspace(-1, 1, context.numel()).reshape(context.shape)).sum()


def small_encoder():
    encoder = CLIPTextEncoder(TEXTS["1.x"]).requires_grad_(False)
    randomise(encoder)
    return encoder.eval()


# ---- the encoder


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("kind", TEXTS)
def test_context_is_transformers(kind, length):
    ours, reference = text_encoders(kind)
    ids = random_ids(length)
    assert difference(ours(ids), reference(ids)) < 1e-5


@torch.no_grad()
def test_a_token_is_read_with_those_before_it_only():
    encoder, ids = small_encoder(), random_ids()
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % WORDS
    before, after = encoder(ids), encoder(changed)
    assert difference(before[:, :9], after[:, :9]) < 1e-6
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


@pytest.mark.parametrize(
    "config, parameters, expected",
    [
        (
            CLIPTextConfig(),
            123_060_480,
            "3a39d8acef0ccd336d40cbcf3c67300e99368625b067ce95a0c52ed621e1ee72",
        ),
        (
            CLIPTextConfig(width=1024, layers=24, heads=16, activation="gelu", skip_last=1),
            340_387_840,
            "ed8ac14c6009c58f16515860fa1c070e48548bc2b16204fad3f044782a4f068e",
        ),
    ],
    ids=["1.x", "2.x"],
)
def test_names_and_shapes_are_the_public_checkpoints(config, parameters, expected):
    """Those of 1.x as they are, without position_ids; those of 2.x after OpenCLIP's names are put into these."""
    with torch.device("meta"):
        model = CLIPTextEncoder(config)
    assert count(model) == parameters
    assert digest(model) == expected


# ---- the masked lookup


def prompts_with_new_words():
    """Three placeholders at once, of two, one and two vectors: rows 0 and 1, row 2, rows 3 and 4. Two occur twice."""
    ids = random_ids()
    ids[0, 2:4] = torch.tensor([WORDS, WORDS + 1])
    ids[0, 7:9] = torch.tensor([WORDS, WORDS + 1])
    ids[1, 0] = WORDS + 2
    ids[2, 1:6] = torch.tensor([WORDS + 2, WORDS + 3, WORDS + 4, WORDS, WORDS + 1])
    return ids


def slow_way(encoder, ids, vectors):
    """Context and gradient when the whole table, new rows included, is the parameter, its gradient times a row mask."""
    slow = CLIPTextEncoder(replace(encoder.config, vocabulary_size=WORDS + len(vectors)))
    table = torch.cat([encoder.table, vectors]).detach()
    slow.load_state_dict({**encoder.state_dict(), "text_model.embeddings.token_embedding.weight": table})
    is_new = (torch.arange(len(table)) >= WORDS).unsqueeze(1)
    slow.table.register_hook(lambda gradient: gradient * is_new)
    context = slow(ids)
    loss_of(context).backward()
    return context, slow.table.grad


def test_context_and_gradient_are_those_of_the_whole_table_with_its_gradient_masked():
    encoder, ids, vectors = small_encoder(), prompts_with_new_words(), random_vectors(5).requires_grad_()
    context = encoder(ids, vectors)
    loss_of(context).backward()
    expected_context, expected = slow_way(encoder, ids, vectors)
    assert difference(context, expected_context) < 1e-5
    assert not expected[:WORDS].any() and expected[WORDS:].any(dim=-1).all()
    assert difference(vectors.grad, expected[WORDS:]) < 1e-5


def test_a_placeholder_used_twice_learns_the_sum_of_what_two_would():
    encoder, ids = small_encoder(), random_ids()
    row, twice, two = random_vectors(1), ids.clone(), ids.clone()
    twice[0, [2, 7]] = WORDS
    two[0, [2, 7]] = torch.tensor([WORDS, WORDS + 1])
    once, both = row.clone().requires_grad_(), row.repeat(2, 1).requires_grad_()
    loss_of(encoder(twice, once)).backward()
    loss_of(encoder(two, both)).backward()
    assert both.grad.any(dim=-1).all()
    assert difference(once.grad, both.grad.sum(dim=0, keepdim=True)) < 1e-5


def test_a_vector_that_no_prompt_reads_has_no_gradient():
    encoder, vectors = small_encoder(), random_vectors(3).requires_grad_()
    ids = random_ids()
    ids[1, 0] = WORDS + 1
    loss_of(encoder(ids, vectors)).backward()
    assert vectors.grad.any(dim=-1).tolist() == [False, True, False]


def test_the_frozen_table_gets_no_gradient_and_prompts_without_new_words_are_what_they_were():
    encoder, ids, vectors = small_encoder(), random_ids(), random_vectors(2).requires_grad_()
    assert encoder(ids, vectors).equal(encoder(ids))
    loss_of(encoder(prompts_with_new_words().clamp(max=WORDS + 1), vectors)).backward()
    assert all(p.grad is None for p in encoder.parameters())


def test_where_the_table_does_learn_new_words_give_its_rows_no_gradient():
    """As in pretraining: row 0 in particular, which the lookup reads in a new word's place and throws away."""
    encoder, ids, vectors = small_encoder(), prompts_with_new_words(), random_vectors(5)
    encoder.table.requires_grad_()
    loss_of(encoder(ids, vectors)).backward()
    read = torch.zeros(WORDS, dtype=torch.bool)
    read[ids[ids < WORDS]] = True
    assert not read[0]
    assert encoder.table.grad.any(dim=-1).equal(read)


def test_learning_changes_the_vectors_and_nothing_else():
    encoder, ids, vectors = small_encoder(), prompts_with_new_words(), random_vectors(5).requires_grad_()
    weights, start = {k: v.clone() for k, v in encoder.state_dict().items()}, vectors.detach().clone()
    optimizer = torch.optim.AdamW([vectors], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(encoder(ids, vectors)).backward()
        optimizer.step()
    assert (vectors != start).any(dim=-1).all()
    assert all(value.equal(weights[name]) for name, value in encoder.state_dict().items())
    state = optimizer.state[vectors]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (5, WIDTH)


def test_vectors_stay_float32_beside_an_encoder_in_half_precision():
    encoder, ids, vectors = small_encoder(), prompts_with_new_words(), random_vectors(5).requires_grad_()
    expected = encoder(ids, vectors)
    context = encoder.bfloat16()(ids, vectors)
    loss_of(context.float()).backward()
    assert context.dtype == torch.bfloat16 and difference(context.float(), expected) < 0.1
    assert vectors.grad.dtype == torch.float32 and vectors.grad.isfinite().all()


def test_an_id_past_the_vocabulary_without_vectors_is_an_error():
    encoder, ids = small_encoder(), random_ids()
    ids[0, 3] = WORDS + 4
    with pytest.raises(ValueError, match=f"id {WORDS + 4} is past the vocabulary of {WORDS}"):
        encoder(ids)


def test_an_id_past_the_last_vector_is_an_error():
    encoder, ids = small_encoder(), random_ids()
    ids[0, 3] = WORDS + 4
    with pytest.raises(IndexError):
        encoder(ids, random_vectors(4))


# ---- both towers


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


# ---- preprocessing


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


# ---- reading a CLIP


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
    with pytest.raises(InputError, match="layers is 1000, expected 1 to 100"):
        load_clip(written({**model.state_dict(), **names}))


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
    with pytest.raises(InputError, match="does not say its sizes"):
        load_clip(tmp_path / "other.safetensors")
