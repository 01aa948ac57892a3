"""FLASH-Quad's quadratic attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import attention_weights, gated
from flash_plugin.kernels.autocast import like_matrix_products
from flash_plugin.kernels.layout import Layout, default_scale, local_divisor, state_dtype
from flash_plugin.kernels.panels import row_panels
from flash_plugin.kernels.relative_bias import bias_between
from flash_plugin.kernels.segments import Segments, unless_single
from flash_plugin.kernels.validation import (
    check_attention,
    check_bias,
    check_gate,
    check_queries_and_keys,
    check_segments,
    check_values,
    not_in_triton,
    use_triton,
)


@like_matrix_products
def quadratic_attention(
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
    impl: str = "auto",
) -> Tensor:
    """FLASH-Quad (paper section 2, equation 5): ``out_t = gate_t * sum_s act(scale q_t.k_s + bias_{t-s}) v_s``.

    Args:
        q: Queries, ``[b, s, z]``.
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Multiplies the result, ``[b, s, e]``.
        bias: Added to the scores, ``[2s - 1]``, indexed by ``(t - s) + s - 1``.
        segments: Documents and padding, from :func:`make_segments`; None means one document a row.
        causal: Whether tokens see only themselves and what lies before them.
        activation: ``relu2``, ``laplace``, ``softplus2`` or ``softmax``.
        normalizer: ``visible`` divides by the number of keys a token sees; ``paper`` and ``chunk`` by nothing.
        scale: Factor of q.k; by default ``z**-0.5`` for ``visible`` and ``1/s`` for the others, with which a token's
            output changes when text or padding is added.
        dropout: Probability of zeroing an attention weight; the caller passes 0 outside training.
        silu: Apply SiLU to ``v`` and ``gate`` inside the op.
        impl: ``auto``, ``triton`` or ``reference`` (PyTorch, in panels of rows).

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        ``[b, s, e]`` in the dtype of ``v``.
    """
    check_attention(activation=activation, normalizer=normalizer, dropout=dropout, impl=impl)
    check_queries_and_keys({"q": q, "k": k}, dims=3)
    check_values("v", v, "q", q)
    check_gate(gate, v)
    check_bias(bias, q.shape[1], q)
    check_segments(segments, q)
    length, dtype = q.shape[1], state_dtype(q.dtype)
    if scale is None:
        scale = default_scale(normalizer, q.shape[-1], length)
    if use_triton(impl, v, not_in_triton(activation, dropout, v)):
        from flash_plugin.kernels.triton.calls import call_quadratic

        return call_quadratic(
            q,
            k,
            v,
            gate=gate,
            bias=bias,
            segments=unless_single(segments),
            causal=causal,
            activation=activation,
            normalizer=normalizer,
            scale=scale,
            silu=silu,
        )
    layout = Layout.of(segments, length, None, q.device)
    if silu:
        v = F.silu(v)
    # Scores in float32: their rounding would be magnified by steep activations, and they are few beside the values.
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    divisor = local_divisor(normalizer, activation, layout, causal, dtype)

    panels = []
    for rows in row_panels(length):
        end = rows.stop if causal else length
        scores = (wide_q[:, rows] @ wide_k[:, :end].mT) * scale
        queries, keys = layout.index[:, rows, None], layout.index[:, None, :end]
        if bias is not None:
            scores = scores + bias_between(bias.to(dtype), rows.start, rows.stop - rows.start, end)
        visible = layout.chunk_start[:, rows, None] == layout.chunk_start[:, None, :end]
        if causal:
            visible = visible & (keys <= queries)
        if layout.real is not None:
            visible = visible & layout.real[:, None, :end]
        weights = attention_weights(scores, visible, activation)
        if divisor is not None:
            weights = weights / divisor[:, rows, None]
        panels.append(F.dropout(weights, dropout).to(v.dtype) @ v[:, :end])
    out = torch.cat(panels, dim=1)
    return gated(out, gate, silu)
