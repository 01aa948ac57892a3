"""T5's bias: the bucket of every distance, and a table of them that is there wherever a model is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flash_plugin
from flash_plugin.components.positions import T5Bias
from tests.tolerances import assert_close

TINY = dict(vocab_size=40, num_layers=2, embed_dim=32, max_seq_len=512, qk_dim=16, position_bias="t5")
LENGTHS = (1, 2, 17, 129, 130, 300)


def bias(causal: bool, **options: object) -> T5Bias:
    built = T5Bias(3.0, causal, **options)
    nn.init.normal_(built.weight, generator=torch.Generator().manual_seed(0))
    return built


def bucket(distance: int, causal: bool) -> int:
    """Raffel et al.'s buckets, 32 of them up to distance 128, of one distance in Python's numbers."""
    buckets, offset = (32, 0) if causal else (16, 16 * (distance < 0))
    distance = max(distance, 0) if causal else abs(distance)
    exact = buckets // 2
    if distance < exact:
        return distance + offset
    # The root is exact where its argument is a power of two; a quotient of logarithms may lie just under it.
    steps = math.floor(math.log2(distance / exact) / math.log2(128 / exact) * (buckets - exact) + 1e-9)
    return min(exact + steps, buckets - 1) + offset


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_distance_has_the_value_of_its_bucket(length: int, causal: bool) -> None:
    for divided in (False, True):
        built = bias(causal, divide_by_length=divided).double()
        expected = [built.weight[bucket(d, causal)] * 3.0 for d in range(1 - length, length)]
        expected = torch.stack(expected) / (length if divided else 1)
        found = built(length)
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(x.square().sum(), built.weight)[0] for x in (found, expected)]
        assert_close(*gradients, "law_fp64")


def test_a_call_looks_up_and_computes_no_logarithms() -> None:
    names = []

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Called():
        built = bias(True)
        assert "log" in names
        names.clear()
        looked_up = built(256)
        assert "log" not in names
        assert len(names) <= 6, names
        names.clear()
        with torch.no_grad():
            assert torch.equal(built(256), looked_up)
        assert "index_select" in names
        names.clear()
        looked_up.sum().backward()
    # These add atomically on CUDA.
    assert not {"index_add", "index_put", "embedding_dense_backward", "scatter_add"} & set(names), names


def test_a_state_dict_holds_the_weight_alone_and_copies_are_whole() -> None:
    built = bias(True)
    assert list(built.state_dict()) == ["weight"]
    for other in (copy.deepcopy(built), copy.deepcopy(built).to(torch.bfloat16), copy.deepcopy(built).double()):
        assert other.buckets.dtype == torch.int64
        assert torch.equal(other(40), (other.weight * 3.0)[built.buckets[128 - 39 : 128 + 40]])


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_the_table_comes_back_behind_the_meta_device(family: str) -> None:
    original = getattr(flash_plugin, family)(**TINY)
    with torch.device("meta"):
        model = getattr(flash_plugin, family)(**TINY)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    # As torchtune's distributed recipes do it.
    with torch.device("cpu"):
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    model.load_state_dict(original.state_dict())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in original.named_buffers()]
    for name, buffer in original.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    tokens = torch.randint(TINY["vocab_size"], (1, 300))
    assert torch.equal(model(tokens), original(tokens))


def test_it_is_one_graph_and_runs_on_fake_and_meta_tensors() -> None:
    built = bias(False)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    for length in (40, 300):
        assert torch.equal(compiled(length), built(length))
    with FakeTensorMode():
        assert T5Bias(1.0, True)(40).shape == (79,)
    with torch.device("meta"):
        assert T5Bias(1.0, True)(40).is_meta
