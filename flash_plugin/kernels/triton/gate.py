"""What the backward pass does by row and by diagonal: gradients of the gate, of a quotient and of a bias.

Shape legend: ``b`` batch, ``s`` sequence, ``e`` value width, ``w`` buffer width, ``l`` length of the bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_plugin.kernels.triton.functions import sigmoid
from flash_plugin.kernels.triton.scores import band_origin
from flash_plugin.kernels.triton.tuning import Config, tuned


@tuned([Config({"BLOCK_ROWS": 4, "BLOCK_E": 1024}, num_warps=8, num_stages=1)], key=[])
@triton.jit
def gate_gradient_kernel(
    gradient_ptr, gate_ptr, mixed_ptr, row_scale_ptr, dmixed_ptr, dgate_ptr, length, token_stride,
    E: tl.constexpr, GATED: tl.constexpr, SILU: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``dmixed = row_scale gradient open(gate)`` and ``dgate = gradient mixed open'(gate)``; all ``[b, s, e]``.

    ``dmixed`` is the gradient of the sum before ``row_scale``. Grid: blocks of rows, blocks of e, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    inside = (rows < length)[:, None] & (column < E)
    offset = (batch * length + rows)[:, None] * E + column
    gradient = tl.load(gradient_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        mixed = tl.load(mixed_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dgate = gradient * mixed
        if SILU:
            opening = sigmoid(gate)
            dgate *= opening * (1.0 + gate * (1.0 - opening))
            gate *= opening
        gradient *= gate
        tl.store(dgate_ptr + offset, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if SCALED:
        gradient *= tl.load(row_scale_ptr + batch * token_stride + rows, mask=rows < length, other=0.0)[:, None]
    tl.store(dmixed_ptr + offset, gradient.to(dmixed_ptr.dtype.element_ty), mask=inside)


@tuned([Config({"BLOCK_ROWS": 4, "BLOCK_E": 256}, num_warps=4, num_stages=1)], key=[])
@triton.jit
def quotient_gradient_kernel(
    gradient_ptr, out_ptr, factor_ptr, dmixed_ptr, length, unit,
    E: tl.constexpr, OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of ``mixed`` where ``out = factor mixed`` and ``factor = scale / (scale last / unit + eps)``.

    ``last`` is the last column of ``mixed`` ``[b, s, E]``; ``gradient`` is ``[b, s, OUT]``, ``out`` too in float32,
    ``factor`` ``[b, s]`` float32. Columns that ``out`` lacks get 0, but for the last two, which are alike and share
    what the last one should get: against it the rounded gradient of the others must cancel to float32's digits.
    Grid: blocks of rows, batch.
    """
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = batch * length + rows
    factor = tl.load(factor_ptr + row, mask=rows < length, other=0.0)
    products = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for e0 in range(0, E, BLOCK_E):
        column = (e0 + tl.arange(0, BLOCK_E))[None, :]
        inside = (rows < length)[:, None] & (column < OUT)
        at = row[:, None] * OUT + column
        gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dmixed = (gradient * factor[:, None]).to(dmixed_ptr.dtype.element_ty)
        out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        products += tl.sum(dmixed.to(tl.float32) * out, 1)
        tl.store(dmixed_ptr + row[:, None] * E + column, dmixed, mask=(rows < length)[:, None] & (column < E - 2))
    last = -products / unit
    most = last.to(dmixed_ptr.dtype.element_ty)
    rest = (last - most.to(tl.float32)).to(dmixed_ptr.dtype.element_ty)
    tl.store(dmixed_ptr + row * E + (E - 1), most, mask=rows < length)
    tl.store(dmixed_ptr + row * E + (E - 2), rest, mask=rows < length)


@tuned([Config({"BLOCK_ROWS": 32, "BLOCK_L": 128}, num_warps=4, num_stages=1)], key=[])
@triton.jit
def bias_gradient_kernel(
    score_gradient_ptr, partial_ptr, first_ptr, begin_ptr, end_ptr, length, token_stride, tile_stride,
    col0, buffer_rows, width, groups, center,
    TILE: tl.constexpr, GROUP_TILES: tl.constexpr, BAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Sums along the diagonals of the score gradient over a group of row tiles, ``partial`` ``[b, groups, l]`` float32.

    Element d of the bias belongs to the pairs with ``row - key + center == d``. What earlier panels of keys have
    left in ``partial`` is added to; its groups are summed afterwards, in a fixed order.
    Grid: blocks of l, groups, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    total = partial_ptr + (batch * groups + group) * (2 * center + 1) + d
    acc = tl.load(total, mask=d <= 2 * center, other=0.0)
    last_tile = tl.minimum((group + 1) * GROUP_TILES, (length + TILE - 1) // TILE)
    for row_tile in range(group * GROUP_TILES, last_tile):
        begin = tl.load(begin_ptr + batch * tile_stride + row_tile)
        end = tl.load(end_ptr + batch * tile_stride + row_tile)
        origin = band_origin(begin, col0, BAND)
        if not BAND:
            begin = tl.maximum(begin, col0)
            end = tl.minimum(end, col0 + width)
        # A tile of rows and a block of l meet in the keys from the first row's last to the last row's first.
        highest = (row_tile + 1) * TILE - 1 + center - tl.program_id(0) * BLOCK_L
        lowest = row_tile * TILE + center - (tl.program_id(0) + 1) * BLOCK_L + 1
        if highest >= begin and lowest < end:
            for row0 in range(row_tile * TILE, (row_tile + 1) * TILE, BLOCK_ROWS):
                rows = row0 + tl.arange(0, BLOCK_ROWS)
                keys = rows[:, None] + center - d[None, :]
                # Linear pairs, which stand before a row's first key, have no bias.
                first = tl.load(first_ptr + batch * token_stride + rows, mask=rows < length, other=length)
                within = (keys >= tl.maximum(first, begin)[:, None]) & (keys < end) & (d <= 2 * center)[None, :]
                at = score_gradient_ptr + (batch * buffer_rows + rows)[:, None] * width + (keys - origin)
                acc += tl.sum(tl.load(at, mask=within & (rows < length)[:, None], other=0.0).to(tl.float32), 0)
    tl.store(total, acc, mask=d <= 2 * center)
