"""Where torchtune 0.6.1 fails on a CPU: every change to the host, each with the line that it answers.

Importing any component makes them. They act on CPU devices alone: for any other the host's own function is called, with
the arguments it was given.
"""

from __future__ import annotations

import functools
import gc

import torch
from torchtune import training
from torchtune.utils import get_torch_device_namespace


def work_around() -> None:
    """Replace what breaks, in the package that recipes call it from."""
    for name, repaired in _REPAIRED.items():
        setattr(training, name, repaired)


_get_memory_stats = training.get_memory_stats
_log_memory_stats = training.log_memory_stats
_cleanup_before_training = training.cleanup_before_training


@functools.wraps(_get_memory_stats)
def _get_memory_stats_or_none(device: torch.device, reset_stats: bool = True) -> dict[str, float]:
    # memory.py:264 raises ValueError on a CPU, and recipes ask all the same (full_finetune_distributed.py:628).
    return {} if device.type == "cpu" else _get_memory_stats(device, reset_stats)


@functools.wraps(_log_memory_stats)
def _log_memory_stats_if_any(stats: dict[str, float], *arguments: str, **named: str) -> None:
    # memory.py:303 formats what there is not on a CPU.
    if stats:
        _log_memory_stats(stats, *arguments, **named)


@functools.wraps(_cleanup_before_training)
def _cleanup_before_training_if_possible() -> None:
    # memory.py:51 calls torch.cpu.empty_cache, which does not exist (full_finetune_distributed.py:745).
    if hasattr(get_torch_device_namespace(), "empty_cache"):
        _cleanup_before_training()
    else:
        gc.collect()


_REPAIRED = {
    "get_memory_stats": _get_memory_stats_or_none,
    "log_memory_stats": _log_memory_stats_if_any,
    "cleanup_before_training": _cleanup_before_training_if_possible,
}
