"""FLASH (*Transformer Quality in Linear Time*, Hua et al. 2022) for torchtune.

Every name a config may use lives here: ``_component_: flash_plugin.flash_1b``. ``flash_plugin.kernels`` needs torch
alone; the other names load with torchtune when first used.

Shape legend of the whole package: ``b`` batch, ``s`` sequence, ``d`` embed, ``e`` expanded (value) width, ``z``
query/key width, ``c`` chunk size, ``h`` heads.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flash_plugin._environment import check_environment

__version__ = "0.1.0"

_SIZES = ("debug", "125m", "350m", "1b", "3b", "7b")
_FAMILIES = ("flash", "flash_quad", "lora_flash", "lora_flash_quad", "mlm_flash", "mlm_flash_quad")
_COMPONENTS = {
    "builders": ("flash", "flash_quad"),
    "peft": ("lora_flash", "lora_flash_quad"),
    "masked_lm": ("mlm_flash", "mlm_flash_quad"),
    "encoders": ("gau_alpha", "junnyu_flash_quad"),
    "sizes": tuple(f"{family}_{size}" for family in _FAMILIES for size in _SIZES),
    "decoder": ("FlashDecoder",),
    "layer": ("FlashLayer",),
    "gau": ("GatedAttentionUnit", "OffsetScale"),
    "cross_attention": ("CrossGatedAttentionUnit", "FlashCrossAttentionLayer"),
    "mixers": ("MixedChunkMixer", "QuadraticMixer"),
    "norms": ("ScaleNorm",),
    "swap": ("swap_attention",),
    "swap_checkpointer": ("SwapCheckpointer",),
    "multi_head": ("LinearMultiHeadAttention", "MixedChunkMultiHeadAttention", "QuadraticMultiHeadAttention"),
    "cache": ("FlashCache", "LinearCache"),
    "initialization": ("initialize_weights",),
    "checkpointer": ("FlashCheckpointer",),
    "losses": ("CEWithChunkedOutputLoss", "CrossEntropyLoss"),
    "optimizers": ("adamw",),
    "quantizers": ("Int8DynActInt8WeightQuantizer", "Int8WeightOnlyQuantizer"),
    "tokenizers": ("TiktokenTokenizer", "byte_tokenizer", "tiktoken_tokenizer"),
    "datasets": ("text_dataset", "token_dataset"),
    "mlm_datasets": ("mlm_collate", "mlm_dataset", "mlm_token_dataset"),
    "tensor_parallel": ("flash_tp_plan",),
}
_MODULE_OF = {name: module for module, names in _COMPONENTS.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]

check_environment(required=False)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module 'flash_plugin' has no attribute {name!r}; it has: {', '.join(sorted(_MODULE_OF))}"
        )
    check_environment(required=True)
    value = getattr(import_module(f"flash_plugin.components.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
