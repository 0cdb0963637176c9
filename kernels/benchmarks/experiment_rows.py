"""What experiments and router analysis cost, beside TransformerLens's on the same model, or a plain forward."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch
from rows import Row, Variants


def _pair(n: int):
    """nano-moe, and two prompts of its corpus's kind that differ in one token."""
    import gemmascope as gs

    model = gs.load("nano-moe")
    clean = torch.randint(10, 1000, (1, n))
    clean[0, 0] = 2  # BOS
    corrupted = clean.clone()
    corrupted[0, n // 3] = 7
    return model, clean, corrupted


def swept(n: int, site: str, by: tuple[str, ...], theirs: str) -> Variants:
    """Every cell of a site patched, both runs that it needs included."""
    from transformer_lens import patching

    import gemmascope as gs

    model, clean, corrupted = _pair(n)
    metric = gs.logit_difference(model, 9, 12)

    def by_transformer_lens():
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            return getattr(patching, theirs)(model, corrupted, cache, lambda logits: metric(logits).mean())

    ours = partial(gs.activation_patching, model, clean, corrupted, metric, site, by, progress=False)
    same = torch.dist(ours().mean, by_transformer_lens().flatten())
    assert same < 1e-3, same
    return {"gemmascope": ours, "transformer_lens.patching": by_transformer_lens}


def attributed(n: int) -> Variants:
    """Attribution patching of all heads and experts; beside it, patching each of them."""
    import gemmascope as gs

    model, clean, corrupted = _pair(n)
    given = (model, clean, corrupted, gs.logit_difference(model, 9, 12))

    def exactly():
        gs.activation_patching(*given, "z", ("layer", "head"), progress=False)
        gs.activation_patching(*given, "moe.hook_expert_out", ("layer", "expert"), progress=False)

    return {"gemmascope": lambda: gs.attribution_patching(*given, by=("head", "expert")), "patching each": exactly}


def counted(n_windows: int) -> Variants:
    """Routing counted over windows of the shipped corpus; beside it, the model run on them."""
    import gemmascope as gs
    from gemmascope.zoo.corpus import Corpus

    model = gs.load("nano-moe")
    corpus = Corpus(model.tokenizer.backend, 1_000_003)
    batches = [corpus.batch(step, 32, model.cfg.n_ctx).tokens for step in range(n_windows // 32)]

    def forward() -> None:
        with torch.no_grad():
            for tokens in batches:
                model(tokens)

    windows = [window for tokens in batches for window in tokens]
    return {"gemmascope": partial(gs.count_routing, model, windows, progress=False), "forward alone": forward}


STREAM = r"""
import pathlib, re, sys, gemmascope as gs
from gemmascope.zoo.corpus import Corpus
model = gs.load("nano-moe")
corpus = Corpus(model.tokenizer.backend, 1_000_003)
n = int(sys.argv[1]) // model.cfg.n_ctx
windows = (window for step in range(-(-n // 32)) for window in corpus.batch(step, 32, model.cfg.n_ctx).tokens)
counts = gs.count_routing(model, windows, progress=False)
print(int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1.024e-3)
"""


def counted_memory() -> Variants:
    """Peak memory, in MB, of a Python that counts a million tokens; and of one that counts ten thousand."""

    def peak(n: int) -> float:
        done = subprocess.run([sys.executable, "-c", STREAM, str(n)], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    return {"gemmascope": partial(peak, 1_000_000), "ten thousand tokens": partial(peak, 10_000)}


def experiment_rows() -> Iterator[Row]:
    shape = "64 tokens of nano-moe"
    for name, site, by, theirs in (
        ("sweep_resid", "resid_pre", ("layer", "pos"), "get_act_patch_resid_pre"),
        ("sweep_heads", "z", ("layer", "head"), "get_act_patch_attn_head_out_all_pos"),
    ):
        wanted = "5x TransformerLens, under 2000 ms"
        yield Row(name, wanted, partial(swept, 64, site, by, theirs), shape, "float32", mode="+".join(by))
    yield Row("attribution", "under 500 ms", partial(attributed, 64), shape, "float32", mode="heads and experts")
    shape = "8192 tokens of nano-moe's corpus"
    yield Row("routing_count", "at most 1.1 times a forward", partial(counted, 32), shape, "float32", mode="count")
    wanted = "within 50 MB of ten thousand's"
    yield Row("routing_memory", wanted, counted_memory, "1 M tokens of nano-moe's corpus", "float32", "peak", unit="MB")
