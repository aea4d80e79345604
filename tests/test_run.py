"""The folder of a run: previews without reading them back, one row a step in the log, what --resume takes up again, and
what to type next. No model is needed for it: the word learns by hand here."""

import csv
import json
import math
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import locked_elsewhere
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sample
import train
from tinyldm import InputError, cli, images
from tinyldm import run as running
from tinyldm.formats.embeddings import load_embeddings
from tinyldm.latent_diffusion import Defaults
from tinyldm.optimizers import Adam
from tinyldm.recipes import AtTheEnd, Word
from tinyldm.run import Run
from tinyldm.tokenizer import Tokenizer

TYPED = ["--images", "pictures", "--token", "S*"]


@pytest.fixture(autouse=True)
def in_an_empty_folder_with_one_picture_a_preview(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "PREVIEW_SEEDS", range(1))


def new_run(*more: str) -> Run:
    """As train.py makes it for a word of two vectors; four steps, of which every second is shown and saved."""
    options = train.parse_options([*TYPED, "--steps", "4", "--preview-every", "2", *more])
    train.fill_in_defaults(options, Defaults(size=16, save_every=2))
    options.out = options.out or train.folder_for(options.token)
    word = a_word(torch.full((2, 4), 0.5).requires_grad_())
    optimizer = Adam(word.vectors, 1.0, options.lr)
    start, stop = torch.full((2, 4), 0.25), AtTheEnd(None, options.steps)
    return Run(options, "0" * 64, [plain("grey")], [["a photo of S*"]], word, start, optimizer, stop)


def a_word(vectors: Tensor) -> Word:
    return Word(SimpleNamespace(tokenizer=Tokenizer([])), "S*", vectors, pictures=1)


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


@pytest.mark.parametrize(("steps", "expected"), [(30, [0, 3, 10, 30]), (150, [0, 15, 50, 150]), (2, [0, 2])])
def test_when_the_options_do_not_say_previews_come_where_most_changes(monkeypatch, steps, expected):
    run, shown = new_run("--steps", str(steps)), []
    run.options.preview_every = None
    monkeypatch.setattr(run, "preview", lambda model: shown.append(run.done))
    run.start([plain("grey")])
    for _ in run.steps(model=None):
        take_steps(run, 1)
    assert shown == expected


def test_a_preview_takes_half_of_the_samplers_steps_and_the_runs_size():
    asked = []
    model = SimpleNamespace(
        defaults=Defaults(sampler_steps=25),
        generate=lambda prompts, seeds, **options: asked.append(options) or iter([torch.zeros(1, 4, 2, 2)]),
        decode=lambda z_0: torch.zeros(1, 3, 16, 16),
    )
    run = new_run()
    run.start([plain("grey")])
    run.preview(model)
    assert [asked[0][name] for name in ("steps", "height", "width")] == [13, 16, 16]
    assert asked[0]["words"].keys() == {"S*"}


# ---- The log and what is resumed


def test_steps_logged_after_the_last_save_are_dropped_and_taken_again():
    killed = killed_after_its_last_save()
    assert steps_logged(killed) == [1, 2, 3, 4]
    whole = (killed.folder / "loss.csv").read_bytes()
    saved = load_embeddings(killed.folder / "embedding.safetensors")["S*"]
    run = resumed_run()
    assert run.done == 2 and steps_logged(run) == [1, 2]
    assert torch.equal(run.vectors, saved) and not torch.equal(run.vectors, killed.vectors)
    take_steps(run, 2)
    assert (run.folder / "loss.csv").read_bytes() == whole
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


LOG = "step,loss,norm\n1,1.000000,0.5025\n2,0.500000,0.5049\n"
COMMAS = LOG.replace(",", ";").replace(".", ",")  # as where 0.5 is written 0,5


