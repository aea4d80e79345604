"""The page: on its left what can be done, on its right what is in a folder of outputs/."""

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path

import gradio as gr
import pandas
import regex as re  # as the tokenizer does
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinyldm import InputError
from tinyldm.files import new_folder
from tinyldm.formats.checkpoint import Checkpoint
from tinyldm.formats.embedding_layouts import FORMATS
from tinyldm.formats.embeddings import described, load_embeddings, read_vocabulary, save_embeddings
from tinyldm.images import RASTER_FORMATS, SUFFIXES, as_rgb, enlarged, read_image, save_image
from tinyldm.run import folder_for
from tinyldm.sampler import SAMPLERS
from tinyldm.studio.commands import OUTPUTS, Commands
from tinyldm.tokenizer import pattern_of

CANVAS = 512  # pixels, at least, of a picture that is painted on
PICTURES = "[0-9][0-9][0-9][0-9].png"  # of sample.py
FORM = ("prompt", "seed", "num", "steps", "guidance", "sampler")
PRIVATE = {"share": False, "ssr_mode": False, "run_history": False, "max_file_size": "32mb"}
CSS = """.gallery-container:has(.preview) { min-height: 420px } .gallery-container img { image-rendering: pixelated }
.grid-container { grid-auto-rows: auto } .grid-container * { aspect-ratio: auto; height: auto; object-fit: contain }"""
PLAIN = {"quiet": True, "footer_links": [], "show_error": True, "prevent_thread_lock": True, "css": CSS}
LOOK = {"interactive": False, "buttons": ["download", "fullscreen"]}
LATER = {"variant": "primary", "interactive": False}  # until the page has its menu, which would hide what it begins
PAINT = {"type": "pil", "sources": (), "transforms": (), "layers": False, "canvas_size": (CANVAS, CANVAS)}


