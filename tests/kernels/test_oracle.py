"""The oracle itself against numbers worked out by hand, so that agreeing with it means something."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracle


def column(*values: float) -> torch.Tensor:
    """[1, s, 1] in float64."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def flat(x: torch.Tensor) -> list[float]:
    return x.flatten().tolist()


def test_documents_and_chunks_follow_positions_and_padding():
    pos = torch.tensor([[3, 4, 5, 0, 1, 2, 3, 7, 8, 0, 0]])
    documents, chunks = oracle.place_tokens(1, 11, 4, pos)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4]]
    assert chunks.tolist() == [[0, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6]]
    real = torch.tensor([[False, True, True, True, False, True, True, True, True, False, False]])
    documents, chunks = oracle.place_tokens(1, 11, 2, None, real)
    assert documents.tolist() == [[-1, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1]]
    assert chunks.tolist() == [[-1, 0, 0, 1, -1, 2, 2, 3, 3, -1, -1]]


def test_quadratic_relu2_visible_divides_by_the_keys_a_token_sees():
    q, k, v = column(1, 2, -1), column(3, -1, 2), column(5, 7, 11)
    causal = [9 * 5 / 1, (36 * 5 + 0) / 2, (0 + 1 * 7 + 0) / 3]
    assert flat(oracle.quadratic(q, k, v)) == pytest.approx(causal)
    whole = [(9 * 5 + 0 + 4 * 11) / 3, (36 * 5 + 0 + 16 * 11) / 3, 7 / 3]
    assert flat(oracle.quadratic(q, k, v, causal=False)) == pytest.approx(whole)


def test_quadratic_paper_has_the_length_inside_the_square():
    q, k, v = column(1, 2, -1), column(3, -1, 2), column(5, 7, 11)
    assert flat(oracle.quadratic(q, k, v, normalizer="paper")) == pytest.approx([45 / 9, 180 / 9, 7 / 9])


def test_quadratic_bias_is_indexed_by_query_minus_key():
    q, k, v = column(0, 0), column(0, 0), column(1, 10)
    bias = torch.tensor([2.0, 3.0, 5.0])  # t - s = -1, 0, 1
    assert flat(oracle.quadratic(q, k, v, bias=bias, normalizer="chunk")) == pytest.approx([9, 25 + 90])
    whole = oracle.quadratic(q, k, v, bias=bias, normalizer="chunk", causal=False)
    assert flat(whole) == pytest.approx([9 + 40, 25 + 90])


def test_quadratic_leaves_padding_out_and_applies_gate_and_silu():
    q, k, v, gate = column(1, 1, 1), column(1, 1, 1), column(100, 2, 4), column(1, 3, 5)
    real = torch.tensor([[False, True, True]])
    out = oracle.quadratic(q, k, v, gate=gate, padding_mask=real, causal=False)
    assert flat(out)[1:] == pytest.approx([9, 15])

    def silu(x: float) -> float:
        return x / (1 + math.exp(-x))

    out = oracle.quadratic(q, k, v, gate=gate, padding_mask=real, silu=True)
    assert flat(out)[1:] == pytest.approx([silu(2) * silu(3), (silu(2) + silu(4)) / 2 * silu(5)])


@pytest.mark.parametrize(
    ("activation", "value"),
    [
        ("relu2", 0.25),
        ("laplace", 0.5 * (1 + math.erf((0.5 - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2))))),
        ("softplus2", math.log(1 + math.exp(0.5)) ** 2),
        ("softmax", 1.0),
    ],
)
def test_activations_have_their_textbook_values(activation, value):
    out = oracle.quadratic(column(1), column(0.5), column(3), activation=activation)
    assert flat(out) == pytest.approx([3 * value])


def test_softmax_weights_sum_to_one_over_the_visible_keys():
    q, k, v = column(1, 1), column(0, math.log(3)), column(4, 8)
    out = oracle.quadratic(q, k, v, activation="softmax", scale=1.0)
    assert flat(out) == pytest.approx([4, (4 + 24) / 4])


