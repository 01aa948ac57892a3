"""Two processes (FSDP over gloo) reach what one process reaches on the same batches, whatever the recipe's options."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config

from tests.recipes.launching import ROOT, tune
from tests.recipes.test_stock_recipes import TINY
from tests.tolerances import TOLERANCES, assert_close

CONFIG = ROOT / "configs/flash_debug_distributed.yaml"
MODEL_FILE = "outputs/flash_debug_distributed/epoch_0/model-00001-of-00001.bin"
CHUNKED = "loss=torchtune.modules.loss.CEWithChunkedOutputLoss"
# AdamW divides its gradients' scale out, and so would hide a wrong one; plain gradient descent does not.
SGD = ["optimizer=torch.optim.SGD", "optimizer.lr=5e-3", "optimizer.fused=False", "~optimizer.betas"]

pytestmark = pytest.mark.slow


def train(folder: Path, *overrides: str, processes: int, afresh: bool = False) -> Path:
    """Run the config of two processes, or its global batches in one, through the recipe for that many."""
    launch = ["--nproc_per_node", str(processes), "full_finetune_distributed"]
    # With the optimizer in backward the single-device recipe does not divide gradients by the number of tokens.
    if processes == 1 and "optimizer_in_bwd=True" not in overrides:
        launch = ["full_finetune_single_device"]
    batches = f"batch_size={4 // processes}"
    tune(*launch, "--config", str(CONFIG), *TINY, batches, *overrides, cwd=folder, afresh=afresh)
    return folder


def logged(folder: Path, what: str) -> list[float]:
    """One number a step from the only log of a run."""
    (log,) = folder.glob("outputs/*/logs/log_*.txt")
    return [float(number) for number in re.findall(rf" {what}:(\S+)", log.read_text())]


def assert_same_steps(found: Path, expected: Path, dtype: str = "fp32") -> None:
    for what in ("loss", "grad_norm"):
        ours, theirs = logged(found, what), logged(expected, what)
        # The norm is logged where gradients are clipped.
        assert len(ours) == len(theirs) and (len(ours) == 6 or what == "grad_norm")
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
            assert abs(one - other) <= TOLERANCES[f"step_{what}_{dtype}"], f"{what} {one}, not {other}, at step {step}"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of the single-device recipe, each made once."""

    @cache
    def run(*overrides: str) -> Path:
        return train(tmp_path_factory.mktemp("one"), *overrides, processes=1)

    return run


@pytest.mark.parametrize(
    ("shared", "sharded"),
    [
        # What changes only where numbers lie and when they are computed stands on the right alone.
        ([], ["custom_sharded_layers=null"]),
        ([], ["enable_activation_checkpointing=True", CHUNKED]),
        # The recipe weighs a batch's mean loss by its labels before they are shifted, so that the cut into batches
        # matters: all four rows of a step are batches of their own, on one process and on two.
        (
            ["dataset.packed=False", "batch_size=1", "gradient_accumulation_steps=4"],
            ["gradient_accumulation_steps=2", "ac_mode=selective", "ac_option=2"],
        ),
        ([*SGD, "optimizer_in_bwd=True", "clip_grad_norm=null"], ["ac_mode=full"]),
        (["model.tie_embeddings=True"], [CHUNKED]),
        (["model.tie_embeddings=True", "dtype=bf16"], ["custom_sharded_layers=null"]),
        ([], ["compile=True"]),
    ],
    ids=[
        "plain",
        "checkpointed-chunked",
        "selective-accumulated-unpacked",
        "full-in-backward",
        "tied-sharded-chunked",
        "bf16-tied",
        "compiled",
    ],
)
def test_two_processes_take_the_steps_of_one(
    tmp_path: Path, one_process: Callable[..., Path], shared: list[str], sharded: list[str]
) -> None:
    found = train(tmp_path, *shared, *sharded, processes=2)
    assert_same_steps(found, one_process(*shared), "bf16" if "dtype=bf16" in shared else "fp32")


def test_what_two_processes_save_is_what_one_saves_and_generates(
    tmp_path: Path, one_process: Callable[..., Path]
) -> None:
    train(tmp_path, processes=2, afresh=True)
    found, expected = (torch.load(folder / MODEL_FILE) for folder in (tmp_path, one_process()))
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert_close(tensor, expected[name], "stepped_weights_fp32", name)
    model = [override for override in TINY if override.startswith("model.")]
    trained = f"checkpointer.checkpoint_dir={(tmp_path / MODEL_FILE).parent}"
    sample = ["--config", str(ROOT / "configs/generate.yaml"), *model, trained, "max_new_tokens=8"]
    assert "Model is initialized" in tune("generate", *sample, "prompt.user=import os", cwd=tmp_path)


def test_weights_from_a_file_are_weights_from_scratch_and_the_seed_matters(
    tmp_path: Path, one_process: Callable[..., Path]
) -> None:
    seed = "checkpointer.init_seed=1"
    overrides = OmegaConf.from_dotlist([*TINY, seed, f"output_dir={tmp_path / 'unused'}"])
    checkpointer = config.instantiate(OmegaConf.merge(OmegaConf.load(CONFIG), overrides).checkpointer)
    (tmp_path / "base").mkdir()
    torch.save(dict(checkpointer.load_checkpoint()["model"]), tmp_path / "base/weights.pt")
    file = ["checkpointer.checkpoint_dir=base", "checkpointer.checkpoint_files=[weights.pt]"]
    found = train(tmp_path, *file, processes=2)
    assert_same_steps(found, one_process(seed))
    with pytest.raises(AssertionError, match="loss"):
        assert_same_steps(found, one_process())
