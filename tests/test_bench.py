"""The bench: every work runs on both sides, and what it tells of their seconds is right."""

import json
import subprocess
import sys

import bench
import pytest
import torch
import torch.nn.functional as F
from bench import WORKS
from conftest import ROOT
from helpers.memory import Anonymous

from tinyldm import InputError


def options(*words: str):
    return bench.parse_options([*words])


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
@pytest.mark.parametrize("side", ["tinyldm", "diffusers"])
def test_every_work_of_either_side_runs_and_a_step_changes_one_row_alone(monkeypatch, side, kind):
    changed = []
    step = torch.optim.AdamW.step

    def noted(self):
        ((rows,),) = (group["params"] for group in self.param_groups)
        before = rows.detach().clone()
        step(self)
        changed.append((rows, before))

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    works = {"tinyldm": bench.ours, "diffusers": bench.theirs}[side](options("--model", kind))
    assert works.keys() == WORKS.keys()
    for work in works.values():
        work()
    ((rows, before),) = changed
    assert [i for i, row in enumerate(rows) if not row.equal(before[i])] == [0]


def test_beside_another_checkout_each_round_is_timed_and_kept(tmp_path):
    command = [sys.executable, "tests/bench.py", "--beside", ROOT, "--what", "encode", "--rounds", "3"]
    ended = subprocess.run([*command, "--json", tmp_path / "a.json"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    kept = json.loads((tmp_path / "a.json").read_text())
    (row,) = kept["rows"]
    assert len(row["ours"]) == len(row["theirs"]) == 3 and min(row["ours"] + row["theirs"]) > 0
    assert row["ratio"] == sorted(b / a for a, b in zip(row["ours"], row["theirs"], strict=True))[1]
    assert 0 < row["share"] < 1.5 and min(row["memory"]) > 10**8
    assert ended.stdout.splitlines()[2].startswith("| encoding | ")


def test_operations_of_attention_count():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    product = 2 * 2 * 16 * 16 * 8  # of queries and keys, or of what comes of it and the values
    with bench.FlopCounterMode(display=False, custom_mapping=bench.ATTENTION) as counter:
        out = F.scaled_dot_product_attention(q, q, q)
        assert counter.get_total_flops() == 2 * product
        out.sum().backward()
    assert counter.get_total_flops() == 7 * product  # the first one again, and four for the gradients


def test_a_table_has_medians_extremes_ratios_and_shares():
    row = {"what": "step", "ours": [1.0, 2.0, 4.0], "theirs": [3.0, 4.0, 4.0], "ratio": 2.0, "share": 0.5}
    head, _, line = bench.as_table([row | {"memory": [5e8, 10**9]}], options("--model", "1.5"))
    assert head == "| 1.5, float32, cpu | ours | diffusers | ratio | peak | GB |"
    assert line == "| training step | 2 s (1 to 4) | 4 s (3 to 4) | 2.00 | 50% | 0.50, 1.00 |"


def test_memory_that_was_there_for_a_moment_counts():
    with Anonymous() as memory:
        block = torch.ones(30_000_000)
        del block
    assert memory.highest > max(memory.before, memory.after) + 10**8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "diffusers has no tiny checkpoint, expected --beside DIR or --model"),
        (["--beside", "nowhere"], "--beside nowhere is no checkout of this project"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        options(*words)


def test_a_side_that_ends_early_is_one_line():
    side = bench.Side("tinyldm", ROOT, options("--model", "tiny", "--beside", str(ROOT)))
    side.process.kill()
    side.process.wait()
    for _ in range(2):
        with pytest.raises(InputError, match="a side ended before its work was done"):
            side.ask("step")
