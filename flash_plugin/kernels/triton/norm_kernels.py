"""The kernels of RMS norm and ScaleNorm with the token shift; see ``normalization.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from flash_plugin.kernels.triton.tuning import Config, tuned

#: Elements of the default tile, which holds several rows if they are short.
TILE = 2048


def _covers_a_row(config: Config, named: Mapping[str, Any]) -> bool:
    return config.meta["TILE"] >= named["BLOCK_D"]


_CONFIGS = [
    Config({"TILE": TILE}, num_warps=4, num_stages=1),
    Config({"TILE": 4096}, num_warps=8, num_stages=1),
    Config({"TILE": 8192}, num_warps=16, num_stages=1),
]


@triton.jit
def _inverse(x, eps, D: tl.constexpr, SCALE: tl.constexpr):
    """What ``[rows, D]`` is multiplied by, and whether it depends on x: 0 where ``eps`` clamps it, else 1."""
    square = (tl.sum(x * x, axis=1) / D)[:, None]
    if SCALE:
        size = tl.sqrt(square)
        return 1.0 / tl.maximum(size, eps), (size >= eps).to(tl.float32)
    else:
        return 1.0 / tl.sqrt(square + eps), 1.0


@triton.jit
def _load_weight(weight_ptr, column, D: tl.constexpr, SCALE: tl.constexpr):
    """A factor for each feature, or one for all."""
    if SCALE:
        column = column * 0
    return tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _goes_on(start_ptr, row, within, length, start_stride, SEGMENTED: tl.constexpr):
    """Whether the token behind each row's is of the same document."""
    token = row % length
    follows = within & (token + 1 < length)
    if SEGMENTED:
        at = start_ptr + (row // length).to(tl.int64) * start_stride + token + 1
        return follows, follows & (tl.load(at, mask=follows, other=0) != token + 1)
    else:
        return follows, follows


@tuned(_CONFIGS, key=["rows", "D"], fits=_covers_a_row)
@triton.jit
def norm_kernel(
    x_ptr, weight_ptr, start_ptr, out_ptr, rows, length, start_stride, eps,
    D: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SEGMENTED: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Normalise ``[rows, D]``; ``SHIFT`` writes the first half of each row to the row behind it.

    Grid: blocks of rows.
    """
    row = tl.program_id(0) * (TILE // BLOCK_D) + tl.arange(0, TILE // BLOCK_D)
    column = tl.arange(0, BLOCK_D)[None, :]
    within = row < rows
    inside = within[:, None] & (column < D)
    offset = row.to(tl.int64)[:, None] * D + column
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    weight = _load_weight(weight_ptr, column, D, SCALE)
    inverse, _ = _inverse(x, eps, D, SCALE)
    out = (x * inverse * weight).to(out_ptr.dtype.element_ty)
    if SHIFT:
        moves = inside & (column < (D + 1) // 2)
        follows, goes_on = _goes_on(start_ptr, row, within, length, start_stride, SEGMENTED)
        tl.store(out_ptr + offset + D, tl.where(goes_on[:, None], out, 0.0), mask=moves & follows[:, None])
        first = (row % length == 0)[:, None]
        tl.store(out_ptr + offset, tl.zeros_like(out), mask=moves & first)
        inside &= column >= (D + 1) // 2
    tl.store(out_ptr + offset, out, mask=inside)


@tuned(_CONFIGS, key=["rows", "D"], fits=_covers_a_row)
@triton.jit
def norm_backward_kernel(
    grad_ptr, residual_ptr, x_ptr, weight_ptr, start_ptr, dx_ptr, partial_ptr, rows, length, start_stride,
    program_rows, eps,
    D: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, SEGMENTED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of x, with ``residual`` added, and of the weight summed over ``program_rows``.

    The latter is ``partial`` ``[programs, D]``. Grid: programs.
    """
    column = tl.arange(0, BLOCK_D)[None, :]
    weight = _load_weight(weight_ptr, column, D, SCALE)
    dweight = tl.zeros((TILE // BLOCK_D, BLOCK_D), dtype=tl.float32)
    first = tl.program_id(0) * program_rows
    last = tl.minimum(first + program_rows, rows)
    for row0 in range(first, last, TILE // BLOCK_D):
        row = row0 + tl.arange(0, TILE // BLOCK_D)
        within = row < last
        inside = within[:, None] & (column < D)
        offset = row.to(tl.int64)[:, None] * D + column
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            residual = tl.load(residual_ptr + offset, mask=inside, other=0.0)
        if SHIFT:
            # A row's first half went to the row behind it, or nowhere.
            moves = column < (D + 1) // 2
            _, goes_on = _goes_on(start_ptr, row, within, length, start_stride, SEGMENTED)
            at = grad_ptr + offset + tl.where(moves, D, 0)
            gradient = tl.load(at, mask=inside & (goes_on[:, None] | ~moves), other=0.0).to(tl.float32)
        else:
            gradient = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        inverse, depends = _inverse(x, eps, D, SCALE)
        x *= inverse
        dweight += gradient * x
        gradient *= weight
        slope = (tl.sum(gradient * x, axis=1) / D)[:, None] * depends
        dx = (gradient - x * slope) * inverse
        if RESIDUAL:
            dx += residual.to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    feature = tl.arange(0, BLOCK_D)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * D + feature
    tl.store(at, tl.sum(dweight, axis=0), mask=feature < D)
