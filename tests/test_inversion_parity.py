"""The gradient that learns a new word, through the whole of latent diffusion, against diffusers and transformers.

Theirs is the slow way: a text encoder whose table has grown by the new rows, the table's gradient cut to those rows.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from helpers.reference import TEXTS, UNETS, difference, text_encoders, unets

from tinyldm.schedule import NoiseSchedule

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # our names and diffusers'


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", TEXTS)
def test_gradient_of_the_loss_with_respect_to_the_learned_vectors(kind, prediction):
    text_encoder, reference_text_encoder = text_encoders(kind)
    unet, reference_unet = unets(kind)
    text_encoder.requires_grad_(False)
    unet.requires_grad_(False)
    words, width = TEXTS[kind].vocabulary_size, TEXTS[kind].width
    assert UNETS[kind][0].context_width == width

    generator = torch.Generator().manual_seed(1)
    z_0 = torch.randn(4, 4, 8, 16, generator=generator)
    eps = torch.randn(z_0.shape, generator=generator)
    t = torch.tensor([0, 20, 500, 999])
    ids = torch.randint(words, (4, 16), generator=generator)
    ids[:, 3:5] = torch.tensor([words, words + 1])  # a placeholder of two vectors in every caption
    ids[1:3, 9] = words + 2  # and another in some
    vectors = 0.01 * torch.randn(3, width, generator=generator)

    learned = vectors.clone().requires_grad_()
    schedule = NoiseSchedule(prediction=prediction)
    output = unet(schedule.add_noise(z_0, eps, t), t, text_encoder(ids, learned))
    loss = F.mse_loss(output, schedule.target(z_0, eps, t))
    loss.backward()

    scheduler = DDPMScheduler(1000, 0.00085, 0.0120, "scaled_linear", prediction_type=PREDICTIONS[prediction])
    table = reference_text_encoder.add_rows(vectors)
    output = reference_unet(scheduler.add_noise(z_0, eps, t), t, reference_text_encoder(ids)).sample
    expected = F.mse_loss(output, eps if prediction == "eps" else scheduler.get_velocity(z_0, eps, t))
    expected.backward()

    assert learned.grad.any(dim=-1).all()
    assert difference(loss, expected) < 1e-5
    assert difference(learned.grad, table.grad[words:]) < 1e-4
