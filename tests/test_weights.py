"""Loading and saving: transformers' checkpoints give its logits, and every bad folder gets one clear error."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemmascope import weights
from gemmascope.config import PRESETS
from gemmascope.model.text import HookedGemma4
from gemmascope.testing import tiny_config, tiny_model
from gemmascope.tokenizer import Gemma4Tokenizer
from gemmascope.weights import hf_name, load, save_pretrained

KINDS = ["12B", "26B-A4B", "E2B"]  # dense, experts, per-layer embeddings with KV sharing


def transformers_model(architecture: str):
    """A tiny model of transformers' own, with its scalars and gains away from 1."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    raw = tiny_config(architecture).to_hf()
    del raw["architectures"], raw["model_type"]
    theirs = Gemma4ForCausalLM(Gemma4TextConfig(**raw, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if "norm" in name or name.endswith(("layer_scalar", "scale")):
                tensor.uniform_(0.5, 1.5)
    return theirs


@torch.no_grad()
def their_logits(theirs, tokens: torch.Tensor) -> torch.Tensor:
    return theirs(tokens, attention_mask=torch.ones_like(tokens)).logits


@torch.no_grad()
def assert_same_logits(model: HookedGemma4, theirs) -> None:
    tokens = torch.randint(3, 101, (2, 17))
    torch.testing.assert_close(model(tokens), their_logits(theirs, tokens), rtol=0, atol=1e-4)


def assert_same_weights(model: HookedGemma4, expected: dict[str, torch.Tensor]) -> None:
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint of the smallest kind, to be damaged."""
    save_pretrained(tiny_model("12B"), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, change) -> None:
    """Rewrites the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Loading


@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("architecture", KINDS)
def test_loads_what_transformers_saves(tmp_path, architecture, shard):
    theirs = transformers_model(architecture)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / weights.INDEX).is_file() == (shard == "50KB")
    model = load(tmp_path)
    assert_same_logits(model, theirs)
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert (model.cfg.device, model.cfg.dtype) == (torch.device("cpu"), torch.float32)
    assert model.cfg.model_name == str(tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", "model.", ""])
def test_every_published_layout_of_names(tmp_path, prefix):
    """Prefixes of multimodal and text-only saves; towers, unused keys and values and a tied lm_head are skipped."""
    model = tiny_model("E2B")
    tensors = {prefix + hf_name(name): tensor for name, tensor in model.state_dict().items()}
    shared = [layer for layer, geometry in enumerate(model.cfg.layers) if geometry.kv_source is not None]
    for layer in shared:
        for part in ("k_proj", "v_proj", "k_norm"):
            tensors[f"{prefix}layers.{layer}.self_attn.{part}.weight"] = torch.randn(8, 3)
    for tower in (
        "vision_tower.std_bias",
        "audio_tower.output_proj.weight",
        "embed_vision.embedding_projection.weight",
    ):
        tensors[f"model.{tower}"] = torch.randn(5)
    tensors["lm_head.weight"] = tensors[prefix + "embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    text = model.cfg.to_hf()
    raw = {"model_type": "gemma4", "text_config": text} if "language_model" in prefix else text
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert shared
    assert_same_weights(load(tmp_path), model.state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_dtype_is_given_by_name_or_object(folder, dtype):
    model, full = load(folder, dtype=dtype), load(folder)
    assert model.cfg.dtype == torch.bfloat16
    assert_same_weights(model, {name: tensor.bfloat16() for name, tensor in full.state_dict().items()})
    save_pretrained(model, folder)  # and the checkpoint's own dtype is the default
    assert load(folder).cfg.dtype == torch.bfloat16
    assert load(folder, dtype="float32").cfg.dtype == torch.float32


def test_tensors_larger_than_one_piece_are_read_whole(folder, monkeypatch):
    expected = load(folder).state_dict()
    monkeypatch.setattr(weights, "_PIECE", 8 * 11)
    assert_same_weights(load(folder), expected)


def test_stop_ids_come_from_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106, 50]}')
    assert load(folder).cfg.eos_token_id == (1, 106, 50)


def test_a_shipped_model_goes_by_its_name(folder, monkeypatch):
    monkeypatch.setattr(weights, "ZOO", folder.parent)
    assert weights.shipped_models() == ["model"]
    assert_same_weights(load("model"), load(folder).state_dict())


def test_a_hub_id_is_found_in_the_local_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    repo = tmp_path / "cache" / "models--someone--gemma-4-tiny"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_same_weights(load("someone/gemma-4-tiny"), load(folder).state_dict())


def test_training_starts_from_a_loaded_model(folder):
    model = load(folder)
    model(torch.randint(3, 101, (2, 9)), return_type="loss").backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    """A checkpoint of more than 1 GB in bfloat16, in four shards, none of whose pages is empty."""
    cfg = tiny_config("E2B", d_model=1024, d_vocab=200_000, d_mlp_narrow=11_000, n_heads=8, dtype="bfloat16")
    folder = tmp_path_factory.mktemp("gigabyte")
    with torch.device("meta"):
        names = {f"model.{hf_name(name)}": tensor.shape for name, tensor in HookedGemma4(cfg).state_dict().items()}
    block = torch.randn(2**20).bfloat16()
    weight_map = {}
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        keys = list(names)[shard::4]
        save_file({k: block.repeat(names[k].numel() // 2**20 + 1)[: names[k].numel()].view(names[k]) for k in keys},
                  folder / file)  # fmt: skip
        weight_map |= dict.fromkeys(keys, file)
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(cfg.to_hf()))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read the Linux way")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_at_most_a_fifth_more_than_the_model(gigabyte, dtype):
    assert sum(file.stat().st_size for file in gigabyte.glob("*.safetensors")) > 1e9
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run([sys.executable, script, gigabyte, dtype], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["held"] > 1e9
    assert measured["taken"] <= 1.2 * measured["held"], measured


# Saving


@pytest.mark.parametrize("max_shard_size", ["5GB", 50_000])
@pytest.mark.parametrize("architecture", KINDS)
def test_transformers_loads_what_we_save(tmp_path, architecture, max_shard_size):
    from transformers import Gemma4ForCausalLM

    model = tiny_model(architecture, eos_token_id=(1, 50))
    save_pretrained(model, tmp_path, max_shard_size=max_shard_size)
    theirs, report = Gemma4ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(model, theirs.eval())
    assert theirs.generation_config.eos_token_id == [1, 50]
    again = load(tmp_path)
    assert_same_weights(again, model.state_dict())
    assert replace(again.cfg, model_name="") == replace(model.cfg, model_name="")


def test_the_tokenizer_is_saved_and_loaded_along(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    model = load(folder)
    assert model.tokenizer is None
    model.tokenizer = Gemma4Tokenizer(Tokenizer(BPE({"<pad>": 0, "<eos>": 1, "<bos>": 2, "a": 3}, [])))
    save_pretrained(model, folder)
    assert load(folder).tokenizer.encode("aa", add_bos=True) == [2, 3, 3]
    assert load(folder, tokenizer=model.tokenizer).tokenizer is model.tokenizer


def test_a_save_replaces_an_earlier_one_and_nothing_else(folder):
    (folder / "model_notes.safetensors").write_text("mine")
    sharded, single = tiny_model("31B", seed=1), tiny_model("12B", seed=2)
    save_pretrained(sharded, folder, max_shard_size="60KB")
    assert_same_weights(load(folder), sharded.state_dict())
    assert not (folder / "model.safetensors").exists()
    save_pretrained(single, folder)
    assert_same_weights(load(folder), single.state_dict())
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model_notes.safetensors",
    ]


def test_an_interrupted_save_leaves_what_was_there(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tiny_model("12B", seed=3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_shard_size_that_is_none(folder):
    with pytest.raises(ValueError, match="huge"):
        save_pretrained(tiny_model("12B"), folder / "new", max_shard_size="huge")


# Bad input


def test_no_such_model(folder, monkeypatch):
    monkeypatch.setattr(weights, "ZOO", folder.parent)
    with pytest.raises(FileNotFoundError, match="No model 'modell': looked in the shipped .*Did you mean 'model'"):
        load("modell")
    with pytest.raises(FileNotFoundError, match=r"Hugging Face hub.*mean 'google/gemma-4-E2B'.*Shipped: model\."):
        load("google/gemma-4-E2b")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        load("./no/such/folder")
    with pytest.raises(ValueError, match="model.safetensors is a file: give the folder"):
        load(folder / "model.safetensors")


def test_bad_config(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for change, error, message in [
        ({"model_type": "gemma3_text"}, ValueError, "'gemma3_text'.*gemma4_text"),
        ({"model_type": "gemma4_assistant"}, ValueError, "'gemma4_assistant'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, ValueError, "quantized.*-unquantized"),
    ]:
        path.write_text(json.dumps(raw | change))
        with pytest.raises(error, match=message):
            load(folder)
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match="In .*model, config.json lacks hidden_size"):
        load(folder)
    path.write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json does not hold a readable JSON object: Expecting value"):
        load(folder)
    path.write_text("[3]")
    with pytest.raises(ValueError, match="config.json does not hold a readable JSON object"):
        load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="No config.json in"):
        load(folder)


def test_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickle only \(pytorch_model.bin\).*save_pretrained\(new_folder\)"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="Neither model.safetensors nor model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        load(folder)


def test_a_damaged_header_is_named(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:30] = b"\xff" * 10
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        load(folder)


def test_a_file_cut_while_it_is_read(folder, monkeypatch):
    """The headers were whole; the end of the file is gone by the time the tensors are read."""

    def cut(model, device, dtype):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    monkeypatch.setattr(weights, "_check_memory", cut)
    with pytest.raises(ValueError, match="model.safetensors ended inside model.*cut while it was read"):
        load(folder)


def test_shards_that_are_not_there(folder):
    save_pretrained(tiny_model("12B"), folder, max_shard_size="60KB")
    gone = sorted(folder.glob("model-*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names files that are not beside it: {gone.name}"):
        load(folder)
    (folder / weights.INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"not beside it: \.\./model.safetensors"):
        load(folder)
    (folder / weights.INDEX).write_text("{}")
    with pytest.raises(FileNotFoundError, match="none at all"):
        load(folder)


def test_all_wrong_tensors_are_named_at_once(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(7, 3)
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.zeros(9)
        tensors["model.layers.2.self_attn.v_proj.weight"] = torch.zeros(2, 2)  # a K=V layer has none
        tensors["model.layers.0.layer_scalar"] = torch.zeros(1, dtype=torch.int8)
        tensors["layers.0.input_layernorm.weight"] = torch.zeros(48)

    edit(folder, change)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert str(error.value).split("\n  ")[1:] == [
        "given twice: model.layers.0.input_layernorm.weight, also layers.0.input_layernorm.weight",
        "missing: layers.3.mlp.up_proj.weight",
        "missing: norm.weight",
        "unexpected: model.layers.2.self_attn.v_proj.weight [2, 2]",
        "wrong dtype: model.layers.0.layer_scalar is I8, which is none of F64, F32, F16, BF16",
        "wrong shape: model.layers.0.mlp.gate_proj.weight is [7, 3], the model's is [40, 48]",
        "wrong shape: model.layers.1.self_attn.q_norm.weight is [9], the model's is [8]",
    ]


def test_quantized_tensors_are_refused(folder):
    edit(folder, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(40, 1)})
    with pytest.raises(ValueError, match="quantized checkpoint.*-qat-q4_0-unquantized"):
        load(folder)


def test_an_unembedding_of_its_own_is_refused(folder):
    edit(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match="lm_head.weight with other values than the embedding"):
        load(folder)


def test_bad_dtype_and_device(folder):
    with pytest.raises(ValueError, match="dtype is 'int8'; .*float32.*bfloat16"):
        load(folder, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='device is "cuda".* sees no GPU'):
            load(folder, device="cuda")


def test_a_model_that_does_not_fit(folder, monkeypatch):
    monkeypatch.setattr(weights, "_free_memory", lambda device: 10**6)
    with pytest.raises(MemoryError, match="model in float32 needs .* on cpu, where .*: no published size"):
        load(folder)
    monkeypatch.setattr(weights, "_free_memory", lambda device: 15 * 10**9)
    with torch.device("meta"):
        large = HookedGemma4(PRESETS["google/gemma-4-E4B"])
    with pytest.raises(MemoryError) as error:
        weights._check_memory(large, torch.device("cpu"), torch.float32)
    assert str(error.value) == (
        "google/gemma-4-E4B in float32 needs 29.9 GB on cpu, where 15.0 GB are free; what fits with dtype='bfloat16': "
        "google/gemma-4-E4B (14.9 GB), google/gemma-4-E2B (9.3 GB)."
    )


def test_free_memory_is_known_on_linux():
    free = weights._free_memory(torch.device("cpu"))
    assert free is None if sys.platform != "linux" else 10**7 < free < 10**14
