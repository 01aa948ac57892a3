"""linear_attention with impl="triton": values, states and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from flash_plugin.kernels import linear_attention, make_segments
from flash_plugin.kernels.triton import launch
from flash_plugin.kernels.triton.linear import linear, linear_backward, padded_width
from tests.kernels.cases import LAYOUTS, Tensors, draw, largest_tensor, make_layout, seed_of, segments_of
from tests.kernels.test_linear import check, inputs_for
from tests.tolerances import assert_close

OPS = {"triton": partial(linear_attention, impl="triton")}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
QUOTIENT = pytest.mark.parametrize("normalize", [False, True], ids=["sum", "quotient"])


def floats(inputs: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


@CAUSAL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_oracle_s_values_and_gradients(layout, causal):
    rng = random.Random(seed_of(layout, causal))
    s, (z, e) = rng.choice((129, 150)), rng.choice([(16, 48), (40, 16), (5, 7)])
    inputs = inputs_for(2, 1, s, z, e, state=causal and rng.random() < 0.7)
    # each layout once as a sum and once as a quotient
    options = {"causal": causal, "normalize": causal == LAYOUTS.index(layout) % 2, "scale": rng.choice([1.0, 0.37])}
    check(make_layout(layout, 2, s), inputs, [torch.float32], OPS, **options, eps=0.01)


@pytest.mark.parametrize("s", [1, 63, 64, 257])
def test_every_length_of_one_document(s):
    for causal, normalize in ((True, True), (True, False), (False, True)):
        inputs = inputs_for(1, 1, s, 16, 8, state=causal)
        # a lone key's weight is normalised away: with a small eps the gradient of q would be rounding alone
        eps = 10.0 if s == 1 else 1e-6
        check(make_layout("one", 1, s), inputs, [torch.float32], OPS, causal=causal, normalize=normalize, eps=eps)


@HALF
@QUOTIENT
@CAUSAL
def test_half_precision_stays_near_the_oracle(causal, normalize, dtype):
    # A state before a short first document would get gradients of a few terms that happen to cancel.
    for layout, state in (("one", causal), ("packed", False)):
        inputs = inputs_for(1, 1, 260, 17, 33, state=state, dtype=dtype)
        options = {"causal": causal, "normalize": normalize, "scale": 0.125}
        check(make_layout(layout, 1, 260), inputs, [dtype], OPS, **options)


@HALF
@CAUSAL
def test_a_quotient_of_values_far_from_zero_keeps_its_gradients(causal, dtype):
    # The gradient of q is what is left of two sums that are up to a hundred times as large.
    inputs = inputs_for(1, 1, 400, 24, 16, dtype=dtype)
    inputs["v"] = (inputs["v"] + 4.0).to(dtype).double()
    check(make_layout("begun", 1, 400), inputs, [dtype], OPS, causal=causal, normalize=True)


def test_float16_holds_the_sum_of_any_number_of_keys():
    s = 400
    q, k = torch.full((1, 1, s, 16), 2.0**-10), torch.full((1, 1, s, 16), 1000.0)
    v = draw({"v": (1, 1, s, 16)}, 0, torch.float16)["v"]
    assert s * 1000 > torch.finfo(torch.float16).max
    for causal in (True, False):
        out = linear_attention(q.half(), k.half(), v.half(), normalize=True, causal=causal, impl="triton")
        mean = v.cumsum(2) / torch.arange(1, s + 1)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
        assert_close(out, mean, "oracle_fp16")


# Blocks of one tile and of several; widths of parts of a block and of several blocks.
@pytest.mark.parametrize(
    "layout, s, z, e, causal, normalize",
    [
        ("begun", 260, 96, 130, True, False),
        ("packed", 257, 100, 65, False, True),
        ("one", 130, 300, 24, True, True),
        ("packed", 66, 300, 24, False, False),
        ("one", 70, 1024, 20, True, False),
        ("one", 70, 16, 272, True, True),
        ("right", 70, 1, 1, False, True),
    ],
)
def test_either_width_may_be_the_larger(layout, s, z, e, causal, normalize):
    inputs = inputs_for(1, 1, s, z, e, state=causal)
    eps = 10.0 if z == 1 else 1e-6  # a query of one number is normalised away
    check(make_layout(layout, 1, s), inputs, [torch.float32], OPS, causal=causal, normalize=normalize, eps=eps)


@QUOTIENT
def test_going_on_from_the_state_equals_one_call_wherever_it_is_cut(normalize):
    inputs = {n: x.float() for n, x in inputs_for(2, 2, 140, 5, 7).items()}
    pos = torch.tensor([[*range(9, 90), *range(59)]]).expand(2, -1)
    call = partial(linear_attention, normalize=normalize, return_state=True)
    whole, last = call(**inputs, segments=make_segments(pos), impl="reference")
    outs, state, start = [], None, 0
    for stop in (1, 64, 100, 140):
        part = {n: x[:, :, start:stop] for n, x in inputs.items()}
        segments = make_segments(pos[:, start:stop])
        out, state = call(**part, segments=segments, initial_state=state, impl="triton")
        outs.append(out)
        start = stop
    assert_close(torch.cat(outs, dim=2), whole, "pair_fp32")
    assert torch.equal(state.count, last.count)
    assert_close(state.kv, last.kv, "pair_fp32")
    assert_close(state.key_sum, last.key_sum, "pair_fp32")


def test_heads_and_strides_do_not_matter():
    b, h, s, z, e = 2, 3, 70, 5, 7
    fused = draw({"x": (b, s, h * (2 * z + e))}, 1)["x"].float().unflatten(-1, (h, -1)).transpose(1, 2)
    q, k, v = fused.split([z, z, e], dim=-1)
    assert not any(x.is_contiguous() for x in (q, k, v))
    for layout in ("one", "left"):
        segments = segments_of(make_layout(layout, b, s))
        plain = linear_attention(q, k, v, segments=segments, impl="reference")
        assert_close(linear_attention(q, k, v, segments=segments, impl="triton"), plain, "pair_fp32")
    shared = draw({"x": (1, 1, s, z)}, 4)["x"].float().requires_grad_()  # keys shared by all heads
    gradients = []
    for impl in ("triton", "reference"):
        out, state = linear_attention(q, shared.expand(b, h, s, z), v, return_state=True, impl=impl)
        # a sum's gradient is one number, expanded
        gradients += torch.autograd.grad(out.sum() + state.kv.sum(), [shared])
    assert_close(*gradients, "pair_fp32")


def test_a_loss_on_the_state_alone_reaches_keys_and_values():
    gradients = []
    for impl in ("triton", "reference"):
        x = floats(inputs_for(1, 1, 70, 8, 16))
        _, state = linear_attention(**x, normalize=True, return_state=True, impl=impl)
        loss = state.kv.square().sum() + state.key_sum.square().sum()
        gradients.append(torch.autograd.grad(loss, [x["k"], x["v"]]))
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, "pair_fp32")


def test_what_the_kernels_lack_is_refused():
    x = inputs_for(1, 1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"impl \('triton'\) must be .* with dtype torch.float64"):
        linear_attention(**x, impl="triton")
    many = {name: t.float().expand(256, 256, 3, 2) for name, t in x.items()}
    with pytest.raises(ValueError, match=r"with batch times heads = 65536 \(at most 65535\)"):
        linear_attention(**many, impl="triton")


@pytest.mark.parametrize("layout", ["one", "packed"])
@CAUSAL
def test_memory_grows_with_the_sequence_alone(causal, layout, monkeypatch):
    buffers: list[int] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        weights, slopes = scores(*args, **kwargs)
        buffers.append(weights.numel())
        return weights, slopes

    scores = launch.compute_scores
    monkeypatch.setattr(launch, "compute_scores", recording)
    s, z, e = 512, 16, 16
    x, saved = floats(inputs_for(1, 1, s, z, e)), []
    segments = segments_of(make_layout(layout, 1, s))

    def step() -> None:
        with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = linear_attention(**x, segments=segments, causal=causal, normalize=True, impl="triton")
        out.sum().backward()

    # States are 64 tokens apart, and there are two of them where attention is bidirectional.
    widest = max(2 * z * padded_width(e) // 64, e)
    assert largest_tensor(step) <= widest * s
    assert max(buffers, default=0) <= 64 * s
    assert bool(buffers) == (causal or layout == "packed")
    assert sum(t.numel() for t in saved) <= (2 * z + 2 * e + widest + 16) * s


def arguments(causal: bool, normalize: bool) -> tuple[Any, ...]:
    """What the operator itself takes, for rows of several documents."""
    q, k, v = (t.squeeze(1).float().requires_grad_() for t in inputs_for(2, 1, 70, 8, 16).values())
    t = torch.arange(70).expand(2, -1)
    start = torch.where(t < 30, 0, 30)
    end = None if causal else torch.where(t < 30, 30, 70)
    initial = torch.randn(2, 8, padded_width(16) if normalize else 16).requires_grad_() if causal else None
    return (q, k, v, initial, start, end, None, causal, normalize, 0.5, 1e-6, causal)


@CAUSAL
def test_the_operator_passes_opcheck(causal):
    torch.library.opcheck(linear, arguments(causal, normalize=causal))


@HALF
@CAUSAL
def test_meta_tensors_have_the_shapes_of_real_ones(causal, dtype):
    for segmented, normalize in ((True, True), (False, False)):
        given = list(arguments(causal, normalize))
        if not segmented:
            given[4:6] = [None, None]
        real = [x.detach().to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
        meta = [x.to("meta") if isinstance(x, Tensor) else x for x in real]
        outputs, shapes = linear(*real), linear(*meta)
        for actual, fake in zip(outputs, shapes, strict=True):
            assert (actual.shape, actual.dtype) == (fake.shape, fake.dtype)
        _, exact, factor, states, _ = outputs
        saved = (exact if normalize else None, factor, states, causal, 0.5)
        faked = [x.to("meta") if isinstance(x, Tensor) else x for x in saved]
        gradients = linear_backward(real[2], None, *real[:7], *saved)
        shapes = linear_backward(meta[2], None, *meta[:7], *faked)
        for actual, fake in zip(gradients, shapes, strict=True):
            assert (actual.shape, actual.dtype) == (fake.shape, fake.dtype)


def test_it_compiles_into_one_graph():
    def call(q: Tensor, k: Tensor, v: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        segments = make_segments(pos)
        options: dict[str, Any] = {"normalize": True, "return_state": True, "scale": 0.5, "impl": "triton"}
        out, state = linear_attention(q, k, v, segments=segments, **options)
        return out, state.kv

    pos = torch.arange(70).remainder(30).expand(2, -1)
    found = []
    for op in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        x = floats(inputs_for(2, 2, 70, 8, 16))
        out, kv = op(*x.values(), pos)
        found.append([out, kv, *torch.autograd.grad(out.square().sum() + kv.square().sum(), list(x.values()))])
    assert all(torch.equal(actual, expected) for actual, expected in zip(*found, strict=True))


def test_fake_tensors_and_autocast():
    x = floats(inputs_for(1, 2, 70, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(**x, normalize=True, causal=False, impl="triton")
    half = {name: t.bfloat16() for name, t in x.items()}
    assert torch.equal(out, linear_attention(**half, normalize=True, causal=False, impl="triton"))
    mode = FakeTensorMode()
    fake = {name: mode.from_tensor(t.detach()).requires_grad_() for name, t in x.items()}
    with mode:
        out = linear_attention(**fake, normalize=True, impl="triton")
        assert out.shape == (1, 2, 70, 16)
        out.sum().backward()
    assert all(t.grad.shape == t.shape for t in fake.values())
