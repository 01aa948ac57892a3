"""From a public op's arguments to those of the Triton operators: what tokens see, and what divides their sums.

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence, ``c`` chunk size, ``z`` query/key width,
``e`` value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_plugin.kernels.layout import Layout, LinearState, local_divisor
from flash_plugin.kernels.triton.linear import UNIT, linear, padded_width
from flash_plugin.kernels.triton.mixed_chunk import mixed_chunk
from flash_plugin.kernels.triton.quadratic import quadratic


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
    layout: Layout,
    segmented: bool,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor,
    factor: Tensor | None,
    initial_kv: Tensor | None,
    final: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Mixed chunk attention; ``factor`` ``[b, s]`` multiplies the global part, which is left out if it is None.

    Returns:
        ``[b, s, e]`` and the state behind the last token, ``[b, z, e]`` float32 (empty unless ``final``).
    """
    q_local, scale = _apply_tensor_scale(q_local, scale)
    gain = _gain(activation, scale, bias, q_local.shape[-1])
    row_scale = _row_scale(normalizer, activation, layout, causal, gain)
    linear = factor is not None
    if factor is not None:
        # What multiplies the whole sum again must not multiply the global part twice.
        shared = factor if row_scale is None else factor / row_scale
        q_global = (q_global.float() * shared.unsqueeze(-1)).to(q_global.dtype)
    document = _document(layout, initial_kv is not None)
    out, _, _, state = mixed_chunk(
        q_local, k_local, q_global, k_global, v, gate, bias, initial_kv, row_scale, _index(layout.chunk_start, layout),
        None if causal else _index(layout.chunk_end, layout), _index(document, layout), _real(layout), chunk_size,
        not segmented, linear, final, activation, scale, gain, silu,
    )  # fmt: skip
    return out, state


def call_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor,
    silu: bool,
) -> Tensor:
    """Quadratic attention, ``[b, s, e]``."""
    q, scale = _apply_tensor_scale(q, scale)
    gain = _gain(activation, scale, bias, q.shape[-1])
    out, _ = quadratic(
        q, k, v, gate, bias, _row_scale(normalizer, activation, layout, causal, gain),
        _index(layout.chunk_start, layout), None if causal else _index(layout.chunk_end, layout), _real(layout),
        activation, scale, gain, silu,
    )  # fmt: skip
    return out


def call_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: Layout,
    segmented: bool,
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
    each = layout.repeated(heads) if segmented else layout
    out, *_, state = linear(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), None if initial_kv is None else initial_kv.flatten(0, 1),
        _index(_document(each, initial is not None), each),
        _index(each.document_end, each) if segmented and not causal else None, _real(each),
        causal, segmented, normalize, float(scale), float(eps), final,
    )  # fmt: skip
    out = out.unflatten(0, (batch, heads))
    if not final:
        return out, None, None
    last = k if layout.real is None else k * layout.real[:, None, :, None]
    if segmented:
        last = last * (layout.document_start == layout.document_start[:, -1:])[:, None, :, None]
    key_sum = last.sum(-2, dtype=torch.float32)
    if initial is not None:
        assert initial.key_sum is not None
        key_sum = key_sum + initial.key_sum.float() * layout.in_first_document[:, -1, None, None]
    return out, state[..., :e].unflatten(0, (batch, heads)), key_sum


def _document(layout: Layout, initial: bool) -> Tensor:
    """Index of the first token of each token's document, -1 in the first one where there is a state before it."""
    start = layout.document_start
    return torch.where(layout.in_first_document, -1, start) if initial else start


def _apply_tensor_scale(q: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """A learned scale goes into the queries, where autograd finds it."""
    return ((q * scale).to(q.dtype), 1.0) if isinstance(scale, Tensor) else (q, float(scale))


def _gain(activation: str, scale: float, bias: Tensor | None, qk_dim: int) -> float:
    """What keeps the weights of order one: with a scale of 1/L inside its square, relu2 would flush in float16."""
    if activation != "relu2" or bias is not None or not 1e-12 < abs(scale) < 1e12:
        return 1.0
    return 1.0 / (scale**2 * qk_dim)


def _row_scale(normalizer: str, activation: str, layout: Layout, causal: bool, gain: float) -> Tensor | None:
    divisor = local_divisor(normalizer, activation, layout, causal, torch.float32)
    if divisor is None:
        return None if gain == 1.0 else torch.full(layout.chunk_start.shape, 1.0 / gain, device=layout.index.device)
    return (1.0 / (divisor * gain)).expand(layout.chunk_start.shape).contiguous()


def _index(tensor: Tensor, layout: Layout) -> Tensor:
    return tensor.expand(layout.chunk_start.shape).to(torch.int32).contiguous()


def _real(layout: Layout) -> Tensor | None:
    return None if layout.real is None else layout.real.to(torch.int8).contiguous()
