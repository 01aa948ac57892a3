"""Offset-scale: cheap queries and keys from one shared base, with its SiLU and their rotation (paper section 2).

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``n`` projections, ``r`` features that rotate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.differentiation import differentiable_backward
from flash_plugin.kernels.layout import state_dtype
from flash_plugin.kernels.validation import check_queries_and_keys, in_eager_cpu, use_triton

# What one Triton kernel reads and writes at once.
_MOST_PROJECTIONS, _WIDEST = 4, 1024


def offset_scale(
    base: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    angles: Tensor | None = None,
    silu: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """``rotate(base * gamma_i + beta_i)`` for each i, or the same of ``silu(base)``.

    ``auto`` runs Triton on CUDA: one kernel reads the base once and writes all results, one reads it and their
    gradients. Under ``torch.compile`` it runs PyTorch, which inductor fuses with what stands beside it.

    Args:
        base: What the projections share, ``[b, s, z]``.
        gamma: Factors, ``[n, z]``.
        beta: Offsets, ``[n, z]``.
        angles: Cosine and sine by which each pair of neighbouring features rotates at each token, ``[s, r / 2, 2]``
            or ``[b or 1, s, r / 2, 2]``; features behind the first r are left alone. None: no rotation.
        silu: Apply SiLU to ``base`` first.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        ValueError: If an argument does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        ``n`` tensors ``[b, s, z]`` in the dtype of ``base``.
    """
    check_queries_and_keys({"base": base}, dims=3)
    _check_parameters(base, gamma, beta)
    if angles is not None:
        _check_angles(base, angles)
    if use_triton(impl, base, _not_in_triton(base, gamma)) and not (impl == "auto" and torch.compiler.is_compiling()):
        from flash_plugin.kernels.triton.offset_scale import differentiable_offset_scale

        return differentiable_offset_scale(base, gamma, beta, angles, silu)
    # The written-out form sees pairs of features as complex numbers, which odd rows cannot be read as.
    if in_eager_cpu(base) and gamma.dtype == base.dtype and (angles is None or base.shape[-1] % 2 == 0):
        return _OffsetScale.apply(base, gamma, beta, None if angles is None else angles.to(base.dtype), silu)
    return _plain(base, gamma, beta, angles, silu)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first r features of ``[b, s, z]`` by angles as of :func:`offset_scale`, in float32 (or float64)."""
    dtype, rotated = state_dtype(x.dtype), 2 * angles.shape[-2]
    pairs = x[..., :rotated].to(dtype).unflatten(-1, (-1, 2))
    angles = angles.to(dtype)
    if torch.compiler.is_compiling():
        # Inductor fuses real arithmetic and cannot generate complex.
        (cosine, sine), (first, second) = angles.unbind(-1), pairs.unbind(-1)
        turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    else:
        turned = torch.view_as_real(_complex(pairs) * _complex(angles))
    turned = turned.flatten(-2).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)


