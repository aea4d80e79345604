"""Configurations with wrong values: each is one line that names the field, whichever field it is."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import WEIGHTS

from tinyldm import InputError
from tinyldm.clip_image import CLIPConfig
from tinyldm.formats.configuration import CHOICES, shown
from tinyldm.formats.native import METADATA, as_metadata, read_metadata, read_native
from tinyldm.formats.untrusted import open_weights

MODEL, CLIP_FILE = (open_weights(WEIGHTS / name) for name in ("model.safetensors", "clip.safetensors"))


def config_of(weights):
    """As it stands in the file, its digest left out."""
    config = json.loads(weights.metadata[METADATA])
    config.pop("sha256", None)
    return config


def fields_of(config, where=()):
    for name, value in config.items():
        yield (*where, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*where, name))


def parent_of(config, field):
    for name in field[:-1]:
        config = config[name]
    return config


FILES = {"model": (MODEL, lambda weights: read_native(*weights.paths, weights, None))}
FILES["clip"] = (CLIP_FILE, lambda weights: read_metadata(*weights.paths, weights, CLIPConfig))
FIELDS = [(file, field) for file, (weights, _) in FILES.items() for field in fields_of(config_of(weights))]
NOTHING = [None, [], {}, {"x": 1}, [[1]], ["x", None]]
WRONG = {
    bool: [*NOTHING, 0, 1, "true"],
    int: [*NOTHING, "77", "x", True, 1.5, 0, -1, 10**9, 10**400, math.nan, math.inf],
    float: [*NOTHING, "x", True, 0, -1.5, 1e9, 10**400, math.nan, math.inf, -math.inf],
    str: [*NOTHING, 5, 0.5, True],
    list: [None, "x", 5, {}, [[1]], [1.5], [-1], [None], [True, "x"], ["x"] * 1000],
    dict: [None, [], "x", 5, {}, {"x": 1}],
    type(None): ["x", -1, 0, True, 1.5, []],  # heads, beside which head_width stands
}


def refusal(file, config):
    weights, read = FILES[file]
    with pytest.raises(InputError) as caught:
        read(replace(weights, metadata=as_metadata(config)))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600 and str(weights.paths[0]) in message
    return message


@pytest.mark.parametrize("file, field", FIELDS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_wrong_value_is_one_line_that_names_the_field(file, field):
    original = parent_of(config_of(FILES[file][0]), field)[field[-1]]
    for value in [*WRONG[type(original)], *(["zzz"] if field[-1] in CHOICES else [])]:
        if (field[-1], value) == ("skip_last", 0):
            continue
        config = config_of(FILES[file][0])
        parent_of(config, field)[field[-1]] = value
        message = refusal(file, config)
        assert ".".join(field) in message or (field[-1] == "head_width" and "head_width=None" in message)


@pytest.mark.parametrize("file, field", FIELDS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_missing_and_an_unknown_field_are_named(file, field):
    config = config_of(FILES[file][0])
    del parent_of(config, field)[field[-1]]
    assert f"{'.'.join(field)} is missing" in refusal(file, config)
    config = config_of(FILES[file][0])
    parent_of(config, field)["colour\n\x1b"] = "blue"
    assert "colour\\n" in refusal(file, config) and "is unknown, expected " in refusal(file, config)


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("tokenizer", {"length": 33}, "tokenizer.length is 33, expected at most text_encoder.length, 32"),
        ("unet", {"heads": 8}, "unet: heads=8 and head_width=32: expected exactly one of the two"),
        ("schedule", {"beta_start": 0.5}, "schedule: betas must satisfy 0 < beta_start <= beta_end < 1"),
    ],
)
def test_values_that_do_not_go_together_are_refused(section, values, message):
    config = config_of(MODEL)
    config[section] |= values
    assert message in refusal("model", config)


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("text_encoder", {"heads": 7}, "width 128 can't be shared out among 7 heads"),
        ("unet", {"head_width": 14}, "width 160 can't be shared out among 11 heads"),
        ("unet", {"head_width": 1000}, "its configuration is not one of ours"),
        ("unet", {"attention": []}, "unet.attention is [], expected a list of 1 to 10, each true or false"),
        ("unet", {"attention": [True]}, "expected one of each a level"),
        ("autoencoder", {"channels": []}, "autoencoder.channels is [], expected a list of 1 to 10, each"),
        ("unet", {"norm_groups": 7}, "its configuration is not one of ours"),
        ("unet", {"blocks": 11}, "unet.blocks is 11, expected a whole number from 1 to 10)"),
        ("autoencoder", {"channels": [32] * 11}, ", expected a list of 1 to 10, each"),
    ],
)
def test_sizes_that_make_no_network_are_refused_before_a_weight_is_read(section, values, message):
    config = config_of(MODEL)
    config[section] |= values
    with pytest.raises(InputError, match=re.escape(message)):
        read_native(*MODEL.paths, replace(MODEL, metadata=as_metadata(config)), None).load()


# ---- The digest


def test_a_configuration_that_was_changed_is_refused_and_one_without_a_digest_is_read():
    text = MODEL.metadata[METADATA]
    changed = text.replace('"head_width": 32', '"head_width": 16')  # it would load, and draw garbage
    with pytest.raises(InputError, match="its sha256 is another, so it was changed after it was written"):
        read_native(*MODEL.paths, replace(MODEL, metadata={METADATA: changed}), None)
    before = {METADATA: json.dumps(config_of(MODEL))}  # as it was written before there was a digest
    checkpoint = read_native(*MODEL.paths, replace(MODEL, metadata=before), None)
    assert checkpoint.unet.config == read_native(*MODEL.paths, MODEL, None).unet.config


def test_no_flipped_byte_of_the_configuration_goes_unnoticed():
    text, rng = MODEL.metadata[METADATA].encode(), np.random.default_rng(0)
    original = read_native(*MODEL.paths, MODEL, None)
    refused = 0
    for position in rng.integers(len(text), size=300):
        flipped = bytearray(text)
        flipped[position] ^= 1 << rng.integers(7)
        weights = replace(MODEL, metadata={METADATA: flipped.decode()})
        try:
            found = read_native(*MODEL.paths, weights, None)
            assert (found.unet.config, found.defaults) == (original.unet.config, original.defaults)
            assert found.schedule.config() == original.schedule.config()
        except InputError as error:
            assert "its configuration is broken" in str(error)
            refused += 1
    assert refused > 250  # the others were white space


def test_values_of_any_size_and_depth_are_shown_in_a_few_characters():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**10_000, "x" * 10**6, "\x1b[31m\n"):
        assert len(shown(value)) <= 60 and shown(value).isprintable()
