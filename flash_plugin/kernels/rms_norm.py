"""Norms by the root mean square, RMS norm and ScaleNorm, with the token shift where that follows them.

PyTorch's RMS norm is one kernel forward and one backward on CUDA, and stays in use there by itself. The Triton kernels
are for what it has none for: the token shift, which behind a norm moves twice the norm's memory again, the residual,
whose gradient autograd adds in a pass of its own, and ScaleNorm. On a CPU the backward of PyTorch's RMS norm writes
each of its steps to memory; the one written out here does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.differentiation import differentiable_backward
from flash_plugin.kernels.layout import state_dtype
from flash_plugin.kernels.segments import Segments, unless_single
from flash_plugin.kernels.token_shift import check_token_shift, shift_half
from flash_plugin.kernels.validation import in_eager_cpu, use_triton

# Of a row, as much as one Triton program holds in registers.
_WIDEST = 8192


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    token_shift: bool = False,
    segments: Segments | None = None,
    residual: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang & Sennrich 2019).

    ``auto`` is torch's own function, but for float32 and float64 on a CPU, where its backward is a chain of
    element-wise steps and this one is three times as fast, and for a token shift or a residual's gradient on CUDA
    outside ``torch.compile``, which Triton does in the same pass.

    Args:
        x: Input, ``[..., d]``; ``[b, s, d]`` for a token shift.
        weight: ``[d]``.
        eps: Added to the mean square.
        token_shift: Afterwards take the first half of each token's features from the token before it in its document,
            0 where there is none.
        segments: Documents, for the token shift; None means one a row.
        residual: Return ``x`` as well, for the residual connection around what follows: if that takes the returned
            one, the backward adds its gradient to the norm's own in the same pass.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        ValueError: If an argument does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        The shape and dtype of ``x``; with ``residual`` this and ``x``.
    """
    _check_weight("weight", weight, x, x.shape[-1])
    check_token_shift(x, token_shift, segments)
    if _in_triton(x, impl, lacks_in_torch=token_shift or residual):
        return _triton_norm(x, weight, eps, token_shift, segments, residual, scale=False)
    if in_eager_cpu(x) and weight.dtype == x.dtype:
        out, x = _RmsNorm.apply(x, weight, eps)
    else:
        out = F.rms_norm(x, weight.shape, weight, eps)
    if token_shift:
        out = shift_half(out, segments)
    return (out, x) if residual else out


def scale_norm(
    x: Tensor,
    scale: Tensor,
    eps: float,
    *,
    token_shift: bool = False,
    segments: Segments | None = None,
    residual: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / max(||x|| / sqrt(d), eps) * scale`` over the last axis (Nguyen & Salazar 2019).

    ``auto`` runs Triton on CUDA outside ``torch.compile``: PyTorch takes five passes in float32.

    Args:
        x: Input, ``[..., d]``; ``[b, s, d]`` for a token shift.
        scale: ``[1]``.
        eps: Smallest root mean square that is divided by.
        token_shift: As for :func:`rms_norm`.
        segments: As for :func:`rms_norm`.
        residual: As for :func:`rms_norm`.
        impl: ``auto``, ``triton`` or ``reference``.

    Raises:
        ValueError: If an argument does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        The shape and dtype of ``x``; with ``residual`` this and ``x``.
    """
    _check_weight("scale", scale, x, 1)
    check_token_shift(x, token_shift, segments)
    if _in_triton(x, impl, lacks_in_torch=True):
        return _triton_norm(x, scale, eps, token_shift, segments, residual, scale=True)
    wide = x.to(state_dtype(x.dtype))
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    out = ((wide / size.clamp(min=eps)).to(x.dtype) * scale).to(x.dtype)
    if token_shift:
        out = shift_half(out, segments)
    return (out, x) if residual else out


class _RmsNorm(torch.autograd.Function):
    """The norm of x, and x: what is added to it later has its gradient added here, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.eps = eps
        ctx.save_for_backward(x, weight, inverse)
        ctx.set_materialize_grads(False)
        return (x * inverse).mul_(weight), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return residual, None, None
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: differentiate torch's own function instead
            plain = lambda x, weight: (F.rms_norm(x, weight.shape, weight, ctx.eps), x)  # noqa: E731
            return (*differentiable_backward(plain, (x, weight), (grad, residual)), None)
        # Layer normalisation about a mean of 0 has this backward, but for the mean of the gradient that it takes out.
        wanted = ctx.needs_input_grad
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(inverse), inverse, weight, None, [wanted[0], wanted[1], False]
        )
        if wanted[0]:
            with torch.autocast("cpu", enabled=False):  # a backward may run where it is on
                dx.addcmul_(inverse, (grad @ weight).unsqueeze(-1).div_(x.shape[-1]))
            if residual is not None:
                dx.add_(residual)
        return dx, dweight, None


def _in_triton(x: Tensor, impl: str, *, lacks_in_torch: bool) -> bool:
    """Whether Triton runs: if asked for, or where it can and neither torch's own kernels nor inductor do as well."""
    unsupported = None
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        unsupported = f"dtype {x.dtype}"
    elif not 0 < x.shape[-1] <= _WIDEST:
        unsupported = f"dim {x.shape[-1]}"
    can = use_triton(impl, x, unsupported)
    return can and (impl == "triton" or (lacks_in_torch and not torch.compiler.is_compiling()))


def _triton_norm(
    x: Tensor, weight: Tensor, eps: float, token_shift: bool, segments: Segments | None, residual: bool, *, scale: bool
) -> Tensor | tuple[Tensor, Tensor]:
    from flash_plugin.kernels.triton.normalization import norm, norm_and_residual

    segments = unless_single(segments)
    start = None if segments is None else segments.start
    return (norm_and_residual if residual else norm)(x, weight, start, eps, scale, token_shift)


def _check_weight(name: str, weight: Tensor, x: Tensor, width: int) -> None:
    if weight.shape != (width,):
        raise ValueError(
            f"{name} (shape {tuple(weight.shape)}) must be [{width}] for x of shape {tuple(x.shape)}; normalise the "
            "last axis"
        )
    if not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"{name} (dtype {weight.dtype}, device {weight.device}) must be floating point on {x.device}; cast or move "
            "it"
        )
