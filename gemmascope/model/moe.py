"""The router and the experts of a mixture-of-experts layer.

The router reads the raw stream through a norm of its own, so it does not see what `moe_ln_pre` does. The expert branch
is scale-invariant: a norm follows the sum, so only the *relative* weights and *which* experts matter.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gemmascope import ops
from gemmascope.config import Gemma4Config
from gemmascope.hooks import Part, Site, untouched, written

Choice = tuple[Int[Tensor, "batch pos slot"], Float[Tensor, "batch pos slot"]]


def drawn(*shape: int) -> nn.Parameter:
    """A weight from N(0, 0.02). On `meta` only its shape: drawing there would import torch's compiler, for seconds."""
    weight = torch.empty(*shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(0, 0.02))


class Router(Part):
    """1 norm and scale, 2 a logit an expert, 3 softmax over all, 4 the k likeliest, renormalised, times their scale."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.eps, self.k = cfg.eps, cfg.experts_per_token
        self.scale = nn.Parameter(torch.ones(cfg.d_model))
        self.per_expert_scale = nn.Parameter(torch.ones(cfg.n_experts))
        self.proj = nn.Linear(cfg.d_model, cfg.n_experts, bias=False)
        self.hook_in, self.hook_logits, self.hook_probs = Site(), Site(), Site()
        self.hook_indices, self.hook_weights = Site(), Site()

    def _input(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, None, self.eps) * self.scale * x.shape[-1] ** -0.5

    def forward(self, x: Float[Tensor, "batch pos d_model"], sites: bool = False) -> Choice:
        if (sites and self.shown) or not untouched(self.proj, nn.Linear):
            return self.with_sites(x)
        rows, weight = x.flatten(0, -2), self.proj.weight
        _, indices, weights = ops.route(rows, self.scale, weight, self.per_expert_scale, self.k, self.eps)
        return indices.unflatten(0, x.shape[:-1]), weights.unflatten(0, x.shape[:-1])

    def with_sites(self, x: Float[Tensor, "batch pos d_model"]) -> Choice:
        logits = self.hook_logits(self.proj(self.hook_in(self._input(x))))
        probs = self.hook_probs(ops.wide(logits).softmax(-1))
        indices = self.hook_indices(probs.topk(self.k, dim=-1).indices)
        n_experts = probs.shape[-1]
        if written(self.hook_indices) and not ((0 <= indices) & (indices < n_experts)).all():
            raise ValueError(
                f"{self.hook_indices.name}: a hook chose expert {int(indices.max())} or {int(indices.min())}; "
                f"this layer has experts 0 to {n_experts - 1}."
            )
        return indices, self.hook_weights(ops.expert_weights(probs, indices, self.per_expert_scale))


class MoE(Part):
    """1 route, 2 gate and up inside each chosen expert, 3 down, 4 weight and sum over slots."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.router = Router(cfg)
        self.gate_up_proj = drawn(cfg.n_experts, 2 * cfg.d_expert, cfg.d_model)
        self.down_proj = drawn(cfg.n_experts, cfg.d_model, cfg.d_expert)
        self.hook_expert_pre, self.hook_expert_pre_linear, self.hook_expert_post = Site(), Site(), Site()
        self.hook_expert_out, self.hook_out = Site(), Site()

    def gate_up(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Every token into each of its experts: two tensors [batch pos slot d_expert]."""
        repeated = x[:, :, None].expand(*indices.shape, -1).flatten(0, 2)
        both = ops.grouped_linear(repeated, indices.flatten(), self.gate_up_proj).unflatten(0, indices.shape)
        return both.chunk(2, dim=-1)

    def down(self, post: Tensor, choice: Choice) -> Tensor:
        """Each slot's weighted output: [batch pos slot d_model]."""
        indices, weights = choice
        out = ops.grouped_linear(post.flatten(0, 2), indices.flatten(), self.down_proj).unflatten(0, indices.shape)
        return (out * weights[..., None]).type_as(out)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], choice: Choice, sites: bool = False
    ) -> Float[Tensor, "batch pos d_model"]:
        if sites and self.shown:
            return self.with_sites(x, choice)
        indices, weights = (part.flatten(0, -2) for part in choice)
        out = ops.experts(x.flatten(0, -2), indices, weights, self.gate_up_proj, self.down_proj)
        return out.unflatten(0, x.shape[:-1])

    def with_sites(self, x: Float[Tensor, "batch pos d_model"], choice: Choice) -> Float[Tensor, "batch pos d_model"]:
        gate, up = self.gate_up(x, choice[0])
        gate, up = self.hook_expert_pre(gate), self.hook_expert_pre_linear(up)
        post = self.hook_expert_post(ops.geglu(gate, up))
        return self.hook_out(self.hook_expert_out(self.down(post, choice)).sum(-2))
