"""Causal mixed chunk attention for the CPU, one chunk at a time.

The batched form (``batched.py``) writes every intermediate to memory for the whole sequence. On a CPU that costs more
than the arithmetic: fresh pages for each large tensor, and a trip to main memory for each element-wise step. Here a
chunk's work stays in cache, and the two products that make its output are one GEMM, ``[q_global | A] @ [S ; V]`` with S
the running state.

The backward is written out for first derivatives. Under ``create_graph=True`` it differentiates the batched form.

Shape legend: ``b`` batch, ``s`` sequence, ``c`` chunk size, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import ELEMENTWISE, gated
from flash_plugin.kernels.batched import mixed_chunk_batched
from flash_plugin.kernels.layout import Layout, local_divisor
from flash_plugin.kernels.validation import in_eager_cpu

# A chunk is worked on in at most four panels of at least so many rows: upper ones need not see the keys of lower ones.
_PANEL = 64


@dataclass(frozen=True)
class Options:
    """The choices of a call, as in :func:`flash_plugin.kernels.mixed_chunk_attention`."""

    chunk_size: int
    activation: str
    normalizer: str
    scale: float
    silu: bool
    final_state: bool


def blocked_applies(
    v: Tensor, segmented: bool, causal: bool, activation: str, dropout: float, scale: float | Tensor
) -> bool:
    """Whether :func:`mixed_chunk_blocked` covers the call; the batched form covers them all."""
    return (
        in_eager_cpu(v)
        and causal
        and not segmented
        and activation in ELEMENTWISE
        and dropout == 0.0
        and not isinstance(scale, Tensor)
    )


def mixed_chunk_blocked(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    initial_kv: Tensor | None,
    factor: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Causal mixed chunk attention of unpadded single documents; ``factor`` ``[b or 1, s]`` scales the global part.

    Returns:
        ``[b, s, e]``, gated, and the state ``[b, z, e]`` behind the last token (meaningless unless asked for).
    """
    return _MixedChunk.apply(q_local, k_local, q_global, k_global, v, gate, bias, initial_kv, factor, options)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; one row goes to the plain GEMM, which is faster and writes to strided rows in place."""
    if out.shape[0] == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)


def _accumulate(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out += a @ b``."""
    if out.shape[0] == 1:
        out[0].addmm_(a[0], b[0])
    else:
        out.baddbmm_(a, b)


