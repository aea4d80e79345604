"""Small random Stable Diffusion pipelines of diffusers, and the same weights as single files in their original names.

The original names are written with helpers/reference.py's rules, not with names.py's tables, so that each checks the
other.
"""

import sys
import types
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from conftest import WEIGHTS
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from helpers.reference import autoencoder_name, unet_name
from tinyldm import autoencoder, clip, unet
from tinyldm.formats import merges as merges_files
from tinyldm.formats.names import PREFIXES
from tinyldm.inversion import add_words
from tinyldm.latent_diffusion import LatentDiffusion
from tinyldm.sampler import first_noise
from tinyldm.tokenizer import ALPHABET, END, START


@dataclass(frozen=True)
class Shape:
    """What a pipeline is built of. Stable Diffusion 2.x is the one whose UNet has linear projections."""

    text: clip.CLIPTextConfig
    unet: unet.UNetConfig
    autoencoder: autoencoder.AutoencoderConfig
    size: int  # of the pictures, in pixels

    @property
    def is_2x(self) -> bool:
        return self.unet.linear_projections


SMALL_TEXT = clip.CLIPTextConfig(vocabulary_size=958, width=128, layers=3, heads=2)
SMALL_AUTOENCODER = autoencoder.AutoencoderConfig(channels=(32, 64), blocks=1)
HEADS_2X = {"heads": None, "head_width": 64, "linear_projections": True}
SIZE = 32
KINDS = ("1.x", "2.x")
SHAPES = {
    # Small, but with the heads and groups of the real ones, which a single file does not tell.
    "1.x": Shape(
        SMALL_TEXT,
        unet.UNetConfig(channels=(32, 64), attention=(True, False), blocks=1, context_width=128),
        SMALL_AUTOENCODER,
        SIZE,
    ),
    "2.x": Shape(
        replace(SMALL_TEXT, activation="gelu"),
        unet.UNetConfig(
            channels=(64, 128, 128), attention=(True, True, False), blocks=1, context_width=128, **HEADS_2X
        ),
        SMALL_AUTOENCODER,
        SIZE,
    ),
    # The real ones, for test_full_size.py.
    "1.5": Shape(clip.CLIPTextConfig(), unet.UNetConfig(), autoencoder.AutoencoderConfig(), 512),
    "2.1": Shape(
        clip.CLIPTextConfig(width=1024, layers=23, heads=16, activation="gelu"),
        unet.UNetConfig(context_width=1024, **HEADS_2X),
        autoencoder.AutoencoderConfig(),
        768,
    ),
}
PROMPT = "a photo of a red star"


