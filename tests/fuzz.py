"""A fuzzer: random accidents and random strangers' files, given to the commands for as long as it is let.

    python tests/fuzz.py --minutes 60 --seed 7
    python tests/fuzz.py --seed 7 --case 1234              one case again
    python tests/fuzz.py --only pickle --only image        some kinds alone

Each case is one command in a process of its own. It must do its work or say in one line why not: status 0, or status 2
and one line on stderr, warnings beside it; no traceback, nothing that a terminal obeys, no file half-written, no input
changed, nothing executed, memory and time within bounds. Faults are printed, each once, and their files are kept in
outputs/fuzz. A case is made from its number and the seed alone.
"""

import io
import json
import math
import pickletools
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # as pytest sets it

from helpers import embedding_files, public
from helpers.children import Children, Outcome

from tinyldm import InputError, cli
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.formats.merges import read_merges
from tinyldm.formats.native import save_checkpoint
from tinyldm.latent_diffusion import Defaults, LatentDiffusion, Learning
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[1]
SECONDS = 40  # that a case may take; the commands need two at most, the machine may be busy
MEMORY = 150 * 2**20  # bytes that a refusal may take, and 1.5 times the case's files


@dataclass(frozen=True)
class Case:
    kind: str
    words: list[str]  # the command


Maker = Callable[[random.Random, Path, Path], list[str]]  # chance, folder to fill, seeds -> the command
KINDS: dict[str, Maker] = {}


def kind(maker: Maker) -> Maker:
    KINDS[maker.__name__] = maker
    return maker


# ---- What cases start from: whole files of every kind, made once


def make_seeds(folder: Path, children: Children) -> None:
    """small/ (our own format), single.safetensors, single.ckpt, diffusers/, images/, embeddings/, run/."""
    small = small_model()
    save_checkpoint(folder / "small", small)
    save_file(public.single_file("1.x"), folder / "single.safetensors")
    torch.save({"state_dict": public.single_file("1.x"), "global_step": 7}, folder / "single.ckpt")
    shutil.copy(folder / "small" / "merges.txt", folder / "merges.txt")
    public.pipeline("1.x").save_pretrained(folder / "diffusers")

    (folder / "images").mkdir()
    picture = Image.effect_mandelbrot((40, 32), (-2, -1.5, 1, 1.5), 50)
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tiff", "ppm"):
        picture.convert("RGB").save(folder / "images" / f"picture.{suffix}")
    picture.convert("P").save(folder / "images" / "palette.png")
    picture.convert("I;16").save(folder / "images" / "deep.png")
    Image.merge("LA", (picture, picture)).save(folder / "images" / "transparent.png")

    (folder / "embeddings").mkdir()
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for number, (write, suffix, *_) in enumerate(embedding_files.WRITERS):
        write(folder / "embeddings" / f"{number:02d}-{write.__name__}{suffix}", vectors)

    (folder / "pictures").mkdir()
    shutil.copy(folder / "images" / "picture.png", folder / "pictures" / "a.png")
    done = children.run(trains(folder, "run", "--steps", "2", "--save-every", "1", "--preview-every", "1"), folder)
    if done.status != 0:
        raise InputError(f"the fuzzer's own run fails: {done.err}")


def small_model() -> LatentDiffusion:
    """Random weights, some thousand of them; 8x8 pictures."""
    torch.manual_seed(0)
    merges = read_merges(ROOT / "weights" / "tiny" / "merges.txt")
    tokenizer = Tokenizer(merges)
    text = CLIPTextEncoder(CLIPTextConfig(tokenizer.vocabulary_size, width=32, layers=1, heads=2))
    unet = UNet(UNetConfig(channels=(32,), attention=(True,), blocks=1, context_width=32, heads=2, norm_groups=8))
    autoencoder = AutoencoderKL(AutoencoderConfig(channels=(32,), blocks=1, norm_groups=8))
    defaults = Defaults(size=8, sampler_steps=1, guidance=2.0, batch=1, object=Learning("circle", steps=1))
    return LatentDiffusion(tokenizer, text, unet, autoencoder, NoiseSchedule(), defaults=defaults).to("cpu")


def trains(seeds: Path, out: str, *more: str) -> list[str]:
    command = ["train.py", "--images", str(seeds / "pictures"), "--token", "S*", "--weights", str(seeds / "small")]
    return [*command, "--init", "circle", "--out", out, *more]


