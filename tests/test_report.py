"""The figures of weights/tiny/README.md on smaller samples, and the command that prints them all."""

import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import WEIGHTS
from PIL import Image

from tinyldm.lab.measure import __main__ as command
from tinyldm.lab.measure import report, sampling
from tinyldm.lab.measure.colours import colours_right, spread
from tinyldm.lab.measure.judge import load_judge
from tinyldm.lab.world.distribution import EXAMPLES
from tinyldm.lab.world.styles import draw
from tinyldm.lab.world.things import Picture, Thing

MEASURE = "tinyldm.lab.measure"


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_the_tiny_checkpoint_obeys_its_prompts(tiny, judge, tmp_path):
    """What `--only prompts` measures, on a twentieth of its prompts, or six for each figure, in seven steps of 25."""
    tiny.defaults = replace(tiny.defaults, sampler_steps=7)
    figures = report.report_prompts(tiny, judge, 0.05, tmp_path)
    assert len(figures) == 18
    assert min(figures.values()) >= 0.8 and np.mean(list(figures.values())) >= 0.95, figures
    assert len(list(tmp_path.glob("prompts-*.png"))) == 9


def test_the_autoencoder_keeps_pictures_flat_colours_and_patterns(run):
    """What `--only autoencoder` measures, on a tenth of its pictures."""
    quality, flat, patterns, colours = run(MEASURE, "--only", "autoencoder", "--share", 0.1).out.splitlines()
    assert float(re.search(r"([\d.]+) dB PSNR on 50 pictures", quality)[1]) >= 31
    assert float(re.search(r"within ([\d.]+) of 255", flat)[1]) <= 8
    assert int(re.search(r"(\d+)% of", patterns)[1]) >= 85
    assert dict(re.findall(r"([a-z-]+) (\d+)%", colours)).keys() == EXAMPLES.keys()


def test_seeds_differ_as_in_the_world_and_guidance_burns_no_colour(tiny):
    """What `--only variety` measures, of 16 seeds, in ten steps of 25."""
    tiny.defaults = replace(tiny.defaults, sampler_steps=10)
    red_star = Picture((Thing("star", "red"),), "gray")
    world = spread([np.asarray(draw(replace(red_star, seed=seed))) for seed in range(64)])
    for guidance in (1, 8):
        images = report.sampled(tiny, ["a photo of a red star on a gray background"] * 16, guidance=guidance)
        pictures = [np.asarray(image) for image in images]
        assert all(colours_right(picture, ("red",)) for picture in pictures)
        assert spread(pictures)["centre"] > 0.6 * world["centre"]
        if guidance == 1:
            assert spread(pictures)["area"] > 0.5 * world["area"]
        assert np.mean([(picture == 0) | (picture == 255) for picture in pictures]) < 0.01


@pytest.fixture
def drawn(monkeypatch):
    """Red stars of the world, whatever the model is asked for."""

    def sampled(model, prompts, vectors=None, guidance=None):
        return [draw(Picture((Thing("star", "red"),), "gray", seed=seed)) for seed in range(len(prompts))]

    for module in (sampling, report):
        monkeypatch.setattr(module, "sampled", sampled)


def test_without_a_part_all_are_reported(run, drawn, monkeypatch):
    for part in ("words", "outlines", "styles", "examples"):
        monkeypatch.setattr(command, f"report_{part}", lambda *_, part=part, **__: print(f"{part}: measured"))
    monkeypatch.setattr(report, "EXAMPLES", {})
    monkeypatch.setattr(report, "PROMPTS", dict(list(report.PROMPTS.items())[4:5]))
    lines = run(MEASURE, "--share", 0.02).out.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [*["autoencoder"] * 4, '"two {colour} {shape}s", 6 prompts']
    own, decoded, samples, *of_guidance = lines[5:-4]
    assert own.replace("the world's own", "samples") == samples != decoded.replace("decoded", "samples")
    assert re.fullmatch(r"variety, samples: centre 0\.\d{3}, area 0\.\d{3}, shade 0\.\d{3}", samples)
    assert len(of_guidance) == 2 * 5 and all(line.startswith("guidance ") for line in of_guidance)
    assert re.fullmatch(r"guidance 1: colour right 100%, off by \d of 255, 0\.0% of values clipped", of_guidance[0])
    assert lines[-4:] == [f"{part}: measured" for part in ("words", "outlines", "styles", "examples")]


def test_guidance_is_that_of_the_prompts(tiny, judge, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "ask", lambda *args, guidance: (asked.append(guidance), ({}, []))[1])
    report.report_prompts(tiny, judge, 0.01, None, 1.5)
    assert asked == [1.5] * 9


def test_samples_are_eight_of_each_prompt(run, drawn, tmp_path):
    outcome = run(MEASURE, "--samples", tmp_path / "samples.png")
    assert outcome.status == 0 and outcome.out == ""
    with Image.open(tmp_path / "samples.png") as new, Image.open(WEIGHTS / "samples.png") as committed:
        assert new.size == committed.size


def test_pictures_of_another_size_are_not_the_worlds(run, monkeypatch, tiny):
    tiny.defaults = replace(tiny.defaults, size=512)
    monkeypatch.setattr(command, "load_checkpoint", lambda _: tiny)
    assert "makes pictures of 512 pixels, expected 64" in run(MEASURE).error
