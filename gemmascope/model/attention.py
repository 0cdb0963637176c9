"""Attention: normed queries, keys and values, scale 1, and layers that read an earlier layer's keys and values.

Values are taken before the key norm where one projection serves both, and rope turns a quarter of the wide heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gemmascope import ops
from gemmascope.config import Gemma4Config
from gemmascope.hooks import Part, Site, cuts_alone, heads_touched, untouched, watched, written
from gemmascope.model.inputs import Pass
from gemmascope.model.linear import Linear
from gemmascope.model.norms import RMSNorm, Stream


class Attention(Part):
    def __init__(self, cfg: Gemma4Config, layer: int):
        super().__init__()
        self.layer, self.geometry, self.eps, self.n_heads = layer, cfg.layers[layer], cfg.eps, cfg.n_heads
        H, K, h = cfg.n_heads, self.geometry.n_kv_heads, self.geometry.d_head
        self.q_proj = Linear(cfg.d_model, H * h)
        self.q_norm = RMSNorm(h, cfg.eps)
        self.is_read = any(other.kv_source == layer for other in cfg.layers)
        if self.geometry.kv_source is None:
            self.k_proj = Linear(cfg.d_model, K * h)
            self.k_norm = RMSNorm(h, cfg.eps)
            if not self.geometry.k_is_v:
                self.v_proj = Linear(cfg.d_model, K * h)
            self.hook_k, self.hook_k_normed, self.hook_rot_k = Site(), Site(), Site()
            self.hook_v, self.hook_v_normed = Site(), Site()
        self.o_proj = Linear(H * h, cfg.d_model)
        self.hook_q, self.hook_q_normed, self.hook_rot_q = Site(), Site(), Site()
        self.hook_attn_scores, self.hook_pattern, self.hook_z, self.hook_result = Site(), Site(), Site(), Site()

    # TransformerLens's names and axes for the weights.
    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self.q_proj.weight.unflatten(0, (self.n_heads, -1)).mT

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._own("k_proj").weight.unflatten(0, (self.geometry.n_kv_heads, -1)).mT

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        proj = self._own("k_proj" if self.geometry.k_is_v else "v_proj")
        return proj.weight.unflatten(0, (self.geometry.n_kv_heads, -1)).mT

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.o_proj.weight.T.unflatten(0, (self.n_heads, -1))

    def _own(self, name: str) -> Linear:
        source = self.geometry.kv_source
        if source is not None:
            raise ValueError(
                f"Layer {self.layer} has no key and value weights: it reads the keys and values of layer {source}, "
                f"model.blocks[{source}].attn."
            )
        return getattr(self, name)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.geometry.d_head))

    def _turned(self, norm: RMSNorm, projected: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if untouched(norm, RMSNorm):
            return ops.norm_rope(projected, norm.weight, *rope, norm.eps)
        return ops.rotate(norm(projected), *rope)

    def _keep(self, run: Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the past, and leaves keys and values for the layers that read them."""
        k = self._shared_k(run, k)
        if run.past is not None:
            k, v = run.past.append(self.layer, k, v)
        if self.is_read:
            run.kv[self.layer] = k, v
        return k, v

    # The K = V form (HookedGemma4.shared_kv): k = k_norm.weight * v but for the columns that rope turns, so that the
    # weight can move into the query, and a kernel and a cache read v and those columns only.

    @property
    def _turning(self) -> Tensor:
        half, turning = self.geometry.d_head // 2, int(self.geometry.rope_fraction * self.geometry.d_head // 2)
        first = torch.arange(turning, device=self.k_norm.weight.device)
        return torch.cat((first, first + half))

    def _shared_k(self, run: Pass, k: Tensor) -> Tensor:
        """The keys in the form in which this pass has them. A layer whose keys or values are edited keeps both."""
        points = ("hook_k", "hook_k_normed", "hook_rot_k", "hook_v", "hook_v_normed")
        shared = (
            run.shared_kv
            and self.geometry.k_is_v
            and not self.is_read
            and untouched(self.k_norm, RMSNorm)
            and not any(written(getattr(self, point)) for point in points)
        )
        held = None if run.past is None else run.past.key_width(self.layer)
        if held == self.geometry.d_head or not shared:
            if held not in (None, self.geometry.d_head):
                run.past.rewrite_keys(self.layer, self._whole_k)
            return k
        return k.index_select(-1, self._turning)

    def _whole_k(self, turned: Tensor, v: Tensor) -> Tensor:
        return (v * self.k_norm.weight).index_copy(-1, self._turning, turned)

    def _shared_q(self, q: Tensor) -> Tensor:
        """Queries to match: their turning columns, then all columns times the key norm's weight, 0 for those."""
        weight = self.k_norm.weight.index_fill(0, self._turning, 0)
        return torch.cat((q.index_select(-1, self._turning), q * weight), dim=-1)

    def forward(self, x: Stream, run: Pass, sites: bool = False) -> Stream:
        if sites and self.shown:
            return self.with_sites(x, run)
        kind, source = self.geometry.kind, self.geometry.kv_source
        q = self._turned(self.q_norm, self._heads(self.q_proj(x)), run.rope[kind])
        if source is None:
            k = self._heads(self.k_proj(x))
            v = k if self.geometry.k_is_v else self._heads(self.v_proj(x))
            k, v = self._turned(self.k_norm, k, run.rope[kind]), ops.rms_norm(v, None, self.eps)
            k, v = self._keep(run, k, v)
        else:
            k, v = run.kv[source]
        return self.o_proj(self._fused(q, k, v, run.masks[kind]).flatten(-2))

    def with_sites(self, x: Stream, run: Pass) -> Stream:
        kind, source = self.geometry.kind, self.geometry.kv_source
        q = self.hook_q(self._heads(self.q_proj(x)))
        if source is None:
            projected = self._heads(self.k_proj(x))
            k = self.hook_k(projected)
            v = self.hook_v(projected if self.geometry.k_is_v else self._heads(self.v_proj(x)))
        q = self.hook_q_normed(self.q_norm(q))
        if source is None:
            k, v = self.hook_k_normed(self.k_norm(k)), self.hook_v_normed(ops.rms_norm(v, None, self.eps))
        q = self.hook_rot_q(ops.rotate(q, *run.rope[kind]))
        if source is None:
            k, v = self._keep(run, self.hook_rot_k(ops.rotate(k, *run.rope[kind])), v)
        else:
            k, v = run.kv[source]
        z = self.hook_z(self._mix(q, k, v, run.masks[kind]))
        if not watched(self.hook_result):
            return self.o_proj(z.flatten(-2))
        result = self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O))
        return result.sum(-2) if written(self.hook_result) else self.o_proj(z.flatten(-2))

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask) -> Tensor:
        return ops.attention(q if k.shape[-1] == q.shape[-1] else self._shared_q(q), k, v, mask)[0]

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask) -> Tensor:
        """z, by the fused path but for the heads whose scores or pattern a hook may write.

        For hooks that only read, scores and pattern are computed beside it.
        """
        points = self.hook_attn_scores, self.hook_pattern
        if not any(watched(point) for point in points):
            return self._fused(q, k, v, mask)
        cuts = cuts_alone(*points)
        if cuts is not None and sum(map(watched, points)) == 1:
            shape = (len(q), self.n_heads, q.shape[1], k.shape[1])
            boxes = torch.cat([cut.boxes(shape, self.hook_attn_scores.name) for cut in cuts])
            boxes[:, 2] += k.shape[1] - q.shape[1]  # a Mask counts queries, too, from the oldest key
            return self._fused(q, k, v, mask.with_knockouts(boxes, renormalize=watched(self.hook_attn_scores)))
        heads = heads_touched(*points)
        explicit = heads is None and any(written(point) for point in points)
        z = None if explicit else self._fused(q, k, v, mask)
        if k.shape[-1] != q.shape[-1]:
            q, k = self._shared_q(q), torch.cat((k, v), dim=-1)
        if heads is not None:
            of = torch.tensor(heads, device=q.device)
            q, (k, v) = q[:, :, of], (x[:, :, of // (self.n_heads // x.shape[2])] for x in (k, v))
        self.hook_attn_scores.heads = self.hook_pattern.heads = heads
        scores = self.hook_attn_scores(ops.attention_scores(q, k, mask))
        pattern = self.hook_pattern(_softmax(scores) if written(self.hook_attn_scores) else scores.softmax(-1))
        if explicit:
            return ops.mix_values(pattern, v)
        return z if heads is None else z.index_copy(2, of, ops.mix_values(pattern, v))


def _softmax(scores: Tensor) -> Tensor:
    """The softmax of each row; a row whose edges a hook has all cut attends to nothing."""
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
