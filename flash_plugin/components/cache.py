"""Decoding caches.

Shape legend: ``b`` batch, ``s`` new tokens, ``e`` expanded width, ``z`` query/key width, ``c`` chunk size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flash_plugin.kernels.decode import ChunkMemory, DocumentMemory
from flash_plugin.kernels.layout import LinearState, state_dtype
from flash_plugin.kernels.new_tokens import NewTokens, empty_cursor, place_new_tokens


class HeldTokens(nn.Module):
    """What all caches share: buffers of checked sizes that are no part of a model's state dict.

    They carry no gradients from call to call.

    Args:
        batch_size: Rows b; every call must have as many.
        dtype: The model's.
        max_seq_len: Tokens a row may have.
        side: ``decoder`` or ``encoder``, whose tokens they are.

    Raises:
        ValueError: If a size is no positive integer, or ``dtype`` no floating point type.
    """

    def __init__(self, *, batch_size: int, dtype: torch.dtype, max_seq_len: int, side: str) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), (f"{side}_max_seq_len", max_seq_len)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} ({size!r}) must be a positive integer; pass setup_caches({name}=...) one")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype ({dtype}) must be a floating point type; pass the model's to setup_caches")
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len

    def _hold(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)


class DecodingCache(HeldTokens):
    """What all decoding caches share: the cursor.

    Args:
        batch_size: Rows b; every call must have as many.
        dtype: The model's.
        max_seq_len: Tokens a row may have.

    Raises:
        ValueError: If a size is no positive integer, or ``dtype`` no floating point type.
    """

    cursor: Tensor

    def __init__(self, *, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len, side="decoder")
        # Known on the host without waiting for an accelerator.
        self.empty = True
        self._hold("cursor", empty_cursor(batch_size))

    def reset(self) -> None:
        """Forget all tokens, in place."""
        for buffer in self.buffers():
            buffer.zero_()
        self.cursor.copy_(empty_cursor(self.batch_size, self.cursor.device))
        self.empty = True

    def check_call(self, input_pos: Tensor | None, batch: int, heads: int = 1) -> Tensor:
        """Return ``input_pos`` of a call of ``batch`` rows, each of which has ``heads`` rows here.

        Raises:
            ValueError: If there is none, or the cache has another number of rows.
        """
        if input_pos is None:
            raise ValueError(
                "input_pos (None) must be given while the cache is enabled; pass each token's position in its "
                "document, or disable the cache"
            )
        if batch * heads != self.batch_size:
            raise ValueError(
                f"tokens (batch size {batch}) must have the batch size of the cache ({self.batch_size // heads}); "
                "set the cache up for it, or fill the batch up"
            )
        return input_pos

    def place(self, position: Tensor, chunk_sizes: Iterable[int] = ()) -> NewTokens:
        """Where tokens at ``position`` ``[1 or b, s]`` lie behind those held; see :func:`place_new_tokens`."""
        return place_new_tokens(self.cursor, position, chunk_sizes=chunk_sizes, empty=self.empty)

    def advance(self, new: NewTokens) -> None:
        """Count the new tokens, once their layer has kept what it needs of them."""
        self.cursor.copy_(new.cursor)
        if self.empty:
            self.empty = False


class FlashCache(DecodingCache):
    """What a layer keeps of the tokens behind it, found by torchtune as ``kv_cache``.

    With a ``chunk_size`` (FLASH) its size does not depend on how many tokens came: keys and values of the current
    chunk, and a sum over the document in float32 (float64 for float64). Without (FLASH-Quad) it holds keys and values
    of ``max_seq_len`` tokens, padding and earlier documents included.

    Args:
        batch_size: Rows b; every call must have as many.
        dtype: Of keys, values and the shifted features; the model's.
        max_seq_len: Tokens a row may have.
        qk_dim: Width z.
        expanded_dim: Width e.
        chunk_size: Tokens of a chunk, c; None for FLASH-Quad.
        shift_dim: Features of the last token that are kept for a token shift; 0 for none.

    Raises:
        ValueError: If a size is no positive integer, or ``dtype`` no floating point type.
    """

    keys: Tensor
    values: Tensor
    global_keys: Tensor
    kv: Tensor
    shifted: Tensor

    def __init__(
        self,
        *,
        batch_size: int,
        dtype: torch.dtype,
        max_seq_len: int,
        qk_dim: int,
        expanded_dim: int,
        chunk_size: int | None,
        shift_dim: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len)
        self.chunk_size = chunk_size
        held = max_seq_len if chunk_size is None else chunk_size
        self._hold("keys", torch.zeros(batch_size, held, qk_dim, dtype=dtype))
        self._hold("values", torch.zeros(batch_size, held, expanded_dim, dtype=dtype))
        if chunk_size is not None:
            self._hold("global_keys", torch.zeros(batch_size, held, qk_dim, dtype=dtype))
            self._hold("kv", torch.zeros(batch_size, qk_dim, expanded_dim, dtype=state_dtype(dtype)))
        if shift_dim:
            self._hold("shifted", torch.zeros(batch_size, shift_dim, dtype=dtype))

    def chunk_memory(self) -> ChunkMemory:
        """What FLASH's attention reads and writes."""
        return ChunkMemory(self.keys, self.global_keys, self.values, self.kv)

    def document_memory(self) -> DocumentMemory:
        """What FLASH-Quad's attention reads and writes."""
        return DocumentMemory(self.keys, self.values)

    def place(self, position: Tensor, chunk_sizes: Iterable[int] = ()) -> NewTokens:
        """Where tokens at ``position`` ``[1 or b, s]`` lie behind those held; see :func:`place_new_tokens`.

        Raises:
            ValueError: If FLASH-Quad's keys and values do not fit any more (checked where it costs no waiting).
        """
        new = super().place(position, chunk_sizes)
        if self.chunk_size is None and position.device.type == "cpu" and not torch.compiler.is_compiling():
            tokens = int(new.index[-1]) + 1
            if tokens > self.max_seq_len:
                raise ValueError(
                    f"the cache (decoder_max_seq_len {self.max_seq_len}) must hold the {tokens} tokens it was given, "
                    "padding and earlier documents included; set it up for more, or call reset_caches() between prompts"
                )
        return new

    def shift(self, features: Tensor, new: NewTokens) -> Tensor:
        """Return the features ``[b, 1, d/2]`` of the token before the first new one (0 at a document's start).

        Then keep those of the last new one; ``features`` are all new tokens', ``[b, s, d/2]``.
        """
        before = self.shifted.to(features.dtype).masked_fill(~new.continues[:, None], 0.0)
        self.shifted.copy_(features[:, -1].detach())
        return before[:, None]


