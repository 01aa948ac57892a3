"""What the tests of decoding share: a small model that uses all its parts, and feeding it piece by piece."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import flash_plugin

VOCABULARY, CHUNK = 30, 8


def model(family: str = "flash", dtype: torch.dtype = torch.float32, **arguments: object) -> flash_plugin.FlashDecoder:
    """A model whose weights reach every part: initial queries and keys are near zero, biases are zero."""
    torch.manual_seed(0)
    if family == "flash":
        arguments = {"chunk_size": CHUNK, **arguments}
    sizes = dict(vocab_size=VOCABULARY, num_layers=2, embed_dim=24, max_seq_len=256, qk_dim=12)
    built = getattr(flash_plugin, family)(**{**sizes, **arguments}).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if any(part in name for part in ("offset_scale", "position_bias")):
                parameter.normal_(std=0.6)
    return built.to(dtype)


def feed(built: flash_plugin.FlashDecoder, tokens: Tensor, position: Tensor, pieces: Iterable[int]) -> Tensor:
    """Logits ``[b, s, v]`` of tokens given to an enabled cache in ``pieces`` of so many at once."""
    position = position.expand_as(tokens)
    sizes = list(pieces)
    assert sum(sizes) == tokens.shape[1]
    parts = zip(tokens.split(sizes, dim=1), position.split(sizes, dim=1), strict=True)
    return torch.cat([built(part, input_pos=where) for part, where in parts], dim=1)
