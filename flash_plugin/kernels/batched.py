"""Linear-time PyTorch, all blocks at once: runs on any device, compiles, and differentiates to any order.

The sequence is cut into blocks of ``c`` tokens at fixed indices. Documents may start anywhere, so a chunk (at most
``c`` tokens) may reach into the neighbouring block: with segments, queries look at a window of neighbouring blocks
and the pairs that do not belong are masked. What lies outside the window comes from the state ``k^T v`` of the
document that is open at a block boundary. No ``s x s`` tensor exists; time and memory are O(s c).

Shape legend: ``b`` batch, ``n`` blocks, ``c`` block size, ``z`` query/key width, ``e`` value width, ``w`` window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import attention_weights
from flash_plugin.kernels.layout import Layout, local_divisor, state_dtype
from flash_plugin.kernels.recurrence import states_before
from flash_plugin.kernels.relative_bias import bias_between


@dataclass(frozen=True)
class Blocks:
    """A layout cut into blocks: indices ``[1, n, c]``; documents, chunks and real keys ``[b or 1, n, c]``.

    Documents and chunks are named by the index of their first token. ``segmented`` is False where every row is one
    unpadded document, which needs neither windows nor masks on the global part.
    """

    index: Tensor
    document: Tensor
    chunk: Tensor
    real: Tensor
    segmented: bool

    @classmethod
    def of(cls, layout: Layout, size: int, segmented: bool) -> Blocks:
        """Cut ``layout``; the tokens that fill the last block repeat its last token but are no real keys."""
        length = layout.index.shape[1]
        blocks = -(-length // size)
        index = torch.arange(blocks * size, device=layout.index.device)
        within = index.clamp(max=length - 1)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.index_select(1, within).unflatten(1, (blocks, size))

        index = index.view(1, blocks, size)
        real = index < length
        if layout.real is not None:
            real = real & cut(layout.real)
        return cls(index, cut(layout.document_start), cut(layout.chunk_start), real, segmented)


def mixed_chunk_batched(
    q_local: Tensor,
    k_local: Tensor,
    q_scaled: Tensor,
    k_global: Tensor,
    v: Tensor,
    bias: Tensor | None,
    initial_kv: Tensor | None,
    layout: Layout,
    *,
    segmented: bool,
    chunk_size: int,
    causal: bool,
    activation: str,
    normalizer: str,
    scale: float | Tensor,
    dropout: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mixed chunk attention without its gate; ``q_scaled`` already carries the global normaliser.

    Returns:
        ``[b, s, e]`` and, for causal attention, the state ``[b, z, e]`` of each row's last document.
    """
    length, dtype = v.shape[1], state_dtype(v.dtype)
    size = _block_size(chunk_size, length)
    blocks = Blocks.of(layout, size, segmented)
    offsets = ((-1, 0) if causal else (-1, 0, 1)) if segmented else (0,)
    q1, k1, q2, k2, values = (_cut(tensor, size) for tensor in (q_local, k_local, q_scaled, k_global, v))

    queries = blocks.index[..., None]
    keys = torch.cat([blocks.index + offset * size for offset in offsets], dim=-1)[:, :, None]
    key_real = _window(blocks.real, offsets)[:, :, None]
    visible = (blocks.chunk[..., None] == _window(blocks.chunk, offsets)[:, :, None]) & key_real
    if causal:
        visible = visible & (keys <= queries)
    scores = _scores(q1.to(dtype), k1.to(dtype), offsets) * scale
    if bias is not None:
        # The same in all blocks; pairs it does not reach to are in different chunks.
        scores = scores + bias_between(bias.to(dtype), -offsets[0] * size, size, len(offsets) * size)
    weights = attention_weights(scores, visible, activation, softcap)
    divisor = local_divisor(normalizer, activation, layout, causal, dtype)
    if divisor is not None:
        weights = weights / _cut(divisor, size, fill=1.0)[..., None]
    weights = F.dropout(weights, dropout)

    if segmented:
        # Pairs inside the window that the local part does not cover: other chunks of the same document.
        seen = (blocks.document[..., None] == _window(blocks.document, offsets)[:, :, None]) & key_real
        if causal:
            seen = seen & (keys < blocks.chunk[..., None])
        weights = weights + _scores(q2.to(dtype), k2.to(dtype), offsets).masked_fill(~seen, 0.0)
    out = _weighted(weights.to(v.dtype), values, offsets)
    carried, final = _outside(q2, k2, values, blocks, initial_kv, causal, lag=1 if segmented else 0)
    return _join(out + carried, length), final


