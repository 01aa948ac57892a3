"""Softmax attention beside FLASH: layers of torchtune's own in a FLASH model.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed, ``e`` expanded width, ``z`` query/key width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchtune.modules import FeedForward, MultiHeadAttention, RotaryPositionalEmbeddings, TransformerSelfAttentionLayer

from flash_plugin.components.norms import build_norm


def check_layers(name: str, layers: Sequence[int] | None, num_layers: int) -> set[int]:
    """Indices of layers as a set.

    Raises:
        ValueError: If they are not different indices of layers.
    """
    chosen = list(layers or [])
    wrong = [i for i in chosen if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_layers]
    if wrong or len(set(chosen)) != len(chosen):
        raise ValueError(
            f"{name} ({chosen}) must be different indices from 0 to {num_layers - 1}; set model.{name} to such a list"
        )
    return set(chosen)


def attention_layer(
    *,
    embed_dim: int,
    expanded_dim: int,
    qk_dim: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    rope_base: float,
    norm: str,
    norm_eps: float,
    attn_dropout: float,
) -> TransformerSelfAttentionLayer:
    """Build a Transformer layer (multi-head softmax attention, SwiGLU) with the parameters of a FLASH layer.

    Args:
        embed_dim: Width d.
        expanded_dim: Width e of the FLASH layers, which decides how wide the MLP is.
        qk_dim: Width z of their queries and keys, likewise.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
        max_seq_len: Longest sequence.
        rope_base: Base of the rotary wavelengths.
        norm: Name of the norm.
        norm_eps: Its epsilon.
        attn_dropout: Probability of zeroing an attention weight in training.

    Raises:
        ValueError: If the heads do not fit ``embed_dim`` or each other, or attention alone has more parameters than a
            FLASH layer.
    """
    for name, heads, whole in (("num_heads", num_heads, embed_dim), ("num_kv_heads", num_kv_heads, num_heads)):
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or whole % heads:
            raise ValueError(
                f"{name} ({heads!r}) must divide {'embed_dim' if name == 'num_heads' else 'num_heads'} ({whole}); "
                f"set model.{name} to a divisor of it"
            )
    head_dim = embed_dim // num_heads
    if head_dim % 2:
        raise ValueError(
            f"num_heads ({num_heads}) must leave each head an even number of features, and leaves {head_dim}; set "
            "model.num_heads to another divisor of embed_dim"
        )
    keys = num_kv_heads * head_dim
    flash = 3 * embed_dim * expanded_dim + embed_dim * qk_dim
    hidden = (flash - 2 * embed_dim * (embed_dim + keys)) // (3 * embed_dim)
    if hidden < 1:
        raise ValueError(
            f"expansion ({expanded_dim / embed_dim:g}) must be large enough for an attention layer to have the "
            "parameters of a FLASH layer; set model.expansion=2.0, or fewer model.num_kv_heads"
        )
    attention = MultiHeadAttention(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=nn.Linear(embed_dim, embed_dim, bias=False),
        k_proj=nn.Linear(embed_dim, keys, bias=False),
        v_proj=nn.Linear(embed_dim, keys, bias=False),
        output_proj=nn.Linear(embed_dim, embed_dim, bias=False),
        pos_embeddings=RotaryPositionalEmbeddings(head_dim, max_seq_len, rope_base),
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
    )
    mlp = FeedForward(
        gate_proj=nn.Linear(embed_dim, hidden, bias=False),
        down_proj=nn.Linear(hidden, embed_dim, bias=False),
        up_proj=nn.Linear(embed_dim, hidden, bias=False),
    )
    norms = {name: build_norm(norm, embed_dim, norm_eps) for name in ("sa_norm", "mlp_norm")}
    return TransformerSelfAttentionLayer(attention, mlp, **norms)
