"""The tiny CLIP in small: it learns, stops, goes on and is written."""

import math
import shutil
from dataclasses import fields, replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_clip
from tinyldm.formats.merges import read_merges, write_merges
from tinyldm.lab.pretraining import contrastive
from tinyldm.lab.pretraining import loop as training
from tinyldm.lab.pretraining.loop import Job, Recipe, load_section
from tinyldm.lab.pretraining.sizes import VISION, text_config
from tinyldm.lab.world.captions import caption, make_tokenizer
from tinyldm.lab.world.distribution import make_pictures
from tinyldm.lab.world.nouns import ANY_THING
from tinyldm.lab.world.things import Picture, Thing
from tinyldm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world():
    """A few captioned pictures."""
    array, pictures = make_pictures(80, seed=0)
    return torch.from_numpy(array), pictures


@pytest.fixture(scope="module")
def tokenizer(world):
    """Learned once; each stage would do it."""
    return make_tokenizer(world[1], seed=0)


@pytest.fixture(autouse=True)
def small_towers(monkeypatch, tokenizer):
    """With the patches, the vocabulary and the words that the tiny CLIP has."""
    monkeypatch.setattr(contrastive, "make_tokenizer", lambda pictures, seed: tokenizer)
    monkeypatch.setattr(contrastive, "VISION", replace(VISION, width=32, layers=1, heads=2))
    monkeypatch.setattr(contrastive, "text_config", lambda size: replace(text_config(size), layers=1))


def train(out, world, steps, stage="clip", batch=16, stop_at=math.inf):
    recipe = Recipe(steps=steps, batch=batch, lr=1e-3, warmup=5)
    return contrastive.train_clip(Job(out, stage, recipe, *world, seed=0, device="cpu", stop_at=stop_at))


def train_both_stages(out, world, steps):
    return [train(out, world, steps, stage) for stage in ("clip", "fine-clip")]


# ---- The loss


def test_the_loss_is_cross_entropy_in_both_directions():
    logits = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    ids = torch.tensor([[0, 1], [0, 2]])
    rows = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))
    assert contrastive.contrastive_loss(logits, ids).item() == pytest.approx((rows + columns) / 4)


def test_equal_captions_are_no_negatives_of_each_other():
    ids = torch.tensor([[0, 1, 9], [0, 1, 9], [0, 2, 9], [0, 3, 9]])
    logits = torch.zeros(4, 4, requires_grad=True)
    loss = contrastive.contrastive_loss(logits, ids)
    assert loss.item() == pytest.approx((2 * math.log(3) + 2 * math.log(4)) / 4)  # one of three, twice; one of four
    loss.backward()
    between = torch.zeros(4, 4, dtype=torch.bool)
    between[0, 1] = between[1, 0] = True
    assert not logits.grad[between].any() and logits.grad[~between].all()


def test_near_misses_are_wrong_for_pictures_and_no_captions_to_find_one_for():
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 2]])  # the last is a near miss that reads like the second
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = contrastive.contrastive_loss(logits, ids)
    rows, columns = math.log(4) + math.log(3), 2 * math.log(2)
    assert loss.item() == pytest.approx((rows + columns) / 4)
    loss.backward()
    assert logits.grad[1, 3] == 0 and logits.grad[0, 2] > 0 and logits.grad[0, 3] > 0


# ---- Training


def test_a_batch_is_made_of_groups_of_one_colour_and_background(world):
    pictures = world[1] * 20
    groups = contrastive.groups_alike(pictures)
    looks = [(picture.things[0].colour, picture.background) for picture in pictures]
    assert all(i in group and {looks[j] for j in group} == {looks[i]} for i, group in enumerate(groups))
    for seed in range(10):
        rows = contrastive.rows_alike(groups, 64, np.random.default_rng(seed))
        assert len(rows) == len(set(rows.tolist())) == 64
        assert 4 <= len({looks[i] for i in rows}) <= 6  # of 16 each, but where a group is drawn twice
    few = contrastive.groups_alike(world[1])
    assert sorted(contrastive.rows_alike(few, 1000, np.random.default_rng(0))) == list(range(80))


