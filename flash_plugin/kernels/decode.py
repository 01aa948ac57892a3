"""FLASH's attention for tokens that go behind those a decoding cache holds.

What is held is written in place. One new token a row costs O(z e + c (z + e)) in FLASH and O(n (z + e)) in FLASH-Quad,
n tokens being held; several at once go through the ops that training uses.

Shape legend: ``b`` batch, ``s`` new tokens, ``z`` query/key width, ``e`` value width, ``c`` chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import attention_weights, gated
from flash_plugin.kernels.autocast import like_matrix_products
from flash_plugin.kernels.layout import LinearState, default_scale, state_dtype
from flash_plugin.kernels.mixed_chunk import mixed_chunk_attention
from flash_plugin.kernels.new_tokens import ChunkStep, NewTokens
from flash_plugin.kernels.quadratic import quadratic_attention
from flash_plugin.kernels.segments import Segments, make_segments

# Rows of scores worked on at once.
_PANEL = 512


@dataclass(frozen=True)
class ChunkMemory:
    """What FLASH holds of each row's document.

    Attributes:
        k_local: Local keys of the current chunk, ``[b, c, z]``; the token at position p lies in slot p modulo c.
        k_global: Global keys of the current chunk, ``[b, c, z]``.
        values: Its values, after SiLU if there is one, ``[b, c, e]``.
        kv: Sum of ``k_global^T v`` over the whole document, the current chunk included, ``[b, z, e]`` in float32 (or
            float64). With the chunk in the sum, a token adds to it alone and no chunk is ever folded in.
    """

    k_local: Tensor
    k_global: Tensor
    values: Tensor
    kv: Tensor


@dataclass(frozen=True)
class DocumentMemory:
    """What FLASH-Quad holds of each row, as it was given: keys ``[b, n, z]``, values ``[b, n, e]`` after any SiLU."""

    keys: Tensor
    values: Tensor


@like_matrix_products
def mixed_chunk_decode(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    gate: Tensor | None,
    memory: ChunkMemory,
    new: NewTokens,
    *,
    chunk_size: int,
    bias: Tensor | None,
    activation: str,
    normalizer: str,
    dropout: float,
    impl: str,
    softcap: float | None = None,
    silu: bool = True,
) -> Tensor:
    """Causal :func:`flash_plugin.kernels.mixed_chunk_attention`, for tokens behind those held.

    Args:
        q_local: Queries inside the chunk, ``[b, s, z]``.
        k_local: Keys inside the chunk, ``[b, s, z]``.
        q_global: Queries across chunks, ``[b, s, z]``.
        k_global: Keys across chunks, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Multiplies the result, ``[b, s, e]``, or None.
        memory: What is held; written in place.
        new: Where the tokens lie.
        chunk_size: Tokens of a chunk, c.
        bias: Added to the local scores, ``[2c - 1]``.
        activation: Attention function.
        normalizer: ``visible`` or ``chunk``.
        dropout: Probability of zeroing a local attention weight.
        impl: Implementation of the op for several tokens.
        softcap: Bound that the local scores approach.
        silu: Apply SiLU to ``v`` and ``gate``.

    Returns:
        ``[b, s, e]`` in the dtype of ``v``.
    """
    tokens = [q_local, k_local, q_global, k_global, F.silu(v) if silu else v]
    if v.shape[1] == 1:
        step = new.step(chunk_size)
        mixed = _chunk_step(tokens, memory, step, new, bias, activation, normalizer, softcap, dropout)
        return gated(mixed, gate, silu)
    state, segments, behind = None, new.segments, 0
    if _begins_chunk(new, chunk_size):
        segments = None
        if not new.empty:
            state = _earlier(memory.kv, new.position[:, 0] - new.begin[:, 0])
    elif not new.empty:
        tokens, state, segments = _behind_chunk(tokens, memory, new, chunk_size)
        behind = chunk_size
    result = mixed_chunk_attention(
        *tokens, chunk_size=chunk_size, bias=bias, segments=segments, activation=activation, normalizer=normalizer,
        softcap=softcap, dropout=dropout, initial_state=state, return_state=True, impl=impl,
    )  # fmt: skip
    assert isinstance(result, tuple)
    out, final = result
    _remember_chunk(memory, tokens, final, new.position[:, -1])
    return gated(out[:, behind:], gate, silu)


@like_matrix_products
def quadratic_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    memory: DocumentMemory,
    new: NewTokens,
    *,
    bias: Tensor | None,
    activation: str,
    dropout: float,
    impl: str,
    scale: float | None = None,
    silu: bool = True,
) -> Tensor:
    """Causal :func:`flash_plugin.kernels.quadratic_attention`, for tokens behind those held.

    Args:
        q: Queries, ``[b, s, z]``.
        k: Keys, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        gate: Multiplies the result, ``[b, s, e]``, or None.
        memory: What is held; written in place.
        new: Where the tokens lie.
        bias: Added to the scores, ``[2m - 1]`` for some m of at least as many tokens as are held.
        activation: Attention function.
        dropout: Probability of zeroing an attention weight.
        impl: Implementation of the op for the first tokens.
        scale: Factor of q.k; ``z**-0.5`` by default.
        silu: Apply SiLU to ``v`` and ``gate``.

    Returns:
        ``[b, s, e]`` in the dtype of ``v``.
    """
    length, dtype = v.shape[1], state_dtype(v.dtype)
    if scale is None:
        scale = default_scale("visible", q.shape[-1], length)
    values = F.silu(v) if silu else v
    memory.keys.index_copy_(1, new.index, k.detach().to(memory.keys.dtype))
    memory.values.index_copy_(1, new.index, values.detach().to(memory.values.dtype))
    if new.empty and length > 1:
        if bias is not None:
            middle = bias.shape[0] // 2
            bias = bias[middle - length + 1 : middle + length]
        out = quadratic_attention(
            q, k, values, bias=bias, segments=new.segments, activation=activation, scale=scale, dropout=dropout,
            impl=impl,
        )  # fmt: skip
        return gated(out, gate, silu)
    held = tokens_held(memory, new)
    keys, held_values = memory.keys[:, :held].to(dtype), memory.values[:, :held].to(v.dtype)
    index = torch.arange(held, device=v.device)
    panels = []
    for top in range(0, length, _PANEL):
        rows = slice(top, top + _PANEL)
        seen = (new.position - new.begin + 1)[:, rows]
        distance = new.index[rows, None] - index
        visible = (distance >= 0) & (distance < seen[..., None])
        scores = (q[:, rows].to(dtype) @ keys.mT) * scale
        if bias is not None:
            scores = scores + _at_distance(bias, distance).to(dtype)
        weights = attention_weights(scores, visible, activation)
        if activation != "softmax":
            weights = weights / seen[..., None].to(dtype)
        panels.append(F.dropout(weights, dropout).to(v.dtype) @ held_values)
    return gated(torch.cat(panels, dim=1), gate, silu)


def tokens_held(memory: DocumentMemory, new: NewTokens) -> int:
    """How many places of the memory are in use behind the new tokens, or all where counting would synchronise."""
    if torch.compiler.is_compiling() or new.index.device.type != "cpu":
        return memory.keys.shape[1]
    return int(new.index[-1]) + 1


def _chunk_step(
    tokens: list[Tensor],
    memory: ChunkMemory,
    step: ChunkStep,
    new: NewTokens,
    bias: Tensor | None,
    activation: str,
    normalizer: str,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Mixed chunk attention of one token a row, without its gate."""
    q_local, k_local, q_global, k_global, values = tokens
    chunk_size, dtype = memory.values.shape[1], memory.kv.dtype
    for ring, token in ((memory.k_local, k_local), (memory.k_global, k_global), (memory.values, values)):
        ring.scatter_(1, step.slot.expand_as(token), token.detach().to(ring.dtype))
    memory.kv.masked_fill_(~new.continues[:, None, None], 0.0)
    memory.kv.baddbmm_(k_global.detach().to(dtype).mT, values.detach().to(dtype))

    scale = default_scale(normalizer, q_local.shape[-1], chunk_size)
    shift = memory.kv.new_zeros(()) if bias is None else bias[step.place].to(dtype)
    scores = torch.baddbmm(shift, q_local.to(dtype), memory.k_local.to(dtype).mT, alpha=scale)
    weights = attention_weights(scores, step.visible, activation, softcap)
    if normalizer == "visible" and activation != "softmax":
        weights = weights * step.local_share.to(dtype)
    weights = F.dropout(weights, dropout)

    share = step.global_share.to(dtype)
    q_scaled = q_global.to(dtype) * (share if normalizer == "visible" else (share > 0).to(dtype) / chunk_size)
    # The sum holds the current chunk too: take it out again, with the local part in the same product.
    weights = weights - (q_scaled @ memory.k_global.to(dtype).mT).masked_fill(step.hidden, 0.0)
    local = weights.to(values.dtype) @ memory.values.to(values.dtype)
    return (q_scaled @ memory.kv).to(values.dtype) + local


