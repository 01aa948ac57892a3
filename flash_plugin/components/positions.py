"""How a FLASH model knows where tokens are: rotary queries and keys, absolute sinusoids, relative biases.

Every relative bias depends on t - s alone (query index minus key index) and is given to the ops as one vector of
length 2 L - 1 over that difference; an L x L matrix is never built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchtune.modules import RotaryPositionalEmbeddings

from flash_plugin.components.copies import local

POSITION_BIASES = ("none", "rope", "toeplitz", "t5")


def position_rows(input_pos: Tensor, batch: int, length: int) -> Tensor:
    """Return ``input_pos`` as ``[1 or b, s]``; torchtune also passes ``[s]``, ``[b]`` for one token a row, and ``[]``.

    Raises:
        ValueError: If there is not one position for each token.
    """
    position = input_pos
    if position.dim() < 2:
        position = position.reshape(-1, 1) if length == 1 else position[None]
    if position.dim() != 2 or position.shape[0] not in (1, batch) or position.shape[1] != length:
        raise ValueError(
            f"input_pos (shape {tuple(input_pos.shape)}) must be [b, s] or [s] for tokens of shape "
            f"{(batch, length)}; pass one position for each token"
        )
    return position


class RotaryPositions(RotaryPositionalEmbeddings):
    """Rotary embeddings (Su et al. 2021) on the first ``dim`` features of ``[b, s, z]`` queries and keys.

    Angles and the pairing of neighbouring features are torchtune's (and FLASH-pytorch's), and so is the table with its
    ``rope_init``; only the rotation is our own, and :func:`flash_plugin.kernels.offset_scale` does it.

    Args:
        dim: How many features rotate; even.
        max_seq_len: Length of the table.
        base: Base of the geometric progression of wavelengths.
        unlimited: Compute angles at any position in place of a table, in float64: far positions stay exact.
    """

    def __init__(self, dim: int, max_seq_len: int, base: float, *, unlimited: bool = False) -> None:
        super().__init__(dim, 0 if unlimited else max_seq_len, base)
        self.unlimited = unlimited

    def angles(self, length: int, position: Tensor | None) -> Tensor:
        """Cosine and sine at each token, ``[s, dim / 2, 2]``, or ``[b, s, dim / 2, 2]`` for given positions."""
        if not self.unlimited:
            return self.cache[:length] if position is None else self.cache[position]
        if position is None:
            position = torch.arange(length, device=self.cache.device)
        exponent = torch.arange(0, self.dim, 2, device=position.device, dtype=torch.float64) / self.dim
        angle = position[..., None].double() * self.base**-exponent
        return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


class ScaledSinusoid(nn.Module):
    """Absolute sinusoidal embeddings with a learned scale that starts at ``dim**-0.5`` (paper section 4).

    Args:
        dim: Width of the embedding; even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"embed_dim ({dim}) must be even for absolute_position; set absolute_position=False")
        self.dim = dim
        self.scale = nn.Parameter(torch.full((1,), dim**-0.5))

    def forward(self, position: Tensor) -> Tensor:
        """Embed ``[b, s]`` positions as ``[b, s, dim]`` in the dtype of the scale.

        Angles are float32 whatever the model's dtype: in bfloat16 positions beyond 256 would collapse.
        """
        exponent = torch.arange(0, self.dim, 2, device=position.device, dtype=torch.float32) / self.dim
        angle = position[..., None].float() * 10000.0**-exponent
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.scale.dtype) * local(self.scale)


