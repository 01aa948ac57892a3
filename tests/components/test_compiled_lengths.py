"""Layers compiled as recipes compile them serve batches of any length with a few graphs, as torchtune's own do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torchtune import training

import flash_plugin
from tests.components.swapped import LLAMA, SIZES, tokens
from tests.tolerances import assert_close

# What dynamo says of hidden states that it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

OWN = dict(vocab_size=50, num_layers=1, embed_dim=16, qk_dim=8, max_seq_len=128)
CHUNKED = {**OWN, "chunk_size": 16}
SWAPPED = {**SIZES, "builder": LLAMA, "num_layers": 1, "chunk_size": 16}
# Of three chunks and more, none of them of whole chunks.
LENGTHS = [37, 50, 81, 43]


def documents(length: int) -> dict[str, Tensor]:
    """Two rows of two documents each."""
    return {"input_pos": torch.cat([torch.arange(19), torch.arange(length - 19)]).expand(2, -1).contiguous()}


def padding(length: int) -> dict[str, Tensor]:
    """Two rows that are padded on the right."""
    return {"mask": torch.arange(length) < torch.tensor([[length - 3], [length]])}


def nothing(length: int) -> dict[str, Tensor]:
    """Two rows of one document each, which need no word."""
    return {}


CASES = [
    pytest.param("flash_quad", OWN, nothing, id="flash_quad"),
    pytest.param("flash_quad", OWN, documents, id="flash_quad-documents"),
    pytest.param("flash", CHUNKED, documents, id="flash-documents"),
    pytest.param("mlm_flash", CHUNKED, padding, id="mlm_flash-padding", marks=pytest.mark.slow),
    pytest.param("swap_attention", SWAPPED, documents, id="swapped-documents", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def start_with_no_graph() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def build(name: str, sizes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(flash_plugin, name)(**sizes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def step(model: nn.Module, length: int, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and all gradients of a loss."""
    model.zero_grad()
    out = model(tokens(2, length, length), **given)
    out.square().mean().backward()
    return out, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("name", "sizes", "given"), CASES)
def test_two_graphs_serve_all_lengths(
    name: str, sizes: dict[str, Any], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    check_two_graphs(name, sizes, given)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash_quad", "flash"])
def test_two_graphs_of_inductor_serve_all_lengths_and_keep_no_index_of_pairs(name: str) -> None:
    """Inductor lays tensors out anew, and may guard on what the others do not."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        check_two_graphs(name, CHUNKED if name == "flash" else OWN, documents)
    assert not [x.shape for x in kept if x.dtype == torch.int64 and x.shape[-2:].numel() >= min(LENGTHS) ** 2]


def check_two_graphs(name: str, sizes: dict[str, Any], given: Any) -> None:
    """Of layers compiled as recipes compile them, and of plain ones with the same weights: results and graphs."""
    plain, model = build(name, sizes), build(name, sizes)
    training.compile_model(model, verbose=False)
    for length in LENGTHS:
        expected, gradients = step(plain, length, given(length))
        found, found_gradients = step(model, length, given(length))
        assert_close(found, expected, "pair_fp32", f"logits of {length}")
        assert_close(found_gradients, gradients, "pair_fp32", f"gradients of {length}")
    # One of the first length, before torch knows that there are others, and one of any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
