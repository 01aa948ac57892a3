"""Functions that several kernels share: attention functions with their derivatives, and the gate's opening."""

from __future__ import annotations

import triton
import triton.language as tl

# Constants of Mega's laplace (see flash_plugin.kernels.activations): 1 / (deviation sqrt 2) and its slope at the mean.
_MEAN = tl.constexpr(0.7071067811865476)
_STEEPNESS = tl.constexpr(2.5066282746310002)
_SLOPE = tl.constexpr(1.4142135623730951)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` in float32, without overflow on either side."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def softplus(x):
    """``log(1 + exp(x))`` in float32, without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def attention_function(x, ACTIVATION: tl.constexpr):
    """``act(x)`` of the attention function called ``ACTIVATION``."""
    if ACTIVATION == "relu2":
        positive = tl.maximum(x, 0.0)
        return positive * positive
    elif ACTIVATION == "laplace":
        return 0.5 * (1.0 + tl.erf((x - _MEAN) * _STEEPNESS))
    else:
        tl.static_assert(ACTIVATION == "softplus2", "unknown attention function")
        smooth = softplus(x)
        return smooth * smooth


@triton.jit
def attention_slope(x, ACTIVATION: tl.constexpr):
    """``act'(x)`` of the attention function called ``ACTIVATION``."""
    if ACTIVATION == "relu2":
        return 2.0 * tl.maximum(x, 0.0)
    elif ACTIVATION == "laplace":
        standard = (x - _MEAN) * _STEEPNESS
        return _SLOPE * tl.exp(-standard * standard)
    else:
        tl.static_assert(ACTIVATION == "softplus2", "unknown attention function")
        return 2.0 * softplus(x) * sigmoid(x)
