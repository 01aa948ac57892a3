"""Where the tokens of a call lie, worked out once a forward for all swapped layers of a model.

torchtune hands positions and a mask to every layer alike. A hook of the model, before its forward, turns them into what
the ops take, and refuses a mask that says something else. What it works out goes to the layers with the positions of
that call and is kept nowhere else: when activation checkpointing computes a layer again, others may have come between.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from flash_plugin.components.cache import DecodingCache
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.masks import MaskChecks, attention_mask, check_cached_mask, padding_of, reads_mask
from flash_plugin.components.positions import position_rows
from flash_plugin.kernels import Segments, make_segments
from flash_plugin.kernels.new_tokens import NewTokens

#: Documents of the rows, or places behind those in a cache; one of the two, or neither for one document a row.
Placed = tuple[Segments | None, NewTokens | None]
#: Attribute of the positions that layers get: whose places they carry, and the places.
_CARRIED = "_flash_placed"


class Placement:
    """Documents, or places behind a cache, with a row for each head; shared by the swapped layers of a model.

    Args:
        chunk_sizes: Chunk sizes of the layers.
    """

    def __init__(self, chunk_sizes: set[int]) -> None:
        self.chunk_sizes = chunk_sizes
        self._mask_checks = MaskChecks()

    def prepare(
        self, model: TransformerDecoder, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Work out the places of a call of the model, for its layers to get with ``input_pos``; a forward pre-hook.

        Where documents are packed and no mask is given, layers that keep their attention are given one.

        Raises:
            ValueError: If the mask says something else than ``input_pos``, a position is out of range, or with an
                enabled cache there is no ``input_pos`` or another batch size.
        """
        tokens = args[0] if args else kwargs["tokens"]
        input_pos, mask = kwargs.get("input_pos"), kwargs.get("mask")
        attentions = (getattr(layer, "attn", None) for layer in model.layers)
        attention: Any = next(one for one in attentions if getattr(one, "placement", None) is self)
        cache = attention.kv_cache if attention.cache_enabled else None
        if input_pos is not None:
            _check_range(input_pos, model.max_seq_len)
        if padding_of(mask, causal=True) is not None:
            assert isinstance(mask, Tensor)
            raise ValueError(
                f"mask (shape {tuple(mask.shape)}) must not be a padding mask [b, s]: input_pos tells a swapped model "
                "of padding on the left, by a 0 at all of it, and padding on the right changes nothing; pass input_pos"
            )
        heads = attention.num_heads
        if cache is not None:
            new = self._behind(cache, input_pos, tokens.shape, heads)
            check_cached_mask(mask, _of_rows(new, heads), model.decoder_max_cache_seq_len)
            assert input_pos is not None
            return args, {**kwargs, "input_pos": self._carrying((None, new), input_pos)}
        rows = self._documents(input_pos, tokens.shape)
        # A FlashDecoder tells its own layers.
        untold = mask is None and rows is not None and not isinstance(model, FlashDecoder)
        if untold and any(map(reads_mask, model.layers)):
            kwargs = {**kwargs, "mask": attention_mask(rows, None, None)}
        else:
            self._mask_checks.check(mask, rows, tokens, True, rows is not None, model.training)
        if input_pos is None:
            return None
        assert rows is not None
        return args, {**kwargs, "input_pos": self._carrying((rows.repeated(heads, tokens.shape[0]), None), input_pos)}

    def of(self, x: Tensor, input_pos: Tensor | None, heads: int, cache: DecodingCache | None) -> Placed:
        """Places of ``[b, s, d]`` inputs, for layers; one that is called by itself works out its own.

        Raises:
            ValueError: If there is an enabled cache and no ``input_pos``.
        """
        owner, placed = getattr(input_pos, _CARRIED, (None, (None, None)))
        if owner is self:
            return placed
        if cache is not None:
            return None, self._behind(cache, input_pos, x.shape, heads)
        rows = self._documents(input_pos, x.shape)
        return None if rows is None else rows.repeated(heads, x.shape[0]), None

    def _carrying(self, placed: Placed, input_pos: Tensor) -> Tensor:
        """The positions with their places, for this model's layers: a view, since other models may get the same."""
        carrying = input_pos.view_as(input_pos)
        setattr(carrying, _CARRIED, (self, placed))
        return carrying

    def _documents(self, input_pos: Tensor | None, shape: tuple[int, ...]) -> Segments | None:
        """Documents of the rows."""
        if input_pos is None:
            return None
        return make_segments(position_rows(input_pos, *shape[:2])).with_chunks(self.chunk_sizes)

    def _behind(self, cache: DecodingCache, input_pos: Tensor | None, shape: tuple[int, ...], heads: int) -> NewTokens:
        """Places behind a cache, a row for each head."""
        position = position_rows(cache.check_call(input_pos, shape[0], heads), *shape[:2])
        return cache.place(position.expand(shape[0], -1).repeat_interleave(heads, 0), self.chunk_sizes)


def _of_rows(new: NewTokens, heads: int) -> NewTokens:
    """The places of each row's first head, as masks know them."""
    return replace(new, position=new.position[::heads], begin=new.begin[::heads])


def _check_range(input_pos: Tensor, max_seq_len: int) -> None:
    """Refuse positions that the rotary tables lack, where it costs no waiting."""
    if input_pos.device.type != "cpu" or torch.compiler.is_compiling() or input_pos.numel() == 0:
        return
    low, high = int(input_pos.min()), int(input_pos.max())
    if low < 0 or high >= max_seq_len:
        raise ValueError(
            f"input_pos ({low if low < 0 else high}) must lie in [0, max_seq_len) = [0, {max_seq_len}); set "
            "model.max_seq_len higher, or restart positions with each document"
        )
