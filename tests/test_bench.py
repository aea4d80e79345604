"""The bench: every work runs on both sides, and what it tells of their seconds is right."""

import json
import mmap
import os
import subprocess
import sys
import time
from argparse import Namespace

import bench
import pytest
import torch
import torch.nn.functional as F
from bench import WORKS
from conftest import ROOT
from helpers import growth, works
from helpers.memory import Anonymous
from helpers.pretend import PretendDevice
from PIL import Image

from tinyldm import InputError
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.optimizers import Adam
from tinyldm.run import Run


def options(*words: str):
    return bench.parse_options([*words])


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
@pytest.mark.parametrize("side", ["tinyldm", "diffusers"])
def test_every_work_of_either_side_runs_and_a_step_changes_one_row_alone(monkeypatch, side, kind):
    changed = []
    kind_of = {"tinyldm": Adam, "diffusers": torch.optim.AdamW}[side]
    step = kind_of.step

    def noted(self):
        rows = self.vectors if side == "tinyldm" else self.param_groups[0]["params"][0]
        before = rows.detach().clone()
        step(self)
        changed.append((rows, before))

    monkeypatch.setattr(kind_of, "step", noted)
    there = {"tinyldm": works.ours, "diffusers": works.theirs}[side](options("--model", kind))
    assert there.keys() == WORKS.keys() - {"start", "sheet"}
    for work in there.values():
        work()
    assert len(changed) == 2  # of a step, and of one with little memory
    rows, before = changed[0]
    assert [i for i, row in enumerate(rows) if not row.equal(before[i])] == [0]


def test_a_script_in_its_folder_finds_all_that_it_needs(tmp_path):
    """Python puts the folder tests into sys.path then, and not the one that train.py is in."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", "import bench, helpers.public"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
def test_our_works_mix_no_devices_and_wait_for_none(kind):
    with PretendDevice() as device:
        for work in works.ours(Namespace(**vars(options("--model", kind)) | {"device": "meta"})).values():
            work()
    assert device.waits == 0


def test_a_sheet_is_24_pictures_in_the_checkpoints_own_steps(monkeypatch, quick):
    made, predicted = [], []
    decode, predict = LatentDiffusion.decode, LatentDiffusion.predict
    monkeypatch.setattr(LatentDiffusion, "decode", lambda model, z: made.extend(decode(model, z)))
    monkeypatch.setattr(LatentDiffusion, "predict", lambda model, *x: predicted.append(1) or predict(model, *x))
    monkeypatch.setattr(works, "TINY", quick)  # of two steps
    sheet = works.ours(options("--beside", str(ROOT)))["sheet"]
    sheet()
    assert len(made) == 24 and made[0].shape == (3, 64, 64)
    assert len(predicted) == 2 * 24 / 12  # twelve pictures at a time


def test_beside_another_checkout_each_round_is_timed_and_kept(tmp_path, capsys):
    command = ["--beside", str(ROOT), "--what", "encode", "--rounds", "3"]
    bench.main([*command, "--json", str(tmp_path / "a.json")])
    kept = json.loads((tmp_path / "a.json").read_text())
    (row,) = kept["rows"]
    assert len(row["ours"]) == len(row["theirs"]) == 3 and min(row["ours"] + row["theirs"]) > 0
    assert row["ratio"] == sorted(b / a for a, b in zip(row["ours"], row["theirs"], strict=True))[1]
    assert 0 < row["share"] < 1.5 and min(row["memory"]) > 10**8
    assert capsys.readouterr().out.splitlines()[2].startswith("| encoding | ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_attention_count(dtype):
    q = torch.randn(1, 2, 16, 8, dtype=dtype, requires_grad=True)
    product = 2 * 2 * 16 * 16 * 8  # of queries and keys, or of what comes of it and the values
    with bench.FlopCounterMode(display=False, custom_mapping=bench.ATTENTION) as counter:
        out = F.scaled_dot_product_attention(q, q, q)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 7 * product  # the first one again, and four for the gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_frozen_weights_are_not_made_and_do_not_count(dtype):
    for layer, x in ((torch.nn.Conv2d(8, 16, 3), torch.randn(1, 8, 9, 9)), (torch.nn.Linear(8, 16), torch.ones(9, 8))):
        layer, x = layer.to(dtype).requires_grad_(False), x.to(dtype).requires_grad_()
        with bench.FlopCounterMode(display=False) as counter:
            out = layer(x)
            forward = counter.get_total_flops()
            out.sum().backward()
        assert counter.get_total_flops() == 2 * forward > 0


def test_a_table_has_medians_extremes_ratios_and_shares():
    row = {"what": "step", "ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 4.0], "ratio": 2.0, "share": 0.5}
    head, _, line = bench.as_table([row | {"memory": [5e8, 10**9]}], options("--model", "1.5"))
    assert head == "| 1.5, float32, cpu | ours | diffusers | ratio | peak | GB |"
    assert line == "| training step | 2 s (1 to 4) | 4 s (3 to 4) | 2.00 | 50% | 0.50, 1.00 |"
    *_, line = bench.as_table([bench.timed("start", [[1.0, 2.0], [4.0, 6.0], [2.0, 3.0]])], options("--model", "1.5"))
    assert line == "| start, until a step is done | 2 s (1 to 4) | 3 s (2 to 6) | 1.50 |  |  |"


# ---- Starts

LEARNS = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[-1])
out.mkdir()
(out / "loss.csv").write_text("step,loss,norm\\n")
time.sleep(0.5)
(out / "loss.csv").write_text("step,loss,norm\\n1,0.1,0.2\\n")
time.sleep(60)
"""


