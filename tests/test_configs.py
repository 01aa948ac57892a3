"""Every YAML names components that exist, with arguments they take, and builds its model on the meta device."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.config._utils import _get_component_from_path

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# What a recipe passes by position or adds itself.
GIVEN = {"tokenizer": 0, "dataset": 1, "optimizer": 1, "lr_scheduler": 1, "checkpointer": 0, "model": 0}


def load(path: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    return cfg


def test_the_configs_of_the_issue_exist() -> None:
    wanted = "flash_debug flash_debug_distributed flash_125m flash_1b flash_quad_1b flash_1b_single_device "
    wanted += "flash_1b_finetune generate"
    assert {path.stem for path in CONFIGS} >= set(wanted.split())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_component_exists_and_takes_its_arguments(path: Path) -> None:
    cfg = load(path)
    nodes = {key: node for key, node in cfg.items() if OmegaConf.is_dict(node) and "_component_" in node}
    for key, node in nodes.items():
        arguments = OmegaConf.to_container(node, resolve=True)
        component = _get_component_from_path(arguments.pop("_component_"))
        positional = [object()] * GIVEN.get(key, 0)
        extra = {"num_training_steps": 1, "last_epoch": -1} if key == "lr_scheduler" else {}
        inspect.signature(component).bind(*positional, **arguments, **extra)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "model" in load(p)], ids=lambda path: path.stem)
def test_the_model_builds_and_runs_on_the_meta_device(path: Path) -> None:
    cfg = load(path)
    with torch.device("meta"):
        model = config.instantiate(cfg.model)
        # Llama 3.1's rotary tables are made of values, which are not to be had here.
        if all(getattr(module, "is_cache_built", True) for module in model.modules()):
            logits = model(torch.zeros(2, 24, dtype=torch.long), input_pos=torch.zeros(2, 24, dtype=torch.long))
            assert logits.shape == (2, 24, model.tok_embeddings.num_embeddings)
    window = OmegaConf.select(cfg, "tokenizer.max_seq_len")
    assert window is None or window <= model.max_seq_len


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_what_to_prepare_and_how_to_launch(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for part in ("Prepare", "Launch", "Override", "Tried on"):
        assert part in header, f"{path.name} has no {part!r} in its header"
    launch = header.partition("Launch")[2]
    assert re.search(rf"--config configs/{path.stem}\.yaml", launch)


def test_what_make_train_samples_from_is_what_it_trains() -> None:
    trained, sampled = load(CONFIGS[0].parent / "flash_debug.yaml"), load(CONFIGS[0].parent / "generate.yaml")
    assert sampled.model == trained.model
    assert sampled.checkpointer.checkpoint_dir == f"{trained.output_dir}/epoch_{trained.epochs - 1}"
    assert sampled.tokenizer._component_ == trained.tokenizer._component_


def test_the_distributed_configs_have_one_shape() -> None:
    small, large = (load(CONFIGS[0].parent / f"{name}.yaml") for name in ("flash_debug_distributed", "flash_1b"))
    assert list(small) == list(large)
    assert small.custom_sharded_layers == large.custom_sharded_layers
    # Two processes train on what one trains on.
    single = load(CONFIGS[0].parent / "flash_debug.yaml")
    assert 2 * small.batch_size == single.batch_size
    same = set(single) - {"batch_size", "output_dir"}
    assert all(OmegaConf.to_container(small)[key] == OmegaConf.to_container(single)[key] for key in same)


def test_finetuning_learns_from_the_answers_alone() -> None:
    assert load(CONFIGS[0].parent / "flash_1b_finetune.yaml").dataset.train_on_input is False


def test_the_debug_model_has_the_vocabulary_of_its_tokenizer() -> None:
    cfg = load(CONFIGS[0].parent / "flash_debug.yaml")
    assert config.instantiate(cfg.tokenizer).vocab_size == cfg.model.vocab_size