def samples(seeds: Path, *more: str) -> list[str]:
    given = [] if "--weights" in more else ["--weights", str(seeds / "small")]
    prompt = [] if "--prompt" in more or "--prompts" in more else ["--prompt", "a photo of a circle"]
    return ["sample.py", *given, *prompt, "--steps", "1", *more]


# ---- Random damage

NUMBERS = ["0", "-1", "1", "2", "3.5", "1e38", "1e-45", "nan", "inf", "-0", "٣", "1_0", "0x10", "", " ", "1e999", "½"]
NUMBERS += [str(2**bits - less) for bits in (15, 31, 32, 63, 64) for less in (0, 1)] + ["9" * 12, "9" * 30]
PIECES = [
    "a",
    "circle",
    "photo of",
    "S*",
    "<cat>",
    " ",
    "  ",
    "\n",
    "\t",
    "\r",
    "\x1b[2J",
    "\x07",
    "\udcff",
    "\ud800",
    "é",
]
PIECES += [
    "熊",
    "e\u0301",
    "\u202e",
    "\ufeff",
    "🦄",
    "👨‍👩‍👧",
    "{}",
    "%s",
    "\\",
    "'",
    '"',
    "`id`",
    "$(touch executed)",
    ";",
    "|",
]
PIECES += [
    "--steps",
    "/",
    "..",
    ".png",
    ".pt",
    ":",
    "<|endoftext|>",
    "</w>",
    "ﬁ",
    "İ",
    "ß",
    "x" * 3000,
    "(a:1.3)",
    "[a|b]",
]
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    77,
    2**31,
    2**63,
    2**70,
    1e308,
    -0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "eps",
    "F16",
]
VALUES += ["\x1b[2J\n", [], {}, [[[]]], [0], ["x"], [32, 32], {"x": 1}, "9" * 50, [1] * 300, "float32", "U8"]


def text(chance: random.Random, most: int = 6) -> str:
    return "".join(chance.choice(PIECES) for _ in range(chance.randint(0, most)))


def damaged(chance: random.Random, data: bytes) -> bytes:
    """A file's bytes with one to three accidents, more often near the start, where headers are."""
    for _ in range(chance.randint(1, 3)):
        near = chance.choice([64, 1024, len(data)])
        at = chance.randrange(max(1, min(near, len(data))))
        size = chance.choice([1, 2, 4, 8, 100, 5000])
        new = chance.choice(
            [
                bytes([data[at] ^ 1 << chance.randrange(8)]) if data else b"x",
                chance.randbytes(size),
                b"",
                data[at : at + size] * 3,
                struct.pack("<Q", chance.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))[: min(size, 8)],
                struct.pack(">I", chance.choice([0, 1, 2**31 - 1, 2**32 - 1])),
            ]
        )
        data = data[:at] + new + data[at + chance.choice([len(new), 0, size]) :]
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.15 else data


def damaged_json(chance: random.Random, value: object) -> object:
    """The same value with something in it replaced, left out, doubled, renamed or wrapped."""
    if chance.random() < 0.1 or not isinstance(value, (dict, list)) or not value:
        deep: object = chance.choice(VALUES)
        for _ in range(chance.choice([0, 0, 0, 1, 3, 500])):
            deep = [deep]
        return deep
    if isinstance(value, list):
        at = chance.randrange(len(value))
        return [*value[:at], damaged_json(chance, value[at]), *value[at + chance.choice([1, 1, 0]) :]]
    name, accident = chance.choice(list(value)), chance.random()
    rest = {key: item for key, item in value.items() if key != name}
    if accident < 0.15:
        return rest
    if accident < 0.3:
        return rest | {chance.choice([text(chance), name.upper(), name + "x"]): value[name]}
    return value | {name: damaged_json(chance, value[name])}


