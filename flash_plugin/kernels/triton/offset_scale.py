"""Offset-scale with SiLU and rotation as a pair of torch operators, of one kernel each.

Element-wise work costs the memory that it moves. Both kernels go once over everything: the forward reads the base and
the angles and writes n projections, the backward reads base, angles and n gradients and writes one. Step by step, each
projection would be written and read again on its way. Nothing but the inputs is saved.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``n`` projections, ``r`` features that rotate.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flash_plugin.kernels.triton.offset_scale_kernels import (
    LARGEST_TILE,
    offset_scale_backward_kernel,
    offset_scale_kernel,
)
from flash_plugin.kernels.triton.partial_sums import rows_per_program
from flash_plugin.kernels.triton.registration import differentiable


@torch.library.custom_op("flash_plugin::offset_scale", mutates_args=())
def offset_scale(base: Tensor, gamma: Tensor, beta: Tensor, angles: Tensor | None, silu: bool) -> list[Tensor]:
    """``rotate(open(base) * gamma_i + beta_i)`` for each of at most four i, in float32, rounded once.

    Args:
        base: ``[b, s, z]``.
        gamma: Factors, ``[n, z]``.
        beta: Offsets, ``[n, z]``.
        angles: Cosine and sine, ``[s, r / 2, 2]`` or ``[b or 1, s, r / 2, 2]``; None for no rotation.
        silu: Apply SiLU to ``base``.

    Returns:
        ``n`` tensors ``[b, s, z]`` in the dtype of ``base``.
    """
    base = base.contiguous()
    outputs = [torch.empty_like(base) for _ in range(len(gamma))]
    rows = base.shape[0] * base.shape[1]
    sizes = _sizes(base, gamma, angles)
    offset_scale_kernel[lambda meta: (triton.cdiv(rows * meta["BLOCK_Z"], meta["TILE"]),)](
        base, gamma.contiguous(), beta.contiguous(), None if angles is None else angles.contiguous(),
        *_four(outputs), rows, base.shape[1], **sizes, SILU=silu,
    )  # fmt: skip
    return outputs


@offset_scale.register_fake
def _(base: Tensor, gamma: Tensor, beta: Tensor, angles: Tensor | None, silu: bool) -> list[Tensor]:
    return [base.new_empty(base.shape) for _ in range(gamma.shape[0])]


@torch.library.custom_op("flash_plugin::offset_scale_backward", mutates_args=())
def offset_scale_backward(
    grads: list[Tensor], base: Tensor, gamma: Tensor, angles: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the base, and of gamma and beta, ``[2, n, z]``; ``grads`` are those of the projections."""
    base, grads = base.contiguous(), [grad.contiguous() for grad in grads]
    dbase = torch.empty_like(base)
    rows = base.shape[0] * base.shape[1]
    sizes = _sizes(base, gamma, angles)
    program_rows = rows_per_program(rows, LARGEST_TILE // sizes["BLOCK_Z"])
    programs = triton.cdiv(rows, program_rows)
    partial = base.new_empty(programs, 2, *gamma.shape, dtype=torch.float32)
    offset_scale_backward_kernel[(programs,)](
        *_four(grads), base, gamma.contiguous(), None if angles is None else angles.contiguous(), dbase, partial,
        rows, base.shape[1], program_rows, **sizes, SILU=silu,
    )  # fmt: skip
    return dbase, partial.sum(0).to(gamma.dtype)


@offset_scale_backward.register_fake
def _(grads: list[Tensor], base: Tensor, gamma: Tensor, angles: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), gamma.new_empty(2, *gamma.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    base, gamma, _, angles, ctx.silu = inputs
    ctx.save_for_backward(base, gamma, angles)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    base, gamma, angles = ctx.saved_tensors
    if all(grad is None for grad in grads):
        return (None,) * 5
    given = [torch.zeros_like(base) if grad is None else grad for grad in grads]
    dbase, (dgamma, dbeta) = offset_scale_backward(given, base, gamma, angles, ctx.silu)
    return dbase, dgamma, dbeta, None, None


differentiable_offset_scale = differentiable("OffsetScale", offset_scale, _setup_context, _backward, listed=True)


def _four(tensors: list[Tensor]) -> list[Tensor | None]:
    """The kernels' four pointers."""
    return [*tensors, *(None,) * (4 - len(tensors))]


def _sizes(base: Tensor, gamma: Tensor, angles: Tensor | None) -> dict[str, Any]:
    """The kernels' compile-time sizes."""
    return {
        "Z": base.shape[-1],
        "R": 0 if angles is None else 2 * angles.shape[-2],
        "N": len(gamma),
        "BY_ROW": angles is not None and angles.dim() == 4 and angles.shape[0] > 1,
        "BLOCK_Z": max(triton.next_power_of_2(base.shape[-1]), 2),
    }
