"""Pictures of prompts: which seed each comes from."""

import numpy as np

from tinyldm.formats.checkpoint import load_checkpoint
from tinyldm.lab.measure.sampling import sampled, samples


def test_a_picture_depends_on_its_prompt_and_seed_not_on_its_batch(quick):
    model, prompts = load_checkpoint(quick), ["a red star", "a blue ring", "a lemon", "a red star"]
    few = [np.asarray(image, int) for image in samples(model, prompts[1:], range(1, 4), batch=2)]
    assert len(few) == 3
    for one, other in zip(few, sampled(model, prompts)[1:], strict=True):
        assert np.abs(one - np.asarray(other, int)).max() <= 1  # rounded either way
    (other,) = samples(model, prompts[3:], [4])
    assert np.abs(few[2] - np.asarray(other, int)).max() > 20
