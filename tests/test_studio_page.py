"""What the page's buttons do, without a browser: which commands they begin, and what they refuse."""

import re
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT, WEIGHTS
from helpers.public import autoencoder_file, single_file, write_merges
from PIL import Image, UnidentifiedImageError
from safetensors.torch import save_file

import sample
import train
from tinyldm import InputError
from tinyldm.formats.checkpoint import open_checkpoint
from tinyldm.formats.embedding_layouts import FORMATS
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.images import read_image, read_images, save_image
from tinyldm.studio.commands import OUTPUTS, Commands
from tinyldm.studio.page import Page, converted, launch, opened, stroke_of


class Noted(Commands):
    """Commands that are written down and not run."""

    def __init__(self):
        super().__init__()
        self.queues = dict.fromkeys(self.queues, self)

    def submit(self, _: object, folder: Path, command: list) -> Future:
        self.last = folder, command[1].name, command[2:]
        return Future()


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    return Page(Noted(), open_checkpoint(WEIGHTS), {"weights": WEIGHTS, "vae": None, "seed": 3})


def options_of(page: Page) -> object:
    """What the script that would have run makes of its words."""
    _, script, arguments = page.commands.last
    return {"train.py": train, "sample.py": sample}[script].parse_options(arguments)


def editor(*strokes: tuple[int, int, int, int], size: int = 512) -> dict:
    """What the widget gives: a layer with these boxes painted, and all of it together."""
    layer = np.zeros((size, size, 4), np.uint8)
    for left, top, right, bottom in strokes:
        layer[top:bottom, left:right] = (200, 50, 50, 255)
    image = Image.fromarray(layer)
    return {"background": None, "layers": [image], "composite": image}


def learned(name: str, word: str, value: float = 0.01) -> Path:
    folder = OUTPUTS / name
    folder.mkdir(parents=True)
    save_embeddings(folder / "embedding.safetensors", {word: torch.full((1, 128), value)})
    return folder


# ---- Learn


def test_learn_keeps_the_uploads_as_png_and_learns_from_them(page, tmp_path):
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "photo.jpg")
    menu = page.learn(
        [str(tmp_path / "photo.jpg"), str(EXAMPLES / "bolt" / "00.png")], None, "bolt", "S*", "style", "", 9
    )
    options = options_of(page)
    assert menu["value"] == "S" and page.commands.last[0] == OUTPUTS / "S"
    assert (options.token, options.property, options.steps, options.init) == ("S*", "style", 9, None)
    assert {image.size for _, image in read_images(options.images)} == {(40, 30), (256, 256)}
    assert options.weights == WEIGHTS and options.images.is_relative_to(OUTPUTS)


def test_learn_takes_a_folder_of_examples_unless_something_was_drawn(page):
    for untouched in (None, editor()):  # the widget gives nothing until it is first shown
        page.learn(None, untouched, "bolt", "<b>", "object", "yellow triangle", 0)
    options = options_of(page)
    assert (options.images, options.init, options.steps) == (Path("examples", "bolt"), "yellow triangle", None)
    page.learn(None, editor((0, 0, 256, 512)), "bolt", "<b>", "object", "", 0)
    ((_, drawing),) = read_images(options_of(page).images)
    assert drawing.getpixel((10, 10)) == (200, 50, 50) and drawing.getpixel((500, 10)) == (255, 255, 255)
    assert page.commands.last[0] == OUTPUTS / "b-3"


def test_an_upload_that_is_no_picture_is_one_line_with_its_name_and_begins_nothing(page, tmp_path):
    broken = tmp_path / "gradio" / "0123abc" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    line = r"^.broken\.png can't be read as a picture .*: save it again as PNG or JPEG.$"
    with pytest.raises(gr.Error, match=line) as shown:
        page.learn([str(broken)], None, "bolt", "S*", "object", "", 0)
    assert not shown.value.print_exception  # the terminal shows no traceback
    assert not page.commands.begun and not OUTPUTS.exists()


# ---- Make


def test_make_gives_sample_py_its_settings_and_the_words_that_the_prompt_holds(page):
    learned("S", "S*"), learned("H", "H*")
    assert page.make("a photo of S*", 5, 3, 12, 4.5, "ddim")["value"] == "samples"
    options = options_of(page)
    assert (options.prompt, options.seed, options.num, options.steps) == (["a photo of S*"], 5, 3, 12)
    assert (options.guidance, options.sampler) == (4.5, "ddim") and options.attention and options.show_steps
    assert options.embedding == ["outputs/S/embedding.safetensors:S*"]
    for prompt, name in (("two S*s, an XH*", "S"), ("an XS*, an H*", "H")):  # as the tokenizer finds them
        page.make(prompt, 5, 3, 12, 4.5, "ddim")
        assert options_of(page).embedding == [f"outputs/{name}/embedding.safetensors:{name}*"]


def test_a_prompt_that_looks_like_an_option_is_a_prompt(page):
    page.make("--help", 0, 1, 5, 4.5, "ddim")
    assert options_of(page).prompt == ["--help"]


