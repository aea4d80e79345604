"""CLIP (arXiv 2103.00020): its text encoder, where a new word enters, and the image tower to compare pictures with.

Stable Diffusion reads the text tower's states, one vector per token (CLIPTextEncoder). CLIP itself puts a text and a
picture into one space, one vector each, where a dot product says how well they go together (CLIP, at the end). Both
towers are the same transformer (section 2.4); the text's is causal.

The names are those of Hugging Face's CLIP (`cond_stage_model.transformer.` + these in a Stable Diffusion 1.x file),
so `pre_layrnorm` is their spelling.

The masked lookup, the heart of Textual Inversion (arXiv 2208.01618, section 3 and equation 2): the vocabulary's table
of embeddings stays frozen. A new word's ids start at the table's end; ids below it read the frozen table, ids from it
on read a small parameter of shape (vectors, width). The minimum over v* in equation 2 is a minimum over that
parameter alone: the gradient reaches exactly those rows, the optimiser's state is theirs, nothing has to be copied
back, and every old row is bit for bit what it was.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import nn

from tinyldm.attention import attention
from tinyldm.images import to_tensor


@dataclass(frozen=True)
class CLIPTextConfig:
    """The defaults are those of Stable Diffusion 1.x: OpenAI's ViT-L/14 text tower (123,060,480 parameters).

    Stable Diffusion 2.x, OpenCLIP ViT-H/14: width=1024, layers=24, heads=16, activation="gelu", skip_last=1
    (340,387,840 parameters in the 23 layers that are used).
    """

    vocabulary_size: int = 49408
    length: int = 77  # tokens in a prompt, start and end included
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"  # or "gelu", the exact one
    skip_last: int = 0  # layers left out at the end; 1 is the "penultimate layer" of Stable Diffusion 2.x

    @property
    def used_layers(self) -> int:
        return self.layers - self.skip_last


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The defaults are OpenAI's ViT-L/14 image tower."""

    size: int = 224  # pixels, of the square picture's side
    patch: int = 14  # pixels, of a patch's side
    width: int = 1024
    layers: int = 24
    heads: int = 16
    activation: str = "quick_gelu"  # or "gelu", the exact one


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


# ---- The transformer of both towers


class CLIPAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.heads = config.heads
        self.causal = causal
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, causal: bool):
        super().__init__()
        self.self_attn = CLIPAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, layers: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, causal) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# ---- The text tower


class CLIPTextEmbeddings(nn.Module):
    """The table of token embeddings, with the masked lookup, plus the table of position embeddings."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        """ids: (b, n); vectors: (vectors, width), the rows of ids from the vocabulary's size on. -> (b, n, width)."""
        table = self.token_embedding
        is_old = ids < table.num_embeddings
        x = table(ids.where(is_old, 0))  # a new word reads row 0 here, and `where` below throws it away
        if vectors is not None:
            row = (ids - table.num_embeddings).clamp(min=0)
            # F.embedding is rows of a table, and its gradient adds up over every place a row was read: a word
            # used twice in a prompt learns from both.
            x = torch.where(is_old.unsqueeze(-1), x, F.embedding(row, vectors).to(x.dtype))
        elif not is_old.all():
            raise ValueError(f"id {int(ids.max())} is past the vocabulary of {table.num_embeddings}: pass its vectors")
        return x + self.position_embedding.weight[: ids.shape[1]]


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        # Causal: a token sees the words before it, so the end token is the one that has read the whole prompt.
        self.encoder = CLIPEncoder(config, config.used_layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids, vectors)))


