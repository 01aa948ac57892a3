"""One FLASH layer: pre-norm, optional token shift, gated attention unit, residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer

from flash_plugin.components.gau import GatedAttentionUnit
from flash_plugin.kernels import Segments, make_segments


class FlashLayer(TransformerSelfAttentionLayer):
    """``x + attn(shift(sa_norm(x)))``; two of them cost what one Transformer layer does.

    It is a ``TransformerSelfAttentionLayer`` because torchtune's activation checkpointing, compilation and caches act
    on that class alone; it has no MLP, the gated attention unit is both.

    Args:
        attn: The gated attention unit.
        sa_norm: Normalisation before it.
        token_shift: Replace the first half of the features of each token by those of the token before it in its
            document (zeros at a document's start).
    """

    def __init__(self, attn: GatedAttentionUnit, *, sa_norm: nn.Module, token_shift: bool = False) -> None:
        nn.Module.__init__(self)  # The parent's own constructor wants an attention and an MLP.
        self.attn = attn
        self.sa_norm = sa_norm
        self.token_shift = token_shift

    def setup_caches(
        self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int | None, decoder_max_seq_len: int
    ) -> None:
        """Refuse: this version decodes without a cache."""
        raise RuntimeError(
            "enable_kv_cache (True) must be False: this version of flash_plugin decodes without a cache; "
            "set enable_kv_cache=False"
        )

    def caches_are_setup(self) -> bool:
        """Whether there is a decoding cache."""
        return False

    def caches_are_enabled(self) -> bool:
        """Whether the decoding cache is in use."""
        return False

    def forward(
        self,
        x: Tensor,
        *,
        mask: object = None,
        input_pos: Tensor | None = None,
        segments: Segments | None = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
    ) -> Tensor:
        """Transform ``[b, s, d]``.

        Args:
            x: Input, ``[b, s, d]``.
            mask: Not read: a FLASH layer learns about documents from ``segments`` or ``input_pos``; the model checks
                that a mask agrees with them.
            input_pos: Position of each token in its document, ``[b, s]``; used where ``segments`` is not given.
            segments: Documents and padding, worked out once by the model for all layers.
            encoder_input: Not used; torchtune passes it to every kind of layer.
            encoder_mask: Not used, likewise.

        Returns:
            ``[b, s, d]``.
        """
        if segments is None and input_pos is not None:
            segments = make_segments(input_pos)
        normalised = self.sa_norm(x)
        if self.token_shift:
            normalised = shift_tokens(normalised, segments)
        return x + self.attn(normalised, segments)


def shift_tokens(x: Tensor, segments: Segments | None) -> Tensor:
    """Take the first half of each token's features from its predecessor in the same document, 0 where there is none."""
    shifted, kept = x.chunk(2, dim=-1)
    previous = torch.cat([torch.zeros_like(shifted[:, :1]), shifted[:, :-1]], dim=1)
    if segments is not None:
        index = torch.arange(x.shape[1], device=x.device)
        previous = previous.masked_fill((segments.start == index)[..., None], 0.0)
    return torch.cat([previous, kept], dim=-1)
