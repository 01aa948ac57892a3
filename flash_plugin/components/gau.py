"""The gated attention unit (paper section 2, equation 4): attention and MLP in one.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed, ``e`` expanded width, ``z`` query/key width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_plugin.components.mixers import MixedChunkMixer, QuadraticMixer
from flash_plugin.components.positions import RotaryPositions
from flash_plugin.kernels import Segments


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

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Project ``[b, s, z]`` to ``num_projections`` tensors of that shape."""
        pairs = zip(self.gamma.unbind(0), self.beta.unbind(0), strict=True)
        return tuple(torch.addcmul(beta, x, gamma) for gamma, beta in pairs)


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
        self.gate_proj = nn.Linear(embed_dim, expanded_dim, bias=proj_bias)
        self.v_proj = nn.Linear(embed_dim, expanded_dim, bias=proj_bias)
        self.qk_proj = nn.Linear(embed_dim, qk_dim, bias=proj_bias)
        self.offset_scale = OffsetScale(qk_dim, mixer.num_projections)
        self.rotary = rotary
        self.mixer = mixer
        self.output_proj = nn.Linear(expanded_dim, embed_dim, bias=proj_bias)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        """Mix ``[b, s, d]`` (normalised) inputs to ``[b, s, d]``; ``segments`` None means one document a row."""
        gate, values = self.gate_proj(x), self.v_proj(x)
        qk = self.offset_scale(F.silu(self.qk_proj(x)))
        if self.rotary is not None:
            angles = self.rotary.angles(x.shape[1], None if segments is None else segments.position)
            qk = tuple(self.rotary(projection, angles) for projection in qk)
        # SiLU of gate and values is left to the op, which fuses it.
        return self.output_proj(self.mixer(qk, values, gate, segments))
