"""Gradients of queries and keys: products of the score gradient with the other side, and of gradients with states.

Buffers are laid out as in ``scores.py``.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` states, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_plugin.kernels.triton.shapes import by_tile
from flash_plugin.kernels.triton.tuning import Config, tuned

_CONFIGS = [
    Config({"BLOCK_K": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_K": 32}, num_warps=4, num_stages=2),
]


@tuned(_CONFIGS, key=["length"], fits=by_tile)
@triton.jit
def query_gradient_kernel(
    score_gradient_ptr, keys_ptr, out_ptr, begin_ptr, end_ptr, length, tile_stride, col0, buffer_rows, width, scale,
    Z: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = scale D keys`` ``[b, s, z]`` for a buffer D; ``ADD`` adds ``D keys`` to what ``out`` (float32) holds.

    Grid: row tiles, blocks of z, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    row_tile = tl.program_id(0)
    # Tiles begin at multiples of their size: told so, the compiler reads rows of D sixteen bytes at a time.
    begin = tl.multiple_of(tl.load(begin_ptr + batch * tile_stride + row_tile), TILE)
    end = tl.multiple_of(tl.load(end_ptr + batch * tile_stride + row_tile), TILE)
    origin = begin
    if not BAND:
        origin = col0
        begin = tl.maximum(begin, col0)
        end = tl.minimum(end, col0 + width)
    tile = tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    column = (tl.program_id(1) * BLOCK_Z + tl.arange(0, BLOCK_Z))[None, :]
    inside = (row_tile * TILE + tile < length)[:, None] & (column < Z)
    at = out_ptr + (batch * length + row_tile * TILE) * Z + tile[:, None] * Z + column
    acc = tl.zeros((TILE, BLOCK_Z), dtype=tl.float32)
    if ADD:
        acc = tl.load(at, mask=inside, other=0.0)
    row = score_gradient_ptr + (batch * buffer_rows + row_tile * TILE) * width + tile[:, None] * width
    for key0 in range(begin, end, BLOCK_K):
        gradient = tl.load(row + (key0 - origin + step)[None, :])
        seen = (key0 + step < length)[:, None] & (column < Z)
        keys = tl.load(keys_ptr + (batch * length + key0) * Z + step[:, None] * Z + column, mask=seen, other=0.0)
        acc = tl.dot(gradient, keys, acc, input_precision=PRECISION)
    if not ADD:
        acc *= scale
    # Triton 3.6 makes the tensor cores wait at each step if a float32 sum is stored as it leaves the loop.
    tl.store(at, tl.where(inside, acc, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@tuned(_CONFIGS, key=["length"], fits=by_tile)
@triton.jit
def key_gradient_kernel(
    score_gradient_ptr, queries_ptr, out_ptr, begin_ptr, row_begin_ptr, row_end_ptr,
    length, tile_stride, col0, buffer_rows, width, scale,
    Z: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr, BAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = scale D^T queries`` ``[b, s, z]`` for a buffer D. Grid: key tiles of the panel, blocks of z, batch."""
    batch = tl.program_id(2).to(tl.int64)
    key_tile = col0 // TILE + tl.program_id(0)
    start = tl.load(row_begin_ptr + batch * tile_stride + key_tile) * TILE
    end = tl.load(row_end_ptr + batch * tile_stride + key_tile) * TILE
    tile = tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    column = (tl.program_id(1) * BLOCK_Z + tl.arange(0, BLOCK_Z))[None, :]
    acc = tl.zeros((TILE, BLOCK_Z), dtype=tl.float32)
    for row0 in range(start, end, BLOCK_K):
        origin = col0
        if BAND:
            origin = tl.multiple_of(tl.load(begin_ptr + batch * tile_stride + row0 // TILE), TILE)
        first = score_gradient_ptr + (batch * buffer_rows + row0) * width + (key_tile * TILE - origin)
        gradient = tl.load(first + step[:, None] * width + tile[None, :])
        seen = (row0 + step < length)[:, None] & (column < Z)
        queries = tl.load(queries_ptr + (batch * length + row0) * Z + step[:, None] * Z + column, mask=seen, other=0.0)
        acc = tl.dot(tl.trans(gradient), queries, acc, input_precision=PRECISION)
    inside = (key_tile * TILE + tile < length)[:, None] & (column < Z)
    at = out_ptr + (batch * length + key_tile * TILE) * Z + tile[:, None] * Z + column
    # A product stored as it is would wait as in query_gradient_kernel.
    tl.store(at, tl.where(inside, acc * scale, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@tuned(_CONFIGS, key=["length", "E"], fits=by_tile)
@triton.jit
def state_gradient_kernel(
    x_ptr, states_ptr, mixes_ptr, direct_ptr, row_scale_ptr, begin_ptr, out_ptr,
    length, token_stride, tile_stride, state_stride, states, spacing,
    Z: tl.constexpr, E: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr,
    DIRECT: tl.constexpr, MARKED: tl.constexpr, SCALED: tl.constexpr, EVEN_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = row_scale (direct + x state^T)``, the second part at tokens that ``mixes`` marks, ``x`` ``[b, s, e]``.

    ``QUERIES``: the state is the one that the row's tile reads, else the one its keys enter. ``direct`` ``[b, s, z]``
    float32 comes with ``DIRECT``, ``mixes`` ``[b, s]`` int8 with ``MARKED``, ``row_scale`` ``[b, s]`` float32 with
    ``SCALED``. Grid: row tiles, blocks of z, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    row_tile = tl.program_id(0)
    position = row_tile * TILE
    if QUERIES:
        position = tl.load(begin_ptr + batch * tile_stride + row_tile)
    rows = row_tile * TILE + tl.arange(0, TILE)
    step = tl.arange(0, BLOCK_K)
    key = tl.program_id(1) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    tile = tl.arange(0, TILE)
    # Only what a program starts from needs 64 bits; registers are dear.
    start = batch * length + row_tile * TILE
    square = tile[:, None] * Z + key[None, :]
    inside = (rows < length)[:, None] & (key < Z)[None, :]
    mixes = rows < length
    acc = tl.zeros((TILE, BLOCK_Z), dtype=tl.float32)
    if DIRECT:
        # The sum starts from what is there: adding it behind the loop would make the tensor cores wait at each step.
        acc = tl.load(direct_ptr + start * Z + square, mask=inside, other=0.0)
    if MARKED:
        mixes = tl.load(mixes_ptr + batch * token_stride + rows, mask=rows < length, other=0) != 0
    x_row = x_ptr + start * E + tile[:, None] * E
    state_row = states_ptr + (batch * states + position // spacing) * state_stride + key[:, None] * E
    for e0 in range(0, E, BLOCK_K):
        column = (e0 + step)[None, :]
        if EVEN_ROWS and E % BLOCK_K == 0 and Z % BLOCK_Z == 0 and not MARKED:
            x = tl.load(x_row + column)
            state = tl.load(state_row + column)
        else:
            x = tl.load(x_row + column, mask=mixes[:, None] & (column < E), other=0.0)
            state = tl.load(state_row + column, mask=(key < Z)[:, None] & (column < E), other=0.0)
        acc = tl.dot(x, tl.trans(state), acc, input_precision=PRECISION)
    if SCALED:
        acc *= tl.load(row_scale_ptr + batch * token_stride + rows, mask=rows < length, other=0.0)[:, None]
    tl.store(out_ptr + start * Z + square, acc.to(out_ptr.dtype.element_ty), mask=inside)
