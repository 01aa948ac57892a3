"""Triton's interpreter, made to compute what a GPU computes: :func:`install` before the first kernel is launched.

Triton 3.6 to 3.9 interpret a kernel in numpy, which has no bfloat16: they keep its bit patterns as 16-bit integers and
then multiply, add and compare those, without an error. They truncate where a GPU rounds to nearest even. And a masked
load without ``other`` gives zeros, where a GPU gives whatever the register held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

Array = NDArray[Any]


def widened(bits: Array) -> Array:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: Array) -> Array:
    """The bit patterns of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's payload into its exponent.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Repair the interpreter of this process; a second call does nothing."""
    if getattr(InterpreterBuilder, "_repaired", False):
        return
    InterpreterBuilder._repaired = True
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_clampf"):
        _replace(InterpreterBuilder, name, _in_float32)
    _replace(InterpreterBuilder, "create_dot", _with_float32_operands)
    _replace(InterpreterBuilder, "cast_impl", _with_rounding)
    _replace(InterpreterBuilder, "create_masked_load", _with_poison)
    _replace(ReduceScanOpInterface, "apply", _refusing_bf16)
    _replace(GridExecutor, "__call__", _quiet)
    _replace(interpreter, "_patch_lang_tensor", _with_integers)
    if not hasattr(InterpreterBuilder, "get_bf16"):  # Triton 3.6
        InterpreterBuilder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))


def _replace(owner: Any, name: str, repaired: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(repaired(original)))


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    return TensorHandle(widened(value.data), tl.float32) if _is_bf16(value) else value


def _narrow(value: Any) -> Any:
    return TensorHandle(narrowed(value.data), tl.bfloat16)


def _in_float32(original: Any) -> Any:
    """Arithmetic on bfloat16, each result rounded; a comparison's result is no number."""

    def method(self: Any, *arguments: Any) -> Any:
        result = original(self, *map(_widen, arguments))
        if not any(map(_is_bf16, arguments)):
            return result
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else _narrow(result)

    return method


def _with_float32_operands(original: Any) -> Any:
    """A matrix product of bfloat16 operands, whose result stays as wide as its accumulator."""
    return lambda self, a, b, *rest: original(self, _widen(a), _widen(b), *rest)


def _with_rounding(original: Any) -> Any:
    """A cast from or to bfloat16, to nearest even. Kernels that ask for truncation call another method."""

    def method(self: Any, source: Any, to: Any) -> Any:
        before, after = source.dtype.scalar, to.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return original(self, source, to)
        values = _widen(source).data
        if after == tl.bfloat16:
            return TensorHandle(narrowed(values.astype(np.float32)), after)
        return TensorHandle(values.astype(interpreter._get_np_dtype(after)), after)

    return method


def _refusing_bf16(original: Any) -> Any:
    """A reduction. Of bfloat16, a GPU would round each partial sum, in an order that numpy does not know."""

    def method(self: Any, values: Any) -> Any:
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype.scalar == tl.bfloat16:
                raise TypeError("values to reduce (bfloat16) must be wider, or every partial sum is rounded; cast them")
        return original(self, values)

    return method


def _with_poison(original: Any) -> Any:
    """A masked load that leaves NaN, or an extreme integer, where it loads nothing and was not told what to give."""

    def method(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        if other is None:
            element = pointers.get_element_ty()
            kind = interpreter._get_np_dtype(element)
            if element == tl.bfloat16:
                poison: Any = 0x7FC0
            elif kind.kind == "f":
                poison = np.nan
            else:
                poison = 1 if kind.kind == "b" else np.iinfo(kind).max
            other = TensorHandle(np.full(pointers.data.shape, poison, dtype=kind), element)
        return original(self, pointers, mask, other, *rest)

    return method


def _with_integers(original: Any) -> Any:
    """Scalars as Python's: Triton 3.6 converts an array of one axis, which numpy 2.4 refuses."""

    def method(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return method


def _quiet(original: Any) -> Any:
    """A launch in which infinities and NaN are values, as on a GPU, and not numpy's warnings."""

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        with np.errstate(all="ignore"):
            return original(self, *arguments, **named)

    return method
