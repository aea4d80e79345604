"""diffusers' folders: every way they are written gives the same networks; what we don't compute is refused."""

import copy
import json
import math
import shutil

import diffusers
import pytest
import torch
from helpers.public import KINDS, assert_same_weights, pipeline, save_folder, with_word, write_merges
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from tinyldm import InputError
from tinyldm.formats.checkpoint import load_checkpoint, open_checkpoint
from tinyldm.formats.embeddings import save_embeddings
from tinyldm.inversion import Batch, add_words, vectors_of
from tinyldm.latent_diffusion import Defaults
from train import inversion_loss


def only_safetensors(path, kind):
    save_folder(path, kind)
    assert not list(path.rglob("*.bin"))


def only_bin(path, kind):
    save_folder(path, kind, safe_serialization=True)
    for file in path.rglob("*.safetensors"):
        name = {"model": "pytorch_model"}.get(file.stem, file.stem)
        torch.save(load_file(file), file.with_name(f"{name}.bin"))
        file.unlink()


def half_variant(path, kind):
    save_folder(path, kind, variant="fp16")
    for file in path.rglob("*.safetensors"):
        assert ".fp16." in file.name
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)


def sharded(path, kind):
    save_folder(path, kind, max_shard_size="300KB")
    assert (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()


def sharded_half_variant(path, kind):
    save_folder(path, kind, variant="fp16", max_shard_size="300KB")
    assert list((path / "unet").glob("*index*fp16*.json")) or list((path / "unet").glob("*fp16*index*.json"))


def old_attention(path, kind):
    """As folders of 2022 spell the autoencoder's attention."""
    save_folder(path, kind)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(file)
    for new, spelling in old.items():
        tensors = {name.replace(new, spelling): tensor for name, tensor in tensors.items()}
    assert "decoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, file)


def old_text_encoder(path, kind):
    """With `text_model.` and the position ids that transformers wrote before version 5."""
    save_folder(path, kind)
    file = path / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)


WAYS = [only_safetensors, only_bin, half_variant, sharded, sharded_half_variant, old_attention, old_text_encoder]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
def test_every_way_a_folder_is_written_gives_the_same_networks(tmp_path, write, kind):
    write(tmp_path, kind)
    assert_same_weights(load_checkpoint(tmp_path), kind)


def test_safetensors_are_preferred_to_pickles_and_whole_precision_to_half(tmp_path):
    save_folder(tmp_path, "1.x")
    unet = tmp_path / "unet"
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never opened")
    assert_same_weights(load_checkpoint(tmp_path), "1.x")


@pytest.mark.parametrize("kind", KINDS)
def test_settings_come_from_the_folders_configurations(tmp_path, kind):
    save_folder(tmp_path, kind)
    model = load_checkpoint(tmp_path)
    assert model.schedule.prediction == {"1.x": "eps", "2.x": "v"}[kind]
    assert model.tokenizer.pad == {"1.x": "end", "2.x": "zero"}[kind]
    assert model.defaults.size == 32 and model.scale == 0.18215
    torch.testing.assert_close(model.schedule.alphas_cumprod, pipeline(kind).scheduler.alphas_cumprod)


@pytest.mark.parametrize("sample_size, size", [([32, 32], 64), ([32, 48], 64), (24, 48), (None, 128)])
def test_the_size_of_pictures_may_be_height_and_width(tmp_path, sample_size, size):
    """UNet2DConditionModel takes int or (height, width), of latents; Defaults has a square, which fits into both."""
    save_folder(tmp_path, "1.x")
    change(tmp_path / "unet" / "config.json", sample_size=sample_size)
    assert open_checkpoint(tmp_path).defaults.size == size


@pytest.mark.parametrize("stated, expected", [("epsilon", "eps"), ("v_prediction", "v"), (None, "v")])
def test_the_scheduler_says_what_is_predicted_and_only_if_it_does_not_the_flag(tmp_path, stated, expected):
    save_folder(tmp_path, "1.x")
    change(tmp_path / "scheduler" / "scheduler_config.json", prediction_type=stated)
    assert load_checkpoint(tmp_path, prediction="v" if stated is None else None).schedule.prediction == expected
    if stated == "epsilon":
        with pytest.raises(InputError, match=r"contradicts .*scheduler_config\.json states eps"):
            load_checkpoint(tmp_path, prediction="v")


