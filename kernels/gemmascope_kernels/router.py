"""The router: norm, scale, projection, softmax, top-k and the weights of the chosen, in one launch.

1. A program holds BLOCK_T tokens. It reads them twice, the second time from the cache: once for their norms, once for
   the projection, which accumulates in float32 over tiles of d.
2. Every rounding of the definition is repeated, because a logit rounded otherwise can decide a near-tie otherwise, and
   then another expert runs: normed, times scale, times d^-0.5 and the logits are each rounded to the dtype of x.
3. The probabilities of all experts stay in registers while k rounds of argmax choose; they are written out whole.

After SGLang's gemma4_routing.py, https://github.com/sgl-project/sglang, which keeps only the chosen probabilities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemmascope_kernels.launch import INTERPRETED, launch
from gemmascope_kernels.norms import leave_float64, rms_norm, rms_norm_backward
from gemmascope_kernels.tiles import tile

_PROGRAMS = 264
"""The backward has no more than these, two for each multiprocessor of an H200: each writes partial sums of its own."""


@triton.jit
def _route_kernel(
    x_ptr,
    scale_ptr,
    proj_ptr,
    expert_scale_ptr,
    logit_bias_ptr,
    allowed_ptr,
    forced_ptr,
    probs_ptr,
    indices_ptr,
    weights_ptr,
    n,
    d,
    n_experts,
    k,
    stride_x,
    stride_proj,
    eps,
    shrink,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """probs = softmax(x / rms(x) * scale * shrink @ proj^T + logit_bias), without what is not allowed;
    weights_j = probs[index_j] / sum_i probs[index_i] * expert_scale[index_j]."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d, o_e, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_t, m_e = o_t < n, o_e < n_experts
    p_x = x_ptr + o_t[:, None] * stride_x + o_d[None, :]
    p_scale = scale_ptr + tl.zeros([BLOCK_T, 1], tl.int32) + o_d[None, :]
    p_proj = proj_ptr + o_e[None, :] * stride_proj + o_d[:, None]

    b_square = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i_d in tl.range(0, d, BLOCK_D, num_stages=STAGES):
        b_x = tl.load(p_x + i_d, mask=m_t[:, None] & (i_d + o_d < d)[None, :], other=0).to(tl.float32)  # [T, D]
        b_square += b_x * b_x
    b_inverse = 1 / tl.sqrt_rn(tl.sum(b_square, axis=1) / d + eps)

    b_logits = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for i_d in tl.range(0, d, BLOCK_D, num_stages=STAGES):
        m_d = i_d + o_d < d
        b_x = tl.load(p_x + i_d, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)  # [T, D]
        # Once a token, so that it comes ahead of time as the other two do: a load of one row is too narrow for that.
        b_scale = tl.load(p_scale + i_d, mask=m_t[:, None] & m_d[None, :], other=0).to(tl.float32)  # [T, D]
        b_proj = tl.load(p_proj + i_d, mask=m_d[:, None] & m_e[None, :], other=0)  # [D, E]
        b_y = (b_x * b_inverse[:, None]).to(T)
        b_y = (b_y.to(tl.float32) * b_scale).to(T)
        b_y = (b_y.to(tl.float32) * shrink).to(T)
        if INTERPRETED:
            b_y, b_proj = b_y.to(tl.float32), b_proj.to(tl.float32)
        b_logits = tl.dot(b_y, b_proj, b_logits, input_precision="ieee")
    b_logits = b_logits.to(T).to(tl.float32)

    m_in = m_e
    if allowed_ptr is not None:
        m_in &= tl.load(allowed_ptr + o_e, mask=m_e, other=0) != 0  # [E]
    if logit_bias_ptr is not None:
        b_logits += tl.load(logit_bias_ptr + o_e, mask=m_e, other=0).to(tl.float32)[None, :]  # [E]
    b_logits = tl.where(m_in[None, :], b_logits, float("-inf"))
    b_probs = tl.exp(b_logits - tl.max(b_logits, axis=1)[:, None])
    b_probs /= tl.sum(b_probs, axis=1)[:, None]
    tl.store(probs_ptr + o_t[:, None] * n_experts + o_e[None, :], b_probs, mask=m_t[:, None] & m_e[None, :])

    b_index = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    b_chosen = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    b_left = tl.where(m_e[None, :], b_probs, -1)  # what is still to be chosen from
    for i_k in range(k):
        if forced_ptr is None:
            b_prob, b_expert = tl.max(b_left, axis=1, return_indices=True)  # the lower index of equals
            b_left = tl.where(o_e[None, :] == b_expert[:, None], -1, b_left)
        else:
            b_expert = tl.load(forced_ptr + o_t * k + i_k, mask=m_t, other=0).to(tl.int32)  # [T]
            b_prob = tl.sum(tl.where(o_e[None, :] == b_expert[:, None], b_probs, 0), axis=1)
        b_index = tl.where(o_k[None, :] == i_k, b_expert[:, None], b_index)
        b_chosen = tl.where(o_k[None, :] == i_k, b_prob[:, None], b_chosen)
    b_total = tl.sum(b_chosen, axis=1)[:, None]
    b_weights = b_chosen / tl.where(b_total == 0, 1, b_total)
    b_weights *= tl.load(expert_scale_ptr + b_index).to(tl.float32)  # [T, K]
    o_slot, m_slot = o_t[:, None] * k + o_k[None, :], m_t[:, None] & (o_k < k)[None, :]
    tl.store(indices_ptr + o_slot, b_index.to(tl.int64), mask=m_slot)
    tl.store(weights_ptr + o_slot, b_weights, mask=m_slot)


