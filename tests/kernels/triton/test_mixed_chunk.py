"""mixed_chunk_attention with impl="triton": values, states and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from flash_plugin.kernels import mixed_chunk_attention
from tests.kernels.cases import LAYOUTS, largest_tensor, make_layout, seed_of, segments_of
from tests.kernels.test_mixed_chunk import check, inputs_for

OPS = {"triton": partial(mixed_chunk_attention, impl="triton")}
ACTIVATIONS = ("relu2", "laplace", "softplus2")
# A tile of float32 is 64 tokens, one of half precision 128: chunks of one tile, of several, of none in particular.
CHUNKS = (16, 64, 100, 128, 200)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_oracle_s_values_and_gradients(layout, causal):
    rng = random.Random(seed_of(layout, causal))
    for activation in ACTIVATIONS:
        s, c = rng.choice((63, 130, 150)), rng.choice(CHUNKS)
        z, e = rng.choice([(16, 48), (40, 16)])
        extras = {"bias": rng.random() < 0.5, "gate": rng.random() < 0.6, "state": causal and rng.random() < 0.5}
        options = {"silu": rng.random() < 0.5, "scale": rng.choice([None, 0.3])}
        options |= {"normalizer": rng.choice(("visible", "paper", "chunk")), "activation": activation, "causal": causal}
        check(
            make_layout(layout, 2, s),
            inputs_for(2, s, z, e, c, **extras),
            [torch.float32],
            OPS,
            chunk_size=c,
            **options,
        )


@pytest.mark.parametrize("s", [1, 64, 65, 200])
@pytest.mark.parametrize("c", CHUNKS)
def test_every_length_and_chunk_size(s, c):
    for layout, causal in (("one", True), ("packed", True), ("one", False)):
        inputs = inputs_for(1, s, 16, 32, c, bias=c > 64, gate=True, state=causal)
        check(make_layout(layout, 1, s), inputs, [torch.float32], OPS, chunk_size=c, causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("normalizer", ["visible", "paper", "chunk"])
def test_half_precision_stays_near_the_oracle(normalizer, dtype):
    for causal, layout, c in ((True, "one", 128), (True, "packed", 64), (False, "right", 100)):
        inputs = inputs_for(1, 300, 32, 80, c, bias=True, gate=True, state=causal, dtype=dtype)
        options = {"causal": causal, "normalizer": normalizer, "silu": causal}
        check(make_layout(layout, 1, 300), inputs, [dtype], OPS, chunk_size=c, **options)


@pytest.mark.parametrize("z", [16, 96, 256])
@pytest.mark.parametrize("e", [16, 272])
def test_widths_of_several_blocks_and_of_parts_of_one(z, e):
    for layout in ("one", "packed"):
        inputs = inputs_for(1, 150, z, e, 64, bias=True, gate=True, state=True)
        check(make_layout(layout, 1, 150), inputs, [torch.float32], OPS, chunk_size=64)


def test_strides_do_not_matter():
    inputs = inputs_for(2, 130, 16, 32, 64, gate=True, bias=True)
    expected = mixed_chunk_attention(**{n: x.float() for n, x in inputs.items()}, chunk_size=64, impl="triton")
    strided = {n: x.float()[..., None].expand(*x.shape, 2).contiguous()[..., 0] for n, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    assert torch.equal(mixed_chunk_attention(**strided, chunk_size=64, impl="triton"), expected)


def test_the_same_call_gives_the_same_bits():
    inputs = inputs_for(1, 257, 16, 32, 64, bias=True, gate=True, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        x = {n: t.to(torch.bfloat16).requires_grad_() for n, t in inputs.items()}
        out = mixed_chunk_attention(**x, chunk_size=64, impl="triton")
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), list(x.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("layout", ["one", "packed"])
def test_memory_grows_with_the_sequence_alone(layout):
    sizes = {}
    for s in (512, 1024):
        x = {n: t.float().requires_grad_() for n, t in inputs_for(1, s, 16, 16, 64, gate=True).items()}
        segments = segments_of(make_layout(layout, 1, s))

        def step(x=x, segments=segments):
            out = mixed_chunk_attention(**x, chunk_size=64, segments=segments, impl="triton")
            out.sum().backward()

        sizes[s] = largest_tensor(step)
    assert sizes[1024] <= 2 * sizes[512]
    assert sizes[1024] < 1024 * 1024 / 4


def test_more_rows_than_a_grid_has_are_refused():
    q, v = torch.empty(65536, 1, 16, device="meta"), torch.empty(65536, 1, 16, device="meta")
    with pytest.raises(ValueError, match=r"with batch times heads = 65536 \(at most 65535\)"):
        mixed_chunk_attention(q, q, q, q, v, chunk_size=16, impl="triton")