class LinearCache(DecodingCache):
    """What linear attention keeps of the tokens behind it, of a size that does not depend on how many came.

    Args:
        batch_size: Rows b; every call must have as many.
        dtype: The model's; the sums are kept in float32 (float64 for float64).
        max_seq_len: Tokens a row may have.
        qk_dim: Width z of queries and keys.
        value_dim: Width e of values.

    Raises:
        ValueError: If a size is no positive integer, or ``dtype`` no floating point type.
    """

    kv: Tensor
    key_sum: Tensor

    def __init__(self, *, batch_size: int, dtype: torch.dtype, max_seq_len: int, qk_dim: int, value_dim: int) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len)
        self._hold("kv", torch.zeros(batch_size, 1, qk_dim, value_dim, dtype=state_dtype(dtype)))
        self._hold("key_sum", torch.zeros(batch_size, 1, qk_dim, dtype=state_dtype(dtype)))

    def state(self, new: NewTokens) -> LinearState:
        """What lies before the new tokens: nothing in rows where they begin a document."""
        stale = ~new.continues
        kv, key_sum = (
            self.kv.masked_fill(stale[:, None, None, None], 0.0),
            self.key_sum.masked_fill(stale[:, None, None], 0.0),
        )
        return LinearState(kv, new.position[:, 0] - new.begin[:, 0], key_sum)

    def keep(self, state: LinearState) -> None:
        """Keep the state behind the new tokens."""
        assert state.key_sum is not None
        self.kv.copy_(state.kv.detach())
        self.key_sum.copy_(state.key_sum.detach())
