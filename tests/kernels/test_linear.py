"""linear_attention: values, states and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import LinearState, linear_attention, make_segments, reference_linear_attention
from tests import oracle
from tests.kernels.cases import (
    LAYOUTS,
    Layout,
    Tensors,
    compare,
    draw,
    largest_tensor,
    make_layout,
    packed_positions,
    real_tokens,
    seed_of,
    segments_of,
)
from tests.tolerances import assert_close

SIZES = (1, 7, 63, 130)
WIDTHS = ((3, 11), (11, 3), (33, 8), (1, 1))
OPS = {"reference": partial(linear_attention, impl="reference"), "formula": reference_linear_attention}
COUNTS = torch.tensor([5, 1, 117])


def inputs_for(
    b: int, h: int, s: int, z: int, e: int, *, state: bool = False, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Positive q, k (a denominator must not vanish), v, and a state if asked for."""
    shapes: dict[str, tuple[int, ...]] = {"q": (b, h, s, z), "k": (b, h, s, z), "v": (b, h, s, e)}
    if state:
        shapes |= {"kv": (b, h, z, e), "key_sum": (b, h, z)}
    drawn = draw(shapes, seed_of(b, h, s, z, e, state), dtype)
    return {n: x if n in ("v", "kv") else (x.abs() + 0.125).to(dtype).double() for n, x in drawn.items()}


def run(op: Any, make_state: Any, tensors: Tensors, **options: Any) -> list[Tensor]:
    """Output, state sum and sum of keys."""
    x = dict(tensors)
    kv, key_sum = x.pop("kv", None), x.pop("key_sum", None)
    before = None if kv is None else make_state(kv, COUNTS[: kv.shape[0]], key_sum)
    if not options.get("causal", True):
        return [op(**x, **options)]
    out, state = op(**x, **options, initial_state=before, return_state=True)
    assert state.count.dtype == torch.int64
    assert state.kv.dtype == (torch.float64 if x["v"].dtype == torch.float64 else torch.float32)
    return [out, state.kv, state.key_sum]


def run_oracle(tensors: Tensors, **options: Any) -> list[Tensor]:
    """The same from the oracle."""
    x = dict(tensors)
    kv, key_sum = x.pop("kv", None), x.pop("key_sum", None)
    before = None if kv is None else oracle.State(kv, COUNTS[: kv.shape[0]], key_sum)
    out, state = oracle.linear(**x, **options, initial_state=before)
    assert state.key_sum is not None
    return [out, state.kv, state.key_sum] if options.get("causal", True) else [out]


