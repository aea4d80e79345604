"""How vectors move: known answers, and PyTorch's own Adam."""

import pytest
import torch

from tinyldm.optimizers import Adam, DecayingNorm, KeptNorm, OnSphere


def test_adam_is_pytorchs_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 128, generator=generator, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    one, other = Adam(ours, 1.0, 0.01), torch.optim.AdamW([theirs], lr=0.01, weight_decay=0)
    for done in range(200):
        one.lr = other.param_groups[0]["lr"] = 0.01 * (1 - done / 200)
        ours.grad = 10 ** (-done / 20) * torch.randn(3, 128, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
        assert torch.equal(ours, theirs) and ours.grad is None


def test_a_decaying_norm_goes_a_twentieth_of_the_way_less_when_the_rate_has_fallen():
    for fallen, share in ((1.0, 0.05), (0.2, 0.01), (0.0, 0.0)):
        vectors = torch.tensor([[0.6, 0.8], [8.0, 0.0]], requires_grad=True)
        optimizer = DecayingNorm(vectors, 2.0, lr=0.01)
        optimizer.lr = 0.01 * fallen
        vectors.grad = torch.zeros_like(vectors)
        optimizer.step()
        assert torch.allclose(vectors.norm(dim=1), torch.tensor([1 + share, 8 - 6 * share]))
        assert torch.allclose(vectors[1] / vectors[1].norm(), torch.tensor([1.0, 0.0]))


def test_a_kept_norm_is_that_of_known_words():
    vectors = torch.tensor([[0.6, 0.8], [8.0, 0.0]], requires_grad=True)
    optimizer = KeptNorm(vectors, 2.0, 1e-3)
    vectors.grad = torch.rand(2, 2)
    optimizer.step()
    assert torch.allclose(vectors.norm(dim=1), torch.tensor([2.0, 2.0]))


def test_a_step_on_the_sphere_turns_by_the_rate_against_the_gradient_along_it():
    vectors = torch.tensor([[7.0, 0.0, 0.0]], requires_grad=True)
    optimizer = OnSphere(vectors, 3.0, lr=0.01)
    assert torch.equal(vectors, torch.tensor([[3.0, 0.0, 0.0]]))
    vectors.grad = torch.tensor([[100.0, 0.3, 0.0]])  # most of it away from the sphere, which does not count
    optimizer.step()
    angle = torch.atan(torch.tensor(0.04))
    assert torch.allclose(vectors, 3 * torch.tensor([[angle.cos(), -angle.sin(), 0.0]]))


def test_without_a_gradient_along_the_sphere_the_prior_turns_vectors_back_to_where_they_began():
    vectors = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    optimizer = OnSphere(vectors, 1.0, lr=0.01)
    vectors.data = torch.tensor([[0.6, 0.8, 0.0]])
    vectors.grad = torch.zeros_like(vectors)
    optimizer.step()  # of a batch that does not read it
    assert vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8), 0.0]]
    broken = OnSphere(torch.ones(1, 3, requires_grad=True), 1.0, lr=0.01)
    broken.vectors.grad = torch.full((1, 3), torch.nan)
    broken.step()
    assert broken.vectors.isnan().all()  # of which Run.log tells
    for _ in range(10):
        vectors.grad = 1e-9 * vectors.detach()
        optimizer.step()
    assert vectors[0, 0] > 0.85 and abs(vectors.norm() - 1) < 1e-6
