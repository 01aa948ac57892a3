"""Linear attention as a pair of torch operators: mixed chunk attention whose pairs are all linear.

The sequence is cut into blocks. Pairs inside a block are computed directly; what lies before it reaches its queries
through a state, the sum of ``k^T v`` over the document that is open there, and where attention is bidirectional what
lies behind it through a second one. Without documents or padding, bidirectional attention needs one state for all.

A denominator is one more column of the values. With it sums cancel that may be a hundred times as large as what is
left of them, so that half precision is too coarse for states and result: the states then come in two parts, rounded and
what rounding took, and the result is kept in float32 too.

Saved for the backward are the inputs and the states (in the inputs' dtype), and with a denominator the result and what
each of its rows was multiplied by; nothing is ``s x s``.

Shape legend: ``b`` batch times heads, ``s`` sequence, ``n`` blocks, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.triton import launch
from flash_plugin.kernels.triton.launch import Options, Panel, Quotient, States, times
from flash_plugin.kernels.triton.plan import WHOLE, Plan, Spans, make_linear_plan
from flash_plugin.kernels.triton.registration import differentiable
from flash_plugin.kernels.triton.shapes import tile_size

#: Stands for 1 in the columns of the values that sum the weights: float16 would hold no more than 65504 keys.
UNIT = 2.0**-7

# Linear pairs know neither activation nor scale.
_OPTIONS = Options("relu2", 1.0, 1.0)
# Which states there are, by whether they sum backwards: those of keys, and those of queries for the keys' gradient.
_OF_KEYS = (False, True)
_OF_QUERIES = (True, False)

# Which tokens enter the states that sum forwards, and which those that sum backwards; None means all.
_Marks = tuple[Tensor | None, Tensor | None]


@torch.library.custom_op("flash_plugin::linear", mutates_args=())
def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    real: Tensor | None,
    causal: bool,
    normalize: bool,
    scale: float,
    eps: float,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out_t = sum_s (scale q_t.k_s) v_s``, divided by ``sum_s (scale q_t.k_s) + eps`` if ``normalize``.

    Args:
        q: Queries, ``[b, s, z]``.
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        initial: State before each row's first document, ``[b, z, e]``; with ``normalize`` :func:`padded_width` wide,
            ``UNIT`` times the sum of the keys in its last columns.
        start: Index of the first token of each token's document, ``[rows or 1, s]`` int64, of rows that follow each
            other in ``b``, each as many times; None: all are single documents, and the next two are None too.
        end: Index one past the last token of it, likewise; None if ``causal``.
        real: False at padding keys, bool.
        causal: Whether the sum runs over ``s <= t`` or over the whole document.
        normalize: Divide by the sum of the weights.
        scale: Factor of the weights.
        eps: Added to their sum.
        final: Whether the state behind the last token is wanted. Causal only, like ``initial``.

    Returns:
        ``[b, s, e]``; the same in float32, empty unless it is rounded and a quotient; what each row was multiplied by,
        ``[b, s]`` float32, empty without ``normalize``; the states; the state behind the last token in float32, as wide
        as ``initial``, empty if not wanted.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    segmented = start is not None
    plan = _plan(q, v, Spans(start, start, end, real), causal, initial is not None)
    values = _with_units(v) if normalize else v
    panel, order, parts = Panel.bands(plan), _OF_KEYS[: _directions(causal, segmented)], _parts(v, normalize)
    q_marks, k_marks = _marks(plan, segmented)
    total = None
    if causal or segmented:
        states, total = _sums(plan, k_marks, k, values, order, parts, initial, final)
        weights, _ = launch.compute_scores(plan, panel, _OPTIONS, None, (q, k), None, with_slopes=False)
    else:
        states, weights = _sum_of_all(plan, k, values, parts), v
    out = torch.empty_like(v)
    exact = torch.empty_like(v, dtype=torch.float32) if parts == 2 else None
    factor = v.new_empty(v.shape[:2] if normalize else (0,), dtype=torch.float32)
    quotient = Quotient(scale, eps, UNIT, factor) if normalize else None
    readers = _readers(q, q_marks, order, parts)
    row_scale = None if normalize else _row_scale(plan, scale)
    launch.mix(plan, panel, weights, values, readers, states, row_scale, None, False, exact, out, quotient)
    exact, total = (v.new_empty(0, dtype=torch.float32) if x is None else x for x in (exact, total))
    return out, exact, factor, states.tensor, total


@linear.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, start: Tensor | None, end: Tensor | None,
    real: Tensor | None, causal: bool, normalize: bool, scale: float, eps: float, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, e), z, segmented = v.shape, q.shape[-1], start is not None
    spacing, parts = _spacing(v.dtype, z, e), _parts(v, normalize)
    count = (length + spacing - 1) // spacing if causal or segmented else 1
    width = padded_width(e) if normalize else e
    return (
        v.new_empty(v.shape),
        v.new_empty(v.shape if parts == 2 else (0,), dtype=torch.float32),
        v.new_empty((batch, length) if normalize else (0,), dtype=torch.float32),
        v.new_empty(batch, count, _directions(causal, segmented) * parts * z, width),
        v.new_empty((batch, z, width) if final else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("flash_plugin::linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    real: Tensor | None,
    out: Tensor | None,
    factor: Tensor,
    states: Tensor,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v and initial, empty if there is none; ``out`` in float32, only of a quotient."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    segmented = start is not None
    plan = _plan(q, v, Spans(start, start, end, real), causal, initial is not None)
    panel, directions, parts = Panel.bands(plan), _directions(causal, segmented), _parts(v, out is not None)
    order, back_order = _OF_KEYS[:directions], _OF_QUERIES[:directions]
    q_marks, k_marks = _marks(plan, segmented)
    if out is None:
        values = v
        dmixed, _ = launch.gate_gradient(plan, grad, None, None, _row_scale(plan, scale), False)
    else:
        values = _with_units(v)
        dmixed = launch.quotient_gradient(grad, out, factor, values.shape[-1], UNIT)
    dq, dk, dinitial = None, None, None
    if causal or segmented:
        back, dinitial = _sums(plan, q_marks, q, dmixed, back_order, parts, grad_final, initial is not None)
        weights, slopes = launch.compute_scores(plan, panel, _OPTIONS, None, (q, k), None, with_slopes=True)
        assert slopes is not None
        dscores, _ = launch.score_gradient(plan, panel, dmixed, values, slopes)
        dq, dk = (torch.empty_like(x, dtype=torch.float32) for x in (q, k))
        launch.query_gradient(plan, panel, dscores, k, dq)
        launch.key_gradient(plan, panel, dscores, q, dk)
    else:
        back, weights = _sum_of_all(plan, q, dmixed, parts), v
    dv = torch.empty_like(v)
    launch.value_gradient(plan, panel, weights, dmixed, _readers(k, k_marks, back_order, parts), back, None, dv)
    dq = _through_states(plan, q_marks, dmixed, States(states, back.spacing), dq, order, parts, q, queries=True)
    dk = _through_states(plan, k_marks, values, back, dk, back_order, parts, k, queries=False)
    if initial is None or dinitial is None:
        return [dq, dk, dv, v.new_empty(0)]
    return [dq, dk, dv, dinitial.to(initial.dtype)]


@linear_backward.register_fake
def _(
    grad: Tensor, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None,
    start: Tensor | None, end: Tensor | None, real: Tensor | None, out: Tensor | None, factor: Tensor, states: Tensor,
    causal: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    return [v.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, initial)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, normalize, ctx.scale, _, ctx.final = inputs
    out, exact, factor, states, _ = output
    exact = exact if _parts(out, normalize) == 2 else out
    ctx.save_for_backward(*tensors, exact if normalize else None, factor, states)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, grad_final = ctx.saved_tensors, others[-1] if ctx.final else None
    if grad is None and grad_final is None:
        return (None,) * 12
    if grad is None:
        grad = torch.zeros_like(saved[2])
    gradients = linear_backward(grad, grad_final, *saved, ctx.causal, ctx.scale)
    wanted = (None if x is None else gradient for x, gradient in zip(saved[:4], gradients, strict=True))
    return (*wanted, *(None,) * 8)


differentiable_linear = differentiable("Linear", linear, _setup_context, _backward)


def padded_width(width: int) -> int:
    """Columns of values that are ``width`` wide and of those that sum their weights: at least two, 16 divides all."""
    return ((width + 1) // 16 + 1) * 16


def _with_units(v: Tensor) -> Tensor:
    return F.pad(v, (0, padded_width(v.shape[-1]) - v.shape[-1]), value=UNIT)


def _parts(v: Tensor, normalize: bool) -> int:
    """Parts that states come in."""
    return 2 if normalize and v.dtype != torch.float32 else 1


def _directions(causal: bool, segmented: bool) -> int:
    return 1 if causal or not segmented else 2


def _spacing(dtype: torch.dtype, z: int, e: int) -> int:
    """Tokens of a block: about as many as make its pairs cost what its states do, in time and in memory."""
    tile = tile_size(dtype)
    return -(-2 * z * e // ((z + e) * tile)) * tile


def _plan(q: Tensor, v: Tensor, spans: Spans, causal: bool, initial: bool) -> Plan:
    pairs = causal or spans.document_start is not None
    spacing = _spacing(v.dtype, q.shape[-1], v.shape[-1]) if pairs else WHOLE
    return make_linear_plan(
        spans, v, tile=tile_size(v.dtype), spacing=spacing, causal=causal, pairs=pairs, initial=initial
    )


def _marks(plan: Plan, segmented: bool) -> tuple[_Marks, _Marks]:
    """Which queries and which keys enter the states of each direction.

    Forwards, tokens of the document that goes on behind their block; backwards, of the one that began before it. What
    enters the states of one direction reads those of the other.
    """
    if not segmented:
        return (None, None), (None, None)
    enters, reads = plan.enters, plan.reads
    assert reads is not None
    return (enters, reads), (enters, reads if plan.real is None else reads * plan.real)


def _sums(
    plan: Plan, marks: _Marks, x: Tensor, y: Tensor, order: tuple[bool, ...], parts: int, initial: Tensor | None,
    final: bool,
) -> tuple[States, Tensor | None]:  # fmt: skip
    """States of ``x^T y`` in each direction, one below the other; ``initial`` and ``final`` state are of the first."""
    states = x.new_empty(x.shape[0], plan.states, len(order), parts, x.shape[-1], y.shape[-1])
    total = None
    for number, reverse in enumerate(order):
        start, wanted = (initial, final) if number == 0 else (None, False)
        _, found = launch.running_states(
            plan, times(x, marks[reverse]), y, start, reverse=reverse, final=wanted, into=states[:, :, number]
        )
        total = found if number == 0 else total
    return States(states.flatten(2, 4), plan.spacing), total


def _sum_of_all(plan: Plan, x: Tensor, y: Tensor, parts: int) -> States:
    _, total = launch.running_states(plan, x, y, None, reverse=False, final=True)
    assert total is not None
    state = total.to(x.dtype)
    if parts == 2:
        state = torch.cat([state, (total - state).to(x.dtype)], dim=1)
    return States(state.unsqueeze(1), plan.spacing)


def _readers(x: Tensor, marks: _Marks, order: tuple[bool, ...], parts: int) -> Tensor:
    """``[b, s, z * directions * parts]``: ``x`` where it reads the states, else 0."""
    each = [part for reverse in order for part in [times(x, marks[not reverse])] * parts]
    return each[0] if len(each) == 1 else torch.cat(each, dim=-1)


def _through_states(
    plan: Plan, marks: _Marks, x: Tensor, states: States, gradient: Tensor | None, order: tuple[bool, ...], parts: int,
    like: Tensor, *, queries: bool,
) -> Tensor:  # fmt: skip
    """Gradient of what reads ``states``, such as ``like``, added to ``gradient``, that of the pairs in float32."""
    each = states.tensor.unflatten(2, (len(order) * parts, -1))
    for number in range(each.shape[2]):
        mark, part = marks[not order[number // parts]], States(each[:, :, number], states.spacing)
        out = torch.empty_like(like, dtype=like.dtype if number == each.shape[2] - 1 else torch.float32)
        launch.state_gradient(plan, x, part, gradient, mark, queries=queries, out=out)
        gradient = out
    assert gradient is not None
    return gradient


def _row_scale(plan: Plan, scale: float) -> Tensor | None:
    return None if scale == 1.0 else torch.full_like(plan.document, scale, dtype=torch.float32)
