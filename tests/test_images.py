"""Pictures from files of every kind, to tensors and back, and contact sheets. All files here are real ones."""

import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from tinyldm import InputError
from tinyldm.images import (
    RASTER_FORMATS,
    contact_sheet,
    find_images,
    fitted,
    read_image,
    read_images,
    save_image,
    to_images,
    to_tensor,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def near(a: tuple, b: tuple, tolerance: int = 12) -> bool:
    """Equal colours but for JPEG's losses."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def one_line_error(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def red_left_corner() -> Image.Image:
    """48 x 32, blue, with a red square in the corner at top left."""
    image = Image.new("RGB", (48, 32), BLUE)
    image.paste(RED, (0, 0, 16, 16))
    return image


# Finding


def test_pictures_are_found_sorted_and_not_in_hidden_files_or_subfolders(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", "._b.png", ".DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    (tmp_path / "more.png" / "d.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [path.name for path in find_images(str(tmp_path))] == ["a.JPG", "b.png", "c.webp"]


def test_files_that_are_no_pictures_by_name_are_told_in_one_warning(tmp_path):
    for name in ("a.png", "a.txt", "token.txt", "notes.txt", "film.mp4", "x", "y"):  # a caption, a word, and others
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"film\.mp4, notes\.txt, x and 1 more") as told:
        assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert len(told) == 1


def test_a_folder_that_gives_no_pictures_is_an_error_that_says_why(tmp_path):
    assert "no such folder" in one_line_error(find_images, tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    assert "is a file" in one_line_error(find_images, tmp_path / "notes.txt")
    assert "1 other files" in one_line_error(find_images, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no files" in one_line_error(find_images, tmp_path / "empty")


# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_obeyed(tmp_path, orientation, suffix):
    """The corner where the red square must come to lie, from the EXIF standard: where row 0 and column 0 are."""
    exif = Image.Exif()
    exif[0x112] = orientation
    red_left_corner().save(tmp_path / f"a.{suffix}", exif=exif)
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.size == ((48, 32) if orientation < 5 else (32, 48))
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    corners = {(x, y): image.getpixel((x * (image.width - 1), y * (image.height - 1))) for x in (0, 1) for y in (0, 1)}
    assert near(corners.pop((right, bottom)), RED)
    assert all(near(colour, BLUE) for colour in corners.values())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_a_picture(tmp_path):
    red_left_corner().save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage")
    assert read_image(tmp_path / "a.jpg").size == (48, 32)
    # Orientation 6, then the camera's name as a floating-point number.
    entries = struct.pack("<HHHI4sHHIf", 2, 0x112, 3, 1, b"\6\0\0\0", 0x10F, 11, 1, 1.0)
    red_left_corner().save(tmp_path / "b.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4))
    assert read_image(tmp_path / "b.jpg").size == (32, 48)


def test_32_bits_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 65535, np.int32)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").getpixel((0, 0)) == WHITE
    for level in (-1, 65536 + 257):
        Image.fromarray(np.full((2, 2), level, np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(InputError, match="whole numbers of 32 bits and of unknown range"):
            read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 128, 129, 257, 32896, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    assert Image.open(tmp_path / f"a.{suffix}").mode.startswith("I")
    pixels = np.asarray(read_image(tmp_path / f"a.{suffix}"))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def test_grey_and_black_and_white_pictures_become_rgb(tmp_path):
    for mode in ("L", "1"):
        Image.new(mode, (5, 4), 255).save(tmp_path / "a.png")
        image = read_image(tmp_path / "a.png")
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 4), WHITE)


def test_cmyk_jpegs_keep_their_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    assert near(read_image(tmp_path / "a.jpg").getpixel((8, 8)), RED)


def test_transparency_is_composited_on_white(tmp_path):
    path = tmp_path / "a.png"
    rgba = Image.new("RGBA", (3, 1), (*RED, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.putpixel((2, 0), (*RED, 128))
    rgba.save(path)
    image = read_image(path)
    assert [image.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (255, 127, 127)]

    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    grey.save(path)
    assert Image.open(path).mode == "LA"
    assert [read_image(path).getpixel((x, 0)) for x in range(2)] == [BLACK, WHITE]


def test_palettes_keep_their_colours_and_their_transparency(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([*BLUE, *RED, *GREEN])
    palette.putdata([0, 1, 2])
    for transparency in (1, bytes([255, 0, 255])):
        palette.save(tmp_path / "a.png", transparency=transparency)
        assert Image.open(tmp_path / "a.png").mode == "P"
        image = read_image(tmp_path / "a.png")
        assert [image.getpixel((x, 0)) for x in range(3)] == [BLUE, WHITE, GREEN]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(tmp_path / f"a.{suffix}").n_frames == 3
    assert read_image(tmp_path / f"a.{suffix}").getpixel((8, 8)) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_a_file_cut_off_anywhere_is_an_error_that_names_it(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for size in (0, 1, 8, 30, len(whole) // 2):
        path.write_bytes(whole[:size])
        message = one_line_error(read_image, path)
        assert str(path) in message and "PNG or JPEG" in message
        assert ("empty" in message) == (size == 0)


def test_what_is_no_picture_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "a.png"
    assert "no such file" in one_line_error(read_image, path)
    path.write_text("not a picture\n" * 100)
    assert str(path) in one_line_error(read_image, path)
    assert "can't be read" in one_line_error(read_image, tmp_path)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    assert "floating-point" in one_line_error(read_image, tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "eps"])
def test_ghostscript_is_never_started(tmp_path, monkeypatch, suffix):
    """Pillow takes an EPS by its content, whatever its name, and has ghostscript run the program that it is
    (Ghostscript of PIL/EpsImagePlugin.py). Here gs is a script that leaves a trace."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    red_left_corner().save(tmp_path / "real.eps")
    path = (tmp_path / "real.eps").rename(tmp_path / f"a.{suffix}")
    assert "can't be read as a picture" in one_line_error(read_image, path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "XBM"])