@pytest.mark.parametrize(
    ("normalizer", "causal", "divisors"),
    [
        ("visible", True, [1, 1, 2, 2, 4]),
        ("paper", True, [5] * 5),
        ("chunk", True, [2] * 5),
        ("visible", False, [5] * 5),
        ("paper", False, [5] * 5),
        ("chunk", False, [5] * 5),
    ],
)
def test_mixed_chunk_global_sums_earlier_chunks_and_divides_by_the_table(normalizer, causal, divisors):
    zero, q, k, v = column(*[0] * 5), column(1, 2, 3, 4, 5), column(1, 1, 2, 1, 1), column(1, 10, 100, 1000, 10000)
    out, state = oracle.mixed_chunk(
        zero, zero, q, k, v, chunk_size=2, normalizer=normalizer, causal=causal, activation="relu2"
    )
    sums = [0, 0, 11, 11, 1211] if causal else [11211] * 5
    assert flat(out) == pytest.approx([(t + 1) * x / d for t, (x, d) in enumerate(zip(sums, divisors, strict=True))])
    assert flat(state.kv) == [11211] and state.count.tolist() == [5]


def test_mixed_chunk_local_sees_its_own_chunk_only():
    one, zero, v = column(1, 1, 1, 1), column(0, 0, 0, 0), column(1, 10, 100, 1000)
    out, _ = oracle.mixed_chunk(one, one, zero, zero, v, chunk_size=3)
    assert flat(out) == pytest.approx([1, 11 / 2, 111 / 3, 1000])
    pos = torch.tensor([[2, 3, 4, 0]])
    out, _ = oracle.mixed_chunk(one, one, zero, zero, v, chunk_size=3, causal=False, input_pos=pos)
    assert flat(out) == pytest.approx([1, 110 / 2, 110 / 2, 1000])


def test_mixed_chunk_state_belongs_to_the_first_document_and_leaves_with_the_last():
    zero, one, v = column(0, 0, 0, 0), column(1, 1, 1, 1), column(1, 10, 100, 1000)
    before = oracle.State(torch.full((1, 1, 1), 6.0, dtype=torch.float64), torch.tensor([3]))
    pos = torch.tensor([[2, 3, 0, 1]])
    out, state = oracle.mixed_chunk(zero, zero, one, one, v, chunk_size=3, input_pos=pos, initial_state=before)
    assert flat(out) == pytest.approx([6 / 3, (6 + 1) / 4, 0, 0])
    assert flat(state.kv) == [1100] and state.count.tolist() == [2]
    out, state = oracle.mixed_chunk(zero, zero, one, one, v, chunk_size=3, initial_state=before)
    assert flat(out) == pytest.approx([2, 2, 2, (6 + 111) / 6])
    assert flat(state.kv) == [1117] and state.count.tolist() == [7]


def test_linear_sums_and_normalises_per_document():
    q, k, v = (column(*x)[:, None] for x in ((1, 2, 3), (1, 2, 3), (1, 10, 100)))
    assert flat(oracle.linear(q, k, v, scale=0.5)[0]) == pytest.approx([0.5, 21, 1.5 * 321])
    out, state = oracle.linear(q, k, v, normalize=True, eps=0.0, input_pos=torch.tensor([[4, 0, 1]]), causal=False)
    assert flat(out) == pytest.approx([1, (20 + 300) / 5, (20 + 300) / 5])
    assert flat(state.kv) == [320] and state.count.tolist() == [2]
    assert state.key_sum is not None and flat(state.key_sum) == [5]
    before = oracle.State(torch.full((1, 1, 1, 1), 7.0), torch.tensor([2]), torch.full((1, 1, 1), 4.0))
    out, state = oracle.linear(q, k, v, normalize=True, eps=0.0, initial_state=before)
    assert flat(out) == pytest.approx([8 / 5, 28 / 7, 328 / 10])
    assert flat(state.kv) == [328] and state.count.tolist() == [5]