@pytest.mark.parametrize(
    "content",
    [
        LOG.encode("utf-8-sig").replace(b"\n", b"\r\n"),
        COMMAS.encode(),
        COMMAS.replace(";", "\t").encode("utf-16"),
        LOG.replace("1,1.000000", '"1","1.000000"').replace("0.500000", "5E-01").encode(),
        LOG.replace("1.000000", "1").encode(),  # a spreadsheet keeps no zeros
        f"a note\n,,\n{LOG}3,0.33".encode(),
    ],
    ids=["CRLF", "semicolons", "UTF-16", "quoted", "zeros", "torn"],
)
def test_a_log_that_a_spreadsheet_wrote_anew_is_put_right(content):
    run = killed_after_its_last_save()
    (run.folder / "loss.csv").write_bytes(content)
    assert (resumed_run().folder / "loss.csv").read_bytes() == LOG.encode()


@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\x00,;\n" * 99, LOG.encode()[:30], b"9" * 10_000 + LOG.encode()[29:]]
)
def test_a_damaged_log_stops_no_run(content):
    run = killed_after_its_last_save()
    log = run.folder / "loss.csv"
    log.unlink() if content is None else log.write_bytes(content)
    with pytest.warns(UserWarning, match="of 2 steps"):
        assert resumed_run().done == 2
    assert log.read_text().startswith("step,loss,norm\n")


def test_damaged_previews_stop_no_run():
    run = killed_after_its_last_save()
    (run.folder / "previews" / "000000.png").write_text("no picture")
    (run.folder / "previews" / "0 (copy).png").touch()
    assert len(resumed_run().previews) == 2
    for file in (run.folder / "previews").iterdir():
        file.unlink()
    (run.folder / "previews").rmdir()
    resumed_run().add_preview("000002", plain("red"))


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
NO_JSON = [
    None,
    b"",
    b"step,loss",
    b"\xff" * 100,
    "{}".encode("utf-16"),
    DEEP,
    b"[" * 100_000,
    b"[]",
    b"{}",
    b"0",
    b'"a"',
]


@pytest.mark.parametrize("content", NO_JSON)
@pytest.mark.parametrize("name", ["settings.json", "resume.safetensors"])
def test_of_a_damaged_folder_one_file_is_named_and_nothing_is_changed(name, content):
    run = killed_after_its_last_save()
    file = run.folder / name
    file.unlink() if content is None else file.write_bytes(content)
    assert_refused(rf"can't resume from outputs/S/{name} \(.*; to start anew, leave out --resume and choose a new")
    new_run("--out", "new").start([plain("grey")])  # that advice


def assert_refused(message: str) -> None:
    files = {file: file.read_bytes() for file in Path("outputs").rglob("*") if file.is_file()}
    with pytest.raises(InputError, match=message):
        resumed_run()
    assert files == {file: file.read_bytes() for file in Path("outputs").rglob("*") if file.is_file()}


def change_state(run: Run, **changes: Tensor | None) -> None:
    file = run.folder / "resume.safetensors"
    state = load_file(file) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


@pytest.mark.parametrize("name", ["vectors", "exp_avg", "exp_avg_sq", "generator", "done"])
@pytest.mark.parametrize("tensor", [None, torch.zeros(0), torch.zeros(2, 4).half(), torch.full((2, 4), math.nan)])
def test_a_state_that_lacks_something_or_has_another_shape_is_refused(name, tensor):
    change_state(killed_after_its_last_save(), **{name: tensor})
    assert_refused(rf"can't resume from .*resume.safetensors \({name} is missing or damaged")


@pytest.mark.parametrize("tensor", [None, torch.zeros(3).half(), torch.full((3,), math.nan).double()])
def test_a_state_without_the_losses_that_were_watched_is_refused(tensor):
    """There may be any number of them."""
    change_state(killed_after_its_last_save(), watched=tensor)
    assert_refused(r"can't resume from .*resume.safetensors \(watched is missing or damaged")


def test_a_state_with_impossible_numbers_is_refused():
    run = killed_after_its_last_save()
    generator = load_file(run.folder / "resume.safetensors")["generator"]
    change_state(run, generator=torch.full((5056,), 255, dtype=torch.uint8))
    assert_refused("can't resume from .*resume.safetensors")
    for done in (-1, 10**12):
        change_state(run, generator=generator, done=torch.tensor(done))
        assert_refused(rf"resume.safetensors .done is {done}")


@pytest.mark.parametrize("name", ["settings.json", "resume.safetensors"])
def test_a_pipe_in_a_run_is_refused_and_not_waited_for(name):
    run = killed_after_its_last_save()
    (run.folder / name).unlink()
    os.mkfifo(run.folder / name)
    assert_refused(f"{name} is a pipe or a device")


