"""The repaired interpreter against torch: bfloat16 is computed in float32 and rounded to nearest even."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from flash_plugin.kernels.triton.availability import interpreted
from tests.interpreter import install

pytestmark = pytest.mark.skipif(not interpreted(), reason="with a GPU no test uses the interpreter")

NAN, INF, SMALLEST, LARGEST = float("nan"), float("inf"), 9.2e-41, 3.3895e38
# Ties in both directions, what rounds up to infinity, subnormals, and the signs of zero.
EDGES = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, 3.4e38, -3.4e38, LARGEST, SMALLEST, SMALLEST / 2, 0.0, -0.0]
VALUES = torch.tensor([*EDGES, NAN, -NAN, INF, -INF, 1e-3, -7.25])
BLOCK = 16
assert len(VALUES) == BLOCK


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every entry is equal; NaN equals NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


@triton.jit
def rounding_kernel(x, y, ROUNDING: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def arithmetic_kernel(a, b, added, subtracted, multiplied, divided, negated, chosen, larger, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(a + o), tl.load(b + o)
    tl.store(added + o, x + y)
    tl.store(subtracted + o, x - y)
    tl.store(multiplied + o, x * y)
    tl.store(divided + o, x / y)
    tl.store(negated + o, -x)
    tl.store(chosen + o, tl.where(x < y, x, y))
    tl.store(larger + o, tl.where((x >= 0) & (y != 1.0), 1.0, 0.0).to(tl.bfloat16))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y))


@triton.jit
def sum_kernel(x, total, largest, N: tl.constexpr):
    values = tl.load(x + tl.arange(0, N))
    tl.store(total, tl.sum(values, 0))
    tl.store(largest, tl.max(values, 0))


@triton.jit
def masked_kernel(x, without, given, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(without + o, tl.load(x + o, mask=o < n))
    tl.store(given + o, tl.load(x + o, mask=o < n, other=0))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_casts_round_to_nearest_even_and_keep_nan_and_infinity(of, to):
    x, y = VALUES.to(of), torch.empty(BLOCK, dtype=to)
    cast_kernel[(1,)](x, y, BLOCK)
    expected = x.float().to(to) if to == torch.bfloat16 else x.to(to)
    same(y, expected)
    assert torch.equal(y.signbit()[y == 0], expected.signbit()[y == 0])


def test_integers_become_bf16_and_back():
    x, y, z = torch.arange(250, 250 + BLOCK), torch.empty(BLOCK, dtype=torch.bfloat16), torch.empty(BLOCK).long()
    cast_kernel[(1,)](x, y, BLOCK)
    same(y, x.to(torch.bfloat16))
    cast_kernel[(1,)](y, z, BLOCK)
    assert torch.equal(z, y.long())


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_can_be_asked_for(to):
    y = torch.empty(BLOCK, dtype=to)
    rounding_kernel[(1,)](VALUES, y, "rtne", BLOCK)
    same(y, VALUES.to(to))
    rounding_kernel[(1,)](torch.full((BLOCK,), 2 - 2**-12), y, "rtz", BLOCK)
    assert (y == 2 - torch.finfo(to).eps).all()


def test_arithmetic_is_rounded_float32():
    torch.manual_seed(0)
    a = torch.cat([VALUES.to(torch.bfloat16), torch.randn(48).to(torch.bfloat16)])
    b = torch.cat([torch.full((BLOCK,), 3.0), torch.randn(48)]).to(torch.bfloat16)
    results = [torch.empty_like(a) for _ in range(7)]
    arithmetic_kernel[(1,)](a, b, *results, len(a))
    wide, other = a.float(), b.float()
    expected = [wide + other, wide - other, wide * other, wide / other, -wide, torch.where(a < b, wide, other)]
    for actual, value in zip(results, expected, strict=False):
        same(actual, value.to(torch.bfloat16))
    same(results[-1], ((a >= 0) & (b != 1)).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_matrix_product_sums_in_float32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, 16, 32, 64)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_reductions_are_of_wide_values():
    torch.manual_seed(0)
    x, total, largest = torch.randn(64), torch.empty(()), torch.empty(())
    sum_kernel[(1,)](x, total, largest, 64)
    torch.testing.assert_close(total, x.sum(), rtol=1e-6, atol=1e-6)
    assert largest == x.max()
    with pytest.raises(InterpreterError, match="bfloat16.*cast them"):
        sum_kernel[(1,)](x.to(torch.bfloat16), total, largest, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_masked_load_without_other_is_undefined_as_on_a_gpu(dtype):
    x, without, given = torch.ones(BLOCK, dtype=dtype), torch.empty(BLOCK, dtype=dtype), torch.empty(BLOCK, dtype=dtype)
    masked_kernel[(1,)](x, without, given, 5, BLOCK)
    assert (without[:5] == 1).all() and without[5:].isnan().all()
    assert (given[:5] == 1).all() and (given[5:] == 0).all()


def test_unwritten_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_a_second_repair_changes_nothing():
    before = dict(vars(triton.runtime.interpreter.InterpreterBuilder))
    install()
    assert dict(vars(triton.runtime.interpreter.InterpreterBuilder)) == before
