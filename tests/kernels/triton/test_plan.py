"""The plan of a call, from its definition: every pair of tokens is in a band or in a state, once; and few launches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_plugin.kernels.triton import plan as planning
from flash_plugin.kernels.triton import plan_kernels
from flash_plugin.kernels.triton.mixed_chunk import mixed_chunk, mixed_chunk_backward
from flash_plugin.kernels.triton.plan import WHOLE, Divisors, Plan, Spans, make_linear_plan, make_plan
from flash_plugin.kernels.triton.tuning import Config, TunedKernel
from tests.kernels.cases import LAYOUTS, Layout, make_layout, real_tokens, seed_of, segments_of
from tests.tolerances import assert_close

# Padding that claims to belong to the chunk before it, however long it is.
STUCK = "stuck"

CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
TILE = 64
MEMORY = ("empty", "empty_like", "new_empty", "fill_")


@pytest.fixture(autouse=True)
def several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles a program, so that short sequences take several."""
    small = Config({"BLOCK": 2 * TILE}, num_warps=4, num_stages=1)
    monkeypatch.setattr(plan_kernels.plan_kernel, "configs", (small,))
    monkeypatch.setattr(planning, "_BLOCK", small.meta["BLOCK"])


def layout_of(name: str, b: int, s: int) -> Layout:
    """A named layout; ``stuck`` has padding before and between its documents, all of whose positions are 1."""
    if name != STUCK:
        return make_layout(name, b, s)
    first, between, second = s // 3, s // 3 + 50, s * 3 // 4
    index = torch.arange(s)
    real = ((first <= index) & (index < between)) | (index >= second)
    position = torch.where(real, index - torch.where(index < between, first, second), 1)
    return {"input_pos": position.expand(b, s), "padding_mask": real.expand(b, s)}


def spans_of(layout: Layout, chunk_size: int | None, causal: bool) -> Spans:
    segments = segments_of(layout)
    if segments is None:
        return Spans(None, None, None, None)
    start, end = segments.start, segments.end
    if chunk_size is not None:
        start, end = segments.chunks(chunk_size).start, segments.chunks(chunk_size).end
    return Spans(segments.start, start, None if causal else end, segments.real)


def documents(layout: Layout, b: int, s: int) -> Tensor:
    """Number of each token's document, ``[b, s]``."""
    segments = segments_of(layout)
    return torch.zeros(b, s, dtype=torch.long) if segments is None else segments.start.expand(b, s)


