"""Quadratic attention as a pair of torch operators: mixed chunk attention with one chunk and no states.

Weights are made for a panel of the score matrix at a time, of rows in forward and of keys in backward, whose size does
not grow with the sequence: made once for all values instead of anew for each block of them. Saved for the backward are
the inputs and the mixed values before the gate.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.triton import launch
from flash_plugin.kernels.triton.launch import Options, Panel
from flash_plugin.kernels.triton.plan import WHOLE, Divisors, Plan, Spans, make_plan
from flash_plugin.kernels.triton.registration import differentiable
from flash_plugin.kernels.triton.shapes import tile_size

# Bytes of one buffer of weights; the backward holds three of them.
_PANEL_BYTES = 128 * 2**20


@torch.library.custom_op("flash_plugin::quadratic", mutates_args=())
def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    real: Tensor | None,
    causal: bool,
    activation: str,
    visible: bool,
    scale: float,
    gain: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """``open(gate) sum_s act(scale q_t.k_s + bias) v_s``, divided by the number of keys if ``visible``.

    Args:
        q: Queries, ``[b, s, z]``.
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Multiplies the result, ``[b, s, e]``.
        bias: Added to scores, ``[2s - 1]``.
        start: Index of the first token of each token's document, ``[b or 1, s]`` int64; None: all rows are single
            documents, and the next two are None too.
        end: Index one past the last one, likewise; None if ``causal``.
        real: False at padding keys, bool.
        causal: Whether tokens see only themselves and what lies before them.
        activation: Attention function.
        visible: Divide by the number of keys a token sees.
        scale: Factor of q.k.
        gain: Factor of the attention weights, which is divided by again: keeps them of order one.
        silu: Apply SiLU to ``v`` and ``gate``.

    Returns:
        ``[b, s, e]``, and the same before the gate, empty if there is none.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    gate = None if gate is None else gate.contiguous()
    plan = _plan(v, Spans(start, start, end, real), causal, visible, gain)
    values = F.silu(v) if silu else v
    options = Options(activation, scale, gain)
    out = torch.empty_like(v)
    mixed = None if gate is None else torch.empty_like(v)
    for row0, rows in _panels(plan, v):
        # Causal rows see no key beyond their own panel.
        width = row0 + rows if causal else plan.width
        panel = Panel(rows, width, row0=row0, col0=0)
        weights, _ = launch.compute_scores(plan, panel, options, (q, k), None, bias, with_slopes=False)
        launch.mix(plan, panel, weights, values, None, None, plan.row_scale, gate, silu, mixed, out)
    return out, v.new_empty(0) if mixed is None else mixed


@quadratic.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, start: Tensor | None,
    end: Tensor | None, real: Tensor | None, causal: bool, activation: str, visible: bool, scale: float, gain: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return v.new_empty(v.shape), v.new_empty(0) if gate is None else v.new_empty(v.shape)


@torch.library.custom_op("flash_plugin::quadratic_backward", mutates_args=())
def quadratic_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    real: Tensor | None,
    mixed: Tensor,
    causal: bool,
    activation: str,
    visible: bool,
    scale: float,
    gain: float,
    silu: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, gate and bias; empty where there is no input."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    gate = None if gate is None else gate.contiguous()
    plan = _plan(v, Spans(start, start, end, real), causal, visible, gain)
    options = Options(activation, scale, gain)
    values = F.silu(v) if silu else v
    dmixed, dgate = launch.gate_gradient(plan, grad, gate, mixed, plan.row_scale, silu)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dq = torch.zeros_like(q, dtype=torch.float32)
    diagonals = None if bias is None else launch.BiasGradient(plan, bias, len(v))
    # By keys: a panel's values and keys then get their whole gradient at once, and only the narrow queries' adds up.
    for col0, width in _panels(plan, v):
        panel = Panel(plan.tiles * plan.tile, width, col0=col0)
        weights, slopes = launch.compute_scores(plan, panel, options, (q, k), None, bias, with_slopes=True)
        assert slopes is not None
        dscores, _ = launch.score_gradient(plan, panel, dmixed, values, slopes, diagonals=diagonals)
        launch.value_gradient(plan, panel, weights, dmixed, None, None, v if silu else None, dv)
        launch.query_gradient(plan, panel, dscores, k, dq, add=True)
        launch.key_gradient(plan, panel, dscores, q, dk, scale=scale)
    given = (dgate, None if diagonals is None else diagonals.total())
    return [torch.mul(dq, scale, out=torch.empty_like(q)), dk, dv, *(v.new_empty(0) if x is None else x for x in given)]


@quadratic_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, bias: Tensor | None, start: Tensor | None,
    end: Tensor | None, real: Tensor | None, mixed: Tensor, causal: bool, activation: str, visible: bool, scale: float,
    gain: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    return [v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, gate, bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_mixed: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad is None:
        return (None,) * 14
    gradients = quadratic_backward(grad, *saved, *ctx.options)
    wanted = (None if x is None else gradient for x, gradient in zip(saved[:5], gradients, strict=True))
    return (*wanted, *(None,) * 9)


differentiable_quadratic = differentiable("Quadratic", quadratic, _setup_context, _backward)


def _plan(v: Tensor, spans: Spans, causal: bool, visible: bool, gain: float) -> Plan:
    tile, divisors = tile_size(v.dtype), Divisors(visible, gain)
    return make_plan(spans, v, tile=tile, spacing=tile, causal=causal, size=WHOLE, divisors=divisors, linear=False)


def _panels(plan: Plan, v: Tensor) -> Iterator[tuple[int, int]]:
    """Start and size of each panel, in whole tiles."""
    whole = plan.tiles * plan.tile
    size = _PANEL_BYTES // (len(v) * whole * v.element_size()) // plan.tile * plan.tile
    size = max(size, plan.tile)
    for start in range(0, whole, size):
        yield start, min(size, whole - start)
