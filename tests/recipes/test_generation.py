"""torchtune's generate recipe prints the same text with and without the cache, and compiles with it when quantized."""

from pathlib import Path

import pytest

from tests.recipes.launching import ROOT, tune
from tests.recipes.test_stock_recipes import TINY, train

MODEL = [override for override in TINY if override.startswith("model.")]
QUAD = ["model=flash_plugin.flash_quad_debug", "~model.chunk_size"]

pytestmark = pytest.mark.slow


def generated(cwd: Path, *overrides: str) -> str:
    """What ``tune run generate`` prints between loading the model and its timings: prompt and continuation."""
    config = str(ROOT / "configs/generate.yaml")
    printed = tune("generate", "--config", config, *MODEL, *overrides, "max_new_tokens=70", cwd=cwd)
    text = printed.split("Model is initialized")[1].split("Time for inference")[0]
    assert "def read_lines(path):" in text
    return text


@pytest.mark.parametrize("family", [[], QUAD], ids=["flash", "quad"])
def test_the_cache_changes_speed_alone(tmp_path: Path, family: list[str]) -> None:
    train(tmp_path, "max_steps_per_epoch=60", *family)
    # Greedily, and with draws: as the draws are the same, so must each distribution be.
    for sampling in (["top_k=1"], ["top_k=40", "temperature=1.0"]):
        cached, recomputed = (generated(tmp_path, *family, *sampling, f"enable_kv_cache={on}") for on in (True, False))
        assert cached == recomputed
    assert len(set(cached.split("path):")[1])) > 10  # sampled text says something


def test_a_quantized_model_generates_compiled(tmp_path: Path) -> None:
    train(tmp_path, "max_steps_per_epoch=60")
    tune("quantize", "--config", str(ROOT / "configs/flash_quantize.yaml"), *MODEL, cwd=tmp_path)
    quantized = [
        "quantizer._component_=flash_plugin.Int8WeightOnlyQuantizer",
        "checkpointer.checkpoint_dir=outputs/flash_quantized",
        "checkpointer.checkpoint_files=[model-00001-of-00001-8w.pt]",
    ]
    # The recipe compiles each step as one graph or fails; quantized, it asks for a cache.
    assert "Warmup run for quantized model" in generated(tmp_path, *quantized, "top_k=1")