# ---- The scheduler

# scheduler_config.json as the public folders have it: of 1.4 and 1.5, of 2.1, and of 2.1-base.
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PUBLIC = [
    {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, **SD},
    {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, **SD},
    {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", "trained_betas": None, "steps_offset": 1, **SD},
]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("settings", PUBLIC)
def test_the_schedulers_of_the_public_folders_are_ddim_without_a_word(tmp_path, settings):
    save_folder(tmp_path, "1.x")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert open_checkpoint(tmp_path).defaults == Defaults(size=32)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "scheduler, options, sampler",
    [
        ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}, "ddim"),
        ("DDPMScheduler", {"clip_sample": False}, "ddpm"),
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_a"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, "dpmpp_2m_karras"),
    ],
)
def test_a_folders_scheduler_is_the_default_sampler(tmp_path, scheduler, options, sampler):
    """Written by its own save_pretrained; test_sampler.py compares each of these samplers with that scheduler."""
    save_folder(tmp_path, "1.x")
    getattr(diffusers, scheduler)(**SD, **options).save_pretrained(tmp_path / "scheduler")
    assert open_checkpoint(tmp_path).defaults.sampler == sampler


@pytest.mark.parametrize(
    "scheduler, options, message",
    [
        ("HeunDiscreteScheduler", {}, "asks for _class_name 'HeunDiscreteScheduler'; --sampler ddim, the default here"),
        ("DDIMScheduler", {"clip_sample": False}, "asks for set_alpha_to_one True; --sampler ddim, .*, has False"),
        ("DDPMScheduler", {}, "asks for clip_sample True; --sampler ddpm, the default here, has False"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "asks for timestep_spacing 'trailing'; .* euler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "asks for use_karras_sigmas True; --sampler euler"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "asks for solver_order 3; --sampler dpmpp_2m, .* has 2"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "asks for algorithm_type 'sde-dpm"),
    ],
)
def test_what_no_sampler_here_does_is_said_in_one_line(tmp_path, scheduler, options, message):
    save_folder(tmp_path, "1.x")
    getattr(diffusers, scheduler)(**SD, **options).save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match=message) as warned:
        open_checkpoint(tmp_path)
    assert len(warned) == 1 and "scheduler_config.json" in str(warned[0].message)
    assert "\n" not in str(warned[0].message)


# ---- What we don't compute


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


