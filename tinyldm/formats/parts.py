"""A checkpoint that is open: what it is and where its weights lie, before any of them is read.

Every reader (native.py, single_file.py, diffusers_folder.py) makes a `Checkpoint` of three `Part`s. Loading first
checks that all three fit their files. Then weights are read, cast and put in place one by one, so that there is never
a second copy of them in memory.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyldm import InputError
from tinyldm.autoencoder import AutoencoderConfig
from tinyldm.clip import CLIPTextConfig
from tinyldm.clip_image import CLIPConfig
from tinyldm.formats.hashes import file_sha256
from tinyldm.formats.merges import GET_MERGES, added_words, find_merges, read_merges
from tinyldm.formats.names import Layout
from tinyldm.formats.prediction import Prediction
from tinyldm.formats.untrusted import SAFETENSORS_DTYPES, WeightsFile
from tinyldm.latent_diffusion import Defaults, LatentDiffusion
from tinyldm.schedule import NoiseSchedule
from tinyldm.tokenizer import Tokenizer
from tinyldm.unet import UNetConfig

SCALE = 0.18215  # of Stable Diffusion's latents
# What a file may hold besides what we use, and why it is there.
DROPPED = {
    r"model_ema\.": "the moving average of training, beside the weights themselves",
    r"(.*\.)?position_ids$": "0, 1, 2, …",
    r"betas$|alphas_cumprod|sqrt_|log_one_minus_|posterior_|lvlb_weights$|logvar$": "the noise schedule, computed here",
    r"(.*\.)?(text_projection(\.weight)?|logit_scale)$": "CLIP's comparison with pictures",
    r"(first_stage_model\.)?loss\.": "what the autoencoder was trained against",
    r"v_pred$": "ComfyUI's sign that the model predicts v",
}


class Uninitialised(TorchFunctionMode):
    """Modules that are made in it get no first values. On the meta device there are none to get, but PyTorch would load
    its compiler for them: a second of every start."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **(keywords or {}))


