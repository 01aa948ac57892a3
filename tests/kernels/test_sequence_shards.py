"""Sequence parallelism, simulated: ranks that hold a stretch of the sequence each exchange states, and nothing else.

Forward, each rank sums its keys and values from an empty state; an exclusive prefix sum of these states over the ranks
gives each its initial state. Backward, an exclusive suffix sum of the initial states' gradients gives each the gradient
of its own state. Every rank here has an autograd graph of its own: whatever crosses is handed over by `prefix_sums` and
`suffix_sums`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import LinearState, Segments, linear_attention, make_segments, mixed_chunk_attention
from tests.kernels.cases import Tensors, leaves
from tests.kernels.test_linear import inputs_for as linear_inputs
from tests.kernels.test_mixed_chunk import inputs_for as mixed_inputs
from tests.tolerances import assert_close

BATCH, LENGTH, CHUNK = 3, 96, 8
CUTS = ([48], [24, 48, 64], [8, 16, 40, 80, 88])
ONE = torch.arange(LENGTH).expand(BATCH, -1)
# Documents that begin before the first rank, on a border, and inside of ranks, several in one rank and one over all.
PACKED = torch.tensor(
    [
        [*range(96)],
        [*range(16, 56), *range(5), *range(3), *range(48)],
        [*range(56), *range(40)],
    ]
)
STATE = ("kv", "key_sum")


class Rank(NamedTuple):
    """The inputs of a rank, where documents lie in its stretch, and what it knows of them: bools ``[b]``."""

    inputs: Tensors
    segments: Segments
    goes_on: Tensor  # its first document began at an earlier rank
    is_crossed: Tensor  # its first document is also its last


class State(NamedTuple):
    """Tensors of a state by name, and its tokens ``[b]``."""

    sums: Tensors
    count: Tensor


def deal(inputs: Tensors, pos: Tensor, cuts: list[int], axis: int) -> list[Rank]:
    """Give each rank its stretch of what has tokens along ``axis``, and a copy of the rest."""
    ranks = []
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        own = {n: x.narrow(axis, start, stop - start) if x.dim() > 1 else x for n, x in inputs.items()}
        segments = make_segments(pos[:, start:stop])
        goes_on = torch.zeros(BATCH, dtype=torch.bool)
        if start:
            goes_on = (pos[:, start] != 0) & (pos[:, start] == pos[:, start - 1] + 1)
        ranks.append(Rank(leaves(own, torch.float64), segments, goes_on, segments.start[:, -1] == 0))
    return ranks


def masked(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor [b, ...]`` with zeros in all other rows."""
    return tensor * rows.view(-1, *[1] * (tensor.dim() - 1))


def prefix_sums(ranks: list[Rank], own: list[State]) -> list[State]:
    """What lies before each rank, of the document that goes on in it; and behind the last."""
    here = State({n: torch.zeros_like(x) for n, x in own[0].sums.items()}, torch.zeros_like(own[0].count))
    found = []
    for rank, state in zip(ranks, own, strict=True):
        here = State({n: masked(x, rank.goes_on) for n, x in here.sums.items()}, masked(here.count, rank.goes_on))
        found.append(here)
        sums = {n: x.detach() + masked(here.sums[n], rank.is_crossed) for n, x in state.sums.items()}
        here = State(sums, state.count + masked(here.count, rank.is_crossed))
    return [*found, here]


def suffix_sums(ranks: list[Rank], initial: list[Tensors], last: Tensors) -> list[Tensors]:
    """Gradients of what each rank adds to the state, from those of initial states and of the state behind the last."""
    here, found = last, []
    for rank, gradients in reversed(list(zip(ranks, initial, strict=True))):
        found.append(here)
        here = {n: masked(x + masked(here[n], rank.is_crossed), rank.goes_on) for n, x in gradients.items()}
    return found[::-1]


def sums_of(state: LinearState) -> Tensors:
    return {n: x for n in STATE if (x := getattr(state, n)) is not None}