def damaged_header(chance: random.Random, file: Path) -> bytes:
    """A safetensors file, its header damaged as JSON, the tensors' bytes as they were."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "tinyldm" in header.get("__metadata__", {}) and chance.random() < 0.8:
        config = json.loads(header["__metadata__"]["tinyldm"])
        if chance.random() < 0.9:
            del config["sha256"]  # it would give most of the damage away
        header["__metadata__"]["tinyldm"] = json.dumps(damaged_json(chance, config))
    else:
        header = damaged_json(chance, header)
    new = json.dumps(header).encode("utf-8", "backslashreplace")
    return struct.pack("<Q", len(new)) + new + data[8 + size :]


PICKLED = [  # names, hostile and harmless; then other operations and what they work on
    *(f"c{name}\n".encode() for name in ("os\nsystem", "builtins\neval", "builtins\nbytearray", "builtins\ndict")),
    *(f"ctorch\n{name}\n".encode() for name in ("FloatStorage", "Size", "float16", "tensor")),
    *(f"ctorch._utils\n{name}\n".encode() for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    *(f"ccollections\n{name}\n".encode() for name in ("OrderedDict", "defaultdict", "Counter")),
    *(f"cnumpy{name}\n".encode() for name in (".core.multiarray\nscalar", "\ndtype", "._core.multiarray\nscalar")),
    *(b"c_codecs\nencode\n", b"\x8c\x02os\x8c\x06system\x93", b"P1\n", b"S'touch executed'\n"),
    *(bytes([operation]) for operation in b"()tRb}]Q0N2suea.\x81\x85\x86\x87\x88"),
    *(b"h\x01", b"q\x01", b"K\x05", b"J\xff\xff\xff\x7f", b"\x8a\x05\x00\xe4\x0b\x54\x02"),
    *(b"X" + struct.pack("<I", len(word)) + word for word in (b"storage", b"f8", b"O", b"touch executed", b"latin1")),
]


def damaged_pickle(chance: random.Random, pickle: bytes) -> bytes:
    """A pickle with some of its operations left out, doubled, moved or replaced, so that most of it still parses."""
    starts = [position for _, _, position in pickletools.genops(pickle)]
    operations = [pickle[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]
    for _ in range(chance.randint(1, 4)):
        at, accident = chance.randrange(len(operations)), chance.random()
        if accident < 0.5:
            operations[at:at] = chance.choices(PICKLED, k=chance.randint(1, 4))
        elif accident < 0.7:
            operations[at] = chance.choice(PICKLED)
        elif accident < 0.85:
            operations.insert(chance.randrange(len(operations)), operations[at])
        else:
            del operations[at : at + chance.randint(1, 3)]
        operations = operations or [b"."]
    return b"".join(operations)


def damaged_zip(chance: random.Random, source: Path, target: Path) -> None:
    """A file of torch.save, its pickle damaged; at times a record of it too is doubled, renamed, packed or missing."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        records = old.namelist()
        victim = chance.choice([chance.choice(records), records[0], None, None])
        for name in records:
            data = damaged_pickle(chance, old.read(name)) if name.endswith("data.pkl") else old.read(name)
            if name != victim:
                new.writestr(name, data)
                continue
            renamed = [name, name.upper(), name.replace("/", "//"), "../" + name, name + "x", "data.pkl", "x/DATA.pkl"]
            for _ in range(chance.choice([0, 1, 1, 2])):
                with warnings.catch_warnings(action="ignore"):  # zipfile's, of two records of one name
                    new.writestr(
                        chance.choice(renamed), data, chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
                    )


def copied(source: Path, folder: Path, name: str | None = None) -> Path:
    target = folder / (name or source.name)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    return target


# ---- The kinds of cases


