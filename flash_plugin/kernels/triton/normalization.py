"""Root mean square norms with the token shift, as a pair of torch operators of one kernel each.

PyTorch's own RMS norm on CUDA already is one kernel forward and one backward. What it cannot do is write a normalised
row in two places, and the token shift wants that: in units of ``[b, s, d]`` the norm reads and writes 2, and a shift
behind it 4 more forward (halves cut out, masked and put together twice) and as many backward. Here both together move
2 forward and 3 backward. Nor can it add the gradient of the residual connection around a layer: a sum of its own moves
3, of which only the gradient itself, 1, is left here. ScaleNorm, which PyTorch has no kernel for, is the same but for
what it divides by.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flash_plugin.kernels.triton.norm_kernels import TILE, norm_backward_kernel, norm_kernel
from flash_plugin.kernels.triton.partial_sums import rows_per_program


@torch.library.custom_op("flash_plugin::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, start: Tensor | None, eps: float, scale: bool, shift: bool) -> Tensor:
    """``x / size * weight`` in float32, rounded once; ``size`` is ``sqrt(mean(x^2) + eps)``.

    Args:
        x: ``[..., d]``; ``[b, s, d]`` for ``shift``.
        weight: ``[d]``; ``[1]`` for ScaleNorm.
        start: Index of the first token of each token's document, ``[b or 1, s]``; None means one a row.
        eps: Added to the mean square.
        scale: ScaleNorm, whose ``size`` is ``max(sqrt(mean(x^2)), eps)``.
        shift: Give each token the first half of the features of its predecessor in its document, 0 where it has none.

    Returns:
        The shape and dtype of ``x``.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    norm_kernel[lambda meta: (triton.cdiv(rows, meta["TILE"] // meta["BLOCK_D"]),)](
        x,
        weight.contiguous(),
        None if start is None else start.contiguous(),
        out,
        rows,
        *_lengths(x, start),
        eps,
        **_constants(x, start, scale, shift),
    )
    return out


@norm.register_fake
def _(x: Tensor, weight: Tensor, start: Tensor | None, eps: float, scale: bool, shift: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("flash_plugin::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor,
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    start: Tensor | None,
    eps: float,
    scale: bool,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight``; ``residual``, of the shape of ``x``, is added to the former."""
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    rows, constants = x.numel() // x.shape[-1], _constants(x, start, scale, shift)
    program_rows = rows_per_program(rows, max(TILE // constants["BLOCK_D"], 1))
    programs = triton.cdiv(rows, program_rows)
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    norm_backward_kernel[(programs,)](
        grad,
        None if residual is None else residual.contiguous(),
        x,
        weight.contiguous(),
        None if start is None else start.contiguous(),
        dx,
        partial,
        rows,
        *_lengths(x, start),
        program_rows,
        eps,
        **constants,
        RESIDUAL=residual is not None,
    )
    return dx, (partial.sum().reshape(1) if scale else partial.sum(0)).to(weight.dtype)


@norm_backward.register_fake
def _(
    grad: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, start: Tensor | None, eps: float, scale: bool,
    shift: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, start, *ctx.options = inputs
    ctx.save_for_backward(x, weight, start)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (residual, *(None,) * 5)
    return (*norm_backward(grad, residual, *ctx.saved_tensors, *ctx.options), None, None, None, None)


norm.register_autograd(_backward, setup_context=_setup_context)


class _NormAndResidual(torch.autograd.Function):
    """An operator may not return what it is given; a function of autograd may."""

    @staticmethod
    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return norm(x, *rest), x.view_as(x)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


def norm_and_residual(
    x: Tensor, weight: Tensor, start: Tensor | None, eps: float, scale: bool, shift: bool
) -> tuple[Tensor, Tensor]:
    """:func:`norm` of ``x``, and ``x``, whose gradient the norm's backward adds."""
    arguments = (x, weight, start, eps, scale, shift)
    return (norm(*arguments), x) if torch.compiler.is_compiling() else _NormAndResidual.apply(*arguments)


def _lengths(x: Tensor, start: Tensor | None) -> tuple[int, int]:
    """Tokens of a row of the batch, and how far apart such rows are in ``start``."""
    length = x.shape[-2] if x.dim() > 1 else 1
    return length, 0 if start is None or start.shape[0] == 1 else length


def _constants(x: Tensor, start: Tensor | None, scale: bool, shift: bool) -> dict[str, Any]:
    """The kernels' compile-time constants."""
    width = x.shape[-1]
    switches = {"SCALE": scale, "SHIFT": shift, "SEGMENTED": start is not None}
    return {"D": width, "BLOCK_D": triton.next_power_of_2(width), **switches}