def _cut(tensor: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """Whole chunks ``[b * n, c, w]`` and the shorter one behind them, if any, ``[b, r, w]``."""
    whole = tensor.shape[1] // size * size
    rest = tensor[:, whole:] if whole < tensor.shape[1] else None
    return tensor[:, :whole].reshape(-1, size, tensor.shape[-1]), rest


def _by_chunk(q: Tensor, k: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """``q k^T`` of all whole chunks in one product, ``[b, n, c, c]``, and of the rest, ``[b, r, r]``."""
    (q_whole, q_rest), (k_whole, k_rest) = _cut(q, size), _cut(k, size)
    rest = None if q_rest is None or k_rest is None else torch.bmm(q_rest, k_rest.mT)
    return torch.bmm(q_whole, k_whole.mT).unflatten(0, (q.shape[0], -1)), rest


def _each_chunk(whole: Tensor, rest: Tensor | None) -> list[Tensor]:
    """Views of each chunk's ``[b, c, c]``."""
    return [*whole.unbind(1), *([] if rest is None else [rest])]


def _back_by_chunk(whole: Tensor, rest: Tensor | None, other: Tensor) -> Tensor:
    """Products of each chunk's ``[c, c]`` with its rows of ``other``, ``[b, s, z]``."""
    other_whole, other_rest = _cut(other, whole.shape[-1])
    out = torch.bmm(whole.flatten(0, 1), other_whole).view(other.shape[0], -1, other.shape[-1])
    return out if rest is None or other_rest is None else torch.cat([out, torch.bmm(rest, other_rest)], dim=1)


class _Workspace:
    """Buffers of one chunk: ``weights`` is ``[q_global | A]``, ``values`` is ``[S ; V]``."""

    def __init__(self, z: int, v: Tensor, bias: Tensor | None, options: Options) -> None:
        batch, length, expanded = v.shape
        size = min(options.chunk_size, length)
        self.options = options
        self.z = z
        self.size = size
        self.chunks = [slice(first, min(first + size, length)) for first in range(0, length, size)]
        self.weights = v.new_empty(batch, size, self.z + size)
        self.values = v.new_empty(batch, self.z + size, expanded)
        index = torch.arange(size)
        self.distance = index[:, None] - index + options.chunk_size - 1
        self.bias = None if bias is None else bias.to(v.dtype)[self.distance]
        # 1 / keys visible in the chunk at visible pairs, 0 elsewhere.
        self.mask = torch.ones(size, size, dtype=v.dtype).tril()
        layout = Layout.of(None, size, None, v.device)
        divisor = local_divisor(options.normalizer, options.activation, layout, True, v.dtype)
        if divisor is not None:
            self.mask /= divisor[0, :, None]

    @property
    def state(self) -> Tensor:
        return self.values[:, : self.z]

    def finish_scores(self, products: Tensor) -> None:
        """Turn ``q k^T`` into scores, in place."""
        products.mul_(self.options.scale)
        if self.bias is not None:
            products.add_(self.bias[: products.shape[1], : products.shape[1]])

    def load(self, q_global: Tensor, factor: Tensor, v: Tensor, scores: Tensor) -> None:
        m = q_global.shape[1]
        weights = ELEMENTWISE[self.options.activation].function(scores)
        torch.mul(q_global, factor, out=self.weights[:, :m, : self.z])
        torch.mul(weights, self.mask[:m, :m], out=self.weights[:, :m, self.z : self.z + m])
        values = self.values[:, self.z : self.z + m]
        if self.options.silu:
            torch.ops.aten.silu.out(v, out=values)
        else:
            values.copy_(v)

    def activated(self, tensor: Tensor) -> Tensor:
        return F.silu(tensor) if self.options.silu else tensor

    def before_activation(self, gradient: Tensor, tensor: Tensor, out: Tensor) -> None:
        """Take a gradient back through :meth:`activated`."""
        if self.options.silu:
            torch.ops.aten.silu_backward.grad_input(gradient, tensor, grad_input=out)
        else:
            out.copy_(gradient)

    def panels(self, m: int) -> list[tuple[slice, int]]:
        """Rows, and how many columns of ``weights`` they see."""
        height = max(-(-m // 4), _PANEL)
        return [(slice(top, min(top + height, m)), self.z + min(top + height, m)) for top in range(0, m, height)]


class _MixedChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_local: Tensor,
        k_local: Tensor,
        q_global: Tensor,
        k_global: Tensor,
        v: Tensor,
        gate: Tensor | None,
        bias: Tensor | None,
        initial_kv: Tensor | None,
        factor: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        work = _Workspace(q_global.shape[-1], v, bias, options)
        factor = factor.to(v.dtype).unsqueeze(-1)
        state = work.state.zero_() if initial_kv is None else work.state.copy_(initial_kv)
        scores = _by_chunk(q_local, k_local, work.size)
        states = v.new_empty(len(work.chunks), *state.shape)
        mixed = v.new_empty(v.shape)
        out = mixed if gate is None else v.new_empty(v.shape)
        for j, (rows, x) in enumerate(zip(work.chunks, _each_chunk(*scores), strict=True)):
            m = rows.stop - rows.start
            states[j] = state
            work.finish_scores(x)
            work.load(q_global[:, rows], factor[:, rows], v[:, rows], x)
            for top, width in work.panels(m):
                seen = slice(0 if j or initial_kv is not None else work.z, width)
                _product(work.weights[:, top, seen], work.values[:, seen], mixed[:, rows][:, top])
            if gate is not None:
                torch.mul(mixed[:, rows], work.activated(gate[:, rows]), out=out[:, rows])
            if options.final_state or j + 1 < len(work.chunks):
                _accumulate(k_global[:, rows].mT, work.values[:, work.z : work.z + m], state)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(
            q_local, k_local, q_global, k_global, v, gate, bias, initial_kv, factor, *scores, states, mixed
        )
        return out, state.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, factor, whole, rest, states, mixed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(inputs, factor, grad, grad_state, ctx.options), None, None)
        q_local, k_local, q_global, k_global, v, gate, bias, initial_kv = inputs
        work = _Workspace(q_global.shape[-1], v, bias, ctx.options)
        z, derivative = work.z, ELEMENTWISE[ctx.options.activation].derivative
        if grad is None:
            grad = torch.zeros_like(v)
        dq_global, dk_global, dv = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q_global, k_global, v)
        )
        dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        dbias = None if work.bias is None else torch.zeros_like(work.bias)
        # Gradients of ``weights`` and ``values``; the state's part of the latter is carried from chunk to chunk.
        dweights, dvalues = torch.zeros_like(work.weights), torch.empty_like(work.values)
        dstate = dvalues[:, :z].zero_() if grad_state is None else dvalues[:, :z].copy_(grad_state)
        dwhole, drest = torch.empty_like(whole), None if rest is None else torch.empty_like(rest)
        scores, dscores = _each_chunk(whole, rest), _each_chunk(dwhole, drest)
        for j, rows in reversed(list(enumerate(work.chunks))):
            m = rows.stop - rows.start
            x, dx, dmixed = scores[j], dscores[j], grad[:, rows]
            if gate is not None and dgate is not None:
                work.before_activation(dmixed * mixed[:, rows], gate[:, rows], dgate[:, rows])
                dmixed = dmixed * work.activated(gate[:, rows])
            work.state.copy_(states[j])
            work.load(q_global[:, rows], factor[:, rows], v[:, rows], x)
            # Later chunks reach this one's keys and values through the state alone.
            if grad_state is None and j + 1 == len(work.chunks):
                dk_global[:, rows] = 0
                dvalues[:, z : z + m] = 0
            else:
                _product(work.values[:, z : z + m], dstate.mT, dk_global[:, rows])
                _product(k_global[:, rows], dstate, dvalues[:, z : z + m])
            # The first chunk has no state behind it unless one was given.
            seen_from = 0 if j or initial_kv is not None else z
            for top, width in work.panels(m):
                seen = slice(seen_from, width)
                _product(dmixed[:, top], work.values[:, seen].mT, dweights[:, top, seen])
            for top, width in work.panels(m):
                # Columns up to ``width`` that the panels above do not reach are seen from this panel's rows on.
                weights = work.weights[:, top.start : m, seen_from:width]
                _accumulate(weights.mT, dmixed[:, top.start :], dvalues[:, seen_from:width])
                seen_from = width
            if j or initial_kv is not None:
                torch.mul(dweights[:, :m, :z], factor[:, rows], out=dq_global[:, rows])
            else:
                dq_global[:, rows] = 0
            work.before_activation(dvalues[:, z : z + m], v[:, rows], dv[:, rows])
            torch.mul(dweights[:, :m, z : z + m], work.mask[:m, :m], out=dx).mul_(derivative(x))
            if dbias is not None:
                dbias[:m, :m] += dx.sum(0)
            dx.mul_(ctx.options.scale)
        dq_local = _back_by_chunk(dwhole, drest, k_local)
        dk_local = _back_by_chunk(dwhole.mT, None if drest is None else drest.mT, q_local)
        if bias is not None and dbias is not None:
            dbias = torch.zeros_like(bias).index_add_(0, work.distance.flatten(), dbias.flatten().to(bias.dtype))
        dinitial = None if initial_kv is None else dstate.to(initial_kv.dtype)
        return dq_local, dk_local, dq_global, dk_global, dv, dgate, dbias, dinitial, None, None


def _differentiable_backward(
    inputs: list[Tensor | None], factor: Tensor, grad: Tensor | None, grad_state: Tensor | None, options: Options
) -> list[Tensor | None]:
    """Gradients as a graph, for second derivatives: the batched form, run again and differentiated."""
    # Views of them: one input may be another, or made from it, and each must get its own part of the gradient alone.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    q_local, k_local, q_global, k_global, v, gate, bias, initial_kv = inputs
    assert q_local is not None and k_local is not None and q_global is not None and k_global is not None
    assert v is not None
    values = F.silu(v) if options.silu else v
    mixed, state = mixed_chunk_batched(
        q_local, k_local, q_global * factor, k_global, values, bias, initial_kv,
        Layout.of(None, v.shape[1], options.chunk_size, v.device), segmented=False, chunk_size=options.chunk_size,
        causal=True, activation=options.activation, normalizer=options.normalizer, scale=options.scale, dropout=0.0,
    )  # fmt: skip
    assert state is not None
    out = gated(mixed, gate, options.silu)
    pairs = [(o, g) for o, g in ((out, grad), (state, grad_state)) if g is not None and o.requires_grad]
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
    )
    found = iter(grads)
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
