"""The plain formulas, dense and slow: what every implementation of this package must equal.

They build all pairs of tokens (O(s^2) memory), stay close to the mathematics of DESIGN section 1, and are
differentiable to any order. Use them to understand and to test, not to train.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` value width, ``h`` heads, ``c`` chunk size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import attention_weights
from flash_plugin.kernels.layout import Layout, LinearState, default_scale, global_weight, local_divisor, state_dtype
from flash_plugin.kernels.segments import Segments


def reference_quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Segments | None = None,
    causal: bool = True,
    activation: str = "relu2",
    normalizer: str = "visible",
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    silu: bool = False,
) -> Tensor:
    """FLASH-Quad (paper section 2): ``A_ts = act(scale q_t.k_s + b_{t-s})``, ``out_t = gate_t * sum_s A_ts v_s``.

    Arguments and result are those of :func:`flash_plugin.kernels.quadratic_attention`.
    """
    layout = Layout.of(segments, q.shape[1], None, q.device)
    weights = _local_weights(q, k, bias, layout, causal, activation, normalizer, scale, dropout, q.shape[1])
    return _gated(weights, v, gate, silu)


def reference_mixed_chunk_attention(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Segments | None = None,
    causal: bool = True,
    activation: str = "relu2",
    normalizer: str = "visible",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    silu: bool = False,
) -> Tensor | tuple[Tensor, LinearState]:
    """FLASH (paper section 3.1): quadratic inside chunks, linear across them.

    Arguments and result are those of :func:`flash_plugin.kernels.mixed_chunk_attention`.
    """
    layout = Layout.of(segments, v.shape[1], chunk_size, v.device)
    dtype = state_dtype(v.dtype)
    weights = _local_weights(
        q_local, k_local, bias, layout, causal, activation, normalizer, scale, dropout, chunk_size, softcap
    )
    keys = layout.index[:, None, :]
    seen = (layout.document_start[:, :, None] == layout.document_start[:, None, :]) & _real_keys(layout)
    if causal:
        seen = seen & (keys < layout.chunk_start[:, :, None])
    factor = global_weight(normalizer, layout, causal, chunk_size, initial_state, dtype)
    q_scaled = q_global.to(dtype) * factor[..., None]
    weights = weights + (q_scaled @ k_global.to(dtype).mT) * seen
    extra = None
    if initial_state is not None:
        extra = (q_scaled * layout.in_first_document[..., None]) @ initial_state.kv.to(dtype)
    out = _gated(weights, v, gate, silu, extra)
    if not return_state:
        return out
    values = F.silu(v.to(dtype)) if silu else v.to(dtype)
    kv, count = _final_state(k_global.to(dtype), values, layout, initial_state)
    return out, LinearState(kv, count)


def reference_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    normalize: bool = False,
    scale: float = 1.0,
    eps: float = 1e-6,
    segments: Segments | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention (Katharopoulos et al. 2020): ``out_t = sum_{s <= t} (scale q_t.k_s) v_s``.

    Arguments and result are those of :func:`flash_plugin.kernels.linear_attention`.
    """
    layout = Layout.of(segments, v.shape[2], None, v.device)
    dtype = state_dtype(v.dtype)
    seen = (layout.document_start[:, :, None] == layout.document_start[:, None, :]) & _real_keys(layout)
    if causal:
        seen = seen & (layout.index[:, None, :] <= layout.index[:, :, None])
    q_scaled = q.to(dtype) * scale
    weights = (q_scaled @ k.to(dtype).mT) * seen[:, None]
    out, denominator = weights @ v.to(dtype), weights.sum(-1)
    if initial_state is not None:
        carried = q_scaled * layout.in_first_document[:, None, :, None]
        out = out + carried @ initial_state.kv.to(dtype)
        if initial_state.key_sum is not None:
            denominator = denominator + (carried * initial_state.key_sum.to(dtype)[:, :, None]).sum(-1)
    if normalize:
        out = out / (denominator + eps)[..., None]
    out = out.to(v.dtype)
    if not return_state:
        return out
    kv, count = _final_state(k.to(dtype), v.to(dtype), layout, initial_state)
    ones = torch.ones_like(v[..., :1], dtype=dtype)
    earlier = None
    if initial_state is not None and initial_state.key_sum is not None:
        earlier = LinearState(initial_state.key_sum[..., None], initial_state.count)
    key_sum, _ = _final_state(k.to(dtype), ones, layout, earlier)
    return out, LinearState(kv, count, key_sum.squeeze(-1))


def _real_keys(layout: Layout) -> Tensor:
    if layout.real is None:
        return torch.ones_like(layout.index, dtype=torch.bool)[:, None, :]
    return layout.real[:, None, :]


def _local_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    layout: Layout,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor | None,
    dropout: float,
    length: int,
    softcap: float | None = None,
) -> Tensor:
    dtype = state_dtype(q.dtype)
    queries, keys = layout.index[:, :, None], layout.index[:, None, :]
    visible = (layout.chunk_start[:, :, None] == layout.chunk_start[:, None, :]) & _real_keys(layout)
    if causal:
        visible = visible & (keys <= queries)
    if scale is None:
        scale = default_scale(normalizer, q.shape[-1], length)
    scores = q.to(dtype) @ k.to(dtype).mT * scale
    if bias is not None:
        # Pairs farther apart than the vector reaches are in different chunks; the clamp only keeps the index legal.
        scores = scores + bias.to(dtype)[(queries - keys).clamp(1 - length, length - 1) + length - 1]
    weights = attention_weights(scores, visible, activation, softcap)
    divisor = local_divisor(normalizer, activation, layout, causal, dtype)
    if divisor is not None:
        weights = weights / divisor[..., None]
    return F.dropout(weights, dropout)


def _gated(weights: Tensor, v: Tensor, gate: Tensor | None, silu: bool, extra: Tensor | None = None) -> Tensor:
    values = v.to(weights.dtype)
    values = F.silu(values) if silu else values
    out = weights @ values
    if extra is not None:
        out = out + extra
    if gate is not None:
        opened = gate.to(out.dtype)
        out = out * (F.silu(opened) if silu else opened)
    return out.to(v.dtype)


def _final_state(k: Tensor, v: Tensor, layout: Layout, initial: LinearState | None) -> tuple[Tensor, Tensor]:
    """Sum of ``k^T v`` over each row's last document, and how many tokens it holds."""
    last = layout.document_start == layout.document_start[:, -1:]
    if layout.real is not None:
        last = last & layout.real
    mask = last[:, None, :, None] if k.dim() == 4 else last[..., None]
    kv = (k * mask).mT @ v
    count = layout.tokens_in_last_document().expand(k.shape[0])
    if initial is not None:
        carried = layout.in_first_document[:, -1]
        kv = kv + initial.kv.to(kv.dtype) * carried.view(-1, *[1] * (kv.dim() - 1))
        count = count + carried * initial.count
    return kv, count