def _plain(base: Tensor, gamma: Tensor, beta: Tensor, angles: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    """The formula, one step after the other."""
    x = F.silu(base) if silu else base
    pairs = zip(gamma.unbind(0), beta.unbind(0), strict=True)
    scaled = (torch.addcmul(offset, x, factor).to(base.dtype) for factor, offset in pairs)
    return tuple(scaled if angles is None else (rotate(projection, angles) for projection in scaled))


class _OffsetScale(torch.autograd.Function):
    """For eager PyTorch on a CPU: rotates in place, and its backward uses one buffer for all gradients."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, gamma: Tensor, beta: Tensor, angles: Tensor | None, silu: bool
    ) -> tuple[Tensor, ...]:
        base = base.contiguous()  # element-wise results keep strides, and complex views want neighbours
        x = F.silu(base) if silu else base
        projections = tuple(torch.addcmul(offset, x, factor) for factor, offset in zip(gamma, beta, strict=True))
        if angles is not None:
            turn = _complex(angles)
            for projection in projections:
                _rotating(projection, angles).mul_(turn)
        ctx.silu = silu
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(base, x, gamma, beta, angles)
        return projections

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        base, x, gamma, beta, angles = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return (None,) * 5
        if torch.is_grad_enabled():  # create_graph=True: differentiate the plain form instead
            found = differentiable_backward(
                lambda base, gamma, beta: _plain(base, gamma, beta, angles, ctx.silu), (base, gamma, beta), grads
            )
            return (*found, None, None)
        dgamma, dbeta = torch.zeros_like(gamma), torch.zeros_like(beta)
        zeros, ones = x.new_zeros(*x.shape[:2], 1), x.new_ones(*x.shape[:2], 1)
        if angles is not None:
            back, turned = _complex(angles).conj().resolve_conj(), torch.empty_like(x)
        dx: Tensor | None = None
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if angles is not None:
                rest = slice(2 * angles.shape[-2], None)
                torch.mul(_rotating(grad.contiguous(), angles), back, out=_rotating(turned, angles))
                turned[..., rest] = grad[..., rest]
                grad = turned
            # Layer normalisation of mean 0 and deviation 1 has these gradients of its factor and its offset.
            _, dgamma[i], dbeta[i] = torch.ops.aten.native_layer_norm_backward(
                grad, x, gamma[i].shape, zeros, ones, gamma[i], beta[i], [False, True, True]
            )
            dx = grad * gamma[i] if dx is None else dx.addcmul_(grad, gamma[i])
        if ctx.silu:
            torch.ops.aten.silu_backward.grad_input(dx, base, grad_input=dx)
        return dx, dgamma, dbeta, None, None


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _rotating(x: Tensor, angles: Tensor) -> Tensor:
    """View the features that rotate as complex numbers."""
    return torch.view_as_complex(x[..., : 2 * angles.shape[-2]].unflatten(-1, (-1, 2)))


def _not_in_triton(base: Tensor, gamma: Tensor) -> str | None:
    """What of the call the Triton kernels lack; None if nothing."""
    if len(gamma) > _MOST_PROJECTIONS:
        return f"{len(gamma)} projections"
    if base.shape[-1] > _WIDEST:
        return f"dim {base.shape[-1]}"
    return None if base.dtype in (torch.bfloat16, torch.float16, torch.float32) else f"dtype {base.dtype}"


def _check_parameters(base: Tensor, gamma: Tensor, beta: Tensor) -> None:
    if gamma.dim() != 2 or gamma.shape[0] == 0 or gamma.shape[1] != base.shape[-1]:
        raise ValueError(
            f"gamma (shape {tuple(gamma.shape)}) must be [projections, dim] with the dim {base.shape[-1]} of base; "
            "pass one row of factors for each projection"
        )
    if beta.shape != gamma.shape:
        raise ValueError(
            f"beta (shape {tuple(beta.shape)}) must have the shape of gamma {tuple(gamma.shape)}; pass one row of "
            "offsets for each projection"
        )
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        if not tensor.is_floating_point() or tensor.dtype != gamma.dtype or tensor.device != base.device:
            raise ValueError(
                f"{name} (dtype {tensor.dtype}, device {tensor.device}) must be floating point, of one dtype for gamma "
                f"and beta, on {base.device}; cast or move it"
            )


def _check_angles(base: Tensor, angles: Tensor) -> None:
    batch, length, width = base.shape
    if (
        angles.dim() not in (3, 4)
        or angles.shape[-1] != 2
        or angles.shape[-3] != length
        or (angles.dim() == 4 and angles.shape[0] not in (1, batch))
        or not 0 < 2 * angles.shape[-2] <= width
    ):
        raise ValueError(
            f"angles (shape {tuple(angles.shape)}) must be [s, r/2, 2] or [b or 1, s, r/2, 2] with r at most dim for "
            f"base {tuple(base.shape)}; pass cosine and sine of each pair of features at each token"
        )
    if not angles.is_floating_point() or angles.device != base.device:
        raise ValueError(
            f"angles (dtype {angles.dtype}, device {angles.device}) must be floating point on {base.device}; cast or "
            "move them"
        )
    if angles.requires_grad:
        raise ValueError("angles (requires_grad=True) must be constants: they get no gradient; pass angles.detach()")
