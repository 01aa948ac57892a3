"""Matrix products by oneDNN, and mixed chunk attention made of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import blocked, mixed_chunk_attention
from flash_plugin.kernels.products import onednn_gains, onednn_product, torch_product
from tests.kernels.cases import make_layout
from tests.kernels.test_mixed_chunk import check, inputs_for
from tests.tolerances import assert_close

CHUNK = 13
Shapes = list[tuple[torch.Size, torch.Size]]


def views(rows: int, columns: int) -> dict[str, Tensor]:
    """Matrices ``[1, rows, columns]`` that lie in memory in all sorts of ways."""
    draw = torch.randn
    return {
        "contiguous": draw(1, rows, columns),
        "transposed": draw(1, columns, rows).mT,
        "part of wider rows": draw(1, rows, columns + 5)[..., 3 : 3 + columns],
        "part of wider columns": draw(1, columns, rows + 5).mT[:, 3 : 3 + rows],
        "every other": draw(1, 2 * rows, 2 * columns)[:, ::2, ::2],
        "one row": draw(1, 1, columns).expand(-1, rows, -1),
        "one column": draw(1, rows, 1).expand(-1, -1, columns),
        "overlapping rows": draw(1, rows + columns).unfold(1, columns, 1)[:, :rows],
    }


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """Let oneDNN have all float32 chunks, whatever their size and the processor; shapes that it multiplies."""
    seen: Shapes = []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.shape, b.shape))
        return onednn_product(a, b)

    monkeypatch.setattr(blocked, "_LARGE", 0)
    monkeypatch.setattr(blocked, "onednn_gains", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(blocked, "onednn_product", spy)
    return seen


@pytest.mark.parametrize("inner", [1, 24])
def test_products_are_the_same_however_matrices_lie_in_memory(inner):
    torch.manual_seed(0)
    for (left, a), (right, b) in product(views(37, inner).items(), views(inner, 50).items()):
        for multiply in (onednn_product, torch_product):
            found = multiply(a, b)
            assert found.shape == (1, 37, 50)
            assert_close(found, a.double() @ b.double(), "oracle_fp32", f"{multiply.__name__}: {left} @ {right}")
    rows = torch.randn(3, 37, inner), torch.randn(3, inner, 50)
    assert_close(torch_product(*rows), rows[0].double() @ rows[1].double(), "oracle_fp32")


@pytest.mark.parametrize("activation", ["relu2", "laplace", "softplus2"])
@pytest.mark.parametrize("s", [CHUNK, 2 * CHUNK, 3 * CHUNK + 5, 4 * CHUNK + 12])
def test_attention_by_onednn_has_the_oracle_s_values_and_gradients(s, activation, onednn):
    for bias, gate, state in product((False, True), repeat=3):
        inputs = inputs_for(3, s, 5, 7, CHUNK, bias=bias, gate=gate, state=state)
        check(make_layout("one", 3, s), inputs, chunk_size=CHUNK, activation=activation, silu=gate)
    assert onednn


def test_two_panels_by_onednn_have_the_oracle_s_values_and_gradients(onednn):
    chunk = 2 * blocked._PANEL - 1
    inputs = inputs_for(2, 2 * chunk + 70, 5, 7, chunk, bias=True, gate=True, state=True)
    check(make_layout("one", 2, 2 * chunk + 70), inputs, chunk_size=chunk, silu=True)
    upper, lower = blocked._PANEL, chunk - blocked._PANEL
    # Queries of the upper panel see its own keys alone, keys of the lower panel are seen by its own queries alone.
    for r, k in ((upper, 5 + upper), (lower, lower + 5)):
        assert (torch.Size([1, r, k]), torch.Size([1, k, 7])) in onednn


def test_onednn_gets_no_chunk_of_a_length_that_may_never_come_again(onednn):
    def multiply(s: int) -> set[tuple[torch.Size, torch.Size]]:
        onednn.clear()
        inputs = {name: x.float().requires_grad_() for name, x in inputs_for(2, s, 5, 7, CHUNK, gate=True).items()}
        mixed_chunk_attention(**inputs, chunk_size=CHUNK).sum().backward()
        return set(onednn)

    assert multiply(CHUNK - 1) == set()
    seen = multiply(3 * CHUNK)
    for rest in range(1, CHUNK):
        assert multiply(3 * CHUNK + rest) <= seen | multiply(4 * CHUNK)


def test_large_float32_chunks_are_onednn_s_where_it_gains(monkeypatch):
    calls = []
    monkeypatch.setattr(blocked, "onednn_product", lambda a, b: calls.append(a.dtype) or torch_product(a, b))
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    sizes = {torch.float32: (512, True), torch.float64: (512, False), None: (511, False)}
    for dtype, (e, large) in sizes.items():
        calls.clear()
        inputs = inputs_for(2, 64, 128, e, 64)
        mixed_chunk_attention(**{name: x.to(dtype or torch.float32) for name, x in inputs.items()}, chunk_size=64)
        assert bool(calls) == large, f"{dtype}, e = {e}"


def test_onednn_is_left_alone_where_it_is_switched_off_or_gains_nothing(monkeypatch):
    numbers = torch.zeros(1)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    assert onednn_gains(numbers)
    assert not onednn_gains(numbers.double())
    assert not onednn_gains(numbers.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not onednn_gains(numbers)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert not onednn_gains(numbers)