class Page:
    """What its buttons do. What begins a command returns the menu of folders, with the command's chosen."""

    def __init__(self, commands: Commands, checkpoint: Checkpoint, usual: dict[str, object]):
        self.commands, self.checkpoint, self.usual = commands, checkpoint, usual  # options of every command

    def menu(self, chosen: Path | None = None) -> dict:
        """The menu of folders; the newest is chosen if no other is."""
        names = [*self.commands.folders()]
        return gr.update(choices=names, value=chosen.name if chosen else next(iter(names), None))

    def folder(self, name: str | None) -> Path:
        """The folder of a name; for what is no name of one, a folder that does not exist."""
        return ({f.name: f for f in [*self.commands.begun]} | self.commands.folders()).get(name, OUTPUTS / ".none")

    def view(self, name: str | None, to: str) -> list:
        """What there is to see of a folder, and which buttons go. to: one of FORMATS, for the word's file."""
        folder, curve = self.folder(name), None
        if (log := folder / "loss.csv").exists() and len(steps := pandas.read_csv(log, dtype=float)):
            curve = steps.rolling(30, 1, on="step").mean()  # less jumpy
        alive, pictures, preview = self.commands.alive(folder), sorted(folder.glob(PICTURES)), folder / "preview.png"
        coming = sorted(folder.glob("*-steps.png"))[len(pictures) :] if alive else []
        resumable, is_word = ((folder / file).exists() for file in ("resume.safetensors", "embedding.safetensors"))
        buttons = [gr.update(interactive=alive), gr.update(interactive=resumable and not alive), gr.Timer(active=alive)]
        file = converted(folder, to) if is_word and not alive else None
        word = [gr.update(visible=is_word), preview if preview.exists() else None, curve, curve, file]
        shown, wide = [*pictures, *coming], 1 if coming else min(max(2, len(pictures)), 4)
        return [self.commands.told(folder), *buttons, *word, gr.update(value=shown, columns=wide, visible=bool(shown))]

    def learn(self, files: list[str], board: dict, example: str, token: str, kind: str, init: str, steps: int) -> dict:
        """Learn from the first of these that is there: files, a drawing, a folder of examples/."""
        images = files or ([board["composite"]] if stroke_of(board) else [])
        pictures = keep(*images) if images else Path("examples", example or "")
        given = {"images": pictures, "token": token, "property": kind, "init": init, "steps": steps or None}
        return self.menu(self.commands.begin("train.py", new_folder(folder_for(token)), self.usual | given))

    def draw(self, given: dict[str, object], *more: str) -> Path:
        """Begin sample.py with the learned words that are named. -> its folder"""
        folder, texts = new_folder(OUTPUTS / "samples"), "\n".join([str(given["prompt"]), *more])
        used = [f"--embedding={f}:{w}" for w, f in self.commands.words().items() if re.search(pattern_of(w), texts)]
        return self.commands.begin("sample.py", folder, self.usual | given, "--attention", "--show-steps", *used, *more)

    def make(self, *form: object) -> dict:
        return self.menu(self.draw(dict(zip(FORM, form, strict=True))))

    def words(self) -> list:
        """The buttons that add a word to the prompt, and the choices of the two ends of a way."""
        words = [*self.commands.words()]
        return [gr.update(samples=[[word] for word in words]), *[gr.update(choices=words)] * 2]

    def take_words(self, files: list[str]) -> list:
        """Copy the words of any tool's files into folders of their own."""
        for file in files:
            for word, vectors in read_upload(file, load_embeddings).items():
                self.checkpoint.tokenizer().add_placeholder(word)  # InputError if it is a known word already
                save_embeddings(new_folder(folder_for(word)) / "embedding.safetensors", {word: vectors})
        return self.words()

    def choose(self, name: str, event: gr.SelectData) -> list:
        """A picture that is clicked -> its file, its part of the page, its sheets, what it was made with."""
        if event.index >= len(pictures := sorted(self.folder(name).glob(PICTURES))):  # it is coming
            return [gr.skip()] * 4
        file = pictures[event.index]
        sheets = sorted(file.parent.glob(f"{file.stem}-*.png"), reverse=True)
        with Image.open(file, formats=["PNG"]) as image:
            return [file, gr.update(visible=True), sheets, image.text.get("parameters", "")]

    def again(self, text: str) -> list:
        """What a picture was made with, as the form takes it: one, with its prompt, seed, steps, guidance, sampler."""
        steps, sampler, scale, seed = re.findall(r"Steps: (.+), Sampler: (.+), CFG scale: (.+), Seed: (\d+)", text)[-1]
        return [text.split("\n")[0], int(seed), 1, int(steps), float(scale), sampler]

    def vary(self, file: Path, made_with: str) -> dict:
        """Four pictures that begin with this one."""
        prompt, seed, *_ = self.again(made_with)
        return self.menu(self.draw({"prompt": prompt, "seed": seed + 1, "num": 4, "init_image": file, "strength": 0.6}))

    def change(self, editor: dict, versions: list[Path], prompt: str, strength: float, seed: int) -> Iterator[list]:
        """What was painted over becomes what the prompt says; if nothing was, all of it. -> the menu, opened()"""
        if not versions:
            raise InputError("no picture is open, expected one; open a file, or click one that was made and Edit this")
        given = {"prompt": prompt, "seed": seed, "init_image": versions[-1], "strength": strength}
        if stroke := stroke_of(editor):
            mask = stroke.resize(read_image(versions[-1]).size, Image.Resampling.BOX)
            given |= {"mask": keep(mask.point(lambda share: 255 * (share > 0))) / "00.png", "keep_pixels": True}
        folder = self.draw(given)
        yield [self.menu(folder), *[gr.skip()] * 4]
        wait([self.commands.begun[folder]])
        yield [gr.skip(), *(opened([*versions, *new]) if (new := [*folder.glob(PICTURES)]) else [gr.skip()] * 4)]

    def look(self, word: str) -> list:
        """Norm and nearest known words of a word at each of its saves, and its folder."""
        folder = self.commands.words()[word].parent
        files = {file.stem: load_embeddings(file) for file in sorted(folder.glob("embedding*.safetensors"))}
        known = read_vocabulary(self.checkpoint)
        return ["\n".join(line for name, words in files.items() for line in described(name, words, known)), folder.name]

    def between(self, start: str, end: str, prompt: str, seed: int) -> dict:
        """Pictures on the way from one word to another."""
        given = {"prompt": prompt.replace("{}", start or ""), "seed": seed}
        return self.menu(self.draw(given, "--interpolate", start or "", end or ""))


