"""Embedding files as every tool writes them, in the tools' own structures, and what is said of those that nobody does.

Each as_...(path, vectors) writes vectors, (count, width), under the word NAMED if the tool keeps one.
"""

import base64
import collections
import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import nn

from tinyldm import InputError
from tinyldm.formats.embeddings import load_embeddings, split_word


def refusal(file, width: int | None = None) -> str:
    """What load_embeddings says about a file that it refuses: one line, with the file's name."""
    with pytest.raises(InputError) as caught:
        load_embeddings(file, width)
    message, path = str(caught.value), str(split_word(file)[0])
    assert path in message and message.isprintable() and len(message) < 300 + 2 * len(path)
    return message


def rows(vectors, width=768):
    return torch.randn(vectors, width, generator=torch.Generator().manual_seed(vectors))


def as_diffusers(path, vectors):
    """save_progress of examples/textual_inversion/textual_inversion.py: rows of the whole table."""
    table = nn.Embedding(300, vectors.shape[1]).weight.detach()
    table[280 : 280 + len(vectors)] = vectors
    learned = {"<cat>": table[280 : 280 + len(vectors)].cpu()}
    if path.suffix == ".safetensors":
        save_file(learned, path, metadata={"format": "pt"})
    else:
        torch.save({word: nn.Parameter(vectors) for word, vectors in learned.items()}, path)


def as_siblings(path, vectors, shape=(-1,)):
    """One entry a vector, named as load_textual_inversion names the tokens; a dictionary has any order."""
    names = ["<cat>", *(f"<cat>_{i}" for i in range(1, len(vectors)))]
    content = {name: vector.reshape(shape).clone() for name, vector in zip(names, vectors, strict=True)}
    content = dict(reversed(content.items()))
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)


def as_flat_siblings(path, vectors):
    as_siblings(path, vectors, (1, -1))


def as_paper(path, vectors, word="*"):
    """EmbeddingManager.save of ldm/modules/embedding_manager.py."""
    params = nn.ParameterDict({word: nn.Parameter(vectors, requires_grad=True)})
    torch.save({"string_to_token": {word: torch.tensor(265)}, "string_to_param": params}, path)


def as_paper_of_2022(path, vectors):
    """The same by PyTorch 1.10, whose ParameterDict had no _keys and whose _parameters were an OrderedDict."""
    params = nn.ParameterDict({"*": nn.Parameter(vectors)})
    del params.__dict__["_keys"]
    params.__dict__["_parameters"] = collections.OrderedDict(params._parameters)
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}, path)


def a1111(vectors, name="<cat>"):
    """Embedding.save of modules/textual_inversion/textual_inversion.py."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": name,
        "step": 4999,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5-pruned-emaonly",
    }


def as_a1111(path, vectors):
    torch.save(a1111(vectors.clone().requires_grad_()), path)


def as_a1111_before_pytorch_1_6(path, vectors):
    torch.save(a1111(vectors), path, _use_new_zipfile_serialization=False)


def a1111_json(content):
    return json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode()


def hide(picture, payload):
    """A picture between two borders that carry the bytes' halves, as modules/textual_inversion/image_embedding.py."""
    height = picture.height
    data = np.frombuffer(payload, np.uint8)
    data = np.resize(data, -(-len(data) // (3 * height)) * 3 * height)  # filled up with its own beginning
    x, noise = 0, []
    for _ in data:
        x = (x * 1664525 + 1013904223) % 2**32
        noise.append(x % 255)
    decoration = np.random.default_rng(0).integers(0, 16, data.size, dtype=np.uint8) << 4
    borders = [
        ((half ^ np.array(noise, np.uint8)) & 15 | decoration).reshape(height, -1, 3) for half in (data, data >> 4)
    ]
    black = np.zeros((height, 1, 3), np.uint8)
    return Image.fromarray(np.concatenate([borders[0], black, np.asarray(picture), black, borders[1]], axis=1))


def photograph():
    return Image.fromarray(np.random.default_rng(1).integers(1, 256, (256, 256, 3), dtype=np.uint8))


def as_png_text(path, vectors):
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(a1111_json(a1111(vectors))))
    photograph().save(path, "PNG", pnginfo=info)


def as_png_pixels(path, vectors):
    hide(photograph(), zlib.compress(a1111_json(a1111(vectors)), 9)).save(path, "PNG")


def as_webp_pixels(path, vectors):
    """The same saved again by another program; load_from_file of textual_inversion.py reads .webp too."""
    hide(photograph(), zlib.compress(a1111_json(a1111(vectors)), 9)).save(path, "WEBP", lossless=True)


def as_kohya(path, vectors):
    """save_weights of train_textual_inversion.py."""
    if path.suffix == ".safetensors":
        save_file({"emb_params": vectors}, path, {"ss_output_name": "cat", "ss_learning_rate": "1e-06"})
    else:
        torch.save({"emb_params": vectors.detach().clone().to("cpu")}, path)


def as_onetrainer(path, vectors):
    """StableDiffusionEmbeddingSaver."""
    save_file({"emp_params": vectors}, path)


def as_clip_l(path, vectors):
    """save_embeddings of examples/advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py."""
    save_file({"clip_l": vectors}, path)


def as_list(path, vectors):
    """What ComfyUI takes too: the vectors of all dictionaries together."""
    torch.save([{"<cat>": vectors[:1]}, {"<cat>": vectors[1:]}] if len(vectors) > 1 else [{"<cat>": vectors}], path)


def as_tensor(path, vectors):
    torch.save(vectors, path)


NAMED, UNNAMED = "<cat>", "file-of-cats"  # the word in the file, or the file's name if the tool goes by that
WRITERS = [
    (as_diffusers, ".safetensors", NAMED),
    (as_diffusers, ".bin", NAMED),
    (as_siblings, ".safetensors", NAMED),
    (as_siblings, ".bin", NAMED),
    (as_flat_siblings, ".bin", NAMED),
    (as_paper, ".pt", UNNAMED),
    (as_paper_of_2022, ".pt", UNNAMED),
    (as_a1111, ".pt", UNNAMED),
    (as_a1111_before_pytorch_1_6, ".pt", UNNAMED),
    (as_png_text, ".png", NAMED),
    (as_png_pixels, ".png", NAMED),
    (as_webp_pixels, ".webp", NAMED),
    (as_kohya, ".safetensors", UNNAMED),
    (as_kohya, ".pt", UNNAMED),
    (as_onetrainer, ".safetensors", UNNAMED),
    (as_clip_l, ".safetensors", UNNAMED),
    (as_list, ".pt", NAMED),
    (as_tensor, ".pt", UNNAMED),
]
