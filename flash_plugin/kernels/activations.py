"""Element-wise attention functions act(x) of FLASH and their derivatives, which the blocked backward needs.

``softmax`` is listed beside them but is no element-wise function: it normalises over the visible keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.layout import state_dtype

_LAPLACE_MEAN = math.sqrt(0.5)
_LAPLACE_DEVIATION = math.sqrt(0.25 / math.pi)


class Activation(NamedTuple):
    """An element-wise attention function and its derivative."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - _LAPLACE_MEAN) / (_LAPLACE_DEVIATION * math.sqrt(2))))


def _laplace_derivative(x: Tensor) -> Tensor:
    standard = (x - _LAPLACE_MEAN) / _LAPLACE_DEVIATION
    return torch.exp(-0.5 * standard.square()) / (_LAPLACE_DEVIATION * math.sqrt(2 * math.pi))


ELEMENTWISE: dict[str, Activation] = {
    # Primer's squared ReLU, the paper's choice (section 2).
    "relu2": Activation(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
    # Mega (arXiv 2209.10655, section 3.3): a bounded fit of relu2.
    "laplace": Activation(_laplace, _laplace_derivative),
    "softplus2": Activation(lambda x: F.softplus(x).square(), lambda x: 2 * F.softplus(x) * torch.sigmoid(x)),
}
ACTIVATIONS = (*ELEMENTWISE, "softmax")


def gated(mixed: Tensor, gate: Tensor | None, silu: bool) -> Tensor:
    """``mixed * gate`` (or ``mixed * silu(gate)``), multiplied in float32 and rounded once."""
    if gate is None:
        return mixed
    dtype = state_dtype(mixed.dtype)
    opened = F.silu(gate.to(dtype)) if silu else gate.to(dtype)
    return (mixed.to(dtype) * opened).to(mixed.dtype)


def attention_weights(scores: Tensor, visible: Tensor, activation: str, softcap: float | None = None) -> Tensor:
    """Turn scores into attention weights, 0 where a key is not visible.

    Args:
        scores: ``scale * q.k + bias``, ``[..., queries, keys]``.
        visible: True where the query sees the key, broadcastable to ``scores``.
        activation: One of :data:`ACTIVATIONS`.
        softcap: Bound that the scores approach: they become ``softcap * tanh(scores / softcap)`` first.

    Returns:
        The weights, of the shape and dtype of ``scores``; rows that see nothing are 0.
    """
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if activation == "softmax":
        # A finite floor instead of -inf: rows that see nothing stay free of NaN in forward and backward.
        floor = torch.finfo(scores.dtype).min
        return torch.softmax(scores.masked_fill(~visible, floor), dim=-1).masked_fill(~visible, 0.0)
    return ELEMENTWISE[activation].function(scores).masked_fill(~visible, 0.0)