NUMBERS = ("64", True, 0, -1, 1.5, math.nan, {"x": 1})
WRONG_TYPES = [
    ("unet/config.json", "block_out_channels", ("64", [64, "x"], [[64]], [-1, 64])),
    ("unet/config.json", "down_block_types", ("CrossAttnDownBlock2D", [1], 5)),
    ("unet/config.json", "attention_head_dim", ("8", [8, None], 0)),
    ("unet/config.json", "use_linear_projection", (1, "true", None)),
    ("unet/config.json", "sample_size", ("64", [64, "64"], 0)),
    ("unet/config.json", "cross_attention_dim", NUMBERS),
    ("vae/config.json", "norm_num_groups", NUMBERS),
    ("vae/config.json", "scaling_factor", ("0.18215", True, 0, math.nan, None)),
    ("text_encoder/config.json", "vocab_size", NUMBERS),
    ("text_encoder/config.json", "num_attention_heads", ("8", 0, math.inf)),
    ("text_encoder/config.json", "hidden_act", (5, None, ["gelu"])),
    ("scheduler/scheduler_config.json", "beta_start", ("x", None, math.nan, True)),
    ("scheduler/scheduler_config.json", "num_train_timesteps", NUMBERS),
    ("scheduler/scheduler_config.json", "prediction_type", (5, ["epsilon"], {"x": 1})),
]


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time', expected None"),
        ("unet/config.json", {"act_fn": "mish"}, "act_fn is 'mish', expected 'silu'"),
        ("unet/config.json", {"resnet_skip_time_act": True}, "resnet_skip_time_act is True, expected False"),
        ("unet/config.json", {"attention_head_dim": [3, 8]}, "expected the same number at every level"),
        ("unet/config.json", {"block_out_channels": None}, "block_out_channels is None, expected a list"),
        ("unet/config.json", {"block_out_channels": [64, 64]}, r"is \(.*\), expected \(.*\) by its configuration"),
        (
            "unet/config.json",
            {"layers_per_block": 11},
            r"layers_per_block is 11, expected a whole number from 1 to 10\b",
        ),
        (
            "text_encoder/config.json",
            {"hidden_act": "swish"},
            "hidden_act is 'swish', expected one of quick_gelu, gelu",
        ),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, "lacks .*layers.3"),
        ("text_encoder/config.json", {"num_hidden_layers": 2}, "holds .*layers.2.*, which is not known"),
        *((file, {name: value}, f"{name} is .*, expected ") for file, name, values in WRONG_TYPES for value in values),
        ("unet/config.json", {"attention_head_dim": 7}, "width 32 can't be shared out among 7 heads"),
        ("vae/config.json", {"latent_channels": 16}, "makes latents of 16 channels, expected 4"),
        ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv is False, expected True"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "expected epsilon or v_prediction"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "unknown kind of schedule 'sigmoid'"),
    ],
)
def test_a_setting_that_we_do_not_compute_is_refused(tmp_path, file, values, message):
    save_folder(tmp_path, "1.x")
    change(tmp_path / file, **values)
    refused(tmp_path, message)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000, '"text"'])
def test_a_configuration_that_is_none_is_refused(tmp_path, content):
    save_folder(tmp_path, "1.x")
    (tmp_path / "unet" / "config.json").write_text(content)
    refused(tmp_path, r"unet.config\.json")


@pytest.mark.parametrize(
    "folders, message",
    [
        (("unet", "vae", "text_encoder", "text_encoder_2", "scheduler"), "is an SDXL folder"),
        (("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"), "Stable Diffusion 3 or Flux folder"),
        (("transformer", "vae", "text_encoder", "scheduler"), "has no unet folder"),
        (("unet",), "has no vae and no text_encoder and no scheduler folder"),
    ],
)
def test_folders_of_other_models_are_told_apart(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, message)


def test_a_text_encoder_of_another_model_is_refused(tmp_path):
    """Each part fits its own files; together they would end in a matrix product of 64 by 128."""
    save_folder(tmp_path, "1.x")
    shutil.rmtree(tmp_path / "text_encoder")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=958, hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(tmp_path / "text_encoder")
    refused(tmp_path, "its text encoder is 64 wide, and its UNet reads 128")


def test_a_part_without_its_weights_is_named(tmp_path):
    save_folder(tmp_path, "1.x")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(tmp_path, "vae has no weights; expected diffusion_pytorch_model.safetensors or the like, download it again")


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# ---- Folders of diffusers' textual_inversion.py with --save_as_full_pipeline: the learned words are in the model

WORDS = ["<cat>", "<cat>_1", "<cat>_2", "<dog>"]  # placeholder_token with --num_vectors 3, and another run's


@pytest.fixture(params=["transformers 4", "transformers 5"])
def with_words(tmp_path, request):
    """main() of that script: tokenizer.add_tokens, text_encoder.resize_token_embeddings, and at its end
    StableDiffusionPipeline.save_pretrained. transformers 4's PreTrainedTokenizer.save_pretrained (_save_pretrained)
    wrote the added words to added_tokens.json, beside vocab.json and merges.txt."""
    pipe = copy.deepcopy(pipeline("1.x"))
    assert pipe.tokenizer.add_tokens(WORDS) == len(WORDS)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    with torch.no_grad():
        rows = torch.randn(len(WORDS), 128, generator=torch.Generator().manual_seed(3))
        pipe.text_encoder.get_input_embeddings().weight[-len(WORDS) :] = rows
    pipe.save_pretrained(tmp_path)
    if request.param == "transformers 4":
        (tmp_path / "tokenizer" / "tokenizer.json").unlink()
        write_merges(tmp_path / "tokenizer")
        ids = {word: 958 + i for i, word in enumerate(WORDS)}
        (tmp_path / "tokenizer" / "added_tokens.json").write_text(json.dumps(dict(sorted(ids.items(), reverse=True))))
    return tmp_path, pipe