def first_step(program: str, folder) -> float:
    return bench.seconds_to_first_step([sys.executable, "-c", program], folder, folder / "run", {**os.environ})


def test_a_start_lasts_until_the_first_step_is_logged_and_leaves_nothing(tmp_path):
    start = time.perf_counter()
    seconds = first_step(LEARNS, tmp_path)
    assert 0.5 < seconds < time.perf_counter() - start < 30
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_ends_before_its_first_step_tells_why_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^train.py ended before its first step: ValueError: no weights$"):
        first_step("raise ValueError('no weights')", tmp_path)


def test_both_sides_learn_from_the_weights_that_a_start_is_measured_with(tmp_path, monkeypatch):
    works.save_random(tmp_path / "weights", "1.x", "float32")
    asked = options("--model", "1.x", "--weights", str(tmp_path / "weights"))
    works.theirs(asked)["step"]()
    found = []
    monkeypatch.setattr(bench, "seconds_to_first_step", lambda *words: found.append(words))
    bench.start_of_train(ROOT, tmp_path, asked)
    (((_, _, program, *words), _, out, _),) = found
    monkeypatch.setattr(sys, "argv", ["-c", *words, "--out", str(out), "--steps", "1"])
    monkeypatch.setattr(Run, "preview", Run.preview)  # which the program changes, and pytest puts back
    with pytest.raises(SystemExit) as end:
        exec(program, {})
    assert end.value.code == 0
    assert bench.is_logged(out / "loss.csv")
    assert [file.name for file in (out / "previews").iterdir()] == ["training.png"]


# ---- Growth


def test_growth_is_told_drawn_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "VALUES", {"vectors": (1, 2), "vocabulary": (958, 2000), "words": (1, 2)})
    monkeypatch.setattr(growth, "SMALL", (32, 64))
    words = ["--growth", tmp_path / "a.png", "--json", tmp_path / "a.json", "--model", "1.x", "--rounds", "2"]
    bench.main([*map(str, words)])
    kept = json.loads((tmp_path / "a.json").read_text())["growth"]
    values = {name: [*map(int, seconds)] for name, seconds in kept.items()}
    assert values == {"vectors": [1, 2], "vocabulary": [958, 2000], "words": [1, 2], "pixels": [32, 64]}
    assert all(len(seconds) == 2 and min(seconds) > 0 for of in kept.values() for seconds in of.values())
    vectors, *_, pixels = capsys.readouterr().out.splitlines()
    assert vectors.startswith("vectors: 1 ") and pixels.startswith("pixels: 32 ")
    assert Image.open(tmp_path / "a.png").width > 1000


def test_what_growth_has_no_memory_for_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "VALUES", {"batch": (1, 10**9)})
    monkeypatch.setattr(growth, "SMALL", (32,))
    found = growth.growth(options("--growth", str(tmp_path / "a.png"), "--model", "1.x", "--rounds", "1"))
    assert {name: [*of_value] for name, of_value in found.items()} == {"batch": [1], "pixels": [32]}
    assert "left out: batch 1000000000: 32x32 pixels in a batch of 1000000000 take more" in capsys.readouterr().err


# ---- What cannot be


def test_memory_that_was_there_for_a_moment_counts():
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with Anonymous() as memory, mmap.mmap(-1, 120_000_000, private) as block:  # a tensor's may be kept when it is freed
        block[:: mmap.PAGESIZE] = bytes(len(range(0, len(block), mmap.PAGESIZE)))
    assert memory.highest > max(memory.before, memory.after) + 10**8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "diffusers has no tiny checkpoint, expected --beside DIR or --model"),
        (["--beside", "nowhere"], "--beside nowhere is no checkout of this project"),
        (["--growth", "a.png", "--what", "step"], "--growth is of this checkout's step alone; leave out"),
        (["--model", "1.5", "--what", "sheet"], "--what sheet is of the tiny checkpoint; try --model tiny"),
        (["--model", "1.5", "--device", "cuda"], "--device cuda found no GPU, expected one; try --device cpu"),
    ],
)
def test_what_cannot_be_compared_is_refused(monkeypatch, words, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        options(*words)


def test_a_side_that_ends_early_is_one_line():
    side = bench.Side("tinyldm", ROOT, options("--model", "tiny", "--beside", str(ROOT)))
    side.process.kill()
    side.process.wait()
    for _ in range(2):
        with pytest.raises(InputError, match="a side ended before its work was done"):
            side.ask("step")
