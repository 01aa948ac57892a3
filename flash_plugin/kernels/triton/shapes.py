"""Tile and block sizes that do not come from tuning, and which configurations they allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from flash_plugin.kernels.triton.tuning import Config


def tile_size(dtype: torch.dtype) -> int:
    """Rows and columns of a tile of scores: 32-bit operands take twice the shared memory of 16-bit ones."""
    return 128 if dtype.itemsize == 2 else 64


def block_size(width: int, dtype: torch.dtype, most_of_32_bits: int = 64) -> int:
    """A power of two that covers ``width``, or as much of it as one block may.

    Products of 32-bit operands run on the plain cores, which hold whole rows of both in registers.
    """
    return min(max(triton.next_power_of_2(width), 16), 128 if dtype.itemsize == 2 else most_of_32_bits)


def by_tile(config: Config, named: Mapping[str, Any]) -> bool:
    """Whether a configuration is one for the call's tile size, 32-wide steps going with the small tile.

    Its blocks of values, if it has any, must not be more than twice too wide; the widest have no registers left for
    masks.
    """
    if (config.meta["BLOCK_K"] == 32) != (named["TILE"] == 64):
        return False
    block = config.meta.get("BLOCK_E", 0)
    if block == 256:
        return named["EVEN_ROWS"] and named["OUT"] % block == 0
    return not block or block <= max(2 * named["OUT"] - 1, 64)


def input_precision(dtype: torch.dtype) -> str:
    """How tensor cores may round float32 operands: as ``torch.set_float32_matmul_precision`` says."""
    return "ieee" if dtype.itemsize == 2 or torch.get_float32_matmul_precision() == "highest" else "tf32"
