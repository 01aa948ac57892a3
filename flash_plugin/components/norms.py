"""The normalisations a FLASH model can use, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flash_plugin.components.copies import local
from flash_plugin.kernels import Segments, rms_norm, scale_norm
from flash_plugin.kernels.validation import is_number

NORMS = ("rmsnorm", "layernorm", "scalenorm", "plain_rmsnorm")


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` through :func:`flash_plugin.kernels.rms_norm`.

    Args:
        dim: Width d of the inputs.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)
        self.epsilon = eps

    def forward(
        self, x: Tensor, *, token_shift: bool = False, segments: Segments | None = None, residual: bool = False
    ) -> Any:
        """What the op gives: ``[..., d]`` normalised; for a ``residual`` this and ``x``."""
        return rms_norm(
            x, local(self.weight), self.epsilon, token_shift=token_shift, segments=segments, residual=residual
        )


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, also where tensor parallelism copies its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., d]``."""
        return F.layer_norm(input, self.normalized_shape, local(self.weight), local(self.bias), self.eps)


class ScaleNorm(nn.Module):
    """``x / max(||x|| / sqrt(d), eps) * g`` with one learned g (Nguyen & Salazar 2019; the paper's section 4).

    Args:
        dim: Width d of the inputs.
        eps: Smallest root mean square that is divided by.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        # One element, not a scalar: FSDP cannot shard a parameter without axes.
        self.scale = nn.Parameter(torch.ones(1))

    def forward(
        self, x: Tensor, *, token_shift: bool = False, segments: Segments | None = None, residual: bool = False
    ) -> Any:
        """What the op gives: ``[..., d]`` normalised; for a ``residual`` this and ``x``."""
        return scale_norm(x, local(self.scale), self.eps, token_shift=token_shift, segments=segments, residual=residual)


def build_norm(name: str, dim: int, eps: float) -> nn.Module:
    """Build the norm called ``name`` for width ``dim``; ``plain_rmsnorm`` is the RMS norm without a weight.

    Raises:
        ValueError: If the name is unknown or ``eps`` is not positive.
    """
    if not is_number(eps) or not 0 < eps < 1:
        raise ValueError(f"norm_eps ({eps!r}) must be a number between 0 and 1; set norm_eps=1.0e-6")
    if name == "rmsnorm":
        return RMSNorm(dim, eps=eps)
    if name == "layernorm":
        return LayerNorm(dim, eps=eps)
    if name == "scalenorm":
        return ScaleNorm(dim, eps=eps)
    if name == "plain_rmsnorm":
        return nn.RMSNorm(dim, eps=eps, elementwise_affine=False)
    raise ValueError(f"norm ({name!r}) must be one of {', '.join(NORMS)}; set norm to one of them")