def _begins_chunk(new: NewTokens, chunk_size: int) -> bool:
    """Whether each row is known to be one run of tokens that starts with a chunk, and so needs no segments."""
    if not new.one_run:
        return False
    return bool((new.position[:, 0] % chunk_size == 0).all())


def _behind_chunk(
    tokens: list[Tensor], memory: ChunkMemory, new: NewTokens, chunk_size: int
) -> tuple[list[Tensor], LinearState, Segments]:
    """Put the chunk in progress, oldest token first, before the new ones; what it lacks of c tokens is padding.

    Returns:
        Queries, keys and values ``[b, c + s, ...]``, the state behind the chunks before this one, and the segments.
    """
    q_local, values = tokens[0], tokens[-1]
    first = new.position[:, :1]
    started = torch.maximum(new.begin[:, :1], first - first % chunk_size)
    position = first - chunk_size + torch.arange(chunk_size, device=first.device)
    real = position >= started  # a document that begins now has none
    held = [
        _take(ring, position % chunk_size).to(values.dtype) for ring in (memory.k_local, memory.k_global, memory.values)
    ]
    dtype = memory.kv.dtype
    in_chunk = (held[1].to(dtype) * real[..., None]).mT @ held[2].to(dtype)
    state = _earlier(memory.kv - in_chunk, (started - new.begin[:, :1])[:, 0])
    no_queries = q_local.new_zeros(q_local.shape[0], chunk_size, q_local.shape[-1])
    before = [no_queries, held[0], no_queries, held[1], held[2]]
    joined = [torch.cat(pair, dim=1) for pair in zip(before, tokens, strict=True)]
    padding = torch.cat([real, torch.ones_like(new.position, dtype=torch.bool)], dim=1)
    segments = make_segments(torch.cat([position, new.position], dim=1), padding_mask=padding)
    return joined, state, segments