def test_words_of_another_tool_become_words_of_the_page(page, tmp_path):
    save_embeddings(tmp_path / "my-circle.pt", {"my-circle": torch.ones(2, 128)}, "a1111")
    buttons, start, end = page.take_words([str(tmp_path / "my-circle.pt")])
    assert buttons["samples"] == [["my-circle"]] and start["choices"] == end["choices"] == ["my-circle"]
    assert load_embeddings(OUTPUTS / "my-circle" / "embedding.safetensors")["my-circle"].shape == (2, 128)


def test_a_word_that_the_checkpoint_knows_already_is_refused(page, tmp_path):
    save_embeddings(tmp_path / "star.pt", {"star": torch.ones(1, 128)}, "a1111")
    with pytest.raises(InputError, match='"star" is already a word'):
        page.take_words([str(tmp_path / "star.pt")])
    assert not OUTPUTS.exists()


def test_words_that_would_run_code_are_refused(page, tmp_path):
    torch.save({"S*": Path("anything")}, tmp_path / "evil.pt")
    with pytest.raises(gr.Error, match="could run code"):
        page.take_words([str(tmp_path / "evil.pt")])
    assert not OUTPUTS.exists()


def test_a_picture_tells_what_it_was_made_with_and_is_made_again_and_varied(page):
    (OUTPUTS / "samples").mkdir(parents=True)
    text = "a photo of Seed: 3\nSteps: 25, Sampler: ddim, CFG scale: 4.5, Seed: 41, Size: 64x64, Model: tiny"
    for name in ("0000", "0001", "0001-attention", "0001-steps", "0002-steps"):
        save_image(Image.new("RGB", (64, 64)), OUTPUTS / "samples" / f"{name}.png", {"parameters": text})
    file, _, sheets, made_with = page.choose("samples", gr.SelectData(None, {"index": 1, "value": None}))
    assert file == OUTPUTS / "samples" / "0001.png"
    assert sheets == [OUTPUTS / "samples" / f"0001-{what}.png" for what in ("steps", "attention")]
    assert made_with == text and page.again(text) == ["a photo of Seed: 3", 41, 1, 25, 4.5, "ddim"]
    page.vary(file, made_with)
    options = options_of(page)
    assert (options.init_image, options.seed, options.num, options.strength) == (file, 42, 4, 0.6)


# ---- Edit


def test_what_was_painted_over_becomes_the_mask(page):
    image = read_image(EXAMPLES / "bolt" / "00.png").resize((64, 64))
    image.save("picture.png")
    next(page.change(editor((0, 256, 512, 512)), [Path("picture.png")], "a star", 0.7, 3))
    options = options_of(page)
    mask = np.asarray(read_image(options.mask).convert("L"))
    assert mask.shape == (64, 64) and (mask[32:] == 255).all() and (mask[:32] == 0).all()
    assert (options.init_image, options.strength, options.seed) == (Path("picture.png"), 0.7, 3)
    assert options.keep_pixels and options.prompt == ["a star"]


def test_without_a_stroke_all_of_the_picture_may_change(page):
    Image.new("RGB", (64, 64)).save("picture.png")
    next(page.change(editor(), [Path("picture.png")], "a star", 0.7, 3))
    assert options_of(page).mask is None


def test_a_change_that_ends_without_a_picture_leaves_the_stroke(page):
    Image.new("RGB", (64, 64)).save("picture.png")
    change = page.change(editor((0, 0, 512, 512)), [Path("picture.png")], "", 1, 3)
    next(change)
    page.commands.begun[page.commands.last[0]].set_result(None)
    assert next(change) == [gr.skip()] * 5


def test_without_a_picture_nothing_is_changed(page):
    with pytest.raises(InputError, match="no picture is open"):
        next(page.change(editor(), [], "a star", 1, 0))