def route(
    x: Tensor,
    scale: Tensor,
    proj: Tensor,
    per_expert_scale: Tensor,
    k: int,
    eps: float,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    leave_float64(x)
    x = x if x.stride(-1) == 1 else x.contiguous()
    proj = proj if proj.stride(-1) == 1 else proj.contiguous()
    n, d = x.shape
    n_experts = len(proj)
    probs = x.new_empty(n, n_experts, dtype=torch.float32)
    chosen = x.new_empty(n, k, dtype=torch.int64)
    weights = x.new_empty(n, k, dtype=torch.float32)
    how = tile("_route_kernel", width=d, dtype=x.dtype, size=n)
    launch(
        _route_kernel,
        (triton.cdiv(n, how["BLOCK_T"]),),
        x_ptr=x,
        scale_ptr=scale.contiguous(),
        proj_ptr=proj,
        expert_scale_ptr=per_expert_scale.contiguous(),
        logit_bias_ptr=None if logit_bias is None else logit_bias.contiguous(),
        allowed_ptr=None if allowed is None else allowed.contiguous(),
        forced_ptr=None if indices is None else indices.contiguous(),
        probs_ptr=probs,
        indices_ptr=chosen,
        weights_ptr=weights,
        n=n,
        d=d,
        n_experts=n_experts,
        k=k,
        stride_x=x.stride(0),
        stride_proj=proj.stride(0),
        eps=eps,
        shrink=d**-0.5,
        BLOCK_E=max(16, triton.next_power_of_2(n_experts)),
        BLOCK_K=triton.next_power_of_2(k),
        STAGES=how["num_stages"],
        INTERPRETED=INTERPRETED,
        **how,
    )
    return probs, chosen, weights


@triton.jit
def _route_backward_kernel(
    dprobs_ptr,
    dweights_ptr,
    probs_ptr,
    indices_ptr,
    expert_scale_ptr,
    dlogits_ptr,
    dexpert_scale_ptr,
    dlogit_bias_ptr,
    n,
    n_experts,
    k,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With c_j = probs[index_j], share_j = c_j / sum c and weight_j = share_j * s_j, where s_j = expert_scale[index_j]:

        dshare_j = dweight_j * s_j,    dc_j = (dshare_j - sum_i dshare_i * share_i) / sum c,
        dp = dprobs + what each dc_j adds at index_j,    dlogits = p * (dp - sum p * dp)

    and dexpert_scale gets dweight_j * share_j at index_j. A program takes every num_programs-th block of tokens, and
    writes row i_program of dexpert_scale and of dlogit_bias, which is the sum of dlogits over tokens.
    """
    i_program = tl.program_id(0)
    o_e, o_k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    m_e = o_e < n_experts
    b_dexpert_scale = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    b_dlogit_bias = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for i_t in range(i_program * BLOCK_T, n, tl.num_programs(0) * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < n
        o_slot, m_slot = o_t[:, None] * k + o_k[None, :], m_t[:, None] & (o_k < k)[None, :]
        o_prob, m_prob = o_t[:, None] * n_experts + o_e[None, :], m_t[:, None] & m_e[None, :]
        b_index = tl.load(indices_ptr + o_slot, mask=m_slot, other=0)  # [T, K]
        b_dweights = tl.load(dweights_ptr + o_slot, mask=m_slot, other=0)  # [T, K]
        b_chosen = tl.load(probs_ptr + o_t[:, None] * n_experts + b_index, mask=m_slot, other=0)  # [T, K]
        b_total = tl.sum(b_chosen, axis=1)[:, None]
        b_total = tl.where(b_total == 0, 1, b_total)
        b_share = b_chosen / b_total
        b_dshare = b_dweights * tl.load(expert_scale_ptr + b_index).to(tl.float32)  # [T, K]
        b_dchosen = (b_dshare - tl.sum(b_dshare * b_share, axis=1)[:, None]) / b_total
        # From slots to experts: [T, K, E], and the sum over K
        m_here = (b_index[:, :, None] == o_e[None, None, :]) & m_slot[:, :, None]
        b_dexpert_scale += tl.sum(tl.where(m_here, (b_dweights * b_share)[:, :, None], 0), axis=1)
        b_dprobs = tl.load(dprobs_ptr + o_prob, mask=m_prob, other=0)  # [T, E]
        b_dprobs += tl.sum(tl.where(m_here, b_dchosen[:, :, None], 0), axis=1)
        b_probs = tl.load(probs_ptr + o_prob, mask=m_prob, other=0)  # [T, E]
        b_dlogits = b_probs * (b_dprobs - tl.sum(b_probs * b_dprobs, axis=1)[:, None])
        b_dlogit_bias += b_dlogits
        tl.store(dlogits_ptr + o_prob, b_dlogits.to(dlogits_ptr.dtype.element_ty), mask=m_prob)
    tl.store(dexpert_scale_ptr + i_program * n_experts + o_e, tl.sum(b_dexpert_scale, axis=0), mask=m_e)
    tl.store(dlogit_bias_ptr + i_program * n_experts + o_e, tl.sum(b_dlogit_bias, axis=0), mask=m_e)


def route_backward(
    dprobs: Tensor,
    dweights: Tensor,
    probs: Tensor,
    indices: Tensor,
    x: Tensor,
    scale: Tensor,
    proj: Tensor,
    per_expert_scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, proj, per_expert_scale and logit_bias. Below the logits, the router is a norm with weight
    `scale` and a matrix product, of which torch does the gradients well."""
    leave_float64(x)
    (n, n_experts), k = probs.shape, indices.shape[1]
    dlogits = x.new_empty(n, n_experts)
    block = 4
    programs = min(_PROGRAMS, triton.cdiv(n, block))
    dexpert_scale, dlogit_bias = x.new_empty(2, programs, n_experts, dtype=torch.float32)
    launch(
        _route_backward_kernel,
        (programs,),
        dprobs_ptr=dprobs.contiguous(),
        dweights_ptr=dweights.contiguous(),
        probs_ptr=probs.contiguous(),
        indices_ptr=indices.contiguous(),
        expert_scale_ptr=per_expert_scale.contiguous(),
        dlogits_ptr=dlogits,
        dexpert_scale_ptr=dexpert_scale,
        dlogit_bias_ptr=dlogit_bias,
        n=n,
        n_experts=n_experts,
        k=k,
        BLOCK_T=block,
        BLOCK_E=triton.next_power_of_2(n_experts),
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4,
    )
    shrink = x.shape[-1] ** -0.5
    dx, dscale = rms_norm_backward(dlogits @ proj * shrink, x, scale, eps)
    dproj = dlogits.T @ rms_norm(x, scale, eps) * shrink
    return dx, dscale, dproj, dexpert_scale.sum(0).type_as(per_expert_scale), dlogit_bias.sum(0)