PROMPTS = ["a photo of a <cat> on a blue background", "a <dog> and a <cat>", "a red star"]


def test_learned_words_that_were_saved_with_the_model_are_words(with_words):
    path, pipe = with_words
    model = load_checkpoint(path)
    assert model.tokenizer.placeholders == {"<cat>": [958, 959, 960], "<dog>": [961]}
    converted = pipe.maybe_convert_prompt(PROMPTS, pipe.tokenizer)  # <cat> -> <cat> <cat>_1 <cat>_2
    ids = pipe.tokenizer(converted, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(model.tokenizer(PROMPTS), ids)
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(model.context(PROMPTS), expected, rtol=1e-4, atol=1e-4)
        # And beside a word that is learned now, whose vectors come after them.
        star = model.text_encoder.table[model.tokenizer.encode("star")]
        words = with_word(model, {"S*": star})
        torch.testing.assert_close(model.context(["a red S*"], words)[0], expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_words", ["transformers 5"], indirect=True)
def test_such_a_checkpoint_learns_another_word_and_draws_both(run, with_words):
    path, _ = with_words
    model = load_checkpoint(path)
    vectors = vectors_of(model, "red star").requires_grad_()
    words = with_word(model, {"S*": vectors})
    latents = torch.zeros(1, 4, 8, 8)
    inversion_loss(model, Batch(latents, latents + 1, torch.tensor([5]), ["a <cat> beside a S*"]), words).backward()
    assert vectors.grad.abs().sum() > 0 and model.text_encoder.table.grad is None
    with pytest.raises(InputError, match='"<cat>" is already a placeholder'):
        add_words(model, {"<cat>": vectors})

    save_embeddings(path / "word.safetensors", {"S*": vectors.detach()})
    options = ["--weights", path, "--embedding", path / "word.safetensors", "--steps", 1, "--guidance", 1]
    outcome = run("sample.py", "--prompt", "a <cat> beside a S*", *options)
    assert outcome.status == 0 and "warning" not in outcome.err
    assert "words of its own (and their vectors): <cat> (3), <dog> (1)" in run("tinyldm.formats.checkpoint", path).out
    assert run("tinyldm.formats.embeddings", path / "word.safetensors", "--weights", path).status == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "makes a vocabulary of 958, with the words that were added to it, expected 962"),
        (
            {"<cat>": 958, "<cat>_1": 959},
            "makes a vocabulary of 960, with .* expected 962 for .* put its own tokenizer",
        ),
        ({"": 958, "a": 959, "b": 960, "c": 961}, "makes a vocabulary of 961"),
        ([1], "added_tokens.json is no list of added words"),
        ({"<cat>": [1]}, "added_tokens.json is no list of added words"),
    ],
)
@pytest.mark.parametrize("with_words", ["transformers 4"], indirect=True)
def test_rows_without_words_are_refused(with_words, content, message):
    path, _ = with_words
    file = path / "tokenizer" / "added_tokens.json"
    file.unlink() if content is None else file.write_text(json.dumps(content))
    refused(path, message)


def test_a_configuration_of_any_length_is_refused_before_it_is_parsed(tmp_path):
    save_folder(tmp_path, "1.x")
    (tmp_path / "unet" / "config.json").write_text("[" + "0," * 600_000 + "0]")
    with pytest.raises(InputError, match=r"unet/config.json can't be read \(it has more than 1000000 bytes\)"):
        open_checkpoint(tmp_path)
