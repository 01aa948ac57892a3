"""What a torchtune attention mask says that documents and padding do not: nothing, or it is refused.

FLASH has no s x s attention matrix to mask. torchtune says the same thing twice, in ``input_pos`` and in ``mask``;
FLASH layers follow ``input_pos`` and this module makes sure that the mask agrees.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_plugin.components.gau import GatedAttentionUnit
from flash_plugin.kernels import Segments
from flash_plugin.kernels.new_tokens import NewTokens

_REMEDY = "FLASH takes documents from input_pos and padding from a [b, s] mask; pass those, or no mask"


def reads_mask(layer: nn.Module) -> bool:
    """Whether a layer's attention looks at a mask: FLASH's, and what was swapped for torchtune's, goes by positions."""
    attention = getattr(layer, "attn", None)
    return not isinstance(attention, GatedAttentionUnit) and not hasattr(attention, "placement")


def padding_of(mask: object, causal: bool) -> Tensor | None:
    """Return the padding mask ``[b, s]`` that ``mask`` holds, or None where padding does not matter.

    A ``[b, s]`` mask is True at real tokens. For a bidirectional model a ``[b, s, s]`` mask holds padding too: what
    nobody sees. A causal model is told by ``input_pos``.
    """
    if not isinstance(mask, Tensor):
        return None
    _check_dtype(mask)
    if mask.dim() == 2:
        square = mask.shape[0] == mask.shape[1] > 1 and mask.device.type == "cpu"
        if square and torch.equal(mask, torch.ones_like(mask).tril()):
            raise ValueError(
                f"mask (shape {tuple(mask.shape)}, causal) must not be an attention mask without a batch "
                f"axis; {_REMEDY}"
            )
        return mask
    return None if causal or mask.dim() != 3 else mask.any(dim=1)


def check_mask(mask: object, segments: Segments | None, tokens: Tensor, causal: bool, has_positions: bool) -> None:
    """Refuse a mask that documents, padding and causality do not already express.

    Harmless differences of torchtune's packed batches are accepted. In a causal model: padding that fills up a pack
    counts as one more document in the mask but not in ``input_pos``, and a document longer than a pack restarts its
    positions at the pack's length while the mask goes on. In a bidirectional model: torchtune's collate makes causal
    masks alone, so with ``input_pos`` one of the very same documents stands for the documents, as a ``BlockMask`` does.

    Args:
        mask: ``[1 or b, s, s]`` bool, or a flex-attention ``BlockMask``, which stands for the packing that
            ``input_pos`` describes and is not read.
        segments: What the model goes by; None means one document a row.
        tokens: ``[b, s]``.
        causal: Whether the model is causal.
        has_positions: Whether ``input_pos`` was given.

    Raises:
        ValueError: If the mask cannot be honoured.
    """
    batch, length = tokens.shape
    if not isinstance(mask, Tensor):
        if not has_positions:
            raise ValueError(f"mask ({type(mask).__name__}) must come with input_pos; {_REMEDY}")
        return
    if mask.dim() == 2 and tuple(mask.shape) == (batch, length):
        return
    if (
        mask.dim() != 3
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, length)
        or mask.shape[2] != length
    ):
        raise ValueError(
            f"mask (shape {tuple(mask.shape)}) must be [b, s] or [b, s, s] for tokens of shape {(batch, length)}; "
            f"{_REMEDY}"
        )
    if mask.shape[1] == 1:
        mask = mask.expand(-1, length, -1)
    index = torch.arange(length, device=mask.device)
    start, real = (torch.zeros_like(index)[None], None) if segments is None else (segments.start, segments.real)
    different = mask != _seen(start, real, causal)
    if not causal and has_positions and different.any() and torch.equal(mask, _seen(start, None, causal=True)):
        return
    if real is not None:
        different = different & real[:, :, None]
    if causal:
        ahead = mask & (index > index[:, None])
        if ahead.any():
            row, t, s = ahead.nonzero()[0].tolist()
            raise ValueError(
                f"mask[{row}, {t}, {s}] (True) must be False in a causal model: token {t} cannot see a later "
                f"one; {_REMEDY}, or build the model with causal=False"
            )
        different = different & ~_filling(mask, tokens, has_positions) & ~_wrapped(segments, mask)
    if different.any():
        row, t, s = different.nonzero()[0].tolist()
        raise ValueError(
            f"mask[{row}, {t}, {s}] ({bool(mask[row, t, s])}) must be {not bool(mask[row, t, s])} to agree with "
            f"{'input_pos' if has_positions else 'a single document a row (no input_pos was given)'}; {_REMEDY}"
        )


