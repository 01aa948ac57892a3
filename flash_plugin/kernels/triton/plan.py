"""Which tiles of the score matrix a call visits: found from its spans, on their device, by one kernel.

Every pass works on square tiles, ``tile`` queries by ``tile`` keys. A row tile sees the keys of one band of tiles,
``[begin, end)``. What lies before the band reaches it through a state, the sum of ``k^T v`` up to a multiple of
``spacing`` tokens; pairs inside the band but before a token's chunk are linear pairs, computed directly. Where chunks
begin at multiples of ``spacing`` there are none of those.

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence, ``t`` tiles of it, ``n`` states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flash_plugin.kernels.triton.plan_kernels import plan_kernel

#: A chunk size, or a spacing, that no sequence reaches.
WHOLE = 2**30

# Tokens of one program of the kernel.
_BLOCK = plan_kernel.default.meta["BLOCK"]


class Spans(NamedTuple):
    """Where each token's document and chunk begin and end, ``[b, s]`` integers; all None: each row is one document.

    Attributes:
        document_start: Index of the first token of its document.
        chunk_start: Index of the first token of its chunk.
        chunk_end: Index one past the last one; only where attention is bidirectional.
        real: False at padding keys, ``[b, s]`` bool; None if there are none.
    """

    document_start: Tensor | None
    chunk_start: Tensor | None
    chunk_end: Tensor | None
    real: Tensor | None


class Divisors(NamedTuple):
    """What divides the local and the global sum of mixed chunk attention, or the one sum of quadratic attention.

    Attributes:
        visible: Divide by the keys that a token sees in its chunk, and by those that lie before this.
        gain: Factor of the weights, which is divided by too.
        others: What divides the global sum if not ``visible``.
        held: Tokens in the state that lies before each row, ``[b]``.
    """

    visible: bool
    gain: float
    others: float = 1.0
    held: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """What each token sees; where the keys of each row tile, and the rows of each key tile, begin and end.

    Attributes:
        tile: Rows and columns of a tile.
        spacing: Tokens between two states, a multiple of ``tile``.
        states: How many states there are.
        width: Most columns a band has.
        direct: Whether bands may hold linear pairs, so that some tokens may not mix with some states.
        first: Index of the first key each token attends to, ``[b, s]`` int32, never decreasing along the sequence.
        last: Index one past the last one, likewise; None if causal (the token itself is the last).
        document: Index of the first token of its document, likewise; -1 where a given state lies before that document.
        real: 0 at padding keys, ``[b, s]`` int8; None if there are none.
        row_scale: What each token's sum is multiplied by, ``[b, s]`` float32; None if 1.
        share: What its global sum is multiplied by over ``row_scale``, likewise; None if not asked for.
        reads: 1 at queries whose document began before their band, else 0, ``[b, s]`` int8; None if not asked for.
        enters: 1 at keys of the document that is open at the end of their block of ``spacing`` keys, likewise.
        begin: First key of each row tile's band, ``[b, t]`` int32, a multiple of ``spacing``.
        end: One past its last key, ``[b, t]`` int32, a multiple of ``tile``; an empty band ends where it begins.
        row_begin: First row tile whose band holds each key tile, ``[b, t]`` int32.
        row_end: One past the last one, ``[b, t]`` int32.
        key_rows: First of each state's own keys, ``[b, n + 1]`` int32.
        query_rows: First row that reads each state, ``[b, n + 1]`` int32.
        keep: 1.0 where a document goes on past a block of ``spacing`` keys, else 0.0; ``[b, n]`` float32.
    """

    tile: int
    spacing: int
    states: int
    width: int
    direct: bool
    first: Tensor
    last: Tensor | None
    document: Tensor
    real: Tensor | None
    row_scale: Tensor | None
    share: Tensor | None
    reads: Tensor | None
    enters: Tensor | None
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


def make_plan(
    spans: Spans,
    like: Tensor,
    *,
    tile: int,
    spacing: int,
    causal: bool,
    size: int,
    divisors: Divisors,
    linear: bool,
) -> Plan:
    """Lay out a call whose tokens attend to their chunks, and linearly to what lies before these.

    Args:
        spans: Documents and chunks.
        like: A tensor ``[b, s, ...]`` of the call.
        tile: Rows and columns of a tile.
        spacing: Tokens between two states, a multiple of ``tile``; ``tile`` itself where there are no states.
        causal: Whether tokens see only themselves and what lies before them.
        size: Most tokens of a chunk; where each row is one document, chunks begin at its multiples.
        divisors: What divides the sums.
        linear: Whether there is a global part.
    """
    # Rows of one document, cut into whole tiles: no chunk reaches into a tile of another one.
    aligned = spans.chunk_start is None and size % tile == 0
    reach = -(-size // tile) * tile
    width = reach if aligned else reach + tile + spacing + (0 if causal else reach)
    direct = causal and linear and not aligned
    return _launch(
        spans, like, kind="chunks", tile=tile, spacing=spacing, causal=causal, size=size, reach=reach, width=width,
        divisors=divisors, linear=linear, direct=direct, marked=direct, initial=divisors.held is not None,
    )  # fmt: skip


def make_linear_plan(
    spans: Spans, like: Tensor, *, tile: int, spacing: int, causal: bool, pairs: bool, initial: bool
) -> Plan:
    """Lay out a call whose pairs are all linear: a row tile's band is its own block of ``spacing`` keys.

    Without ``pairs`` bands are empty, and all there is to see is in the states. A chunk is a whole document. Several
    consecutive rows of ``like``, the heads of one row, may have the same spans.
    """
    return _launch(
        spans, like, kind="blocks" if pairs else "states", tile=tile, spacing=spacing, causal=causal, size=WHOLE,
        reach=0, width=spacing, divisors=Divisors(False, 1.0), linear=False, direct=True,
        marked=spans.document_start is not None, initial=initial,
    )  # fmt: skip


def _launch(
    spans: Spans, like: Tensor, *, kind: str, tile: int, spacing: int, causal: bool, size: int, reach: int, width: int,
    divisors: Divisors, linear: bool, direct: bool, marked: bool, initial: bool,
) -> Plan:  # fmt: skip
    length, segmented = like.shape[1], spans.document_start is not None
    tiles = triton.cdiv(length, tile)
    # Beyond the sequence nothing is; and the kernel's sums would leave 32 bits.
    spacing, reach, width = (min(tokens, tiles * tile) for tokens in (spacing, reach, width))
    states = triton.cdiv(length, spacing)
    given = 1 if spans.document_start is None else len(spans.document_start)
    count = divisors.held if linear else None
    # One row serves all that agree, but the states before two rows may hold different numbers of tokens.
    rows = 1 if given == 1 and count is None else len(like)

    def make(columns: int, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(rows, columns, dtype=dtype, device=like.device) if wanted else None

    tokens = {
        "first": make(length, torch.int32),
        "last": make(length, torch.int32, not causal),
        "document": make(length, torch.int32),
        "real": make(length, torch.int8, spans.real is not None),
        "row_scale": make(length, torch.float32, divisors.visible or divisors.gain != 1.0),
        "share": make(length, torch.float32, linear),
        "reads": make(length, torch.int8, marked),
        "enters": make(length, torch.int8, marked),
    }
    bands = {name: make(tiles, torch.int32) for name in ("begin", "end", "row_begin", "row_end")}
    ends = {name: make(states + 1, torch.int32) for name in ("key_rows", "query_rows")}
    found: dict[str, Any] = {**tokens, **bands, **ends, "keep": make(states, torch.float32)}
    plan_kernel[(triton.cdiv(tiles + 1, _BLOCK // tile), rows)](
        *(None if x is None else x.contiguous() for x in spans), None if count is None else count.contiguous(),
        *found.values(), length, 0 if given == 1 else length, 1 if given == 1 else len(like) // given, tiles, states,
        spacing, size, reach, tiles.bit_length(), divisors.gain, divisors.others,
        KIND=kind, CAUSAL=causal, SEGMENTED=segmented, HAS_REAL=spans.real is not None, INITIAL=initial,
        COUNTED=count is not None, VISIBLE=divisors.visible, SCALED=found["row_scale"] is not None, SHARED=linear,
        MARKED=marked, TILE=tile,
    )  # fmt: skip
    return Plan(tile, spacing, states, width, direct, **found)
