"""Safetensors to model and back: one rename table, a load that holds no more than the model itself, a save that cannot
leave half a file.

Loading goes in four steps:
1. find the folder: a model shipped with gemmascope, a local folder, or a hub id;
2. hold the headers of its safetensors files against the model built on `meta`, which has shapes and no memory;
   everything wrong is reported here, at once, before anything is allocated;
3. check that the memory is there;
4. allocate each tensor on its device and in its dtype, and fill it in pieces through one small buffer.

Files are read, not mapped into memory: a mapped tensor would change under the model when its file does, and mapped
pages count as memory in use.
"""

import difflib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from gemmascope.config import PRESETS, Gemma4Config
from gemmascope.model.text import HookedGemma4
from gemmascope.tokenizer import Gemma4Tokenizer

ZOO = Path(__file__).parent / "zoo"
INDEX = "model.safetensors.index.json"

# The rename table: our name -> the checkpoint's, without the prefix of the whole model. The first that fits is taken.
_OUTSIDE_BLOCKS = {
    "embed.": "embed_tokens.",
    "ln_final.": "norm.",
    "per_layer.table.": "embed_tokens_per_layer.",
    "per_layer.proj.": "per_layer_model_projection.",
    "per_layer.norm.": "per_layer_projection_norm.",
}
_IN_BLOCK = {
    "attn.": "self_attn.",
    "ln1.": "input_layernorm.",
    "ln1_post.": "post_attention_layernorm.",
    "ln2.": "pre_feedforward_layernorm.",
    "ln2_post.": "post_feedforward_layernorm.",
    "mlp.": "mlp.",
    "layer_scalar": "layer_scalar",
    "ple.gate.": "per_layer_input_gate.",
    "ple.proj.": "per_layer_projection.",
    "ple_ln_post.": "post_per_layer_input_norm.",
    "moe.router.": "router.",
    "moe.": "experts.",
    "dense_ln_post.": "post_feedforward_layernorm_1.",
    "moe_ln_pre.": "pre_feedforward_layernorm_2.",
    "moe_ln_post.": "post_feedforward_layernorm_2.",
}
# Multimodal checkpoints, older saves of them, text-only saves, saves of the bare decoder.
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.|)")
_TOWERS = ("vision_tower.", "vision_embedder.", "audio_tower.", "embed_vision.", "embed_audio.")
_QUANTIZED = (".weight_packed", ".weight_scale", ".weight_scale_2", ".embedding_quantized", ".qweight", ".absmax")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 16 * 2**20  # bytes read at a time


def hf_name(name: str) -> str:
    """The checkpoint's name for one of our parameters or buffers, without the prefix of the whole model."""
    table, prefix, stem = _OUTSIDE_BLOCKS, "", name
    if name.startswith("blocks."):
        _, layer, stem = name.split(".", 2)
        table, prefix = _IN_BLOCK, f"layers.{layer}."
    ours = next(ours for ours in table if stem.startswith(ours))
    return prefix + table[ours] + stem.removeprefix(ours)


