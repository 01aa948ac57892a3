"""Where torchtune 0.6.1 fails on a CPU: every change to the host, each with the line that it answers.

Importing any component makes them, but for :func:`copy_what_is_merged`, which models with adapters ask for. They act on
CPU devices alone: for any other the host's own function is called, with the arguments it was given.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.utils import get_torch_device_namespace


def work_around() -> None:
    """Replace what breaks, in the package that recipes call it from."""
    for name, repaired in _REPAIRED.items():
        setattr(training, name, repaired)


def copy_what_is_merged(_model: nn.Module, state: dict[str, Any], _prefix: str, _metadata: dict[str, Any]) -> None:
    """Hook of ``state_dict``: give copies of the weights that have adapters, if they are on the CPU.

    torchtune/modules/peft/_utils.py:200 adds adapters to these weights in place, and what it is given
    (lora_finetune_single_device.py:610, knowledge_distillation_single_device.py:604) is ``.cpu()`` of each, on a CPU no
    copy: every save would merge the adapters into the model that goes on training beside them. So it is in one process
    of lora_finetune_distributed.
    """
    for name in [name.removesuffix("lora_b.weight") + "weight" for name in state if name.endswith(".lora_b.weight")]:
        weight = state[name]
        # What is quantized is merged in full precision, a copy; and its own copies are quantized anew, which is lossy.
        quantized = isinstance(getattr(weight, "_local_tensor", weight), NF4Tensor)
        # Whoever wants the parameter itself gets it.
        if weight.device.type == "cpu" and not quantized and not isinstance(weight, nn.Parameter):
            state[name] = weight.clone()


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
