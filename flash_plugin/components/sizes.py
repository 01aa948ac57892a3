"""The sizes a config can name, as one table, for both families: causal, with adapters, and bidirectional."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flash_plugin.components.arguments import config_component
from flash_plugin.components.builders import flash, flash_quad
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.masked_lm import mlm_flash, mlm_flash_quad
from flash_plugin.components.peft import lora_flash, lora_flash_quad

# GPT-2's 50,257 tokens and room for special ones, rounded up for the hardware.
_VOCABULARY = 50304

# Two FLASH layers stand for one Transformer layer, so layer counts are about twice a Transformer's of that size.
SIZES: dict[str, dict[str, Any]] = {
    # Trains on two CPU cores; its vocabulary is byte_tokenizer()'s.
    "debug": dict(vocab_size=259, num_layers=6, embed_dim=256, max_seq_len=2048, qk_dim=64),
    # The paper's base model: d 768, 24 layers.
    "125m": dict(vocab_size=_VOCABULARY, num_layers=24, embed_dim=768, max_seq_len=8192, tie_embeddings=True),
    "350m": dict(vocab_size=_VOCABULARY, num_layers=48, embed_dim=1024, max_seq_len=8192, tie_embeddings=True),
    "1b": dict(vocab_size=_VOCABULARY, num_layers=32, embed_dim=2048, max_seq_len=8192),
    "3b": dict(vocab_size=_VOCABULARY, num_layers=48, embed_dim=3072, max_seq_len=8192),
    "7b": dict(vocab_size=_VOCABULARY, num_layers=64, embed_dim=4096, max_seq_len=8192),
}


def _sized(builder: Callable[..., FlashDecoder], name: str, numbers: dict[str, Any]) -> Callable[..., FlashDecoder]:
    """``builder`` with the defaults of a size; every argument can still be overridden."""

    def build(*positional: Any, **overrides: Any) -> FlashDecoder:
        return builder(*positional, **{**numbers, **overrides})

    signature = inspect.signature(builder)
    parameters = [
        parameter.replace(default=numbers.get(parameter.name, parameter.default))
        for parameter in signature.parameters.values()
    ]
    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    described = ", ".join(f"{key} {value}" for key, value in numbers.items())
    build.__doc__ = f"Build :func:`flash_plugin.{builder.__name__}` with {described}; any argument can be overridden."
    return config_component(build)


def _fits(builder: Callable[..., FlashDecoder], numbers: dict[str, Any]) -> dict[str, Any]:
    """What ``builder`` takes of a size; bytes need one more id for a mask token, larger vocabularies have room."""
    if builder in (mlm_flash, mlm_flash_quad) and numbers["vocab_size"] < _VOCABULARY:
        numbers = {**numbers, "vocab_size": numbers["vocab_size"] + 1}
    return {key: value for key, value in numbers.items() if key in inspect.signature(builder).parameters}


SIZED_BUILDERS: dict[str, Callable[..., FlashDecoder]] = {
    f"{builder.__name__}_{size}": _sized(builder, f"{builder.__name__}_{size}", _fits(builder, numbers))
    for builder in (flash, flash_quad, lora_flash, lora_flash_quad, mlm_flash, mlm_flash_quad)
    for size, numbers in SIZES.items()
}

globals().update(SIZED_BUILDERS)
