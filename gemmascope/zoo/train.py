"""The recipe of the shipped models.

    python -m gemmascope.zoo.train nano-moe [--steps N] [--run DIR] [--out DIR] [--device cpu] [--seed 0]

Keeps `checkpoint.safetensors` and `log.jsonl` in the run folder and continues from them when called again; bit for bit
what an uninterrupted run would give. When the last step is done, the model goes to `--out` in Hugging Face layout.

The learning rate warms up, stays, and falls to zero over the last fifth of the steps: until that fall begins, `--steps`
has no effect on the run, so a run may be prolonged or brought to its end when one sees how it goes.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gemmascope.config import Gemma4Config
from gemmascope.model.text import HookedGemma4
from gemmascope.tokenizer import Gemma4Tokenizer
from gemmascope.weights import ZOO, save_pretrained
from gemmascope.zoo.build_tokenizer import TOKENIZER_CONFIG, build_tokenizer
from gemmascope.zoo.corpus import PHASES, Batch, Corpus
from gemmascope.zoo.evaluate import circuits

BATCH = 8
WARMUP = 100
WEIGHT_DECAY = 0.05
CLIP = 1.0
BALANCE = 0.01
"""Weight of the Switch load-balancing loss; it is taken over the whole batch, so an expert may serve one domain."""
SEPARATE = 0.01
"""Weight, from the second phase on, of what the routing tells about the document; no label of a domain is used."""
EVALUATE_EVERY = 500
SAVE_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models."""

    cfg: Gemma4Config
    steps: int
    phases: tuple[int, ...]
    """First step of each of the corpus's phases; nano-moe needed no third."""
    lr: float
    """Of everything but the layer scalars, at its peak."""
    scalar_lr: float
    """Of the layer scalars. If they fall fast the token drowns in what the layers add, and where no per-layer embedding
    brings it back, induction does not form."""


_SHARED = dict(d_model=128, n_heads=4, d_vocab=1328, n_ctx=256, window=16, d_head_sliding=32, d_head_global=64)
_S, _G = "sliding", "global"
# 26B-A4B's shape: one projection for keys and values on the global layers, which have fewer and wider kv heads; a dense
# branch beside the experts.
_MOE = Gemma4Config(
    n_layers=6, layer_kinds=(_S, _S, _G, _S, _S, _G), n_kv_heads_sliding=4, n_kv_heads_global=2, k_is_v=True,
    d_mlp_narrow=192, n_experts=8, experts_per_token=2, d_expert=64, model_name="nano-moe", **_SHARED,
)  # fmt: skip
# E2B's shape: per-layer embeddings; the last three layers read the keys and values of layers 2 and 3, and have MLPs
# twice as wide.
_EDGE = Gemma4Config(
    n_layers=7, layer_kinds=(_S, _S, _S, _G, _S, _S, _G), n_kv_heads_sliding=1, n_kv_heads_global=1,
    n_kv_shared_layers=3, double_wide_mlp=True, d_mlp_narrow=256, d_ple=16, d_vocab_ple=1328,
    model_name="nano-edge", **_SHARED,
)  # fmt: skip
RECIPES = {
    "nano-moe": Recipe(_MOE, steps=2500, phases=(0, 500), lr=2e-3, scalar_lr=1e-4),
    "nano-edge": Recipe(_EDGE, steps=3200, phases=(0, 1250, 2500), lr=3e-3, scalar_lr=3e-3),
}


def build(name: str, seed: int = 0) -> HookedGemma4:
    """The untrained model. `name` is one of RECIPES.

    Why not the usual initialisation: with post-norms of gain 1 each sub-layer adds as much as the embedding holds, the
    token is drowned, and induction never forms. Here the scaled embedding starts at RMS 1, each addition at 0.3, and
    attention and router logits at a standard deviation of 1.
    """
    model = HookedGemma4(RECIPES[name].cfg, tokenizer=Gemma4Tokenizer(build_tokenizer(), TOKENIZER_CONFIG))
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        part, d_in = parameter_name.split(".")[-2], parameter.shape[-1]
        if part in ("ln1_post", "ln2_post", "ple_ln_post"):
            torch.nn.init.constant_(parameter, 0.3)
        elif part in ("q_norm", "k_norm"):
            torch.nn.init.constant_(parameter, d_in**-0.25)
        elif parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        elif parameter_name.endswith("router.proj.weight"):
            torch.nn.init.normal_(parameter, std=1.0, generator=generator)  # its input has norm 1, not RMS 1
        else:
            torch.nn.init.normal_(parameter, std=d_in**-0.5, generator=generator)
    return model