@dataclass(frozen=True)
class Part:
    """One network: its sizes, and where in a file its weights lie."""

    network: Callable[..., nn.Module]  # the class, which takes the configuration
    config: CLIPTextConfig | UNetConfig | AutoencoderConfig | CLIPConfig
    file: WeightsFile
    layout: Layout  # what each of its tensors is called in the file
    keys: Sequence[str]  # of the file, those that are this part's: each is read, or has a reason not to be

    def build(self) -> nn.Module:
        """The network on the meta device, names and shapes without memory. InputError unless it fits the file."""
        try:
            with torch.device("meta"), Uninitialised():
                network = self.network(self.config)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            found = f"{self.where()}: its configuration is not one of ours ({error})"
            raise InputError(f"{found}; copy the checkpoint again") from error
        self.check(network)
        return network

    def check(self, network: nn.Module) -> None:
        """Raises InputError unless the network's tensors are in the file, of its shapes, and nothing unexplained is."""
        for key, tensor in network.state_dict().items():
            source, expected = self.layout(key), tuple(tensor.shape)
            if source.name not in self.file.shapes:
                raise InputError(f"{self.where()} lacks {source.name}; expected a whole checkpoint, copy it again")
            if source.qkv is not None:
                expected = (3 * expected[0], *expected[1:])
            found = self.file.shapes[source.name]
            if found != expected and (*found, 1, 1) != expected:  # a linear layer is our 1x1 convolution
                advice = f"expected {expected} by its configuration; copy it again"
                raise InputError(f"{self.where()}: {source.name} is {str(found)[:60]}, {advice}")
            if (dtype := self.file.dtypes[source.name]) not in SAFETENSORS_DTYPES.values():
                is_fp8 = dtype.lower().startswith(("f8", "float8"))
                advice = "get the fp16 of this fp8 checkpoint" if is_fp8 else "get one that is not quantised"
                advice = f"expected one of {', '.join(SAFETENSORS_DTYPES.values())}; {advice}"
                raise InputError(f"{self.where()}: {source.name} holds {dtype}, {advice}")
        if unknown := [key for key, reason in self.unused(network).items() if reason is None]:
            advice = "expected the weights of its configuration alone; choose the checkpoint of a plain model"
            raise InputError(f"{self.where()} holds {min(unknown)[:100]}, which is not known; {advice}")

    def unused(self, network: nn.Module) -> dict[str, str | None]:
        """The keys that the network does not read, and why they are there; None: nobody knows."""
        used = {self.layout(key).name for key in network.state_dict()}
        reasons = dict(DROPPED)
        if getattr(self.config, "skip_last", 0):
            reasons[rf".*\.resblocks\.{self.config.used_layers}\."] = "the last layer, which 2.x leaves out"
        return {
            key: next((reason for pattern, reason in reasons.items() if re.match(pattern, key)), None)
            for key in self.keys
            if key not in used
        }

    def fill(self, network: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
        """Read the weights, each cast and put in its place before the next is read."""
        state, bounds = {}, []
        for key, expected in network.state_dict().items():
            source = self.layout(key)
            tensor = self.file.read(source.name)
            tensor = tensor if source.qkv is None else tensor.chunk(3)[source.qkv]
            state[key] = moved(tensor.reshape(expected.shape), torch.device(device), dtype)
            bounds.extend(state[key].aminmax())
        finite = torch.stack(bounds).isfinite().view(-1, 2).all(dim=1)  # all at once: a GPU is waited for only here
        if not finite.all():
            advice = "copy it again, or try --dtype bfloat16" if dtype == torch.float16 else "copy it again"
            found = f"holds NaN or infinite values as {str(dtype).removeprefix('torch.')}"
            name = self.layout([*state][int(finite.int().argmin())]).name
            raise InputError(f"{self.where()}: {name} {found}, expected finite ones; {advice}")
        network.load_state_dict(state, strict=True, assign=True)

    def where(self) -> str:
        return ", ".join(str(path) for path in self.file.paths)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor itself if it is of this device and dtype already, perhaps in a mapped file; else a copy.

    A convolution's copy gets its channels last in memory, so that maps need not be moved about before it and behind it;
    not in half precision on a CPU, where loading Stable Diffusion 1.5 would take 2.7 seconds instead of 1.9.
    """
    copy = tensor.to(device, dtype)
    pays = copy is not tensor and (dtype == torch.float32 or device.type != "cpu")
    return copy.to(memory_format=torch.channels_last) if copy.dim() == 4 and pays else copy


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint is, by its headers and configuration; `load` reads the weights."""

    path: Path
    kind: str  # of layout, in words
    files: tuple[Path, ...]  # its own, whatever autoencoder takes the place of its own
    text_encoder: Part
    unet: Part
    autoencoder: Part
    prediction: Prediction
    schedule: NoiseSchedule
    scale: float  # of the autoencoder's latents
    length: int  # ids a prompt, start and end included
    pad: Literal["end", "zero"]  # after the end, see Tokenizer
    defaults: Defaults

    @property
    def parts(self) -> dict[str, Part]:
        return {"text_encoder": self.text_encoder, "unet": self.unet, "autoencoder": self.autoencoder}

    @property
    def merges_file(self) -> Path | None:
        """The tokenizer's, wherever they lie."""
        return find_merges(self.path)

    def tokenizer(self) -> Tokenizer:
        """Words that were saved with the checkpoint (by diffusers' textual_inversion.py) are its placeholders already:
        more rows of the text encoder's table.

        Raises InputError if the merges are missing or of another vocabulary.
        """
        if (merges := self.merges_file) is None:
            raise InputError(f"no merges.txt with {self.path}, and its tokenizer needs one; get it with: {GET_MERGES}")
        tokenizer = Tokenizer(read_merges(merges), length=self.length, pad=self.pad)
        found, expected = tokenizer.vocabulary_size, self.text_encoder.config.vocabulary_size
        if found < expected:
            tokenizer.placeholders = added_words(merges.parent, range(found, expected))
            found += sum(map(len, tokenizer.placeholders.values()))
        if found != expected:
            found = f"{merges} makes a vocabulary of {found}, with the words that were added to it"
            raise InputError(f"{found}, expected {expected} for {self.path}; put its own tokenizer files beside it")
        return tokenizer

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LatentDiffusion:
        """The whole model, frozen, on its device, in this dtype whatever it is on disk.

        Raises InputError if the merges are missing or of another vocabulary, or if weights are missing, unknown,
        misshaped or not finite.
        """
        tokenizer = self.tokenizer()
        networks = {name: part.build() for name, part in self.parts.items()}
        for name, part in self.parts.items():
            part.fill(networks[name], device, dtype)
        model = LatentDiffusion(tokenizer, **networks, schedule=self.schedule, scale=self.scale, defaults=self.defaults)
        return model.to(device)

    def sha256(self) -> str:
        """Which weights a word is for: SHA-256 in hexadecimal, of their file; if there are several, of their hashes."""
        hashes = [file_sha256(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
