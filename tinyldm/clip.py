"""CLIP's text encoder (arXiv 2103.00020), where a new word enters.

The UNet reads its last states, one vector a token. The names are those of Hugging Face's CLIP
(`cond_stage_model.transformer.` + these in a Stable Diffusion 1.x file), so `load_state_dict` is the loader.
clip_image.py has CLIP's other half, which reads pictures; no diffusion model needs it.

The masked lookup, the heart of Textual Inversion (arXiv 2208.01618, section 3 and equation 2): the vocabulary's table
of embeddings stays frozen. A new word's ids start at the table's end; ids below it read the frozen table, ids from it
on read a small parameter of shape (vectors, width). The minimum over v* in equation 2 is a minimum over that
parameter alone: the gradient reaches exactly those rows, the optimiser's state is theirs, nothing has to be copied
back, and every old row is bit for bit what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyldm.attention import attention


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


class TransformerConfig(Protocol):
    """What the configurations of both towers have."""

    width: int
    heads: int
    activation: str


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


# ---- The transformer, which both of CLIP's towers are


class CLIPAttention(nn.Module):
    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} can't be shared out among {config.heads} heads")
        self.heads = config.heads
        self.causal = causal
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.q_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, self.causal))


class CLIPMLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, 4 * config.width)
        self.fc2 = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    def __init__(self, config: TransformerConfig, causal: bool):
        super().__init__()
        self.self_attn = CLIPAttention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    def __init__(self, config: TransformerConfig, layers: int, causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config, causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """ids: (b, n); vectors: (vectors, width), the rows of ids from the vocabulary's size on. -> (b, n, width)."""
        table = self.token_embedding
        if vectors is None:
            # On a GPU, a look at ids would make every step wait for them.
            if ids.device.type == "cpu" and ids.max() >= table.num_embeddings:
                found = f"id {int(ids.max())} is past the vocabulary of {table.num_embeddings}"
                raise ValueError(f"{found}: pass its vectors")
            x = table(ids)
        else:
            is_old = ids < table.num_embeddings
            x = table(ids.where(is_old, 0))  # a new word reads row 0 here, and `where` below throws it away
            row = (ids - table.num_embeddings).clamp(min=0)
            # F.embedding is rows of a table, and its gradient adds up over every place a row was read: a word
            # used twice in a prompt learns from both.
            x = torch.where(is_old.unsqueeze(-1), x, F.embedding(row, vectors).to(x.dtype))
        return x + self.position_embedding.weight[: ids.shape[1]]


class CLIPTextTransformer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        # Causal: a token sees the words before it, so the end token is the one that has read the whole prompt.
        self.encoder = CLIPEncoder(config, config.used_layers, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(ids, vectors)))


class CLIPTextEncoder(nn.Module):
    """Token ids -> the context that the UNet's cross-attention reads."""

    def __init__(self, config: CLIPTextConfig | None = None):
        super().__init__()
        self.config = config or CLIPTextConfig()
        self.text_model = CLIPTextTransformer(self.config)

    @property
    def table(self) -> Tensor:
        """The frozen vocabulary's embeddings, (vocabulary_size, width)."""
        return self.text_model.embeddings.token_embedding.weight

    def forward(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """ids: (b, n) with n up to config.length; vectors: (vectors, width), learned. Returns (b, n, width)."""
        return self.text_model(ids, vectors)
