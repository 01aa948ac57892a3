"""rms_norm and scale_norm with impl="triton": values and gradients against the oracle; the operator inside torch."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from flash_plugin.kernels import make_segments
from flash_plugin.kernels.triton.norm_kernels import norm_backward_kernel, norm_kernel
from flash_plugin.kernels.triton.normalization import norm as operator
from flash_plugin.kernels.triton.normalization import norm_backward
from tests.kernels.cases import LAYOUTS, make_layout, segments_of
from tests.kernels.test_norms import EPS, NORMS, check, inputs_for
from tests.kernels.test_validation import refused
from tests.tolerances import assert_close


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients_are_the_oracle_s(norm, layout, residual):
    # Several rows a tile, one row a tile with room to spare, rows of an odd width.
    for s, d in ((1, 16), (40, 600), (33, 7)):
        given = layout and make_layout(layout, 3, s)
        check(norm, given, inputs_for(norm, 3, s, d), [torch.float32], "triton", residual=residual)


@pytest.mark.parametrize("d", [2048, 2050, 8192])
def test_wide_rows(d):
    check("rms", make_layout("packed", 2, 9), inputs_for("rms", 2, 9, d), [torch.float32], "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_rounded_once(norm, dtype):
    for layout in (None, "one", "packed"):
        inputs = inputs_for(norm, 2, 70, 96, dtype)
        check(norm, layout and make_layout(layout, 2, 70), inputs, [dtype], "triton", residual=layout == "packed")


def test_many_blocks_a_program_add_up(monkeypatch):
    monkeypatch.setattr("flash_plugin.kernels.triton.partial_sums._PROGRAMS", 2)
    check("rms", make_layout("packed", 2, 301), inputs_for("rms", 2, 301, 100), [torch.float32], "triton")


@pytest.mark.parametrize("number", range(3))
def test_every_configuration_that_tuning_may_choose(number, monkeypatch):
    # The larger tiles hold more rows than a program of the backward sums.
    for kernel in (norm_kernel, norm_backward_kernel):
        assert len(kernel.configs) == 3
        monkeypatch.setattr(kernel, "configs", kernel.configs[number : number + 1])
    check("rms", make_layout("packed", 2, 70), inputs_for("rms", 2, 70, 100), [torch.float32], "triton")


def leaves(norm: str = "rms") -> list[Tensor]:
    return [x.float().requires_grad_() for x in inputs_for(norm, 2, 9, 16).values()]


def run(inputs: list[Tensor], norm: str = "rms", **options: Any) -> Tensor:
    segments = segments_of(make_layout("packed", 2, 9))
    return NORMS[norm](*inputs, EPS, token_shift=True, segments=segments, **options)


def test_strides_do_not_matter():
    found = []
    for turn in (lambda t: t.clone(), lambda t: t.mT.contiguous().mT):
        x, weight = leaves()
        x = turn(x.detach()).requires_grad_()
        # make_segments keeps the strides of its input.
        positions = turn(torch.arange(9).remainder(4).repeat(2, 1))
        out = NORMS["rms"](x, weight, EPS, token_shift=True, segments=make_segments(positions), impl="triton")
        found.append([out, *torch.autograd.grad(out, [x, weight], turn(torch.ones_like(out)))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("scale", "shift", "packed"), list(product([True, False], repeat=3)))
def test_the_operators_pass_opcheck(scale, shift, packed):
    inputs = leaves("scale" if scale else "rms")
    start = torch.arange(9).expand(2, 9) // 4 * 4 if packed else None
    torch.library.opcheck(operator, (*inputs, start, EPS, scale, shift))
    plain = [x.detach() for x in inputs]
    for residual in (None, torch.randn(2, 9, 16)):
        torch.library.opcheck(norm_backward, (torch.randn(2, 9, 16), residual, *plain, start, EPS, scale, shift))


@pytest.mark.parametrize("norm", NORMS)
def test_asked_for_it_compiles_into_one_graph(norm):
    inputs, found = leaves(norm), []
    segments = segments_of(make_layout("packed", 2, 9))

    def op(inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        return NORMS[norm](*inputs, EPS, token_shift=True, segments=segments, residual=True, impl="triton")

    for call in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        out, kept = call(inputs)
        found.append([out, *torch.autograd.grad(out.square().sum() + kept.pow(3).sum(), inputs)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "oracle_fp32")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_by_activation_checkpointing_it_has_the_same_gradients(reentrant):
    inputs, found = leaves(), []

    def block(*inputs: Tensor) -> Tensor:
        out, kept = NORMS["rms"](*inputs, EPS, residual=True, impl="triton")
        return out.square() + kept

    for call in (block, partial(checkpoint, block, use_reentrant=reentrant)):
        call(*inputs).pow(2).sum().backward()  # the reentrant kind knows no torch.autograd.grad
        found.append([tensor.grad for tensor in inputs])
        for tensor in inputs:
            tensor.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("token_shift", "residual", "compiling"), list(product([True, False], repeat=3)))
def test_auto_takes_the_kernels_where_torch_has_none_of_its_own(norm, token_shift, residual, compiling, monkeypatch):
    # As on a GPU.
    monkeypatch.setattr(import_module("flash_plugin.kernels.rms_norm"), "use_triton", lambda *arguments: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    with torch.profiler.profile(acc_events=True) as profile:
        NORMS[norm](*leaves(norm), EPS, token_shift=token_shift, residual=residual)
    ran = any(event.key == "flash_plugin::norm" for event in profile.key_averages())
    assert ran == (not compiling and (token_shift or residual or norm == "scale"))


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x.detach()).requires_grad_() for x in leaves()]
        out = NORMS["rms"](*inputs, EPS, token_shift=True, impl="triton")
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert out.shape == (2, 9, 16)
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


def test_the_same_call_gives_the_same_bits():
    runs = []
    for _ in range(2):
        inputs = leaves()
        runs.append(torch.autograd.grad(run(inputs, impl="triton").square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("what", ["dim 8200", "float64"])
def test_what_the_kernels_lack_is_said(what):
    dtype, d = (torch.float64, 16) if what == "float64" else (torch.float32, 8200)
    x, weight = torch.randn(1, 2, d, dtype=dtype), torch.ones(d, dtype=dtype)
    refused(NORMS["rms"], "impl", "triton", what, x=x, weight=weight, eps=EPS, impl="triton")
    assert NORMS["rms"](x, weight, EPS).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(2, 4096, 2048), (3, 1537, 768), (1, 700, 8192)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_gpu_it_is_the_reference_s(norm, shape, dtype):
    # The gradient of one scale, a sum over everything, is more than float16 can hold.
    inputs = {name: x.float().cuda() for name, x in inputs_for(norm, *shape, dtype).items()}
    segments = make_segments(torch.arange(shape[1], device="cuda").remainder(300).expand(shape[:2]))
    noise, found = torch.randn(shape, device="cuda"), []
    for impl, wide in (("auto", dtype), ("reference", torch.float64)):
        given = [x.to(wide if name == "x" else torch.promote_types(wide, torch.float32)) for name, x in inputs.items()]
        given = [x.requires_grad_() for x in given]
        out, kept = NORMS[norm](*given, EPS, token_shift=True, segments=segments, residual=True, impl=impl)
        # Not the output alone: a norm's gradient is nearly nothing along it.
        found.append([out, *torch.autograd.grad([out, kept], given, [(out + noise).to(wide), noise.to(wide)])])
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    for number, (actual, expected) in enumerate(zip(*found, strict=True)):
        suffix = "_grad" if number and dtype.itemsize == 2 else ""
        assert_close(actual, expected, f"oracle_{kind}{suffix}", f"tensor {number}")
