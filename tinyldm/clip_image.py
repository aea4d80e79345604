"""CLIP's image tower, and both towers together: which picture goes with which text (arXiv 2103.00020).

CLIP puts a text and a picture into one space, one vector each, where a dot product says how well they go together.
Both towers are the same transformer (section 2.4); the text's is causal (clip.py). The names are those of Hugging
Face's CLIP, so `pre_layrnorm` is their spelling.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from tinyldm.clip import CLIPEncoder, CLIPTextConfig, CLIPTextTransformer
from tinyldm.images import to_tensor


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The defaults are OpenAI's ViT-L/14 image tower."""

    size: int = 224  # pixels, of the square picture's side
    patch: int = 14  # pixels, of a patch's side
    width: int = 1024
    layers: int = 24
    heads: int = 16
    activation: str = "quick_gelu"  # or "gelu", the exact one


class CLIPVisionEmbeddings(nn.Module):
    """A picture as a sequence: first the class token, then its patches row by row, each with its position."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        # Stride = kernel: every patch's pixels go through one and the same linear layer.
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.size // config.patch) ** 2, config.width)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures, normalized, (b, 3, size, size) -> (b, 1 + patches, width)."""
        patches = rearrange(self.patch_embedding(pictures), "b width rows columns -> b (rows columns) width")
        first = repeat(self.class_embedding, "width -> b 1 width", b=len(pictures))
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929), with one more LayerNorm in front (arXiv 2103.00020, section 2.4)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)
        self.encoder = CLIPEncoder(config, config.layers, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pictures: Tensor) -> Tensor:
        """(b, 3, size, size) -> (b, width), the class token's state: it has gathered what the patches show."""
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pictures)))[:, 0])


@dataclass(frozen=True)
class CLIPConfig:
    """The defaults are openai/clip-vit-large-patch14 (427,616,513 parameters)."""

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection: int = 768  # the width of the space that texts and pictures share


class CLIP(nn.Module):
    """Texts and pictures in one space, where those that belong together are close (arXiv 2103.00020, figure 3)."""

    def __init__(self, config: CLIPConfig | None = None):
        super().__init__()
        self.config = config or CLIPConfig()
        self.text_model = CLIPTextTransformer(self.config.text)
        self.vision_model = CLIPVisionTransformer(self.config.vision)
        self.text_projection = nn.Linear(self.config.text.width, self.config.projection, bias=False)
        self.visual_projection = nn.Linear(self.config.vision.width, self.config.projection, bias=False)
        # The logarithm of 1 / temperature, which training learns; a temperature of 0.07 is where it starts.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_features(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """Whole prompts, each with its end: ids (b, n), vectors (vectors, width) of new words. -> (b, projection).

        Like image_features of length 1, so that the dot product of two is their cosine.
        """
        # The first end token; those after it are padding. OpenAI's code takes the largest id instead, which is the
        # same until a new word has a larger one.
        is_end = ids == self.config.text.vocabulary_size - 1
        if ids.device.type == "cpu" and not is_end.any(dim=1).all():  # on a GPU, a look at it would have to wait
            raise ValueError("a prompt without its end token, expected ids as Tokenizer makes them: start, text, end")
        at_end = self.text_model(ids, vectors)[torch.arange(len(ids), device=ids.device), is_end.int().argmax(dim=1)]
        return F.normalize(self.text_projection(at_end), dim=-1)

    def image_features(self, pictures: Tensor) -> Tensor:
        """(b, 3, size, size), as `preprocess` or `normalize` makes them. -> (b, projection), of length 1."""
        return F.normalize(self.visual_projection(self.vision_model(pictures)), dim=-1)

    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(n, projection) and (m, projection) -> (n, m), cosine / temperature.

        A softmax over a row says which text goes with the picture, one over a column which picture with the text.
        """
        return self.logit_scale.exp() * image_features @ text_features.T

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        return self.logits(self.image_features(pictures), self.text_features(ids))


# ---- From a picture to what the image tower reads

# Of red, green and blue over CLIP's training pictures, as shares of full brightness.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def normalize(pictures: Tensor) -> Tensor:
    """(b, 3, h, w) from [-1, 1], as all of tinyldm has them, to mean 0 and deviation 1 over CLIP's training data."""
    mean, deviation = (rearrange(pictures.new_tensor(rgb), "c -> c 1 1") for rgb in (MEAN, DEVIATION))
    return ((pictures + 1) / 2 - mean) / deviation


def preprocess(images: list[Image.Image], size: int = 224) -> Tensor:
    """Pictures of any size -> (n, 3, size, size): the shorter side resized (bicubic), the middle cropped, normalized.

    Unlike images.square it resizes before it crops, and rounds as CLIP's public preprocessing does: the longer side
    and the crop's corner down.
    """
    squares = []
    for image in images:
        short = min(image.size)
        width, height = (size * side // short for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        squares.append(resized.crop((left, top, left + size, top + size)))
    return normalize(to_tensor(squares))
