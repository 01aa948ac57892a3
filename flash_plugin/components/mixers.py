"""Mixers: which attention a gated attention unit uses, with its bias and normaliser.

Shape legend: ``b`` batch, ``s`` sequence, ``z`` query/key width, ``e`` expanded width, ``c`` chunk size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flash_plugin.kernels import Segments, mixed_chunk_attention, quadratic_attention
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

    def _choices(self, length: int) -> dict[str, Any]:
        return {
            "bias": None if self.position_bias is None else self.position_bias(length),
            "causal": self.causal,
            "activation": self.activation,
            "normalizer": self.normalizer,
            "dropout": self.dropout if self.training else 0.0,
            "impl": self.impl,
            "silu": True,
        }


class QuadraticMixer(_Mixer):
    """FLASH-Quad: every token attends to its whole document (paper section 2)."""

    num_projections = 2

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
        return quadratic_attention(q, k, v, gate=gate, segments=segments, **self._choices(v.shape[1]))


class MixedChunkMixer(_Mixer):
    """FLASH: quadratic inside chunks of ``chunk_size`` tokens, linear across them (paper section 3.1)."""

    num_projections = 4

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
            segments=segments,
            **self._choices(self.chunk_size),
        )
        assert isinstance(out, Tensor)
        return out
