"""diffusers' folders of Stable Diffusion 1.x and 2.x: unet, vae, text_encoder, tokenizer, scheduler.

Every part has a config.json beside its weights, so nothing is read off shapes, and any size will do. What a
configuration says must be something that we compute: a setting that we ignore could change every picture unseen.
"""

import json
import warnings
from pathlib import Path

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig, AutoencoderKL
from tinyldm.clip import CLIPTextConfig, CLIPTextEncoder
from tinyldm.files import read_bytes
from tinyldm.formats.configuration import checked
from tinyldm.formats.names import diffusers_autoencoder, diffusers_unet, hugging_face_text
from tinyldm.formats.parts import SCALE, Checkpoint, Part
from tinyldm.formats.prediction import STATED, known_prediction
from tinyldm.formats.recognise import LOADABLE, NO_AUTOENCODER, check_inputs
from tinyldm.formats.untrusted import WeightsFile, open_weights
from tinyldm.latent_diffusion import Defaults
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNet, UNetConfig

# Settings that change what is computed though no weight shows it: what we compute, and so expect.
EXPECTED = {
    "unet": {
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "time_embedding_type": "positional",
        "resnet_time_scale_shift": "default",
        "transformer_layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 1,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    "text_encoder": {"layer_norm_eps": 1e-5},
    "vae": {
        "act_fn": "silu",
        "shift_factor": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "latents_mean": None,
    },
    "scheduler": {"trained_betas": None, "rescale_betas_zero_snr": False},
}
Sizes = tuple[int, ...]
TYPES = {  # of what we read, where it stands
    "in_channels": int,
    "out_channels": int,
    "block_out_channels": Sizes,
    "down_block_types": tuple[str, ...],
    "layers_per_block": int,
    "cross_attention_dim": int,
    "attention_head_dim": int | Sizes,
    "num_attention_heads": int | Sizes | None,
    "use_linear_projection": bool,
    "norm_num_groups": int,
    "sample_size": int | Sizes | None,
    "vocab_size": int,
    "max_position_embeddings": int,
    "hidden_size": int,
    "num_hidden_layers": int,
    "hidden_act": str,
    "latent_channels": int,
    "scaling_factor": float,
    "num_train_timesteps": int,
    "beta_start": float,
    "beta_end": float,
    "beta_schedule": str,
    "prediction_type": str | None,
    "_class_name": str,
}
# diffusers' schedulers that we have, ours by name, and the settings that ours have fixed. Not steps_offset: diffusers'
# own pipeline puts 1 in its place, which is ours.
LEADING = {"timestep_spacing": "leading", "thresholding": False, "clip_sample": False}
LINSPACE = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
DPMPP = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
SCHEDULERS = {
    "DDIMScheduler": ("ddim", LEADING | {"set_alpha_to_one": False}),
    "PNDMScheduler": ("ddim", LEADING | {"set_alpha_to_one": False}),  # what SD 1.x has; ddim is its nearest
    "DDPMScheduler": ("ddpm", LEADING | {"variance_type": "fixed_small"}),
    "EulerDiscreteScheduler": ("euler", LINSPACE),
    "EulerAncestralDiscreteScheduler": ("euler_a", LINSPACE),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", LINSPACE | DPMPP),
}
MAX_JSON_BYTES = 1_000_000  # of a config.json; they have some thousand
WEIGHT_NAMES = [  # the preferred first: whole precision before half, safetensors before pickles
    f"{stem}{ending}"
    for ending in (
        ".safetensors",
        ".safetensors.index.json",
        ".fp16.safetensors",
        ".safetensors.index.fp16.json",
        ".fp16.safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".fp16.bin",
        ".bin.index.fp16.json",
    )
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
]


def read_folder(path: Path, flag: str | None, other: tuple[Part, float] | None = None) -> Checkpoint:
    """Raises InputError if it is the folder of another model, or holds a setting that we don't compute.

    other: an autoencoder and its scale for a folder that has none.

    And KeyError, TypeError, ValueError or AttributeError if a config.json lacks what every one of them has.
    """
    if (path / "text_encoder_2").is_dir():
        what = "a Stable Diffusion 3 or Flux" if (path / "transformer").is_dir() else "an SDXL"
        raise InputError(f"{path} is {what} folder; {LOADABLE}")
    missing = [name for name in ("unet", "vae", "text_encoder", "scheduler") if not (path / name).is_dir()]
    if missing == ["vae"] and other is None:
        raise InputError(f"{path} has no vae folder; {NO_AUTOENCODER}")
    if missing not in ([], ["vae"]):
        raise InputError(f"{path} has no {' and no '.join(missing)} folder; {LOADABLE}, or download it again")

    unet, text_encoder = read_unet(path / "unet"), read_text_encoder(path / "text_encoder")
    autoencoder, scale = other if missing else read_autoencoder_folder(path)
    scheduler = path / "scheduler" / "scheduler_config.json"
    settings = read_json(scheduler, EXPECTED["scheduler"])
    stated = settings.get("prediction_type")
    if stated not in (None, *STATED):
        raise InputError(f"{scheduler}: prediction_type is {stated!r}, expected epsilon or v_prediction; {LOADABLE}")
    prediction = known_prediction(path, STATED.get(stated), scheduler.name, flag)
    try:
        schedule = NoiseSchedule(
            steps=settings.get("num_train_timesteps", 1000),
            beta_start=settings.get("beta_start", 0.0001),  # what diffusers takes where a file leaves them out
            beta_end=settings.get("beta_end", 0.02),
            kind=settings.get("beta_schedule", "linear"),
            prediction=prediction.target,
        )
    except InputError as error:
        raise InputError(f"{scheduler}: {error}") from error
    zero = pads_with_zero(path / "tokenizer", otherwise=unet.config.linear_projections)
    latent_size = read_json(path / "unet" / "config.json").get("sample_size") or 64
    latent_size = latent_size if isinstance(latent_size, int) else min(latent_size)  # [64, 64] of older pipelines
    return Checkpoint(
        path,
        "diffusers folder",
        text_encoder.file.paths + unet.file.paths + (() if missing else autoencoder.file.paths),
        text_encoder,
        unet,
        autoencoder,
        prediction=prediction,
        schedule=schedule,
        scale=scale,
        length=text_encoder.config.length,
        pad="zero" if zero else "end",
        defaults=Defaults(size=latent_size * autoencoder.config.factor, sampler=sampler_of(scheduler, settings)),
    )


def sampler_of(path: Path, settings: dict) -> str:
    """Ours that is, or comes nearest to, a folder's scheduler; what differs is warned of."""
    name = settings.get("_class_name", "DDIMScheduler")
    if name not in SCHEDULERS:
        sampler, ours = Defaults().sampler, {"_class_name": f"one of {', '.join(SCHEDULERS)}"}
    else:
        sampler, ours = SCHEDULERS[name]
    if name in ("DDIMScheduler", "DDPMScheduler"):  # what diffusers takes where a file leaves it out
        settings = {"set_alpha_to_one": True, "clip_sample": True} | settings
    if name == "DPMSolverMultistepScheduler" and settings.get("use_karras_sigmas"):
        sampler, ours = "dpmpp_2m_karras", DPMPP | {"use_karras_sigmas": True}
    other = {setting: settings[setting] for setting in ours if settings.get(setting, ours[setting]) != ours[setting]}
    if other:
        asked = ", ".join(f"{setting} {value!r}" for setting, value in other.items())
        here = ", ".join(f"{ours[setting]!r}" for setting in other)
        warnings.warn(f"{path} asks for {asked}; --sampler {sampler}, the default here, has {here}", stacklevel=2)
    return sampler


def weights_in(path: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} has no weights; expected {WEIGHT_NAMES[0]} or the like, download it again")


def read_json(path: Path, expected: dict | None = None) -> dict:
    """A configuration; raises InputError if a setting in it is not what we compute."""
    try:
        content = json.loads(read_bytes(path, MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no configuration, expected names and values; download it again")
    for name in content.keys() & TYPES.keys():
        try:
            content[name] = checked(TYPES[name], content[name], name)
        except InputError as error:
            raise InputError(f"{path}: {error}; download it again") from error
    for name, value in (expected or {}).items():
        if content.get(name, value) != value:
            raise InputError(f"{path}: {name} is {content[name]!r}, expected {value!r}; {LOADABLE}")
    return content


def read_unet(path: Path) -> Part:
    settings = read_json(path / "config.json", EXPECTED["unet"])
    check_inputs(path, settings["in_channels"], settings["out_channels"])
    channels = settings["block_out_channels"]
    # diffusers' attention_head_dim is the number of heads, a mistake that it keeps for the sake of old files.
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    widths = {n // h for n, h in zip(channels, heads, strict=True)}
    same_number = len(set(heads)) == 1
    if not same_number and len(widths) > 1:
        expected = "expected the same number at every level, or the same width"
        raise InputError(f"{path}: {heads} attention heads for {list(channels)} channels; {expected}")
    config = UNetConfig(
        latent_channels=settings["in_channels"],
        channels=channels,
        attention=tuple(kind.startswith("CrossAttn") for kind in settings["down_block_types"]),
        blocks=settings["layers_per_block"],
        context_width=settings["cross_attention_dim"],
        heads=heads[0] if same_number else None,
        head_width=None if same_number else widths.pop(),
        linear_projections=settings.get("use_linear_projection", False),
        norm_groups=settings.get("norm_num_groups", 32),
    )
    weights = open_weights(weights_in(path))
    return Part(UNet, config, weights, diffusers_unet(config), list(weights.shapes))


def read_text_encoder(path: Path) -> Part:
    settings = read_json(path / "config.json", EXPECTED["text_encoder"])
    config = CLIPTextConfig(
        vocabulary_size=settings["vocab_size"],
        length=settings["max_position_embeddings"],
        width=settings["hidden_size"],
        layers=settings["num_hidden_layers"],  # 2.x folders hold only the 23 that are used
        heads=settings["num_attention_heads"],
        activation=settings["hidden_act"],
    )
    weights = open_weights(weights_in(path))
    return Part(CLIPTextEncoder, config, weights, hugging_face_text("", weights.shapes), list(weights.shapes))


def read_autoencoder_folder(path: Path, weights: WeightsFile | None = None) -> tuple[Part, float]:
    """The autoencoder and the scale of its latents. path: the vae folder, or the whole folder that it is in.

    weights: those to take instead of the folder's own.
    """
    path = path / "vae" if (path / "vae").is_dir() else path
    settings = read_json(path / "config.json", EXPECTED["vae"])
    config = AutoencoderConfig(
        channels=settings["block_out_channels"],
        blocks=settings["layers_per_block"],
        latent_channels=settings["latent_channels"],
        norm_groups=settings.get("norm_num_groups", 32),
    )
    weights = weights or open_weights(weights_in(path))
    layout = diffusers_autoencoder(config, weights.shapes)
    return Part(AutoencoderKL, config, weights, layout, list(weights.shapes)), settings.get("scaling_factor", SCALE)


def pads_with_zero(path: Path, otherwise: bool) -> bool:
    """Whether prompts are filled up with id 0, as in 2.x, whose tokenizer says so by a pad token "!"."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            token = read_json(path / name).get("pad_token")
            if token := token.get("content") if isinstance(token, dict) else token:
                return token == "!"
    return otherwise
