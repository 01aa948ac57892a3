"""The configs of adapters, distillation and preferences begin with the model that their `Prepare` line trains."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.recipes.small import PROJECTIONS

CONFIGS = Path(__file__).parents[1] / "configs"
ADAPTERS = {"lora_attn_modules", "lora_rank", "lora_alpha", "lora_dropout", "use_dora", "quantize_base"}
ADAPTERS |= {"apply_lora_to_mlp", "apply_lora_to_output"}


def load(name: str) -> DictConfig:
    cfg = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


@pytest.mark.parametrize(
    ("name", "model", "checkpointer", "trained"),
    [
        ("flash_lora_debug", "model", "checkpointer", "flash_debug"),
        ("flash_kd_debug", "teacher_model", "teacher_checkpointer", "flash_debug"),
        ("flash_dpo_debug", "model", "checkpointer", "flash_debug"),
        ("flash_dpo_debug", "model", "ref_checkpointer", "flash_debug"),
        ("flash_1b_lora", "model", "checkpointer", "flash_1b"),
    ],
)
def test_the_checkpoint_and_its_model_are_what_is_prepared(
    name: str, model: str, checkpointer: str, trained: str
) -> None:
    cfg, before = load(name), load(trained)
    arguments = {key: value for key, value in cfg[model].items() if key not in ADAPTERS}
    assert arguments.pop("_component_") in (f"flash_plugin.{trained}", f"flash_plugin.lora_{trained}")
    assert arguments == {key: value for key, value in before.model.items() if key != "_component_"}
    assert cfg[checkpointer].checkpoint_dir == f"{before.output_dir}/epoch_0"
    assert cfg.tokenizer._component_ == before.tokenizer._component_


def test_the_configs_of_adapters_name_every_projection() -> None:
    for name in ("flash_lora_debug", "flash_1b_lora"):
        assert load(name).model.lora_attn_modules == PROJECTIONS
