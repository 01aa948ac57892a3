"""Products with the weights of each band and with the states: the output, and the gradients of values, q and k.

Buffers of weights are laid out as in ``scores.py``. Each kernel sums ``[A | q] [V ; S]`` in one loop whose operands
switch from the band to the state: a second loop on the same accumulator would make the tensor cores wait at each step.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` states, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from flash_plugin.kernels.triton.functions import sigmoid
from flash_plugin.kernels.triton.shapes import by_tile
from flash_plugin.kernels.triton.tuning import Config, tuned

_WIDE = [
    Config({"BLOCK_E": 256, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_E": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_E": 64, "BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_E": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
]


def _fits_mix(config: Config, named: Mapping[str, Any]) -> bool:
    # The sums of the weights need the registers that the widest block would fill.
    return by_tile(config, named) and not (named["QUOTIENT"] and config.meta["BLOCK_E"] > 128)


@tuned(_WIDE, key=["length", "E"], fits=_fits_mix)
@triton.jit
def mix_kernel(
    weights_ptr, values_ptr, queries_ptr, states_ptr, row_scale_ptr, gate_ptr, mixed_ptr, out_ptr, begin_ptr, end_ptr,
    length, token_stride, tile_stride, row0, buffer_rows, width, states, spacing, scale, eps, unit,
    Z: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr,
    HAS_STATE: tl.constexpr, SCALED: tl.constexpr, QUOTIENT: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr,
    KEEP_MIXED: tl.constexpr, EVEN_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``mixed = row_scale (weights values + queries state)``, ``out = open(gate) mixed``.

    The results have the first ``OUT`` columns of the values' ``E``. ``QUOTIENT``: the last of these holds ``unit``
    everywhere and so sums the weights; ``row_scale``, ``[b, s]``, is computed here: ``scale / (scale sum + eps)``.
    Grid: row tiles of the buffer times blocks of e, batch.
    """
    batch = tl.program_id(1).to(tl.int64)
    column_blocks: tl.constexpr = (OUT + BLOCK_E - 1) // BLOCK_E
    # All blocks of e of a row tile run side by side: they read the same weights, and the values stay in the L2 cache.
    panel_tile = tl.program_id(0) // column_blocks
    column0 = (tl.program_id(0) % column_blocks) * BLOCK_E
    row_tile = row0 // TILE + panel_tile
    begin = tl.load(begin_ptr + batch * tile_stride + row_tile)
    end = tl.maximum(tl.load(end_ptr + batch * tile_stride + row_tile), begin)
    if not HAS_STATE or Z == 128:
        # Tiles begin at multiples of their size: told so, the compiler reads rows of weights sixteen bytes at a time.
        # With states of other widths it then makes the tensor cores of sm_90 wait at each step, which is worse.
        begin = tl.multiple_of(begin, TILE)
        end = tl.multiple_of(end, TILE)
    tile = tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    rows = row_tile * TILE + tile
    column = column0 + tl.arange(0, BLOCK_E)
    origin = begin if BAND else 0
    stop = end
    if HAS_STATE:
        stop = end + (Z + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    acc = tl.zeros((TILE, BLOCK_E), dtype=tl.float32)
    last = E - 16 + tl.arange(0, 16)
    sums = tl.zeros((TILE, 16), dtype=tl.float32)
    for k0 in range(begin, stop, BLOCK_K):
        left = weights_ptr + (batch * buffer_rows + panel_tile * TILE) * width + (k0 - origin)
        right = values_ptr + (batch * length + k0) * E
        stride = width
        limit = length - k0
        if HAS_STATE:
            if k0 >= end:
                left = queries_ptr + (batch * length + row_tile * TILE) * Z + (k0 - end)
                right = states_ptr + ((batch * states + begin // spacing) * Z + (k0 - end)) * E
                stride = Z
                limit = Z - (k0 - end)
        left_at = left + tile[:, None] * stride + step[None, :]
        right_at = right + step[:, None] * E + column[None, :]
        if EVEN_ROWS and OUT % BLOCK_E == 0 and (not HAS_STATE or Z % BLOCK_K == 0):
            a = tl.load(left_at)
            x = tl.load(right_at)
        else:
            a = tl.load(left_at, mask=(rows < length)[:, None] & (step < limit)[None, :], other=0.0)
            x = tl.load(right_at, mask=(step < limit)[:, None] & (column < OUT)[None, :], other=0.0)
        acc = tl.dot(a, x, acc, input_precision=PRECISION)
        if QUOTIENT:
            counted = (step < limit)[:, None] & (last == E - 1)[None, :]
            ones = tl.load(right + step[:, None] * E + last[None, :], mask=counted, other=0.0)
            sums = tl.dot(a, ones, sums, input_precision=PRECISION)
    inside = (rows < length)[:, None] & (column < OUT)[None, :]
    if SCALED:
        row_scale = tl.load(row_scale_ptr + batch * token_stride + rows, mask=rows < length, other=0.0)
        acc = acc * row_scale[:, None]
    if QUOTIENT:
        row_scale = scale / (scale * tl.sum(sums, 1) / unit + eps)
        acc = acc * row_scale[:, None]
        if column0 == 0:
            tl.store(row_scale_ptr + batch * length + rows, row_scale, mask=rows < length)
    # Only what a program starts from needs 64 bits; registers are dear.
    at = (batch * length + row_tile * TILE) * OUT
    square = tile[:, None] * OUT + column[None, :]
    if KEEP_MIXED:
        tl.store(mixed_ptr + at + square, acc.to(mixed_ptr.dtype.element_ty), mask=inside)
    if GATED:
        gate = tl.load(gate_ptr + at + square, mask=inside, other=0.0).to(tl.float32)
        acc = acc * (gate * sigmoid(gate) if SILU else gate)
    tl.store(out_ptr + at + square, acc.to(out_ptr.dtype.element_ty), mask=inside)


@tuned(_WIDE[1:], key=["length", "E"], fits=by_tile)
@triton.jit
def value_gradient_kernel(
    weights_ptr, gradient_ptr, keys_ptr, states_ptr, values_ptr, out_ptr, begin_ptr, row_begin_ptr, row_end_ptr,
    length, tile_stride, col0, buffer_rows, width, states, spacing,
    Z: tl.constexpr, E: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr,
    HAS_STATE: tl.constexpr, SILU: tl.constexpr, EVEN_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = weights^T gradient + keys state``, times SiLU's slope at ``values``; ``keys`` is ``[b, z, s]``.

    The result has the first ``OUT`` columns of the gradient's ``E``.
    Grid: key tiles of the panel times blocks of e, batch.
    """
    batch = tl.program_id(1).to(tl.int64)
    column_blocks: tl.constexpr = (OUT + BLOCK_E - 1) // BLOCK_E
    key_tile = col0 // TILE + tl.program_id(0) // column_blocks
    column0 = (tl.program_id(0) % column_blocks) * BLOCK_E
    start = tl.load(row_begin_ptr + batch * tile_stride + key_tile) * TILE
    end = tl.maximum(tl.load(row_end_ptr + batch * tile_stride + key_tile) * TILE, start)
    key0 = key_tile * TILE
    tile = tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    keys = key0 + tile
    column = column0 + tl.arange(0, BLOCK_E)
    stop = end
    if HAS_STATE:
        stop = end + (Z + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    acc = tl.zeros((TILE, BLOCK_E), dtype=tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        origin = col0
        if BAND:
            # Behind the band nothing is read at the origin; the tile must only exist.
            origin = tl.load(begin_ptr + batch * tile_stride + tl.maximum(tl.minimum(k0, end - 1), 0) // TILE)
        left = weights_ptr + (batch * buffer_rows + k0) * width + (key0 - origin)
        right = gradient_ptr + (batch * length + k0) * E
        stride = width
        limit = length - k0
        if HAS_STATE:
            if k0 >= end:
                left = keys_ptr + (batch * Z + (k0 - end)) * length + key0
                right = states_ptr + ((batch * states + key0 // spacing) * Z + (k0 - end)) * E
                stride = length
                limit = Z - (k0 - end)
        left_at = left + step[:, None] * stride + tile[None, :]
        right_at = right + step[:, None] * E + column[None, :]
        if EVEN_ROWS and OUT % BLOCK_E == 0 and (not HAS_STATE or Z % BLOCK_K == 0):
            a = tl.load(left_at)
            x = tl.load(right_at)
        else:
            a = tl.load(left_at, mask=(step < limit)[:, None] & (keys < length)[None, :], other=0.0)
            x = tl.load(right_at, mask=(step < limit)[:, None] & (column < OUT)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), x, acc, input_precision=PRECISION)
    inside = (keys < length)[:, None] & (column < OUT)[None, :]
    at = (batch * length + key0) * OUT
    square = tile[:, None] * OUT + column[None, :]
    if SILU:
        values = tl.load(values_ptr + at + square, mask=inside, other=0.0).to(tl.float32)
        opening = sigmoid(values)
        acc = acc * (opening * (1.0 + values * (1.0 - opening)))
    tl.store(out_ptr + at + square, acc.to(out_ptr.dtype.element_ty), mask=inside)
