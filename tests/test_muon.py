"""Muon's step: against torch's own, on known answers, and where it differs from Adam's."""

import pytest
import torch
from torch import nn

from tinyldm.lab.pretraining.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalized(matrix[None])[0] @ vt.T
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
    assert (inner - inner.diagonal().diag()).abs().max() < 0.1


def test_the_size_of_the_gradient_does_not_matter():
    matrix = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    alone, beside_a_smaller = orthogonalized(matrix[None])[0], orthogonalized(torch.stack([matrix, 1e-3 * matrix]))
    assert torch.allclose(beside_a_smaller[0], alone, atol=0.03)
    assert torch.allclose(beside_a_smaller[1], alone, atol=0.03)


@pytest.mark.parametrize("shape", [(12, 12), (6, 20), (20, 6)])
def test_steps_are_those_of_torch(shape):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=draw)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Both compute in bfloat16, and round at different places.
    assert (ours - theirs).norm() < 0.05 * (ours - start).norm()


def test_a_kernel_is_the_matrix_of_its_outputs_in_any_memory_order():
    draw = torch.Generator().manual_seed(0)
    kernel = torch.randn((8, 4, 3, 3), generator=draw)
    gradient = torch.randn((8, 4, 3, 3), generator=draw)
    plain, channels_last = nn.Parameter(kernel.clone()), nn.Parameter(kernel.to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.flatten(1))
    plain.grad, channels_last.grad, matrix.grad = (
        gradient,
        gradient.to(memory_format=torch.channels_last),
        gradient.flatten(1),
    )
    Muon([plain, channels_last, matrix], lr=0.1).step()
    assert torch.equal(plain, channels_last)
    assert torch.equal(plain.flatten(1), matrix)


def test_a_step_has_the_root_mean_square_of_adams():
    p = nn.Parameter(torch.zeros(16, 64))
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0, weight_decay=0).step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)
