"""Mixed chunk attention as a pair of torch operators, forward and backward, made of the passes in ``launch.py``.

Forward: states, weights, then ``[A | q] @ [V ; S]`` with the gate in its epilogue. Backward: what the gate lets
through, states of the gradient running backwards, weights again with their slopes, and a product for each gradient.
Saved between them are the inputs, the mixed values before the gate, and the states (in the inputs' dtype); nothing is
``s x s``.

Shape legend: ``b`` batch, ``s`` sequence, ``c`` chunk size, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.triton import launch
from flash_plugin.kernels.triton.launch import Options, Panel, States, times
from flash_plugin.kernels.triton.plan import WHOLE, Divisors, Plan, Spans, make_plan
from flash_plugin.kernels.triton.registration import differentiable
from flash_plugin.kernels.triton.shapes import tile_size


@torch.library.custom_op("flash_plugin::mixed_chunk", mutates_args=())
def mixed_chunk(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    count: Tensor | None,
    document_start: Tensor | None,
    chunk_start: Tensor | None,
    chunk_end: Tensor | None,
    real: Tensor | None,
    chunk_size: int,
    causal: bool,
    linear: bool,
    final: bool,
    activation: str,
    normalizer: str,
    scale: float,
    gain: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixed chunk attention, ``open(gate) (local + global)``.

    Args:
        q_local: Local queries, ``[b, s, z]``.
        k_local: Local keys, ``[b, s, z]``.
        q_global: Global queries, ``[b, s, z]``.
        k_global: Global keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Multiplies the result, ``[b, s, e]``.
        bias: Added to local scores, ``[2c - 1]``.
        initial: State before each row's first document, ``[b, z, e]``.
        count: Tokens it holds, ``[b]`` int64.
        document_start: Index of the first token of each token's document, ``[b or 1, s]`` int64; None: all rows are
            single documents, and the next three are None too.
        chunk_start: Index of the first token of each token's chunk, likewise.
        chunk_end: Index one past the last one, likewise; None if ``causal``.
        real: False at padding keys, bool.
        chunk_size: Most tokens of a chunk.
        causal: Whether tokens see only themselves and what lies before them.
        linear: Whether there is a global part. A bidirectional one takes in all of the row's tokens.
        final: Whether the state behind the last token is wanted.
        activation: Attention function.
        normalizer: What divides both parts.
        scale: Factor of the local q.k.
        gain: Factor of the attention weights, which is divided by again: keeps them of order one.
        silu: Apply SiLU to ``v`` and ``gate``.

    Returns:
        ``[b, s, e]``; the same before the gate, empty if there is none; the states, and the state behind the last token
        in float32, empty if not wanted.
    """
    inputs = (x.contiguous() for x in (q_local, k_local, q_global, k_global, v))
    q_local, k_local, q_global, k_global, v = inputs
    gate = None if gate is None else gate.contiguous()
    spans = Spans(document_start, chunk_start, chunk_end, real)
    plan = _plan(v, spans, chunk_size, causal, linear, normalizer, gain, count)
    queries = times(q_global, plan.share)
    values = F.silu(v) if silu else v
    states, total = _states(plan, k_global, values, initial, linear, final)
    panel = Panel.bands(plan)
    options = Options(activation, scale, gain)
    weights, _ = launch.compute_scores(
        plan, panel, options, (q_local, k_local), (queries, k_global), bias, with_slopes=False
    )
    out = torch.empty_like(v)
    mixed = None if gate is None else torch.empty_like(v)
    reader = times(queries, plan.reads)
    launch.mix(plan, panel, weights, values, reader, states, plan.row_scale, gate, silu, mixed, out)
    return (
        out,
        v.new_empty(0) if mixed is None else mixed,
        v.new_empty(0) if states is None else states.tensor,
        v.new_empty(0, dtype=torch.float32) if total is None else total,
    )


