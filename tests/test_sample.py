"""sample.py from end to end on the tiny checkpoint, and every mistake a user can make with it."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import WEIGHTS, largest_file
from PIL import Image
from safetensors.torch import save_file

import sample
from tinyldm.formats.embeddings import load_embeddings, save_embeddings
from tinyldm.images import fitted, to_images, to_tensor
from tinyldm.lab.measure.questions import true_pictures
from tinyldm.lab.world.things import Thing
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.sampler import SAMPLERS, denoiser

PROMPT = "a photo of a red circle on a blue background"
FEW = ("--steps", 3)
TRAINED = ("--weights", WEIGHTS)  # for what an untrained model does not do


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def a_word(path, token="S*", like="star", width=None):
    from tinyldm.formats.checkpoint import load_checkpoint

    model = load_checkpoint(WEIGHTS)
    row = model.text_encoder.table[model.tokenizer.encode(like)]
    save_embeddings(path, {token: row if width is None else torch.zeros(1, width)})
    return path


def test_pictures_are_numbered_and_carry_their_prompt_and_settings(run, tmp_path):
    outcome = run("sample.py", "--prompt", PROMPT, "--num", 2, *FEW, "--seed", 7, "--negative", "green", *TRAINED)
    assert outcome.status == 0
    folder = tmp_path / "outputs" / "samples"
    assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0001.png", "sheet.png"]
    picture = Image.open(folder / "0001.png")
    assert picture.size == (64, 64)
    text = picture.text["parameters"]
    assert text.startswith(f"{PROMPT}\nNegative prompt: green\n")
    assert "Steps: 3" in text and "Seed: 8" in text and "Size: 64x64" in text and "Model: tiny" in text


def test_a_long_row_goes_on_below_and_a_large_sheet_is_made_of_smaller_pictures(run, quick, tmp_path, monkeypatch):
    command = ("sample.py", "--weights", quick, "--prompt", "a star", "--prompt", "a lemon", "--num", 18, "--steps", 1)
    assert run(*command, "--out", tmp_path / "a").status == 0
    sheet = Image.open(tmp_path / "a" / "sheet.png")
    assert sheet.width == 16 * 132 + 4 and sheet.height == 4 * (132 + 20) + 4  # of pictures of 64, twice as large
    monkeypatch.setattr(sample, "SHEET_PIXELS", 20_000)
    assert run(*command, "--out", tmp_path / "b").status == 0
    assert (kept := pixels(tmp_path / "b" / "0035.png")).shape == (64, 64, 3)
    assert np.array_equal(kept, pixels(tmp_path / "a" / "0035.png"))
    with Image.open(tmp_path / "b" / "sheet.png") as small:  # 8 pixels a picture, the least, and some for the labels
        assert small.width == 16 * 12 + 4 and small.height == 4 * (12 + 20) + 4
    monkeypatch.setattr(sample, "SHEET_PIXELS", 100_000)
    assert run(*command, "--out", tmp_path / "c").status == 0
    with Image.open(tmp_path / "c" / "sheet.png") as small:
        assert 20_000 < small.width * small.height <= 110_000


def test_the_models_name_is_that_of_its_folder_or_file(run, quick, tmp_path):
    shutil.copytree(quick, tmp_path / "model-2.1")
    outcome = run("sample.py", "--weights", tmp_path / "model-2.1", "--prompt", "a", "--steps", 1, "--out", "o")
    assert outcome.status == 0 and "Model: model-2.1" in Image.open("o/0000.png").text["parameters"]
    shutil.copy(quick / "merges.txt", tmp_path)
    (tmp_path / "linked.safetensors").symlink_to(quick / "model.safetensors")  # as Hugging Face's cache has them
    outcome = run("sample.py", "--weights", "linked.safetensors", "--prompt", "a", "--steps", 1, "--out", "p")
    assert outcome.status == 0 and "Model: linked" in Image.open("p/0000.png").text["parameters"]


def test_a_picture_starts_from_the_documented_noise(tiny, run, tmp_path):
    run(
        "sample.py",
        "--prompt",
        PROMPT,
        *FEW,
        *TRAINED,
        "--seed",
        5,
        "--sampler",
        "ddim",
        "--guidance",
        2,
        "--out",
        tmp_path / "o",
    )
    z = torch.randn((1, 12, 8, 8), generator=torch.Generator().manual_seed(5))
    context = tiny.context([PROMPT, ""])

    def guided(z, t):
        with torch.no_grad():
            conditional, unconditional = tiny.unet(torch.cat([z, z]), torch.cat([t, t]), context).chunk(2)
        return unconditional + 2 * (conditional - unconditional)

    *_, z = SAMPLERS["ddim"](denoiser(guided, tiny.schedule), z, tiny.schedule, 3, [torch.Generator()])
    with torch.no_grad():
        expected = np.asarray(to_images(tiny.decode(z))[0]).astype(int)
    assert np.abs(pixels(tmp_path / "o" / "0000.png") - expected).max() <= 1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_picture_does_not_depend_on_its_neighbours(run, quick, tmp_path, sampler):
    few = ("--steps", 4, "--sampler", sampler, "--weights", quick)
    run("sample.py", "--prompt", PROMPT, "--num", 6, *few, "--out", tmp_path / "many")
    run("sample.py", "--prompt", PROMPT, "--num", 1, *few, "--seed", 5, "--out", tmp_path / "one")
    first, last, alone = (pixels(tmp_path / name) for name in ("many/0000.png", "many/0005.png", "one/0000.png"))
    assert np.abs(last - alone).max() <= 1 < np.abs(last - first).max()


@pytest.mark.parametrize(("latents", "pictures"), [(8, 12), (32, 12), (48, 7), (64, 4), (128, 4)])
def test_of_small_pictures_more_are_made_at_a_time(latents, pictures):
    assert sample.at_a_time(latents, latents) == pictures


def test_the_pictures_of_several_batches_are_in_their_order_with_their_own_prompts(run, tmp_path):
    few = ("--steps", 2, *TRAINED)
    both = ("--prompt", "a green star", "--prompt", "two lemons", "--num", 7)
    assert run("sample.py", *both, *few, "--out", tmp_path / "many").out.startswith("14 pictures")

    def difference(number, prompt):  # from the picture made alone
        folder = tmp_path / f"{number} {prompt}"
        run("sample.py", "--prompt", prompt, "--seed", number, *few, "--out", folder)
        return np.abs(pixels(tmp_path / "many" / f"{number:04d}.png") - pixels(folder / "0000.png")).max()

    assert difference(6, "a green star") <= 1 < difference(6, "two lemons")
    assert difference(7, "two lemons") <= 1
    assert difference(13, "two lemons") <= 1  # in the second batch
    with Image.open(tmp_path / "many" / "0013.png") as last:
        assert last.text["parameters"].startswith("two lemons\n") and "Seed: 13," in last.text["parameters"]


def test_several_prompts_and_a_file_of_prompts(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a green star\n\ntwo lemons\n")
    outcome = run("sample.py", "--prompt", PROMPT, "--prompts", tmp_path / "prompts.txt", *FEW)
    assert outcome.status == 0 and outcome.out.startswith("3 pictures")
    folder = tmp_path / "outputs" / "samples"
    prompts = [Image.open(folder / f"000{i}.png").text["parameters"].splitlines()[0] for i in range(3)]
    assert prompts == [PROMPT, "a green star", "two lemons"]


def test_height_and_width_are_the_pictures(run, tmp_path):
    assert run("sample.py", "--prompt", PROMPT, *FEW, "--height", 96, "--width", 64).status == 0
    assert Image.open(tmp_path / "outputs" / "samples" / "0000.png").size == (64, 96)


def test_a_learned_copy_of_a_word_gives_that_words_picture(run, tmp_path):
    file = a_word(tmp_path / "star.safetensors", "S*", "star")
    run("sample.py", "--prompt", "a photo of a S*", "--embedding", file, *FEW, "--out", tmp_path / "new")
    run("sample.py", "--prompt", "a photo of a star", *FEW, "--out", tmp_path / "old")
    assert np.abs(pixels(tmp_path / "new" / "0000.png") - pixels(tmp_path / "old" / "0000.png")).max() <= 1


def test_an_embedding_of_another_tool_under_a_word_of_ones_own(run, tmp_path):
    (words,) = load_embeddings(a_word(tmp_path / "star.safetensors", "S*", "star")).values()
    save_embeddings(tmp_path / "a1111.pt", {"star-500": words}, "a1111")
    few = ("--prompt", "a photo of a my*", *FEW)
    assert run("sample.py", *few, "--embedding", "a1111.pt:my*", "--out", tmp_path / "new").status == 0
    run("sample.py", "--prompt", "a photo of a star", *FEW, "--out", tmp_path / "old")
    assert np.abs(pixels(tmp_path / "new" / "0000.png") - pixels(tmp_path / "old" / "0000.png")).max() <= 1


def test_several_embeddings_compose(run, tmp_path):
    star, lemon = a_word(tmp_path / "a.safetensors", "S*", "star"), a_word(tmp_path / "b.safetensors", "<l>", "lemon")
    prompt = "a photo of a {} next to a {}"
    run(
        "sample.py", "--prompt", prompt.format("S*", "<l>"), "--embedding", star, lemon, *FEW, "--out", tmp_path / "new"
    )
    run("sample.py", "--prompt", prompt.format("star", "lemon"), *FEW, "--out", tmp_path / "old")
    assert np.abs(pixels(tmp_path / "new" / "0000.png") - pixels(tmp_path / "old" / "0000.png")).max() <= 1


def test_guidance_0_is_the_model_without_the_prompt_and_1_without_the_negative_one(run, tmp_path):
    for prompt, guidance in ((PROMPT, 0), ("a photo of a lemon", 0), (PROMPT, 1), ("", 1)):
        words = ("--negative", "") if guidance == 0 else ("--negative", "green")
        outcome = run(
            *("sample.py", "--prompt", prompt, *FEW, "--guidance", guidance, *words),
            *("--out", tmp_path / f"{guidance} {prompt}"),
        )
        assert outcome.status == 0 and ("--guidance 1 leaves --negative out" in outcome.err) == (guidance == 1)
    one, other, plain, empty = (
        pixels(tmp_path / name / "0000.png") for name in (f"0 {PROMPT}", "0 a photo of a lemon", f"1 {PROMPT}", "1 ")
    )
    assert np.abs(one - other).max() <= 1 and np.abs(one - empty).max() <= 1 and np.abs(one - plain).mean() > 1


def test_an_embedding_no_prompt_uses_is_pointed_out(run, tmp_path):
    outcome = run("sample.py", "--prompt", PROMPT, "--embedding", a_word(tmp_path / "a.safetensors"), *FEW)
    assert outcome.status == 0 and "no prompt uses S*" in outcome.err
    a_word(tmp_path / "cat.safetensors", "my-cat")
    outcome = run("sample.py", "--prompt", "a photo of my-cats", "--embedding", "cat.safetensors", *FEW)
    assert "no prompt uses my-cat" in outcome.err  # a word is no part of a longer one


def test_a_word_in_the_negative_prompt_is_used(run, tmp_path):
    file = a_word(tmp_path / "EasyNegative.safetensors", "EasyNegative")
    plain = ("--prompt", PROMPT, *FEW)
    words = ("--negative", "EasyNegative, blurry", "--embedding", file)
    outcome = run("sample.py", *plain, *words, "--out", tmp_path / "new")
    assert outcome.status == 0 and outcome.err == ""
    run("sample.py", *plain, "--negative", "star, blurry", "--out", tmp_path / "old")
    assert np.abs(pixels(tmp_path / "new" / "0000.png") - pixels(tmp_path / "old" / "0000.png")).max() <= 1


def test_a_word_with_spaces_is_the_name_of_its_file(run, tmp_path):
    (vectors,) = load_embeddings(a_word(tmp_path / "star.safetensors")).values()
    save_embeddings(tmp_path / "my circle.pt", {"my circle": vectors}, "a1111")
    outcome = run(
        "sample.py",
        "--prompt",
        "a photo of a my circle",
        "--embedding",
        "my circle.pt",
        *FEW,
        "--out",
        tmp_path / "new",
    )
    assert outcome.status == 0 and outcome.err == ""
    run("sample.py", "--prompt", "a photo of a star", *FEW, "--out", tmp_path / "old")
    assert np.abs(pixels(tmp_path / "new" / "0000.png") - pixels(tmp_path / "old" / "0000.png")).max() <= 1


def test_the_tiny_checkpoint_obeys_a_prompt(run, tmp_path):
    from tinyldm.lab.measure.colours import background_colour, colours_right

    assert run("sample.py", "--prompt", PROMPT, "--num", 8, *TRAINED).status == 0
    pictures = [np.asarray(Image.open(tmp_path / "outputs" / "samples" / f"{i:04d}.png")) for i in range(8)]
    assert sum(colours_right(picture, ("red",)) for picture in pictures) >= 6
    assert sum(background_colour(picture) == "blue" for picture in pictures) >= 6


def interrupt_at(monkeypatch, calls, number=signal.SIGINT, times=1):
    """Ctrl-C, or another signal, comes in the so-manieth call of the UNet."""
    seen, predict = [], LatentDiffusion.predict

    def interrupted(self, *arguments):
        seen.append(None)
        for _ in range(times if len(seen) == calls else 0):
            os.kill(os.getpid(), number)
        return predict(self, *arguments)

    monkeypatch.setattr(LatentDiffusion, "predict", interrupted)


def test_an_interrupt_leaves_the_finished_batches_with_their_sheet(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "MOST", 4)
    interrupt_at(monkeypatch, 2 * 3 + 2)  # in the third batch of four
    outcome = run("sample.py", "--prompt", PROMPT, "--num", 10, *FEW)
    assert outcome.status == 130 and outcome.out.startswith("stopped: 8 of 10 pictures are in outputs/samples")
    folder = tmp_path / "outputs" / "samples"
    assert sorted(file.name for file in folder.iterdir()) == [*(f"000{i}.png" for i in range(8)), "sheet.png"]
    assert "Seed: 7" in Image.open(folder / "0007.png").text["parameters"]
    assert Image.open(folder / "sheet.png").width == 8 * 132 + 4


def test_an_interrupt_before_the_first_batch_is_done_leaves_no_sheet(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1)
    outcome = run("sample.py", "--prompt", PROMPT, "--num", 2, *FEW)
    assert outcome.status == 130 and outcome.out.startswith("stopped: 0 of 2 pictures")
    assert list((tmp_path / "outputs" / "samples").iterdir()) == []


def test_a_second_interrupt_is_one_line_and_leaves_the_finished_batches(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "MOST", 4)
    interrupt_at(monkeypatch, 3 + 1, times=2)
    outcome = run("sample.py", "--prompt", PROMPT, "--num", 5, *FEW)
    assert outcome.status == 130
    assert outcome.err.strip() == "sample.py: stopped by SIGINT; what was saved before is kept"
    assert sorted(file.name for file in (tmp_path / "outputs" / "samples").iterdir()) == [
        f"000{i}.png" for i in range(4)
    ]


def test_a_signal_to_end_is_as_an_interrupt_with_its_own_status(run, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1, number=signal.SIGTERM)
    outcome = run("sample.py", "--prompt", PROMPT, *FEW)
    assert outcome.status == 143 and outcome.out.startswith("stopped: 0 of 1 pictures")


def test_on_a_full_disk_the_pictures_that_fit_are_whole_and_the_error_names_the_next(run, tmp_path):
    with largest_file(12_000):  # the pictures fit, the sheet of all does not
        outcome = run("sample.py", "--prompt", PROMPT, "--num", 3, *FEW)
    assert "File too large: outputs/samples/sheet.png" in outcome.error
    folder = tmp_path / "outputs" / "samples"
    assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert [pixels(file).shape for file in folder.iterdir()] == [(64, 64, 3)] * 3


def test_a_batch_is_written_before_the_next_begins(run, tmp_path, monkeypatch):
    there, decode = [], LatentDiffusion.decode

    def noting_decode(self, z_0):
        there.append(len(list((tmp_path / "outputs" / "samples").glob("0*.png"))))
        return decode(self, z_0)

    monkeypatch.setattr(LatentDiffusion, "decode", noting_decode)
    monkeypatch.setattr(sample, "MOST", 4)
    assert run("sample.py", "--prompt", PROMPT, "--num", 9, *FEW).status == 0
    assert there == [0, 4, 8]


# ---- Beginning with a picture


@pytest.fixture
def world_picture(tmp_path):
    """A red circle, larger than the checkpoint's pictures and not square."""
    image = true_pictures(Thing("circle", "red"))[0].resize((96, 96), Image.Resampling.BICUBIC)
    image.crop((0, 8, 96, 88)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_picture_to_begin_with_is_kept_the_more_the_less_the_strength(run, tmp_path, world_picture):
    original = np.asarray(fitted(Image.open(world_picture), 64, 64)).astype(int)
    distances = []
    for strength in (0.1, 0.6):
        options = (
            "--init-image",
            world_picture,
            "--strength",
            strength,
            "--steps",
            10,
            "--out",
            tmp_path / f"{strength}",
            *TRAINED,
        )
        assert run("sample.py", "--prompt", "a photo of a green star on a white background", *options).status == 0
        file = tmp_path / f"{strength}" / "0000.png"
        assert f"Denoising strength: {strength:g}" in Image.open(file).text["parameters"]
        distances.append(np.abs(pixels(file) - original).mean())
    assert distances[0] < 12 and distances[1] > 2 * distances[0]


def test_only_what_the_mask_has_white_changes(tiny, run, tmp_path, world_picture):
    mask = Image.new("L", (96, 80))
    mask.paste(255, (48, 0, 96, 80))
    mask.save(tmp_path / "mask.png")
    options = ("--init-image", world_picture, "--mask", "mask.png", "--steps", 8, *TRAINED)
    prompt = "a photo of a green star on a white background"
    for more in ((), ("--keep-pixels",)):
        out = tmp_path / f"o{len(more)}"
        assert run("sample.py", "--prompt", prompt, *options, *more, "--show-steps", "--out", out).status == 0
    original = np.asarray(fitted(Image.open(world_picture), 64, 64)).astype(int)
    picture = to_tensor(Image.fromarray(original.astype(np.uint8)))
    decoded = np.asarray(to_images(tiny.decode(tiny.encode(picture)[0]))[0]).astype(int)
    for folder, outside in (("o0", decoded), ("o1", original)):
        edited = pixels(tmp_path / folder / "0000.png")
        assert np.array_equal(pixels(tmp_path / folder / "0000-steps.png")[4:132:2, -132:-4:2], edited)
        assert np.abs(edited - outside)[:, :29].max() <= 1 and np.abs(edited - outside)[:, 38:].mean() > 40


def test_attention_is_a_sheet_beside_each_picture(run, tmp_path):
    assert run("sample.py", "--prompt", "a red star", "--num", 2, *FEW, "--attention").status == 0
    folder = tmp_path / "outputs" / "samples"
    names = ["0000-attention.png", "0000.png", "0001-attention.png", "0001.png", "sheet.png"]
    assert sorted(file.name for file in folder.iterdir()) == names
    sheets = [Image.open(folder / f"000{i}-attention.png") for i in (0, 1)]
    assert sheets[0].size == (4 * 132 + 4, 152 + 4) and sheets[0].tobytes() != sheets[1].tobytes()


def test_the_steps_of_each_picture_are_a_strip_that_grows_and_ends_with_it(run, tmp_path, monkeypatch):
    lengths, save = [], sample.save_image

    def noting_save(image, path, *more):
        lengths.extend([image.width // 132] if path.name == "0001-steps.png" else [])
        save(image, path, *more)

    monkeypatch.setattr(sample, "save_image", noting_save)
    for steps, shown in ((3, 3), (12, 8)):
        folder = tmp_path / f"{steps}"
        few = ("--num", 2, "--steps", steps, "--out", folder)
        assert run("sample.py", "--prompt", "a red star", *few, "--show-steps").status == 0
        assert lengths == [*range(1, shown + 1)]
        lengths.clear()
        picture, strip = pixels(folder / "0001.png"), pixels(folder / "0001-steps.png")
        first, last = strip[4:132:2, 4:132:2], strip[4:132:2, -132:-4:2]
        assert np.array_equal(last, picture) and np.abs(first - picture).mean() > 10
        assert sorted(file.name for file in folder.iterdir())[:2] == ["0000-steps.png", "0000.png"]


# ---- From one word or seed to another


def test_between_two_words_eight_pictures_lead_from_the_one_to_the_other(run, tmp_path):
    files = [a_word(tmp_path / f"{like}.safetensors", word, like) for word, like in (("S*", "star"), ("T*", "circle"))]
    prompt = "a photo of a red S*"
    outcome = run("sample.py", "--prompt", prompt, "--embedding", *files, "--interpolate", "S*", "T*", *FEW)
    assert outcome.status == 0 and outcome.err == ""
    folder = tmp_path / "outputs" / "samples"
    assert Image.open(folder / "sheet.png").size == (8 * 132 + 4, 152 + 4)
    for name, like in (("0000", "star"), ("0007", "circle")):
        run("sample.py", "--prompt", f"a photo of a red {like}", *FEW, "--out", tmp_path / like)
        assert np.abs(pixels(folder / f"{name}.png") - pixels(tmp_path / like / "0000.png")).max() <= 1
    assert Image.open(folder / "0003.png").text["parameters"].startswith("a photo of a red <S*-T* 3/7>\n")


def test_between_two_long_words_too(run, tmp_path):
    """What lies between has a name of both, and a name has 255 characters at most."""
    one, other = "S" * 150, "T" * 150
    files = [a_word(tmp_path / f"{like}.safetensors", word, like) for word, like in ((one, "star"), (other, "circle"))]
    words = ("--prompt", f"a {one}", "--embedding", *files, "--interpolate", one, other, "--num", 2, *FEW)
    assert run("sample.py", *words).status == 0
    first, last = (pixels(tmp_path / "outputs" / "samples" / f"000{i}.png") for i in range(2))
    assert np.abs(first - last).mean() > 1


def test_between_two_seeds_the_ends_are_those_seeds_pictures(run, tmp_path):
    outcome = run("sample.py", "--prompt", PROMPT, "--interpolate", 3, 9, "--num", 4, *FEW)
    assert outcome.status == 0
    folder = tmp_path / "outputs" / "samples"
    for name, seed in (("0000", 3), ("0003", 9)):
        run("sample.py", "--prompt", PROMPT, "--seed", seed, *FEW, "--out", tmp_path / f"{seed}")
        assert np.abs(pixels(folder / f"{name}.png") - pixels(tmp_path / f"{seed}" / "0000.png")).max() <= 1
    assert (
        "Seed: 3, Variation seed: 9, Variation seed strength: 0.333"
        in Image.open(folder / "0001.png").text["parameters"]
    )


# ---- Mistakes: one line, status 2, nothing written


@pytest.fixture
def refused(run, tmp_path):
    def refused(*arguments):
        before = sorted(tmp_path.rglob("*"))
        outcome = run("sample.py", *arguments)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return outcome.error

    return refused


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "0"),
        ("--steps", "5000"),
        ("--guidance", "x"),
        ("--num", "0"),
        ("--sampler", "magic"),
        ("--size", "64"),
    ],
)
def test_a_wrong_option_is_refused_before_any_weight_is_read(refused, monkeypatch, option, value):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(sample, "open_checkpoint", read)
    assert option in refused("--prompt", PROMPT, option, value)


