"""Learned embeddings on disk: written for diffusers, read from diffusers, and everything that is not one refused."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tinyldm import InputError
from tinyldm.embeddings import load_embeddings, save_embeddings


def refusal(path, width: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_embeddings(path, width)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 300 + len(str(path))
    return message


# Writing


def test_what_is_saved_is_loaded_again(tmp_path):
    table = torch.nn.Parameter(torch.randn(5, 128))
    embeddings = {"S*": table[:2], "<고양이>": table[2:]}  # views of one parameter, with gradient
    save_embeddings(tmp_path / "e.safetensors", embeddings)
    loaded = load_embeddings(str(tmp_path / "e.safetensors"), width=128)
    assert loaded.keys() == embeddings.keys()
    for token, vectors in loaded.items():
        assert torch.equal(vectors, embeddings[token])
        assert (vectors.dtype, vectors.requires_grad) == (torch.float32, False)
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_the_file_is_float32_safetensors_of_token_and_vectors_and_small(tmp_path):
    path = tmp_path / "e.safetensors"
    save_embeddings(path, {"S*": torch.randn(2, 128, dtype=torch.bfloat16), "T": torch.randn(128)})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert shapes == {"S*": ("F32", [2, 128]), "T": ("F32", [1, 128])}
    assert path.stat().st_size < 3 * 128 * 4 + 300


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    save_embeddings(tmp_path / "e.safetensors", {"S*": torch.ones(1, 8)})
    for bad in ({}, {"S*": torch.full((1, 8), torch.nan)}, {"S*": torch.ones(1, 8), "T": torch.ones(1, 9)}):
        with pytest.raises(InputError):
            save_embeddings(tmp_path / "e.safetensors", bad)
    assert torch.equal(load_embeddings(tmp_path / "e.safetensors")["S*"], torch.ones(1, 8))


def test_several_tokens_come_in_the_same_order_every_time(tmp_path):
    save_embeddings(tmp_path / "e", {f"<{i}>": torch.ones(1, 8) for i in (3, 1, 4, 0, 2)})
    assert all(list(load_embeddings(tmp_path / "e")) == ["<0>", "<1>", "<2>", "<3>", "<4>"] for _ in range(20))


# Reading what diffusers writes


def test_diffusers_safetensors(tmp_path):
    """As save_progress of diffusers' examples/textual_inversion/textual_inversion.py: rows of the whole table."""
    table = torch.nn.Embedding(300, 768).weight
    save_file({"<cat-toy>": table[297:300].detach().cpu()}, tmp_path / "e", metadata={"format": "pt"})
    assert torch.equal(load_embeddings(tmp_path / "e", 768)["<cat-toy>"], table[297:])


@pytest.mark.parametrize("zipped", [True, False])
def test_diffusers_bin_and_that_of_the_concepts_library(tmp_path, zipped):
    table = torch.nn.Embedding(300, 768).weight
    for saved in (table[297:300], table[299], table[297:].detach(), torch.nn.Parameter(table[297:].half())):
        torch.save({"<cat-toy>": saved}, tmp_path / "e.bin", _use_new_zipfile_serialization=zipped)
        loaded = load_embeddings(tmp_path / "e.bin")["<cat-toy>"]
        assert torch.equal(loaded, saved.float().reshape(-1, 768))
        assert loaded.untyped_storage().nbytes() == loaded.numel() * 4, "the whole table stays in memory"
        assert not loaded.requires_grad


def test_the_format_is_told_by_the_content_not_by_the_name(tmp_path):
    save_embeddings(tmp_path / "e.pt", {"S*": torch.ones(1, 8)})
    torch.save({"S*": torch.ones(1, 8)}, tmp_path / "e.safetensors")
    for name in ("e.pt", "e.safetensors"):
        assert torch.equal(load_embeddings(tmp_path / name)["S*"], torch.ones(1, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_comes_out_as_float32(tmp_path, dtype):
    vectors = torch.randn(2, 8, dtype=dtype)
    save_file({"S*": vectors}, tmp_path / "e")
    assert torch.equal(load_embeddings(tmp_path / "e")["S*"], vectors.float())


def test_diffusers_reads_what_we_write(tmp_path):
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "p", "h", "o", "t", "o</w>", "ph", "pho", "phot", "photo</w>"]
    merges = [("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o</w>")]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}  # noqa: RUF012

    pipeline = Pipeline()
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, CLIPTextModel(config)
    old = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    vectors = torch.randn(2, 16)
    save_embeddings(tmp_path / "embedding.safetensors", {"<heart>": vectors})
    pipeline.load_textual_inversion(str(tmp_path), weight_name="embedding.safetensors")

    ids = tokenizer.convert_tokens_to_ids(["<heart>", "<heart>_1"])
    assert ids == [len(old), len(old) + 1]
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[ids], vectors)
    assert torch.equal(table[: len(old)], old)
    assert pipeline.maybe_convert_prompt("a photo <heart>", tokenizer) == "a photo <heart> <heart>_1"


