"""What is measured: each row makes its variants, ours and its peers, of the same inputs."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gemmascope_kernels import checked
from gemmascope_kernels.mask import Mask
from torch import Tensor
from torch.nn import functional as F

Variants = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One comparison. `build` makes the variants, "gemmascope" first; each is timed, or returns its own figure."""

    name: str
    wanted: str
    build: Callable[[], Variants]
    shape: str
    dtype: str
    mode: str = "forward"
    needs: str = "cpu"
    unit: str = "ms"


def _by(device: str) -> str:
    return "triton" if device == "cuda" else "cpu"


def _quiet(run: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(run)


# Attention


def _qkv(device: str, dtype: str, n_queries: int, n_keys: int, heads: tuple[int, int], width: int) -> list[Tensor]:
    """q, k, v [1, position, head, width] whose scores spread as those of normed queries and keys do."""
    sizes = (n_queries, heads[0]), (n_keys, heads[1]), (n_keys, heads[1])
    made = [torch.randn(1, pos, n, width, device=device) for pos, n in sizes]
    made[0] *= 3 * width**-0.5
    return [x.to(getattr(torch, dtype)) for x in made]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=1.0, enable_gqa=True
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """torch's own windowed flash kernel (FA2), which SDPA does not reach."""
    n = q.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, n, n, 0.0, True, False, scale=1.0, window_size_left=window - 1, window_size_right=0
    )[0]


def attention(device: str, dtype: str, n: int, window: int | None, heads: tuple[int, int], width: int) -> Variants:
    q, k, v = _qkv(device, dtype, n, n, heads, width)
    mask = Mask(n, n, q.device, window=window)
    variants = {
        "gemmascope": lambda: checked.attention(q, k, v, mask, by=_by(device)),
        "SDPA, causal": lambda: _sdpa(q, k, v),
    }
    if window is not None and device == "cpu":
        variants["SDPA, sliding mask"] = lambda: _sdpa(q, k, v, mask.visible[:, None])
    if window is not None and device == "cuda":
        variants["aten._flash_attention_forward"] = lambda: _flash(q, k, v, window)
    return {name: _quiet(run) for name, run in variants.items()}


def attention_backward(
    device: str, dtype: str, n: int, window: int | None, heads: tuple[int, int], width: int, only: bool = False
) -> Variants:
    """Forward and backward, or the backward alone."""
    qkv = [x.requires_grad_() for x in _qkv(device, dtype, n, n, heads, width)]
    mask, pull = Mask(n, n, qkv[0].device, window=window), torch.randn_like(qkv[0])

    def both(run: Callable[..., Tensor]) -> Callable[[], Any]:
        if not only:
            return lambda: torch.autograd.grad(run(*qkv), qkv, pull)
        z = run(*qkv)
        return lambda: torch.autograd.grad(z, qkv, pull, retain_graph=True)

    return {
        "gemmascope": both(lambda q, k, v: checked.attention(q, k, v, mask, by=_by(device))[0]),
        "SDPA, causal": both(lambda q, k, v: _sdpa(q, k, v).transpose(1, 2)),
    }


def decode(device: str, dtype: str, n_keys: int, heads: tuple[int, int], width: int) -> Variants:
    q, k, v = _qkv(device, dtype, 1, n_keys, heads, width)
    mask = Mask(1, n_keys, q.device)
    return {
        "gemmascope": _quiet(lambda: checked.attention(q, k, v, mask, by=_by(device))),
        "SDPA with GQA": _quiet(lambda: _sdpa(q, k, v, causal=False)),
    }


# Mixture of experts, at the size of 26B-A4B

D_MODEL, D_EXPERT, N_EXPERTS, SLOTS = 2816, 704, 128, 8


def _mixture(device: str, dtype: str, n: int) -> tuple[Iterator[tuple[Tensor, Tensor, Tensor]], Tensor, Tensor]:
    """Endless (x, indices, weights), so that a small T does not meet the same experts again; and the weights."""
    kind = getattr(torch, dtype)
    gate_up = torch.empty(N_EXPERTS, 2 * D_EXPERT, D_MODEL, dtype=kind, device=device).normal_(0, 0.02)
    down = torch.empty(N_EXPERTS, D_MODEL, D_EXPERT, dtype=kind, device=device).normal_(0, 0.02)

    def draws() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            weights, indices = torch.rand(n, N_EXPERTS, device=device).topk(SLOTS)
            yield torch.randn(n, D_MODEL, device=device).to(kind), indices, weights

    kept = draws()
    ring = [next(kept) for _ in range(16)]

    def rotate() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            yield from ring

    return rotate(), gate_up, down