def test_a_near_miss_differs_in_one_thing_that_it_shows(world):
    rng, seen = np.random.default_rng(0), set()
    for picture in world[1] * 5:
        miss = contrastive.near_miss(picture, rng)
        (what,) = (field.name for field in fields(Picture) if getattr(miss, field.name) != getattr(picture, field.name))
        if what == "things":
            before, after = picture.things[0], miss.things[0]
            changed = {
                field.name for field in fields(Thing) if getattr(before, field.name) != getattr(after, field.name)
            }
            assert changed in ({"noun"}, {"shape"}, {"pattern"}, {"pattern", "colour2"})
            what = min(changed - {"colour2"})
            if len(picture.things) == 2:  # two of a kind stay so
                assert (picture.things[0] == picture.things[1]) == (miss.things[0] == miss.things[1])
        seen.add(what)
    assert seen == {"noun", "shape", "pattern", "background", "style"}


def test_captions_of_near_misses_are_in_the_same_words_as_far_as_it_goes():
    pictures = [Picture((Thing("star", "red"),), "blue")] * 60
    captions = contrastive.captions_and_near_misses(pictures, np.random.default_rng(0))
    assert len(captions) == 60 * (1 + contrastive.NEAR_MISSES)
    shapes = 0
    for own, miss in zip(captions[:60], captions[60:120], strict=True):
        if ANY_THING in own:
            continue  # some captions have no word for what they show, and then a near miss may read the same
        assert "red star" in own
        one, other = own.split(), miss.split()
        if "star" not in other and "red" in other:  # another shape
            assert len(one) == len(other) and sum(x != y for x, y in zip(one, other, strict=True)) == 1
            shapes += 1
    assert shapes


def test_a_few_steps_bring_the_loss_down(tmp_path, world, monkeypatch):
    losses, loss_of = [], contrastive.contrastive_loss
    monkeypatch.setattr(contrastive, "contrastive_loss", lambda *args: losses.append(loss_of(*args)) or losses[-1])
    assert train(tmp_path, world, steps=20, batch=32)
    first, last = torch.stack(losses[:5]).mean(), torch.stack(losses[-5:]).mean()
    assert last < 0.95 * first and last < math.log(32)  # log 32: all captions of the batch alike


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path, world, monkeypatch):
    asked = []
    monkeypatch.setattr(contrastive, "caption", lambda *args: asked.append(caption(*args)) or asked[-1])
    assert train(tmp_path / "whole", world, steps=8)
    expected, asked[:] = list(asked), []

    clock = count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert not train(tmp_path / "parts", world, steps=8, stop_at=5)
    of_five = 5 * 16 * (1 + contrastive.NEAR_MISSES)
    assert len(asked) == of_five * 6 // 5  # the sixth batch was drawn before the clock was looked at
    del asked[of_five:]
    assert train(tmp_path / "parts", world, steps=8)
    assert asked == expected
    for section in ("weights", "average"):
        whole, parts = (load_section(tmp_path / out / "clip", section) for out in ("whole", "parts"))
        for name, tensor in whole.items():  # but for the 16-bit numbers in the files
            assert torch.allclose(parts[name].float(), tensor.float(), atol=2e-3), name


def test_the_temperature_stays_where_training_is_stable(tmp_path, world, monkeypatch):
    monkeypatch.setattr(contrastive, "MAX_LOGIT_SCALE", 1.0)  # it starts at log(1 / 0.07), 2.66
    assert train(tmp_path, world, steps=2)
    scale = load_section(tmp_path / "clip", "weights")["logit_scale"]
    assert scale == pytest.approx(1.0, abs=0.01)
    assert contrastive.tiny_clip(600).logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---- The second stage, with smaller patches


def test_with_patches_halved_a_patch_is_read_as_if_it_were_twice_as_large():
    torch.manual_seed(0)
    coarse, fine = contrastive.tiny_clip(600, patch=8), contrastive.tiny_clip(600)
    fine.load_state_dict(contrastive.with_patches_halved(coarse.state_dict()))
    pictures = torch.randn(2, 3, 64, 64)
    twice = pictures.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    before, after = (model.vision_model.embeddings for model in (coarse, fine))
    assert torch.allclose(after.patch_embedding(pictures), before.patch_embedding(twice), atol=1e-5)
    ids = torch.tensor([[598, 5, 599]])
    assert fine.text_features(ids).equal(coarse.text_features(ids))


