"""Token shift: half of each token's features come from the token before it."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_plugin.kernels.segments import Segments
from flash_plugin.kernels.validation import check_segments


def check_token_shift(x: Tensor, token_shift: bool, segments: Segments | None) -> None:
    """Refuse segments without a shift, and inputs that have no tokens to shift."""
    if not token_shift and segments is not None:
        raise ValueError("segments must be None with token_shift=False, which does not look at them; leave them out")
    if token_shift and (x.dim() != 3 or 0 in x.shape):
        raise ValueError(
            f"x (shape {tuple(x.shape)}) must be [batch, sequence, dim] with no empty axis for token_shift=True; "
            "reshape it"
        )
    if token_shift:
        check_segments(segments, x)


def shift_half(x: Tensor, segments: Segments | None) -> Tensor:
    """Give each token of ``[b, s, d]`` the first half of the features of its predecessor in the same document."""
    features, kept = x.chunk(2, dim=-1)
    return torch.cat([shift_tokens(features, segments), kept], dim=-1)


def shift_tokens(features: Tensor, segments: Segments | None, before: Tensor | None = None) -> Tensor:
    """Give each token the features of its predecessor in the same document, 0 where there is none.

    Args:
        features: ``[b, s, d/2]``.
        segments: Documents; None means one a row.
        before: Features of the token before the first one, ``[b, 1, d/2]``; None means that there is none.

    Returns:
        ``[b, s, d/2]``.
    """
    if before is None:
        before = torch.zeros_like(features[:, :1])
    previous = features[:, :-1]
    if segments is not None:
        index = torch.arange(1, features.shape[1], device=features.device)
        previous = previous.masked_fill((segments.start[:, 1:] == index)[..., None], 0.0)
    return torch.cat([before, previous], dim=1)
