"""Mixers: which attention a gated attention unit uses, with its bias and normaliser.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` expanded width, ``c`` chunk size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flash_plugin.components.cache import FlashCache
from flash_plugin.kernels import Segments, mixed_chunk_attention, quadratic_attention
from flash_plugin.kernels.decode import mixed_chunk_decode, quadratic_decode, tokens_held
from flash_plugin.kernels.new_tokens import NewTokens
from flash_plugin.kernels.validation import check_attention, check_chunk_size


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
    """FLASH-Quad: every token attends to its whole document (paper section 2)."""

    num_projections = 2
    decodable = ("visible",)

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
        return quadratic_attention(
            q,
            k,
            v,
            gate=gate,
            bias=self._bias(v.shape[1]),
            segments=segments,
            causal=self.causal,
            normalizer=self.normalizer,
            silu=True,
            **self._choices(),
        )

    def decode(self, qk: tuple[Tensor, ...], v: Tensor, gate: Tensor, cache: FlashCache, new: NewTokens) -> Tensor:
        """Mix the values of new tokens and of those in the cache, which keeps the new ones; as :meth:`forward`."""
        q, k = qk
        memory = cache.document_memory()
        bias = self._bias(tokens_held(memory, new))
        return quadratic_decode(q, k, v, gate, memory, new, bias=bias, **self._choices())


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