def read_upload(file: str, read: Callable) -> object:
    """What read(file) returns; its error, without the folder of the upload, is shown and not printed."""
    try:
        return read(file)
    except InputError as error:
        raise gr.Error(str(error).replace(f"{Path(file).parent}/", ""), print_exception=False) from error


def converted(folder: Path, to: str) -> Path | None:
    """A word as a file for one of FORMATS, called after its folder, as some tools go by the name; None if damaged."""
    file = OUTPUTS / "converted" / to / f"{folder.name}{FORMATS[to].suffix}"  # a run's own folder stays as it is
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(InputError):
        save_embeddings(file, load_embeddings(folder / "embedding.safetensors"), to)
        return file


def opened(versions: list[Path]) -> list:
    """Versions of a picture -> these, the editor with the last one, the one before it and itself."""
    before, after = [None, None, *(enlarged(read_image(file), CANVAS) for file in versions[-2:])][-2:]
    return [versions, {"background": after, "layers": [], "composite": None}, before, after]


def keep(*given: Image.Image | str) -> Path:
    """Write images and uploads into a folder where a command finds them, and finds them again. -> the folder"""
    images = [as_rgb(each) if isinstance(each, Image.Image) else read_upload(each, read_image) for each in given]
    folder = new_folder(OUTPUTS / "given" / "pictures")
    for i, image in enumerate(images):
        save_image(image, folder / f"{i:02d}.png")
    return folder


def stroke_of(editor: dict | None) -> Image.Image | None:
    """Where somebody painted, white on black; None if nowhere."""
    stroke = editor["layers"][0].getchannel("A") if editor and editor["layers"] else None
    return stroke if stroke and stroke.getbbox() else None


