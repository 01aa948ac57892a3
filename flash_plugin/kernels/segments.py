"""Where documents, padding and chunks lie in a batch of sequences.

Every op of this package takes one :class:`Segments`, made once per forward by :func:`make_segments`, instead of
an ``s x s`` mask. ``None`` stands for the common case: each row is one document without padding.

Shape legend: ``b`` batch, ``s`` sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks that documents are cut into; a chunk never crosses a document.

    Attributes:
        start: Index of the first token of each token's chunk, ``[b, s]``.
        end: Index one past the last token of each token's chunk, ``[b, s]``.
    """

    start: Tensor
    end: Tensor


@dataclass(frozen=True)
class Segments:
    """Documents and padding of a batch, as indices into the sequence.

    Padding tokens carry the document of the real token before them (of the one after them at the left edge) and
    ``real`` False: nobody sees or counts them.

    Attributes:
        position: Position of each token in its document, ``[b, s]`` int64.
        start: Index of the first token of each token's document, ``[b, s]`` int64.
        end: Index one past the last real token of each token's document, ``[b, s]`` int64.
        real: False at padding tokens, ``[b, s]`` bool; None when there is no padding.
        single: Whether every row is known to be one unpadded document. Never True where finding out would
            make an accelerator wait.
        grids: Chunk grids worked out ahead of the layers that share them, by chunk size.
    """

    position: Tensor
    start: Tensor
    end: Tensor
    real: Tensor | None
    single: bool = False
    grids: dict[int, ChunkGrid] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        """The ``[b, s]`` this object describes."""
        return self.position.shape

    def with_chunks(self, chunk_sizes: Iterable[int]) -> Segments:
        """Return the same segments with the grids of ``chunk_sizes`` worked out."""
        # No set of the sizes: torch 2.11 does not compile its sorting.
        return replace(self, grids={size: self._cut(size) for size in dict.fromkeys(chunk_sizes)})

    def chunks(self, chunk_size: int) -> ChunkGrid:
        """Return the grid whose boundaries lie where documents start and where positions are multiples of c."""
        return self.grids[chunk_size] if chunk_size in self.grids else self._cut(chunk_size)

    def repeated(self, times: int, batch: int) -> Segments:
        """The segments of ``times`` sequences for each of ``batch`` rows: heads folded into the batch."""

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.expand(batch, -1).repeat_interleave(times, dim=0)

        grids = {size: ChunkGrid(repeat(grid.start), repeat(grid.end)) for size, grid in self.grids.items()}
        real = None if self.real is None else repeat(self.real)
        return Segments(repeat(self.position), repeat(self.start), repeat(self.end), real, self.single, grids)

    def _cut(self, chunk_size: int) -> ChunkGrid:
        index = _indices(self.position)
        boundary = (self.position % chunk_size == 0) | (index == self.start)
        start = torch.where(boundary, index, 0).cummax(dim=1).values
        return ChunkGrid(start=start, end=torch.minimum(_next_boundary(boundary), self.end))


def make_segments(input_pos: Tensor | None = None, *, padding_mask: Tensor | None = None) -> Segments:
    """Describe documents and padding from what torchtune gives a layer (DESIGN section 1).

    A token starts a document if it is the first of its row, if its position is 0 or not one more than its left
    neighbour's, or if its left neighbour is padding.

    Args:
        input_pos: Position of each token in its document, ``[b, s]`` integers. None: positions count from 0 in
            each run of real tokens.
        padding_mask: True at real tokens, ``[b, s]`` bool. None: all tokens are real.

    Raises:
        ValueError: If neither is given, or their shapes or dtypes do not fit.

    Returns:
        The segments, on the device of the arguments.
    """
    _check(input_pos, padding_mask)
    like = input_pos if input_pos is not None else padding_mask
    assert like is not None
    index = _indices(like)
    starts = torch.zeros_like(like, dtype=torch.bool)
    starts[:, 0] = True
    if input_pos is not None:
        input_pos = input_pos.long()
        starts[:, 1:] |= (input_pos[:, 1:] == 0) | (input_pos[:, 1:] != input_pos[:, :-1] + 1)
    if padding_mask is None:
        start = torch.where(starts, index, 0).cummax(dim=1).values
        end = _next_boundary(starts)
    else:
        starts[:, 1:] |= ~padding_mask[:, :-1]
        starts &= padding_mask
        # Left padding joins the first document: cummax finds no start before it, so take the first one there is.
        first = torch.where(padding_mask, index, like.shape[1]).amin(dim=1, keepdim=True).clamp(max=like.shape[1] - 1)
        start = torch.where(starts, index, 0).cummax(dim=1).values
        start = torch.where(index < first, first, torch.maximum(start, first))
        count = torch.where(padding_mask, index + 1, 0)
        # The end of a document is one past its last real token; right padding lies behind it.
        end = torch.where(padding_mask, _next_boundary(starts | ~padding_mask), 0)
        end = torch.where(padding_mask, end, count.cummax(dim=1).values)
        end = torch.where(index < first, end.gather(1, first), end)
    position = input_pos if input_pos is not None else (index - start).clamp(min=0)
    single = padding_mask is None and _is_single(starts, position)
    return Segments(position=position, start=start, end=end, real=padding_mask, single=single)


def unless_single(segments: Segments | None) -> Segments | None:
    """The segments, or None where each row is known to be one unpadded document: what None stands for."""
    return None if segments is None or segments.single else segments


def _indices(like: Tensor) -> Tensor:
    """Sequence indices ``[1, s]`` on the device of ``like``."""
    return torch.arange(like.shape[1], device=like.device).unsqueeze(0)


def _next_boundary(boundary: Tensor) -> Tensor:
    """Index of the next boundary strictly behind each token, ``s`` where there is none."""
    index = _indices(boundary)
    length = boundary.shape[1]
    following = torch.where(boundary, index, length).flip(1).cummin(dim=1).values.flip(1)
    return torch.cat([following[:, 1:], following.new_full((boundary.shape[0], 1), length)], dim=1)


def _is_single(starts: Tensor, position: Tensor) -> bool:
    # Reading values would synchronise an accelerator and break a compiled graph: there, assume the general case.
    if torch.compiler.is_compiling() or starts.device.type != "cpu":
        return False
    return bool((position[:, 0] == 0).all()) and not bool(starts[:, 1:].any())


def _check(input_pos: Tensor | None, padding_mask: Tensor | None) -> None:
    if input_pos is None and padding_mask is None:
        raise ValueError("make_segments needs input_pos, padding_mask or both; pass segments=None for unpacked rows")
    for name, tensor in (("input_pos", input_pos), ("padding_mask", padding_mask)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] == 0):
            raise ValueError(f"{name} (shape {tuple(tensor.shape)}) must be [batch, sequence]; add the missing axis")
    if input_pos is not None and (input_pos.is_floating_point() or input_pos.dtype == torch.bool):
        raise ValueError(f"input_pos (dtype {input_pos.dtype}) must hold integers; pass input_pos.long()")
    if padding_mask is not None and padding_mask.dtype != torch.bool:
        raise ValueError(f"padding_mask (dtype {padding_mask.dtype}) must be bool, True at real tokens; pass mask != 0")
    if input_pos is not None and padding_mask is not None and input_pos.shape != padding_mask.shape:
        raise ValueError(
            f"padding_mask (shape {tuple(padding_mask.shape)}) must have the shape of input_pos "
            f"{tuple(input_pos.shape)}; pass both for the same tokens"
        )
