"""The comparison of two text encoders: both ways take the same batches and rates, and one the tower as it is."""

import pytest
import torch
from safetensors.torch import save_file

from tinyldm.lab.pretraining import text_tower
from tinyldm.lab.pretraining.loop import STATE

TEXT_TOWER = "tinyldm.lab.pretraining.text_tower"


@pytest.fixture
def pretrained(tmp_path):
    """What the comparison needs of a finished pretraining."""
    for stage in ("clip", "diffusion"):
        (tmp_path / stage).mkdir()
    names = ("average/text_model.x", "average/vision_model.y", "weights/text_model.x")
    save_file({name: torch.ones(2).half() for name in names}, tmp_path / "clip" / STATE, metadata={"step": "1"})
    for file in ("autoencoder.safetensors", "merges.txt"):
        (tmp_path / "diffusion" / file).write_text(f"the {file}")
    return tmp_path


def test_both_ways_are_trained_and_their_losses_printed(run, pretrained, monkeypatch):
    jobs = {}

    def train(job, text_encoder):
        jobs[job.stage] = job, text_encoder
        assert (job.stage_folder / "merges.txt").read_text() == "the merges.txt"
        losses = {"text-joint": (1.0, 0.5, 0.25, 0.25), "text-frozen": (2.0, 1.0, 0.5, 0.5)}[job.stage]
        rows = "".join(f"{50 * (i + 1)},{loss}\n" for i, loss in enumerate(losses))
        (job.stage_folder / "loss.csv").write_text(f"step,loss\n{rows}")

    monkeypatch.setattr(text_tower, "train_diffusion", train)
    outcome = run(TEXT_TOWER, "--out", pretrained, "--steps", 200, "--pictures", 8)
    assert outcome.out.splitlines() == [
        "100 steps: joint 0.7500, frozen 1.5000",
        "200 steps: joint 0.2500, frozen 0.5000",
    ]
    (joint, nothing), (frozen, tower) = jobs["text-joint"], jobs["text-frozen"]
    assert nothing is None and set(tower) == {"text_model.x"} and tower["text_model.x"].dtype == torch.float32
    assert joint.recipe == frozen.recipe and (joint.recipe.steps, joint.recipe.beginning_of) == (200, 13_000)
    assert joint.pixels.equal(frozen.pixels) and joint.seed == frozen.seed


def test_before_pretraining_it_says_what_is_missing(run, pretrained):
    (pretrained / "diffusion" / "merges.txt").unlink()
    assert (
        "merges.txt; run its stage first: python -m tinyldm.lab.pretraining --stage diffusion"
        in run(TEXT_TOWER, "--out", pretrained).error
    )
    assert "holds no state" in run(TEXT_TOWER, "--out", pretrained / "nowhere").error
    assert not (pretrained / "nowhere").exists()
