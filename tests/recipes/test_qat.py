"""Quantization-aware training: the host stops it without NCCL; but for that line, a FLASH model goes all the way."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed

from flash_plugin.components.quantizers import quantization_of
from tests.recipes.launching import ROOT, printed, run, tune
from tests.recipes.on_cpu import run_on_cpu
from tests.recipes.test_stock_recipes import TINY

pytestmark = pytest.mark.slow

MODEL = [override for override in TINY if override.startswith("model.")]
QUANTIZERS = "torchtune.training.quantization"
QAT = [f"quantizer._component_={QUANTIZERS}.Int8DynActInt4WeightQATQuantizer", "quantizer.groupsize=32"]
# The post-training one, which torchtune wants for what the other has trained.
POST = [f"quantizer._component_={QUANTIZERS}.Int8DynActInt4WeightQuantizer", "quantizer.groupsize=32"]
DEBUG = ["--config", str(ROOT / "configs/flash_debug.yaml")]


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="the recipe asks for NCCL, which is there")
def test_without_nccl_the_host_stops_the_recipe(tmp_path: Path) -> None:
    said = tune("--nproc_per_node", "1", "qat_distributed", *DEBUG, *TINY, *QAT, cwd=tmp_path, fails=True)
    assert 'init_process_group("cuda:nccl,cpu:gloo")' in said
    assert "RuntimeError: Distributed package doesn't have NCCL built in" in said


def test_trained_quantized_and_evaluated(tmp_path: Path) -> None:
    said = run_on_cpu("qat_distributed", *DEBUG, *TINY, *QAT, cwd=tmp_path)
    trained = tmp_path / "outputs/flash_debug/epoch_0/model-00001-of-00001.bin"
    assert trained.is_file()
    losses = [float(loss) for loss in re.findall(r"Loss: ([\d.]+)", said)]
    assert losses[-1] < losses[0]

    quantize = ["--config", str(ROOT / "configs/flash_quantize.yaml"), *MODEL, "~quantizer.embeddings", *POST]
    tune("quantize", *quantize, cwd=tmp_path)
    name = "model-00001-of-00001-8da4w.pt"
    weights = torch.load(tmp_path / "outputs/flash_quantized" / name, weights_only=False)
    assert sum(quantization_of(weight) is not None for weight in weights.values()) == 2 * 4 + 1

    prepare = [str(ROOT / "recipes/prepare_eval.py"), "--config", str(ROOT / "configs/prepare_eval.yaml")]
    printed(run(*prepare, "document_characters=500", "num_documents=4", cwd=tmp_path))
    evaluate = ["--config", str(ROOT / "configs/flash_eval_int8.yaml"), *MODEL, "~quantizer.embeddings", *POST]
    evaluate += [f"checkpointer.checkpoint_files=[{name}]", f"include_path={ROOT / 'configs/eval_tasks'}"]
    said = tune("eleuther_eval", *evaluate, "tasks=[heldout_text]", cwd=tmp_path)
    assert re.search(r"\|byte_perplexity\|↓ +\| +[\d.]+\|", said)
