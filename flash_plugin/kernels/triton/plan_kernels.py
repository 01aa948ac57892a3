"""The kernel behind ``plan.py``: what each token sees, and which tiles that makes the passes visit.

Shape legend: ``b`` batch (or 1 where all rows agree), ``s`` sequence, ``t`` tiles of it, ``n`` states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_plugin.kernels.triton.tuning import Config, tuned


@triton.jit
def _first_key(chunk_start_ptr, token, size, SEGMENTED: tl.constexpr):
    """First key of each token's chunk."""
    if SEGMENTED:
        return tl.load(chunk_start_ptr + token).to(tl.int32)
    else:
        return token // size * size


@triton.jit
def _last_key(chunk_end_ptr, token, length, size, SEGMENTED: tl.constexpr):
    """One past the last key of each token's chunk."""
    if SEGMENTED:
        return tl.load(chunk_end_ptr + token).to(tl.int32)
    else:
        return tl.minimum(token // size * size + size, length)


@triton.jit
def _document(document_start_ptr, token, SEGMENTED: tl.constexpr, INITIAL: tl.constexpr):
    """First token of each token's document, -1 in a row's first document if a state lies before that."""
    if SEGMENTED:
        start = tl.load(document_start_ptr + token).to(tl.int32)
        if INITIAL:
            start = tl.where(start == tl.load(document_start_ptr).to(tl.int32), -1, start)
        return start
    else:
        return token * 0 - (1 if INITIAL else 0)


@triton.jit
def _band(
    tile, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """First key of each row tile's band, and one past the last; neither ever decreases from tile to tile."""
    start = tile * TILE
    end = start + TILE
    if KIND == "chunks":
        # Padding may claim to see more than its chunk; nobody reads what it gets, but the band must not grow with it.
        begin = _first_key(chunk_start_ptr, start, size, SEGMENTED) // spacing * spacing
        begin = tl.maximum(begin, tl.maximum(start - reach, 0) // spacing * spacing)
        if not CAUSAL:
            last = _last_key(chunk_end_ptr, tl.minimum(end, length) - 1, length, size, SEGMENTED)
            end = tl.minimum((last + TILE - 1) // TILE * TILE, end + reach)
    else:
        begin = start // spacing * spacing
        if KIND == "states":
            end = begin
        elif not CAUSAL:
            end = tl.minimum(begin + spacing, tiles * TILE)
    return begin, end


@triton.jit
def _tiles_before(
    limit, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach, steps,
    ENDS: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many row tiles have a band that begins (``ENDS``: ends) before ``limit``, by bisection."""
    low = limit * 0
    high = low + tiles
    for _ in range(0, steps):
        middle = (low + high) // 2
        begin, end = _band(
            tl.minimum(middle, tiles - 1), chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach,
            KIND, CAUSAL, SEGMENTED, TILE,
        )  # fmt: skip
        edge = begin
        if ENDS:
            edge = end
        before = (edge < limit) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


# A kernel is compiled anew for numbers that sixteen divides, or that are 1; this one gains nothing from that.
_NUMBERS = ["length", "span_stride", "repeat", "tiles", "states", "spacing", "size", "reach", "steps"]


@tuned([Config({"BLOCK": 1024}, num_warps=4, num_stages=1)], key=[])
@triton.jit(do_not_specialize=_NUMBERS)
def plan_kernel(
    document_start_ptr, chunk_start_ptr, chunk_end_ptr, real_ptr, count_ptr,
    first_ptr, last_ptr, document_ptr, real_out_ptr, row_scale_ptr, share_ptr, reads_ptr, enters_ptr,
    begin_ptr, end_ptr, row_begin_ptr, row_end_ptr, key_rows_ptr, query_rows_ptr, keep_ptr,
    length, span_stride, repeat, tiles, states, spacing, size, reach, steps, gain, divisor,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, SEGMENTED: tl.constexpr, HAS_REAL: tl.constexpr, INITIAL: tl.constexpr,
    COUNTED: tl.constexpr, VISIBLE: tl.constexpr, SCALED: tl.constexpr, SHARED: tl.constexpr, MARKED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tensors of a :class:`~flash_plugin.kernels.triton.plan.Plan`, from a row's ``Spans``.

    ``SCALED``, ``SHARED`` and ``MARKED`` ask for ``row_scale``, ``share``, and ``reads`` with ``enters``. Each row of
    spans serves ``repeat`` rows of the plan. Grid: blocks of tokens, with their tiles and states; batch.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = batch // repeat * span_stride
    if SEGMENTED:
        document_start_ptr += row
        chunk_start_ptr += row
        if not CAUSAL:
            chunk_end_ptr += row

    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    at = batch * length + token
    token = tl.minimum(token, length - 1)
    if KIND == "chunks":
        first = _first_key(chunk_start_ptr, token, size, SEGMENTED)
    else:
        # All pairs are linear: every key lies before the first one to attend to.
        first = token * 0 + length
    tl.store(first_ptr + at, first, mask=inside)
    end = token + 1
    if not CAUSAL:
        end = _last_key(chunk_end_ptr, token, length, size, SEGMENTED)
        tl.store(last_ptr + at, end, mask=inside)
    document = _document(document_start_ptr, token, SEGMENTED, INITIAL)
    tl.store(document_ptr + at, document, mask=inside)
    if HAS_REAL:
        tl.store(real_out_ptr + at, tl.load(real_ptr + row + token).to(tl.int8), mask=inside)
    # What divides the sum of the weights times ``gain``.
    local = gain
    if VISIBLE:
        local = gain * tl.maximum(end - first, 1).to(tl.float32)
    if SCALED:
        tl.store(row_scale_ptr + at, 1.0 / local, mask=inside)
    if SHARED:
        if VISIBLE:
            start = _document(document_start_ptr, token, SEGMENTED, False)
            held = ((first if CAUSAL else length) - start).to(tl.float32)
            if COUNTED:
                held += tl.where(document < 0, tl.load(count_ptr + batch).to(tl.float32), 0.0)
            share = tl.where(held > 0.0, local / tl.maximum(held, 1.0), 0.0)
        else:
            share = tl.zeros((BLOCK,), dtype=tl.float32) + local / divisor
        tl.store(share_ptr + at, share, mask=inside)
    if MARKED:
        begin, _ = _band(
            token // TILE, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach,
            KIND, CAUSAL, SEGMENTED, TILE,
        )  # fmt: skip
        tl.store(reads_ptr + at, (document < begin).to(tl.int8), mask=inside)
        # Keys of the document that is open at the end of their block.
        behind = tl.minimum(token // spacing * spacing + spacing, length) - 1
        enters = token >= _document(document_start_ptr, behind, SEGMENTED, INITIAL)
        if HAS_REAL:
            enters = enters & (tl.load(real_ptr + row + token) != 0)
        tl.store(enters_ptr + at, enters.to(tl.int8), mask=inside)

    TILES: tl.constexpr = BLOCK // TILE
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    known = number < tiles
    at = batch * tiles + number
    tile = tl.minimum(number, tiles - 1)
    begin, end = _band(
        tile, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach, KIND, CAUSAL, SEGMENTED, TILE
    )
    tl.store(begin_ptr + at, begin, mask=known)
    tl.store(end_ptr + at, end, mask=known)
    row_begin = _tiles_before(
        tile * TILE + 1, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach, steps,
        True, KIND, CAUSAL, SEGMENTED, TILE,
    )  # fmt: skip
    tl.store(row_begin_ptr + at, row_begin, mask=known)
    row_end = _tiles_before(
        tile * TILE + 1, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach, steps,
        False, KIND, CAUSAL, SEGMENTED, TILE,
    )  # fmt: skip
    tl.store(row_end_ptr + at, row_end, mask=known)

    at = batch * (states + 1) + number
    block = tl.minimum(number, states) * spacing
    tl.store(key_rows_ptr + at, tl.minimum(block, tiles * TILE), mask=number <= states)
    rows = _tiles_before(
        block, chunk_start_ptr, chunk_end_ptr, length, tiles, spacing, size, reach, steps,
        False, KIND, CAUSAL, SEGMENTED, TILE,
    )  # fmt: skip
    tl.store(query_rows_ptr + at, rows * TILE, mask=number <= states)
    behind = tl.minimum(block + spacing, length) - 1
    keep = _document(document_start_ptr, tl.minimum(behind, length - 1), SEGMENTED, INITIAL) < block
    tl.store(keep_ptr + batch * states + number, keep.to(tl.float32), mask=number < states)
