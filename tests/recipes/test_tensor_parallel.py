"""The stock recipe with flash_tp_plan takes the steps that one process takes on the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.recipes.test_distributed import CHUNKED, MODEL_FILE, SGD, assert_same_steps, train
from tests.tolerances import assert_close

SPLIT = [
    "tensor_parallel_dim=2",
    "tensor_parallel_plan._component_=flash_plugin.flash_tp_plan",
    "optimizer.fused=False",
]
QUAD = ["model=flash_plugin.flash_quad_debug", "~model.chunk_size", "model.position_bias=rope", "model.norm=layernorm"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("processes", "shared", "split"),
    [
        # The steps of AdamW say little about the size of gradients; those of SGD do.
        (2, SGD, ["enable_activation_checkpointing=True"]),
        (
            2,
            [*QUAD, "model.tie_embeddings=True", "model.proj_bias=True"],
            [CHUNKED, "ac_mode=selective", "ac_option=2"],
        ),
        (2, ["dataset.packed=False"], ["compile=True"]),
        (4, ["model.absolute_position=True", "model.norm=scalenorm"], []),
    ],
    ids=["sgd-checkpointed", "quad-tied-chunked-selective", "unpacked-compiled", "with-fsdp"],
)
def test_processes_that_split_the_model_take_the_steps_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shared: list[str], split: list[str]
) -> None:
    # What is traced is what the plan changes; inductor compiles nothing else than without it.
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    train(one, *shared, processes=1)
    # The processes that split a model share its batches.
    train(many, *SPLIT, *shared, *split, f"batch_size={4 * 2 // processes}", processes=processes)
    assert_same_steps(many, one)
    found, expected = torch.load(many / MODEL_FILE), torch.load(one / MODEL_FILE)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert_close(tensor, expected[name], "stepped_weights_fp32", name)