def test_new_positions_lie_between_the_old_ones():
    coarse = contrastive.tiny_clip(600, patch=8)
    name = "vision_model.embeddings.position_embedding.weight"
    old, new = coarse.state_dict()[name], contrastive.with_patches_halved(coarse.state_dict())[name]
    assert new.shape == (1 + 16 * 16, old.shape[1]) and new[0].equal(old[0])
    old, new = old[1:].unflatten(0, (8, 8)), new[1:].unflatten(0, (16, 16))
    assert torch.allclose(new[0, 0], old[0, 0]) and torch.allclose(new[15, 15], old[7, 7])  # of the corners
    assert torch.allclose(new[0, 3], 0.75 * old[0, 1] + 0.25 * old[0, 2])


def test_half_of_the_patches_are_left_and_the_class_token():
    x = torch.arange(2 * 257.0).reshape(2, 257, 1) * torch.ones(3)
    half = contrastive.only(x, contrastive.random_half(2, 256, torch.Generator().manual_seed(0)))
    assert half.shape == (2, 129, 3) and half[:, 0].equal(x[:, 0]) and half[..., 0].equal(half[..., 2])
    kept = [set(row[1:, 0].tolist()) for row in half]
    assert [len(numbers) for numbers in kept] == [128, 128]
    assert kept[0] <= set(range(1, 257)) and kept[1] <= set(range(258, 514))
    assert {number + 257 for number in kept[0]} != kept[1]  # picture by picture


def test_the_second_stage_begins_where_the_first_ended_and_ends_with_all_patches(tmp_path, world, monkeypatch):
    assert train(tmp_path, world, steps=2)
    monkeypatch.setattr(contrastive, "HALF_SEEN", 0.75)
    halved, only = [], contrastive.only
    monkeypatch.setattr(contrastive, "only", lambda *x: halved.append(only(*x)) or halved[-1])
    assert not train(tmp_path, world, steps=8, stage="fine-clip", stop_at=-math.inf)  # before its first step
    first = contrastive.with_patches_halved(load_section(tmp_path / "clip", "average"))
    for name, tensor in load_section(tmp_path / "fine-clip", "weights").items():
        assert torch.allclose(tensor.float(), first[name], atol=1e-3), name
    shutil.rmtree(tmp_path / "clip")  # to go on, its own folder is enough
    assert train(tmp_path, world, steps=8, stage="fine-clip")
    assert [x.shape[1] for x in halved] == [129] * 6  # of the 8 steps


# ---- The file


def test_what_is_written_has_half_precision_and_loads_with_its_vocabulary(tmp_path, world):
    train_both_stages(tmp_path, world, steps=2)
    contrastive.export_clip(tmp_path, tmp_path / "weights")
    path = tmp_path / "weights" / "clip.safetensors"
    with safe_open(path, "pt") as file:
        assert all(file.get_slice(name).get_dtype() == "F16" for name in file.keys())  # noqa: SIM118
    model = load_clip(path)
    tokenizer = Tokenizer(read_merges(tmp_path / "weights" / "merges.txt"))
    assert model.config == contrastive.tiny_clip(tokenizer.vocabulary_size).config
    average = load_section(tmp_path / "fine-clip", "average")
    assert all(tensor.equal(average[name].float()) for name, tensor in model.state_dict().items())


def test_it_is_not_written_beside_a_diffusion_model_of_another_vocabulary(tmp_path, world):
    train_both_stages(tmp_path, world, steps=1)
    (tmp_path / "weights").mkdir()
    write_merges(tmp_path / "weights" / "merges.txt", [("a", "b")])
    with pytest.raises(InputError, match=r"merges\.txt differs"):
        contrastive.export_clip(tmp_path, tmp_path / "weights")
    assert not (tmp_path / "weights" / "clip.safetensors").exists()


# ---- The sheet


def test_the_sheet_shows_the_pictures_nearest_to_each_prompt(world, monkeypatch):
    pixels = world[0][:20]
    angle = torch.linspace(0, 1, 20)
    monkeypatch.setattr(contrastive, "features_of_pictures", lambda *_: torch.stack([angle.cos(), angle.sin()], dim=1))
    monkeypatch.setattr(contrastive, "features_of_captions", lambda *_: torch.eye(2))
    (first, *_), (last, *rest) = contrastive.retrieved(None, None, pixels, ["along x", "along y"])
    assert len(rest) == 7
    assert first.tobytes() == pixels[0].numpy().tobytes() and last.tobytes() == pixels[19].numpy().tobytes()
