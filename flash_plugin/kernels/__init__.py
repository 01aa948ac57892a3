"""FLASH's attention operations: tensors in, tensors out. Needs torch alone.

Each op validates, chooses an implementation (``impl``) and runs it; the ``reference_*`` functions are the plain
formulas that every implementation must equal.
"""

from flash_plugin.kernels.activations import ACTIVATIONS
from flash_plugin.kernels.formulas import (
    reference_linear_attention,
    reference_mixed_chunk_attention,
    reference_quadratic_attention,
)
from flash_plugin.kernels.layout import NORMALIZERS, LinearState
from flash_plugin.kernels.linear import linear_attention
from flash_plugin.kernels.mixed_chunk import mixed_chunk_attention
from flash_plugin.kernels.offset_scale import offset_scale
from flash_plugin.kernels.quadratic import quadratic_attention
from flash_plugin.kernels.rms_norm import rms_norm, scale_norm
from flash_plugin.kernels.segments import Segments, make_segments
from flash_plugin.kernels.validation import IMPLEMENTATIONS

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "NORMALIZERS",
    "LinearState",
    "Segments",
    "linear_attention",
    "make_segments",
    "mixed_chunk_attention",
    "offset_scale",
    "quadratic_attention",
    "reference_linear_attention",
    "reference_mixed_chunk_attention",
    "reference_quadratic_attention",
    "rms_norm",
    "scale_norm",
]
