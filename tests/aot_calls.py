"""The calls whose kernels ``tests/aot.py`` compiles: every op, forward and backward, at the widths that models have.

Of a tensor's sizes compiled code knows the widths, and of the others whether 16 divides them; so few tokens do. What is
in the tensors is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_plugin.kernels import (
    LinearState,
    linear_attention,
    make_segments,
    mixed_chunk_attention,
    quadratic_attention,
)
from flash_plugin.kernels.offset_scale import offset_scale
from flash_plugin.kernels.rms_norm import rms_norm, scale_norm

BATCH, LENGTH = 2, 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _input(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _packed(length: int) -> Any:
    """Documents of 300 tokens, and padding behind the last one."""
    positions = torch.arange(length).remainder(300).expand(BATCH, -1)
    return make_segments(positions, padding_mask=torch.arange(length).lt(length - 40).expand(BATCH, -1))


def _backward(out: Any, inputs: list[Tensor]) -> None:
    parts = [out] if isinstance(out, Tensor) else out
    tensors = [x for part in parts for x in ((part.kv, part.key_sum) if isinstance(part, LinearState) else (part,))]
    outputs = [x for x in tensors if x is not None]
    # Not Tensor.backward: it would copy what nobody reads.
    torch.autograd.grad(outputs, inputs, [torch.empty_like(x) for x in outputs], allow_unused=True)


def mixed_chunk(
    dtype: torch.dtype = BF16,
    z: int = 128,
    e: int = 4096,
    chunk_size: int = 256,
    length: int = LENGTH,
    *,
    gate: bool = True,
    bias: bool = False,
    packed: bool = False,
    state: bool = False,
    **options: Any,
) -> None:
    """Mixed chunk attention, forward and backward for every input."""
    names = ("q_local", "k_local", "q_global", "k_global")
    given = {name: _input(BATCH, length, z, dtype=dtype) for name in names}
    given["v"] = _input(BATCH, length, e, dtype=dtype)
    if gate:
        given["gate"] = _input(BATCH, length, e, dtype=dtype)
        options.setdefault("silu", True)
    if bias:
        given["bias"] = _input(2 * chunk_size - 1, dtype=FP32)
    inputs = list(given.values())
    if state:
        kv = _input(BATCH, z, e, dtype=FP32)
        inputs.append(kv)
        options |= {"initial_state": LinearState(kv, torch.full((BATCH,), 7), None), "return_state": True}
    segments = _packed(length) if packed else None
    out = mixed_chunk_attention(**given, chunk_size=chunk_size, segments=segments, impl="triton", **options)
    _backward(out, inputs)


def quadratic(
    dtype: torch.dtype = BF16,
    z: int = 128,
    e: int = 4096,
    length: int = LENGTH,
    *,
    gate: bool = True,
    bias: bool = False,
    packed: bool = False,
    **options: Any,
) -> None:
    """Quadratic attention, forward and backward for every input."""
    given = {name: _input(BATCH, length, z, dtype=dtype) for name in "qk"}
    given["v"] = _input(BATCH, length, e, dtype=dtype)
    if gate:
        given["gate"] = _input(BATCH, length, e, dtype=dtype)
        options.setdefault("silu", True)
    if bias:
        given["bias"] = _input(2 * length - 1, dtype=FP32)
    segments = _packed(length) if packed else None
    _backward(quadratic_attention(**given, segments=segments, impl="triton", **options), list(given.values()))


def linear(
    dtype: torch.dtype = BF16,
    z: int = 128,
    e: int = 128,
    length: int = LENGTH,
    heads: int = 4,
    *,
    packed: bool = False,
    state: bool = False,
    **options: Any,
) -> None:
    """Linear attention, forward and backward for every input."""
    given = {name: _input(BATCH, heads, length, z, dtype=dtype) for name in "qk"}
    given["v"] = _input(BATCH, heads, length, e, dtype=dtype)
    inputs = list(given.values())
    if state:
        kv, key_sum = _input(BATCH, heads, z, e, dtype=FP32), _input(BATCH, heads, z, dtype=FP32)
        inputs += [kv, key_sum]
        options |= {"initial_state": LinearState(kv, torch.full((BATCH,), 7), key_sum), "return_state": True}
    segments = _packed(length) if packed else None
    _backward(linear_attention(**given, segments=segments, impl="triton", **options), inputs)


def projections(
    dtype: torch.dtype = BF16, z: int = 128, count: int = 4, rotated: int = 128, by_row: bool = False, silu: bool = True
) -> None:
    """Offset-scale, forward and backward for every input."""
    inputs = [_input(BATCH, LENGTH, z, dtype=dtype), *(_input(count, z, dtype=FP32) for _ in range(2))]
    angles = torch.empty(*((BATCH,) if by_row else ()), LENGTH, rotated // 2, 2) if rotated else None
    _backward(offset_scale(*inputs, angles=angles, silu=silu, impl="triton"), inputs)


def norm(
    op: Callable[..., Any], dtype: torch.dtype = BF16, d: int = 2048, *, packed: bool = False, residual: bool = False
) -> None:
    """A norm with the token shift, forward and backward for every input."""
    inputs = [_input(BATCH, LENGTH, d, dtype=dtype), _input(1 if op is scale_norm else d, dtype=FP32)]
    segments = _packed(LENGTH) if packed else None
    _backward(op(*inputs, 1e-6, token_shift=True, segments=segments, residual=residual, impl="triton"), inputs)


CALLS: dict[str, Callable[[], None]] = {
    "mixed bf16": partial(mixed_chunk, bias=True),
    "mixed fp16": partial(mixed_chunk, FP16),
    "mixed fp32": partial(mixed_chunk, FP32),
    "mixed bf16 bidirectional": partial(mixed_chunk, causal=False),
    "mixed bf16 packed": partial(mixed_chunk, packed=True, bias=True),
    "mixed bf16 packed bidirectional": partial(mixed_chunk, packed=True, causal=False),
    "mixed fp32 packed": partial(mixed_chunk, FP32, packed=True),
    "mixed bf16 state, no gate": partial(mixed_chunk, gate=False, state=True),
    "mixed bf16 z 64, normalizer chunk": partial(mixed_chunk, z=64, e=2048, normalizer="chunk"),
    "mixed bf16 z 256, laplace": partial(mixed_chunk, z=256, activation="laplace"),
    "mixed bf16 odd, softplus2, normalizer paper": partial(
        mixed_chunk, z=48, e=1008, length=1000, activation="softplus2", normalizer="paper"
    ),
    "quadratic bf16": partial(quadratic, bias=True),
    "quadratic fp32": partial(quadratic, FP32),
    "quadratic bf16 bidirectional": partial(quadratic, causal=False),
    "quadratic bf16 packed, no gate": partial(quadratic, gate=False, packed=True),
    "linear bf16": linear,
    "linear fp32": partial(linear, FP32),
    "linear bf16 bidirectional": partial(linear, causal=False),
    "linear bf16 packed, normalized": partial(linear, packed=True, normalize=True),
    "linear bf16 state": partial(linear, state=True),
    "linear bf16 z 1024": partial(linear, z=1024, e=64),
    "offset-scale bf16": projections,
    "offset-scale fp32, 2, by row": partial(projections, FP32, count=2, by_row=True),
    "offset-scale bf16 z 48, some rotate": partial(projections, z=48, rotated=32),
    "offset-scale bf16, none rotates": partial(projections, rotated=0, silu=False),
    "RMS norm bf16": partial(norm, rms_norm, residual=True),
    "RMS norm fp32, packed": partial(norm, rms_norm, FP32, packed=True),
    "ScaleNorm bf16 d 8192, packed": partial(norm, scale_norm, d=8192, packed=True),
}