class MaskChecks:
    """:func:`check_mask` on every call outside training, and in training once a kind of mask.

    A recipe's collate makes the same kind of mask at every step: comparing s x s entries once is enough.
    """

    def __init__(self) -> None:
        self._passed: set[tuple[int, ...]] = set()

    def check(
        self, mask: object, segments: Segments | None, tokens: Tensor, causal: bool, has_positions: bool, training: bool
    ) -> None:
        """Check a mask, if there is one; arguments and errors are those of :func:`check_mask`."""
        kind = (not has_positions, *getattr(mask, "shape", ()))
        if mask is None or (training and kind in self._passed):
            return
        check_mask(mask, segments, tokens, causal, has_positions)
        self._passed.add(kind)


def check_cached_mask(mask: object, new: NewTokens, cache_len: int) -> None:
    """Refuse a mask over the places of a decoding cache that positions do not already express.

    It costs as much as reading the mask does. On an accelerator, and in a compiled graph, a difference stops the
    program without saying where, and nothing waits for it.

    Args:
        mask: ``[1 or b, s, cache_len]`` bool: token t of the call sees what was fed j-th to the cache. None, and
            whatever else is no tensor, is not read.
        new: The tokens of the call.
        cache_len: Length the cache was set up with.

    Raises:
        ValueError: If the mask cannot be honoured.
    """
    if not isinstance(mask, Tensor):
        return
    _check_dtype(mask)
    batch, length = new.position.shape
    if mask.dim() != 3 or mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != (length, cache_len):
        raise ValueError(
            f"mask (shape {tuple(mask.shape)}) must be [1 or b, s, decoder_max_cache_seq_len] = "
            f"{(batch, length, cache_len)} while the cache is enabled; pass that or no mask, and give padding "
            "position 0"
        )
    different = mask != _seen_in_cache(new, cache_len)
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~different.any(), "mask must agree with input_pos while the cache is enabled")
    elif different.any():
        row, t, s = different.nonzero()[0].tolist()
        told = bool(mask[row if mask.shape[0] > 1 else 0, t, s])
        raise ValueError(
            f"mask[{row}, {t}, {s}] ({told}) must be {not told} to agree with input_pos and the {int(new.index[0])} "
            "tokens given to the cache before; call reset_caches() between prompts, and pass the positions that the "
            "mask means"
        )


def attention_mask(segments: Segments | None, new: NewTokens | None, cache_len: int | None) -> Tensor | None:
    """What torchtune's causal attention is told of documents, padding and its cache.

    Args:
        segments: Documents and padding; None means one document a row.
        new: Where the tokens lie behind those in a cache.
        cache_len: Length of that cache.

    Returns:
        ``[b, s, s]``, or ``[b, s, cache_len]`` with a cache, True where a token sees another; None where causality says
        everything. A padding token sees itself, since softmax needs something to see.
    """
    if new is not None:
        assert cache_len is not None
        return _seen_in_cache(new, cache_len)
    if segments is None or segments.single:
        return None
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.position.device)
    return _seen(segments.start, segments.real, causal=True) | itself


def _seen(start: Tensor, real: Tensor | None, causal: bool) -> Tensor:
    """Which tokens see which, ``[b, s, s]``, where documents start at ``start`` ``[b, s]``; padding is not seen."""
    seen = start[:, :, None] == start[:, None, :]
    if causal:
        index = torch.arange(start.shape[1], device=start.device)
        seen = seen & (index <= index[:, None])
    return seen if real is None else seen & real[:, None, :]


def _seen_in_cache(new: NewTokens, cache_len: int) -> Tensor:
    """Which places of a cache new tokens see, ``[b, s, cache_len]``: those of their document, up to their own."""
    index = torch.arange(cache_len, device=new.position.device)
    last = new.index[:, None]
    return (index <= last) & (index >= last - (new.position - new.begin)[..., None])


def _check_dtype(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask (dtype {mask.dtype}) must be bool, True where attention is allowed; {_REMEDY}")


def _filling(mask: Tensor, tokens: Tensor, has_positions: bool) -> Tensor:
    """Rows ``[b, s, 1]`` of the mask's last document, if it is one padding token over and over: nobody reads them."""
    last_start = mask.long().argmax(dim=-1)[:, -1:]
    index = torch.arange(mask.shape[1], device=mask.device)
    behind = (index >= last_start) & (last_start > 0)
    constant = ((tokens == tokens[:, -1:]) | ~behind).all(dim=1, keepdim=True)
    return (behind & constant & has_positions)[:, :, None]


def _wrapped(segments: Segments | None, like: Tensor) -> Tensor:
    """Tokens behind a restart of positions at the pack's length, ``[b, s, 1]``."""
    if segments is None:
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=like.device)
    length = like.shape[-1]
    before = segments.position.gather(1, (segments.start - 1).clamp(min=0))
    wrapped = (segments.start > 0) & (before == length - 1) & (segments.position.gather(1, segments.start) == 0)
    return wrapped[:, :, None]
