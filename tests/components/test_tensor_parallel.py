"""Two processes that split a model compute what one does: logits, loss and the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.components.ranks import CASES, DECODED, RANKS, build, decode, run, step
from tests.recipes.launching import SOONER
from tests.tolerances import assert_close

# What a rank holds of a layer; the rest of the layer is on every rank.
SPLIT = ("gate_proj.weight", "gate_proj.bias", "v_proj.weight", "v_proj.bias", "output_proj.weight")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has of every case; all of them once, because processes are slow to start."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(run, args=(folder,), nprocs=RANKS, start_method=SOONER)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(ranks: list[dict[str, Any]], case: str) -> None:
    expected = step(build(case))
    for rank in ranks:
        assert list(rank[case]["whole"]) == list(expected)
        for name, tensor in expected.items():
            assert_close(rank[case]["whole"][name], tensor, "law_fp64", name)


@pytest.mark.parametrize("case", CASES)
def test_copies_stay_copies(ranks: list[dict[str, Any]], case: str) -> None:
    # `full_tensor` of a copy is rank 0's: each rank's own gradient is what it steps with.
    model = build(case)
    expected = step(model)
    for rank in ranks:
        sizes = rank[case]["sizes"].items()
        copied = [name for name, size in sizes if size == model.get_parameter(name).numel()]
        assert len(copied) >= 4
        for name in copied:
            assert_close(rank[case]["own"][f"gradient of {name}"], expected[f"gradient of {name}"], "law_fp64", name)


@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_half_of_what_is_split(ranks: list[dict[str, Any]], case: str) -> None:
    for name, parameter in build(case).named_parameters():
        table = name.split(".")[0] in ("tok_embeddings", "output")
        if name == "output.bias":  # with an odd vocabulary the table is cut by features
            table = parameter.numel() % RANKS == 0
        share = RANKS if table or name.endswith(SPLIT) else 1
        for rank in ranks:
            assert rank[case]["sizes"][name] == parameter.numel() // share, name
            assert not rank[case]["plain"]


def test_a_split_model_decodes(ranks: list[dict[str, Any]]) -> None:
    expected = decode(build(DECODED))
    for rank in ranks:
        assert_close(rank["decoded"], expected, "law_fp32")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("odd", ["expansion * embed_dim (25)", "tensor_parallel_dim (2)", "model.expansion"]),
        ("adapted", ["tensor_parallel_plan", "v_proj is a LoRALinear", "tensor_parallel_dim=1"]),
        ("adapted output", ["output is a LoRALinear"]),
        ("llama", ["attn is a MultiHeadAttention"]),
    ],
)
def test_what_cannot_be_split_is_refused(ranks: list[dict[str, Any]], model: str, words: list[str]) -> None:
    for rank in ranks:
        for word in words:
            assert word in rank["refusals"][model]
