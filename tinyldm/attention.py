"""Attention, explained once and used everywhere: in the text encoder, the UNet and the autoencoder.

Every query asks every key "are you what I am looking for?"; the answers, as a softmax, weigh the values:

    attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V            (Attention Is All You Need, arXiv 1706.03762, eq. 1)

In self-attention q, k and v come from the same sequence. In cross-attention q comes from the picture and k, v from
the prompt: this is the one place where words reach the pixels (latent diffusion, arXiv 2112.10752, section 3.3).
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V in `heads` independent heads.

    q: (b, n, heads * d); k and v: (b, m, heads * d). Returns (b, n, heads * d).
    causal: position i sees only the positions up to i (n must equal m).
    """
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    # PyTorch's fused kernel: the same sums without ever storing the (n, m) matrix. See `plain_attention` in the tests.
    # In half precision it keeps the sums in float32, where those of Stable Diffusion 2.1 do not overflow.
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return rearrange(out, "b heads n d -> b n (heads d)")
