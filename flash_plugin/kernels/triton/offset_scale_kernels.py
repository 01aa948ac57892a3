"""The kernels of offset-scale with SiLU and rotation; each goes once over everything that it reads and writes.

Shape legend: ``z`` query/key width, ``n`` projections, ``r`` features that rotate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_plugin.kernels.triton.functions import sigmoid
from flash_plugin.kernels.triton.tuning import Config, tuned

_FORWARD = [
    Config({"TILE": 2048}, num_warps=8, num_stages=1),
    Config({"TILE": 4096}, num_warps=8, num_stages=1),
    Config({"TILE": 1024}, num_warps=4, num_stages=1),
]
# The backward holds 2 n sums of a tile's size in registers: these are the ones that do not spill.
_BACKWARD = [
    Config({"TILE": 1024}, num_warps=8, num_stages=1),
    Config({"TILE": 1024}, num_warps=4, num_stages=1),
    Config({"TILE": 2048}, num_warps=16, num_stages=1),
]
#: Largest tile of the backward, in elements.
LARGEST_TILE = 2048


@triton.jit
def _split_pairs(tile):
    """Even and odd features of ``[rows, features]``."""
    return tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))


@triton.jit
def _rotate(tile, cosine, sine):
    first, second = _split_pairs(tile)
    turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
    return tl.reshape(turned, (tile.shape[0], tile.shape[1]))


@triton.jit
def _load_angles(angles_ptr, row, column, inside, length, R: tl.constexpr, BY_ROW: tl.constexpr):
    """Cosine and sine of each pair of features; the angle is 0 from feature ``R`` on."""
    if not BY_ROW:
        row = row % length
    rotates = inside & (column < R)
    angles = tl.load(angles_ptr + row.to(tl.int64)[:, None] * R + column, mask=rotates, other=0.0).to(tl.float32)
    return _split_pairs(tl.where(rotates, angles, (column % 2 == 0).to(tl.float32)))


@triton.jit
def _load_base(base_ptr, offset, inside, SILU: tl.constexpr):
    """The base, and the sigmoid of it (1 where there is no SiLU)."""
    base = tl.load(base_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    return base, sigmoid(base) if SILU else 1.0


@triton.jit
def _load_row(table_ptr, i, column, Z: tl.constexpr):
    return tl.load(table_ptr + i * Z + column, mask=column < Z, other=0.0).to(tl.float32)


@triton.jit
def _project(
    x, cosine, sine, gamma_ptr, beta_ptr, out_ptr, i, offset, column, inside, Z: tl.constexpr, R: tl.constexpr
):
    projection = x * _load_row(gamma_ptr, i, column, Z) + _load_row(beta_ptr, i, column, Z)
    if R:
        projection = _rotate(projection, cosine, sine)
    tl.store(out_ptr + offset, projection.to(out_ptr.dtype.element_ty), mask=inside)


@tuned(_FORWARD, key=["rows", "Z", "N"])
@triton.jit
def offset_scale_kernel(
    base_ptr, gamma_ptr, beta_ptr, angles_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, rows, length,
    Z: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BY_ROW: tl.constexpr, SILU: tl.constexpr,
    BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``N`` projections of ``[rows, Z]``, each of its own tensor. Grid: blocks of rows."""
    row = tl.program_id(0) * (TILE // BLOCK_Z) + tl.arange(0, TILE // BLOCK_Z)
    column = tl.arange(0, BLOCK_Z)[None, :]
    inside = (row < rows)[:, None] & (column < Z)
    offset = row.to(tl.int64)[:, None] * Z + column
    base, opening = _load_base(base_ptr, offset, inside, SILU)
    x = base * opening
    cosine, sine = 1.0, 0.0
    if R:
        cosine, sine = _load_angles(angles_ptr, row, column, inside, length, R, BY_ROW)
    _project(x, cosine, sine, gamma_ptr, beta_ptr, out0_ptr, 0, offset, column, inside, Z, R)
    if N > 1:
        _project(x, cosine, sine, gamma_ptr, beta_ptr, out1_ptr, 1, offset, column, inside, Z, R)
    if N > 2:
        _project(x, cosine, sine, gamma_ptr, beta_ptr, out2_ptr, 2, offset, column, inside, Z, R)
    if N > 3:
        _project(x, cosine, sine, gamma_ptr, beta_ptr, out3_ptr, 3, offset, column, inside, Z, R)


@triton.jit
def _add_gradients(
    dx, dgamma, dbeta, x, cosine, sine, gamma_ptr, grad_ptr, i, offset, column, inside, Z: tl.constexpr, R: tl.constexpr
):
    gradient = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    if R:
        gradient = _rotate(gradient, cosine, -sine)
    return dx + gradient * _load_row(gamma_ptr, i, column, Z), dgamma + gradient * x, dbeta + gradient


@triton.jit
def _store_sums(partial_ptr, dgamma, dbeta, i, N: tl.constexpr, Z: tl.constexpr, BLOCK_Z: tl.constexpr):
    feature = tl.arange(0, BLOCK_Z)
    at = partial_ptr + (tl.program_id(0).to(tl.int64) * 2 * N + i) * Z + feature
    tl.store(at, tl.sum(dgamma, axis=0), mask=feature < Z)
    tl.store(at + N * Z, tl.sum(dbeta, axis=0), mask=feature < Z)


@tuned(_BACKWARD, key=["rows", "Z", "N"])
@triton.jit
def offset_scale_backward_kernel(
    grad0_ptr, grad1_ptr, grad2_ptr, grad3_ptr, base_ptr, gamma_ptr, angles_ptr, dbase_ptr, partial_ptr,
    rows, length, program_rows, Z: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BY_ROW: tl.constexpr,
    SILU: tl.constexpr, BLOCK_Z: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient of the base, and of gamma and beta summed over ``program_rows``: ``partial`` ``[programs, 2, N, Z]``.

    Grid: programs.
    """
    column = tl.arange(0, BLOCK_Z)[None, :]
    dgamma0 = tl.zeros((TILE // BLOCK_Z, BLOCK_Z), dtype=tl.float32)
    dgamma1, dgamma2, dgamma3 = dgamma0, dgamma0, dgamma0
    dbeta0, dbeta1, dbeta2, dbeta3 = dgamma0, dgamma0, dgamma0, dgamma0
    first = tl.program_id(0) * program_rows
    last = tl.minimum(first + program_rows, rows)
    for row0 in range(first, last, TILE // BLOCK_Z):
        row = row0 + tl.arange(0, TILE // BLOCK_Z)
        inside = (row < last)[:, None] & (column < Z)
        offset = row.to(tl.int64)[:, None] * Z + column
        base, opening = _load_base(base_ptr, offset, inside, SILU)
        x = base * opening
        cosine, sine = 1.0, 0.0
        if R:
            cosine, sine = _load_angles(angles_ptr, row, column, inside, length, R, BY_ROW)
        dx, dgamma0, dbeta0 = _add_gradients(
            tl.zeros_like(x), dgamma0, dbeta0, x, cosine, sine, gamma_ptr, grad0_ptr, 0, offset, column, inside, Z, R
        )
        if N > 1:
            dx, dgamma1, dbeta1 = _add_gradients(
                dx, dgamma1, dbeta1, x, cosine, sine, gamma_ptr, grad1_ptr, 1, offset, column, inside, Z, R
            )
        if N > 2:
            dx, dgamma2, dbeta2 = _add_gradients(
                dx, dgamma2, dbeta2, x, cosine, sine, gamma_ptr, grad2_ptr, 2, offset, column, inside, Z, R
            )
        if N > 3:
            dx, dgamma3, dbeta3 = _add_gradients(
                dx, dgamma3, dbeta3, x, cosine, sine, gamma_ptr, grad3_ptr, 3, offset, column, inside, Z, R
            )
        if SILU:
            dx *= opening * (1.0 + base * (1.0 - opening))
        tl.store(dbase_ptr + offset, dx.to(dbase_ptr.dtype.element_ty), mask=inside)
    _store_sums(partial_ptr, dgamma0, dbeta0, 0, N, Z, BLOCK_Z)
    if N > 1:
        _store_sums(partial_ptr, dgamma1, dbeta1, 1, N, Z, BLOCK_Z)
    if N > 2:
        _store_sums(partial_ptr, dgamma2, dbeta2, 2, N, Z, BLOCK_Z)
    if N > 3:
        _store_sums(partial_ptr, dgamma3, dbeta3, 3, N, Z, BLOCK_Z)
