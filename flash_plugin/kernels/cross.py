"""FLASH's attention from one sequence to another: queries and gate of the one, keys and values of the other.

Nothing is causal and no distance between the two means anything, so there is no bias. Chunks neither: what the tokens
of one chunk would see more closely in another sequence nobody says. What is left of mixed chunk attention is its global
part, the linear form, which sums over the keys once, whatever the number of queries.

Shape legend: ``b`` batch, ``t`` queries, ``s`` keys, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import attention_weights, gated
from flash_plugin.kernels.autocast import like_matrix_products
from flash_plugin.kernels.layout import default_scale, state_dtype
from flash_plugin.kernels.panels import row_panels


@like_matrix_products
def cross_quadratic(
    q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor, visible: Tensor, activation: str, dropout: float = 0.0
) -> Tensor:
    """``silu(gate_t) * sum_s act(z**-0.5 q_t.k_s) v_s / n_t``, n_t being the number of keys that t sees.

    ``softmax`` normalises itself and is not divided.

    Args:
        q: Queries, ``[b, t, z]``.
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Gate before SiLU, ``[b, t, e]``.
        visible: True where a query sees a key, ``[1 or b, 1 or t, s]``.
        activation: ``relu2``, ``laplace``, ``softplus2`` or ``softmax``.
        dropout: Probability of zeroing an attention weight; the caller passes 0 outside training.

    Returns:
        ``[b, t, e]`` in the dtype of ``v``; 0 for a query that sees nothing.
    """
    dtype = state_dtype(v.dtype)
    keys, scale = k.to(dtype), default_scale("visible", q.shape[-1], k.shape[1])
    panels = []
    for rows in row_panels(q.shape[1]):
        seen = visible if visible.shape[1] == 1 else visible[:, rows]
        weights = attention_weights((q[:, rows].to(dtype) @ keys.mT) * scale, seen, activation)
        if activation != "softmax":
            weights = weights / seen.sum(dim=-1, keepdim=True).clamp(min=1).to(dtype)
        panels.append(F.dropout(weights, dropout).to(v.dtype) @ v)
    return gated(torch.cat(panels, dim=1), gate, silu=True)


@like_matrix_products
def sum_over_keys(k: Tensor, v: Tensor, *, real: Tensor) -> Tensor:
    """``sum_s k_s^T v_s``.

    Args:
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        real: False at keys that are left out, ``[1 or b, s]``.

    Returns:
        ``[b, z, e]`` in float32 (float64 for float64).
    """
    dtype = state_dtype(v.dtype)  # before the product: a sum in float16 overflows
    return k.masked_fill(~real[..., None], 0.0).to(dtype).mT @ v.to(dtype)


@like_matrix_products
def cross_linear(q: Tensor, *, gate: Tensor, kv: Tensor, count: Tensor) -> Tensor:
    """``silu(gate_t) * q_t . sum_s k_s^T v_s / n``, as the bidirectional global part of mixed chunk attention.

    Args:
        q: Queries, ``[b, t, z]``.
        gate: Gate before SiLU, ``[b, t, e]``.
        kv: The sum, from :func:`sum_over_keys`, ``[b, z, e]``.
        count: How many keys n it was taken over, ``[1 or b]``; 0 gives 0.

    Returns:
        ``[b, t, e]`` in the dtype of ``q``.
    """
    mean = kv / count.clamp(min=1).to(kv.dtype)[:, None, None]
    return gated(q @ mean.to(q.dtype), gate, silu=True)