def _earlier(kv: Tensor, count: Tensor) -> LinearState:
    """The state of ``count`` ``[b]`` tokens; of none, the sum is what another document or rounding left there."""
    return LinearState(kv.masked_fill((count == 0)[:, None, None], 0.0), count)


def _remember_chunk(memory: ChunkMemory, tokens: list[Tensor], final: LinearState, last: Tensor) -> None:
    """Keep the newest c tokens, each in its slot; ``last`` ``[b]`` is the position of the newest."""
    _, k_local, _, k_global, values = tokens
    ring = torch.arange(memory.values.shape[1], device=last.device)
    back = (last[:, None] - ring) % memory.values.shape[1]
    # Slots of tokens that there are not repeat the oldest one; nobody sees them.
    index = (values.shape[1] - 1 - back).clamp(min=0)
    for held, tensor in ((memory.k_local, k_local), (memory.k_global, k_global), (memory.values, values)):
        held.copy_(_take(tensor.detach(), index))
    memory.kv.copy_(final.kv.detach())


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[b, n]`` of each ``[m, width]`` in ``tensor``."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))


def _at_distance(bias: Tensor, distance: Tensor) -> Tensor:
    """The bias at each ``t - s``; the clamp only keeps indices of pairs that do not see each other legal."""
    reach = bias.shape[0] // 2
    return bias[distance.clamp(-reach, reach) + reach]