def test_a_format_that_is_not_listed_is_refused_by_its_content(tmp_path, kind):
    red_left_corner().convert("1" if kind == "XBM" else "RGB").save(tmp_path / "a.png", format=kind)
    assert "save it again as PNG or JPEG" in one_line_error(read_image, tmp_path / "a.png")


@pytest.mark.parametrize("kind", [*RASTER_FORMATS, "MPO"])  # MPO: a JPEG with a second one behind it, of phones
def test_every_format_is_read_whatever_the_name(tmp_path, kind):
    second = {"save_all": True, "append_images": [red_left_corner()]} if kind == "MPO" else {}
    red_left_corner().save(tmp_path / "a.png", format=kind, **second)
    image = read_image(tmp_path / "a.png")
    assert near(image.getpixel((8, 8)), RED, 30) and near(image.getpixel((40, 24)), BLUE, 30)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (400, 400)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too large" in one_line_error(read_image, tmp_path / "bomb.png")


def test_broken_pictures_among_good_ones_are_skipped_with_a_warning_each(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.jpg").write_text("text")
    Image.new("RGB", (8, 6), RED).save(tmp_path / "c.png")
    with pytest.warns(UserWarning) as told:
        [(path, image)] = read_images(tmp_path)
    assert (path, image.size) == (tmp_path / "c.png", (8, 6))
    assert [name in str(w.message) for w, name in zip(told, ("a.png", "b.jpg"), strict=True)] == [True, True]
    with pytest.warns(UserWarning):
        assert read_images(tmp_path, size=4)[0][1].size == (4, 4)
    (tmp_path / "c.png").unlink()
    message = one_line_error(read_images, tmp_path)
    assert "none of the 2 pictures" in message and "a.png" in message


# Cropping, tensors


def test_fitted_takes_the_middle(tmp_path):
    wide = Image.new("RGB", (90, 30), BLUE)
    wide.paste(RED, (30, 0, 60, 30))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        for size in (10, 30, 64):
            assert fitted(image, size, size).getcolors() == [(size * size, RED)]


def test_fitted_leaves_the_pixels_alone_when_no_resizing_is_needed():
    noise = np.random.default_rng(0).integers(0, 256, (32, 47, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fitted(Image.fromarray(noise), 32, 32)), noise[:, 7:39])


def test_fitted_takes_a_pixel_at_least():
    for size in ((64, 512), (512, 64)):
        assert fitted(Image.new("RGB", (3, 3), RED), *size).getcolors() == [(64 * 512, RED)]


def test_fitted_averages_what_it_shrinks():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    grey = np.asarray(fitted(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 8, 8))
    assert abs(grey.astype(float) - 127.5).max() < 3


def test_to_tensor_and_back_is_exact_for_every_level():
    levels = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    tensor = to_tensor([levels, levels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert (tensor.shape, tensor.dtype, tensor.min(), tensor.max()) == ((2, 3, 16, 16), torch.float32, -1, 1)
    assert torch.equal(tensor[1], tensor[0].flip(-1))
    for image, back in zip((levels, levels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), to_images(tensor), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(back))
    assert torch.equal(to_tensor(levels), tensor[:1])


def test_to_tensor_keeps_rows_columns_and_channels_apart():
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (255, 51, 0))
    assert to_tensor(image)[0, :, 1, 2].tolist() == pytest.approx([1, -0.6, -1])


def test_to_images_clamps_and_rounds_to_the_nearest_level():
    values = torch.tensor([-torch.inf, -7, -1, (127.4 - 127.5) / 127.5, (127.6 - 127.5) / 127.5, 1, 9, torch.inf])
    [image] = to_images(values.expand(1, 3, 1, 8).requires_grad_())
    assert [image.getpixel((x, 0))[0] for x in range(8)] == [0, 0, 0, 127, 128, 255, 255, 255]
    assert to_images(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16))[0].getpixel((0, 0)) == WHITE


def test_nan_is_an_error_not_a_black_picture():
    assert "NaN" in one_line_error(to_images, torch.full((1, 3, 2, 2), torch.nan))


# Contact sheets, saving


def test_a_sheet_shows_each_row_enlarged_by_a_whole_factor():
    rows = [[Image.new("RGB", (64, 64), RED)] * 2, [Image.new("RGB", (64, 64), c) for c in (GREEN, BLUE, BLACK)]]
    sheet = contact_sheet(rows)
    assert sheet.size == (3 * 132 + 4, 2 * 132 + 4)
    counts = {colour: n for n, colour in sheet.getcolors()}
    assert counts[RED] == 2 * 128**2
    assert counts[GREEN] == counts[BLUE] == counts[BLACK] == 128**2
    assert sheet.getpixel((4, 4)) == sheet.getpixel((131 + 132, 131)) == RED
    assert sheet.getpixel((4, 136)) == GREEN and sheet.getpixel((300, 20)) == WHITE


def test_enlarged_pixels_stay_what_they_are():
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([[Image.fromarray(noise)]], gap=0))
    assert np.array_equal(sheet, noise.repeat(3, 0).repeat(3, 1))


