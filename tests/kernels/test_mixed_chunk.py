"""mixed_chunk_attention: values, states and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import LinearState, mixed_chunk_attention, reference_mixed_chunk_attention
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
CHUNKS = (1, 4, 13, 32, 200)
OPS = {
    "reference": partial(mixed_chunk_attention, impl="reference"),
    "formula": reference_mixed_chunk_attention,
}
COUNTS = torch.tensor([5, 1, 117])


def inputs_for(
    b: int,
    s: int,
    z: int,
    e: int,
    c: int,
    *,
    bias: bool = False,
    gate: bool = False,
    state: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """The five tensors and what else is asked for; the two pairs of queries and keys differ in width."""
    shapes: dict[str, tuple[int, ...]] = {
        "q_local": (b, s, z),
        "k_local": (b, s, z),
        "q_global": (b, s, z),
        "k_global": (b, s, z),
        "v": (b, s, e),
    }
    if bias:
        shapes["bias"] = (2 * c - 1,)
    if gate:
        shapes["gate"] = (b, s, e)
    if state:
        shapes["kv"] = (b, z, e)
    return draw(shapes, seed_of(b, s, z, e, c, bias, gate, state), dtype)


def run(op: Any, make_state: Any, tensors: Tensors, **options: Any) -> list[Tensor]:
    """[output] or, where there is a state, [output, state sum]; the count is checked on the way."""
    x = dict(tensors)
    kv = x.pop("kv", None)
    if kv is None:
        return [op(**x, **options)]
    before = make_state(kv, COUNTS[: kv.shape[0]], None)
    out, state = op(**x, **options, initial_state=before, return_state=True)
    assert state.key_sum is None
    assert state.count.dtype == torch.int64
    assert state.kv.dtype == (torch.float64 if x["v"].dtype == torch.float64 else torch.float32)
    return [out, state.kv]


def run_oracle(tensors: Tensors, **options: Any) -> list[Tensor]:
    """The same from the oracle."""
    x = dict(tensors)
    kv = x.pop("kv", None)
    before = None if kv is None else oracle.State(kv, COUNTS[: kv.shape[0]])
    out, state = oracle.mixed_chunk(**x, **options, initial_state=before)
    return [out] if kv is None else [out, state.kv]


def check(
    layout: Layout, inputs: Tensors, dtypes: Any = (torch.float32, torch.float64), ops: Any = OPS, **options: Any
) -> None:
    """All implementations in `ops` against the oracle."""
    b, s, _ = inputs["v"].shape
    segments = segments_of(layout)
    compare(
        {name: lambda x, op=op: run(op, LinearState, x, segments=segments, **options) for name, op in ops.items()},
        lambda x: run_oracle(x, **layout, **options),
        inputs,
        real_tokens(layout, b, s),
        dtypes,
        keep=("kv",),
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layout_has_the_oracle_s_values_and_gradients(activation, normalizer, causal):
    for name in LAYOUTS:
        rng = random.Random(seed_of(activation, normalizer, causal, name))
        alone = activation == "softmax"  # over one key or two it has little gradient but rounding: longer ones only
        s, c = rng.choice(SIZES[1 + alone :]), rng.choice(CHUNKS[alone:])
        z, e = rng.choice([(5, 7), (9, 3)])
        extras = {"bias": rng.random() < 0.5, "gate": rng.random() < 0.6, "state": causal and rng.random() < 0.5}
        options = {"silu": rng.random() < 0.5, "scale": rng.choice([None, 0.3])}
        inputs, layout = inputs_for(3, s, z, e, c, **extras), make_layout(name, 3, s)
        options |= {"activation": activation, "normalizer": normalizer, "causal": causal}
        if activation == "softmax":
            options["softcap"] = rng.choice([None, 0.8])
        check(layout, inputs, chunk_size=c, **options)


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_length_and_chunk_size_with_and_without_bias_and_state(layout, s):
    for number, (c, causal) in enumerate(product(CHUNKS, (True, False))):
        odd = (number // 2) % 2 == 1  # not at c = 1, where the bias is one number and its terms cancel
        inputs = inputs_for(2, s, 5, 3, c, bias=odd, gate=not odd, state=causal)
        check(make_layout(layout, 2, s), inputs, chunk_size=c, causal=causal)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_the_returned_state_is_the_last_document_s_sum_and_count(op, layout):
    for s, c in ((1, 4), (63, 13), (130, 32)):
        inputs, arrangement = inputs_for(3, s, 5, 7, c), make_layout(layout, 3, s)
        segments = segments_of(arrangement)
        _, expected = oracle.mixed_chunk(**inputs, **arrangement, chunk_size=c)
        out, state = op(**inputs, segments=segments, chunk_size=c, return_state=True)
        assert torch.equal(state.count, expected.count)
        assert torch.allclose(state.kv, expected.kv, rtol=1e-10, atol=1e-10)
        assert_close(out, op(**inputs, segments=segments, chunk_size=c), "oracle_fp64")
        kv = torch.ones_like(expected.kv)
        _, state = op(
            **inputs,
            segments=segments,
            chunk_size=c,
            return_state=True,
            initial_state=LinearState(kv, COUNTS, None),
        )
        _, carried = oracle.mixed_chunk(**inputs, **arrangement, chunk_size=c, initial_state=oracle.State(kv, COUNTS))
        assert torch.equal(state.count, carried.count)
        assert torch.allclose(state.kv, carried.kv, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision_stays_near_the_oracle(activation, dtype):
    for causal, layout, normalizer in (
        (True, "packed", "visible"),
        (False, "right", "visible"),
        (True, "one", "chunk"),
    ):
        inputs = inputs_for(2, 130, 17, 33, 32, bias=True, gate=True, state=causal, dtype=dtype)
        options = {"activation": activation, "causal": causal, "normalizer": normalizer}
        check(make_layout(layout, 2, 130), inputs, [dtype], chunk_size=32, silu=causal, **options)


def test_a_scale_that_is_learned_gets_its_gradient():
    # float64 only: a gradient summed into one number cancels
    inputs = inputs_for(2, 63, 5, 3, 13, bias=True, gate=True) | {"scale": torch.tensor(0.375, dtype=torch.float64)}
    for activation, layout in product(ACTIVATIONS, ("one", "packed")):
        check(make_layout(layout, 2, 63), inputs, [torch.float64], activation=activation, chunk_size=13)


def tiny(layout: str, **options: Any) -> tuple[Any, list[Tensor]]:
    """A float64 call of a few numbers, and its inputs, for finite differences."""
    inputs = inputs_for(2, 5, 2, 3, 2, bias=True, gate=True, state=options.get("causal", True))
    names, arrangement = list(inputs), make_layout(layout, 2, 5)
    segments, real = segments_of(arrangement), real_tokens(arrangement, 2, 5)[..., None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(names, tensors, strict=True))
        out, *state = run(OPS["reference"], LinearState, x, chunk_size=2, segments=segments, **options)
        return torch.where(real, out, 0.0), *state

    return call, [x.requires_grad_() for x in inputs.values()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_finite_differences(activation):
    for (layout, causal), normalizer in product(
        (("holes", True), ("begun", True), ("holes", False)), ("visible", "chunk")
    ):
        call, tensors = tiny(layout, activation=activation, causal=causal, normalizer=normalizer, silu=causal)
        assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("activation", ["softplus2", "relu2"])
def test_second_gradients_match_finite_differences(activation, causal):
    call, tensors = tiny("begun", activation=activation, causal=causal)
    assert torch.autograd.gradgradcheck(call, tensors)
