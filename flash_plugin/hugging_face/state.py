"""What ``transformers`` hands from one step of generation to the next as ``past_key_values``.

Shape legend: ``b`` batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchtune.modules import KVCache, delete_kv_caches

from flash_plugin.components.cache import DecodingCache
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.gau import GatedAttentionUnit
from flash_plugin.components.mixers import MixedChunkMixer

# Tokens that growing caches have room for at first.
_FIRST_CAPACITY = 256


class FlashState:
    """The decoding caches of all layers, lent to the model for the length of a call.

    FLASH layers' have a constant size. Those of FLASH-Quad and softmax attention layers grow with the text, as far as
    ``max_seq_len``: each time they are full, to twice their size. It is changed in place; ``copy.deepcopy`` keeps one.

    Args:
        decoder: The model.
        batch_size: Rows b; every call must have as many.

    Raises:
        ValueError: If the model cannot decode token by token.
    """

    # What generation asks of a cache before it compiles a step.
    is_compileable = False

    def __init__(self, decoder: FlashDecoder, batch_size: int) -> None:
        self.batch_size = batch_size
        self._tokens = 0
        self._grows = not all(_is_constant(layer.attn) for layer in decoder.layers)
        self._capacity = min(_FIRST_CAPACITY, decoder.max_seq_len) if self._grows else decoder.max_seq_len
        self._caches = self._make(decoder)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens a row was given, padding included; the same in all layers."""
        return self._tokens

    def next_position(self) -> Tensor:
        """The position ``[b, 1]`` of a token that goes on with its row's document."""
        cursor = next(cache.cursor for cache in self._caches if isinstance(cache, DecodingCache))
        return cursor[:, 1:2] + 1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i what row ``beam_idx[i]`` was; ``beam_idx`` is ``[b]``."""
        with torch.no_grad():
            for cache in self._caches:
                for name, buffer in cache.named_buffers():
                    if not _is_shared(cache, name):
                        buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    @contextmanager
    def lent(self, decoder: FlashDecoder, new_tokens: int) -> Iterator[None]:
        """Put the caches into the model, with room for ``new_tokens`` more, and take them out again.

        Raises:
            ValueError: If the model's ``max_seq_len`` would be exceeded.
        """
        self._make_room(decoder, self._tokens + new_tokens)
        for layer, cache in zip(decoder.layers, self._caches, strict=True):
            layer.attn.kv_cache, layer.attn.cache_enabled = cache, True
        decoder.decoder_max_cache_seq_len = self._capacity
        try:
            yield
            self._tokens += new_tokens
        finally:
            delete_kv_caches(decoder)
            decoder.decoder_max_cache_seq_len = None

    def _make_room(self, decoder: FlashDecoder, tokens: int) -> None:
        if tokens > decoder.max_seq_len and not self._grows and not decoder.unlimited_decoding:
            # Padding has no positions of its own. Reading them waits for the device, but no earlier than here.
            tokens = int(self.next_position().max()) + tokens - self._tokens
        elif not self._grows or tokens <= self._capacity:
            return
        if tokens > decoder.max_seq_len:
            raise ValueError(
                f"the prompt and what follows it ({tokens} tokens a row, padding included) must not exceed max_seq_len "
                f"({decoder.max_seq_len}); ask for fewer tokens (max_new_tokens), or shorten the prompts"
            )
        if not self._grows:
            return
        while self._capacity < tokens:
            self._capacity = min(2 * self._capacity, decoder.max_seq_len)
        larger = self._make(decoder)
        with torch.no_grad():
            for cache, roomier in zip(self._caches, larger, strict=True):
                self._move(cache, roomier)
        self._caches = larger

    def _move(self, cache: nn.Module, roomier: nn.Module) -> None:
        """Fill the beginning of ``roomier`` with what ``cache`` holds."""
        if isinstance(cache, DecodingCache) and isinstance(roomier, DecodingCache):
            roomier.empty = cache.empty
        for name, buffer in cache.named_buffers():
            target = roomier.get_buffer(name)
            if _is_shared(cache, name):
                target.add_(self._tokens)
            else:
                target[tuple(slice(size) for size in buffer.shape)].copy_(buffer)

    def _make(self, decoder: FlashDecoder) -> list[nn.Module]:
        weight = decoder.tok_embeddings.weight
        with torch.device(weight.device):
            decoder.setup_caches(self.batch_size, weight.dtype, decoder_max_seq_len=self._capacity)
        caches = [layer.attn.kv_cache for layer in decoder.layers]
        delete_kv_caches(decoder)
        return caches


def _is_constant(attention: nn.Module) -> bool:
    return isinstance(attention, GatedAttentionUnit) and isinstance(attention.mixer, MixedChunkMixer)


def _is_shared(cache: nn.Module, buffer: str) -> bool:
    """Whether all rows share a buffer: the places that torchtune's next tokens take, which count on from 0."""
    return isinstance(cache, KVCache) and buffer == "cache_pos"
