"""Second derivatives of the forms with a written-out backward, and inputs that depend on each other."""

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import mixed_chunk_attention, reference_mixed_chunk_attention, rms_norm
from tests.tolerances import assert_close


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", ["relu2", "laplace", "softplus2"])
def test_mixed_chunk_of_single_documents_passes_gradgradcheck(activation: str) -> None:
    qk, wide, bias = [(1, 7, 2)] * 4, [(1, 7, 3)] * 2, (5,)

    def op(*tensors: Tensor) -> Tensor:
        *rest, v, gate, bias = tensors
        return mixed_chunk_attention(*rest, v, gate=gate, bias=bias, chunk_size=3, activation=activation, silu=True)

    tensors = inputs(*qk, *wide, bias)
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_of_inputs_that_share_tensors(create_graph: bool) -> None:
    q, k, v = inputs((2, 37, 4), (2, 37, 4), (2, 37, 6))
    found = []
    for op in (mixed_chunk_attention, reference_mixed_chunk_attention):
        loss = op(q, k, q, k, v, gate=v * 2, chunk_size=8).square().sum()
        first = torch.autograd.grad(loss, [q, k, v], create_graph=create_graph)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [q, k, v]) if create_graph else ()
        found.append([*first, *second])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "law_fp64")


def test_rms_norm_equals_torchs_and_passes_both_checks() -> None:
    x, weight = inputs((3, 5, 8), (8,))
    assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (8,), weight, 1e-6), "law_fp64")
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: rms_norm(a, b, 1e-6, residual=True), (x, weight))


@pytest.mark.parametrize("create_graph", [True, False])
def test_rms_norm_of_its_own_weight(create_graph: bool) -> None:
    (x,) = inputs((8,))
    ours = torch.autograd.grad(rms_norm(x, x, 1e-6).square().sum(), x, create_graph=create_graph)[0]
    torchs = torch.autograd.grad(torch.nn.functional.rms_norm(x, (8,), x, 1e-6).square().sum(), x)[0]
    assert_close(ours, torchs, "law_fp64")


def test_function_transforms_see_plain_torch() -> None:
    q, k, v = inputs((2, 9, 4), (2, 9, 4), (2, 9, 6))

    def loss(q: Tensor) -> Tensor:
        return mixed_chunk_attention(q, k, q, k, v, chunk_size=4).square().sum()

    expected = torch.autograd.grad(loss(q), q)[0]
    assert_close(torch.func.grad(loss)(q.detach()), expected, "law_fp64")


def test_a_short_sequence_costs_what_it_is_long_not_what_a_chunk_is() -> None:
    q, k, v = (torch.randn(1, 6, 4) for _ in range(3))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Largest():
        mixed_chunk_attention(q, k, q, k, v, chunk_size=4096, activation="softmax")
    assert largest < 1000