def change_settings(run: Run, **changes: object) -> None:
    settings = json.loads((run.folder / "settings.json").read_text()) | changes
    (run.folder / "settings.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def test_settings_that_lack_something_or_are_others_are_refused():
    run = killed_after_its_last_save()
    change_settings(run, seed=...)
    assert_refused(r"can't resume from outputs/S/settings.json \(seed is missing\)")
    change_settings(run, seed="x" * 5000)
    assert_refused("has seed x{100}, not 0; give the same options and files again")


@pytest.mark.parametrize("what", ["weights", "pictures", "templates"])
def test_a_run_that_began_with_others_is_refused(what):
    change_settings(killed_after_its_last_save(), **{f"{what}_sha256": "1" * 64})
    assert_refused(f"the {what} are not those that the run in outputs/S began with; put them back as they were; to")


def test_what_the_digests_are_of():
    word = a_word(torch.zeros(1, 4))

    def digests(colour: str, caption: str) -> list[str]:
        settings = Run(new_run().options, "0" * 64, [plain(colour)], [[caption]], word, None, None, None).settings
        return [settings["pictures_sha256"], settings["templates_sha256"]]

    pictures, templates = digests("grey", "a S*")
    assert digests("grey", "a S*") == [pictures, templates]
    assert digests("red", "a S*")[0] != pictures and digests("red", "a S*")[1] == templates
    assert digests("grey", "the S*")[0] == pictures and digests("grey", "the S*")[1] != templates


def test_a_run_that_goes_on_elsewhere_is_not_resumed():
    run = killed_after_its_last_save()
    with locked_elsewhere(run.folder):
        assert_refused("another run is writing into outputs/S; wait for its end")
    assert resumed_run().done == 2


def test_a_loss_that_is_nan_in_the_first_step_after_a_resume_costs_nothing():
    saved = killed_after_its_last_save().folder / "embedding.safetensors"
    before = load_embeddings(saved)["S*"]
    run = resumed_run()
    with pytest.raises(InputError, match="the loss became nan"):
        run.log(torch.tensor(math.nan))
    assert torch.equal(load_embeddings(saved)["S*"], before)


def test_vectors_that_overflow_in_a_step_are_not_kept():
    """Its loss was still finite: the step after it would only find out."""
    saved = killed_after_its_last_save().folder / "embedding.safetensors"
    before = load_embeddings(saved)["S*"]
    run = resumed_run()
    run.vectors.data.fill_(math.inf)
    with pytest.raises(InputError, match=r"the loss became 1.0 and the norm inf at step \d+, .* are kept in"):
        run.log(torch.tensor(1.0))
    assert torch.equal(load_embeddings(saved)["S*"], before)


# ---- Signals


@pytest.mark.parametrize("number", cli.STOP_SIGNALS)
def test_a_signal_to_stop_saves_the_step_that_it_comes_in(monkeypatch, number):
    run = new_run()
    monkeypatch.setattr(run, "preview", lambda model: None)
    run.start([plain("grey")])
    for step in run.steps(model=None):
        if step == 2:
            os.kill(os.getpid(), number)
        take_steps(run, 1)
    assert run.status == 128 + number
    assert resumed_run().done == 3


def test_a_signal_in_the_last_step_comes_too_late_to_stop_it(monkeypatch):
    run = new_run()
    monkeypatch.setattr(run, "preview", lambda model: None)
    run.start([plain("grey")])
    for step in run.steps(model=None):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        take_steps(run, 1)
    assert (run.done, run.status) == (4, 0)


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
        typed += ["--preview-every=2"]
        typed += [f"--out={folder}"] * out_is_given
        runs.append(new_run(*typed))
        for runs[-1].done in (3, 4):
            commands.append(runs[-1].what_next(typed).split("\n", 1)[1])
    found = iter(shell_words(commands))
    for token, run in zip(NASTY, runs, strict=True):
        script, *words = next(found)
        options = train.parse_options(words)
        train.fill_in_defaults(options, Defaults(size=16, save_every=2))
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
