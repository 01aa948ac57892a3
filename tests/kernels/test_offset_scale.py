"""offset_scale: values and every gradient against the float64 oracle; second derivatives; refusals."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import offset_scale
from tests import oracle
from tests.kernels.cases import Tensors, compare, draw, seed_of
from tests.kernels.test_validation import refused
from tests.tolerances import assert_close

OPS = {"reference": partial(offset_scale, impl="reference")}
# Rows of angles: none, one table for all rows of the batch, one table with a batch axis, one a row.
ROWS = (None, 0, 1, 3)


def inputs_for(b: int, s: int, z: int, n: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return draw({"base": (b, s, z), "gamma": (n, z), "beta": (n, z)}, seed_of(b, s, z, n), dtype)


def angles_for(s: int, rotated: int, rows: int | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Cosine and sine of random angles, that `dtype` can hold."""
    if rows is None:
        return None
    generator = torch.Generator().manual_seed(seed_of(s, rotated, rows))
    angle = torch.rand((rows, s, rotated // 2)[not rows :], generator=generator) * 6.3
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(dtype)


def check(
    inputs: Tensors, angles: Tensor | None, dtypes: Any = (torch.float32, torch.float64), ops: Any = OPS, **options: Any
) -> None:
    """All implementations in `ops` against the oracle."""
    options["angles"] = angles
    compare(
        {label: lambda x, op=op: list(op(**x, **options)) for label, op in ops.items()},
        lambda x: oracle.offset_scale(**x, **options),
        inputs,
        torch.ones(inputs["base"].shape[:2], dtype=torch.bool),
        dtypes,
    )


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_values_and_gradients_are_the_oracle_s(n, silu):
    # An odd width takes the plain form, which needs no pairs of rows.
    for s, (z, rotated), rows in product((1, 70), ((16, 16), (24, 6), (17, 4)), ROWS):
        check(inputs_for(3, s, z, n), angles_for(s, rotated, rows), silu=silu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_on_a_cpu_rounds_each_step(dtype):
    inputs = {name: x.to(dtype) for name, x in inputs_for(2, 70, 32, 2, dtype).items()}
    outputs = offset_scale(**inputs, angles=angles_for(70, 8, 0), silu=True)
    expected = oracle.offset_scale(**inputs, angles=angles_for(70, 8, 0), silu=True)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, wanted, "oracle_bf16" if dtype == torch.bfloat16 else "oracle_fp16")


def test_parameters_may_be_wider_than_the_base():
    x = inputs_for(2, 9, 16, 2, torch.bfloat16)
    narrow = offset_scale(x["base"].bfloat16(), x["gamma"].float(), x["beta"].float(), angles=angles_for(9, 16, 0))
    assert [out.dtype for out in narrow] == [torch.bfloat16] * 2
    expected = oracle.offset_scale(**x, angles=angles_for(9, 16, 0))
    assert_close(narrow[1], expected[1], "oracle_bf16")


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("rotated", [0, 2, 6])
def test_first_and_second_derivatives_pass_their_checks(rotated):
    angles = angles_for(5, rotated, 0) if rotated else None

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        return offset_scale(*tensors, angles=angles, silu=True)

    tensors = doubles((2, 5, 6), (2, 6), (2, 6))
    assert torch.autograd.gradcheck(op, tensors, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("frozen", ["base", "gamma", "beta"])
def test_second_derivatives_where_one_input_wants_none(frozen):
    inputs = dict(zip(("base", "gamma", "beta"), doubles((2, 5, 6), (3, 6), (3, 6)), strict=True))
    inputs[frozen].requires_grad_(False)
    wanted = [x for x in inputs.values() if x.requires_grad]
    found = []
    for op in (offset_scale, oracle.offset_scale):
        _, second, _ = op(**inputs, silu=True)  # nothing depends on the others
        first = torch.autograd.grad(second.square().sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "law_fp64")


def test_inputs_made_from_each_other_get_their_own_gradients():
    base, gamma = doubles((1, 3, 4), (3, 4))
    found = []
    for op in (offset_scale, oracle.offset_scale):
        loss = sum(out.square().sum() for out in op(base, gamma, gamma * 2, angles=angles_for(3, 4, 0)))
        first = torch.autograd.grad(loss, [base, gamma], create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [base, gamma])])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "law_fp64")


def test_strides_do_not_matter():
    x = {name: t.float() for name, t in inputs_for(2, 30, 16, 2).items()}
    angles = angles_for(30, 8, 1)
    assert angles is not None
    found = []
    for turn in (lambda t: t.clone(), lambda t: t.mT.contiguous().mT):
        given = {name: turn(t).requires_grad_() for name, t in x.items()}
        outputs = offset_scale(**given, angles=turn(angles), silu=True)
        gradients = torch.autograd.grad(sum(out.sum() for out in outputs), list(given.values()))
        found.append([*outputs, *gradients])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "law_fp32")


def test_it_compiles_into_one_graph_of_plain_operations():
    x = {name: t.float().requires_grad_() for name, t in inputs_for(2, 9, 16, 2).items()}
    angles = angles_for(9, 8, 0)
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(offset_scale, fullgraph=True, backend=backend)(**x, angles=angles, silu=True)
    assert len(graphs) == 1
    assert "complex" not in str(graphs[0].graph), "inductor cannot generate complex numbers"
    for actual, expected in zip(compiled, offset_scale(**x, angles=angles, silu=True), strict=True):
        assert_close(actual, expected, "law_fp32")


def call(**changes: Any) -> Any:
    """A valid call but for `changes`."""
    arguments = {"base": torch.randn(2, 9, 16), "gamma": torch.randn(3, 16), "beta": torch.randn(3, 16)}
    return offset_scale(**(arguments | {"angles": torch.randn(9, 4, 2)} | changes))


def test_a_valid_call_is_not_refused():
    assert [out.shape for out in call()] == [(2, 9, 16)] * 3


@pytest.mark.parametrize("shape", [(9, 16), (2, 0, 16), (2, 9, 15)], ids=str)
def test_base_must_fit(shape):
    refused(call, "base" if shape[-1] == 16 else "gamma", base=torch.randn(shape))


@pytest.mark.parametrize("shape", [(16,), (3, 15), (0, 16)], ids=str)
def test_gamma_must_fit(shape):
    refused(call, "gamma", str(shape), "16", gamma=torch.randn(shape))


def test_beta_must_be_like_gamma():
    refused(call, "beta", str((2, 16)), str((3, 16)), beta=torch.randn(2, 16))
    refused(call, "beta", "float64", beta=torch.randn(3, 16, dtype=torch.float64))
    refused(call, "gamma", "int64", gamma=torch.ones(3, 16, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(9, 4), (8, 4, 2), (9, 9, 2), (9, 4, 3), (3, 9, 4, 2), (9, 0, 2)], ids=str)
def test_angles_must_fit(shape):
    refused(call, "angles", str(shape), str((2, 9, 16)), angles=torch.randn(shape))


def test_angles_are_constants():
    refused(call, "angles", "requires_grad", angles=torch.randn(9, 4, 2, requires_grad=True))
    refused(call, "angles", "int64", angles=torch.ones(9, 4, 2, dtype=torch.int64))


def test_unknown_implementations_are_refused():
    refused(call, "impl", "cuda", "auto", "triton", "reference", impl="cuda")