def experts(device: str, dtype: str, n: int) -> Variants:
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    inputs, gate_up, down = _mixture(device, dtype, n)

    def theirs(name: str) -> Callable[[], Any]:
        cfg = Gemma4TextConfig(
            hidden_size=D_MODEL,
            moe_intermediate_size=D_EXPERT,
            num_experts=N_EXPERTS,
            top_k_experts=SLOTS,
            enable_moe_block=True,
            experts_implementation=name,
        )
        with torch.device("meta"):
            module = Gemma4TextExperts(cfg)
        module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w, requires_grad=False) for w in (gate_up, down))
        return lambda: module(*next(inputs))

    variants = {"gemmascope": lambda: checked.experts(*next(inputs), gate_up, down, by=_by(device))}
    # batched_mm copies the weights of every assignment: 95 MB a token.
    for name in ("eager", "grouped_mm", *(("batched_mm",) if n == 1 else ())):
        variants[f"transformers {name}"] = theirs(name)
    if device == "cuda":
        variants["F.grouped_mm, both products"] = partial(_grouped_mm, inputs, gate_up, down)
    return {name: _quiet(run) for name, run in variants.items()}


def _grouped_mm(inputs: Iterator[tuple[Tensor, Tensor, Tensor]], gate_up: Tensor, down: Tensor) -> Tensor:
    """The two products alone, on rows that are already sorted."""
    x, indices, _ = next(inputs)
    order = indices.flatten().argsort()
    offsets = indices.flatten().bincount(minlength=N_EXPERTS).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // SLOTS], gate_up.mT, offs=offsets).chunk(2, dim=-1)
    return F.grouped_mm(F.gelu(gate, approximate="tanh") * up, down.mT, offs=offsets)


def router(device: str, dtype: str, n: int) -> Variants:
    kind = getattr(torch, dtype)
    x, proj = (torch.randn(size, D_MODEL, device=device).to(kind) for size in (n, N_EXPERTS))
    scale, per_expert = torch.ones(D_MODEL, device=device, dtype=kind), torch.ones(N_EXPERTS, device=device, dtype=kind)
    run = partial(checked.route, x, scale, proj, per_expert, SLOTS, 1e-6)
    return {"gemmascope": _quiet(partial(run, by=_by(device))), "reference": _quiet(partial(run, by="reference"))}


# The whole model


def random_model(kind: str, dtype: str, device: str = "cpu"):
    """A random mixture of experts, or edge model, of 30 to 60 M parameters, in the proportions of 26B-A4B or E2B."""
    from gemmascope.config import PRESETS
    from gemmascope.model.text import HookedGemma4

    sizes: dict[str, Any] = dict(n_heads=4, d_vocab=8192, n_ctx=8192, window=512, d_head_sliding=128, d_head_global=256)
    if kind == "moe":  # an eighth of 26B-A4B's widths, half its experts, one round of its pattern of layers
        preset, every = "google/gemma-4-26B-A4B", 6
        sizes |= dict(n_layers=6, d_model=352, d_mlp_narrow=264, n_kv_heads_sliding=2, n_kv_heads_global=1)
        sizes |= dict(n_experts=64, experts_per_token=8, d_expert=88)
    else:  # a quarter of E2B's widths, two rounds of its pattern of layers, the second one reading the first's keys
        preset, every = "google/gemma-4-E2B", 5
        sizes |= dict(n_layers=10, d_model=384, d_mlp_narrow=1536, n_kv_heads_sliding=1, n_kv_heads_global=1)
        sizes |= dict(d_ple=64, d_vocab_ple=8192, n_kv_shared_layers=5)
    sizes["layer_kinds"] = tuple(
        "global" if (layer + 1) % every == 0 else "sliding" for layer in range(sizes["n_layers"])
    )
    model = HookedGemma4(replace(PRESETS[preset], **sizes, dtype="float32", model_name=f"random {kind}"))
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # as large as keeps what passes through at its size
            torch.nn.init.normal_(weight, 0, weight.shape[-1] ** -0.5)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(weight, weight.numel() ** -0.25)
    return model.to(device, getattr(torch, dtype)).eval()


