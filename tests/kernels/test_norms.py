"""rms_norm and scale_norm with the token shift: values and every gradient against the float64 oracle; refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import make_segments, rms_norm, scale_norm
from tests import oracle
from tests.kernels.cases import LAYOUTS, Layout, Tensors, compare, draw, make_layout, real_tokens, seed_of, segments_of
from tests.kernels.test_validation import refused
from tests.tolerances import assert_close

NORMS = {"rms": rms_norm, "scale": scale_norm}
# Large enough to matter, and to clamp the smallest of the rows below.
EPS = 0.05


def inputs_for(norm: str, b: int, s: int, d: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Rows of very different sizes; one scale that is not small."""
    drawn = draw({"x": (b, s, d), "size": (b, s, 1), "weight": (d if norm == "rms" else 1,)}, seed_of(b, s, d), dtype)
    x = (drawn["x"] * (3 * drawn["size"] - 1).exp()).to(dtype).double()
    return {"x": x, "weight": drawn["weight"] if norm == "rms" else drawn["weight"].abs().to(dtype).double() + 1}


def check(
    norm: str,
    layout: Layout | None,
    inputs: Tensors,
    dtypes: Any = (torch.float32, torch.float64),
    impl: str = "reference",
    *,
    residual: bool = False,
) -> None:
    """A norm against the oracle, with the token shift if there is a layout, and with a residual's gradient if asked."""
    b, s, _ = inputs["x"].shape
    op = partial(NORMS[norm], impl=impl, residual=residual)
    shift: dict[str, Any] = {} if layout is None else {"token_shift": True, "segments": segments_of(layout)}
    expected = {"eps": EPS, "scale_norm": norm == "scale", "token_shift": layout is not None, **(layout or {})}

    real = real_tokens(layout or make_layout("one", b, s), b, s)

    def with_square(out: Tensor, *kept: Tensor) -> list[Tensor]:
        """The output; and a sum of squares, as without one the gradient of a single scale may cancel to nothing."""
        return [out, torch.where(real[..., None], out.double().square(), 0.0).sum()[None], *kept]

    def ours(x: Tensors) -> list[Tensor]:
        out = op(x["x"], x["weight"], EPS, **shift)
        return with_square(*out) if residual else with_square(out)

    compare(
        {norm: ours},
        lambda x: with_square(oracle.norm(**x, **expected), *([x["x"]] if residual else [])),
        inputs,
        real,
        dtypes,
    )


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients_are_the_oracle_s(norm, layout, residual):
    for s, d in ((1, 8), (40, 16), (33, 7)):
        check(norm, layout and make_layout(layout, 3, s), inputs_for(norm, 3, s, d), residual=residual)


@pytest.mark.parametrize("norm", NORMS)
def test_either_result_alone_has_its_gradient(norm):
    x, weight = (t.requires_grad_() for t in inputs_for(norm, 2, 5, 8).values())
    expected = torch.autograd.grad(NORMS[norm](x, weight, EPS).pow(3).sum(), [x, weight])
    found = torch.autograd.grad(NORMS[norm](x, weight, EPS, residual=True)[0].pow(3).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept = NORMS[norm](x, weight, EPS, residual=True)[1]
    dx, dweight = torch.autograd.grad(kept.pow(2).sum(), [x, weight], allow_unused=True)
    assert torch.equal(dx, 2 * x)
    assert dweight is None


@pytest.mark.parametrize("norm", NORMS)
def test_any_leading_axes(norm):
    x = inputs_for(norm, 2, 6, 8)
    whole = NORMS[norm](*x.values(), EPS)
    assert_close(NORMS[norm](x["x"][0, 0], x["weight"], EPS), whole[0, 0], "law_fp64")
    assert_close(NORMS[norm](x["x"].view(2, 3, 2, 8), x["weight"], EPS), whole.view(2, 3, 2, 8), "law_fp64")


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_second_derivatives_where_one_input_wants_none(frozen, residual):
    given = {name: t.requires_grad_(name != frozen) for name, t in inputs_for("rms", 1, 3, 4).items()}
    wanted = [t for t in given.values() if t.requires_grad]
    found = []

    def ours(eps: float, **given: Tensor) -> Tensor:
        out = rms_norm(**given, eps=eps, residual=residual)
        return out[0] * out[1] if residual else out

    def plain(eps: float, **given: Tensor) -> Tensor:
        return oracle.norm(**given, eps=eps) * (given["x"] if residual else 1)

    for op in (ours, plain):
        first = torch.autograd.grad(op(**given, eps=EPS).pow(3).sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(first[0].square().sum(), wanted)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "law_fp64")


def test_a_backward_inside_autocast_is_as_exact():
    x, weight = (t.float().requires_grad_() for t in inputs_for("rms", 2, 40, 64).values())
    out, noise, found = rms_norm(x, weight, EPS), torch.randn(2, 40, 64), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, [x, weight], noise, retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_scale_norm_of_nothing_is_nothing(norm):
    x = torch.zeros(2, 3, 4, requires_grad=True)
    out = NORMS[norm](x, torch.ones(4 if norm == "rms" else 1), 1e-6)
    assert torch.equal(out, torch.zeros(2, 3, 4))
    assert torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_refusals(norm):
    def call(**changes: Any) -> Any:
        name = {"rms": "weight", "scale": "scale"}[norm]
        given = {"x": torch.randn(2, 5, 4), name: torch.ones(4 if norm == "rms" else 1), "eps": EPS, **changes}
        return NORMS[norm](**given)

    name = "weight" if norm == "rms" else "scale"
    assert call(token_shift=True).shape == (2, 5, 4)
    refused(call, name, str((3,)), **{name: torch.ones(3)})
    refused(call, name, "int64", **{name: torch.ones(4 if norm == "rms" else 1, dtype=torch.int64)})
    refused(call, "impl", "cuda", "triton", impl="cuda")
    refused(call, "x", str((5, 4)), "token_shift", x=torch.randn(5, 4), token_shift=True)
    refused(call, "segments", "token_shift", segments=make_segments(torch.arange(5).expand(2, 5)))
    refused(call, "segments", str((2, 6)), token_shift=True, segments=make_segments(torch.arange(6).expand(2, 6)))
    refused(call, "segments", "make_segments", token_shift=True, segments=torch.zeros(2, 5))