def linear_batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_kv: Tensor | None,
    layout: Layout,
    *,
    segmented: bool,
    causal: bool,
    block: int,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over ``[b, s, z]`` queries and keys and ``[b, s, e]`` values (heads folded into ``b``).

    Returns:
        ``[b, s, e]`` and, for causal attention, the state ``[b, z, e]`` of each row's last document.
    """
    length = v.shape[1]
    block = _block_size(block, length)
    blocks = Blocks.of(layout, block, segmented)
    queries, keys, values = (_cut(tensor, block) for tensor in (q, k, v))
    if not causal and not segmented:
        carried, final = _outside(queries, keys, values, blocks, None, causal, lag=0)
        return _join(carried, length), final
    seen = (blocks.document[..., None] == blocks.document[:, :, None]) & blocks.real[:, :, None]
    if causal:
        seen = seen & (blocks.index[:, :, None] <= blocks.index[..., None])
    weights = _scores(queries, keys, (0,)).masked_fill(~seen, 0.0)
    out = _weighted(weights, values, (0,))
    carried, final = _outside(queries, keys, values, blocks, initial_kv, causal, lag=0)
    return _join(out + carried, length), final


def _outside(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, initial: Tensor | None, causal: bool, lag: int
) -> tuple[Tensor, Tensor | None]:
    """What the queries of each block get from outside their window, which begins ``lag`` blocks before them."""
    if not causal and not blocks.segmented:
        # Every query sees every key: one state for all blocks, the window included.
        total = (k.mT @ v).sum(1, keepdim=True, dtype=state_dtype(v.dtype)).to(v.dtype)
        return q @ total, None
    before, final = _from_earlier(q, k, v, blocks.document, blocks.real, initial, blocks.segmented, lag)
    if causal:
        return before, final
    q, k, v = q.flip(1, 2), k.flip(1, 2), v.flip(1, 2)
    behind, _ = _from_earlier(q, k, v, blocks.document.flip(1, 2), blocks.real.flip(1, 2), None, True, lag)
    return before + behind.flip(1, 2), None


def _from_earlier(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document: Tensor,
    real: Tensor,
    initial: Tensor | None,
    segmented: bool,
    lag: int,
) -> tuple[Tensor, Tensor]:
    """``q @ S`` with S the sum of ``k^T v`` over the query's document up to ``lag`` blocks before its own block."""
    dtype = state_dtype(v.dtype)
    if initial is None:
        initial = v.new_zeros(v.shape[0], k.shape[-1], v.shape[-1], dtype=dtype)
    first = initial.to(dtype).unsqueeze(1)
    if not segmented:
        states = torch.cat([first, (k.mT @ v).to(dtype)], dim=1).cumsum(1)
        return q @ states[:, :-1].to(v.dtype), states[:, -1]
    last = document[..., -1]
    # The document open at each block's left edge; it keeps its state through blocks that lie wholly inside it.
    owner = torch.cat([document[:, :1, 0], last[:, :-1]], dim=1)
    mine = (document == last[..., None]) & real
    added = ((k * mine[..., None]).mT @ v).to(dtype)
    keep = (owner == last).to(dtype)[..., None, None].expand(v.shape[0], -1, -1, -1)
    states, final = states_before(first.squeeze(1), added, keep, lag)
    owner = torch.cat([owner[:, :1].expand(-1, lag), owner[:, : v.shape[1] - lag]], dim=1)
    belongs = document == owner[..., None]
    return (q * belongs[..., None]) @ states.to(v.dtype), final


def _block_size(most: int, length: int) -> int:
    """``most``, or the whole sequence if it is shorter. No ``min``: graphs of torch.compile would calculate with it."""
    return most if length > most else length


def _cut(tensor: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """Cut axis 1 into blocks of ``size``, filling up the last one."""
    blocks = -(-tensor.shape[1] // size)
    missing = blocks * size - tensor.shape[1]
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing), value=fill)
    return tensor.unflatten(1, (blocks, size))


def _join(blocks: Tensor, length: int) -> Tensor:
    """The ``length`` tokens that were cut into ``[b, n, c, e]``."""
    tokens = blocks.flatten(1, 2)[:, :length]
    # Inductor keeps such a slice for the backward without the gaps; torch then fits that to this one length.
    return tokens.contiguous() if torch.compiler.is_compiling() else tokens


def _shift(tensor: Tensor, offset: int) -> Tensor:
    """Block ``j + offset`` at place ``j``; zeros (False) beyond the ends."""
    if offset == 0:
        return tensor
    edge = torch.zeros_like(tensor[:, :1])
    return torch.cat([edge, tensor[:, :-1]], dim=1) if offset < 0 else torch.cat([tensor[:, 1:], edge], dim=1)


def _window(tensor: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """A per-token tensor as the queries of each block see it, ``[b, n, w]``; what lies beyond the ends is not real."""
    return torch.cat([_shift(tensor, offset) for offset in offsets], dim=-1)


def _scores(q: Tensor, k: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """``q k^T`` of each block with its window, ``[b, n, c, w]``."""
    return torch.cat([q @ _shift(k, offset).mT for offset in offsets], dim=-1)


def _weighted(weights: Tensor, v: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """``weights @ v`` over the window, ``[b, n, c, e]``."""
    parts = weights.split(v.shape[2], dim=-1)
    out = parts[0] @ _shift(v, offsets[0])
    for part, offset in zip(parts[1:], offsets[1:], strict=True):
        out = out + part @ _shift(v, offset)
    return out