def test_large_pictures_are_not_enlarged():
    assert contact_sheet([[Image.new("RGB", (512, 256))]], gap=2).size == (516, 260)


def test_labels_stand_above_their_rows_and_inside_the_sheet():
    rows = [[Image.new("RGB", (64, 64), RED)], [Image.new("RGB", (64, 64), BLUE)]]
    bare, blank = contact_sheet(rows), contact_sheet(rows, labels=["", ""])
    assert blank.size == (bare.width, bare.height + 40)
    sheet = np.asarray(contact_sheet(rows, labels=["a photo of S*", "g" * 500])).astype(int)
    changed = np.argwhere((sheet != np.asarray(blank)).any(-1))
    assert {y // (132 + 20) for y, _ in changed} == {0, 1}
    assert (changed[:, 0] % 152).max() < 4 + 20, "a label reaches into a picture"
    assert changed[:, 1].max() < bare.width - 4, "a label reaches over the edge"
    ends = np.asarray(contact_sheet(rows, labels=["", "g" * 400])).astype(int)
    assert np.array_equal(sheet[152:], ends[152:]), "both are shortened to the same text"


def test_labels_may_have_line_breaks_and_letters_the_font_lacks():
    contact_sheet([[Image.new("RGB", (64, 64))]], labels=["a\nb\t한국어 é 🙂"])


def test_a_label_may_have_any_length_and_control_characters():
    contact_sheet([[Image.new("RGB", (64, 64))]], labels=["\0\x1b[2J\u202e" + "x" * 1_000_001])


def test_a_saved_text_has_no_control_characters_but_line_ends(tmp_path):
    """Readers in C take a NUL for the end; the PNG specification (11.3.3.2) allows a line feed alone."""
    for text in ("a\0b\x1bc\x9bd\ne", "a\0b\x1bc\x9bd\ne 熊"):  # tEXt, iTXt
        save_image(Image.new("RGB", (1, 1)), tmp_path / "a.png", {"parameters": text})
        assert Image.open(tmp_path / "a.png").text["parameters"] == text.translate(dict.fromkeys((0, 27, 155), " "))


def test_a_saved_picture_carries_its_text_in_any_script(tmp_path):
    text = {"prompt": "a photo of S*", "negative": "", "init": "고양이 — “café” 🙂", "settings": "steps: 25\nseed: 0"}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    save_image(noise, str(tmp_path / "0000.png"), text)
    with Image.open(tmp_path / "0000.png") as image:
        assert image.format == "PNG"
        assert image.text == text
        assert np.array_equal(np.asarray(image), np.asarray(noise))
    save_image(noise, tmp_path / "0000.png")
    assert Image.open(tmp_path / "0000.png").text == {}
    assert [path.name for path in tmp_path.iterdir()] == ["0000.png"]
