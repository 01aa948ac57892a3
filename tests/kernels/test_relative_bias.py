"""A bias over distances, spread over pairs of tokens: its values, both derivatives, and what autograd keeps of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import make_segments, mixed_chunk_attention, quadratic_attention
from flash_plugin.kernels.relative_bias import bias_between

REACH = 6
# Queries before, among and behind the keys; the last ones farther away than the bias reaches.
PLACES = [(0, 4, 4), (3, 2, 5), (-4, 3, 2), (0, 1, 7), (5, 6, 1), (4, 9, 12), (-20, 3, 3)]


@pytest.mark.parametrize(("first", "queries", "keys"), PLACES)
def test_each_pair_has_the_number_of_its_distance(first: int, queries: int, keys: int) -> None:
    bias = torch.randn(2 * REACH + 1, dtype=torch.float64, requires_grad=True)
    found = bias_between(bias, first, queries, keys)
    for i in range(queries):
        for j in range(keys):
            distance = min(max(first + i - j, -REACH), REACH)
            assert found[i, j] == bias[distance + REACH]

    def squared(bias: Tensor) -> Tensor:
        return bias_between(bias, first, queries, keys) ** 2

    assert torch.autograd.gradcheck(squared, bias)
    assert torch.autograd.gradgradcheck(squared, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_one_graph_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    bias = torch.randn(4 * REACH + 2).to(dtype)[::2].detach().requires_grad_()
    compiled = torch.compile(bias_between, fullgraph=True, backend="aot_eager")
    for call in (bias_between, compiled):
        found = call(bias, 4, 3, 8)
        assert found.dtype == dtype
        index = 4 + torch.arange(3)[:, None] - torch.arange(8) + REACH
        assert torch.equal(found, bias[index.clamp(max=2 * REACH)])
        (gradient,) = torch.autograd.grad(found.sum(), bias)
        assert torch.equal(gradient.float(), torch.bincount(index.clamp(max=2 * REACH).flatten(), minlength=13).float())


def quadratic(qk: Tensor, v: Tensor, bias: Tensor, causal: bool) -> Tensor:
    return quadratic_attention(qk, qk, v, bias=bias, causal=causal, impl="reference")


def packed(qk: Tensor, v: Tensor, bias: Tensor, causal: bool) -> Tensor:
    segments = make_segments(torch.cat([torch.arange(100), torch.arange(v.shape[1] - 100)])[None])
    bias = bias[v.shape[1] - 64 : v.shape[1] + 63]
    out = mixed_chunk_attention(qk, qk, qk, qk, v, bias=bias, segments=segments, causal=causal, chunk_size=64)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("op", [quadratic, packed])
def test_backward_keeps_no_index_of_pairs(op: Callable[..., Tensor], causal: bool) -> None:
    length = 600  # two panels of FLASH-Quad's rows
    qk, v = torch.randn(1, length, 4, requires_grad=True), torch.randn(1, length, 4, requires_grad=True)
    bias = torch.randn(2 * length - 1, requires_grad=True)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.dtype, tensor.untyped_storage().nbytes() // tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        op(qk, v, bias, causal).sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0
    assert max(size for dtype, size in kept if dtype.is_floating_point) >= length * 64
    assert max((size for dtype, size in kept if dtype == torch.int64), default=0) < 3 * length
