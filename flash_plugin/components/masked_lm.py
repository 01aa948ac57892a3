"""Masked language models: FLASH whose tokens see all of their document, before and behind them.

:func:`~flash_plugin.components.mlm_datasets.mlm_dataset` makes what they are trained on. They cannot decode token by
token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flash_plugin.components.arguments import config_component
from flash_plugin.components.builders import flash, flash_quad
from flash_plugin.components.decoder import FlashDecoder

# What makes sense in a model whose tokens see earlier ones alone: decoding, and a Transformer's causal layers.
_CAUSAL_ONLY = ("causal", "unlimited_decoding", "attention_layers", "num_heads", "num_kv_heads")


def _bidirectional(builder: Callable[..., FlashDecoder]) -> Callable[..., FlashDecoder]:
    """``builder`` with ``causal=False``, and without the arguments that causal models alone have."""
    signature = inspect.signature(builder)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in _CAUSAL_ONLY]
    left_out = [name for name in signature.parameters if name in _CAUSAL_ONLY]

    def build(**arguments: Any) -> FlashDecoder:
        return builder(**arguments, causal=False)

    build.__name__ = build.__qualname__ = f"mlm_{builder.__name__}"
    build.__module__ = __name__
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    build.__doc__ = (
        f"Build a bidirectional :func:`flash_plugin.{builder.__name__}`, for masked language modelling.\n\n"
        f"Arguments, errors and result are those of that function, without ``{'``, ``'.join(left_out)}``. A token sees "
        "its whole document and no padding: a ``[b, s]`` mask, True at real tokens, tells which tokens are padding; "
        "``input_pos`` tells where packed documents begin. ``vocab_size`` counts the mask token."
    )
    return config_component(build)


mlm_flash = _bidirectional(flash)
mlm_flash_quad = _bidirectional(flash_quad)
