"""offset_scale with impl="triton": values and every gradient against the float64 oracle; the operator inside torch."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_plugin.kernels import offset_scale
from flash_plugin.kernels.triton.offset_scale import offset_scale as operator
from flash_plugin.kernels.triton.offset_scale import offset_scale_backward
from flash_plugin.kernels.triton.offset_scale_kernels import offset_scale_backward_kernel, offset_scale_kernel
from tests.kernels.test_offset_scale import ROWS, angles_for, check, inputs_for
from tests.kernels.test_validation import refused
from tests.tolerances import assert_close

OPS = {"triton": partial(offset_scale, impl="triton")}


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("z", "rotated"), [(16, 16), (48, 32), (17, 4)], ids=str)
def test_values_and_gradients_are_the_oracle_s(z, rotated, n, silu):
    for s, rows in product((1, 37), ROWS):
        check(inputs_for(3, s, z, n), angles_for(s, rotated, rows), [torch.float32], OPS, silu=silu)


@pytest.mark.parametrize(("z", "rotated"), [(128, 128), (256, 2), (200, 64)], ids=str)
def test_wide_projections(z, rotated):
    check(inputs_for(2, 19, z, 4), angles_for(19, rotated, 0), [torch.float32], OPS, silu=True)


def test_many_blocks_a_program_add_up(monkeypatch):
    # What a sequence of a hundred thousand tokens does: each program sums several blocks.
    monkeypatch.setattr("flash_plugin.kernels.triton.partial_sums._PROGRAMS", 2)
    check(inputs_for(2, 301, 32, 4), angles_for(301, 32, 0), [torch.float32], OPS, silu=True)


@pytest.mark.parametrize("number", range(3))
def test_every_configuration_that_tuning_may_choose(number, monkeypatch):
    for kernel in (offset_scale_kernel, offset_scale_backward_kernel):
        assert len(kernel.configs) == 3
        monkeypatch.setattr(kernel, "configs", kernel.configs[number : number + 1])
    check(inputs_for(2, 70, 24, 3), angles_for(70, 8, 0), [torch.float32], OPS, silu=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_rounded_once(dtype):
    for z, rotated, rows in ((128, 128, 0), (40, 6, 2), (96, 96, None)):
        check(inputs_for(2, 70, z, 4, dtype), angles_for(70, rotated, rows), [dtype], OPS, silu=True)


def test_parameters_and_angles_may_have_other_dtypes():
    x, angles = inputs_for(2, 9, 16, 2, torch.bfloat16), angles_for(9, 16, 0, torch.bfloat16)
    narrow = {name: t.bfloat16().requires_grad_() for name, t in x.items()}
    mixed = narrow | {name: x[name].float().requires_grad_() for name in ("gamma", "beta")}
    found = []
    for given in (narrow, mixed):
        outputs = offset_scale(**given, angles=angles, impl="triton")
        found.append([*outputs, *torch.autograd.grad(sum(out.float().sum() for out in outputs), list(given.values()))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert [x.dtype for x in found[1]] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_strides_do_not_matter():
    x = {name: t.float() for name, t in inputs_for(2, 30, 16, 2).items()}
    angles = angles_for(30, 8, 3)
    assert angles is not None
    angles, found = angles[:2], []
    for turn in (lambda t: t.clone(), lambda t: t.mT.contiguous().mT):
        given = {name: turn(t).requires_grad_() for name, t in x.items()}
        outputs = offset_scale(**given, angles=turn(angles), silu=True, impl="triton")
        gradients = torch.autograd.grad(outputs, list(given.values()), [turn(torch.ones_like(o)) for o in outputs])
        found.append([*outputs, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_projections_that_nothing_depends_on_add_nothing():
    x = {name: t.float().requires_grad_() for name, t in inputs_for(1, 9, 16, 3).items()}
    found = []
    for impl in ("triton", "reference"):
        used = offset_scale(**x, silu=True, impl=impl)[1]
        found.append(torch.autograd.grad(used.square().sum(), list(x.values())))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not found[0][1][0].any()


def leaves(n: int = 3) -> list[Tensor]:
    return [x.float().requires_grad_() for x in inputs_for(2, 9, 16, n).values()]


@pytest.mark.parametrize("rows", ROWS)
def test_the_operators_pass_opcheck(rows):
    angles = angles_for(9, 8, rows)
    angles = angles[:2] if rows == 3 and angles is not None else angles
    torch.library.opcheck(operator, (*leaves(), angles, True))
    base, gamma, _ = (x.detach() for x in leaves())
    torch.library.opcheck(offset_scale_backward, ([torch.randn(2, 9, 16)] * 3, base, gamma, angles, True))


ANGLES = angles_for(9, 8, 0)


def run(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    return list(offset_scale(*inputs, angles=ANGLES, silu=True, **options))


def test_asked_for_it_compiles_into_one_graph():
    inputs = leaves()
    found = []
    for op in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outputs = op(inputs, impl="triton")
        found.append([*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("compiling", [True, False])
def test_where_triton_can_run_a_compiled_graph_still_holds_plain_operations(compiling, monkeypatch):
    # As on a GPU: there "auto" would take the kernels.
    monkeypatch.setattr(import_module("flash_plugin.kernels.offset_scale"), "use_triton", lambda *arguments: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.profiler.profile(acc_events=True) as profile:
        run(leaves())
    assert any(event.key == "flash_plugin::offset_scale" for event in profile.key_averages()) != compiling


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(x.detach()).requires_grad_() for x in leaves()]
        outputs = run(inputs, impl="triton")
        gradients = torch.autograd.grad(sum(out.sum() for out in outputs), inputs)
    assert [out.shape for out in outputs] == [(2, 9, 16)] * 3
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


def test_the_same_call_gives_the_same_bits():
    runs = []
    for _ in range(2):
        x = {name: t.to(torch.bfloat16).requires_grad_() for name, t in inputs_for(2, 300, 32, 4).items()}
        outputs = offset_scale(**x, angles=angles_for(300, 32, 0), silu=True, impl="triton")
        runs.append(torch.autograd.grad(sum(out.float().square().sum() for out in outputs), list(x.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("what", "shape"), [("5 projections", (2, 5, 16, 5)), ("dim 1100", (1, 2, 1100, 1)), ("float64", (2, 5, 16, 2))]
)
def test_what_the_kernels_lack_is_said(what, shape):
    dtype = torch.float64 if what == "float64" else torch.float32
    inputs = {name: x.to(dtype) for name, x in inputs_for(*shape).items()}
    refused(offset_scale, "impl", "triton", what, **inputs, impl="triton")
    assert len(offset_scale(**inputs)) == shape[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("shape", "rotated"), [((2, 8192, 128, 4), 128), ((3, 1537, 96, 2), 32)], ids=str)
def test_on_a_gpu_it_is_the_reference_s(shape, rotated, dtype):
    inputs = {name: x.to(dtype).cuda() for name, x in inputs_for(*shape, dtype).items()}
    angles = angles_for(shape[1], rotated, 0)
    assert angles is not None
    found = []
    for impl, wide in (("auto", dtype), ("reference", torch.float64)):
        given = {name: x.to(wide).requires_grad_() for name, x in inputs.items()}
        outputs = offset_scale(**given, angles=angles.cuda(), silu=True, impl=impl)
        found.append([*outputs, *torch.autograd.grad(outputs, list(given.values()), list(outputs))])
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    for number, (actual, expected) in enumerate(zip(*found, strict=True)):
        assert actual.dtype == dtype
        suffix = "_grad" if number >= shape[-1] and dtype.itemsize == 2 else ""
        assert_close(actual, expected, f"oracle_{kind}{suffix}", f"tensor {number}")