def whole(kind: str, dtype: str, n: int) -> Variants:
    from gemmascope.testing import transformers_twin

    model = random_model(kind, dtype)
    tokens = torch.randint(3, 8000, (1, n))
    variants = {"gemmascope": _quiet(lambda: model(tokens))}
    for attention_by in ("eager", "sdpa"):
        for experts_by in ("eager", "grouped_mm") if kind == "moe" else ("eager",):
            twin = transformers_twin(model, getattr(torch, dtype), attention_by, experts_by)
            name = f"transformers {attention_by}" + (f", {experts_by}" if kind == "moe" else "")
            variants[name] = _quiet(partial(twin, tokens, use_cache=False))
    return variants


def cached(kind: str, dtype: str, n: int) -> Variants:
    """run_with_cache of every site: its peers are our own forward without hooks, so that its ratio is below 1, and what
    it costs to look at every site afterwards, which runs every block again."""
    model = random_model(kind, dtype)
    tokens = torch.randint(3, 8000, (1, n))

    def all_read() -> None:
        _, cache = model.run_with_cache(tokens)
        for name in cache:
            cache[name]

    return {
        "gemmascope": _quiet(lambda: model.run_with_cache(tokens)),
        "gemmascope, forward alone": _quiet(lambda: model(tokens)),
        "gemmascope, every site read": _quiet(all_read),
    }


def _bridged(n: int):
    """The random edge model here, and the same weights in TransformerLens's bridge; and tokens."""
    from transformer_lens.model_bridge.sources.transformers.source import boot

    import gemmascope as gs

    model = random_model("edge", "float32")
    model.tokenizer = gs.load("nano-edge").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        bridge = boot(folder, device="cpu")
    return model, bridge, torch.randint(3, 1000, (1, n))


def bridged(n: int) -> Variants:
    model, bridge, tokens = _bridged(n)
    return {
        "gemmascope": _quiet(lambda: model.run_with_cache(tokens)),
        "TransformerLens bridge": _quiet(lambda: bridge.run_with_cache(tokens)),
    }