def test_a_folder_with_earlier_pictures_is_refused_before_any_weight_is_read(refused, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0000.png").write_text("my own")
    monkeypatch.setattr(sample, "open_checkpoint", None)
    assert "mine already holds 0000.png, expected a new or empty folder" in refused("--prompt", PROMPT, "--out", "mine")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--height", 10**9, "at most 65536"),
        ("--width", 10**9, "at most 65536"),
        ("--num", 10**12, "at most 10000"),
        ("--steps", 10**12, "at most 1000"),
        ("--seed", 2**64, f"at most {2**64 - 10_000}"),
        ("--guidance", 1e38, "at most 1e37"),
        ("--out", "", "expected a path"),
    ],
)
def test_a_value_that_is_too_large_is_refused_before_any_weight_is_read(refused, monkeypatch, option, value, expected):
    monkeypatch.setattr(sample, "open_checkpoint", None)
    error = refused("--prompt", PROMPT, option, value)
    assert option in error and expected in error


def test_more_pictures_than_names_have_digits_for(refused, tmp_path):
    assert "20000 pictures, expected at most 10000" in refused("--prompt", PROMPT, "--prompt", PROMPT, "--num", 10_000)


def test_pictures_that_cannot_fit_into_memory(refused):
    assert "GiB of memory, this computer has" in refused("--prompt", PROMPT, "--height", 65536, "--width", 65536)


