"""The method's own pieces: what a new word starts from, what its captions are, and that only it learns."""

from dataclasses import replace

import pytest
import torch
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.inversion import (
    TEMPLATES,
    Batch,
    Pictures,
    add_words,
    caption_beside,
    captions_of,
    draw_independently,
    draw_pairs,
    draw_spread_out,
    known_norm,
    read_templates,
    templates_for,
    vectors_of,
    whole_words,
)
from tinyldm.latent_diffusion import Defaults
from tinyldm.schedule import NoiseSchedule
from train import LOSS_SCALE, inversion_loss


def a_batch(captions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z_0, eps = torch.randn(2, len(captions), 12, 8, 8, generator=generator)
    return Batch(z_0, eps, torch.randint(1000, (len(captions),), generator=generator), captions)


def new_word(model, word, phrase):
    """{word: its first vectors}, which are to learn, added to the model's tokenizer."""
    words = {word: vectors_of(model, phrase).requires_grad_()}
    add_words(model, words)
    return words


def test_a_word_starts_as_a_copy_of_its_init_word(tiny):
    vectors = vectors_of(tiny, "heart")
    (heart,) = tiny.tokenizer.encode("heart")
    assert torch.equal(vectors, tiny.text_encoder.table[[heart]])
    vectors += 1
    assert not torch.equal(vectors, tiny.text_encoder.table[[heart]])


def test_init_tokens_fill_the_vectors_in_turn(tiny):
    orange, heart = tiny.tokenizer.encode("orange heart")
    assert torch.equal(vectors_of(tiny, "orange heart", 3), tiny.text_encoder.table[[orange, heart, orange]])


def test_more_vectors_than_a_prompt_has_room_for_are_refused_before_they_are_made(tiny):
    room = tiny.tokenizer.length - 2
    assert len(vectors_of(tiny, "heart", room)) == room
    with pytest.raises(InputError, match=f"which has room for {room}; try fewer --vectors"):
        vectors_of(tiny, "heart", 10**12)


def test_only_whole_words_are_looked_at(tiny):
    words = [tiny.tokenizer.decode([i]) for i in whole_words(tiny).tolist()]
    assert {"red", "star", "raindrop"} <= set(words) and all(word.isalpha() and len(word) > 1 for word in words)
    assert all(len(tiny.tokenizer.encode(word)) == 1 for word in words)


def test_known_words_are_longer_than_the_pieces_of_words_that_the_model_never_read(tiny):
    norms, words = tiny.text_encoder.table.norm(dim=1), tiny.tokenizer.encode("a photo of a red star thing painting")
    assert 0.7 < known_norm(tiny) / norms[words].mean() < 1
    assert known_norm(tiny) > 4 * norms.median()


def test_of_a_vocabulary_without_whole_words_all_rows_count(tiny):
    tiny.tokenizer.symbols = [symbol.upper() for symbol in tiny.tokenizer.symbols]
    assert known_norm(tiny) == pytest.approx(tiny.text_encoder.table.norm(dim=1).median().item())


def test_the_new_rows_gradient_is_that_of_the_whole_table_under_a_mask(tiny):
    """The obvious slow way: every row a parameter, and a hook that multiplies the gradient by the row mask."""
    words = new_word(tiny, "S*", "orange heart")
    batch = a_batch(["a photo of a S*", "two S* next to a S*", "a sketch of a S* on a blue background"])
    vectors = words["S*"]
    inversion_loss(tiny, batch, words).backward()

    old = tiny.text_encoder.table
    whole = torch.cat([old, vectors.detach()]).requires_grad_(True)
    mask = torch.zeros(len(whole), 1)
    mask[len(old) :] = 1
    whole.register_hook(lambda gradient: gradient * mask)
    inversion_loss_of_whole_table(tiny, batch, whole).backward()
    assert torch.allclose(whole.grad[len(old) :], vectors.grad, rtol=1e-4, atol=1e-9)
    assert whole.grad[: len(old)].abs().max() == 0
    assert vectors.grad.abs().min(dim=1).values.max() > 0


def inversion_loss_of_whole_table(tiny, batch, whole):
    text_model = tiny.text_encoder.text_model
    ids = tiny.tokenizer(batch.captions)
    x = whole[ids] + text_model.embeddings.position_embedding.weight
    context = text_model.final_layer_norm(text_model.encoder(x))
    z_t = tiny.schedule.add_noise(batch.z_0, batch.eps, batch.t)
    output = tiny.unet(z_t, batch.t, context)
    return (output - tiny.schedule.target(batch.z_0, batch.eps, batch.t)).square().mean()


def test_every_copy_of_the_word_in_a_prompt_adds_to_its_gradient(tiny):
    once = new_word(tiny, "S*", "heart")
    inversion_loss(tiny, a_batch(["a S* next to a S*"]), once).backward()
    twice = {"S*": once["S*"].detach().clone().requires_grad_()} | new_word(tiny, "<same>", "heart")
    inversion_loss(tiny, a_batch(["a S* next to a <same>"]), twice).backward()
    assert torch.allclose(once["S*"].grad, twice["S*"].grad + twice["<same>"].grad, rtol=1e-4, atol=1e-9)


def test_only_words_that_are_in_the_prompt_get_a_gradient(tiny):
    words = new_word(tiny, "S*", "heart") | new_word(tiny, "<b>", "star circle")
    inversion_loss(tiny, a_batch(["a photo of a <b>"]), words).backward()
    assert words["S*"].grad.abs().max() == 0
    assert words["<b>"].grad.abs().max(dim=1).values.min() > 0


def test_nothing_else_gets_a_gradient(tiny):
    inversion_loss(tiny, a_batch(["a photo of a S*"]), new_word(tiny, "S*", "heart")).backward()
    assert all(p.grad is None for module in tiny.networks() for p in module.parameters())


def test_words_get_an_id_a_vector_behind_the_end_of_the_vocabulary(tiny):
    add_words(tiny, {"A*": torch.zeros(1, 128), "B*": torch.zeros(2, 128)})
    size = tiny.tokenizer.vocabulary_size
    assert tiny.tokenizer.placeholders == {"A*": [size], "B*": [size + 1, size + 2]}


@pytest.mark.parametrize("subject", ["object", "style"])
def test_the_papers_templates_all_hold_the_word(tiny, subject):
    tiny.tokenizer.add_placeholder("S*", 2)
    captions = captions_of(tiny, TEMPLATES[subject], "S*")
    assert len(captions) == len(TEMPLATES[subject])
    assert all("S*" in caption for caption in captions)


@pytest.mark.parametrize("subject", ["object", "style"])
def test_templates_go_with_what_the_checkpoint_takes_at_its_word_and_no_others(tiny, subject):
    assert templates_for(replace(tiny, defaults=Defaults()), subject) == TEMPLATES[subject]  # Stable Diffusion's
    kept = templates_for(tiny, subject)
    gone = [template for template in TEMPLATES[subject] if template not in kept]
    assert len(kept) == {"object": 18, "style": 11}[subject]
    assert all(set(template.split()) & set(tiny.defaults.taken_literally) for template in gone)
    assert {"object": "a photo of a {}", "style": "a painting in the style of {}"}[subject] in kept


def test_a_template_that_hides_the_word_is_an_error(tiny):
    tiny.tokenizer.add_placeholder("new", 1)
    with pytest.raises(InputError, match="leave a space"):
        captions_of(tiny, ["a {}ish star"], "new")


def test_a_template_file_is_checked(tmp_path):
    (tmp_path / "good.txt").write_text("a {}\n\n the {} \n")
    assert read_templates(tmp_path / "good.txt") == ("a {}", "the {}")
    for name, text in {"none": "a cat\n", "two": "a {} and a {}\n", "empty": "\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError):
            read_templates(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        read_templates(tmp_path / "missing")


@pytest.mark.parametrize("draw", [draw_independently, draw_spread_out, draw_pairs])
def test_a_batch_is_drawn_anew_from_the_posterior(draw):
    mean, log_variance = torch.zeros(4, 12, 8, 8), torch.full((4, 12, 8, 8), -2.0)
    pictures, generator = Pictures(mean, log_variance, [["a", "b"]] * 4), torch.Generator().manual_seed(0)
    first, second = (draw(pictures, NoiseSchedule(), 64, generator) for _ in range(2))
    assert first.z_0.shape == first.eps.shape == (64, 12, 8, 8)
    assert abs(first.z_0.std().item() - torch.tensor(-1.0).exp().item()) < 0.01
    assert abs(first.eps.std().item() - 1) < 0.01
    assert not torch.equal(first.z_0, second.z_0) and not torch.equal(first.t, second.t)
    assert first.t.min() >= 0 and first.t.max() < 1000 and set(first.captions) == {"a", "b"}
    again = draw(pictures, NoiseSchedule(), 64, torch.Generator().manual_seed(0))
    assert torch.equal(first.z_0, again.z_0) and first.captions == again.captions


@pytest.mark.parametrize("size", [1, 3, 16])
def test_pictures_and_timesteps_of_a_batch_are_spread_out_and_all_equally_likely(size):
    mean = torch.arange(5.0).reshape(5, 1, 1, 1)
    pictures = Pictures(mean, torch.full_like(mean, -100.0), [["a"]] * 5)
    generator, rows, times = torch.Generator().manual_seed(0), [], []
    for _ in range(3000):
        batch = draw_spread_out(pictures, NoiseSchedule(steps=48), size, generator)
        rows.append(batch.z_0.flatten().round().long())
        times.append(batch.t)
        counts = rows[-1].bincount(minlength=5)
        assert counts.max() - counts.min() <= 1
        assert [int(t) * size // 48 for t in batch.t] == list(range(size))
    for drawn, values in ((rows, 5), (times, 48)):
        shares = torch.cat(drawn).bincount(minlength=values) / (3000 * size)
        assert len(shares) == values
        assert (shares - 1 / values).abs().max() < 4 * (1 / values / 3000) ** 0.5
    if size == 3:  # a picture's timestep is any
        pairs = torch.stack([torch.cat(rows), torch.cat(times) // 16])
        assert torch.unique(pairs, dim=1).shape[1] == 15


def test_independent_draws_are_equally_likely_and_know_nothing_of_each_other():
    mean = torch.arange(5.0).reshape(5, 1, 1, 1)
    pictures = Pictures(mean, torch.full_like(mean, -100.0), [["a"]] * 5)
    batch = draw_independently(pictures, NoiseSchedule(steps=48), 100_000, torch.Generator().manual_seed(0))
    rows = batch.z_0.flatten().round().long()
    for drawn, values in ((rows, 5), (batch.t, 48), (rows * 48 + batch.t, 240), (rows[1:] * 5 + rows[:-1], 25)):
        shares = drawn.bincount(minlength=values) / len(drawn)
        assert len(shares) == values
        assert (shares - 1 / values).abs().max() < 4 * (1 / values / len(drawn)) ** 0.5


@pytest.mark.parametrize("size", [1, 7, 8])
def test_of_a_pair_only_the_noise_differs_and_is_opposite(size):
    """Of an odd size one is alone, whichever: if it were always the same, so would be the timesteps that come less."""
    pictures = Pictures(torch.randn(5, 2, 3, 3), torch.full((5, 2, 3, 3), -1.0), [[f"{i}", f"{i}!"] for i in range(5)])
    generator, alone = torch.Generator().manual_seed(0), []
    for _ in range(300):
        batch = draw_pairs(pictures, NoiseSchedule(), size, generator)
        assert [len(x) for x in batch] == [size] * 4
        partners = (batch.eps[:, None] == -batch.eps[None]).flatten(2).all(dim=2).nonzero()
        assert len(partners) == size // 2 * 2
        for i, j in partners.tolist():
            assert torch.equal(batch.z_0[i], batch.z_0[j])
            assert batch.t[i] == batch.t[j] and batch.captions[i] == batch.captions[j]
        alone += [batch.t[i].item() for i in set(range(size)) - set(partners[:, 0].tolist())]
    assert len(alone) == size % 2 * 300 and (not alone or abs(sum(alone) / 300 - 499.5) < 60)  # 3.6 standard errors


@pytest.mark.parametrize("draw", [draw_independently, draw_spread_out, draw_pairs])
def test_a_picture_comes_with_its_own_captions(draw):
    mean = torch.arange(5.0).reshape(5, 1, 1, 1)
    pictures = Pictures(mean, torch.full_like(mean, -100.0), [[f"{i} a", f"{i} b"] for i in range(5)])
    batch = draw(pictures, NoiseSchedule(), 200, torch.Generator().manual_seed(0))
    assert [int(caption[0]) for caption in batch.captions] == batch.z_0.flatten().round().int().tolist()
    assert len(set(batch.captions)) == 10


def test_a_caption_is_the_text_beside_a_picture_or_its_name(tiny, tmp_path):
    tiny.tokenizer.add_placeholder("S*", 2)
    assert caption_beside(tiny, tmp_path / "012- a S* on the grass.png", "S*") == "a S* on the grass"
    (tmp_path / "1.txt").write_text("a photo of S*,\n next to a star \n", encoding="utf-8")
    assert caption_beside(tiny, tmp_path / "1.png", "S*") == "a photo of S*, next to a star"


def test_a_caption_without_the_word_is_an_error_that_says_where_to_write_one(tiny, tmp_path):
    tiny.tokenizer.add_placeholder("S*", 2)
    with pytest.raises(
        InputError, match=r'7 star.png is captioned "star", expected S\* in it; write .* into .*7 star.txt'
    ):
        caption_beside(tiny, tmp_path / "7 star.png", "S*")
    (tmp_path / "7 star.txt").write_text("a red star")
    with pytest.raises(InputError, match=r'7 star.txt is captioned "a red star", expected S\* in it'):
        caption_beside(tiny, tmp_path / "7 star.png", "S*")
    (tmp_path / "7 star.txt").write_text("a star " * 40 + "S*")
    with pytest.raises(InputError, match="cut off"):
        caption_beside(tiny, tmp_path / "7 star.png", "S*")


def gradient(dtype, size=1.0, scale=1.0):
    """Of a new word's vectors, the loss times `size`, with the tiny checkpoint in this dtype, scaled on its way."""
    model = load_checkpoint(WEIGHTS, dtype=dtype)
    words = new_word(model, "S*", "heart")
    loss = inversion_loss(model, a_batch(["a photo of a S*", "two S* next to a circle"]), words)
    (scale * size * loss).backward()
    assert words["S*"].dtype == words["S*"].grad.dtype == torch.float32
    return words["S*"].grad / scale


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_frozen_weights_of_half_precision_give_nearly_the_same_gradient(dtype, limit):
    expected = gradient(torch.float32)
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    assert (gradient(dtype, scale=scale) - expected).norm() < limit * expected.norm()


def test_in_float16_small_gradients_survive_by_the_loss_scale():
    """A picture of 512 pixels has 20 times as many latents as the tiny model's, and smaller gradients by as much."""
    expected = gradient(torch.float32, size=1e-3)
    assert (gradient(torch.float16, 1e-3, LOSS_SCALE) - expected).norm() < 0.05 * expected.norm()
    assert (gradient(torch.float16, 1e-3) - expected).norm() > 0.2 * expected.norm()
