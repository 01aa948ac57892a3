"""States at the edges of blocks: the operator of compiled graphs is the loop of eager ones, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels.recurrence import _operator, states_before
from tests.tolerances import assert_close

KEEP = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]], dtype=torch.float64)[..., None, None]


def draw() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, 3, 4), (2, 5, 3, 4)
    first, added = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return first, added


def compiled(first: Tensor, added: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """The operator, in a graph of any number of blocks."""
    run = torch.compile(states_before, fullgraph=True, dynamic=True, backend="aot_eager")
    states, last = run(first, added, KEEP, lag)
    return states, last


def kept_sum(first: Tensor, added: Tensor, block: int) -> Tensor:
    """The first state and what was added before a block, each term if it has been kept ever since."""
    terms = torch.cat([first[:, None], added], dim=1)
    return sum(terms[:, term] * KEEP[:, term:block].prod(1) for term in range(block + 1))


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_each_block_gets_the_sum_of_what_was_kept(lag: int) -> None:
    first, added = draw()
    states, last = states_before(first, added, KEEP, lag)
    for block in range(5):
        assert_close(states[:, block], kept_sum(first, added, max(block - lag, 0)), "oracle_fp64", f"block {block}")
    assert_close(last, kept_sum(first, added, 5), "oracle_fp64", "last")


@pytest.mark.parametrize("lag", [0, 1])
def test_the_operator_passes_opcheck_and_has_the_gradients_of_the_loop(lag: int) -> None:
    first, added = draw()
    torch.library.opcheck(_operator, (first, added, KEEP, lag))
    turned = [x.mT.detach().requires_grad_() for x in (first, added)]
    torch.library.opcheck(_operator, (*turned, KEEP, lag))
    assert torch.autograd.gradcheck(lambda *x: _operator(*x, KEEP, lag), (first, added))
    found = torch.autograd.grad([x.pow(3).sum() for x in compiled(first, added, lag)], [first, added])
    expected = torch.autograd.grad([x.pow(3).sum() for x in states_before(first, added, KEEP, lag)], [first, added])
    for name, gradient, other in zip(("first", "added"), found, expected, strict=True):
        assert_close(gradient, other, "oracle_fp64", name)
