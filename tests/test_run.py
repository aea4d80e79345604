"""The folder of a run: previews without reading them back, one row a step in the log, what --resume takes up again, and
what to type next. No model is needed for it: the word learns by hand here."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import sample
import train
from tinyldm import images
from tinyldm import run as running
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.latent_diffusion import Defaults
from tinyldm.run import Run

TYPED = ["--images", "pictures", "--token", "S*"]


@pytest.fixture(autouse=True)
def in_an_empty_folder_with_one_picture_a_preview(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


def new_run(*more: str) -> Run:
    """As train.py makes it for a word of two vectors; four steps, of which every second is shown and saved."""
    options = train.parse_options([*TYPED, "--steps", "4", *more])
    train.fill_in_defaults(options, Defaults(size=16, preview_every=2))
    vectors = torch.full((2, 4), 0.5).requires_grad_()
    return Run(options, "0" * 64, vectors, torch.optim.AdamW([vectors], lr=options.lr, weight_decay=0))


def resumed_run() -> Run:
    run = new_run("--resume")
    run.resume()
    return run


def take_steps(run: Run, count: int) -> None:
    for _ in range(count):
        run.before = run.vectors.detach().clone()
        run.vectors.grad = torch.rand(run.vectors.shape, generator=run.generator)
        run.optimizer.step()
        run.log(torch.tensor(1.0 / (1 + run.done)))


def plain(colour: str) -> Image.Image:
    return Image.new("RGB", (16, 16), colour)


def sheet(run: Run) -> Image.Image:
    with Image.open(run.folder / "preview.png") as image:
        return image.convert("RGB")


def steps_logged(run: Run) -> list[int]:
    with open(run.folder / "loss.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


ROW = 20 + 128 + 4  # the pixels that a row of preview.png is high: its label, its picture, a gap

# ---- Previews


def test_previews_are_appended_from_memory(monkeypatch):
    def unread(path):
        raise AssertionError(f"{path} is read back")

    for module in (running, images):
        monkeypatch.setattr(module, "read_image", unread)
    run = new_run()
    run.start([plain("grey")])
    before = sheet(run)
    for step, colour in enumerate(("red", "green", "blue")):
        run.add_preview(f"{step:06d}", plain(colour))
        after = sheet(run)
        assert after.height == before.height + ROW
        assert after.crop((0, 0, *before.size)).tobytes() == before.tobytes()  # the rows above stay as they were
        assert after.getpixel((64, after.height - 64)) == plain(colour).getpixel((0, 0))
        before = after
    written = sorted(file.name for file in (run.folder / "previews").iterdir())
    assert written == ["000000.png", "000001.png", "000002.png", "training.png"]


def killed_after_its_last_save() -> Run:
    """Saved after two steps, then a third and a fourth were taken, logged and shown, and nothing more."""
    run = new_run()
    run.start([plain("grey")])
    run.add_preview("000000", plain("red"))
    take_steps(run, 2)
    run.save()
    run.add_preview("000002", plain("green"))
    take_steps(run, 2)
    run.add_preview("000004", plain("blue"))
    return run


def test_a_resumed_run_reads_the_rows_up_to_its_step_once_and_shows_none_twice(monkeypatch):
    killed_after_its_last_save()
    reads, read_image = [], running.read_image
    monkeypatch.setattr(running, "read_image", lambda path: (reads.append(path.stem), read_image(path))[1])
    run = resumed_run()
    assert reads == ["training", "000000", "000002"]
    assert [int(label.split()[-2]) for label in list(run.previews)[1:]] == [0, 2]
    run.add_preview("000002", plain("yellow"))  # the step that it resumes at is shown again, in its own row
    take_steps(run, 2)
    run.add_preview("000004", plain("black"))
    assert len(reads) == 3
    assert sheet(run).height == 4 + 4 * ROW
    colours = [sheet(run).getpixel((64, 4 + 20 + row * ROW + 64)) for row in range(4)]
    assert colours == [plain(colour).getpixel((0, 0)) for colour in ("grey", "red", "yellow", "black")]


def test_previews_and_saves_come_at_the_steps_that_the_options_say(monkeypatch):
    run, shown = new_run("--save-every", "3"), []
    monkeypatch.setattr(run, "preview", lambda model: shown.append(run.done))
    run.start([plain("grey")])
    for _ in run.steps(model=None):
        take_steps(run, 1)
    assert shown == [0, 2, 4]
    assert sorted(file.stem for file in run.folder.glob("embedding-*")) == ["embedding-000003", "embedding-000004"]


# ---- The log and what is resumed


def test_steps_logged_after_the_last_save_are_dropped_and_taken_again():
    killed = killed_after_its_last_save()
    assert steps_logged(killed) == [1, 2, 3, 4]
    whole = (killed.folder / "loss.csv").read_text()
    saved = load_embeddings(killed.folder / "embedding.safetensors")["S*"]
    run = resumed_run()
    assert run.done == 2 and steps_logged(run) == [1, 2]
    assert torch.equal(run.vectors, saved) and not torch.equal(run.vectors, killed.vectors)
    take_steps(run, 2)
    assert (run.folder / "loss.csv").read_text() == whole
    assert torch.equal(run.vectors, killed.vectors)  # the optimiser and the generator are as they were, too


def test_a_step_is_logged_with_one_transfer_from_the_device(monkeypatch):
    """Each of these waits until the device has computed everything: a second one would slow down every step."""
    run, transfers = new_run(), []
    run.start([plain("grey")])
    loss = (run.vectors**2).sum()  # a tensor with its graph, as train.py gives it
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "to", "__float__", "__bool__", "__format__"):
            patch.setattr(Tensor, name, noting(name, getattr(Tensor, name), transfers))
        run.log(loss)
    assert transfers == ["tolist"]
    assert run.loss == 2.0 and (run.folder / "loss.csv").read_text().splitlines()[-1] == "1,2.000000,1.0000"


def noting(name, method, calls):
    def call(self, *args, **kwargs):
        calls.append(name)
        return method(self, *args, **kwargs)

    return call


# ---- What to type next


def typed_next(run: Run, arguments: list[str]) -> tuple[str, list[str]]:
    """The first line of what_next, and the second one as a shell splits it into words."""
    line, command = run.what_next(arguments).splitlines()
    return line, shlex.split(command)


def test_a_stopped_run_says_how_to_go_on_in_its_own_folder():
    run = new_run()
    run.done = 3
    line, command = typed_next(run, TYPED)
    assert line == "stopped after 3 of 4 steps, saved in outputs/S; to go on:"
    assert command == ["python", "train.py", *TYPED, "--out", "outputs/S", "--resume"]
    assert '"S*"' in run.what_next(TYPED)  # or a shell would look for files with such names


@pytest.mark.parametrize("arguments", [["--out", "my words/S"], ["--resume", "--out", "my words/S"]])
def test_a_stopped_run_repeats_neither_out_nor_resume(arguments):
    run = new_run("--out", "my words/S")
    run.done = 3
    _, command = typed_next(run, [*arguments, *TYPED])
    assert command == ["python", "train.py", "--out", "my words/S", *TYPED, "--resume"]


@pytest.mark.parametrize(
    "more, prompt",
    [([], "a photo of S* on a green background"), (["--property", "style"], "a painting in the style of S*")],
    ids=["object", "style"],
)
def test_a_finished_run_says_how_to_sample(more, prompt):
    run = new_run(*more)
    run.done = 4
    line, command = typed_next(run, [*TYPED, *more])
    assert line == "learned S*: look at outputs/S/preview.png, then try"
    assert command == ["python", "sample.py", "--prompt", prompt, "--embedding", "outputs/S/embedding.safetensors"]


NASTY = [
    "$(touch${IFS}x)",
    "`touch${IFS}x`",
    'a"b',
    "a'b",
    "'",
    "-x",
    "--resume",
    "!!",
    "a\\",
    "#",
    ";x",
    ">x",
    "%s",
    "{}",
    "熊",
]


@pytest.mark.parametrize("folder", ["my words", "-$(touch x)", "a'b\"c\n"])
@pytest.mark.parametrize("out_is_given", [True, False])
def test_a_shell_runs_what_is_printed_as_it_was_meant(shell_words, folder, out_is_given):
    """Whatever the token and the paths, a dash at their front included."""
    runs, commands = [], []
    for token in NASTY:
        typed = [f"--images={folder}", f"--token={token}", f"--weights={folder}/sd", f"--vae={folder}/vae", "--steps=4"]
        typed += [f"--out={folder}"] * out_is_given
        runs.append(new_run(*typed))
        for runs[-1].done in (3, 4):
            commands.append(runs[-1].what_next(typed).split("\n", 1)[1])
    found = iter(shell_words(commands))
    for token, run in zip(NASTY, runs, strict=True):
        script, *words = next(found)
        options = train.parse_options(words)
        train.fill_in_defaults(options, Defaults(size=16, preview_every=2))
        assert script == "train.py" and vars(options) == vars(run.options) | {"resume": True}
        script, *words = next(found)
        options = sample.parse_options(words)
        assert script == "sample.py" and options.prompt == [f"a photo of {token} on a green background"]
        assert options.embedding == [str(run.folder / "embedding.safetensors")]
        assert (options.weights, options.vae) == (Path(folder) / "sd", Path(folder) / "vae")


def test_the_usual_command_reads_well():
    expected = (
        'python sample.py --prompt "a photo of S* on a green background" --embedding outputs/S/embedding.safetensors'
    )
    assert new_run().sample_command() == expected


def test_a_finished_run_samples_with_the_model_that_it_learned_with():
    model = ["--weights", "my models/sd.ckpt", "--vae", "my models/vae.safetensors", "--prediction", "v"]
    run = new_run(*model, "--out", "my words/S")
    run.done = 4
    _, command = typed_next(run, [*TYPED, *model])
    assert command[4:] == ["--embedding", "my words/S/embedding.safetensors", *model]