def build(do: Page) -> gr.Blocks:
    seed, usual = do.usual["seed"], do.checkpoint.defaults
    suffixes, examples = sorted(SUFFIXES), sorted(folder.name for folder in Path("examples").glob("*/"))
    with gr.Blocks(title="tinyldm", analytics_enabled=False) as page, gr.Row():
        file, versions, clock = gr.State(), gr.State([]), gr.Timer(0.7, active=False)
        with gr.Column(), gr.Tabs() as tabs:
            with gr.Tab("Learn", id="learn"):
                files = gr.File(label="Three to five pictures", file_count="multiple", file_types=suffixes, height=140)
                example = gr.Dropdown(examples, value=None, label="or a folder of examples/")
                with gr.Accordion("or draw one", open=False):
                    board = gr.ImageEditor(show_label=False, **PAINT)
                kind = gr.Radio(["object", "style"], value="object", label="What they share")
                token, init = gr.Textbox("S*", label="Its word"), gr.Textbox(label="Begins as, if not as usual")
                steps, learn = gr.Number(0, label="Steps, 0: usual", precision=0), gr.Button("Learn", **LATER)
            with gr.Tab("Make", id="make") as making:
                prompt = gr.Textbox("a photo of ", label="Prompt")
                known = gr.Dataset(components=[prompt], samples=[], label="Learned words", layout="gallery")
                dropped = gr.File(label="Words of any tool: .safetensors, .pt, …", file_count="multiple", height=110)
                with gr.Row():
                    whole = (("Seed", seed), ("Pictures", 4), ("Steps", usual.sampler_steps))
                    first, number, count = (gr.Number(value, label=label, precision=0) for label, value in whole)
                    scale = gr.Number(usual.guidance, label="Guidance")
                    sampler = gr.Dropdown(list(SAMPLERS), value=usual.sampler, label="Sampler")
                make = gr.Button("Make", **LATER)
            with gr.Tab("Edit", id="edit"):
                upload = gr.UploadButton("Open a picture", file_types=suffixes)
                editor = gr.ImageEditor(label="Paint over what changes", **PAINT)
                becomes = gr.Textbox(label="What should be there")
                strength, other = gr.Slider(0.1, 1, 1, label="Strength"), gr.Number(seed, label="Seed", precision=0)
                change, undo = gr.Button("Change", variant="primary"), gr.Button("Undo it")
                with gr.Row():
                    before, after = (gr.Image(**LOOK, label=each, elem_id=each) for each in ("Before", "After"))
            with gr.Tab("Look inside", id="inside") as inside:
                start, near = gr.Dropdown(label="Word"), gr.Textbox(label="At each save", lines=6, interactive=False)
                end, phrase = gr.Dropdown(label="From it to"), gr.Textbox("a photo of {}", label="Prompt, {}: the word")
                go, share = gr.Button("Go", variant="primary"), gr.Slider(0, 7, 0, step=1, label="On the way")
        with gr.Column():
            folder, said = gr.Dropdown(label="In outputs/"), gr.Textbox(label="It says", max_lines=6, interactive=False)
            with gr.Row():
                stop, go_on = gr.Button("Stop", interactive=False), gr.Button("Continue", interactive=False)
            with gr.Column(visible=False) as word:
                preview = gr.Image(**LOOK, show_label=False, alt_text="pictures with the word as it is being learned")
                with gr.Row():
                    loss, norm = (gr.LinePlot(x="step", y=y, height=180, show_label=False) for y in ("loss", "norm"))
                to, download = gr.Dropdown(list(FORMATS), label="As a file for"), gr.DownloadButton("Download it")
            gallery = gr.Gallery(**LOOK, height="fit-content", show_label=False, visible=False)
            with gr.Column(visible=False) as details:
                sheets = gr.Gallery(**LOOK, height="fit-content", columns=1, show_label=False, elem_id="sheets")
                text = gr.Textbox(label="Made with", interactive=False)
                with gr.Row():
                    again, vary, edit = map(gr.Button, ("Again from this seed", "Variations", "Edit this"))
        shown = [said, stop, go_on, clock, word, preview, loss, norm, download, gallery]
        edited = [versions, editor, before, after]
        wanted, names = [prompt, first, number, count, scale, sampler], [known, start, end]
        page.load(lambda: [do.menu(), *[gr.update(interactive=True)] * 2], None, [folder, learn, make])
        gr.on([page.load, making.select, inside.select], do.words, None, names)
        gr.on([folder.change, to.change, clock.tick], do.view, [folder, to], shown, show_progress="hidden")
        folder.change(lambda: gr.update(visible=False), None, details)
        stop.click(lambda name: do.commands.stop(do.folder(name)), folder)
        go_on.click(lambda name: do.commands.go_on(do.folder(name)), folder).then(do.view, [folder, to], shown)
        learn.click(do.learn, [files, board, example, token, kind, init, steps], folder)
        gr.on([make.click, prompt.submit], do.make, wanted, folder)
        known.click(lambda text, word: f"{text.rstrip()} {word[0]}", [prompt, known], prompt)
        dropped.upload(do.take_words, dropped, names)
        gallery.select(do.choose, folder, [file, details, sheets, text])
        again.click(do.again, text, wanted).success(do.make, wanted, folder)
        vary.click(do.vary, [file, text], folder)
        edit.click(lambda old, new: [*opened([*old, new]), gr.Tabs(selected="edit")], [versions, file], [*edited, tabs])
        upload.upload(lambda old, new: opened([*old, keep(new) / "00.png"]), [versions, upload], edited)
        change.click(do.change, [editor, versions, becomes, strength, other], [folder, *edited], show_progress="hidden")
        undo.click(lambda versions: opened(versions[:-1]), versions, edited)
        start.input(do.look, start, [near, folder])
        go.click(do.between, [start, end, phrase, first], folder)
        share.change(lambda i: gr.update(selected_index=i), share, gallery, show_progress="hidden")
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Show it to whoever reaches the host's address, and go on."""
    if ":" in host:  # gradio makes no address of it
        raise InputError(f"--host is {host}, expected a name or an IPv4 address; try --host 127.0.0.1")
    Image.ID[:] = [name for name in Image.ID if name in RASTER_FORMATS]  # the page's own widgets open pictures too
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # its own would be fetched
    # Another site's page in the same browser can give this address a name of its own; such a name is not answered.
    own = [Middleware(TrustedHostMiddleware, allowed_hosts=["*"] if host == "0.0.0.0" else [host, "localhost"])]
    page = page.queue(default_concurrency_limit=None)  # the commands have queues of their own, which are seen
    page.launch(server_name=host, server_port=port, theme=theme, app_kwargs={"middleware": own}, **PRIVATE, **PLAIN)