@cache
def pipeline(kind: str) -> StableDiffusionPipeline:
    """Random weights that float32, float16 and bfloat16 all hold exactly, so that it is the same model in each."""
    shape = SHAPES[kind]
    blocks = ["CrossAttn" * attention for attention in shape.unet.attention]
    levels = len(shape.autoencoder.channels)
    end = shape.text.vocabulary_size - 1
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=shape.size // shape.autoencoder.factor,
            block_out_channels=shape.unet.channels,
            layers_per_block=shape.unet.blocks,
            down_block_types=[f"{block}DownBlock2D" for block in blocks],
            up_block_types=[f"{block}UpBlock2D" for block in reversed(blocks)],
            cross_attention_dim=shape.unet.context_width,
            attention_head_dim=[shape.unet.heads_for(channels) for channels in shape.unet.channels],
            use_linear_projection=shape.unet.linear_projections,
        ),
        "vae": AutoencoderKL(
            block_out_channels=shape.autoencoder.channels,
            layers_per_block=shape.autoencoder.blocks,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=shape.text.vocabulary_size,
                hidden_size=shape.text.width,
                intermediate_size=4 * shape.text.width,
                num_hidden_layers=shape.text.layers,
                num_attention_heads=shape.text.heads,
                hidden_act=shape.text.activation,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        ),
    }
    for seed, part in enumerate(parts.values()):
        fill(part.eval(), seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if shape.is_2x else "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer(merges(shape.text.vocabulary_size), "!" if shape.is_2x else END),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        value = noise / p[0].numel() ** 0.5 if p.ndim > 1 else p.data + 0.1 * noise
        value[value.abs() < 2**-8] = 0  # what is left has 8 digits in float16 too
        p.data = value.bfloat16().float()


def merges(vocabulary_size: int) -> list[tuple[str, str]]:
    """The tiny checkpoint's first, and for the vocabulary of the real ones more, of any two letters."""
    count = vocabulary_size - len(ALPHABET) - 2
    pairs = merges_files.read_merges(WEIGHTS / "merges.txt")[:count]
    known = {"".join(pair) for pair in pairs}
    more = (pair for pair in product(ALPHABET[:256], ALPHABET[256:]) if "".join(pair) not in known)
    return [*pairs, *islice(more, count - len(pairs))]


def tokenizer(merges: list[tuple[str, str]], pad: str) -> CLIPTokenizer:
    """Ours as transformers' class."""
    symbols = [*ALPHABET, *("".join(pair) for pair in merges), START, END]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


def weights_of(model: LatentDiffusion) -> dict[str, Tensor]:
    return {
        prefix + name: tensor
        for part, prefix in PREFIXES.items()
        for name, tensor in getattr(model, part).state_dict().items()
    }


def assert_same_weights(model: LatentDiffusion, kind: str) -> None:
    """Every weight of the model is, bit for bit, the pipeline's."""
    expected, found = in_our_names(kind), weights_of(model)
    assert set(found) == set(expected)
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


# ---- Pictures


@torch.no_grad()
def their_picture(pipe: StableDiffusionPipeline, prompt: str = PROMPT, size: int = SIZE) -> np.ndarray:
    """(h, w, 3) in 0..255: float32, 4 steps of DDIM, guidance 7.5, the noise of seed 0."""
    factor = pipe.vae_scale_factor
    z_T, _ = first_noise((4, size // factor, size // factor), [0])
    out = pipe(
        prompt, latents=z_T, num_inference_steps=4, guidance_scale=7.5, height=size, width=size, output_type="np"
    )
    return 255 * out.images[0]


@torch.no_grad()
def our_picture(model: LatentDiffusion, prompt: str = PROMPT, words: dict[str, Tensor] | None = None, size: int = SIZE):
    *_, z_0 = model.generate([prompt], [0], words=words, sampler="ddim", steps=4, height=size, width=size)
    return 255 * (model.decode(z_0)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()


def with_word(model: LatentDiffusion, words: dict[str, Tensor]) -> dict[str, Tensor]:
    add_words(model, words)
    return words


# ---- Single files


def in_our_names(kind: str, text_model: str = "text_model.") -> dict[str, Tensor]:
    """The pipeline's weights as a single file of 1.x has them. text_model: what some tools leave out of the names."""
    pipe, config = pipeline(kind), SHAPES[kind].unet
    text = {name.removeprefix("text_model."): p for name, p in pipe.text_encoder.state_dict().items()}
    return {
        **originals("model.diffusion_model.", unet.UNet, config, lambda name: unet_name(name, config), pipe.unet),
        **autoencoder_file(kind, "first_stage_model."),
        **{
            f"cond_stage_model.transformer.{text_model}{name}": p
            for name, p in text.items()
            if "position_ids" not in name
        },
    }


def single_file(kind: str, text_model: str = "text_model.") -> dict[str, Tensor]:
    """The pipeline's weights in the names that single files of its kind have."""
    tensors = in_our_names(kind, text_model)
    if not SHAPES[kind].is_2x:
        return tensors
    prefix = f"cond_stage_model.transformer.{text_model}"
    text = {name.removeprefix(prefix): p for name, p in tensors.items() if name.startswith(prefix)}
    others = {name: p for name, p in tensors.items() if not name.startswith(prefix)}
    return others | {f"cond_stage_model.model.{name}": p for name, p in open_clip(text).items()}


def autoencoder_file(kind: str, prefix: str = "") -> dict[str, Tensor]:
    config, vae = SHAPES[kind].autoencoder, pipeline(kind).vae
    levels = len(config.channels)
    return originals(prefix, autoencoder.AutoencoderKL, config, lambda name: autoencoder_name(name, levels), vae)


def originals(prefix, network, config, rename, reference) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = network(config).state_dict()
    theirs = reference.state_dict()
    assert len(ours) == len(theirs)
    return {prefix + name: theirs[rename(name)].reshape(value.shape).contiguous() for name, value in ours.items()}


def open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's CLIP in OpenCLIP's names: fused q, k, v, and one more layer that nobody uses."""
    names = {
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.randn(128, 128),
        "logit_scale": torch.tensor(4.6),
    }
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    layers = 1 + max(int(name.split(".")[2]) for name in text if name.startswith("encoder.layers."))
    for layer in range(layers):
        ours, theirs = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            qkv = [text[f"{theirs}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            names[f"{ours}attn.in_proj_{kind}"] = torch.cat(qkv)
            names |= {f"{ours}{part}.{kind}": text[f"{theirs}{name}.{kind}"] for part, name in parts.items()}
    last = f"transformer.resblocks.{layers - 1}."
    unused = {name: torch.randn_like(tensor) for name, tensor in names.items() if name.startswith(last)}
    names |= {name.replace(last, f"transformer.resblocks.{layers}."): tensor for name, tensor in unused.items()}
    return names


def extras(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training leaves in a file besides the weights."""
    average = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): torch.randn_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    schedule = "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod \
        log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance \
        posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar"
    return average | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1000),
        **{name: torch.rand(1000) for name in schedule.split()},
        "first_stage_model.loss.discriminator.main.0.weight": torch.randn(4, 3, 4, 4),
    }


def save_lightning(
    path: Path, tensors: dict[str, Tensor], steps: int = 470_000, zipped: bool = True, numpy: str = "numpy.core"
) -> None:
    """What the training tool of the original 1.4 file wrapped its weights in, its own class as a key included.

    CheckpointConnector.dump_checkpoint and ModelCheckpoint.on_save_checkpoint of Lightning 1.4, LambdaLR.state_dict of
    PyTorch, whose factors come from LDM's LambdaLinearScheduler and so are NumPy's. numpy: how that calls itself.
    """
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
    instance = callback()
    instance.verbose = True
    rate = np.float64(1e-4)
    monitored = {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.1), "best_model_path": "e.ckpt"}
    group = {"lr": rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "initial_lr": rate}
    moments = {"step": 3, "exp_avg": torch.randn(7), "exp_avg_sq": torch.randn(7)}
    content = {
        "epoch": 7,
        "global_step": steps,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": tensors,
        "callbacks": {callback: monitored | {"current_score": None, "dirpath": "logs"}, "instance": instance},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [group | {"params": [0]}]}],
        "lr_schedulers": [
            {
                "base_lrs": [1e-4],
                "last_epoch": steps,
                "_step_count": steps + 1,
                "verbose": False,
                "_get_lr_called_within_step": False,
                "_last_lr": [rate],
                "lr_lambdas": [{}],
            }
        ],
    }
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].ModelCheckpoint = callback
    scalar = rate.__reduce__()[0]
    modules[f"{numpy}.multiarray"] = types.SimpleNamespace(scalar=scalar)
    named = patch.object(scalar, "__module__", f"{numpy}.multiarray")
    with named, patch.dict(sys.modules, modules):  # where pickle looks whether the class is what it is called
        torch.save(content, path, _use_new_zipfile_serialization=zipped)


def save_folder(path: Path, kind: str, **options: object) -> None:
    """What diffusers writes of the pipeline, with the merges.txt that transformers 5 has no more."""
    pipeline(kind).save_pretrained(path, **options)
    write_merges(path / "tokenizer", kind)


def write_merges(folder: Path, kind: str = "1.x") -> None:
    merges_files.write_merges(folder / "merges.txt", merges(SHAPES[kind].text.vocabulary_size))