def bridged_memory(n: int) -> Variants:
    model, bridge, tokens = _bridged(n)

    def megabytes(run) -> float:
        with torch.no_grad():
            _, cache = run.run_with_cache(tokens)
        if run is model:
            return cache.nbytes / 1e6  # going through its values would compute them
        tensors = [x for x in cache.cache_dict.values() if isinstance(x, Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()) / 1e6

    return {"gemmascope": lambda: megabytes(model), "TransformerLens bridge": lambda: megabytes(bridge)}


LONG = r"""
import dataclasses, pathlib, re, torch, gemmascope as gs
model = gs.load("nano-moe")
model.cfg = dataclasses.replace(model.cfg, n_ctx=32768)
tokens = torch.randint(3, 1000, (1, 32768))
queries_and_keys = lambda name: name.endswith(("hook_rot_q", "hook_rot_k"))
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names_filter=queries_and_keys, return_type=None)
    maps = [cache.attention_pool(layer, 128) for layer in range(model.cfg.n_layers)]
assert all(m.shape == (1, 4, 256, 256) and torch.isfinite(m).all() for m in maps)
# Not getrusage: that counts the memory of the process which started this one.
print(int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1.024e-3)
"""


def long_map() -> Variants:
    """Peak memory of a Python that does nothing else, in MB, beside that of one layer's whole pattern."""

    def peak() -> float:
        done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    return {"gemmascope": peak, "one layer's S x S pattern": lambda: 4 * 32768**2 * 4 / 1e6}


# A GPU


def full_size(what: str) -> Variants:
    """A random 26B-A4B: a prompt of 2,048 tokens, one more token after it, or the prompt with every residual cached."""
    from gemmascope.config import PRESETS
    from gemmascope.generate import KVCache
    from gemmascope.model.text import HookedGemma4
    from gemmascope.testing import transformers_twin

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = HookedGemma4(PRESETS["google/gemma-4-26B-A4B"]).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        twin = transformers_twin(model, torch.bfloat16, "sdpa", "grouped_mm").to("cuda")
        tokens = torch.randint(3, 200_000, (1, 2048))
    residual = partial(model.run_with_cache, tokens, names_filter=lambda name: "resid" in name, return_type=None)
    if what == "prefill":
        variants = {
            "gemmascope": lambda: model(tokens),
            "gemmascope, every residual cached": residual,
            "transformers sdpa, grouped_mm": lambda: twin(tokens, use_cache=False),
        }
        return {name: _quiet(run) for name, run in variants.items()}
    with torch.no_grad():
        past = KVCache(model.cfg)
        model(tokens, past_kv_cache=past)
        theirs = twin(tokens, use_cache=True).past_key_values
    variants = {
        "gemmascope": lambda: model(tokens[:, -1:], past_kv_cache=past),
        "transformers sdpa, grouped_mm": lambda: twin(tokens[:, -1:], past_key_values=theirs, use_cache=True),
    }
    return {name: _quiet(run) for name, run in variants.items()}


def _rows() -> Iterator[Row]:
    both = ("bfloat16", "float32")
    for dtype, wanted in zip(both, ("25x the mask, 12x causal", "16x the mask, 8x causal"), strict=True):
        build = partial(attention, "cpu", dtype, 16384, 512, (8, 1), 256)
        yield Row("attention_sliding", wanted, build, "S=16384 W=512 H=8 K=1 D=256", dtype)
    for dtype, wanted in zip(both, ("4x", "2x"), strict=True):
        build = partial(attention_backward, "cpu", dtype, 4096, 512, (8, 1), 256)
        yield Row("attention_sliding", wanted, build, "S=4096 W=512 H=8 K=1 D=256", dtype, "forward+backward")
    for dtype in both:
        build = partial(attention, "cpu", dtype, 4096, None, (8, 1), 512)
        yield Row("attention_global", "no figure", build, "S=4096 H=8 K=1 D=512", dtype)
    build = partial(decode, "cpu", "bfloat16", 4096, (8, 1), 512)
    yield Row("attention_decode", "5x", build, "S=4096 H=8 K=1 D=512", "bfloat16")
    for dtype in both:
        for n in (1, 16, 256, 2048):
            build = partial(experts, "cpu", dtype, n)
            yield Row("experts", "0.95x the fastest", build, f"T={n} E=128 k=8 d=2816 m=704", dtype)
    for kind in ("moe", "edge"):
        for dtype in both:
            for n, wanted in ((1024, "1.3x"), (2048, "1.3x"), (4096, "1.7x")):
                build = partial(whole, kind, dtype, n)
                yield Row(f"model_{kind}", f"{wanted} the fastest", build, f"S={n}", dtype)
    for kind in ("moe", "edge"):
        for n in (1024, 4096):
            yield Row(f"cache_{kind}", "0.8x", partial(cached, kind, "float32", n), f"S={n}", "float32")
    yield Row("bridge_time", "4x", partial(bridged, 4096), "S=4096", "float32", "run_with_cache")
    yield Row("bridge_memory", "8x", partial(bridged_memory, 4096), "S=4096", "float32", "run_with_cache", unit="MB")
    yield Row("pooled_map", "under 2000 MB", long_map, "S=32768 nano-moe", "float32", "peak", unit="MB")

    gpu = partial(Row, dtype="bfloat16", needs="cuda")
    build = partial(attention, "cuda", "bfloat16", 8192, 1024, (16, 8), 256)
    yield gpu("gpu_attention_sliding", "1x flash", build, "S=8192 W=1024 H=16 K=8 D=256")
    shape = "S=8192 H=16 K=2 D=512"
    build = partial(attention, "cuda", "bfloat16", 8192, None, (16, 2), 512)
    yield gpu("gpu_attention_global", "2x SDPA", build, shape)
    build = partial(attention_backward, "cuda", "bfloat16", 8192, None, (16, 2), 512, only=True)
    yield gpu("gpu_attention_global", "2x SDPA", build, shape, mode="backward")
    for n, wanted in ((1, "90 us"), (2048, "550 us"), (8192, "1.6 ms")):
        yield gpu("gpu_experts", wanted, partial(experts, "cuda", "bfloat16", n), f"T={n} E=128 k=8 d=2816 m=704")
    yield gpu("gpu_router", "12 us", partial(router, "cuda", "bfloat16", 256), "T=256 E=128 k=8 d=2816")
    for what in ("prefill", "decode"):
        yield gpu("gpu_model_26B", "2.5x the floor", partial(full_size, what), "S=2048", mode=what)


ROWS = tuple(_rows())
"""Every row, in the order in which they run."""
