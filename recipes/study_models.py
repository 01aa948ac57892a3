"""Models that no one would train but to learn what a part of FLASH is worth; the study's configs name them.

They are :func:`flash_plugin.flash` with ``relu2`` and without a position bias, so that queries of zero have scores, and
attention weights, of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_plugin import FlashDecoder, flash


def flash_local_only(**arguments: Any) -> FlashDecoder:
    """FLASH without its global part: attention inside chunks."""
    return _without(2, arguments)


def flash_global_only(**arguments: Any) -> FlashDecoder:
    """FLASH without its local part: each token sees the chunks before its own."""
    return _without(0, arguments)


def _without(queries: int, arguments: dict[str, Any]) -> FlashDecoder:
    """FLASH with zeros for the local (0) or the global (2) queries, wherever they are read."""

    def silenced(_mixer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        projections: tuple[Tensor, ...] = inputs[0]
        changed = [torch.zeros_like(one) if index == queries else one for index, one in enumerate(projections)]
        return (tuple(changed), *inputs[1:])

    for name, needed in (("activation", "relu2"), ("position_bias", "none")):
        if arguments.get(name, needed) != needed:
            raise ValueError(f"{name} ({arguments[name]!r}) must be {needed!r} in a model without a part; leave it out")
    model = flash(**arguments)
    for layer in model.layers:
        layer.attn.mixer.register_forward_pre_hook(silenced)
    return model
