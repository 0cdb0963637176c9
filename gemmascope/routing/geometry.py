"""What the weights of routers and experts look like, and what of the stream the router sees.

Gemma 4's router is a linear map of the normed stream: logits = (proj * scale / sqrt(d)) (x / rms(x)). So its rows live,
as proj * scale, in the normed space, and a part of x / rms(x) that is orthogonal to all rows changes no choice.
"""

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from gemmascope import ops
from gemmascope.hooks import Reader
from gemmascope.readout.activations import Prompts, Rows
from gemmascope.routing.trace import check_expert, refuse_dense

_NO_ROWS = Rows(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))


def _layer(model, layer: int) -> int:
    refuse_dense(model)
    return check_expert(model.cfg.n_layers, model.cfg.n_experts, layer)


def batches(model, prompts, batch_size: int, progress: bool, what: str):
    """(tokens, mask) of some prompts at a time."""
    for batch in Prompts.of(model, prompts).batches(batch_size, _NO_ROWS, progress, what):
        yield batch.tokens.to(model.cfg.device), None if batch.mask is None else batch.mask.to(model.cfg.device)


def router_rows(model, layer: int) -> Float[Tensor, "expert d_model"]:
    """What each expert's logit reads of the normed stream: proj * scale / sqrt(d_model), float32 at least."""
    router = model.blocks[_layer(model, layer)].moe.router
    return (ops.wide(router.proj.weight) * ops.wide(router.scale)).detach() * router.scale.shape[0] ** -0.5


def _cosines(rows: Float[Tensor, "expert n"]) -> Float[Tensor, "expert expert"]:
    unit = torch.nn.functional.normalize(rows, dim=-1)
    return unit @ unit.T


def router_similarity(model, layer: int) -> Float[Tensor, "expert expert"]:
    """Cosine of the rows of the router, in normed space."""
    return _cosines(router_rows(model, layer))


def _matrices(model, layer: int, of: str) -> Float[Tensor, "expert rows columns"]:
    moe = model.blocks[_layer(model, layer)].moe
    gate, up = moe.gate_up_proj.detach().chunk(2, dim=1)
    kinds = {"gate": gate, "in": up, "out": moe.down_proj.detach()}
    if of not in kinds:
        raise ValueError(f"of is {of!r}; an expert's matrices are {', '.join(kinds)}.")
    return ops.wide(kinds[of])


def expert_similarity(model, layer: int, of: str = "out") -> Float[Tensor, "expert expert"]:
    """Cosine of experts' matrices, entry by entry: "gate", "in" (up) or "out" (down).

    It compares neurons by their number: an expert with another's neurons in a different order is not seen as alike.
    """
    return _cosines(_matrices(model, layer, of).flatten(1))


def expert_spectra(model, layer: int, of: str = "out") -> Float[Tensor, "expert rank"]:
    """Singular values of each expert's matrix, the largest first."""
    return torch.linalg.svdvals(_matrices(model, layer, of))


def effective_rank(spectra: Float[Tensor, "*rest rank"]) -> Float[Tensor, " *rest"]:
    """exp of the entropy of the singular values, which are first made to sum to 1 (Roy and Vetterli 2007)."""
    return torch.special.entr(spectra / spectra.sum(-1, keepdim=True)).sum(-1).exp()


def control_basis(model, layer: int) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the space that the router's rows span: with n = x / rms(x), `n @ basis.T @ basis` is the
    control part of n, which decides the routing, and the rest is content."""
    rows = router_rows(model, layer)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > sizes[0] * max(rows.shape) * torch.finfo(rows.dtype).eps]


def _streams(model, prompts, batch_size: int, progress: bool, what: str):
    """(layer, x / rms(x) of the stream that the router reads [token, d_model], experts [token, slot])."""
    refuse_dense(model)
    sites = {f"blocks.{layer}.hook_resid_mid": layer for layer in range(model.cfg.n_layers)}
    chosen = {f"blocks.{layer}.moe.router.hook_indices": layer for layer in range(model.cfg.n_layers)}
    for tokens, mask in batches(model, prompts, batch_size, progress, what):
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), model.hooks([(name, Reader(seen.__setitem__)) for name in (*sites, *chosen)]):
            model(tokens, attention_mask=mask, return_type=None)
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        for (name, layer), choice in zip(sites.items(), chosen, strict=True):
            yield layer, ops.rms_norm(ops.wide(seen[name][real]), None, model.cfg.eps), seen[choice][real]


def control_content(model, prompts, *, batch_size: int = 32, progress: bool = True) -> pandas.DataFrame:
    """How much of the stream the router sees (arXiv 2604.17837, in Gemma 4's normed space). One row a layer.

    `control`: the mean over tokens of the share of |x / rms(x)|^2 in the span of the router's rows; the rest is
    content. `rank` of that span, and `uniform`, rank / d_model: the share if directions did not matter.
    """
    refuse_dense(model)
    bases = [control_basis(model, layer) for layer in range(model.cfg.n_layers)]
    sums, n_tokens = [0.0] * model.cfg.n_layers, [0] * model.cfg.n_layers
    for layer, normed, _ in _streams(model, prompts, batch_size, progress, "control and content"):
        inside = (normed @ bases[layer].T).square().sum(-1) / normed.square().sum(-1)
        sums[layer] += float(inside.double().sum())
        n_tokens[layer] += len(normed)
    rows = [
        {"layer": layer, "control": total / n, "rank": len(basis), "uniform": len(basis) / model.cfg.d_model}
        for layer, (total, n, basis) in enumerate(zip(sums, n_tokens, bases, strict=True))
    ]
    return pandas.DataFrame(rows)


def similarity_and_overlap(model, prompts, *, batch_size: int = 32, progress: bool = True) -> pandas.DataFrame:
    """Do tokens whose streams are alike go to the same experts? One row a layer: `correlation` (Pearson) of the cosine
    of two tokens' streams before the router and |S_t & S_u| / k, over all pairs of tokens of a batch; `pairs`.

    NaN in a layer where all overlaps are equal.
    """
    refuse_dense(model)
    sums = torch.zeros(model.cfg.n_layers, 6, dtype=torch.float64)
    for layer, normed, chosen in _streams(model, prompts, batch_size, progress, "similarity and overlap"):
        # Sums over pairs of u_i . u_j and s_i . s_j are norms of products, so that no table of pairs is made.
        u = torch.nn.functional.normalize(normed, dim=-1).double()
        sets = torch.zeros(len(chosen), model.cfg.n_experts, device=chosen.device, dtype=torch.float64)
        s = sets.scatter_(1, chosen, chosen.shape[1] ** -0.5)
        n = len(u)
        ordered = [u.sum(0).square(), s.sum(0).square(), (u.T @ u).square(), (s.T @ s).square(), (u.T @ s).square()]
        pairs = torch.stack([(both.sum() - n) / 2 for both in ordered])  # i = j gives 1 each, and i, j is j, i
        sums[layer] += torch.cat((pairs.new_tensor([n * (n - 1) / 2]), pairs)).cpu()
    n, x, y, xx, yy, xy = sums.T
    correlation = (n * xy - x * y) / ((n * xx - x * x).clamp(min=0) * (n * yy - y * y).clamp(min=0)).sqrt()
    table = {"layer": range(len(sums)), "correlation": correlation.tolist(), "pairs": n.long().tolist()}
    return pandas.DataFrame(table)
