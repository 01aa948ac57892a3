"""quadratic_attention: values and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import quadratic_attention, reference_quadratic_attention
from tests import oracle
from tests.kernels.cases import (
    ACTIVATIONS,
    LAYOUTS,
    NORMALIZERS,
    Layout,
    Tensors,
    compare,
    draw,
    make_layout,
    real_tokens,
    seed_of,
    segments_of,
)
from tests.tolerances import assert_close

SIZES = (1, 7, 63, 130)
OPS = {
    "reference": partial(quadratic_attention, impl="reference"),
    "formula": reference_quadratic_attention,
}


def inputs_for(
    b: int, s: int, z: int, e: int, *, bias: bool, gate: bool, dtype: torch.dtype = torch.float32
) -> Tensors:
    """q, k, v and what else is asked for."""
    shapes: dict[str, tuple[int, ...]] = {"q": (b, s, z), "k": (b, s, z), "v": (b, s, e)}
    if bias:
        shapes["bias"] = (2 * s - 1,)
    if gate:
        shapes["gate"] = (b, s, e)
    return draw(shapes, seed_of(b, s, z, e, bias, gate), dtype)


def check(
    layout: Layout, inputs: Tensors, dtypes: Any = (torch.float32, torch.float64), ops: Any = OPS, **options: Any
) -> None:
    """All implementations in `ops` against the oracle."""
    b, s, _ = inputs["q"].shape
    segments = segments_of(layout)
    compare(
        {label: lambda x, op=op: [op(**x, segments=segments, **options)] for label, op in ops.items()},
        lambda x: [oracle.quadratic(**x, **layout, **options)],
        inputs,
        real_tokens(layout, b, s),
        dtypes,
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layout_has_the_oracle_s_values_and_gradients(activation, normalizer, causal):
    for name in LAYOUTS:
        rng = random.Random(seed_of(activation, normalizer, causal, name))
        s, (z, e) = rng.choice(SIZES[1:]), rng.choice([(5, 7), (9, 3)])
        inputs = inputs_for(3, s, z, e, bias=rng.random() < 0.5, gate=rng.random() < 0.6)
        options = {"silu": rng.random() < 0.5, "scale": rng.choice([None, 0.3])}
        layout = make_layout(name, 3, s)
        check(layout, inputs, activation=activation, normalizer=normalizer, causal=causal, **options)


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_length_with_and_without_bias(layout, s):
    for causal, bias in product((True, False), (True, False)):
        check(make_layout(layout, 2, s), inputs_for(2, s, 5, 3, bias=bias, gate=bias), causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_stays_near_the_oracle(activation, dtype):
    inputs = inputs_for(2, 130, 17, 33, bias=True, gate=True, dtype=dtype)
    for causal, layout in ((True, "packed"), (False, "right")):
        check(make_layout(layout, 2, 130), inputs, [dtype], activation=activation, causal=causal, silu=causal)


def test_half_precision_does_not_underflow_with_the_length_inside_the_square():
    for normalizer in ("paper", "chunk"):
        inputs = inputs_for(1, 600, 8, 9, bias=False, gate=False, dtype=torch.float16)
        check(make_layout("one", 1, 600), inputs, [torch.float16], normalizer=normalizer)


def test_a_scale_that_is_learned_gets_its_gradient():
    # float64 only: a gradient summed into one number cancels
    inputs = inputs_for(2, 63, 5, 3, bias=True, gate=True) | {"scale": torch.tensor(0.375, dtype=torch.float64)}
    for activation in ACTIVATIONS:
        check(make_layout("packed", 2, 63), inputs, [torch.float64], activation=activation)


def tiny(**options: Any) -> tuple[Any, list[Tensor]]:
    """A float64 call of a few numbers, and its inputs, for finite differences."""
    inputs = inputs_for(2, 5, 2, 3, bias=True, gate=True)
    names = list(inputs)
    segments = segments_of(make_layout("holes", 2, 5))
    real = real_tokens(make_layout("holes", 2, 5), 2, 5)[..., None]

    def call(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        out = quadratic_attention(**inputs, segments=segments, impl="reference", **options)
        return torch.where(real, out, 0.0)

    return call, [x.requires_grad_() for x in inputs.values()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_finite_differences(activation):
    for causal, normalizer in product((True, False), ("visible", "paper")):
        call, tensors = tiny(activation=activation, causal=causal, normalizer=normalizer, silu=causal)
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("activation", ["softplus2", "laplace", "softmax", "relu2"])
def test_second_gradients_match_finite_differences(activation):
    call, tensors = tiny(activation=activation)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_strides_do_not_matter(op):
    b, s, z, e = 2, 63, 5, 7
    fused = draw({"x": (b, s, 2 * z + e)}, 1)["x"].float()
    q, k, v = fused.split([z, z, e], dim=-1)
    gate = draw({"x": (s, b, 2 * e)}, 2)["x"].float().transpose(0, 1)[..., ::2]
    bias = draw({"x": (4 * s - 2,)}, 3)["x"].float()[::2]
    out = op(q, k, v, gate=gate, bias=bias)
    assert not any(x.is_contiguous() for x in (q, k, v, gate, bias))
    plain = op(*(x.contiguous() for x in (q, k, v)), gate=gate.contiguous(), bias=bias.contiguous())
    assert_close(out, plain, "pair_fp32")
    shared = draw({"q": (1, s, z)}, 4)["q"].float().requires_grad_()
    op(shared.expand(b, s, z), k, v).sum().backward()
    copied = shared.detach().repeat(b, 1, 1).requires_grad_()
    op(copied, k, v).sum().backward()
    assert shared.grad is not None and copied.grad is not None
    assert_close(shared.grad, copied.grad.sum(0, keepdim=True), "pair_fp32")


def test_a_tensor_that_wants_no_gradient_gets_none_and_the_others_theirs():
    inputs = {n: x.float() for n, x in inputs_for(2, 7, 5, 3, bias=True, gate=True).items()}
    for wanted in inputs:
        mine = {n: x.clone().requires_grad_(n == wanted) for n, x in inputs.items()}
        quadratic_attention(**mine, impl="reference").sum().backward()
        assert all((x.grad is not None) == (n == wanted) for n, x in mine.items())


def test_inputs_are_left_as_they_were():
    inputs = {n: x.float() for n, x in inputs_for(2, 63, 5, 3, bias=True, gate=True).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    for op in OPS.values():
        op(**inputs, silu=True, dropout=0.1)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("activation", ["relu2", "softmax"])
def test_dropout_keeps_the_mean_repeats_under_a_seed_and_does_nothing_at_zero(op, activation):
    q, k, v = (x.float() for x in inputs_for(2, 23, 4, 3, bias=False, gate=False).values())
    call = partial(op, q, k, v, activation=activation)
    assert torch.equal(call(dropout=0.0), call())
    torch.manual_seed(0)
    first, second = call(dropout=0.3), call(dropout=0.3)
    torch.manual_seed(0)
    assert torch.equal(call(dropout=0.3), first)
    assert not torch.equal(first, second)
    many = torch.stack([call(dropout=0.3) for _ in range(600)])
    sigmas = (many.mean(0) - call()) / (many.std(0) / 600**0.5 + 1e-7)
    assert sigmas.abs().max() < 4.5, "the mean moved"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_dropout_is_the_same_in_backward_as_in_forward(op):
    q, k, v = (x for x in inputs_for(2, 63, 4, 3, bias=False, gate=False).values())
    v.requires_grad_()
    out = op(q, k, v, dropout=0.4)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    assert torch.allclose((gradient * v).sum(), (out * weight).sum(), rtol=1e-10)  # the output is linear in v


def test_auto_gives_what_the_reference_gives_on_the_cpu():
    inputs = {n: x.float() for n, x in inputs_for(2, 63, 5, 3, bias=True, gate=True).items()}
    assert torch.equal(quadratic_attention(**inputs), quadratic_attention(**inputs, impl="reference"))


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_other_rows_alone():
    inputs = {n: x.float().requires_grad_() for n, x in inputs_for(2, 9, 5, 3, bias=True, gate=True).items()}
    real = torch.tensor([[False] * 9, [True] * 9])
    for activation, op in product(ACTIVATIONS, OPS.values()):
        out = op(**inputs, segments=segments_of({"input_pos": None, "padding_mask": real}), activation=activation)
        assert torch.isfinite(out).all()
        gradients = torch.autograd.grad(out[1].sum(), list(inputs.values()))
        assert all(torch.isfinite(g).all() for g in gradients)
        alone = {n: x if n == "bias" else x[1:] for n, x in inputs.items()}
        assert_close(out[1:], op(**alone, activation=activation), "pair_fp32")
