"""The small model that the tests of adapters, distillation and preferences start from, and what they read of a run."""

import re
from pathlib import Path
from typing import Any

import torch

from flash_plugin import FlashDecoder, flash_debug

# 128 x 256 numbers are two blocks of NF4, one for each of two processes.
SMALL_MODEL = ["model.num_layers=2", "model.embed_dim=128", "model.qk_dim=256"]
SMALL = [*SMALL_MODEL, "tokenizer.max_seq_len=128", "max_steps_per_epoch=6", "lr_scheduler.num_warmup_steps=2"]
FEW_TOKENS = ["dataset.source=python", "dataset.max_tokens=20000"]

# What adapters can be put beside.
PROJECTIONS = ["gate_proj", "v_proj", "qk_proj", "output_proj"]

MODEL_FILE = "model-00001-of-00001.bin"
ADAPTER_FILE = "adapter_model.pt"


def small_model() -> FlashDecoder:
    """flash_debug as SMALL_MODEL and the configs of debug models have it."""
    options = dict(max_seq_len=2048, chunk_size=64, token_shift=True, position_bias="t5")
    return flash_debug(num_layers=2, embed_dim=128, qk_dim=256, **options).eval()


def losses(output: Path, name: str = "loss") -> list[float]:
    """One number a step from the logs of all runs into ``output``, the first run first."""
    logs = sorted(output.glob("logs/log_*.txt"), key=lambda path: path.stat().st_mtime)
    return [float(number) for log in logs for number in re.findall(rf" {name}:(\S+)", log.read_text())]


def load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))