def trainable(model: HookedGemma4) -> dict[str, Tensor]:
    """What the recipe trains: every parameter, and the layer scalars, which are buffers in Gemma 4."""
    scalars = {name: buffer.requires_grad_() for name, buffer in model.named_buffers() if name.endswith("layer_scalar")}
    return dict(model.named_parameters()) | scalars


def make_optimizer(model: HookedGemma4, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains and scalars do not. Each group keeps its peak learning rate as `peak`."""
    named = trainable(model)
    scalars = [tensor for name, tensor in named.items() if name.endswith("layer_scalar")]
    gains = [tensor for name, tensor in named.items() if tensor.ndim == 1 and not name.endswith("layer_scalar")]
    matrices = [tensor for tensor in named.values() if tensor.ndim > 1]
    groups = [
        {"params": matrices, "peak": recipe.lr, "weight_decay": WEIGHT_DECAY},
        {"params": gains, "peak": recipe.lr, "weight_decay": 0.0},
        {"params": scalars, "peak": recipe.scalar_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: up over WARMUP steps, level, down to zero over the last fifth."""
    return min((step + 1) / WARMUP, 1.0, (steps - step) / (0.2 * steps))


def balance_loss(probs: Tensor, k: int) -> Tensor:
    """The Switch auxiliary loss of one layer: n_experts * sum_e load_e * mean probability_e, which is 1 when even.

    `probs` [batch pos expert] is the router's softmax; load_e is expert e's share of the `k` choices of every token.
    """
    n_experts = probs.shape[-1]
    chosen = probs.topk(k, dim=-1).indices.flatten()
    load = chosen.bincount(minlength=n_experts) / len(chosen)
    return n_experts * (load * probs.flatten(0, -2).mean(0)).sum()


def separation(probs: Tensor, documents: Tensor) -> Tensor:
    """Mutual information in nats of expert and document: the entropy of the mean routing minus that within documents.

    `probs` [batch pos expert] is the router's softmax, `documents` [batch pos] the number of each token's document.
    """
    entropy = lambda p: -(p * (p + 1e-9).log()).sum(-1)  # noqa: E731
    flat, document = probs.flatten(0, -2), documents.flatten()
    lengths = document.bincount()
    within = probs.new_zeros(len(lengths), probs.shape[-1]).index_add(0, document, flat) / lengths[:, None]
    return entropy(flat.mean(0)) - (lengths * entropy(within)).sum() / len(flat)


def losses(model: HookedGemma4, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy in nats a token; where there are experts, also `balance` and `separation`, averaged over layers."""
    found = {"balance": [], "separation": []}

    def collect(probs, hook):
        found["balance"].append(balance_loss(probs, model.cfg.experts_per_token))
        found["separation"].append(separation(probs, batch.documents()))

    with model.hooks(fwd_hooks=[(name, collect) for name in model.hook_dict if name.endswith("router.hook_probs")]):
        logits = model(batch.tokens)
    nats = F.cross_entropy(logits.flatten(0, 1), batch.targets().flatten())
    return {"loss": nats} | {name: torch.stack(layers).mean() for name, layers in found.items() if layers}


def objective(parts: dict[str, Tensor], phase: int) -> Tensor:
    """What a step minimises."""
    if "balance" not in parts:
        return parts["loss"]
    balanced = parts["loss"] + BALANCE * parts["balance"]
    return balanced - SEPARATE * parts["separation"] if phase else balanced


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, model: HookedGemma4, optimizer: torch.optim.AdamW, progress: dict) -> None:
    """One safetensors file: weights, both moments of the optimizer, and `progress` as JSON in its header."""
    tensors = {}
    for name, tensor in trainable(model).items():
        tensors[f"weight.{name}"] = tensor.detach().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[tensor][moment].contiguous()
    # Written beside and moved into place, so that a run stopped while it saves loses nothing.
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
    os.replace(partial, path)


def load_checkpoint(path: Path, model: HookedGemma4, optimizer: torch.optim.AdamW | None = None) -> dict:
    """Fills the model, and the optimizer when given; returns what `save_checkpoint` was given as progress."""
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
        for name, tensor in trainable(model).items():
            tensor.data.copy_(file.get_tensor(f"weight.{name}"))
            if optimizer is not None:
                moments = {m: file.get_tensor(f"{m}.{name}").to(tensor.device) for m in ("exp_avg", "exp_avg_sq")}
                # The fused AdamW keeps its step count beside the weights.
                count = torch.tensor(float(progress["step"]), device=tensor.device)
                optimizer.state[tensor] = {"step": count, **moments}
    return progress


# --- the run ---------------------------------------------------------------------------------------------------------


def train(
    name: str,
    steps: int,
    run: Path,
    device: str = "cpu",
    seed: int = 0,
    evaluate: Callable[[HookedGemma4], dict] = circuits,
) -> HookedGemma4:
    """Trains to `steps`, continuing from the run folder's checkpoint if there is one.

    `log.jsonl` gets a line whenever the circuits are measured: seed, device, step, tokens, learning rate, seconds,
    losses and what `evaluate(model)` gives.

    Raises:
        ValueError: if the checkpoint belongs to another model or seed.
    """
    run.mkdir(parents=True, exist_ok=True)
    checkpoint, log = run / "checkpoint.safetensors", run / "log.jsonl"
    model = build(name, seed).to(device)
    recipe = RECIPES[name]
    optimizer = make_optimizer(model, recipe)
    progress = {"name": name, "seed": seed, "step": 0, "seconds": 0.0, "log": []}
    if checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
        if (progress["name"], progress["seed"]) != (name, seed):
            found = f"{progress['name']} with seed {progress['seed']}"
            raise ValueError(
                f"{run} holds a run of {found}, not of {name} with seed {seed}: name another --run folder."
            )
    corpus = Corpus(model.tokenizer.backend, seed)
    tensors = list(trainable(model).values())
    started = time.perf_counter() - progress["seconds"]
    bar = tqdm(range(progress["step"], steps), initial=progress["step"], total=steps, desc=name, unit="step")
    for step in bar:
        phase = sum(first <= step for first in recipe.phases) - 1
        batch = Batch(*(t.to(device) for t in corpus.batch(step, BATCH, model.cfg.n_ctx, PHASES[phase])))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps)
        parts = losses(model, batch)
        objective(parts, phase).backward()
        torch.nn.utils.clip_grad_norm_(tensors, CLIP)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if done % 10 == 0:
            bar.set_postfix({k: f"{part.item():.3f}" for k, part in parts.items()})
        if done % EVALUATE_EVERY == 0 or done == steps:
            line = {"seed": seed, "device": str(device), "step": done, "tokens": done * batch.tokens.numel()}
            line |= {"lr": recipe.lr * schedule(step, steps)}
            line |= {"seconds": round(time.perf_counter() - started)} | {k: part.item() for k, part in parts.items()}
            progress["log"].append(line | evaluate(model))
            log.write_text("".join(json.dumps(line) + "\n" for line in progress["log"]))
        if done % SAVE_EVERY == 0 or done == steps:
            progress |= {"step": done, "seconds": time.perf_counter() - started}
            save_checkpoint(checkpoint, model, optimizer, progress)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gemmascope.zoo.train", description="Trains a shipped model.")
    parser.add_argument("name", choices=RECIPES)
    size = f"{BATCH} x {_SHARED['n_ctx']}"
    parser.add_argument("--steps", type=int, help=f"of {size} tokens (default: the recipe's)")
    parser.add_argument("--run", type=Path, help="folder of checkpoint and log (default: runs/NAME)")
    parser.add_argument("--out", type=Path, help="folder of the finished model (default: the shipped one)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run, out = asked.run or Path("runs") / asked.name, asked.out or ZOO / asked.name
    model = train(asked.name, asked.steps or RECIPES[asked.name].steps, run, asked.device, asked.seed)
    save_pretrained(model.cpu(), out)
    shutil.copy(run / "log.jsonl", out / "log.jsonl")
    print(f"Saved to {out}. Measure it and write its card with: python -m gemmascope.zoo.evaluate {out}")


if __name__ == "__main__":
    main()