# Refusing


def test_the_wrong_width_says_both_and_what_to_do(tmp_path):
    save_embeddings(tmp_path / "e", {"S*": torch.ones(1, 768)})
    message = refusal(tmp_path / "e", width=128)
    assert "has width 768 (SD 1.x), this model's text encoder takes 128" in message and "--weights" in message


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    assert "no such file" in refusal(tmp_path / "nothing")
    assert "embedding.safetensors" in refusal(tmp_path)


def test_a_file_cut_off_anywhere(tmp_path):
    whole = tmp_path / "whole"
    writers = (
        lambda embeddings: save_file(embeddings, whole),
        lambda embeddings: torch.save(embeddings, whole),
        lambda embeddings: torch.save(embeddings, whole, _use_new_zipfile_serialization=False),
    )
    for write in writers:
        write({"S*": torch.ones(2, 64)})
        content = whole.read_bytes()
        for size in (0, 1, 2, 8, 9, 20, 60, 100, len(content) // 2, len(content) - 1):
            (tmp_path / "cut").write_bytes(content[:size])
            refusal(tmp_path / "cut")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "e.safetensors").write_text("a text file\n" * 100)
    assert "neither" in refusal(tmp_path / "e.safetensors")
    (tmp_path / "e.safetensors").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "e.safetensors")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (Evil(), {"S*": Evil()}):
        torch.save(content, "e.bin")
        assert "plain tensors" in refusal("e.bin")
    assert os.listdir() == ["e.bin"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "no embedding"),
        (torch.ones(1, 8), "no embedding"),
        ([torch.ones(1, 8)], "no embedding"),
        ({"step": 3, "S*": torch.ones(1, 8)}, "str -> int"),
        ({265: torch.ones(1, 8)}, "int -> Tensor"),
        ({"state_dict": {"conv.weight": torch.ones(4, 4, 3, 3)}}, "str -> dict"),
        ({"conv.weight": torch.ones(4, 4, 3, 3)}, "shape (4, 4, 3, 3)"),
        ({"token_embedding.weight": torch.ones(1000, 8)}, "1 to 75 vectors"),
        ({"norm.weight": torch.ones(8), "proj.weight": torch.ones(8, 16)}, "widths [8, 16]"),
        ({"S*": torch.tensor(1.0)}, "shape ()"),
        ({"S*": torch.ones(0, 8)}, "shape (0, 8)"),
        ({"S*": torch.ones(2, 0)}, "shape (2, 0)"),
        ({"S*": torch.ones(2, 8, dtype=torch.int64)}, "torch.int64"),
        ({"S*": torch.tensor([[1.0, torch.nan]])}, "NaN"),
        ({"S*": torch.tensor([[1.0, -torch.inf]])}, "infinite"),
    ],
)
def test_content_that_is_no_embedding(tmp_path, content, complaint):
    torch.save(content, tmp_path / "e.bin")
    assert complaint in refusal(tmp_path / "e.bin")
    if isinstance(content, dict) and all(isinstance(v, torch.Tensor) for v in content.values()) and 265 not in content:
        save_file(content, tmp_path / "e.safetensors")
        assert complaint in refusal(tmp_path / "e.safetensors")


def test_a_whole_checkpoint_is_refused_without_being_read(tmp_path):
    with (tmp_path / "model.ckpt").open("wb") as file:
        file.truncate(4_265_146_304)  # a sparse file: this takes no room
    message = refusal(tmp_path / "model.ckpt")
    assert "4265 MB" in message and "--weights" in message