@kind
def prompt(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    negative = ["--negative", text(chance)] if chance.random() < 0.3 else []
    prompts = [text(chance) for _ in range(chance.randint(1, 2))]
    return samples(seeds, *(word for prompt in prompts for word in ("--prompt", prompt)), *negative)


@kind
def token(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    command = trains(seeds, "out")
    for option, share in (("--token", 0.9), ("--init", 0.3), ("--out", 0.1)):
        if chance.random() < share:
            command[command.index(option) + 1] = text(chance, 3)
    return command


@kind
def option(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    of_both = ["--seed", "--dtype", "--device", "--prediction", "--size", "--vae", "--out", "--steps"]
    of_one = {
        "sample.py": ["--num", "--height", "--width", "--guidance", "--sampler", "--prompts", "--embedding"],
        "train.py": ["--batch", "--lr", "--vectors", "--preview-every", "--save-every", "--templates", "--resume"],
        "tinyldm.lab.world": ["--count", "--size", "--seed", "--out", "--sheet", "--examples"],
    }
    script = chance.choice(list(of_one))
    world = ["tinyldm.lab.world", "--out", "out", "--count", "1"]
    start = {"sample.py": samples(seeds), "train.py": trains(seeds, "out"), "tinyldm.lab.world": world}
    options = of_one[script] + (of_both if script.endswith(".py") else [])
    words = ["ddim", "eps", "v", "float16", "bfloat16", "cpu", str(seeds / "small"), str(folder), "/dev/null"]
    given = []
    for _ in range(chance.randint(1, 3)):
        name, value = chance.choice(options), chance.choice([*NUMBERS, *words, text(chance, 2)])
        # A world of 65,536 pictures and a run of 10,000 steps are no accidents, only long.
        given += [] if name in LONG and is_long(value) else [name, value]
    return [*start[script], *given]


LONG = {"--steps", "--count", "--num", "--batch", "--size", "--height", "--width"}


def is_long(value: str) -> bool:
    with suppress(ValueError):
        return 64 < int(value) < 10**12
    return False


@kind
def image(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    (folder / "pictures").mkdir()
    for number in range(chance.randint(1, 3)):
        source = chance.choice(sorted((seeds / "images").iterdir()))
        suffix = chance.choice([source.suffix, source.suffix, ".png", ".jpg", ".jp2", ".avif", ".tif"])
        data = source.read_bytes()
        data = damaged(chance, data) if chance.random() < 0.8 else data
        (folder / "pictures" / f"{number}{suffix}").write_bytes(data)
    command = trains(seeds, "out")
    command[command.index("--images") + 1] = "pictures"
    return command


@kind
def embedding(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    source = chance.choice(sorted((seeds / "embeddings").iterdir()))
    name = chance.choice([source.name] * 4 + ["with space.pt", "x.safetensors", "x.bin", "x.png"])
    data = source.read_bytes()
    if source.suffix == ".safetensors" and chance.random() < 0.7:
        data = damaged_header(chance, source)
    elif chance.random() < 0.9:
        data = damaged(chance, data)
    (folder / name).write_bytes(data)
    return reads_embedding(chance, name, seeds)


def reads_embedding(chance: random.Random, name: str, seeds: Path) -> list[str]:
    file = chance.choice([name, f"{name}:a", f"{name}:<cat>"]) if chance.random() < 0.5 else name
    init = trains(seeds, "out")
    init[init.index("--init") + 1] = file
    to = chance.choice(["diffusers", "a1111", "kohya", "paper"])
    out = "out.pt" if to in ("a1111", "paper") else "out.safetensors"
    return chance.choice(
        [
            ["tinyldm.formats.embeddings", file],
            ["tinyldm.formats.embeddings", file, "--to", to, "--out", out],
            samples(seeds, "--prompt", "a <cat>", "--embedding", file),
            init,
        ]
    )


@kind
def pickle(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    of_words = [file for file in sorted((seeds / "embeddings").iterdir()) if file.suffix in (".pt", ".bin")]
    source = chance.choice([seeds / "single.ckpt", *chance.choices(of_words, k=5)])
    name = chance.choice([source.name, "x.ckpt", "x.pt"])
    if zipfile.is_zipfile(source):
        damaged_zip(chance, source, folder / name)
    else:
        (folder / name).write_bytes(damaged_old_file(chance, source.read_bytes()))
    if source.name == "single.ckpt" or chance.random() < 0.3:
        pictures = samples(seeds, "--weights", name, "--height", "32", "--width", "32")
        return chance.choice([["tinyldm.formats.checkpoint", name], pictures])
    return reads_embedding(chance, name, seeds)


def damaged_old_file(chance: random.Random, data: bytes) -> bytes:
    """A file of torch.save before PyTorch 1.6, the fourth of its five pickles damaged: the content."""
    file, ends = io.BytesIO(data), []
    for _ in range(4):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    return data[: ends[2]] + damaged_pickle(chance, data[ends[2] : ends[3]]) + data[ends[3] :]


@kind
def metadata(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    small = copied(seeds / "small", folder, "w")
    (small / "model.safetensors").write_bytes(damaged_header(chance, small / "model.safetensors"))
    return chance.choice([["tinyldm.formats.checkpoint", "w"], samples(seeds, "--weights", "w")])


@kind
def configuration(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    target = copied(seeds / "diffusers", folder, "w")
    file = chance.choice(sorted(target.rglob("*.json")))
    if chance.random() < 0.8:
        file.write_text(json.dumps(damaged_json(chance, json.loads(file.read_text()))))
    else:
        file.write_bytes(damaged(chance, file.read_bytes()))
    return chance.choice([["tinyldm.formats.checkpoint", "w"], samples(seeds, "--weights", "w")])


@kind
def checkpoint(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    source = chance.choice([seeds / "single.safetensors", seeds / "single.ckpt"])
    name = chance.choice([source.name, source.name, "x.ckpt", "x.safetensors"])
    (folder / "w").mkdir()
    copied(seeds / "merges.txt", folder / "w")
    header = source.suffix == ".safetensors" and chance.random() < 0.7
    data = damaged_header(chance, source) if header else damaged(chance, source.read_bytes())
    (folder / "w" / name).write_bytes(data)
    vae = ["--vae", f"w/{name}"] if chance.random() < 0.2 else []
    weights = str(seeds / "single.safetensors") if vae else f"w/{name}"
    pictures = samples(seeds, "--weights", weights, *vae, "--height", "32", "--width", "32")
    return chance.choice([["tinyldm.formats.checkpoint", f"w/{name}"], pictures])


@kind
def lines(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    """Text files: templates, prompts, merges."""
    content = "\n".join(chance.choice([text(chance), "a photo of {}", "{}"]) for _ in range(chance.randint(0, 5)))
    data = content.encode(chance.choice(["utf-8"] * 3 + ["utf-16", "utf-8-sig"]), "surrogatepass")
    (folder / "lines.txt").write_bytes(damaged(chance, data) if chance.random() < 0.3 else data)
    small = copied(seeds / "small", folder, "w")
    (small / "merges.txt").write_bytes(damaged(chance, (small / "merges.txt").read_bytes()))
    return chance.choice(
        [
            samples(seeds, "--prompts", "lines.txt"),
            trains(seeds, "out", "--templates", "lines.txt"),
            samples(seeds, "--weights", "w"),
        ]
    )


@kind
def resume(chance: random.Random, folder: Path, seeds: Path) -> list[str]:
    run = copied(seeds / "run", folder)
    files = [file for file in sorted(run.rglob("*")) if file.is_file()]
    file = chance.choice([*files, run / "settings.json", run / "resume.safetensors", run / "loss.csv"])
    accident = chance.random()
    if accident < 0.1:
        file.unlink()
    elif file.suffix == ".json" and accident < 0.8:
        file.write_text(json.dumps(damaged_json(chance, json.loads(file.read_text()))))
    elif file.suffix == ".safetensors" and accident < 0.6:
        file.write_bytes(damaged_header(chance, file))
    elif file.suffix == ".csv" and accident < 0.5:
        file.write_text("\n".join(text(chance) for _ in range(4)), errors="surrogatepass")
    else:
        file.write_bytes(damaged(chance, file.read_bytes()))
    return trains(seeds, "run", "--steps", "3", "--save-every", "1", "--preview-every", "1", "--resume")


# ---- What a command must do


def faults(outcome: Outcome, before: dict[str, str], folder: Path, typed: str = "") -> Iterator[str]:
    """What is wrong with the way that a command ended.

    before: the folder's files when it started, and their hashes. typed: the command, which may be printed as it is.
    """
    said = [line for line in outcome.err.replace("\r", "\n").split("\n") if line.strip()]
    said = [line for line in said if not re.search(r"it/s\]|s/it\]|\?it|%\|", line)]
    rest = [line for line in said if ": warning: " not in line]
    if "Traceback" in outcome.err:
        yield f"a traceback: {said[-1]}"
    elif outcome.status is None:
        yield f"no end after {outcome.seconds:.0f} s"
    elif outcome.status not in (0, 2):
        yield f"status {outcome.status}"
    elif outcome.status == 2 and (len(rest) != 1 or ": error: " not in rest[0]):
        yield f"{len(rest)} lines for one error: {rest[:3]}"
    elif outcome.status == 0 and rest:
        yield f"an error and status 0: {rest[:3]}"
    for line in said:
        if not line.isprintable():
            yield f"not printable: {line!r:.200}"
    if obeyed := {letter for letter in outcome.out if not letter.isprintable()} - {"\n", *typed}:
        yield f"on stdout a terminal would obey {obeyed}: {outcome.out!r:.200}"
    after = hashes(folder)
    if any(re.search(r"(^|/)\.[0-9a-f]{16}", name) for name in after):
        yield f"a temporary file is left: {sorted(set(after) - set(before))}"
    changed = [name for name in before if after.get(name) != before[name]]
    if outcome.status == 2 and changed and " became " not in outcome.err:  # the run went on, and then its loss was NaN
        yield f"an error, and other files than before: {changed}"
    if any(name.endswith("executed") for name in after):
        yield "a file's code was executed"
    for name in set(after) - set(before):
        with suppress(IsADirectoryError):
            if why := why_not_whole(folder / name):
                yield f"{name} is not whole: {why}"
    allowed = MEMORY + 1.5 * sum((folder / name).stat().st_size for name in after)
    if outcome.status == 2 and outcome.memory > allowed:
        yield f"{outcome.memory / 1e6:.0f} MB of memory, {allowed / 1e6:.0f} allowed"


def hashes(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def why_not_whole(file: Path) -> str | None:
    """Why a file that a command wrote can't be read again; None if it can."""
    try:
        if file.suffix == ".png":
            with Image.open(file) as image:
                image.load()
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dictionary
                    tensors.get_tensor(name)
        elif file.suffix == ".json":
            json.loads(file.read_text())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# ---- The command


def made(number: int, seed: int, kinds: list[str], folder: Path, seeds: Path) -> Case:
    """The case of a number: always the same."""
    chance = random.Random(f"{seed}-{number}")
    name = kinds[number % len(kinds)]
    return Case(name, KINDS[name](chance, folder, seeds))


def numbers(options: Namespace) -> Iterator[int]:
    """Of the cases, until the time is over."""
    end = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    number = 0
    while time.monotonic() < end and number < (options.cases or math.inf):
        yield number
        number += 1


def main(arguments: list[str]) -> int:
    options = parse_options(arguments)
    kinds = options.only or list(KINDS)
    found: dict[str, int] = {}
    ends: Counter[tuple[str, int | None]] = Counter()
    with tempfile.TemporaryDirectory() as place, Children() as children:
        seeds = Path(place) / "seeds"
        seeds.mkdir()
        make_seeds(seeds, children)
        cases = numbers(options) if options.case is None else [options.case]
        for number in tqdm(cases, desc="cases", disable=options.quiet):
            folder = Path(place) / f"{options.seed}-{number}"
            folder.mkdir()
            case = made(number, options.seed, kinds, folder, seeds)
            before = hashes(folder)
            outcome = children.run(case.words, folder, seconds=SECONDS)
            ends[case.kind, outcome.status] += 1
            for fault in faults(outcome, before, folder, " ".join(case.words)):
                signature = f"{case.kind}: {re.sub(r'[0-9]+', 'N', fault)[:120]}"
                if signature not in found:
                    found[signature] = number
                    keep(case, outcome, folder, options.out)
                    tqdm.write(f"case {number}, {case.kind}: {cli.printable(fault, 400)}")
            if options.case is not None:
                print(cli.printable(" ".join(case.words)), outcome, sep="\n")
            shutil.rmtree(folder)
    for name in kinds:
        of_kind = [f"{count} x {status}" for (kind, status), count in sorted(ends.items(), key=str) if kind == name]
        print(f"{name}: status {', '.join(of_kind)}")
    print(f"{ends.total()} cases, {len(found)} faults" + f", kept in {options.out}" * bool(found))
    return 1 if found else 0


def keep(case: Case, outcome: Outcome, folder: Path, out: Path) -> None:
    target = out / folder.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)
    report = {"words": case.words, "status": outcome.status, "out": outcome.out, "err": outcome.err}
    (target / "case.json").write_text(json.dumps(report, indent=2))


def parse_options(arguments: list[str]) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=cli.positive, metavar="N", help="how long (default: until Ctrl-C)")
    add("--cases", type=cli.whole_number(1), metavar="N", help="how many (default: as many as there is time for)")
    add("--seed", type=cli.whole_number(0), default=0, metavar="N", help="another seed, other cases (%(default)s)")
    add("--only", action="append", choices=list(KINDS), help="may be given several times (default: all kinds)")
    add("--case", type=cli.whole_number(0), metavar="N", help="this one alone, with all that it says")
    add("--out", type=Path, default=Path("outputs/fuzz"), metavar="DIR", help="where to keep what fails (%(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.run(main)
