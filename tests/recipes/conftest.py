"""What several of the recipes' tests start from."""

from pathlib import Path

import pytest

from tests.recipes.launching import ROOT, tune
from tests.recipes.small import FEW_TOKENS, SMALL


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stock torchtune has saved a small flash_debug in."""
    folder = tmp_path_factory.mktemp("base")
    config = str(ROOT / "configs/flash_debug.yaml")
    tune("full_finetune_single_device", "--config", config, *SMALL, *FEW_TOKENS, "max_steps_per_epoch=30", cwd=folder)
    return folder / "outputs/flash_debug/epoch_0"
