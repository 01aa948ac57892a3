"""Encoders that others have published weights of, built from this package's layers.

Both are bidirectional models of FLASH-Quad's kind, for masked language modelling: a ``[b, s]`` mask, True at real
tokens, tells which tokens are padding. ``recipes/convert.py`` brings their weights here and back.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from flash_plugin.components.arguments import config_component
from flash_plugin.components.builders import flash_quad
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.initialization import initialize_weights
from flash_plugin.components.norms import build_norm

#: The longest text for which JunnYu's FLASH-Quad has a Toeplitz bias.
LONGEST_TOEPLITZ = 512


class HeadTransform(nn.Module):
    """What stands before BERT's output projection: ``norm(silu(dense(x)))``.

    Args:
        dim: Width d.
        norm: Norm of width d.
    """

    def __init__(self, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[b, s, d]``."""
        out: Tensor = self.norm(F.silu(self.dense(x)))
        return out


@config_component
def gau_alpha(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    max_seq_len: int = 512,
    expansion: float = 2.0,
    qk_dim: int = 128,
    num_token_types: int = 2,
    norm_eps: float = 1e-12,
    proj_bias: bool = False,
    attn_dropout: float = 0.0,
    tie_embeddings: bool = True,
    impl: str = "auto",
) -> FlashDecoder:
    """Build GAU-alpha (Su et al. 2022, https://kexue.fm/archives/9052): post-norm, softmax-plus, no bias anywhere.

    Word and token type embeddings are added and normalised; each layer is ``norm(x + unit(x))``; no norm has a weight;
    nothing stands between the last layer and the output projection.

    Args:
        vocab_size: Size of the vocabulary; 12,000 in the published model.
        num_layers: Number of gated attention units; 24 there.
        embed_dim: Width d; 768 there.
        max_seq_len: Longest sequence accepted.
        expansion: e / d.
        qk_dim: Width of queries and keys.
        num_token_types: Token types; the model's forward takes ``token_types``.
        norm_eps: Epsilon of the norms.
        proj_bias: Whether the units' projections have biases.
        attn_dropout: Probability of zeroing an attention weight in training.
        tie_embeddings: Use the token embedding as output projection.
        impl: Implementation of the attention op.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Returns:
        The model, with weights drawn from the global random state.
    """
    model = flash_quad(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        expansion=expansion,
        qk_dim=qk_dim,
        activation="softmax_plus",
        position_bias="none",
        norm="plain_rmsnorm",
        norm_eps=norm_eps,
        causal=False,
        attn_dropout=attn_dropout,
        proj_bias=proj_bias,
        tie_embeddings=tie_embeddings,
        impl=impl,
    )
    for layer in model.layers:
        layer.post_norm = True
    model.norm = nn.Identity()
    _embed_types(model, num_token_types, embed_dim, build_norm("plain_rmsnorm", embed_dim, norm_eps))
    initialize_weights(model)
    return model


@config_component
def junnyu_flash_quad(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    max_seq_len: int = 512,
    expansion: float = 2.0,
    qk_dim: int = 128,
    num_token_types: int = 2,
    norm: str = "rmsnorm",
    norm_eps: float = 1e-5,
    attn_dropout: float = 0.0,
    impl: str = "auto",
) -> FlashDecoder:
    """Build the FLASH-Quad of https://github.com/JunnYu/FLASHQuad_pytorch, a masked language model.

    Squared ReLU of ``q.k / max_seq_len`` plus a learned bias, a Toeplitz one up to 512 tokens and a rotary one beyond;
    sinusoids and token types added to the word embeddings and the sum normalised; BERT's head, with SiLU. Scores are
    divided by ``max_seq_len`` whatever the length of the text, so a text's length changes nothing else.

    Args:
        vocab_size: Size of the vocabulary.
        num_layers: Number of gated attention units; 12 in the published small model.
        embed_dim: Width d; 768 there.
        max_seq_len: Longest sequence accepted, and what scores are divided by.
        expansion: e / d.
        qk_dim: Width of queries and keys.
        num_token_types: Token types; the model's forward takes ``token_types``.
        norm: ``rmsnorm`` or ``layernorm``. JunnYu's ScaleNorm is the RMS norm, all of whose weights are equal.
        norm_eps: Epsilon of the norms.
        attn_dropout: Probability of zeroing an attention weight in training.
        impl: Implementation of the attention op.

    Raises:
        ValueError: If an argument is out of range or does not fit the others.

    Returns:
        The model, with weights drawn from the global random state.
    """
    model = flash_quad(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        max_seq_len=max_seq_len,
        expansion=expansion,
        qk_dim=qk_dim,
        normalizer="paper",
        position_bias="toeplitz" if max_seq_len <= LONGEST_TOEPLITZ else "rope",
        absolute_position=True,
        norm=norm,
        norm_eps=norm_eps,
        causal=False,
        attn_dropout=attn_dropout,
        proj_bias=True,
        output_bias=True,
        impl=impl,
    )
    for layer in model.layers:
        layer.attn.mixer.scale = 1 / max_seq_len
    model.norm = HeadTransform(embed_dim, build_norm(norm, embed_dim, norm_eps))
    _embed_types(model, num_token_types, embed_dim, build_norm(norm, embed_dim, norm_eps))
    initialize_weights(model)
    return model


def _embed_types(model: FlashDecoder, num_token_types: int, embed_dim: int, norm: nn.Module) -> None:
    """Give ``model`` token types, and a norm of the sum of its embeddings."""
    if isinstance(num_token_types, bool) or not isinstance(num_token_types, int) or num_token_types < 1:
        raise ValueError(
            f"num_token_types ({num_token_types!r}) must be a positive integer; set model.num_token_types=2"
        )
    model.token_types = nn.Embedding(num_token_types, embed_dim)
    model.embedding_norm = norm