def shipped_models() -> list[str]:
    """Names of the models that come with gemmascope."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: Gemma4Tokenizer | None = None,
) -> HookedGemma4:
    """A Gemma 4 with its weights and tokenizer, in eval mode; its parameters can be trained.

    `name_or_path` is a shipped model ("nano-moe"), a folder in Hugging Face layout, or a hub id ("google/gemma-4-E2B"),
    which is downloaded once, unless HF_HUB_OFFLINE is set; `revision` is a branch, tag or commit there. The weights go
    to `device` (the CPU unless told) in `dtype` ("bfloat16" or torch.bfloat16; the checkpoint's own unless told), with
    never more in memory than the model and 16 MiB. `tokenizer` replaces the checkpoint's own. The vision and audio
    towers are left out.

    Raises:
        FileNotFoundError: for no such model, or a folder with files missing.
        ValueError: for an architecture, a format or tensors that are not Gemma 4's text model, every one named.
        MemoryError: if the model would not fit on the device; says what would.
    """
    device = torch.device(device or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device is "{device}", but torch {torch.__version__} sees no GPU: use device="cpu".')
    folder = _find(name_or_path, revision)
    cfg = _config(folder, str(name_or_path))
    dtype = _dtype(dtype or cfg.dtype)
    if tokenizer is None and (folder / "tokenizer.json").is_file():
        tokenizer = Gemma4Tokenizer.from_folder(folder)
    with torch.device("meta"):
        model = HookedGemma4(cfg, tokenizer=tokenizer)
    sources = _match(_stored_tensors(folder), model, folder)
    _check_memory(model, device, dtype)
    _fill(model, sources, device, dtype)
    model.sync_cfg()
    return model.eval()


# 1. The folder


def _find(name_or_path: str | os.PathLike, revision: str | None) -> Path:
    name = str(name_or_path)
    if name in shipped_models():
        return ZOO / name
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds config.json and the safetensors files.")
    looked = [f"the shipped models in {ZOO}", f"the folder {path.absolute()}"]
    cause = None
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.safetensors", "*.jinja"]
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
        except (OSError, ValueError) as error:
            cause = error
            looked.append(f"the Hugging Face hub and its local cache ({str(error).strip().splitlines()[0]})")
    near = difflib.get_close_matches(name, [*shipped_models(), *PRESETS], n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    shipped = ", ".join(shipped_models()) or "none in this installation"
    raise FileNotFoundError(f"No model {name!r}: looked in {'; '.join(looked)}.{guess} Shipped: {shipped}.") from cause


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES.values())
        raise ValueError(f"dtype is {dtype!r}; a model is loaded in one of {names}.")
    return found


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold a readable JSON object: {error}.") from error


def _config(folder: Path, name: str) -> Gemma4Config:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"No config.json in {folder}: a model folder holds config.json and safetensors files.")
    raw = _read_json(path)
    if raw.get("quantization_config"):
        _refuse_quantized(path)
    try:
        cfg = Gemma4Config.from_hf(raw, model_name=name)
    except ValueError as error:
        raise ValueError(f"In {folder}, {error}") from error
    # Instruction-tuned checkpoints name all their stop ids only here.
    generation = folder / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
    return cfg if eos is None else replace(cfg, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)


def _refuse_quantized(path: Path) -> None:
    raise ValueError(
        f"{path} is of a quantized checkpoint, which gemmascope does not compute: load the plain one, such as "
        "google/gemma-4-E2B-it, or for the quantization-aware weights the repository ending in -qat-q4_0-unquantized."
    )


# 2. What the files hold, against what the model needs


class _Stored(NamedTuple):
    """Where one tensor lies."""

    file: Path
    key: str
    """The full name in the file."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""


def _stored_tensors(folder: Path) -> list[_Stored]:
    """Every tensor in the checkpoint, from the headers alone."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return _header(single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ValueError(
                f"{folder} has its weights as pickle only ({', '.join(pickles)}), which can run code when opened; if "
                "you trust it, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) in "
                "transformers writes them as safetensors."
            )
        raise FileNotFoundError(f"Neither model.safetensors nor {INDEX} in {folder}.")
    files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    missing = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{index} names files that are not beside it: {', '.join(missing) or 'none at all'}.")
    return [tensor for file in files for tensor in _header(folder / file)]


def _header(file: Path) -> list[_Stored]:
    try:
        safe_open(file, framework="pt")  # checks the header against itself and against the length of the file
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or damaged ({error}): download or copy it again.") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [_Stored(file, k, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0]) for k, e in entries]


def _match(stored: list[_Stored], model: HookedGemma4, folder: Path) -> dict[str, _Stored]:
    """Our name -> where it is stored; "lm_head" too, where the file holds that copy of the embedding.

    Raises:
        ValueError: naming every tensor that is missing, unexpected, given twice or of another shape.
    """
    wanted = {hf_name(ours): (ours, tuple(tensor.shape)) for ours, tensor in model.state_dict().items()}
    wanted["lm_head.weight"] = ("lm_head", (model.cfg.d_vocab, model.cfg.d_model))
    # Google's own files keep the unused keys and values of layers that read another layer's.
    shared = [layer for layer, geometry in enumerate(model.cfg.layers) if geometry.kv_source is not None]
    unused = {f"layers.{n}.self_attn.{part}.weight" for n in shared for part in ("k_proj", "v_proj", "k_norm")}

    found: dict[str, _Stored] = {}
    problems: list[str] = []
    for tensor in stored:
        if tensor.key.endswith(_QUANTIZED):
            _refuse_quantized(tensor.file)
        key = _PREFIX.sub("", tensor.key)
        if key.startswith(_TOWERS) or key in unused:
            continue
        if key not in wanted:
            problems.append(f"unexpected: {tensor.key} {list(tensor.shape)}")
            continue
        ours, shape = wanted[key]
        if ours in found:
            problems.append(f"given twice: {tensor.key}, also {found[ours].key}")
        elif tensor.shape != shape:
            problems.append(f"wrong shape: {tensor.key} is {list(tensor.shape)}, the model's is {list(shape)}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"wrong dtype: {tensor.key} is {tensor.dtype}, which is none of {', '.join(_DTYPES)}")
        found.setdefault(ours, tensor)
    problems += [f"missing: {key}" for key, (ours, _) in wanted.items() if ours not in found and ours != "lm_head"]
    if problems:
        listed = "\n  ".join(sorted(problems))
        raise ValueError(f"{folder} does not hold the tensors its config.json describes:\n  {listed}")
    return found


# 3. The memory


def _check_memory(model: HookedGemma4, device: torch.device, dtype: torch.dtype) -> None:
    needed, free = _n_values(model) * dtype.itemsize + _PIECE, _free_memory(device)
    if free is None or needed <= free:
        return
    with torch.device("meta"):
        published = {preset: _n_values(HookedGemma4(cfg)) for preset, cfg in PRESETS.items()}
    in_bfloat16 = {name: 2 * n for name, n in ({model.cfg.model_name: _n_values(model)} | published).items()}
    fits = [f"{name} ({size / 1e9:.1f} GB)" for name, size in in_bfloat16.items() if size + _PIECE <= free]
    raise MemoryError(
        f"{model.cfg.model_name} in {str(dtype).removeprefix('torch.')} needs {needed / 1e9:.1f} GB on {device}, where "
        f"{free / 1e9:.1f} GB are free; what fits with dtype='bfloat16': {', '.join(fits) or 'no published size'}."
    )


def _n_values(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def _free_memory(device: torch.device) -> int | None:
    """Bytes that a load may use, or None where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    available = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    container = limit.read_text().strip() if limit.is_file() else "max"
    return available if container == "max" else min(available, int(container))


# 4. The tensors


def _fill(model: HookedGemma4, sources: dict[str, _Stored], device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter and persistent buffer its memory and its values."""
    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    lm_head = sources.pop("lm_head", None)
    size = sum(math.prod(t.shape) * _DTYPES[t.dtype].itemsize for t in sources.values())
    with tqdm(total=size, unit="B", unit_scale=True, disable=size < 2e9, desc="Loading") as progress:
        for ours, tensor in sources.items():
            values = torch.empty(tensor.shape, device=device, dtype=dtype)
            for place, piece in _pieces(tensor, buffer):
                values.view(-1)[place].copy_(piece)
                progress.update(piece.nbytes)
            path, _, leaf = ours.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, leaf, nn.Parameter(values) if leaf in module._parameters else values)
    embed = model.embed.weight.detach().view(-1)
    if lm_head and not all(torch.equal(embed[place], piece.to(embed)) for place, piece in _pieces(lm_head, buffer)):
        raise ValueError(
            f"{lm_head.file} holds {lm_head.key} with other values than the embedding; Gemma 4 ties the two, and "
            "gemmascope has no separate unembedding."
        )


def _pieces(tensor: _Stored, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The values of one stored tensor, flat, in pieces that live in `buffer` until the next is asked for."""
    n_values, room = math.prod(tensor.shape), buffer.view(_DTYPES[tensor.dtype])
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        for start in range(0, n_values, len(room)):
            piece = room[: n_values - start]
            if stream.readinto(piece.view(torch.uint8).numpy()) != piece.nbytes:
                raise ValueError(f"{tensor.file} ended inside {tensor.key}: it was cut while it was read.")
            yield slice(start, start + len(piece)), piece


# Back to files


def save_pretrained(model: HookedGemma4, folder: str | os.PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Writes `model` in Hugging Face layout, which `load` and transformers' Gemma4ForCausalLM read to the same logits.

    `max_shard_size` is in bytes, or a text such as "500MB" (decimal). Everything is written to a hidden folder inside
    `folder` first and moved once it is complete, so an interrupted save leaves no half-written file under a real name.
    An earlier save in the same folder is replaced.

    Raises:
        ValueError: for a `max_shard_size` that is not a size.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        _write(model, draft, max_shard_size)
        written = sorted(path.name for path in draft.iterdir())
        for file in written:
            (draft / file).replace(folder / file)
    finally:
        shutil.rmtree(draft)
    # A single file of an earlier save would be preferred to new shards, and old shards would only lie there.
    for stale in (folder / "model.safetensors", folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if stale.name not in written:
            stale.unlink(missing_ok=True)


def _write(model: HookedGemma4, folder: Path, max_shard_size: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"model.{hf_name(ours)}": tensor for ours, tensor in model.state_dict().items()}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    config = model.cfg.to_hf() | {"dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
