"""Batched matrix products on a CPU, by PyTorch's own functions or by oneDNN.

PyTorch's own go to MKL, which on AMD's processors leaves AVX-512 unused. oneDNN, which PyTorch ships for what
``torch.compile`` makes of linear layers, uses it: float32 products of some hundred rows and columns are twice as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor


def onednn_gains(tensor: Tensor) -> bool:
    """Whether :func:`onednn_product` can multiply such tensors, on a processor where that is worth it."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.backends.mkldnn.enabled)
    )


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[1, r, k]`` and ``[1, k, w]`` in float32, neither empty; not differentiable.

    A new pair of shapes costs milliseconds, to generate its code.
    """
    # It takes the transpose of ``b``, as a view as well, but not rows that overlap.
    other = b[0] if b[0].is_contiguous() or b[0].T.is_contiguous() else b[0].contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a[0], other.T, None, "none", [], "")
    return out.unsqueeze(0)


def torch_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[n, r, k]`` and ``[n, k, w]``; one matrix goes to the plain product, which is faster."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)
