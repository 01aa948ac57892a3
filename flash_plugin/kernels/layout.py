"""Segments as plain index tensors, and the normalisers that count with them (DESIGN section 1).

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_plugin.kernels.segments import Segments

NORMALIZERS = ("visible", "paper", "chunk")


@dataclass(frozen=True)
class LinearState:
    """What linear attention remembers of the tokens behind it.

    Attributes:
        kv: Unnormalised sum of ``k^T v``, ``[b, z, e]`` (``[b, h, z, e]`` for ``linear_attention``).
        count: How many tokens it holds, ``[b]`` int64.
        key_sum: Sum of the keys, ``[b, h, z]``, for the denominator of ``linear_attention``; None elsewhere.
    """

    kv: Tensor
    count: Tensor
    key_sum: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """Index of the first token, and one past the last, of each token's document and chunk; all ``[b, s]``.

    ``real`` is False at padding keys, or None.
    """

    index: Tensor
    document_start: Tensor
    document_end: Tensor
    chunk_start: Tensor
    chunk_end: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, segments: Segments | None, length: int, chunk_size: int | None, device: torch.device) -> Layout:
        """Lay out ``length`` tokens; ``chunk_size`` None means a chunk is a whole document."""
        index = torch.arange(length, device=device).unsqueeze(0)
        if segments is None:
            start, end, real = torch.zeros_like(index), torch.full_like(index, length), None
            if chunk_size is None:
                return cls(index, start, end, start, end, real)
            chunk_start = index - index % chunk_size
            return cls(index, start, end, chunk_start, (chunk_start + chunk_size).clamp(max=length), real)
        start, end = segments.start, segments.end
        if chunk_size is None:
            return cls(index, start, end, start, end, segments.real)
        grid = segments.chunks(chunk_size)
        return cls(index, start, end, grid.start, grid.end, segments.real)

    def repeated(self, heads: int) -> Layout:
        """The layout of ``heads`` sequences for each row, in the order of ``flatten(0, 1)`` on ``[b, h, ...]``."""

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(heads, dim=0) if tensor.shape[0] > 1 else tensor

        real = None if self.real is None else repeat(self.real)
        starts = (repeat(self.document_start), repeat(self.document_end), repeat(self.chunk_start))
        return Layout(self.index, *starts, repeat(self.chunk_end), real)

    @property
    def in_first_document(self) -> Tensor:
        """True at tokens of each row's first document, to which an initial state belongs."""
        return self.document_start == self.document_start[:, :1]

    def tokens_in_last_document(self) -> Tensor:
        """Real tokens of each row's last document, ``[b or 1]`` int64."""
        return (self.document_end - self.document_start)[:, -1].clamp(min=0)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the sequence are kept in float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(normalizer: str, qk_dim: int, length: int) -> float:
    """The factor of q.k when the caller gives none: z**-0.5 for ``visible``, 1/L for the others."""
    return qk_dim**-0.5 if normalizer == "visible" else 1.0 / length


def local_divisor(normalizer: str, activation: str, layout: Layout, causal: bool, dtype: torch.dtype) -> Tensor | None:
    """Number of keys each token sees in its own chunk, ``[b, s]``, or None where nothing divides."""
    if normalizer != "visible" or activation == "softmax":
        return None
    end = layout.index + 1 if causal else layout.chunk_end
    return (end - layout.chunk_start).clamp(min=1).to(dtype)


def global_weight(
    normalizer: str, layout: Layout, causal: bool, chunk_size: int, initial: LinearState | None, dtype: torch.dtype
) -> Tensor:
    """The factor of the global sum at each token, ``[b, s]``; 0 where it sums over nothing."""
    length = layout.index.shape[1]
    if normalizer == "visible":
        count = (layout.chunk_start if causal else layout.document_end) - layout.document_start
        if initial is not None:
            count = count + layout.in_first_document * initial.count[:, None]
        return torch.where(count > 0, 1.0 / count.clamp(min=1).to(dtype), 0.0)
    divisor = chunk_size if causal and normalizer == "chunk" else length
    return torch.full_like(layout.index, 1, dtype=dtype) / divisor


def counted(layout: Layout, initial: LinearState | None, batch: int) -> Tensor:
    """Tokens held by the state of each row's last document, ``[b]``."""
    count = layout.tokens_in_last_document().expand(batch)
    if initial is not None:
        count = count + torch.where(layout.in_first_document[:, -1], initial.count, 0)
    return count
