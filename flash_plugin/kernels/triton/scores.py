"""Attention weights of each band, their slopes, and the gradient of the scores.

All are written tile by tile into buffers ``[b, rows, width]`` whose rows and columns are whole tiles. Column 0 of a row
tile is the first key of its band (``BAND``), or key ``col0`` of the panel of keys that the buffer covers. Tiles outside
the band are not written and never read.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from flash_plugin.kernels.triton.functions import attention_function, attention_slope
from flash_plugin.kernels.triton.shapes import by_tile
from flash_plugin.kernels.triton.tuning import Config, tuned


@triton.jit
def band_origin(begin, col0, BAND: tl.constexpr):
    """The key in column 0 of a row tile's buffer."""
    if BAND:
        return begin
    else:
        return col0


@triton.jit
def _products(
    q_ptr, k_ptr, batch, row0, key0, length,
    Z: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``q k^T`` of one block of a tile's columns, in float32."""
    x = tl.zeros((TILE, BLOCK_C), dtype=tl.float32)
    row = tl.arange(0, TILE)[:, None]
    key = tl.arange(0, BLOCK_C)[:, None]
    q_tile = q_ptr + (batch * length + row0) * Z
    k_tile = k_ptr + (batch * length + key0) * Z
    for z0 in range(0, Z, BLOCK_Z):
        column = (z0 + tl.arange(0, BLOCK_Z))[None, :]
        q = tl.load(q_tile + row * Z + column, mask=(row0 + row < length) & (column < Z), other=0.0)
        k = tl.load(k_tile + key * Z + column, mask=(key0 + key < length) & (column < Z), other=0.0)
        x = tl.dot(q, tl.trans(k), x, input_precision=PRECISION)
    return x


def _fits(config: Config, named: Mapping[str, Any]) -> bool:
    return (config.meta["BLOCK_C"] == 32) == (named["TILE"] == 64)


# Whole tiles would not fit the registers, with what masks, bias, activation and slope need of them.
@tuned(
    [Config({"BLOCK_C": 64}, num_warps=8, num_stages=1), Config({"BLOCK_C": 32}, num_warps=4, num_stages=1)],
    key=["length"],
    fits=_fits,
)
@triton.jit
def scores_kernel(
    q_local_ptr, k_local_ptr, q_global_ptr, k_global_ptr, bias_ptr,
    first_ptr, last_ptr, document_ptr, real_ptr, begin_ptr, end_ptr, weights_ptr, slopes_ptr,
    length, token_stride, tile_stride, row0, col0, buffer_rows, width, scale, gain, bias_center,
    Z: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, CAUSAL: tl.constexpr,
    LOCAL: tl.constexpr, DIRECT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REAL: tl.constexpr, BAND: tl.constexpr,
    SLOPES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``weights = gain act(scale q_local k_local^T + bias)`` at attended pairs, ``q_global k_global^T`` at linear ones.

    ``slopes`` is what their derivative by the score (by the product, at linear pairs) is. Grid: row tiles, blocks of
    columns, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    row_tile = row0 // TILE + tl.program_id(0)
    begin = tl.load(begin_ptr + batch * tile_stride + row_tile)
    end = tl.load(end_ptr + batch * tile_stride + row_tile)
    column0 = tl.program_id(1) * BLOCK_C
    key0 = column0 + band_origin(begin, col0, BAND)
    if key0 < begin or key0 >= end:
        return
    rows = row_tile * TILE + tl.arange(0, TILE)
    keys = key0 + tl.arange(0, BLOCK_C)
    first = tl.load(first_ptr + batch * token_stride + rows, mask=rows < length, other=length)
    visible = (rows < length)[:, None] & (keys < length)[None, :]
    if HAS_REAL:
        real = tl.load(real_ptr + batch * token_stride + keys, mask=keys < length, other=0)
        visible = visible & (real != 0)[None, :]
    if CAUSAL:
        visible = visible & (keys[None, :] <= rows[:, None])
    else:
        last = tl.load(last_ptr + batch * token_stride + rows, mask=rows < length, other=0)
        visible = visible & (keys[None, :] < last[:, None])
    at = (batch * buffer_rows + (row_tile * TILE - row0)) * width + column0
    square = tl.arange(0, TILE)[:, None] * width + tl.arange(0, BLOCK_C)[None, :]
    weights = tl.zeros((TILE, BLOCK_C), dtype=tl.float32)
    slopes = weights
    if LOCAL:
        attended = visible & (keys[None, :] >= first[:, None])
        x = _products(
            q_local_ptr, k_local_ptr, batch, row_tile * TILE, key0, length, Z, BLOCK_Z, TILE, BLOCK_C, PRECISION
        )
        x *= scale
        if HAS_BIAS:
            distance = rows[:, None] - keys[None, :] + bias_center
            within = attended & (distance >= 0) & (distance <= 2 * bias_center)
            x += tl.load(bias_ptr + distance, mask=within, other=0.0).to(tl.float32)
        weights = tl.where(attended, gain * attention_function(x, ACTIVATION), 0.0)
        if SLOPES:
            slopes = tl.where(attended, gain * attention_slope(x, ACTIVATION), 0.0)
    tl.store(weights_ptr + at + square, weights.to(weights_ptr.dtype.element_ty))
    if SLOPES:
        tl.store(slopes_ptr + at + square, slopes.to(slopes_ptr.dtype.element_ty))
    if DIRECT:
        # Linear pairs lie before the chunk of some row: a tile that has none is spared their product. They are written
        # over what is there, since both parts together would not fit the registers. The two stores give an element to
        # different threads: the barrier keeps their order.
        if key0 < tl.max(first, 0):
            tl.debug_barrier()
            y = _products(
                q_global_ptr, k_global_ptr, batch, row_tile * TILE, key0, length, Z, BLOCK_Z, TILE, BLOCK_C, PRECISION
            )
            document = tl.load(document_ptr + batch * token_stride + rows, mask=rows < length, other=length)
            linear = visible & (keys[None, :] < first[:, None]) & (keys[None, :] >= document[:, None])
            tl.store(weights_ptr + at + square, y.to(weights_ptr.dtype.element_ty), mask=linear)
            if SLOPES:
                tl.store(slopes_ptr + at + square, linear.to(slopes_ptr.dtype.element_ty), mask=linear)


@tuned(
    [
        Config({"BLOCK_K": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_K": 32}, num_warps=4, num_stages=2),
    ],
    key=["length", "E"],
    fits=by_tile,
)
@triton.jit
def score_gradient_kernel(
    gradient_ptr, values_ptr, slopes_ptr, out_ptr, linear_ptr, wide_ptr, first_ptr, begin_ptr, end_ptr,
    length, token_stride, tile_stride, col0, buffer_rows, width,
    E: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    EVEN_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = (gradient values^T) * slopes``, and in float32 in ``wide`` (``WIDE``). Grid: row, column tiles, batch.

    ``SPLIT`` puts linear pairs into a buffer of their own, and 0 for them into ``out``, so that nothing needs to be
    masked between memory and the tensor cores.
    """
    batch = tl.program_id(2).to(tl.int64)
    row_tile = tl.program_id(0)
    begin = tl.load(begin_ptr + batch * tile_stride + row_tile)
    end = tl.load(end_ptr + batch * tile_stride + row_tile)
    column0 = tl.program_id(1) * TILE
    key0 = column0 + band_origin(begin, col0, BAND)
    if key0 < begin or key0 >= end:
        return
    tile = tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    rows = row_tile * TILE + tile
    keys = key0 + tile
    gradient_row = gradient_ptr + (batch * length + row_tile * TILE) * E + tile[:, None] * E
    value_row = values_ptr + (batch * length + key0) * E + tile[:, None] * E
    acc = tl.zeros((TILE, TILE), dtype=tl.float32)
    for e0 in range(0, E, BLOCK_K):
        column = (e0 + step)[None, :]
        if EVEN_ROWS and E % BLOCK_K == 0:
            gradient = tl.load(gradient_row + column)
            values = tl.load(value_row + column)
        else:
            gradient = tl.load(gradient_row + column, mask=(rows < length)[:, None] & (column < E), other=0.0)
            values = tl.load(value_row + column, mask=(keys < length)[:, None] & (column < E), other=0.0)
        acc = tl.dot(gradient, tl.trans(values), acc, input_precision=PRECISION)
    at = (batch * buffer_rows + row_tile * TILE) * width + column0
    square = tile[:, None] * width + tile[None, :]
    acc *= tl.load(slopes_ptr + at + square).to(tl.float32)
    if WIDE:
        tl.store(wide_ptr + at + square, acc)
    if SPLIT:
        first = tl.load(first_ptr + batch * token_stride + rows, mask=rows < length, other=0)
        local = keys[None, :] >= first[:, None]
        tl.store(linear_ptr + at + square, tl.where(local, 0.0, acc).to(linear_ptr.dtype.element_ty))
        acc = tl.where(local, acc, 0.0)
    tl.store(out_ptr + at + square, acc.to(out_ptr.dtype.element_ty))
