"""Two processes that torchrun starts make what one makes: the same word, the same files, one line where one would say
one; and a process that is lost ends the run, which goes on with --resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, ROOT, WEIGHTS

from tinyldm import InputError, ranks
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.inversion import Batch

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
LEARN = ["train.py", "--images", str(EXAMPLES / "bolt"), "--token", "<bolt>", "--batch", "4", "--save-every", "2"]
SAMPLE = ["sample.py", "--prompt", "a red star", "--prompt", "two lemons", "--num", "7", "--steps", "2", "--attention"]


def start(*words: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def lines(process: subprocess.Popen) -> list[str]:
    """What a command said, without progress bars and what torchrun says of processes that it ended."""
    out, err = process.communicate(timeout=120)
    return [*out.splitlines(), *(line for line in err.splitlines() if line.startswith(("train.py: ", "sample.py: ")))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def word(folder: Path) -> torch.Tensor:
    return load_embeddings(folder / "embedding.safetensors")["<bolt>"]


def test_two_processes_learn_the_word_that_one_learns_and_the_first_alone_writes_and_speaks(run, tmp_path, quick):
    command = [*LEARN, "--weights", quick, "--steps", 2, "--preview-every", 9, "--out"]
    learning = start(*TORCHRUN, *command, tmp_path / "two")
    alone = run(*command, tmp_path / "one").out.splitlines()
    said = lines(learning)
    assert learning.returncode == 0
    assert [line[:14] for line in said] == [line[:14] for line in alone] == ["learned <bolt>", "  python sampl"]
    assert files(tmp_path / "two").keys() == files(tmp_path / "one").keys()
    torch.testing.assert_close(word(tmp_path / "two"), word(tmp_path / "one"), rtol=0, atol=1e-5)


def test_a_process_that_is_lost_ends_the_run_with_one_line_and_resume_goes_on_till_a_signal_stops_both(tmp_path, quick):
    folder = tmp_path / "bolt"
    command = [*TORCHRUN, *LEARN, "--weights", quick, "--steps", 10_000, "--out", folder]
    learning = start(*command)
    wait_for(lambda: (folder / "embedding-000002.safetensors").exists() or learning.poll() is not None)
    os.kill(first_child_of(learning.pid), signal.SIGKILL)  # the rank that speaks for all
    (said,) = lines(learning)
    assert said.startswith("train.py: error: another process of this run has ended (")
    assert said.endswith("; type the same again, train.py with --resume")
    assert learning.returncode == 1

    done = max(folder.glob("embedding-*"))
    goes_on = start(*command, "--resume")
    wait_for(lambda: max(folder.glob("embedding-*")) > done or goes_on.poll() is not None)
    os.kill(goes_on.pid, signal.SIGINT)
    said = lines(goes_on)
    logged = [int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]
    assert logged == [*range(1, len(logged) + 1)]
    assert said[0].startswith(f"stopped after {len(logged)} of 10000 steps")
    assert said[1].startswith("  torchrun --standalone --nproc-per-node 2 -- train.py") and said[1].endswith("--resume")


def test_two_processes_sample_the_files_that_one_samples_bit_for_bit(run, tmp_path):
    command = [*SAMPLE, "--weights", WEIGHTS, "--out"]
    sampling = start(*TORCHRUN, *command, tmp_path / "two")
    assert run(*command, tmp_path / "one").out.startswith("14 pictures and sheet.png in ")
    assert lines(sampling)[0].startswith("14 pictures and sheet.png in ")
    assert len(files(tmp_path / "one")) == 29
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_what_both_processes_find_wrong_is_told_once():
    learning = start(*TORCHRUN, *LEARN[:-4], "--batch", 5)
    assert lines(learning) == ["train.py: error: --batch 5 can't be shared equally by 2 processes; try --batch 6"]
    assert learning.returncode == 1


# ---- In one process


def test_alone_everything_stays_as_it_is():
    batch = Batch(torch.rand(3, 1), torch.rand(3, 1), torch.arange(3), ["a", "b", "c"])
    assert torch.equal(ranks.part(batch).z_0, batch.z_0) and ranks.part(batch).captions == batch.captions
    assert ranks.mean(batch.z_0) is batch.z_0
    assert (ranks.rank(), ranks.count(), ranks.highest(3), ranks.gathered({1: "a"})) == (0, 1, 3, {1: "a"})
    assert ranks.command() == ["python"]
    ranks.check_batch(3)


def test_the_shares_of_all_ranks_are_the_batch(monkeypatch):
    batch = Batch(torch.rand(6, 1), torch.rand(6, 1), torch.arange(6), [*"abcdef"])
    monkeypatch.setattr(ranks, "count", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.part(batch))
    assert sorted(t for share in shares for t in share.t.tolist()) == [*range(6)]
    assert all("abcdef"[t] == caption for share in shares for t, caption in zip(share.t, share.captions, strict=True))
    assert torch.stack([share.z_0.mean() for share in shares]).mean().item() == pytest.approx(batch.z_0.mean().item())


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_RANK", "0")  # each of them says so
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="found 2 GPUs, expected one for each process; try --nproc-per-node 2"):
        ranks.join("cuda")


def wait_for(there) -> None:
    end = time.monotonic() + 100
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def first_child_of(process: int) -> int:
    """Rank 0 of torchrun's processes."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    (first,) = [child for child in children if b"\0RANK=0\0" in Path(f"/proc/{child}/environ").read_bytes()]
    return int(first)
