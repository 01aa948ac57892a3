"""The ops between two sequences against the oracle, values and gradients, in every dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.cross import cross_linear, cross_quadratic, sum_over_keys
from tests import oracle
from tests.kernels.cases import ACTIVATIONS, Tensors, compare, draw, largest_tensor, seed_of

B, Z, E = 3, 10, 14
SIZES = [(1, 1), (7, 33), (33, 5), (600, 12)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def padding(s: int) -> Tensor:
    """Which keys are real, ``[b, s]``: all of the first row's, no token of the last row's."""
    real = torch.rand(B, s, generator=torch.Generator().manual_seed(s)) > 0.4
    real[0], real[-1] = True, False
    return real


def masks(t: int, s: int) -> dict[str, Tensor]:
    """Masks as the ops take them, by name."""
    any_pairs = torch.rand(B, t, s, generator=torch.Generator().manual_seed(t + s)) > 0.5
    any_pairs[:, t // 2] = False
    return {"none": torch.ones(1, 1, s, dtype=torch.bool), "padding": padding(s)[:, None], "pairs": any_pairs}


def inputs(t: int, s: int) -> Tensors:
    shapes = {"q": (B, t, Z), "k": (B, s, Z), "v": (B, s, E), "gate": (B, t, E)}
    return draw(shapes, seed_of("cross", t, s), torch.bfloat16)


def check(t: int, s: int, visible: Tensor, activation: str | None, call: Callable[[Tensors], Tensor]) -> None:
    sees = visible.expand(B, t, s)
    compare(
        {"op": lambda given: [call(given)]},
        lambda given: [oracle.cross(**given, sees=sees, activation=activation)],
        inputs(t, s),
        torch.ones(B, t, dtype=torch.bool),
        DTYPES,
    )


@pytest.mark.parametrize(("t", "s"), SIZES)
@pytest.mark.parametrize("mask", ["none", "padding", "pairs"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quadratic(activation: str, mask: str, t: int, s: int) -> None:
    visible = masks(t, s)[mask]

    def call(given: Tensors) -> Tensor:
        return cross_quadratic(
            given["q"], given["k"], F.silu(given["v"]), gate=given["gate"], visible=visible, activation=activation
        )

    check(t, s, visible, activation, call)


@pytest.mark.parametrize(("t", "s"), SIZES)
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_linear(mask: str, t: int, s: int) -> None:
    real = masks(t, s)[mask][:, 0]

    def call(given: Tensors) -> Tensor:
        kv = sum_over_keys(given["k"], F.silu(given["v"]), real=real)
        return cross_linear(given["q"], gate=given["gate"], kv=kv, count=real.sum(dim=-1))

    check(t, s, real[:, None], None, call)


def test_the_linear_form_holds_nothing_of_the_size_of_all_pairs() -> None:
    t, s = 400, 300
    given = {name: x.float().requires_grad_() for name, x in inputs(t, s).items()}

    def train() -> None:
        kv = sum_over_keys(given["k"], given["v"], real=padding(s))
        cross_linear(given["q"], gate=given["gate"], kv=kv, count=padding(s).sum(dim=-1)).sum().backward()

    assert largest_tensor(train) <= B * t * E < t * s


def test_half_precision_keeps_the_sum_in_float32_under_autocast() -> None:
    given = {name: x.float() for name, x in inputs(5, 9).items()}
    real = padding(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kv = sum_over_keys(given["k"], given["v"], real=real)
        out = cross_linear(given["q"], gate=given["gate"], kv=kv, count=real.sum(dim=-1))
    assert kv.dtype == torch.float32
    assert out.dtype == torch.bfloat16


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    given = {name: x.float() for name, x in inputs(1, 33).items()}
    visible = torch.ones(1, 1, 33, dtype=torch.bool)
    call = dict(q=given["q"], k=given["k"], v=given["v"], gate=given["gate"], visible=visible, activation="softmax")
    dropped = torch.stack([cross_quadratic(**call, dropout=0.5) for _ in range(2000)])
    assert not torch.equal(dropped[0], dropped[1])
    spread = dropped.std(dim=0) / 2000**0.5
    assert ((dropped.mean(dim=0) - cross_quadratic(**call)).abs() <= 5 * spread).all()
