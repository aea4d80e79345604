"""The page in a real browser: one server and one Chromium for all of this file, whose tests go on from each other."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, ROOT
from PIL import Image
from playwright.sync_api import BrowserContext, Download, Page, expect, sync_playwright

from tinyldm.formats.embeddings import load_embeddings, save_embeddings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; .ci/run installs Debian's")
expect.set_options(timeout=60_000)  # all cores may be busy with other tests


@pytest.fixture(scope="module")
def place(tmp_path_factory, quick) -> Iterator[tuple[str, Path]]:
    """The page's address, and the working directory of its server."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "examples").symlink_to(EXAMPLES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tinyldm.studio", "--weights", str(quick), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert f"http://127.0.0.1:{port}" in server.stdout.readline(), (folder / "server.log").read_text()
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 130


@pytest.fixture(scope="module")
def context(place) -> Iterator[BrowserContext]:
    """A browser, all of whose requests are noted in context.hosts."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        context.set_default_timeout(60_000)
        context.hosts = set()
        context.on("request", lambda request: context.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", request.url)))
        yield context
        browser.close()


@pytest.fixture(scope="module")
def tab(context, place) -> Page:
    return opened(context, place)


def opened(context: BrowserContext, place: tuple[str, Path]) -> Page:
    tab = context.new_page()
    tab.goto(place[0])
    expect(button(tab, "Learn")).to_be_enabled()
    return tab


def button(tab: Page, name: str):
    return tab.get_by_role("button", name=name, exact=True)


def chosen(tab: Page):
    return tab.get_by_label("In outputs/")


def said(tab: Page):
    return tab.get_by_label("It says")


def choose(tab: Page, label: str, option: str) -> None:
    tab.get_by_label(label, exact=True).click()
    tab.get_by_role("option", name=option, exact=True).click()


def begin(tab: Page, do: Callable[[], None], folder: str) -> None:
    """What begins a command, and its folder is shown."""
    do()
    expect(chosen(tab)).to_have_value(folder)


def until(tab: Page, true: Callable[[], bool]) -> None:
    """Wait for what no element tells."""
    for _ in range(60):
        if true():
            return
        tab.wait_for_timeout(1000)
    raise AssertionError("not even after a minute")


def learn(tab: Page, token: str, steps: int, folder: str) -> None:
    tab.get_by_role("tab", name="Learn").click()
    choose(tab, "or a folder of examples/", "striped-circle")
    tab.get_by_label("Its word").fill(token)
    tab.get_by_label("Steps, 0: usual").fill(str(steps))
    begin(tab, button(tab, "Learn").click, folder)


def pixels(file: Path | BytesIO) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"), int)


def test_a_word_is_learned_shown_and_downloaded_for_another_tool(tab, place):
    learn(tab, "S*", 4, "S")
    expect(said(tab)).to_have_value(re.compile(r"^learned S\*: look at outputs/S/preview.png"))
    expect(tab.get_by_alt_text("pictures with the word as it is being learned")).to_be_visible()
    expect(tab.locator(".vega-embed")).to_have_count(2)
    choose(tab, "As a file for", "a1111")
    until(tab, lambda: downloaded(tab).suggested_filename == "S.pt")
    assert load_embeddings(f"{downloaded(tab).path()}:S")["S"].shape == (1, 128)


def downloaded(tab: Page) -> Download:
    with tab.expect_download() as download:
        button(tab, "Download it").click()
    return download.value


def test_pictures_are_made_with_it_by_keyboard_and_tell_their_settings_and_attention(tab):
    tab.get_by_role("tab", name="Make").press("Enter")
    button(tab, "S*").press("Enter")
    prompt = tab.get_by_label("Prompt", exact=True)
    expect(prompt).to_have_value("a photo of S*")
    begin(tab, lambda: prompt.press("Enter"), "samples")
    expect(said(tab)).to_have_value("4 pictures and sheet.png in outputs/samples")
    expect(tab.locator(".thumbnail-item")).to_have_count(4)
    tab.locator(".thumbnail-item").nth(1).press("Enter")
    expect(tab.get_by_label("Made with")).to_have_value(re.compile(r"a photo of S\*\nSteps: 2, .*Seed: 1,"))
    expect(tab.locator("#sheets .thumbnail-item img")).to_have_count(2)


def test_a_word_that_is_dropped_becomes_a_button(tab, tmp_path):
    save_embeddings(tmp_path / "my-heart.pt", {"my-heart": torch.ones(1, 128)}, "a1111")
    drop = tab.locator(".block", has_text="Words of any tool").locator("input[type=file]").first
    drop.set_input_files(tmp_path / "my-heart.pt")
    expect(button(tab, "my-heart")).to_be_visible()


def test_what_is_painted_over_changes_and_the_rest_does_not_and_undo_brings_it_back(tab, place):
    button(tab, "Edit this").click()
    canvas = tab.locator("canvas:visible").last
    expect(tab.locator("#After img")).to_be_visible()
    canvas.scroll_into_view_if_needed()
    until(tab, lambda: np.ptp(pixels(BytesIO(canvas.screenshot())), axis=-1).mean() > 10)  # it is drawn in colour
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 40, y - 40)
    tab.mouse.down()
    for i in range(3):
        tab.mouse.move(x + 40 * (-1) ** i, y - 40 + 30 * i)
    tab.mouse.up()
    tab.get_by_label("What should be there").fill("a photo of a red star")
    begin(tab, button(tab, "Change").click, "samples-2")
    expect(said(tab)).to_have_value(re.compile("1 pictures"))
    before, after = (pixels(place[1] / "outputs" / name) for name in ("samples/0001.png", "samples-2/0000.png"))
    mask = pixels(place[1] / "outputs" / "given" / "pictures" / "00.png").max(axis=-1) > 0
    changed = np.abs(before - after).max(axis=-1) > 8
    assert 0.02 < mask.mean() < 0.5 and changed[mask].mean() > 0.2 and changed[~mask].mean() < 0.1
    expect(tab.locator("#Before img")).to_be_visible()
    button(tab, "Undo it").click()
    expect(tab.locator("#Before img")).to_have_count(0)


def test_a_broken_file_is_one_line_on_the_page(tab, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    tab.get_by_role("tab", name="Learn").click()
    tab.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    expect(tab.get_by_role("cell", name="broken.png")).to_be_visible()
    button(tab, "Learn").click()
    toast = tab.get_by_text(re.compile(r"^broken\.png can't be read as a picture .*save it again as PNG or JPEG"))
    expect(toast).to_be_visible()


def test_two_tabs_wait_for_each_other_and_a_run_outlives_its_tab(context, place, tab):
    first, second = opened(context, place), tab
    second.reload()
    learn(first, "A*", 100_000, "A")
    expect(said(first)).to_have_value(re.compile(r"step [1-9]\d* of 100000"))
    learn(second, "B*", 100_000, "B")
    expect(said(second)).to_have_value("waits for the one before it")
    expect(chosen(first)).to_have_value("A")
    first.close()
    second.reload()  # it shows the folder that was changed last: A, if it has just saved
    expect(chosen(second)).to_have_value(re.compile("^[AB]$"))
    choose(second, "In outputs/", "B")
    expect(said(second)).to_have_value("waits for the one before it")
    button(second, "Stop").click()  # it never begins
    expect(said(second)).to_have_value("")
    choose(second, "In outputs/", "A")
    expect(said(second)).to_have_value(re.compile(r"step [1-9]\d* of 100000"))
    done = stopped(second)
    button(second, "Continue").click()
    expect(said(second)).to_have_value(re.compile(r"step [1-9]\d* of 100000"))
    assert stopped(second) >= done > 0


def stopped(tab: Page) -> int:
    """After how many steps a run is, once its Stop was pressed and it has saved."""
    button(tab, "Stop").click()
    expect(said(tab)).to_have_value(re.compile(r"^stopped after \d+ of 100000 steps, saved in outputs/A"))
    return int(re.search(r"\d+", said(tab).input_value())[0])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(tab, scheme):
    tab.emulate_media(color_scheme=scheme)
    tab.reload()
    expect(button(tab, "Learn")).to_be_visible()
    colours = tab.get_by_label("Its word").evaluate(
        "each => [getComputedStyle(each).color, getComputedStyle(each).backgroundColor]"
    )
    text, paper = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert abs(text - paper) > 120 and (paper > text) == (scheme == "light")


def test_the_page_asks_this_computer_alone_and_only_this_computer_reaches_it(context, place, tab):
    address = place[0]
    assert {host for host in context.hosts if host.startswith("http")} == {address}
    connection = HTTPConnection("127.0.0.1", int(address.split(":")[-1]), timeout=60)
    connection.request("GET", "/", headers={"Host": "elsewhere.example"})  # a name that another site gives to 127.0.0.1
    assert connection.getresponse().status == 400
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(address.split(":")[-1])), timeout=5):
        pass
