"""The published configurations, read from raw JSON, and the exact sizes of the models they describe."""

import json

import pytest
import torch

from gemmascope.config import PRESETS, Gemma4Config
from gemmascope.model.text import HookedGemma4

# Text parameters, ties counted once: the published sizes less the towers, as transformers' classes on `meta` give too.
TEXT_PARAMETERS = {
    "google/gemma-4-E2B": 4_628_569_344,
    "google/gemma-4-E4B": 7_463_013_376,
    "google/gemma-4-12B": 11_907_350_272,
    "google/gemma-4-26B-A4B": 25_233_141_760,
    "google/gemma-4-31B": 30_697_345_280,
}


def raw_text_config(name: str) -> dict:
    """A hub config.json's text part, in the hub's spelling."""
    return {key: value for key, value in PRESETS[name].to_hf().items() if key != "architectures"}


@pytest.mark.parametrize("name", PRESETS)
def test_full_size_parameter_count(name):
    with torch.device("meta"):
        model = HookedGemma4(PRESETS[name])
    assert sum(weight.numel() for weight in model.parameters()) == TEXT_PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_the_raw_json(name):
    raw = json.loads(json.dumps(raw_text_config(name)))
    assert Gemma4Config.from_hf(raw, name) == PRESETS[name]
    whole = {"model_type": "gemma4", "text_config": raw, "vision_config": {}, "dtype": "bfloat16"}
    whole["eos_token_id"] = [1, 106]
    assert Gemma4Config.from_hf(whole, name).eos_token_id == (1, 106)
    assert Gemma4Config.from_hf(whole | {"model_type": "gemma4_unified"}, name).layers == PRESETS[name].layers


@pytest.mark.parametrize("name", PRESETS)
def test_spelling_of_newer_transformers(name, tmp_path):
    """transformers 5.15 and later write `per_layer_config`, keys padded with zeros, for `global_head_dim`."""
    from transformers import Gemma4TextConfig

    raw = {key: value for key, value in raw_text_config(name).items() if key != "model_type"}
    Gemma4TextConfig(**raw).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "global_head_dim" not in saved and "per_layer_config" in saved
    assert Gemma4Config.from_hf(saved, name) == PRESETS[name]


def test_layers_of_e2b():
    layers = PRESETS["google/gemma-4-E2B"].layers
    assert [number for number, layer in enumerate(layers) if layer.kind == "global"] == [4, 9, 14, 19, 24, 29, 34]
    assert {layer.kv_source for layer in layers[15:]} == {13, 14} and layers[15].kv_source == 13
    assert {layer.d_mlp for layer in layers[:15]} == {6144} and {layer.d_mlp for layer in layers[15:]} == {12288}
    assert (layers[4].d_head, layers[4].window, layers[3].d_head, layers[3].window) == (512, None, 256, 512)


def test_layers_of_the_large_ones():
    layers = PRESETS["google/gemma-4-26B-A4B"].layers
    assert (layers[5].n_kv_heads, layers[5].k_is_v, layers[4].n_kv_heads, layers[4].k_is_v) == (2, True, 8, False)
    assert {layer.kv_source for layer in PRESETS["google/gemma-4-E4B"].layers[24:]} == {22, 23}


def test_scalar_that_would_lie_raises():
    cfg = PRESETS["google/gemma-4-26B-A4B"]
    with pytest.raises(AttributeError, match=r"d_head differs.*\[256, 512\].*model.layer\(l\).d_head"):
        _ = cfg.d_head
    with pytest.raises(AttributeError, match="n_kv_heads differs"):
        _ = cfg.n_key_value_heads
    assert cfg.d_mlp == 2112 and PRESETS["google/gemma-4-E4B"].n_key_value_heads == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma3_text"}, "model_type 'gemma3_text'.*did you mean 'gemma4_text'"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*unquantized"),
        ({"layer_types": ["chunked_attention"] * 30}, "layer types \\['chunked_attention'\\]"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
        ({"num_kv_shared_layers": 29}, "No global layer of its own"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "factor": 8.0}}}, "sets {'factor': 8.0}"),
        ({"per_layer_config": {"05": {"head_dim": 512, "sliding_window": 9}}}, "per_layer_config sets sliding_window"),
        ({"top_k_experts": 129}, "129 of 128 experts"),
        ({"hidden_size": None, "moe_intermediate_size": None}, "lacks hidden_size, moe_intermediate_size"),
    ],
)
def test_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Gemma4Config.from_hf(raw_text_config("google/gemma-4-26B-A4B") | change)


def test_what_the_top_level_says():
    text = {key: value for key, value in raw_text_config("google/gemma-4-12B").items() if key != "dtype"}
    whole = {"model_type": "gemma4_unified", "text_config": text, "torch_dtype": "bfloat16", "eos_token_id": None}
    cfg = Gemma4Config.from_hf(whole)
    assert cfg.dtype == "bfloat16" and cfg.eos_token_id == 1
    for setting, said in (
        ({"tie_word_embeddings": False}, "tie_word"),
        ({"quantization_config": {"bits": 4}}, "quantiz"),
    ):
        text.pop("tie_word_embeddings", None)
        with pytest.raises(ValueError, match=said):
            Gemma4Config.from_hf(whole | setting)
    with pytest.raises(ValueError, match="no text_config"):
        Gemma4Config.from_hf({"model_type": "gemma4"})
