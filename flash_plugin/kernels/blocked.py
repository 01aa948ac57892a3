"""Causal mixed chunk attention for the CPU, one chunk at a time.

The batched form (``batched.py``) writes every intermediate to memory for the whole sequence. On a CPU that costs more
than the arithmetic: fresh pages for each large tensor, and a trip to main memory for each element-wise step. Here a
chunk's work stays in cache, and the two products that make its output are one GEMM, ``[q_global | A] @ [S ; V]`` with A
the local attention weights and S the running state.

The backward is written out for first derivatives. Under ``create_graph=True`` it differentiates the batched form.

Shape legend: ``b`` batch, ``n`` rows worked on together, ``s`` sequence, ``c`` chunk size, ``m`` tokens of one chunk,
``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import ELEMENTWISE, gated
from flash_plugin.kernels.batched import mixed_chunk_batched
from flash_plugin.kernels.differentiation import differentiable_backward
from flash_plugin.kernels.layout import Layout, local_divisor
from flash_plugin.kernels.products import onednn_gains, onednn_product, torch_product
from flash_plugin.kernels.relative_bias import bias_between
from flash_plugin.kernels.validation import in_eager_cpu

# A chunk is worked on in two panels of at least so many rows: the upper one need not see the keys of the lower one.
_PANEL = 128
# From c * z * e on, oneDNN's products of one row at a time take less time than PyTorch's of all rows at once.
_LARGE = 2**22


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


class _Workspace:
    """What is the same for all chunks, and the buffer ``[S ; V]`` of one."""

    def __init__(self, z: int, v: Tensor, bias: Tensor | None, options: Options) -> None:
        batch, length, expanded = v.shape
        size = min(options.chunk_size, length)
        self.options = options
        self.z = z
        self.size = size
        self.chunks = [slice(first, min(first + size, length)) for first in range(0, length, size)]
        self.large = onednn_gains(v) and options.chunk_size * z * expanded >= _LARGE
        #: Rows that are worked on together.
        self.rows = [slice(row, row + 1) for row in range(batch)] if self.large else [slice(batch)]
        self.values = v.new_empty(1 if self.large else batch, z + size, expanded)
        self.bias = None if bias is None else bias_between(bias.to(v.dtype), 0, size, size)
        # 1 / keys visible in the chunk at visible pairs, 0 elsewhere.
        self.mask = torch.ones(size, size, dtype=v.dtype).tril()
        layout = Layout.of(None, size, None, v.device)
        divisor = local_divisor(options.normalizer, options.activation, layout, True, v.dtype)
        if divisor is not None:
            self.mask /= divisor[0, :, None]

    @property
    def state(self) -> Tensor:
        return self.values[:, : self.z]

    def product(self, m: int) -> Callable[[Tensor, Tensor], Tensor]:
        """What multiplies in chunks of m tokens; the last may have any m, and oneDNN would generate code for each."""
        return onednn_product if self.large and m == self.options.chunk_size else torch_product

    def finish_scores(self, products: Tensor) -> None:
        """Turn ``q k^T`` into scores, in place."""
        m = products.shape[1]
        if self.bias is None:
            products.mul_(self.options.scale)
        else:
            torch.add(self.bias[:m, :m], products, alpha=self.options.scale, out=products)

    def load_values(self, v: Tensor) -> Tensor:
        """Put the values of a chunk behind the state."""
        values = self.values[:, self.z : self.z + v.shape[1]]
        if self.options.silu:
            torch.ops.aten.silu.out(v, out=values)
        else:
            values.copy_(v)
        return values

    def load_weights(self, scores: Tensor, out: Tensor) -> None:
        """Turn the scores of a chunk into weights."""
        m = scores.shape[1]
        torch.mul(ELEMENTWISE[self.options.activation].function(scores), self.mask[:m, :m], out=out)

    def activated(self, tensor: Tensor) -> Tensor:
        return F.silu(tensor) if self.options.silu else tensor

    def before_activation(self, gradient: Tensor, tensor: Tensor, out: Tensor) -> None:
        """Take a gradient back through :meth:`activated`."""
        if self.options.silu:
            torch.ops.aten.silu_backward.grad_input(gradient, tensor, grad_input=out)
        else:
            out.copy_(gradient)

    def panels(self, chunk: slice) -> list[tuple[slice, slice]]:
        """Tokens of each panel, within the sequence and within the chunk."""
        m = chunk.stop - chunk.start
        height = max(-(-m // 2), _PANEL)
        inside = [slice(top, min(top + height, m)) for top in range(0, m, height)]
        return [(slice(chunk.start + p.start, chunk.start + p.stop), p) for p in inside]


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
        z = q_global.shape[-1]
        work = _Workspace(z, v, bias, options)
        factor = factor.to(v.dtype).unsqueeze(-1).expand(len(v), -1, -1)
        out, final = v.new_empty(v.shape), v.new_empty(len(v), z, v.shape[-1])
        # Behind each chunk of all rows; of each chunk of each group of rows; and of each of its panels.
        states = v.new_empty(len(work.chunks), *final.shape)
        scores: list[Tensor] = []
        mixed: list[Tensor] = []
        weights = v.new_empty(len(work.values), work.size, z + work.size)  # [q_global | A]
        for n in work.rows:
            state = work.state.zero_() if initial_kv is None else work.state.copy_(initial_kv[n])
            for j, t in enumerate(work.chunks):
                m = t.stop - t.start
                product = work.product(m)
                states[j, n] = state
                x = product(q_local[n, t], k_local[n, t].mT)
                work.finish_scores(x)
                scores.append(x)
                work.load_weights(x, weights[:, :m, z : z + m])
                torch.mul(q_global[n, t], factor[n, t], out=weights[:, :m, :z])
                values = work.load_values(v[n, t])
                # The first chunk has no state behind it unless one was given.
                first = 0 if j or initial_kv is not None else z
                for tokens, p in work.panels(t):
                    seen = slice(first, z + p.stop)
                    y = product(weights[:, p, seen], work.values[:, seen])
                    mixed.append(y)
                    if gate is None:
                        out[n, tokens] = y
                    else:
                        torch.mul(y, work.activated(gate[n, tokens]), out=out[n, tokens])
                if options.final_state or j + 1 < len(work.chunks):
                    state += product(k_global[n, t].mT, values)
            final[n] = state
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(
            q_local, k_local, q_global, k_global, v, gate, bias, initial_kv, factor, states, *scores, *mixed
        )
        return out, final

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # under activation checkpointing they can be asked for once
        inputs, (factor, states, *rest) = list(saved[:8]), saved[8:]
        if torch.is_grad_enabled():
            plain = partial(_plain, factor, ctx.options)  # for second derivatives
            return (*differentiable_backward(plain, inputs, (grad, grad_state)), None, None)
        q_local, k_local, q_global, k_global, v, gate, bias, initial_kv = inputs
        z = q_global.shape[-1]
        work = _Workspace(z, v, bias, ctx.options)
        size, derivative = work.size, ELEMENTWISE[ctx.options.activation].derivative
        # Everything here goes backward: what was made last is taken from them first.
        scores, mixed = rest[: len(work.rows) * len(work.chunks)], rest[len(work.rows) * len(work.chunks) :]
        if grad is None:
            grad = torch.zeros_like(v)
        dq_local, dk_local, dq_global, dk_global, dv = (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (q_local, k_local, q_global, k_global, v)
        )
        dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        dinitial = None if initial_kv is None else torch.empty_like(initial_kv)
        # The gradient of the values is ``[A^T | k_global] @ [dmixed ; dS]``. The latter is carried from chunk to chunk.
        keys = v.new_empty(len(work.values), size, size + z)
        grads = torch.empty_like(work.values)
        dstate = grads[:, size:]
        dbias = None if bias is None else v.new_zeros(len(work.values), size, size)
        for n in reversed(work.rows):
            dstate.zero_() if grad_state is None else dstate.copy_(grad_state[n])
            for j, t in reversed(list(enumerate(work.chunks))):
                m = t.stop - t.start
                product = work.product(m)
                x = scores.pop()
                dx = torch.zeros_like(x)  # for the upper panel, whose right half nobody writes
                work.state.copy_(states[j, n])
                values = work.load_values(v[n, t])
                work.load_weights(x, keys[:, :m, size - m : size].mT)
                keys[:, :m, size:] = k_global[n, t]
                dmixed = grads[:, size - m : size]
                # Later chunks reach this one's keys and values through the state alone.
                last = grad_state is None and j + 1 == len(work.chunks)
                first = 0 if j or initial_kv is not None else z
                for tokens, p in reversed(work.panels(t)):
                    y = mixed.pop()
                    if gate is None or dgate is None:
                        dmixed[:, p] = grad[n, tokens]
                    else:
                        work.before_activation(grad[n, tokens] * y, gate[n, tokens], dgate[n, tokens])
                        torch.mul(grad[n, tokens], work.activated(gate[n, tokens]), out=dmixed[:, p])
                    seen_by = slice(size - m + p.start, size if last else size + z)
                    work.before_activation(product(keys[:, p, seen_by], grads[:, seen_by]), v[n, tokens], dv[n, tokens])
                    seen = slice(0, p.stop)
                    dweights = product(dmixed[:, p], work.values[:, first : z + p.stop].mT)
                    if first:
                        dq_global[n, tokens] = 0
                    else:
                        torch.mul(dweights[..., :z], factor[n, tokens], out=dq_global[n, tokens])
                    torch.mul(dweights[..., z - first :], work.mask[p, seen], out=dx[:, p, seen])
                dx.mul_(derivative(x))
                if dbias is not None:
                    dbias[:, :m, :m] += dx
                dx.mul_(ctx.options.scale)
                dq_local[n, t] = product(dx, k_local[n, t])
                dk_local[n, t] = product(dx.mT, q_local[n, t])
                dk_global[n, t] = 0 if last else product(values, dstate.mT)
                if not first:
                    dstate += product((q_global[n, t] * factor[n, t]).mT, dmixed)
            if dinitial is not None:
                dinitial[n] = dstate
        if bias is not None and dbias is not None:
            index = torch.arange(size)
            distance = index[:, None] - index + len(bias) // 2
            dbias = torch.zeros_like(bias).index_add_(0, distance.flatten(), dbias.sum(0).flatten().to(bias.dtype))
        return dq_local, dk_local, dq_global, dk_global, dv, dgate, dbias, dinitial, None, None


def _plain(factor: Tensor, options: Options, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and state in differentiable operations: the batched form."""
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
    return gated(mixed, gate, options.silu), state
