"""The Triton operators inside torch: opcheck, meta tensors, compilation, checkpointing, autocast, missing gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from flash_plugin.kernels import mixed_chunk_attention, quadratic_attention
from flash_plugin.kernels.triton.mixed_chunk import mixed_chunk
from flash_plugin.kernels.triton.quadratic import quadratic
from tests.kernels.cases import draw, make_layout, segments_of

SHAPES = {"v": (1, 70, 32), "gate": (1, 70, 32)}
MIXED = draw({name: (1, 70, 16) for name in ("q_local", "k_local", "q_global", "k_global")} | SHAPES, 0)
QUADRATIC = draw({name: (1, 70, 16) for name in ("q", "k")} | SHAPES, 0)


def leaves(inputs: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    return {name: x.float().to(device).requires_grad_() for name, x in inputs.items()}


def attend(x: dict[str, Tensor], **options: Any) -> Tensor:
    if "q" in x:
        return quadratic_attention(**x, impl="triton", **options)
    out = mixed_chunk_attention(**x, chunk_size=32, impl="triton", **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_the_operators_pass_opcheck(causal):
    t = torch.arange(70)[None]
    start, end = torch.where(t < 30, 0, 30), torch.where(t < 30, 30, 70)
    x = leaves(QUADRATIC)
    bias = torch.randn(139).requires_grad_()
    given = (bias, start, None if causal else end, t != 7)
    torch.library.opcheck(quadratic, (*x.values(), *given, causal, "relu2", True, 0.25, 2.0, True))
    x = leaves(MIXED)
    bias, initial = torch.randn(63).requires_grad_(), torch.randn(1, 16, 32).requires_grad_()
    # A bidirectional operator has a global part for rows of one document only.
    given = (initial, torch.tensor([5]), start, start, None, t != 7) if causal else (None,) * 6
    torch.library.opcheck(
        mixed_chunk, (*x.values(), bias, *given, 32, causal, True, causal, "laplace", "visible", 0.25, 1.0, True)
    )


@pytest.mark.parametrize("inputs", [MIXED, QUADRATIC], ids=["mixed_chunk", "quadratic"])
def test_they_compile_into_one_graph(inputs):
    expected = attend(leaves(inputs), silu=True)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    x, plain = leaves(inputs), leaves(inputs)
    out = compiled(x, silu=True)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    attend(plain, silu=True).square().sum().backward()
    assert all(torch.equal(x[name].grad, plain[name].grad) for name in x)


@pytest.mark.parametrize("inputs", [MIXED, QUADRATIC], ids=["mixed_chunk", "quadratic"])
def test_checkpointing_recomputes_the_same_bits(inputs):
    x, plain = leaves(inputs), leaves(inputs)
    checkpoint(
        lambda *tensors: attend(dict(zip(inputs, tensors, strict=True))), *x.values(), use_reentrant=False
    ).sum().backward()
    attend(plain).sum().backward()
    assert all(torch.equal(x[name].grad, plain[name].grad) for name in x)


@pytest.mark.parametrize("inputs", [MIXED, QUADRATIC], ids=["mixed_chunk", "quadratic"])
def test_autocast_reaches_queries_keys_values_and_gate(inputs):
    x = leaves(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(x)
    expected = attend({name: t.bfloat16() for name, t in x.items()})
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in x.values())


@pytest.mark.parametrize("inputs", [MIXED, QUADRATIC], ids=["mixed_chunk", "quadratic"])
def test_fake_tensors_have_the_shapes_of_real_ones(inputs):
    real = {name: t.float() for name, t in inputs.items()}
    with FakeTensorMode() as mode:
        x = {name: mode.from_tensor(t).requires_grad_() for name, t in real.items()}
        out = attend(x, silu=True)
        assert out.shape == (1, 70, 32)
        out.sum().backward()
    assert all(t.grad.shape == t.shape for t in x.values())


def test_a_loss_on_the_state_alone_reaches_keys_and_values():
    x = leaves(MIXED)
    segments = segments_of(make_layout("packed", 1, 70))
    gradients = []
    for impl in ("triton", "reference"):
        _, state = mixed_chunk_attention(**x, chunk_size=32, segments=segments, return_state=True, impl=impl)
        gradients.append(torch.autograd.grad(state.kv.square().sum(), [x["k_global"], x["v"]]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_second_derivatives_are_refused():
    x = leaves(QUADRATIC)
    (gradient,) = torch.autograd.grad(attend(x).square().sum(), [x["q"]], create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad|not differentiable|no autograd"):
        torch.autograd.grad(gradient.sum(), [x["q"]])
