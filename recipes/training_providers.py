"""Models of other libraries for ``bench_training.py``, built in torch's default dtype, logits out of tokens.

A node of a config names them as ``training_providers.flash_pytorch``. A library is imported when its model is built.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flash_pytorch(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    qk_dim: int,
    chunk_size: int,
    expansion: float = 2.0,
    norm: str = "scalenorm",
    token_shift: bool = True,
) -> nn.Module:
    """FLASH-pytorch's ``FLASHTransformer``, causal; ``norm`` is ``scalenorm`` or ``layernorm``.

    It always adds a T5 bias in chunks and a sinusoid to the embeddings.
    """
    from flash_pytorch import FLASHTransformer

    model: nn.Module = FLASHTransformer(
        dim=embed_dim,
        num_tokens=vocab_size,
        depth=num_layers,
        group_size=chunk_size,
        query_key_dim=qk_dim,
        expansion_factor=expansion,
        causal=True,
        norm_type=norm,
        shift_tokens=token_shift,
    )
    # It makes its tables in float32, and its layers take no mixture.
    return model.to(torch.get_default_dtype())


class _Logits(nn.Module):
    """A causal language model of transformers', tokens in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = model.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[b, s, vocab_size]``."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def gated_linear_attention(
    *, vocab_size: int, num_layers: int, embed_dim: int, num_heads: int, intermediate_dim: int
) -> nn.Module:
    """flash-linear-attention's GLA model as its authors have it: keys d / 2 wide, values d, SwiGLU; needs a GPU."""
    from fla.models import GLAConfig, GLAForCausalLM

    sizes = GLAConfig(
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        hidden_size=embed_dim,
        num_heads=num_heads,
        intermediate_size=intermediate_dim,
    )
    return _Logits(GLAForCausalLM(sizes))
