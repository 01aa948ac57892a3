"""From a public op's arguments to those of the Triton operators.

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence, ``c`` chunk size, ``z`` query/key width,
``e`` value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_plugin.kernels.layout import LinearState
from flash_plugin.kernels.segments import Segments
from flash_plugin.kernels.triton.linear import UNIT, differentiable_linear, padded_width
from flash_plugin.kernels.triton.mixed_chunk import differentiable_mixed_chunk
from flash_plugin.kernels.triton.quadratic import differentiable_quadratic


def call_mixed_chunk(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    gate: Tensor | None,
    bias: Tensor | None,
    segments: Segments | None,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor,
    linear: bool,
    initial: LinearState | None,
    final: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Mixed chunk attention, without the global part unless ``linear``; ``segments`` None where rows are documents.

    Returns:
        ``[b, s, e]`` and the state behind the last token, ``[b, z, e]`` float32 (empty unless ``final``).
    """
    q_local, scale = _apply_tensor_scale(q_local, scale)
    gain = _gain(activation, scale, bias, q_local.shape[-1])
    before = (None, None) if initial is None else (initial.kv, initial.count)
    spans: tuple[Tensor | None, ...] = (None,) * 4
    if segments is not None:
        grid = segments.chunks(chunk_size)
        spans = (segments.start, grid.start, None if causal else grid.end, segments.real)
    out, _, _, state = differentiable_mixed_chunk(
        q_local, k_local, q_global, k_global, v, gate, bias, *before, *spans, chunk_size, causal, linear, final,
        activation, normalizer, scale, gain, silu,
    )  # fmt: skip
    return out, state


def call_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None,
    bias: Tensor | None,
    segments: Segments | None,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor,
    silu: bool,
) -> Tensor:
    """Quadratic attention, ``[b, s, e]``."""
    q, scale = _apply_tensor_scale(q, scale)
    gain = _gain(activation, scale, bias, q.shape[-1])
    out, _ = differentiable_quadratic(
        q, k, v, gate, bias, *_documents(segments, causal), causal, activation, normalizer == "visible", scale, gain,
        silu,
    )  # fmt: skip
    return out


def call_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments | None,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
    initial: LinearState | None,
    final: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Linear attention of ``[b, h, s, z]`` queries and keys and ``[b, h, s, e]`` values.

    Returns:
        ``[b, h, s, e]``; if ``final`` the state behind the last token, ``[b, h, z, e]`` float32, and the sum of its
        keys, ``[b, h, z]`` float32.
    """
    (batch, heads), e = v.shape[:2], v.shape[-1]
    initial_kv = None if initial is None else initial.kv
    if normalize and initial is not None:
        assert initial.key_sum is not None
        units = (initial.key_sum * UNIT).unsqueeze(-1).expand(*initial.key_sum.shape, padded_width(e) - e)
        initial_kv = torch.cat([initial.kv, units], dim=-1)
    out, *_, state = differentiable_linear(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None if initial_kv is None else initial_kv.flatten(0, 1),
        *_documents(segments, causal), causal, normalize, float(scale), float(eps), final,
    )  # fmt: skip
    out = out.unflatten(0, (batch, heads))
    if not final:
        return out, None, None
    last, first = k, None if initial is None else initial.key_sum
    if segments is not None:
        held = segments.start == segments.start[:, -1:]
        last = last * (held if segments.real is None else held & segments.real)[:, None, :, None]
        first = None if first is None else first * (segments.start[:, -1] == segments.start[:, 0])[:, None, None]
    key_sum = last.sum(-2, dtype=torch.float32)
    return out, state[..., :e].unflatten(0, (batch, heads)), key_sum if first is None else key_sum + first.float()


def _documents(segments: Segments | None, causal: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Start and end of each token's document, and which keys are real."""
    if segments is None:
        return None, None, None
    return segments.start, None if causal else segments.end, segments.real


def _apply_tensor_scale(q: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """A learned scale goes into the queries, where autograd finds it."""
    return ((q * scale).to(q.dtype), 1.0) if isinstance(scale, Tensor) else (q, float(scale))


def _gain(activation: str, scale: float, bias: Tensor | None, qk_dim: int) -> float:
    """What keeps the weights of order one: with a scale of 1/L inside its square, relu2 would flush in float16."""
    if activation != "relu2" or bias is not None or not 1e-12 < abs(scale) < 1e12:
        return 1.0
    return 1.0 / (scale**2 * qk_dim)