class CLIPTextEncoder(nn.Module):
    """Token ids -> the context that the UNet's cross-attention reads."""

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__()
        self.config = config or CLIPTextConfig()
        self.text_model = CLIPTextTransformer(self.config)

    @property
    def table(self) -> torch.Tensor:
        """The frozen vocabulary's embeddings, (vocabulary_size, width)."""
        return self.text_model.embeddings.token_embedding.weight

    def forward(self, ids: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        """ids: (b, n) with n up to config.length; vectors: (vectors, width), learned. Returns (b, n, width)."""
        return self.text_model(ids, vectors)


# ---- The image tower, and both together


class CLIPVisionEmbeddings(nn.Module):
    """A picture as a sequence: first the class token, then its patches row by row, each with its position."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(config.width**-0.5 * torch.randn(config.width))
        # Stride = kernel: every patch's pixels go through one and the same linear layer.
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + (config.size // config.patch) ** 2, config.width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, size, size) -> (b, 1 + patches, width)."""
        patches = rearrange(self.patch_embedding(pixels), "b width rows columns -> b (rows columns) width")
        first = repeat(self.class_embedding, "width -> b 1 width", b=len(pixels))
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVisionTransformer(nn.Module):
    """A Vision Transformer (arXiv 2010.11929), with one more LayerNorm in front (arXiv 2103.00020, section 2.4)."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width)
        self.encoder = CLIPEncoder(config, config.layers, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, size, size) -> (b, width), the class token's state: it has gathered what the patches show."""
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


@dataclass(frozen=True)
class CLIPConfig:
    """The defaults are openai/clip-vit-large-patch14 (427,616,513 parameters)."""

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection: int = 768  # the width of the space that texts and pictures share

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "CLIPConfig":
        """The sizes of one of OpenAI's checkpoints, such as clip-vit-base-patch32, from its tensors' names and shapes.

        Shapes don't tell the heads, which are 64 wide in all of OpenAI's, nor the activation, QuickGELU in all.
        Raises KeyError with the name of a tensor that is needed and not there.
        """

        def layers(tower: str) -> int:
            prefix = f"{tower}.encoder.layers."
            return 1 + max((int(name.split(".")[3]) for name in shapes if name.startswith(prefix)), default=-1)

        vocabulary_size, text_width = shapes["text_model.embeddings.token_embedding.weight"]
        length, _ = shapes["text_model.embeddings.position_embedding.weight"]
        width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
        positions, _ = shapes["vision_model.embeddings.position_embedding.weight"]
        return cls(
            CLIPTextConfig(vocabulary_size, length, text_width, layers("text_model"), heads=text_width // 64),
            CLIPVisionConfig(math.isqrt(positions - 1) * patch, patch, width, layers("vision_model"), width // 64),
            projection=shapes["visual_projection.weight"][0],
        )


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

    def text_features(self, ids: torch.Tensor, vectors: torch.Tensor | None = None) -> torch.Tensor:
        """Whole prompts, each with its end: ids (b, n), vectors (vectors, width) of new words. -> (b, projection).

        Like image_features of length 1, so that the dot product of two is their cosine.
        """
        # The first end token; those after it are padding. OpenAI's code takes the largest id instead, which is the
        # same until a new word has a larger one.
        is_end = ids == self.config.text.vocabulary_size - 1
        if not is_end.any(dim=1).all():
            raise ValueError("a prompt without its end token, expected ids as Tokenizer makes them: start, text, end")
        at_end = self.text_model(ids, vectors)[torch.arange(len(ids)), is_end.int().argmax(dim=1)]
        return F.normalize(self.text_projection(at_end), dim=-1)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, size, size), as `preprocess` or `normalize` makes them. -> (b, projection), of length 1."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)), dim=-1)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """(n, projection) and (m, projection) -> (n, m), cosine / temperature.

        A softmax over a row says which text goes with the picture, one over a column which picture with the text.
        """
        return self.logit_scale.exp() * image_features @ text_features.T

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.image_features(pixels), self.text_features(ids))


# ---- From a picture to what the image tower reads

# Of red, green and blue over CLIP's training pictures, as shares of full brightness.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """(b, 3, h, w) from [-1, 1], as all of tinyldm has them, to mean 0 and deviation 1 over CLIP's training data."""
    mean, deviation = (rearrange(pictures.new_tensor(rgb), "c -> c 1 1") for rgb in (MEAN, DEVIATION))
    return ((pictures + 1) / 2 - mean) / deviation


def preprocess(images: list[Image.Image], size: int = 224) -> torch.Tensor:
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
