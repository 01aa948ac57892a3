"""Mixers: which attention a gated attention unit uses, with its bias and normaliser.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` expanded width, ``c`` chunk size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flash_plugin.components.cache import FlashCache
from flash_plugin.kernels import ACTIVATIONS, Segments, mixed_chunk_attention, quadratic_attention
from flash_plugin.kernels.decode import mixed_chunk_decode, quadratic_decode, tokens_held
from flash_plugin.kernels.layout import state_dtype
from flash_plugin.kernels.new_tokens import NewTokens
from flash_plugin.kernels.validation import check_attention, check_choice, check_chunk_size, is_number

# Length of the texts at which softmax_plus is softmax: that of GAU-alpha's pretraining.
_PLUS_LENGTH = 512


class _Mixer(nn.Module):
    """The choices both mixers share; see :func:`flash_plugin.kernels.mixed_chunk_attention` for their meaning.

    Args:
        position_bias: Module that gives the bias vector for a length, or None.
        activation: Attention function.
        normalizer: What divides the sums.
        causal: Whether tokens see only what lies before them.
        dropout: Probability of zeroing an attention weight in training.
        impl: Implementation of the op.
    """

    num_projections: int
    chunk_size: int | None = None
    # Normalisers that give a token the same output whatever follows it.
    decodable: tuple[str, ...]

    def __init__(
        self,
        *,
        position_bias: nn.Module | None = None,
        activation: str = "relu2",
        normalizer: str = "visible",
        causal: bool = True,
        dropout: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_attention(activation=activation, normalizer=normalizer, dropout=dropout, impl=impl)
        self.position_bias = position_bias
        self.activation = activation
        self.normalizer = normalizer
        self.causal = causal
        self.dropout = dropout
        self.impl = impl

    def check_decodable(self) -> None:
        """Refuse to decode token by token what would not be what the model gives to whole sequences.

        Raises:
            ValueError: If tokens see later ones, or the normaliser divides by the length of the sequence.
        """
        if not self.causal:
            raise ValueError(
                "causal (False) must be True to decode with a cache: each new token changes what all others see; "
                "set enable_kv_cache=False"
            )
        if self.normalizer not in self.decodable:
            raise ValueError(
                f"normalizer ({self.normalizer!r}) must be {' or '.join(self.decodable)} to decode with a cache: this "
                "one divides by the length of the sequence, which each new token changes; set enable_kv_cache=False, "
                "or train with model.normalizer=visible"
            )

    def _bias(self, length: int) -> Tensor | None:
        return None if self.position_bias is None else self.position_bias(length)

    def _choices(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "dropout": self.dropout if self.training else 0.0,
            "impl": self.impl,
        }


class QuadraticMixer(_Mixer):
    """FLASH-Quad: every token attends to its whole document (paper section 2).

    Args:
        activation: As for every mixer, or ``softmax_plus`` (Su 2021, GAU-alpha's): softmax whose scores are multiplied
            by log(keys visible to the token) / log 512, so that it is as sharp in texts of any length. A bias is not
            multiplied.
        scale: Factor of q.k in place of the normaliser's default.
        choices: What every mixer has.

    Raises:
        ValueError: If an argument is unknown or out of range.
    """

    num_projections = 2
    decodable = ("visible",)

    def __init__(self, *, activation: str = "relu2", scale: float | None = None, **choices: Any) -> None:
        check_choice("activation", activation, (*ACTIVATIONS, "softmax_plus"))
        if scale is not None and (not is_number(scale) or not scale > 0):
            raise ValueError(f"scale ({scale!r}) must be a positive number; set scale=None for the normaliser's own")
        self.sharpened = activation == "softmax_plus"
        super().__init__(activation="softmax" if self.sharpened else activation, **choices)
        self.scale = scale

    def forward(self, qk: tuple[Tensor, ...], v: Tensor, gate: Tensor, segments: Segments | None) -> Tensor:
        """Mix values and gate the result.

        Args:
            qk: Queries and keys, each ``[b, s, z]``.
            v: Values before SiLU, ``[b, s, e]``.
            gate: Gate before SiLU, ``[b, s, e]``.
            segments: Documents and padding.

        Returns:
            ``[b, s, e]``.
        """
        q, k = qk
        if self.sharpened:
            q = _sharpen(q, _visible_keys(segments, v, self.causal))
        return quadratic_attention(
            q,
            k,
            v,
            gate=gate,
            bias=self._bias(v.shape[1]),
            segments=segments,
            causal=self.causal,
            normalizer=self.normalizer,
            scale=self.scale,
            silu=True,
            **self._choices(),
        )

    def decode(self, qk: tuple[Tensor, ...], v: Tensor, gate: Tensor, cache: FlashCache, new: NewTokens) -> Tensor:
        """Mix the values of new tokens and of those in the cache, which keeps the new ones; as :meth:`forward`."""
        q, k = qk
        if self.sharpened:
            q = _sharpen(q, new.position - new.begin + 1)
        memory = cache.document_memory()
        bias = self._bias(tokens_held(memory, new))
        return quadratic_decode(q, k, v, gate, memory, new, bias=bias, scale=self.scale, **self._choices())


def _sharpen(q: Tensor, visible: Tensor) -> Tensor:
    """Queries ``[b, s, z]`` times log(keys visible to each, ``[1 or b, s]``) / log 512."""
    factor = visible.clamp(min=1).to(state_dtype(q.dtype)).log() / math.log(_PLUS_LENGTH)
    return q * factor[..., None].to(q.dtype)


def _visible_keys(segments: Segments | None, v: Tensor, causal: bool) -> Tensor:
    """How many keys each token of ``v`` ``[b, s, e]`` sees, ``[1 or b, s]``."""
    index = torch.arange(v.shape[1], device=v.device)[None]
    if segments is None:
        return index + 1 if causal else torch.full_like(index, v.shape[1])
    return (index + 1 if causal else segments.end) - segments.start


class MixedChunkMixer(_Mixer):
    """FLASH: quadratic inside chunks of ``chunk_size`` tokens, linear across them (paper section 3.1)."""

    num_projections = 4
    decodable = ("visible", "chunk")
    chunk_size: int

    def __init__(self, chunk_size: int, **choices: Any) -> None:
        super().__init__(**choices)
        check_chunk_size(chunk_size)
        self.chunk_size = chunk_size

    def forward(self, qk: tuple[Tensor, ...], v: Tensor, gate: Tensor, segments: Segments | None) -> Tensor:
        """Mix values and gate the result.

        Args:
            qk: Local queries and keys, then global queries and keys, each ``[b, s, z]``.
            v: Values before SiLU, ``[b, s, e]``.
            gate: Gate before SiLU, ``[b, s, e]``.
            segments: Documents and padding.

        Returns:
            ``[b, s, e]``.
        """
        q_local, k_local, q_global, k_global = qk
        out = mixed_chunk_attention(
            q_local,
            k_local,
            q_global,
            k_global,
            v,
            chunk_size=self.chunk_size,
            gate=gate,
            bias=self._bias(self.chunk_size),
            segments=segments,
            causal=self.causal,
            normalizer=self.normalizer,
            silu=True,
            **self._choices(),
        )
        assert isinstance(out, Tensor)
        return out

    def decode(self, qk: tuple[Tensor, ...], v: Tensor, gate: Tensor, cache: FlashCache, new: NewTokens) -> Tensor:
        """Mix the values of new tokens and of those in the cache, which keeps the new ones; as :meth:`forward`."""
        q_local, k_local, q_global, k_global = qk
        return mixed_chunk_decode(
            q_local,
            k_local,
            q_global,
            k_global,
            v,
            gate,
            cache.chunk_memory(),
            new,
            chunk_size=self.chunk_size,
            bias=self._bias(self.chunk_size),
            normalizer=self.normalizer,
            **self._choices(),
        )
