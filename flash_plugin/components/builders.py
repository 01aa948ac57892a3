"""Builders of whole models: every knob in one place, sizes as data.

Shape legend: ``d`` embed_dim, ``e`` expansion * d, ``z`` qk_dim, ``c`` chunk_size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from flash_plugin.components.arguments import config_component
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.embeddings import TiedEmbedding, TiedOutput
from flash_plugin.components.gau import GatedAttentionUnit
from flash_plugin.components.hybrid import attention_layer, check_layers
from flash_plugin.components.initialization import initialize_weights
from flash_plugin.components.layer import FlashLayer
from flash_plugin.components.mixers import MixedChunkMixer, QuadraticMixer
from flash_plugin.components.norms import build_norm
from flash_plugin.components.positions import RotaryPositions, ScaledSinusoid, build_position_bias
from flash_plugin.kernels.validation import check_chunk_size, is_number


@config_component
def flash(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    max_seq_len: int,
    expansion: float = 2.0,
    qk_dim: int = 128,
    chunk_size: int = 256,
    activation: str = "relu2",
    normalizer: str = "visible",
    position_bias: str = "t5",
    rope_dim: int | None = None,
    rope_base: float = 10000,
    absolute_position: bool = False,
    norm: str = "rmsnorm",
    norm_eps: float = 1e-6,
    token_shift: bool = False,
    causal: bool = True,
    attn_dropout: float = 0.0,
    proj_bias: bool = False,
    output_bias: bool = False,
    final_norm: str | None = None,
    tie_embeddings: bool = False,
    unlimited_decoding: bool = False,
    attention_layers: list[int] | None = None,
    quadratic_layers: list[int] | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    impl: str = "auto",
) -> FlashDecoder:
    """Build FLASH (paper section 3): gated attention units with mixed chunk attention, linear in the sequence.

    Args:
        vocab_size: Size of the vocabulary, special tokens included.
        num_layers: Number of gated attention units; two cost what one Transformer layer does.
        embed_dim: Width d.
        max_seq_len: Longest sequence accepted.
        expansion: e / d.
        qk_dim: Width z of queries and keys.
        chunk_size: Tokens c that attend to each other quadratically.
        activation: ``relu2``, ``laplace``, ``softplus2`` or ``softmax``.
        normalizer: ``visible``, ``paper`` or ``chunk``; see :func:`flash_plugin.kernels.mixed_chunk_attention`.
        position_bias: ``none``, ``rope`` (the paper's), ``toeplitz`` or ``t5``, inside chunks. With ``t5`` a model
            learns faster than with ``rope`` or none (``recipes/study_quality.py``).
        rope_dim: How many of the z features rotate; None rotates all, 0 none.
        rope_base: Base of the rotary wavelengths.
        absolute_position: Add sinusoidal embeddings with a learned scale.
        norm: ``rmsnorm``, ``layernorm``, ``scalenorm`` or ``plain_rmsnorm``, which has no weight.
        norm_eps: Epsilon of the norms.
        token_shift: Shift half of the features by one token before the projections.
        causal: Whether tokens see only what lies before them.
        attn_dropout: Probability of zeroing an attention weight in training.
        proj_bias: Whether the gated attention units' projections have biases.
        output_bias: Whether the output projection has a bias.
        final_norm: Norm before the output projection; None follows ``norm``.
        tie_embeddings: Use the token embedding as output projection.
        unlimited_decoding: Let decoding with a cache, whose size is constant, go on past ``max_seq_len``; rotary angles
            are then computed at each position, in place of a table.
        attention_layers: Indices of layers that are a Transformer's in place of FLASH's: multi-head softmax attention
            and an MLP, with as many parameters. Their cache grows with the text, their time with its square.
        quadratic_layers: Indices of layers with FLASH-Quad's attention over whole documents.
        num_heads: Heads of ``attention_layers``; None for ``embed_dim / qk_dim``.
        num_kv_heads: Heads of their keys and values; None for as many as queries have.
        impl: Implementation of the attention op: ``auto``, ``triton`` or ``reference``.

    Raises:
        ValueError: If an argument is unknown, out of range, or does not fit the others.

    Returns:
        The model, with weights drawn from the global random state.
    """
    check_chunk_size(chunk_size)

    def mixer(index: int) -> MixedChunkMixer | QuadraticMixer:
        reach = max_seq_len if index in quadratic else chunk_size
        bias = build_position_bias(position_bias, qk_dim=qk_dim, rope_base=rope_base, max_length=reach, causal=causal)
        choices: dict[str, Any] = dict(
            position_bias=bias,
            activation=activation,
            normalizer=normalizer,
            causal=causal,
            dropout=attn_dropout,
            impl=impl,
        )
        return QuadraticMixer(**choices) if index in quadratic else MixedChunkMixer(chunk_size, **choices)

    _check_positive("num_layers", num_layers)
    quadratic = check_layers("quadratic_layers", quadratic_layers, num_layers)
    attention = check_layers("attention_layers", attention_layers, num_layers)
    if attention & quadratic:
        raise ValueError(
            f"attention_layers and quadratic_layers (both {sorted(attention & quadratic)}) must name different layers; "
            "take them out of one"
        )
    if unlimited_decoding and attention | quadratic:
        raise ValueError(
            "unlimited_decoding (True) must be False with attention_layers or quadratic_layers, whose caches hold "
            "max_seq_len tokens; set model.unlimited_decoding=False"
        )
    transformer: Callable[..., nn.Module] | None = None
    if attention:
        if not causal:
            raise ValueError("causal (False) must be True with attention_layers; set model.causal=True")
        if len(attention) == num_layers:
            raise ValueError(
                f"attention_layers ({sorted(attention)}) must leave a layer of {num_layers} to FLASH; take one out"
            )
        _check_positive("qk_dim", qk_dim)
        _check_positive("embed_dim", embed_dim)
        heads = max(embed_dim // qk_dim, 1) if num_heads is None else num_heads
        transformer = functools.partial(
            attention_layer,
            embed_dim=embed_dim,
            qk_dim=qk_dim,
            num_heads=heads,
            num_kv_heads=heads if num_kv_heads is None else num_kv_heads,
            max_seq_len=max_seq_len,
            rope_base=rope_base,
            norm=norm,
            norm_eps=norm_eps,
            attn_dropout=attn_dropout,
        )
    elif num_heads is not None or num_kv_heads is not None:
        raise ValueError(
            f"num_heads ({num_heads}) and num_kv_heads ({num_kv_heads}) must come with attention_layers: FLASH's own "
            "layers have one head; set model.attention_layers, or leave them out"
        )

    return _build(
        mixer, vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, max_seq_len=max_seq_len,
        expansion=expansion, qk_dim=qk_dim, rope_dim=rope_dim, rope_base=rope_base, absolute_position=absolute_position,
        norm=norm, norm_eps=norm_eps, token_shift=token_shift, causal=causal, proj_bias=proj_bias,
        output_bias=output_bias, final_norm=final_norm, tie_embeddings=tie_embeddings,
        unlimited_decoding=unlimited_decoding, attention=attention, transformer=transformer,
    )  # fmt: skip


@config_component
def flash_quad(
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    max_seq_len: int,
    expansion: float = 2.0,
    qk_dim: int = 128,
    activation: str = "relu2",
    normalizer: str = "visible",
    position_bias: str = "t5",
    rope_dim: int | None = None,
    rope_base: float = 10000,
    absolute_position: bool = False,
    norm: str = "rmsnorm",
    norm_eps: float = 1e-6,
    token_shift: bool = False,
    causal: bool = True,
    attn_dropout: float = 0.0,
    proj_bias: bool = False,
    output_bias: bool = False,
    final_norm: str | None = None,
    tie_embeddings: bool = False,
    impl: str = "auto",
) -> FlashDecoder:
    """Build FLASH-Quad (paper section 2): gated attention units with quadratic attention over whole documents.

    Arguments, errors and result are those of :func:`flash`, without ``chunk_size``, those about other kinds of layers
    and, its cache growing with the text, ``unlimited_decoding``; ``position_bias`` reaches over ``max_seq_len`` tokens,
    and ``activation`` may also be ``softmax_plus`` (see :class:`flash_plugin.QuadraticMixer`).
    """

    def mixer(_index: int) -> QuadraticMixer:
        bias = build_position_bias(
            position_bias, qk_dim=qk_dim, rope_base=rope_base, max_length=max_seq_len, causal=causal
        )
        return QuadraticMixer(
            position_bias=bias,
            activation=activation,
            normalizer=normalizer,
            causal=causal,
            dropout=attn_dropout,
            impl=impl,
        )

    return _build(
        mixer, vocab_size=vocab_size, num_layers=num_layers, embed_dim=embed_dim, max_seq_len=max_seq_len,
        expansion=expansion, qk_dim=qk_dim, rope_dim=rope_dim, rope_base=rope_base, absolute_position=absolute_position,
        norm=norm, norm_eps=norm_eps, token_shift=token_shift, causal=causal, proj_bias=proj_bias,
        output_bias=output_bias, final_norm=final_norm, tie_embeddings=tie_embeddings,
    )  # fmt: skip


def _build(
    mixer: Callable[[int], MixedChunkMixer | QuadraticMixer],
    *,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    max_seq_len: int,
    expansion: float,
    qk_dim: int,
    rope_dim: int | None,
    rope_base: float,
    absolute_position: bool,
    norm: str,
    norm_eps: float,
    token_shift: bool,
    causal: bool,
    proj_bias: bool,
    output_bias: bool,
    final_norm: str | None,
    tie_embeddings: bool,
    unlimited_decoding: bool = False,
    attention: Collection[int] = (),
    transformer: Callable[..., nn.Module] | None = None,
) -> FlashDecoder:
    """What both families share: everything but the mixer, and whatever else is a layer at the indices ``attention``."""
    sizes = {"vocab_size": vocab_size, "num_layers": num_layers, "embed_dim": embed_dim, "max_seq_len": max_seq_len}
    for name, value in {**sizes, "qk_dim": qk_dim}.items():
        _check_positive(name, value)
    if rope_dim is None:
        rope_dim = qk_dim
    _check_rope(rope_dim, qk_dim, rope_base)
    flags = {"absolute_position": absolute_position, "token_shift": token_shift, "causal": causal}
    flags |= {"proj_bias": proj_bias, "output_bias": output_bias, "tie_embeddings": tie_embeddings}
    flags["unlimited_decoding"] = unlimited_decoding
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} ({flag!r}) must be True or False; set model.{name} to one of them, unquoted")
    if not is_number(expansion) or not 1 <= expansion * embed_dim < float("inf"):
        raise ValueError(f"expansion ({expansion!r}) must be a positive number; set model.expansion=2.0")
    expanded_dim = round(expansion * embed_dim)
    if tie_embeddings and output_bias:
        raise ValueError("output_bias (True) must be False with tie_embeddings=True; set one of them to False")
    # One table of angles for all layers.
    rotary = RotaryPositions(rope_dim, max_seq_len, rope_base, unlimited=unlimited_decoding) if rope_dim else None

    def flash_layer(index: int) -> FlashLayer:
        unit = GatedAttentionUnit(
            embed_dim=embed_dim,
            expanded_dim=expanded_dim,
            qk_dim=qk_dim,
            mixer=mixer(index),
            rotary=rotary,
            proj_bias=proj_bias,
        )
        return FlashLayer(unit, sa_norm=build_norm(norm, embed_dim, norm_eps), token_shift=token_shift)

    layers = [
        transformer(expanded_dim=expanded_dim) if transformer is not None and index in attention else flash_layer(index)
        for index in range(num_layers)
    ]
    tok_embeddings, output = _embeddings(vocab_size, embed_dim, tie_embeddings, output_bias)
    model = FlashDecoder(
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        qk_dim=qk_dim,
        norm=build_norm(norm if final_norm is None else final_norm, embed_dim, norm_eps),
        output=output,
        causal=causal,
        absolute_position=ScaledSinusoid(embed_dim) if absolute_position else None,
        unlimited_decoding=unlimited_decoding,
    )
    initialize_weights(model)
    return model


def _embeddings(
    vocab_size: int, embed_dim: int, tied: bool, output_bias: bool
) -> tuple[nn.Embedding, nn.Linear | TiedOutput]:
    """The token embedding and the output projection."""
    if tied:
        embedding = TiedEmbedding(vocab_size, embed_dim)
        return embedding, TiedOutput(embedding)
    return nn.Embedding(vocab_size, embed_dim), nn.Linear(embed_dim, vocab_size, bias=output_bias)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be a positive integer; set model.{name} to one")


def _check_rope(rope_dim: int, qk_dim: int, rope_base: float) -> None:
    if isinstance(rope_dim, bool) or not isinstance(rope_dim, int) or rope_dim < 0 or rope_dim % 2:
        nearest = (rope_dim if isinstance(rope_dim, int) and rope_dim > 0 else qk_dim) // 2 * 2
        raise ValueError(
            f"rope_dim ({rope_dim!r}) must be an even number of features (qk_dim if not given); "
            f"set model.rope_dim={nearest}"
        )
    if rope_dim > qk_dim:
        raise ValueError(f"rope_dim ({rope_dim}) must not exceed qk_dim ({qk_dim}); set model.qk_dim={rope_dim}")
    if not is_number(rope_base) or not rope_base >= 1:
        raise ValueError(f"rope_base ({rope_base!r}) must be a number of at least 1; set model.rope_base=10000")