class ToeplitzBias(nn.Module):
    """One learned number for each distance (paper appendix, for short sequences).

    Args:
        max_length: Largest L the bias is asked for.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.weight = nn.Parameter(torch.zeros(2 * max_length - 1))

    def forward(self, length: int) -> Tensor:
        """The bias over t - s for ``length`` tokens, ``[2 length - 1]``."""
        return local(self.weight, terms=True)[self.max_length - length : self.max_length + length - 1]


class RopeBias(nn.Module):
    """``a^T R_{t-s} b`` with learned a, b and the rotation R of rotary embeddings (paper appendix, long sequences).

    Args:
        dim: Size of a and b; even.
        base: Base of the geometric progression of wavelengths.
    """

    def __init__(self, dim: int, base: float = 10000) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"qk_dim ({dim}) must be even for position_bias='rope'; set qk_dim={dim + 1}")
        self.dim = dim
        self.base = base
        self.a = nn.Parameter(torch.zeros(dim))
        self.b = nn.Parameter(torch.zeros(dim))

    def forward(self, length: int) -> Tensor:
        """The bias over t - s for ``length`` tokens, ``[2 length - 1]``."""
        a, b = local(self.a, terms=True), local(self.b, terms=True)
        distance = torch.arange(1 - length, length, device=a.device, dtype=torch.float32)
        exponent = torch.arange(0, self.dim, 2, device=a.device, dtype=torch.float32) / self.dim
        angle = distance[:, None] * self.base**-exponent
        (a0, a1), (b0, b1) = a.unflatten(0, (-1, 2)).unbind(-1), b.unflatten(0, (-1, 2)).unbind(-1)
        # (R_t a) . (R_s b) for each pair of features: Re(a conj(b) exp(i (t - s) theta)).
        return angle.cos().to(a.dtype) @ (a0 * b0 + a1 * b1) - angle.sin().to(a.dtype) @ (a1 * b0 - a0 * b1)


class T5Bias(nn.Module):
    """T5's bucketed distances (Raffel et al. 2020, section 2.1), times a constant, as FLASH-pytorch has it.

    Args:
        multiplier: Factor of the learned values; FLASH-pytorch's is sqrt(z) in FLASH and sqrt(d) in its GAU.
        causal: Whether only t >= s has buckets of its own.
        num_buckets: Number of learned values.
        max_distance: Distance from which on all share the last bucket.
        divide_by_length: Divide by L, as FLASH-pytorch's GAU does.
    """

    #: Bucket of each t - s from -max_distance to max_distance, int64.
    buckets: Tensor

    def __init__(
        self,
        multiplier: float,
        causal: bool,
        num_buckets: int = 32,
        max_distance: int = 128,
        divide_by_length: bool = False,
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.causal = causal
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.divide_by_length = divide_by_length
        self.weight = nn.Parameter(torch.zeros(num_buckets))
        self.rope_init()

    def rope_init(self) -> None:
        """Fill the table of buckets, which checkpoints do not have, on the default device.

        Recipes ask for it behind meta, by torchtune's name for it. A logarithm is rounded as the CPU does on all
        devices: at 16, 32 and 64 another rounding could be another bucket.
        """
        distance = torch.arange(-self.max_distance, self.max_distance + 1, device="cpu")
        buckets = self._bucket(distance).to(torch.get_default_device())
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, length: int) -> Tensor:
        """The bias over t - s for ``length`` tokens, ``[2 length - 1]``."""
        values = local(self.weight, terms=True) * self.multiplier
        if self.divide_by_length:
            values = values / length
        reach, buckets = self.max_distance, local(self.buckets)
        # More than enough at both ends: how much is missing depends on the length, and so would a compiled graph.
        buckets = torch.cat([buckets[:1].expand(length), buckets, buckets[-1:].expand(length)])
        buckets = buckets[reach + 1 : reach + 2 * length]
        if not (torch.is_grad_enabled() and values.requires_grad):
            return values.index_select(0, buckets)
        # The same, as a sum: the gradient of a lookup adds atomically on CUDA, in another order each time.
        each = torch.arange(self.num_buckets, device=buckets.device)[:, None]
        return values[:, None].masked_fill(buckets != each, 0.0).sum(0, dtype=values.dtype)

    def _bucket(self, distance: Tensor) -> Tensor:
        buckets, offset = self.num_buckets, torch.zeros_like(distance)
        if self.causal:
            distance = distance.clamp(min=0)
        else:
            # Half of the buckets for keys behind the query, half for those ahead of it.
            buckets //= 2
            offset = (distance < 0) * buckets
            distance = distance.abs()
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        coarse = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return torch.where(distance < exact, distance, coarse) + offset


def build_position_bias(name: str, *, qk_dim: int, rope_base: float, max_length: int, causal: bool) -> nn.Module | None:
    """Build the relative bias called ``name`` for at most ``max_length`` tokens.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "none":
        return None
    if name == "rope":
        return RopeBias(qk_dim, rope_base)
    if name == "toeplitz":
        return ToeplitzBias(max_length)
    if name == "t5":
        return T5Bias(multiplier=qk_dim**0.5, causal=causal)
    raise ValueError(
        f"position_bias ({name!r}) must be one of {', '.join(POSITION_BIASES)}; set position_bias to one of them"
    )
