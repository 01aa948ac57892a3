"""What is kept of an encoder's output while a decoder goes on, and what a mask over it may say.

Shape legend: ``b`` batch, ``t`` decoder tokens, ``s`` encoder tokens, ``e`` expanded width, ``z`` query/key width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_plugin.components.cache import HeldTokens
from flash_plugin.kernels.layout import state_dtype

_ROOM = "set the caches up with a larger encoder_max_seq_len, or call reset_caches() between prompts"


class EncoderCache(HeldTokens):
    """Keys and values of the encoder's tokens, or their sum, found by torchtune as ``kv_cache``.

    The quadratic form holds keys and values of ``max_seq_len`` encoder tokens, the linear form a sum whose size does
    not depend on how many came.

    Args:
        batch_size: Rows b; every call must have as many.
        dtype: Of keys and values, the model's; the sum is kept in float32 (float64 for float64).
        max_seq_len: Encoder tokens a row may have.
        qk_dim: Width z.
        expanded_dim: Width e.
        summed: Whether to hold the sum ``k^T v``, for the linear form, in place of keys and values.

    Attributes:
        size: Encoder tokens held, known on the host without waiting for an accelerator.

    Raises:
        ValueError: If a size is no positive integer, or ``dtype`` no floating point type.
    """

    real: Tensor
    keys: Tensor
    values: Tensor
    kv: Tensor

    def __init__(
        self, *, batch_size: int, dtype: torch.dtype, max_seq_len: int, qk_dim: int, expanded_dim: int, summed: bool
    ) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len, side="encoder")
        self.size = 0
        self._hold("real", torch.zeros(batch_size, max_seq_len, dtype=torch.bool))
        if summed:
            self._hold("kv", torch.zeros(batch_size, qk_dim, expanded_dim, dtype=state_dtype(dtype)))
        else:
            self._hold("keys", torch.zeros(batch_size, max_seq_len, qk_dim, dtype=dtype))
            self._hold("values", torch.zeros(batch_size, max_seq_len, expanded_dim, dtype=dtype))

    def reset(self) -> None:
        """Forget the encoder's tokens, in place."""
        for buffer in self.buffers():
            buffer.zero_()
        self.size = 0

    def check_room(self, rows: int, tokens: int) -> None:
        """Refuse a call of another number of rows, or more encoder tokens than fit behind those held."""
        if rows != self.batch_size:
            raise ValueError(
                f"x (batch size {rows}) must have the batch size of the cache ({self.batch_size}); set the cache up "
                "for it, or fill the batch up"
            )
        if self.size + tokens > self.max_seq_len:
            raise ValueError(
                f"encoder_input ({tokens} tokens behind {self.size} held) must fit the cache (encoder_max_seq_len "
                f"{self.max_seq_len}); {_ROOM}"
            )

    def add(self, real: Tensor, **fresh: Tensor) -> None:
        """Hold new encoder tokens behind those that are there.

        Args:
            real: False at padding among the new tokens, ``[1 or b, s]``.
            fresh: Either ``keys`` ``[b, s, z]`` and ``values`` ``[b, s, e]`` of the new tokens, or ``kv``
                ``[b, z, e]``, the sum over all tokens.
        """
        new = slice(self.size, self.size + real.shape[-1])
        self.real[:, new] = real
        for name, tensor in fresh.items():
            held = self.get_buffer(name)
            (held if name == "kv" else held[:, new]).copy_(tensor.detach())
        self.size = new.stop


def fit_mask(mask: object, rows: int, tokens: int, keys: int, places: int | None) -> Tensor | None:
    """Return a mask over encoder tokens as ``[1 or b, 1 or t, s]``, or None for none.

    Args:
        mask: ``[b, t, s]`` bool as torchtune makes it, True where token t may see encoder token s; an axis of b or t
            may be 1. Or ``[b, s]``, True at real encoder tokens.
        rows: Rows b of the batch.
        tokens: Decoder tokens t.
        keys: Encoder tokens s, those in the cache included.
        places: Length the cache was set up with, which the mask may have in place of s with False behind s; None
            without a cache.

    Raises:
        ValueError: If it is no such mask.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"encoder_mask ({kind}) must be a bool tensor, True where a token may see; convert it")
    fitting = mask[:, None] if mask.dim() == 2 else mask
    widths = (keys,) if places is None else (keys, places)
    if (
        fitting.dim() != 3
        or fitting.shape[0] not in ((rows,) if mask.dim() == 2 else (1, rows))
        or fitting.shape[1] not in (1, tokens)
        or fitting.shape[2] not in widths
    ):
        cached = "" if places is None else f" (s may be encoder_max_seq_len, {places}, too)"
        raise ValueError(
            f"encoder_mask (shape {tuple(mask.shape)}) must be [b, t, s] = {(rows, tokens, keys)}, or [b, s] for "
            f"padding{cached}; make it for these tokens and this encoder_input"
        )
    if fitting.shape[2] > keys:
        _must_hold(
            ~fitting[..., keys:],
            f"encoder_mask must be False behind the {keys} encoder tokens that the cache holds; pass encoder_input "
            "before it is looked at",
        )
    return fitting[..., :keys]


def check_padding(visible: Tensor, real: Tensor) -> None:
    """Refuse what the linear form cannot honour: tokens that see some of the real encoder tokens and not others.

    On an accelerator, and in a compiled graph, such a mask stops the program without saying where, and nothing waits
    for it.

    Args:
        visible: ``[1 or b, 1 or t, s]``.
        real: Encoder tokens that the sum is taken over, ``[1 or b, s]``.

    Raises:
        ValueError: If a token neither sees exactly the real ones nor none.
    """
    nothing = ~visible.any(dim=-1, keepdim=True)
    _must_hold(
        (visible == real[:, None]) | nothing,
        "encoder_mask must show a token all encoder tokens that are no padding, or none, with form='linear', which "
        "sums over them once; build the unit with form='quadratic'",
    )


def _must_hold(rule: Tensor, sentence: str) -> None:
    """Raise the sentence, with the first place ``[b, t, s]`` that breaks the rule, or assert where that would wait."""
    if rule.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(rule.all(), sentence)
    elif not rule.all():
        row, t, s = (~rule).nonzero()[0].tolist()
        raise ValueError(f"{sentence} (wrong at row {row}, token {t}, encoder token {s} of those it names)")