def test_the_editor_shows_the_last_version_large_enough_to_paint_on(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{name}.png")
    versions = [tmp_path / "a.png", tmp_path / "b.png"]
    same, shown, before, after = opened(versions)
    assert same == versions and shown["background"].size == (512, 384)
    assert [image.getpixel((0, 0)) for image in (before, after)] == [(255, 0, 0), (0, 0, 255)]
    assert opened(versions[:1])[2] is None and opened([])[3] is None


def test_an_editor_without_a_stroke_has_none():
    assert stroke_of(None) is None and stroke_of(editor()) is None and stroke_of({"layers": []}) is None


# ---- Look inside, and folders


def test_a_word_is_told_with_its_norm_and_nearest_words_at_each_save(page):
    folder = learned("S", "S*", 0.1)
    save_embeddings(folder / "embedding-000100.safetensors", {"S*": torch.full((1, 128), 0.05)})
    text, name = page.look("S*")
    assert name == "S" and re.findall(r"norm ([\d.]+)", text) == ["0.566", "1.131"] and text.count("nearest") == 2


def test_words_are_told_of_a_checkpoint_whose_autoencoder_is_in_another_file(page, tmp_path):
    without = {name: tensor for name, tensor in single_file("1.x").items() if not name.startswith("first_stage_model.")}
    save_file(without, tmp_path / "model.safetensors")
    save_file(autoencoder_file("1.x"), tmp_path / "vae.safetensors")
    write_merges(tmp_path)
    learned("S", "S*")
    page.checkpoint = open_checkpoint(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors")
    assert "nearest" in page.look("S*")[0]


def test_from_one_word_to_another_gives_both_to_sample_py(page):
    learned("S", "S*"), learned("H", "H*")
    page.between("S*", "H*", "a photo of {}", 2)
    options = options_of(page)
    assert (options.interpolate, options.prompt, options.num) == (["S*", "H*"], ["a photo of S*"], 8)
    assert len(options.embedding) == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_word_is_handed_out_in_every_format(page, to):
    file = converted(learned("my-star", "S*"), to)
    (vectors,) = load_embeddings(f"{file}:my-star").values()
    assert vectors.shape == (1, 128) and file.name == f"my-star{FORMATS[to].suffix}"
    assert [each.name for each in (OUTPUTS / "my-star").iterdir()] == [
        "embedding.safetensors"
    ]  # and its age is the same


def test_a_run_is_shown_with_its_curves(page):
    folder = learned("S", "S*")
    (folder / "loss.csv").write_text("step,loss,norm\n")  # as a run begins
    assert page.view("S", "kohya")[6] is None  # the widget would take its axis for one of names
    (folder / "loss.csv").write_text("step,loss,norm\n1,0.4,1.0\n2,0.2,1.2\n")
    said, stop, go_on, clock, word, preview, loss, _, download, gallery = page.view("S", "kohya")
    assert loss["step"].tolist() == [1, 2] and loss["loss"].tolist() == pytest.approx([0.4, 0.3])
    assert word["visible"] and not gallery["visible"] and preview is None and download.parent.name == "kohya"
    assert not stop["interactive"] and not go_on["interactive"] and not clock.active and said == ""


def test_a_command_that_ended_with_an_error_and_left_no_folder_still_says_so(page):
    OUTPUTS.mkdir()
    page.commands.begun[OUTPUTS / "circle"] = Future()
    page.commands.begun[OUTPUTS / "circle"].set_result(None)
    (OUTPUTS / ".circle.log").write_text('train.py: error: the token "circle" is already a word\n')
    said, stop, go_on, clock, *_ = page.view("circle", "diffusers")
    assert said == 'train.py: error: the token "circle" is already a word'
    assert not stop["interactive"] and not go_on["interactive"] and not clock.active


def test_a_damaged_word_is_shown_without_its_file(page):
    (learned("S", "S*") / "embedding.safetensors").write_bytes(b"nothing")
    shown = page.view("S", "diffusers")
    assert shown[4]["visible"] and shown[8] is None


def test_a_name_that_is_no_folder_of_ours_shows_nothing(page, tmp_path):
    save_image(Image.new("RGB", (8, 8)), tmp_path / "0000.png")
    learned("S", "S*")
    for name in (None, "..", "../..", "/", "nothing"):
        *_, word, preview, loss, _, download, gallery = page.view(name, "diffusers")
        assert not word["visible"] and not gallery["visible"] and (preview, loss, download) == (None, None, None)


def test_the_page_is_launched_for_this_computer_alone_and_its_widgets_read_plain_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "ID", [*Image.ID])  # as gradio's import left it: all that Pillow knows
    told = {}
    page = SimpleNamespace(queue=lambda **_: page, launch=lambda **options: told.update(options))
    launch(page, "127.0.0.1", 7)
    assert (told["server_name"], told["server_port"], told["share"]) == ("127.0.0.1", 7, False)
    assert told["max_file_size"] and not told["run_history"]
    (middleware,) = told["app_kwargs"]["middleware"]
    assert middleware.kwargs == {"allowed_hosts": ["127.0.0.1", "localhost"]}
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(UnidentifiedImageError):
        Image.open(tmp_path / "a.png")
    for name in ("b.png", "b.jpg", "b.webp", "b.gif", "b.avif"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
        assert Image.open(tmp_path / name).size == (8, 8)


def test_a_host_that_gradio_makes_no_address_of_is_refused():
    with pytest.raises(InputError, match="--host is ::1, expected a name or an IPv4 address"):
        launch(None, "::1", 7)


def test_without_gradio_or_with_no_such_weights_the_command_ends_with_one_line(run, monkeypatch):
    assert "no checkpoint at nowhere" in run("tinyldm.studio", "--weights", "nowhere").error
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "tinyldm.studio.page")
    assert run("tinyldm.studio", "--weights", WEIGHTS).error.endswith('pip install -e ".[studio]"')


def test_nothing_else_imports_the_page():
    for file in [ROOT / "train.py", ROOT / "sample.py", *(ROOT / "tinyldm").rglob("*.py")]:
        if file.parent.name != "studio":
            assert "tinyldm.studio" not in file.read_text(encoding="utf-8"), file