@mixed_chunk.register_fake
def _(
    q_local: Tensor, k_local: Tensor, q_global: Tensor, k_global: Tensor, v: Tensor, gate: Tensor | None,
    bias: Tensor | None, initial: Tensor | None, count: Tensor | None, document_start: Tensor | None,
    chunk_start: Tensor | None, chunk_end: Tensor | None, real: Tensor | None, chunk_size: int, causal: bool,
    linear: bool, final: bool, activation: str, normalizer: str, scale: float, gain: float, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, e), z = v.shape, q_local.shape[-1]
    spacing = _spacing(v.dtype, chunk_size)
    states = (length + spacing - 1) // spacing if causal else 1
    return (
        v.new_empty(v.shape),
        v.new_empty(0) if gate is None else v.new_empty(v.shape),
        v.new_empty(batch, states, z, e) if linear else v.new_empty(0),
        v.new_empty((batch, z, e) if final else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("flash_plugin::mixed_chunk_backward", mutates_args=())
def mixed_chunk_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    count: Tensor | None,
    document_start: Tensor | None,
    chunk_start: Tensor | None,
    chunk_end: Tensor | None,
    real: Tensor | None,
    mixed: Tensor,
    states: Tensor,
    chunk_size: int,
    causal: bool,
    linear: bool,
    activation: str,
    normalizer: str,
    scale: float,
    gain: float,
    silu: bool,
) -> list[Tensor]:
    """Gradients of q_local, k_local, q_global, k_global, v, gate, bias and initial; empty where there is no input."""
    inputs = (x.contiguous() for x in (grad, q_local, k_local, q_global, k_global, v))
    grad, q_local, k_local, q_global, k_global, v = inputs
    gate = None if gate is None else gate.contiguous()
    spans = Spans(document_start, chunk_start, chunk_end, real)
    plan = _plan(v, spans, chunk_size, causal, linear, normalizer, gain, count)
    panel = Panel.bands(plan)
    queries = times(q_global, plan.share)
    values = F.silu(v) if silu else v
    dmixed, dgate = launch.gate_gradient(plan, grad, gate, mixed, plan.row_scale, silu)

    backward_states, dinitial = None, None
    if linear and causal:
        backward_states, dinitial = launch.running_states(
            plan, times(queries, plan.reads), dmixed, grad_final, reverse=True, final=initial is not None
        )
    elif linear:
        backward_states = _sum_of_all(queries, dmixed)

    weights, slopes = launch.compute_scores(
        plan, panel, Options(activation, scale, gain), (q_local, k_local), (queries, k_global), bias, with_slopes=True
    )
    assert slopes is not None
    diagonals = None if bias is None else launch.BiasGradient(plan, bias, len(v))
    dscores, dlinear = launch.score_gradient(
        plan, panel, dmixed, values, slopes, split=plan.direct, diagonals=diagonals
    )
    dv = torch.empty_like(v)
    launch.value_gradient(
        plan, panel, weights, dmixed, times(k_global, plan.enters), backward_states, v if silu else None, dv
    )
    dq_local, dk_local = torch.empty_like(q_local), torch.empty_like(k_local)
    launch.query_gradient(plan, panel, dscores, k_local, dq_local, scale=scale)
    launch.key_gradient(plan, panel, dscores, q_local, dk_local, scale=scale)
    dq_linear, dk_linear = None, None
    if dlinear is not None:
        dq_linear, dk_linear = (torch.empty_like(x, dtype=torch.float32) for x in (q_global, k_global))
        launch.query_gradient(plan, panel, dlinear, k_global, dq_linear)
        launch.key_gradient(plan, panel, dlinear, queries, dk_linear)
    dq_global, dk_global = torch.empty_like(q_global), torch.empty_like(k_global)
    if backward_states is None:
        dq_global.zero_()
        dk_global.zero_()
    else:
        forward_states = States(states, backward_states.spacing)
        launch.state_gradient(
            plan, dmixed, forward_states, dq_linear, plan.reads, queries=True, out=dq_global, row_scale=plan.share
        )
        launch.state_gradient(plan, values, backward_states, dk_linear, plan.enters, queries=False, out=dk_global)
    if initial is not None and dinitial is not None:
        dinitial = dinitial.to(initial.dtype)
    given = (dgate, None if diagonals is None else diagonals.total(), dinitial)
    return [dq_local, dk_local, dq_global, dk_global, dv, *(v.new_empty(0) if x is None else x for x in given)]


@mixed_chunk_backward.register_fake
def _(
    grad: Tensor, grad_final: Tensor | None, q_local: Tensor, k_local: Tensor, q_global: Tensor, k_global: Tensor,
    v: Tensor, gate: Tensor | None, bias: Tensor | None, initial: Tensor | None, count: Tensor | None,
    document_start: Tensor | None, chunk_start: Tensor | None, chunk_end: Tensor | None, real: Tensor | None,
    mixed: Tensor, states: Tensor, chunk_size: int, causal: bool, linear: bool, activation: str, normalizer: str,
    scale: float, gain: float, silu: bool,
) -> list[Tensor]:  # fmt: skip
    inputs = (q_local, k_local, q_global, k_global, v, gate, bias, initial)
    return [v.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (chunk_size, causal, linear, _, *others) = inputs[:13], inputs[13:]
    ctx.options = (chunk_size, causal, linear, *others)
    _, mixed, states, _ = output
    ctx.save_for_backward(*tensors, mixed, states)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad: Tensor | None, grad_mixed: None, grad_states: None, grad_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    given = saved[:8]
    if grad is None and grad_final is None:
        return (None,) * 22
    if grad is None:
        grad = torch.zeros_like(saved[4])
    gradients = mixed_chunk_backward(grad, grad_final, *saved, *ctx.options)
    wanted = (None if x is None else gradient for x, gradient in zip(given, gradients, strict=True))
    return (*wanted, *(None,) * 14)


differentiable_mixed_chunk = differentiable("MixedChunk", mixed_chunk, _setup_context, _backward)


def _spacing(dtype: torch.dtype, chunk_size: int) -> int:
    tile = tile_size(dtype)
    return (chunk_size + tile - 1) // tile * tile


def _plan(
    v: Tensor, spans: Spans, chunk_size: int, causal: bool, linear: bool, normalizer: str, gain: float,
    count: Tensor | None,
) -> Plan:  # fmt: skip
    tile = tile_size(v.dtype)
    others = chunk_size if causal and normalizer == "chunk" else v.shape[1]
    return make_plan(
        spans,
        v,
        tile=tile,
        spacing=_spacing(v.dtype, chunk_size) if causal else tile,
        causal=causal,
        size=chunk_size,
        divisors=Divisors(normalizer == "visible", gain, float(others), count),
        linear=linear,
    )


def _states(
    plan: Plan, keys: Tensor, values: Tensor, initial: Tensor | None, linear: bool, final: bool
) -> tuple[States | None, Tensor | None]:
    if not linear:
        return None, None
    if plan.last is not None:
        return _sum_of_all(keys, values), None
    return launch.running_states(plan, times(keys, plan.enters), values, initial, reverse=False, final=final)


def _sum_of_all(x: Tensor, y: Tensor) -> States:
    """The one state of rows whose tokens all see each other."""
    # A backward may run where autocast is on; it must not choose the dtype of what kernels read.
    with torch.autocast(x.device.type, enabled=False):
        return States((x.mT @ y).unsqueeze(1), WHOLE)
