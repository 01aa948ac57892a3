"""A model that no one would train but to learn what a part of FLASH is worth; the study's config names it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from flash_plugin import FlashDecoder, flash

# Which of the four queries and keys is zero without the part; the scores are then zero too.
_QUERIES = {"local": 0, "global": 2}


def flash_without(part: str, **arguments: Any) -> FlashDecoder:
    """FLASH without the attention inside chunks (``local``), or without that across chunks (``global``).

    Raises:
        ValueError: If the part is neither, or a local score of zero has a weight.
    """
    if part not in _QUERIES:
        raise ValueError(f"part ({part!r}) must be one of {', '.join(_QUERIES)}; set model.part to one of them")
    for name, needed in (("activation", "relu2"), ("position_bias", "none")):
        given = arguments.get(name, inspect.signature(flash).parameters[name].default)
        if part == "local" and given != needed:
            raise ValueError(
                f"{name} ({given!r}) must be {needed!r} without the local part, whose weights it would still "
                f"make; set model.{name}={needed}"
            )

    def silenced(_mixer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        projections: tuple[Tensor, ...] = inputs[0]
        silent = [torch.zeros_like(one) if i == _QUERIES[part] else one for i, one in enumerate(projections)]
        return (tuple(silent), *inputs[1:])

    model = flash(**arguments)
    for layer in model.layers:
        layer.attn.mixer.register_forward_pre_hook(silenced)
    return model
