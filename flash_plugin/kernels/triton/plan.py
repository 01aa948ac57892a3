"""Which tiles of the score matrix a call visits: found from the layout, on its device, without waiting for it.

Every pass works on square tiles, ``tile`` queries by ``tile`` keys. A row tile sees the keys of one band of tiles,
``[begin, end)``. What lies before the band reaches it through a state, the sum of ``k^T v`` up to a multiple of
``spacing`` tokens; pairs inside the band but before a token's chunk are linear pairs, computed directly. Where chunks
begin at multiples of ``spacing`` there are none of those.

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence, ``t`` tiles of it, ``n`` states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bounds:
    """What each token sees; all ``[b, s]``.

    Attributes:
        first: Index of the first key it attends to, int32, never decreasing along the sequence.
        last: Index one past the last one, int32, never decreasing; None if causal (the token itself is the last).
        document: Index of the first token of its document, int32; -1 where a given state lies before that document.
        real: False at padding keys, bool; None if there are none.
    """

    first: Tensor
    last: Tensor | None
    document: Tensor
    real: Tensor | None


@dataclass(frozen=True)
class Plan:
    """Where the keys of each row tile, and the rows of each key tile, begin and end.

    Attributes:
        bounds: What each token sees.
        tile: Rows and columns of a tile.
        spacing: Tokens between two states, a multiple of ``tile``.
        states: How many states there are.
        width: Most columns a band has.
        direct: Whether bands may hold linear pairs, so that some tokens may not mix with some states.
        begin: First key of each row tile's band, ``[b, t]`` int32, a multiple of ``spacing``.
        end: One past its last key, ``[b, t]`` int32, a multiple of ``tile``; an empty band ends before it begins.
        row_begin: First row tile whose band holds each key tile, ``[b, t]`` int32.
        row_end: One past the last one, ``[b, t]`` int32.
        key_rows: First of each state's own keys, ``[b, n + 1]`` int32.
        query_rows: First row that reads each state, ``[b, n + 1]`` int32.
        keep: 1.0 where a document goes on past a block of ``spacing`` keys, else 0.0; ``[b, n]`` float32.
    """

    bounds: Bounds
    tile: int
    spacing: int
    states: int
    width: int
    direct: bool
    begin: Tensor
    end: Tensor
    row_begin: Tensor
    row_end: Tensor
    key_rows: Tensor
    query_rows: Tensor
    keep: Tensor

    @property
    def tiles(self) -> int:
        """Tiles of the sequence."""
        return self.begin.shape[1]

    @property
    def rows_agree(self) -> bool:
        """Whether one row of the tensors serves the whole batch."""
        return self.begin.shape[0] == 1

    def reads_state(self) -> Tensor:
        """True at queries whose document began before their band, ``[b, s]``."""
        begin = self.begin.repeat_interleave(self.tile, dim=1)
        return self.bounds.document < begin[:, : self.bounds.document.shape[1]]

    def enters_state(self) -> Tensor:
        """True at keys of the document that is open at the end of their block of ``spacing`` keys, ``[b, s]``."""
        document, real = self.bounds.document, self.bounds.real
        index = torch.arange(document.shape[1], device=document.device)
        enters = index >= document[:, _last_of_block(index, self.spacing, document.shape[1])]
        return enters if real is None else enters & real


def make_plan(
    bounds: Bounds, *, tile: int, spacing: int, reach: int | None = None, aligned: bool = False, direct: bool = False
) -> Plan:
    """Lay out the tiles of a call.

    Args:
        bounds: What each token sees.
        tile: Rows and columns of a tile.
        spacing: Tokens between two states, a multiple of ``tile``; ``tile`` itself where there are no states.
        reach: Most tokens between a real query and a key it attends to; None if there is no bound.
        aligned: Whether chunks begin at multiples of ``reach``, itself a multiple of ``tile``.
        direct: Whether bands may hold linear pairs.
    """
    length, device = bounds.first.shape[1], bounds.first.device
    tiles = -(-length // tile)
    rows = torch.arange(tiles, device=device) * tile
    begin = bounds.first[:, rows].long() // spacing * spacing
    if bounds.last is None:
        end = (rows + tile).expand_as(begin)
    else:
        end = (bounds.last[:, (rows + tile).clamp(max=length) - 1].long() + tile - 1) // tile * tile
    width = tiles * tile
    if reach is not None:
        # Padding may claim to see more than its chunk; nobody reads what it gets, but the band must not grow with it.
        reach = -(-reach // tile) * tile
        begin = torch.maximum(begin, (rows - reach).div(spacing, rounding_mode="floor").long() * spacing)
        ahead = 0 if bounds.last is None else reach
        end = torch.minimum(end, rows + tile + ahead)
        width = min(width, reach if aligned else reach + tile + spacing + ahead)
    return _with_bands(bounds, begin, end, tile=tile, spacing=spacing, width=width, direct=direct)


def make_linear_plan(bounds: Bounds, *, tile: int, spacing: int, pairs: bool = True) -> Plan:
    """Lay out a call whose pairs are all linear: a row tile's band is its own block of ``spacing`` keys.

    Without ``pairs`` bands are empty, and all there is to see is in the states.
    """
    tiles = -(-bounds.first.shape[1] // tile)
    rows = (torch.arange(tiles, device=bounds.first.device) * tile).expand(len(bounds.first), -1)
    begin = rows // spacing * spacing
    end = rows + tile if bounds.last is None else (begin + spacing).clamp(max=tiles * tile)
    end = end if pairs else begin
    width = min(spacing, tiles * tile)
    return _with_bands(bounds, begin, end, tile=tile, spacing=spacing, width=width, direct=True)


def _with_bands(
    bounds: Bounds, begin: Tensor, end: Tensor, *, tile: int, spacing: int, width: int, direct: bool
) -> Plan:
    length, device = bounds.first.shape[1], bounds.first.device
    tiles, states = -(-length // tile), -(-length // spacing)
    rows = torch.arange(tiles, device=device) * tile
    row_begin = torch.searchsorted(end.contiguous(), rows.expand_as(end).contiguous(), right=True)
    row_end = torch.searchsorted(begin.contiguous(), rows.expand_as(begin).contiguous(), right=True)
    blocks = torch.arange(states + 1, device=device) * spacing
    key_rows = blocks.clamp(max=tiles * tile).expand(len(begin), -1)
    query_rows = torch.searchsorted(begin.contiguous(), blocks.expand(len(begin), -1).contiguous()) * tile
    last = _last_of_block(blocks[:-1], spacing, length)
    keep = bounds.document[:, last] < blocks[:-1]
    return Plan(
        bounds, tile, spacing, states, width, direct, begin=_narrow(begin), end=_narrow(end),
        row_begin=_narrow(row_begin), row_end=_narrow(row_end), key_rows=_narrow(key_rows),
        query_rows=_narrow(query_rows), keep=keep.float().contiguous(),
    )  # fmt: skip


def _narrow(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()


def _last_of_block(index: Tensor, spacing: int, length: int) -> Tensor:
    return ((index // spacing + 1) * spacing).clamp(max=length) - 1
