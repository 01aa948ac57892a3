"""Every Triton op against the PyTorch reference on the device it will run on: `pytest -m gpu`.

Sizes are real ones, odd ones among them; the expected values are the reference's in float32 (float64 for float32
inputs), from the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import linear_attention, mixed_chunk_attention, quadratic_attention
from tests.kernels.cases import Tensors, draw, make_layout, seed_of, segments_of
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Batch, length, width of queries and keys, width of values.
SHAPES = [(2, 2048, 128, 1536), (1, 8192, 128, 4096), (3, 1000, 64, 1024), (2, 1537, 256, 400), (4, 63, 16, 48)]
LAYOUTS = ["one", "packed", "left", "holes"]


def compare(op: Callable[..., Any], inputs: Tensors, layout: str, dtype_name: str, **options: Any) -> None:
    """Output and every gradient of `op` with Triton kernels against the reference's."""
    dtype = DTYPES[dtype_name]
    batch, length = inputs["v"].shape[0], inputs["v"].shape[-2]
    arrangement = {n: None if x is None else x.cuda() for n, x in make_layout(layout, batch, length).items()}
    segments = segments_of(arrangement)
    real = arrangement["padding_mask"]

    def run(impl: str, wide: torch.dtype) -> list[Tensor]:
        x = {n: t.to(dtype).to(wide).cuda().requires_grad_() for n, t in inputs.items()}
        out = op(**x, segments=segments, impl=impl, **options)
        if real is not None:
            out = torch.where(real[..., None] if out.dim() == 3 else real[:, None, :, None], out, 0.0)
        weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
        return [out, *torch.autograd.grad((out.to(weight.dtype) * weight).sum(), list(x.values()))]

    expected = run("reference", torch.float64 if dtype == torch.float32 else torch.float32)
    for name, actual, wanted in zip(["output", *inputs], run("triton", dtype), expected, strict=True):
        kind = f"oracle_{dtype_name}" + ("_grad" if name != "output" and dtype.itemsize == 2 else "")
        assert_close(actual, wanted, kind, name)


def shapes_of(batch: int, length: int, z: int, e: int, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {name: (batch, length, z) for name in names} | {"v": (batch, length, e), "gate": (batch, length, e)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_chunk(shape, layout, dtype):
    for number, (chunk_size, causal) in enumerate([(256, True), (128, False), (100, True), (64, False), (1024, True)]):
        names = ("q_local", "k_local", "q_global", "k_global")
        shapes = shapes_of(*shape, names) | {"bias": (2 * chunk_size - 1,)}
        inputs = draw(shapes, seed_of(shape, layout), DTYPES[dtype])
        activation = ("relu2", "laplace", "softplus2")[number % 3]
        options = {"causal": causal, "activation": activation, "silu": number % 2 == 0}
        compare(mixed_chunk_attention, inputs, layout, dtype, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quadratic(shape, layout, dtype):
    for causal, activation in ((True, "relu2"), (False, "laplace"), (True, "softplus2")):
        shapes = shapes_of(*shape, ("q", "k")) | {"bias": (2 * shape[1] - 1,)}
        inputs = draw(shapes, seed_of(shape, layout), DTYPES[dtype])
        compare(quadratic_attention, inputs, layout, dtype, causal=causal, activation=activation, silu=causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 1000, 64, 128), (1, 2, 4096, 1024, 64), (2, 3, 257, 48, 300)], ids=str)
def test_linear(shape, layout, dtype):
    batch, heads, length, z, e = shape
    shapes = {"q": (batch, heads, length, z), "k": (batch, heads, length, z), "v": (batch, heads, length, e)}
    inputs = draw(shapes, seed_of(shape, layout), DTYPES[dtype])
    positive = {name: x.abs() if name != "v" else x for name, x in inputs.items()}
    for causal in (True, False):
        compare(linear_attention, inputs, layout, dtype, causal=causal)
        compare(linear_attention, positive, layout, dtype, causal=causal, normalize=True)


@pytest.mark.parametrize("op", ["mixed_chunk", "quadratic"])
def test_the_same_call_gives_the_same_bits(op):
    names = ("q", "k") if op == "quadratic" else ("q_local", "k_local", "q_global", "k_global")
    inputs = draw(shapes_of(2, 2048, 128, 1024, names), 0, torch.bfloat16)
    options = {} if op == "quadratic" else {"chunk_size": 256}
    call = quadratic_attention if op == "quadratic" else mixed_chunk_attention
    runs = []
    for _ in range(3):
        x = {name: t.to(torch.bfloat16).cuda().requires_grad_() for name, t in inputs.items()}
        out = call(**x, impl="triton", **options)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(x.values()))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
