"""mixed_chunk_attention: continuing from a state, strides, dropout, long sequences and memory."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import make_segments, mixed_chunk_attention, reference_mixed_chunk_attention
from tests.kernels.cases import ACTIVATIONS, NORMALIZERS, Tensors, draw, largest_tensor, packed_positions
from tests.kernels.test_mixed_chunk import OPS, inputs_for
from tests.tolerances import assert_close

PER_TOKEN = ("q_local", "k_local", "q_global", "k_global", "v", "gate")


def cut(inputs: Tensors, start: int, stop: int) -> Tensors:
    """The tokens from start to stop; the bias stays."""
    return {n: x[:, start:stop] if n in PER_TOKEN else x for n, x in inputs.items()}


def in_pieces(op: Any, inputs: Tensors, pos: Tensor | None, pieces: list[int], **options: Any) -> tuple[Tensor, Any]:
    """The outputs of successive calls that hand the state on, and the last state."""
    outs, state, start = [], None, 0
    for stop in [*pieces, inputs["v"].shape[1]]:
        segments = None if pos is None else make_segments(pos[:, start:stop])
        part = cut(inputs, start, stop)
        out, state = op(**part, segments=segments, initial_state=state, return_state=True, **options)
        outs.append(out)
        start = stop
    return torch.cat(outs, dim=1), state


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("normalizer", ["visible", "chunk"])
def test_going_on_from_the_state_equals_one_call_at_chunk_boundaries(op, normalizer):
    inputs = inputs_for(2, 101, 5, 7, 8, bias=True, gate=True)
    options = {"chunk_size": 8, "normalizer": normalizer}
    for activation in ACTIVATIONS:
        whole, last = op(**inputs, activation=activation, return_state=True, **options)
        pieces, state = in_pieces(op, inputs, None, [8, 16, 64, 96], activation=activation, **options)
        assert_close(pieces, whole, "law_fp64")
        assert_close(state.kv, last.kv, "law_fp64")
        assert torch.equal(state.count, last.count) and state.count.tolist() == [101, 101]
    # a pack: positions 30.., then a document that begins in the middle of the first piece
    pos = torch.tensor([[*range(30, 50), *range(81)]]).expand(2, -1)
    whole, last = op(**inputs, segments=make_segments(pos), return_state=True, **options)
    pieces, state = in_pieces(op, inputs, pos, [10, 36, 92], **options)
    assert_close(pieces, whole, "law_fp64")
    assert_close(state.kv, last.kv, "law_fp64")
    assert state.count.tolist() == [81, 81]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_gradients_flow_back_through_the_state(op):
    inputs = {n: x.requires_grad_() for n, x in inputs_for(2, 40, 5, 7, 8, bias=True, gate=True).items()}
    weight = torch.randn(2, 40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.autograd.grad((op(**inputs, chunk_size=8) * weight).sum(), list(inputs.values()))
    out, _ = in_pieces(op, inputs, None, [8, 24], chunk_size=8)
    pieces = torch.autograd.grad((out * weight).sum(), list(inputs.values()))
    for name, x, y in zip(inputs, pieces, whole, strict=True):
        assert_close(x, y, "oracle_fp64", name)


def test_a_state_of_no_tokens_changes_nothing():
    inputs = inputs_for(2, 30, 5, 7, 8)
    _, empty = mixed_chunk_attention(**inputs, chunk_size=8, return_state=True)
    empty = type(empty)(torch.zeros_like(empty.kv), torch.zeros_like(empty.count), None)
    for op in OPS.values():
        assert_close(op(**inputs, chunk_size=8, initial_state=empty), op(**inputs, chunk_size=8), "oracle_fp64")


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_strides_do_not_matter(op):
    b, s, z, e, c = 2, 63, 5, 7, 16
    fused = draw({"x": (b, s, 4 * z + e)}, 1)["x"].float()
    parts = fused.split([z, z, z, z, e], dim=-1)
    gate = draw({"x": (s, b, 2 * e)}, 2)["x"].float().transpose(0, 1)[..., ::2]
    bias = draw({"x": (4 * c - 2,)}, 3)["x"].float()[::2]
    plain = op(*(x.contiguous() for x in parts), chunk_size=c, gate=gate.contiguous(), bias=bias.contiguous())
    assert_close(op(*parts, chunk_size=c, gate=gate, bias=bias), plain, "pair_fp32")
    shared = draw({"x": (1, s, z)}, 4)["x"].float().requires_grad_()
    one = shared.expand(b, s, z)
    op(one, one, one, one, parts[-1], chunk_size=c).sum().backward()
    copied = shared.detach().repeat(b, 1, 1).requires_grad_()
    op(copied, copied, copied, copied, parts[-1], chunk_size=c).sum().backward()
    assert shared.grad is not None and copied.grad is not None
    assert_close(shared.grad, copied.grad.sum(0, keepdim=True), "pair_fp32")


def test_a_tensor_that_wants_no_gradient_gets_none_and_the_others_theirs():
    inputs = {n: x.float() for n, x in inputs_for(2, 30, 5, 3, 8, bias=True, gate=True).items()}
    for wanted in inputs:
        mine = {n: x.clone().requires_grad_(n == wanted) for n, x in inputs.items()}
        mixed_chunk_attention(**mine, chunk_size=8, impl="reference").sum().backward()
        assert all((x.grad is not None) == (n == wanted) for n, x in mine.items())


def test_inputs_are_left_as_they_were():
    inputs = {n: x.float() for n, x in inputs_for(2, 30, 5, 3, 8, bias=True, gate=True).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    for op in OPS.values():
        op(**inputs, chunk_size=8, silu=True, dropout=0.1)
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_dropout_keeps_the_mean_repeats_under_a_seed_and_does_nothing_at_zero(op):
    inputs = {n: x.float() for n, x in inputs_for(2, 23, 4, 3, 6).items()}
    call = partial(op, **inputs, chunk_size=6)
    assert torch.equal(call(dropout=0.0), call())
    torch.manual_seed(0)
    first, second = call(dropout=0.3), call(dropout=0.3)
    torch.manual_seed(0)
    assert torch.equal(call(dropout=0.3), first)
    assert not torch.equal(first, second)
    many = torch.stack([call(dropout=0.3) for _ in range(600)])
    sigmas = (many.mean(0) - call()) / (many.std(0) / 600**0.5 + 1e-6)
    assert sigmas.abs().max() < 4.5, "the mean moved"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_dropout_is_the_same_in_backward_as_in_forward(op):
    inputs = inputs_for(2, 63, 4, 3, 16)
    v = inputs.pop("v").requires_grad_()
    out = op(**inputs, v=v, chunk_size=16, dropout=0.4)
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), v)
    assert torch.allclose((gradient * v).sum(), (out * weight).sum(), rtol=1e-10)  # the output is linear in v


def test_auto_gives_what_the_reference_gives_on_the_cpu():
    inputs = {n: x.float() for n, x in inputs_for(2, 63, 5, 3, 8, bias=True, gate=True).items()}
    auto = mixed_chunk_attention(**inputs, chunk_size=8)
    assert torch.equal(auto, mixed_chunk_attention(**inputs, chunk_size=8, impl="reference"))


def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_other_rows_alone():
    inputs = {n: x.float().requires_grad_() for n, x in inputs_for(2, 9, 5, 3, 4, bias=True, gate=True).items()}
    segments = make_segments(padding_mask=torch.tensor([[False] * 9, [True] * 9]))
    alone = {n: x if n == "bias" else x[1:] for n, x in inputs.items()}
    for activation, causal, op in product(ACTIVATIONS, (True, False), OPS.values()):
        options: dict[str, Any] = {"chunk_size": 4, "activation": activation, "causal": causal}
        out = op(**inputs, segments=segments, **options)
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out[1].sum(), list(inputs.values())))
        assert_close(out[1:], op(**alone, **options), "pair_fp32")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_long_packs_agree_with_the_plain_formula(causal):
    s, c = 5000, 256
    inputs = {n: x.float() for n, x in inputs_for(1, s, 16, 24, c, bias=True, gate=True).items()}
    pos = torch.tensor([packed_positions(s, random.Random(7), 1500, first=100)])
    for activation, normalizer in zip(("relu2", "laplace", "softmax"), NORMALIZERS, strict=True):
        options: dict[str, Any] = {
            "chunk_size": c,
            "causal": causal,
            "activation": activation,
            "normalizer": normalizer,
        }
        fast = mixed_chunk_attention(**inputs, segments=make_segments(pos), impl="reference", **options)
        slow = reference_mixed_chunk_attention(**inputs, segments=make_segments(pos), **options)
        assert_close(fast, slow, "pair_fp32")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_no_tensor_grows_with_the_square_of_the_length(packed, causal):
    s, c, z, e = 16384, 128, 8, 16
    inputs = {n: x.float().requires_grad_() for n, x in inputs_for(1, s, z, e, c, bias=True, gate=True).items()}
    pos = torch.tensor([packed_positions(s, random.Random(3), 700)])

    def step() -> None:
        segments = make_segments(pos) if packed else None
        out = mixed_chunk_attention(**inputs, segments=segments, chunk_size=c, causal=causal, impl="reference")
        out.sum().backward()

    assert largest_tensor(step) <= 3 * s * c, "a tensor is larger than a few chunks' scores"