def check_bands(plan: Plan, row: int) -> None:
    """What the four searches found is what there is."""
    begin, end, row_begin, row_end = (x[row] for x in (plan.begin, plan.end, plan.row_begin, plan.row_end))
    tiles = torch.arange(plan.tiles)
    holds = (begin[:, None] <= tiles * TILE) & (tiles * TILE < end[:, None])
    within = (row_begin <= tiles[:, None]) & (tiles[:, None] < row_end)
    assert torch.equal(holds, within)
    assert (begin % min(plan.spacing, WHOLE) == 0).all()
    for state in range(plan.states):
        readers = [i for i in range(plan.tiles) if begin[i] == state * plan.spacing]
        first, stop = plan.query_rows[row, state : state + 2].tolist()
        assert readers == list(range(first // TILE, stop // TILE))
    expected = [min(state * plan.spacing, plan.tiles * TILE) for state in range(plan.states + 1)]
    assert plan.key_rows[row].tolist() == expected


def check_states(plan: Plan, row: int, document: Tensor, real: Tensor) -> None:
    """A real query reads, in the state before its band, the real keys of its document there, and no others."""
    s = len(document)
    key, block = torch.arange(s), torch.arange(s) // plan.spacing
    enters = torch.ones(s, dtype=torch.bool) if plan.enters is None else plan.enters[row] != 0
    for t in range(s):
        begin = int(plan.begin[row, t // TILE])
        kept = torch.ones(s, dtype=torch.bool)
        for number in range(begin // plan.spacing):
            # A block's factor falls on what was summed before it.
            kept &= (block >= number) | (not plan.direct) | (plan.keep[row, number] == 1.0)
        held = kept & enters & (key < begin)
        if plan.reads is not None and not plan.reads[row, t]:
            held = torch.zeros_like(held)
        if real[t]:
            assert torch.equal(held, (key < begin) & (document == document[t]) & real), t


@CAUSAL
@pytest.mark.parametrize("layout", (*LAYOUTS, STUCK))
def test_bands_and_states_of_chunks_hold_every_pair_once(layout: str, causal: bool) -> None:
    rng = random.Random(seed_of(layout, causal))
    cases = [(s, rng.choice([16, 48, 64, 100, 128])) for s in (rng.randint(1, 60), rng.randint(130, 300), 2 * TILE)]
    for s, c in cases if layout != STUCK else [(900, 48)]:
        b = 2
        given = layout_of(layout, b, s)
        document, real = documents(given, b, s), real_tokens(given, b, s)
        spans = spans_of(given, c, causal)
        linear = causal or spans.document_start is None
        plan = make_plan(
            spans, torch.empty(b, s, 1), tile=TILE, spacing=-(-c // TILE) * TILE if causal else TILE, causal=causal,
            size=c, divisors=Divisors(True, 3.0), linear=linear,
        )  # fmt: skip
        index = torch.arange(s)
        chunk = (index // c * c).expand(b, s) if spans.chunk_start is None else spans.chunk_start
        assert torch.equal(plan.first.expand(b, s), chunk.int())
        for row in range(len(plan.begin)):
            check_bands(plan, row)
            if causal:
                check_states(plan, row, document[row], real[row])
            pairs = (chunk[row][:, None] == chunk[row]) & real[row][:, None] & real[row]
            pairs &= (index[:, None] >= index) | (not causal)
            begin, end = (x[row].repeat_interleave(TILE)[:s, None] for x in (plan.begin, plan.end))
            assert ((begin <= index) & (index < end))[pairs].all()
            assert ((end - begin) <= plan.width).all()


@CAUSAL
@pytest.mark.parametrize("layout", (*LAYOUTS, STUCK))
def test_blocks_and_states_of_linear_attention_hold_every_pair_once(layout: str, causal: bool) -> None:
    b, s, heads = 2, 200, 3
    given = layout_of(layout, b, s)
    document, real = documents(given, b, s), real_tokens(given, b, s)
    spans = spans_of(given, None, causal)
    plan = make_linear_plan(
        spans, torch.empty(b * heads, s, 1), tile=TILE, spacing=2 * TILE, causal=causal, pairs=True, initial=False
    )
    rows = len(plan.begin)
    assert rows == (1 if spans.document_start is None else b * heads)
    for row in range(rows):
        check_bands(plan, row)
        check_states(plan, row, document[row // heads], real[row // heads])
        if spans.real is not None:
            assert torch.equal(plan.real[row] != 0, real[row // heads])


@pytest.mark.parametrize("normalizer", ["visible", "chunk"])
def test_divisors_count_a_state_before_the_row(normalizer: str) -> None:
    b, s, c, held, gain = 2, 150, 48, torch.tensor([7, 0]), 3.0
    given = make_layout("packed", b, s)
    spans, document = spans_of(given, c, True), documents(given, b, s)
    divisors = Divisors(normalizer == "visible", gain, float(c), held)
    plan = make_plan(
        spans, torch.empty(b, s, 1), tile=TILE, spacing=TILE, causal=True, size=c, divisors=divisors, linear=True,
    )  # fmt: skip
    local = torch.ones(b, s, dtype=torch.float64)
    weight = local / c
    if normalizer == "visible":
        local = (torch.arange(s) - spans.chunk_start + 1).double()
        seen = spans.chunk_start - document + torch.where(document == 0, held[:, None], 0)
        weight = torch.where(seen > 0, 1.0 / seen.clamp(min=1), 0.0).double()
    assert_close(plan.row_scale, 1.0 / (local * gain), "oracle_fp32")
    assert_close(plan.share, weight * local * gain, "oracle_fp32")
    assert torch.equal(plan.document, torch.where(document == 0, -1, document).int())


def test_a_chunk_may_be_longer_than_half_of_what_32_bits_count() -> None:
    spans = spans_of(make_layout("packed", 1, 150), None, True)
    given = dict(tile=TILE, causal=True, divisors=Divisors(True, 1.0), linear=True)
    plans = [
        make_plan(spans, torch.empty(1, 150, 1), spacing=-(-c // TILE) * TILE, size=c, **given)
        for c in (192, 2**30 + 64)
    ]
    for name in ("first", "begin", "end", "key_rows", "query_rows", "keep", "reads", "enters"):
        assert torch.equal(*(getattr(each, name) for each in plans)), name


@pytest.mark.parametrize("layout", ["one", "packed"])
def test_an_op_launches_little_beside_its_kernels(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(TunedKernel, "_launch", lambda self, *_: launched.append(self.__name__))

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # Views and memory launch nothing; the tests' own poison fills the latter.
            if not func.is_view and func.__name__.split(".")[0] not in MEMORY:
                launched.append(func.__name__)
            return func(*args, **(kwargs or {}))

    s = 512
    x = [torch.randn(2, s, 16) for _ in range(4)] + [torch.randn(2, s, 32) for _ in range(2)]
    given = spans_of(make_layout(layout, 2, s), 64, True)
    options = (64, True, True)
    rest = ("relu2", "visible", 0.25, 1.0, True)
    with Called():
        _, mixed, states, _ = mixed_chunk._init_fn(*x, None, None, None, *given, *options, False, *rest)
    assert len(launched) <= {"one": 6, "packed": 8}[layout], launched
    launched.clear()
    with Called():
        mixed_chunk_backward._init_fn(x[-1], None, *x, None, None, None, *given, mixed, states, *options, *rest)
    assert len(launched) <= {"one": 13, "packed": 17}[layout], launched
