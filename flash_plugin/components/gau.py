"""The gated attention unit (paper section 2, equation 4): attention and MLP in one.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed, ``e`` expanded width, ``z`` query/key width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_plugin.components.cache import FlashCache
from flash_plugin.components.copies import local
from flash_plugin.components.mixers import MixedChunkMixer, QuadraticMixer
from flash_plugin.components.positions import RotaryPositions
from flash_plugin.kernels import Segments, offset_scale
from flash_plugin.kernels.new_tokens import NewTokens


class OffsetScale(nn.Module):
    """``x * gamma_i + beta_i`` for each i: cheap queries and keys from one shared base (paper section 2).

    Args:
        dim: Width z of the base.
        num_projections: How many queries and keys to make.
    """

    def __init__(self, dim: int, num_projections: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(num_projections, dim))
        self.beta = nn.Parameter(torch.empty(num_projections, dim))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw gamma ~ N(0, 0.02), beta = 0, as in the paper's pseudocode."""
        nn.init.normal_(self.gamma, std=0.02, generator=generator)
        nn.init.zeros_(self.beta)

    def forward(
        self, x: Tensor, *, angles: Tensor | None = None, silu: bool = False, impl: str = "auto"
    ) -> tuple[Tensor, ...]:
        """Project ``[b, s, z]`` to ``num_projections`` such tensors; see :func:`flash_plugin.kernels.offset_scale`."""
        gamma, beta = local(self.gamma, terms=True), local(self.beta, terms=True)
        return offset_scale(x, gamma, beta, angles=angles, silu=silu, impl=impl)


class GatedAttentionUnit(nn.Module):
    """``output_proj(silu(gate_proj(x)) * mix(q, k, silu(v_proj(x))))`` with q, k from ``silu(qk_proj(x))``.

    The three input projections are separate modules so that tensor parallelism can shard gate and values by plain
    columns and copy the queries' and keys' base, and LoRA can name them.

    Args:
        embed_dim: Width d of inputs and outputs.
        expanded_dim: Width e of gate and values.
        qk_dim: Width z of queries and keys.
        mixer: Attention, with its bias, normaliser and implementation.
        rotary: Rotation of queries and keys, shared by the layers of a model; None for no rotation.
        proj_bias: Whether the projections have biases.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        expanded_dim: int,
        qk_dim: int,
        mixer: QuadraticMixer | MixedChunkMixer,
        rotary: RotaryPositions | None = None,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.expanded_dim = expanded_dim
        self.qk_dim = qk_dim
        self.gate_proj = nn.Linear(embed_dim, expanded_dim, bias=proj_bias)
        self.v_proj = nn.Linear(embed_dim, expanded_dim, bias=proj_bias)
        self.qk_proj = nn.Linear(embed_dim, qk_dim, bias=proj_bias)
        self.offset_scale = OffsetScale(qk_dim, mixer.num_projections)
        self.rotary = rotary
        self.mixer = mixer
        self.output_proj = nn.Linear(expanded_dim, embed_dim, bias=proj_bias)
        # torchtune looks for these two names.
        self.kv_cache: FlashCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int, *, shift_dim: int = 0) -> None:
        """Set up and enable a decoding cache, in place of one that is there.

        Args:
            batch_size: Rows that every call will have.
            dtype: The model's dtype.
            max_seq_len: Tokens a row may have.
            shift_dim: Features of the last token that the layer keeps in it for its token shift.

        Raises:
            ValueError: If the mixer cannot decode token by token, or a size is no positive integer.
        """
        self.mixer.check_decodable()
        self.kv_cache = FlashCache(
            batch_size=batch_size,
            dtype=dtype,
            max_seq_len=max_seq_len,
            qk_dim=self.qk_dim,
            expanded_dim=self.expanded_dim,
            chunk_size=self.mixer.chunk_size,
            shift_dim=shift_dim,
        )
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Make the decoding cache forget all tokens."""
        if self.kv_cache is None:
            raise RuntimeError(
                "the cache (None) must be set up before it can be reset; call model.setup_caches() first"
            )
        self.kv_cache.reset()

    def forward(self, x: Tensor, segments: Segments | None = None, new: NewTokens | None = None) -> Tensor:
        """Mix ``[b, s, d]`` (normalised) inputs to ``[b, s, d]``.

        Args:
            x: Inputs, ``[b, s, d]``.
            segments: Documents and padding; None means one document a row.
            new: Where the tokens lie behind those in the cache, which then is read and written; in place of
                ``segments``.
        """
        gate, values = self.gate_proj(x), self.v_proj(x)
        angles = None
        if self.rotary is not None:
            placed = segments if new is None else new
            angles = self.rotary.angles(x.shape[1], None if placed is None else placed.position)
        qk = self.offset_scale(self.qk_proj(x), angles=angles, silu=True, impl=self.mixer.impl)
        # SiLU of gate and values is left to the op, which fuses it.
        if new is None:
            return self.output_proj(self.mixer(qk, values, gate, segments))
        assert self.kv_cache is not None
        mixed = self.mixer.decode(qk, values, gate, self.kv_cache, new)
        self.kv_cache.advance(new)
        return self.output_proj(mixed)