def weights_of(tensors: Tensors) -> Tensors:
    """A fixed random functional."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(x.shape, generator=generator, dtype=torch.float64) for n, x in tensors.items()}


def check(op: Callable[..., Any], inputs: Tensors, pos: Tensor, cuts: list[int], axis: int) -> None:
    """Outputs, last state and all gradients of the ranks together are those of one call."""
    whole = leaves(inputs, torch.float64)
    out, last = op(**whole, segments=make_segments(pos), return_state=True)
    expected = {"out": out, **sums_of(last)}
    weights = weights_of(expected)
    gradients = torch.autograd.grad([expected[n] for n in weights], list(whole.values()), list(weights.values()))

    ranks = deal(inputs, pos, cuts, axis)
    ends = [op(**rank.inputs, segments=rank.segments, return_state=True)[1] for rank in ranks]
    own = [State(sums_of(end), end.count) for end in ends]
    *before, behind = prefix_sums(ranks, own)
    shares = weights["out"].tensor_split(cuts, axis)
    outs, initial = [], []
    for rank, state, share in zip(ranks, before, shares, strict=True):
        sums = {n: x.clone().requires_grad_() for n, x in state.sums.items()}
        outs.append(op(**rank.inputs, segments=rank.segments, initial_state=LinearState(**sums, count=state.count)))
        # A sum of keys that nothing is divided by has no gradient.
        used = torch.autograd.grad(outs[-1], list(sums.values()), share, retain_graph=True, allow_unused=True)
        initial.append({n: torch.zeros_like(sums[n]) if g is None else g for n, g in zip(sums, used, strict=True)})

    assert_close(torch.cat(outs, dim=axis), out, "oracle_fp64", "out")
    assert torch.equal(behind.count, last.count)
    for name, tensor in behind.sums.items():
        assert_close(tensor, expected[name], "oracle_fp64", name)

    found = []
    passed = suffix_sums(ranks, initial, {n: weights[n] for n in behind.sums})
    for rank, state, mine, share, ahead in zip(ranks, own, outs, shares, passed, strict=True):
        results, given = [mine, *state.sums.values()], [share, *ahead.values()]
        found.append(torch.autograd.grad(results, list(rank.inputs.values()), given))
    for (name, tensor), parts, gradient in zip(inputs.items(), zip(*found, strict=True), gradients, strict=True):
        joined = torch.cat(parts, dim=axis) if tensor.dim() > 1 else torch.stack(parts).sum(dim=0)
        assert_close(joined, gradient, "oracle_fp64", f"gradient of {name}")


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("pos", [ONE, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("normalizer", ["visible", "chunk"])
def test_ranks_that_exchange_states_mix_chunks_as_one_does(normalizer: str, pos: Tensor, cuts: list[int]) -> None:
    inputs = mixed_inputs(BATCH, LENGTH, 5, 7, CHUNK, bias=True, gate=True)
    op = partial(mixed_chunk_attention, chunk_size=CHUNK, normalizer=normalizer, silu=True)
    check(op, inputs, pos, cuts, axis=1)


@pytest.mark.parametrize("cuts", [*CUTS, [1, 17, 50]], ids=str)
@pytest.mark.parametrize("pos", [ONE, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("normalize", [False, True])
def test_ranks_that_exchange_states_attend_linearly_as_one_does(normalize: bool, pos: Tensor, cuts: list[int]) -> None:
    check(partial(linear_attention, normalize=normalize), linear_inputs(BATCH, 2, LENGTH, 5, 7), pos, cuts, axis=2)


def test_a_border_inside_a_chunk_loses_what_the_chunk_has_before_it() -> None:
    inputs = mixed_inputs(BATCH, LENGTH, 5, 7, CHUNK)
    with pytest.raises(AssertionError, match="out"):
        check(partial(mixed_chunk_attention, chunk_size=CHUNK), inputs, ONE, [CHUNK + 1], axis=1)
