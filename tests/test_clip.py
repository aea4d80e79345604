"""The text encoder against transformers' with the same weights, and the masked lookup against the obvious slow way."""

from dataclasses import replace

import pytest
import torch
from helpers.reference import TEXTS, count, difference, digest, random_ids, randomise, text_encoders

from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder

WORDS = TEXTS["1.x"].vocabulary_size  # the first id that is not a word of the vocabulary
WIDTH = TEXTS["1.x"].width


def random_vectors(rows):
    return 0.01 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))


def loss_of(context):
    """A number that every value of the context has a different say in."""
    return (context * torch.linspace(-1, 1, context.numel()).reshape(context.shape)).sum()


def small_encoder():
    encoder = CLIPTextEncoder(TEXTS["1.x"]).requires_grad_(False)
    randomise(encoder)
    return encoder.eval()


# ---- The encoder


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


# ---- The masked lookup


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