def test_the_largest_seed_is_that_of_a_picture(run, tmp_path):
    assert run("sample.py", "--prompt", PROMPT, "--num", 2, *FEW, "--seed", 2**64 - 10_000).status == 0
    assert f"Seed: {2**64 - 9_999}" in Image.open(tmp_path / "outputs" / "samples" / "0001.png").text["parameters"]


def test_control_characters_of_a_prompt_reach_neither_the_png_nor_its_readers(run, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(PROMPT.replace(" ", "\0 \x1b[2J ", 1).encode())
    outcome = run("sample.py", "--prompts", "prompts.txt", *FEW, "--negative", "green\nblue\x9b")
    assert outcome.status == 0
    text = Image.open(tmp_path / "outputs" / "samples" / "0000.png").text["parameters"]
    assert text.startswith(f"a   [2J {PROMPT[2:]}\nNegative prompt: green\nblue \nSteps: 3")


@pytest.mark.parametrize("option", ["--prompts", "--weights", "--vae", "--embedding"])
def test_a_pipe_nobody_writes_to_is_refused(run, tmp_path, no_hang, option):
    os.mkfifo(tmp_path / "fifo")
    assert "fifo is a pipe or a device, expected a file" in run("sample.py", "--prompt", PROMPT, option, "fifo").error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--strength", 0.5), "--strength alone does nothing, expected --init-image with it"),
        (("--mask", "m.png"), "--mask alone does nothing, expected --init-image with it"),
        (("--init-image", "p.png", "--keep-pixels"), "--keep-pixels alone does nothing, expected --mask with it"),
        (("--init-image", "p.png", "--strength", 1.5), "'1.5', expected a number above 0 and at most 1"),
        (("--init-image", "nowhere.png"), "no such file: nowhere.png"),
        (
            ("--init-image", "p.png", "--mask", "wide.png"),
            "wide.png has 80x64 pixels, expected 64x64 pixels as p.png has",
        ),
        (("--init-image", "p.png", "--mask", "black.png"), "black.png is black all over, expected white where"),
        (("--init-image", "p.png", "--strength", 0.1, "--steps", 4), "a strength of 0.1 leaves none of 4 steps"),
        (("--interpolate", "S*", "T*"), "S* is no learned word that was given, expected two of none, or two seeds"),
        (("--interpolate", 1, 2, "--num", 1), "--interpolate makes 1 picture, expected at least 2"),
        (("--interpolate", 1, 10**30), "1 is no learned word that was given"),
        (("--embedding", "s.pt", "t.pt", "--interpolate", "S*", "T*"), f'the prompt "{PROMPT}" is without S*'),
        (("--embedding", "s.pt", "two.pt", "--interpolate", "S*", "U*"), "S* has 1 vectors, U* 2, expected as many"),
    ],
)
def test_editing_and_interpolation_that_cannot_be(refused, tmp_path, options, expected):
    for name, size, colour in (("p", (64, 64), "red"), ("wide", (80, 64), "white"), ("black", (64, 64), "black")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    for name, word, count in (("s", "S*", 1), ("t", "T*", 1), ("two", "U*", 2)):
        save_embeddings(tmp_path / f"{name}.pt", {word: torch.ones(count, 128)})
    assert expected in refused("--prompt", PROMPT, *options)


def test_no_prompt(refused):
    assert "--prompt" in refused()


def test_a_missing_file_of_prompts(refused):
    assert "nowhere.txt" in refused("--prompts", "nowhere.txt")


def test_a_size_the_model_cannot_take(refused):
    assert "multiples of 8" in refused("--prompt", PROMPT, "--width", 65)


def test_a_missing_embedding(refused):
    assert "no such file" in refused("--prompt", PROMPT, "--embedding", "nowhere.safetensors")


def test_an_embedding_of_another_width(refused, tmp_path):
    file = a_word(tmp_path / "wide.safetensors", width=768)
    error = refused("--prompt", PROMPT, "--embedding", file)
    assert "768" in error and "128" in error


def test_two_embeddings_of_one_word(refused, tmp_path):
    file = a_word(tmp_path / "a.safetensors")
    error = refused("--prompt", PROMPT, "--embedding", file, file)
    assert "already a placeholder" in error and "FILE:WORD" in error


def test_an_embedding_called_like_a_known_word(refused, tmp_path):
    save_embeddings(tmp_path / "lemon.pt", {"lemon": torch.ones(1, 128)}, "a1111")
    error = refused("--prompt", PROMPT, "--embedding", "lemon.pt")
    assert "already a word of the vocabulary" in error and "FILE:WORD" in error


def test_a_word_cut_off_by_a_long_prompt(refused, tmp_path):
    file = a_word(tmp_path / "a.safetensors")
    assert "cut off" in refused("--prompt", "red " * 40 + "S*", "--embedding", file)


def test_a_truncated_checkpoint(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    whole = (WEIGHTS / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(whole[:100_000])
    assert "no readable safetensors file" in refused("--prompt", PROMPT, "--weights", tmp_path / "broken")


def test_a_file_that_is_no_checkpoint(refused, tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "a learned embedding" in refused("--prompt", PROMPT, "--weights", tmp_path / "other.safetensors")
