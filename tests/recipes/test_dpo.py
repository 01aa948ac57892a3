"""torchtune's recipe for preferences (DPO): the host stops it without NCCL; but for that line, it teaches FLASH."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.recipes.launching import ROOT, tune
from tests.recipes.on_cpu import run_on_cpu
from tests.recipes.small import MODEL_FILE, SMALL_MODEL, load, losses, small_model
from tests.tolerances import TOLERANCES

CONFIG = ["--config", str(ROOT / "configs/flash_dpo_debug.yaml"), *SMALL_MODEL, "device=cpu", "dtype=fp32"]
OUTPUT = "outputs/flash_dpo_debug"

pytestmark = pytest.mark.slow


@pytest.fixture
def overrides(base: Path, tmp_path: Path) -> list[str]:
    """The checkpoint to begin with, twice, and pairs of answers: the right one, and none."""

    def dialogue(number: int, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{number} + 1 ="}, {"role": "assistant", "content": answer}]

    pairs = [{"chosen": dialogue(n, f" {n + 1}"), "rejected": dialogue(n, " no idea")} for n in range(16)]
    (tmp_path / "preferences.json").write_text(json.dumps(pairs))
    folders = [f"{which}.checkpoint_dir={base}" for which in ("checkpointer", "ref_checkpointer")]
    return [*CONFIG, *folders, "batch_size=2", "epochs=2", "lr_scheduler.num_warmup_steps=1"]


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="the recipe asks for NCCL, which is there")
def test_without_nccl_the_host_stops_the_recipe(overrides: list[str], tmp_path: Path) -> None:
    printed = tune("--nproc_per_node", "1", "full_dpo_distributed", *overrides, cwd=tmp_path, fails=True)
    assert 'init_process_group("cuda:nccl,cpu:gloo")' in printed
    assert "RuntimeError: Distributed package doesn't have NCCL built in" in printed


def test_two_processes_learn_to_prefer(overrides: list[str], base: Path, tmp_path: Path) -> None:
    run_on_cpu("full_dpo_distributed", *overrides, cwd=tmp_path, processes=2)
    output = tmp_path / OUTPUT
    found = losses(output)
    assert len(found) == 8
    # At first policy and reference are the same, and the loss is ln 2.
    assert abs(found[0] - math.log(2)) <= TOLERANCES["step_loss_fp32"]
    assert found[-1] < found[0]
    assert losses(output, "rewards/margins")[-1] > 0
    model = small_model()
    model.load_state_dict(load(output / f"epoch_1/{MODEL_FILE}"), strict=True)
    before = load(base / MODEL_FILE)
    assert not [name for name, weights in model.state_dict().items() if torch.equal(weights, before[name])]
