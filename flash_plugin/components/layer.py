"""One FLASH layer: norm, optional token shift, gated attention unit, residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer

from flash_plugin.components.gau import GatedAttentionUnit
from flash_plugin.components.norms import RMSNorm, ScaleNorm
from flash_plugin.components.positions import position_rows
from flash_plugin.kernels import Segments, make_segments
from flash_plugin.kernels.new_tokens import NewTokens
from flash_plugin.kernels.token_shift import shift_half, shift_tokens


class FlashLayer(TransformerSelfAttentionLayer):
    """``x + attn(shift(sa_norm(x)))``; two of them cost what one Transformer layer does.

    It is a ``TransformerSelfAttentionLayer`` because torchtune's activation checkpointing, compilation and caches act
    on that class alone; it has no MLP, the gated attention unit is both.

    Args:
        attn: The gated attention unit.
        sa_norm: Normalisation before it.
        token_shift: Replace the first half of the features of each token by those of the token before it in its
            document (zeros at a document's start).
        post_norm: Normalise the sum in place of the unit's input, ``sa_norm(x + attn(x))``, as GAU-alpha does.

    Raises:
        ValueError: If ``token_shift`` and ``post_norm`` are both set.
    """

    def __init__(
        self, attn: GatedAttentionUnit, *, sa_norm: nn.Module, token_shift: bool = False, post_norm: bool = False
    ) -> None:
        nn.Module.__init__(self)  # The parent's own constructor wants an attention and an MLP.
        if token_shift and post_norm:
            raise ValueError("token_shift (True) must be False with post_norm=True; set one of them to False")
        self.post_norm = post_norm
        self.attn = attn
        self.sa_norm = sa_norm
        self.token_shift = token_shift

    def setup_caches(
        self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int | None, decoder_max_seq_len: int
    ) -> None:
        """Set up a decoding cache, in place of one that is there.

        Args:
            batch_size: Rows that every call will have.
            dtype: The model's dtype.
            encoder_max_seq_len: Not used; torchtune passes it to every kind of layer.
            decoder_max_seq_len: Tokens a row may have.

        Raises:
            ValueError: If the layer cannot decode token by token, or a size is no positive integer.
        """
        shift_dim = (self.attn.embed_dim + 1) // 2 if self.token_shift else 0
        self.attn.setup_cache(batch_size, dtype, max_seq_len=decoder_max_seq_len, shift_dim=shift_dim)

    def caches_are_setup(self) -> bool:
        """Whether there is a decoding cache."""
        return self.attn.kv_cache is not None

    def caches_are_enabled(self) -> bool:
        """Whether the decoding cache is in use."""
        return self.attn.cache_enabled

    def reset_cache(self) -> None:
        """Make the decoding cache forget all tokens."""
        self.attn.reset_cache()

    def forward(
        self,
        x: Tensor,
        *,
        mask: object = None,
        input_pos: Tensor | None = None,
        segments: Segments | None = None,
        new: NewTokens | None = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Transform ``[b, s, d]``.

        Args:
            x: Input, ``[b, s, d]``.
            mask: Not read: a FLASH layer learns about documents from ``segments`` or ``input_pos``; the model checks
                that a mask agrees with them.
            input_pos: Position of each token in its document, ``[b, s]``, ``[s]``, or ``[b]`` for one token a row;
                used where neither ``segments`` nor ``new`` is given.
            segments: Documents and padding, worked out once by the model for all layers.
            new: Where the tokens lie behind those in the cache, worked out once by the model; only with an enabled
                cache.
            encoder_input: Not used; torchtune passes it to every kind of layer.
            encoder_mask: Not used, likewise.

        Raises:
            ValueError: If a cache is enabled and neither ``input_pos`` nor ``new`` is given.

        Returns:
            ``[b, s, d]``.
        """
        cache = self.attn.kv_cache if self.attn.cache_enabled else None
        if segments is None and new is None and input_pos is not None:
            position = position_rows(input_pos, *x.shape[:2])
            segments, new = (make_segments(position), None) if cache is None else (None, cache.place(position))
        if cache is not None and new is None:
            raise ValueError(
                "input_pos (None) must be given while the cache is enabled; pass each token's position in its document"
            )
        if self.post_norm:
            summed: Tensor = self.sa_norm(x + self.attn(x, segments, new))
            return summed
        if self.token_shift and cache is not None and new is not None:
            features, kept = self.sa_norm(x).chunk(2, dim=-1)
            features = shift_tokens(features, new.segments, cache.shift(features, new))
            normalised = torch.cat([features, kept], dim=-1)
        elif isinstance(self.sa_norm, RMSNorm | ScaleNorm):
            shifted = segments if self.token_shift else None
            normalised, x = self.sa_norm(x, token_shift=self.token_shift, segments=shifted, residual=True)
        else:
            normalised = self.sa_norm(x)
            if self.token_shift:
                normalised = shift_half(normalised, segments)
        return x + self.attn(normalised, segments, new)
