"""What the tiny models are: every size, the noise schedule, and the settings stored with the checkpoint."""

from tinyldm.autoencoder import AutoencoderConfig
from tinyldm.clip import CLIPTextConfig
from tinyldm.clip_image import CLIPVisionConfig
from tinyldm.lab.world.captions import TEXT_LENGTH
from tinyldm.lab.world.drawing import SIZE
from tinyldm.lab.world.things import VIEWS
from tinyldm.latent_diffusion import Defaults, Learning
from tinyldm.schedule import NoiseSchedule
from tinyldm.unet import UNetConfig

# ---- The diffusion model

AUTOENCODER = AutoencoderConfig(channels=(32, 48, 96, 128), blocks=1, latent_channels=12, norm_groups=4)
LATENT = (AUTOENCODER.latent_channels, SIZE // 8, SIZE // 8)
TEXT_WIDTH = 128
UNET = UNetConfig(
    latent_channels=AUTOENCODER.latent_channels,
    channels=(96, 160),
    attention=(True, True),
    blocks=1,
    context_width=TEXT_WIDTH,
    heads=None,
    head_width=32,
    norm_groups=16,
)
SCHEDULE = NoiseSchedule(prediction="v")  # at high noise v stays well-conditioned where eps says little about z_0
DEFAULTS = Defaults(
    size=SIZE,
    sampler="ddim",
    sampler_steps=25,
    guidance=4.5,
    object=Learning("thing", recipe="low-variance", steps=75, lr=0.01),  # what captions may call anything
    style=Learning("painting", recipe="low-variance", steps=150, lr=0.01),
    batch=16,
    save_every=50,
    taken_literally=(*VIEWS, "small", "large"),
)


def text_config(vocabulary_size: int) -> CLIPTextConfig:
    """Of the diffusion model's text encoder, and of CLIP's text tower."""
    return CLIPTextConfig(vocabulary_size, TEXT_LENGTH, width=TEXT_WIDTH, layers=3, heads=4)


# ---- The CLIP

VISION = CLIPVisionConfig(size=SIZE, patch=4, width=128, layers=4, heads=4)
PROJECTION = 64
