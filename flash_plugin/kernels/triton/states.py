"""States: running sums of ``x^T y`` over blocks of tokens, forward for values and backward for gradients.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` states, ``z`` query/key width, ``e`` value width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from flash_plugin.kernels.triton.tuning import Config, tuned


def _fits(config: Config, named: Mapping[str, Any]) -> bool:
    fits = (config.meta["BLOCK_K"] == 32) == (named["x_ptr"].element_size() == 4)
    return fits and config.meta["BLOCK_E"] <= max(2 * named["E"] - 1, 64)


@tuned(
    [
        Config({"BLOCK_E": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_E": 64, "BLOCK_K": 64}, num_warps=4, num_stages=3),
        Config({"BLOCK_E": 64, "BLOCK_K": 32}, num_warps=4, num_stages=2),
    ],
    key=["length", "E", "count"],
    fits=_fits,
)
@triton.jit
def state_kernel(
    x_ptr, y_ptr, initial_ptr, rows_ptr, keep_ptr, states_ptr, final_ptr,
    length, rows_stride, keep_stride, state_stride, count,
    Z: tl.constexpr, E: tl.constexpr, BLOCK_Z: tl.constexpr, REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_KEEP: tl.constexpr, SPLIT: tl.constexpr, FINAL: tl.constexpr, EVEN_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the sum so far before each block, then ``sum = keep_j sum + x_j^T y_j``; block by block, or backwards.

    Block j is the rows from ``rows[j]`` to ``rows[j + 1]``. The sum is carried in float32 and stored in the type of
    ``states`` ``[b, n, z, e]``, one every ``state_stride`` elements, and right behind it what rounding took from it, if
    ``SPLIT``. ``final`` ``[b, z, e]`` float32 is the sum behind the last block. Grid: blocks of e, blocks of z, batch.
    """
    batch = tl.program_id(2).to(tl.int64)
    value = (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    key = tl.program_id(1) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    step = tl.arange(0, BLOCK_K)
    inside = (key < Z)[:, None] & (value < E)
    square = key[:, None] * E + value
    acc = tl.zeros((BLOCK_Z, BLOCK_E), dtype=tl.float32)
    if HAS_INITIAL:
        acc = tl.load(initial_ptr + batch * Z * E + square, mask=inside, other=0.0).to(tl.float32)
    for i in range(0, count):
        j = i
        if REVERSE:
            j = count - 1 - i
        at = states_ptr + (batch * count + j) * state_stride + square
        state = acc.to(states_ptr.dtype.element_ty)
        tl.store(at, state, mask=inside)
        if SPLIT:
            tl.store(at + Z * E, (acc - state.to(tl.float32)).to(states_ptr.dtype.element_ty), mask=inside)
        if HAS_KEEP:
            acc *= tl.load(keep_ptr + batch * keep_stride + j)
        start = tl.load(rows_ptr + batch * rows_stride + j)
        stop = tl.load(rows_ptr + batch * rows_stride + j + 1)
        for row0 in range(start, stop, BLOCK_K):
            rows = row0 + step
            row = (batch * length + rows)[:, None]
            if EVEN_ROWS and Z % BLOCK_Z == 0 and E % BLOCK_E == 0:
                x = tl.load(x_ptr + row * Z + key[None, :])
                y = tl.load(y_ptr + row * E + value)
            else:
                seen = (rows < length)[:, None]
                x = tl.load(x_ptr + row * Z + key[None, :], mask=seen & (key < Z)[None, :], other=0.0)
                y = tl.load(y_ptr + row * E + value, mask=seen & (value < E), other=0.0)
            acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
    if FINAL:
        tl.store(final_ptr + batch * Z * E + square, acc, mask=inside)