def check(
    layout: Layout, inputs: Tensors, dtypes: Any = (torch.float32, torch.float64), ops: Any = OPS, **options: Any
) -> None:
    """All implementations in `ops` against the oracle."""
    b, _, s, _ = inputs["v"].shape
    segments = segments_of(layout)
    compare(
        {name: lambda x, op=op: run(op, LinearState, x, segments=segments, **options) for name, op in ops.items()},
        lambda x: run_oracle(x, **layout, **options),
        inputs,
        real_tokens(layout, b, s),
        dtypes,
        keep=("kv", "key_sum"),
    )


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_length_and_width_has_the_oracle_s_values_and_gradients(layout, s):
    for number, (causal, normalize) in enumerate(product((True, False), (True, False))):
        for state in (False, True) if causal else (False,):
            z, e = WIDTHS[(number + state + len(layout)) % 3]
            inputs = inputs_for(3, 2, s, z, e, state=state)
            # a lone key's weight is normalised away: with a small eps the gradient of q would be rounding alone
            options = {"scale": (1.0, 0.37)[number % 2], "eps": 10.0 if s == 1 else (1e-6, 0.5)[number // 2]}
            check(make_layout(layout, 3, s), inputs, causal=causal, normalize=normalize, **options)


@pytest.mark.parametrize("z, e", WIDTHS)
def test_either_width_may_be_the_larger(z, e):
    for causal, normalize in product((True, False), (True, False)):
        inputs, eps = inputs_for(1, 3, 130, z, e), 0.5 if z == 1 else 1e-6  # q of one number is normalised away
        check(make_layout("packed", 1, 130), inputs, causal=causal, normalize=normalize, eps=eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_the_returned_state_counts_the_last_document_s_tokens(op, layout):
    for s in SIZES:
        inputs, arrangement = inputs_for(3, 2, s, 3, 5), make_layout(layout, 3, s)
        segments = segments_of(arrangement)
        _, expected = oracle.linear(**inputs, **arrangement)
        out, state = op(**inputs, segments=segments, return_state=True)
        assert torch.equal(state.count, expected.count)
        assert_close(out, op(**inputs, segments=segments), "oracle_fp64")
        before = [torch.ones_like(state.kv), COUNTS, torch.ones_like(state.key_sum)]
        _, state = op(**inputs, segments=segments, return_state=True, initial_state=LinearState(*before))
        _, expected = oracle.linear(**inputs, **arrangement, initial_state=oracle.State(*before))
        assert torch.equal(state.count, expected.count)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
@pytest.mark.parametrize("normalize", [False, True])
def test_going_on_from_the_state_equals_one_call_wherever_it_is_cut(op, normalize):
    inputs = inputs_for(2, 2, 75, 5, 7)
    whole, last = op(**inputs, normalize=normalize, return_state=True)
    outs, state, start = [], None, 0
    for stop in (1, 2, 30, 63, 74, 75):
        part = {n: x[:, :, start:stop] for n, x in inputs.items()}
        out, state = op(**part, normalize=normalize, initial_state=state, return_state=True)
        outs.append(out)
        start = stop
    assert_close(torch.cat(outs, dim=2), whole, "law_fp64")
    for name in ("kv", "key_sum", "count"):
        assert_close(getattr(state, name), getattr(last, name), "law_fp64", name)
    # packed: a cut inside a document, positions go on
    pos = torch.tensor([[*range(40), *range(35)]]).expand(2, -1)
    whole = op(**inputs, normalize=normalize, segments=make_segments(pos))
    for cut in (17, 51):
        left, right = ({n: x[:, :, w] for n, x in inputs.items()} for w in (slice(cut), slice(cut, None)))
        first, state = op(**left, normalize=normalize, segments=make_segments(pos[:, :cut]), return_state=True)
        segments = make_segments(pos[:, cut:])
        second = op(**right, normalize=normalize, segments=segments, initial_state=state)
        assert_close(torch.cat([first, second], dim=2), whole, "law_fp64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision_stays_near_the_oracle(normalize, dtype):
    for causal, layout in ((True, "packed"), (True, "one"), (False, "right")):
        inputs = inputs_for(2, 2, 130, 17, 33, state=causal, dtype=dtype)
        check(make_layout(layout, 2, 130), inputs, [dtype], causal=causal, normalize=normalize, scale=0.125)


def tiny(layout: str, **options: Any) -> tuple[Any, list[Tensor]]:
    """A float64 call of a few numbers, and its inputs, for finite differences."""
    inputs = inputs_for(2, 1, 5, 2, 3, state=options.get("causal", True))
    names, arrangement = list(inputs), make_layout(layout, 2, 5)
    segments, real = segments_of(arrangement), real_tokens(arrangement, 2, 5)[:, None, :, None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(names, tensors, strict=True))
        out, *state = run(OPS["reference"], LinearState, x, segments=segments, **options)
        return torch.where(real, out, 0.0), *state

    return call, [x.requires_grad_() for x in inputs.values()]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("normalize", [False, True])
def test_first_and_second_gradients_match_finite_differences(causal, normalize):
    for layout in ("holes", "begun"):
        call, tensors = tiny(layout, causal=causal, normalize=normalize)
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_strides_do_not_matter(op):
    b, h, s, z, e = 2, 3, 63, 5, 7
    fused = draw({"x": (b, s, h * (2 * z + e))}, 1)["x"].float().unflatten(-1, (h, -1)).transpose(1, 2)
    q, k, v = fused.split([z, z, e], dim=-1)
    wide = draw({"x": (b, h, 2 * s, 2 * e)}, 2)["x"].float()[:, :, ::2, 1::2]
    assert not any(x.is_contiguous() for x in (q, k, v, wide))
    for values, causal in product((v, wide), (True, False)):
        plain = op(*(x.contiguous() for x in (q, k, values)), causal=causal)
        assert_close(op(q, k, values, causal=causal), plain, "pair_fp32")
    shared = draw({"x": (1, 1, s, z)}, 4)["x"].float().requires_grad_()  # keys shared by all heads
    op(q, shared.expand(b, h, s, z), v).sum().backward()
    copied = shared.detach().repeat(b, h, 1, 1).requires_grad_()
    op(q, copied, v).sum().backward()
    assert shared.grad is not None and copied.grad is not None
    assert_close(shared.grad, copied.grad.sum((0, 1), keepdim=True), "pair_fp32")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
def test_long_packs_agree_with_the_plain_formula(causal):
    s = 4099
    inputs = {n: x.float() for n, x in inputs_for(1, 1, s, 16, 24).items()}
    pos = torch.tensor([packed_positions(s, random.Random(7), 1500, first=100)])
    for normalize, segments in ((True, make_segments(pos)), (False, None)):
        options: dict[str, Any] = {"segments": segments, "normalize": normalize, "causal": causal}
        fast = linear_attention(**inputs, **options, impl="reference")
        assert_close(fast, reference_linear_attention(**inputs, **options), "pair_fp32")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
def test_no_tensor_grows_with_the_square_of_the_length(packed, causal):
    s, z, e = 16384, 8, 16
    inputs = {n: x.float().requires_grad_() for n, x in inputs_for(1, 1, s, z, e).items()}
    pos = torch.tensor([packed_positions(s, random.Random(3), 700)])

    def step() -> None:
        segments = make_segments(pos) if packed else None
        linear_attention(**inputs, segments=segments, causal=causal, impl="reference").sum().backward()

    assert largest_tensor(step) <= 512 * s, "a tensor is larger than a few blocks' scores"


def test_auto_gives_what_the_reference_gives_on_the_cpu_and_leaves_the_inputs_alone():
    inputs = {n: x.float() for n, x in inputs_for(2, 2, 63, 5, 3).items()}
    before = {n: x.clone() for n, x in inputs.items()}
    assert torch.equal(linear_attention(**inputs), linear_attention(**inputs, impl="reference"))
    assert all(torch.equal(inputs[n], before[n]) for n in inputs)
