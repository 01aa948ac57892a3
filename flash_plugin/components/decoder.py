"""The FLASH model: torchtune's ``TransformerDecoder`` over FLASH layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules.model_fusion import FusionLayer

from flash_plugin.components.embeddings import TiedOutput
from flash_plugin.components.layer import FlashLayer
from flash_plugin.components.masks import MaskChecks, attention_mask, check_cached_mask, padding_of, reads_mask
from flash_plugin.components.mixers import MixedChunkMixer
from flash_plugin.components.positions import ScaledSinusoid, position_rows
from flash_plugin.kernels import Segments, make_segments
from flash_plugin.kernels.new_tokens import NewTokens


class FlashDecoder(TransformerDecoder):
    """Token embeddings, FLASH layers, final norm, output projection.

    Documents and padding are worked out from ``input_pos`` once a forward and shared by all layers; a ``mask`` must
    agree with them (it is compared on every call outside training and once a shape in training) and is not used.

    Args:
        tok_embeddings: Token embedding.
        layers: FLASH layers, and causal Transformer layers of torchtune's between them; each may be in a
            ``FusionLayer`` with a cross-attention layer.
        max_seq_len: Longest sequence accepted.
        qk_dim: Width z of queries and keys, torchtune's ``head_dim``.
        norm: Normalisation before the output projection.
        output: Output projection.
        causal: Whether the layers are causal.
        absolute_position: Absolute position embedding, or None.
        unlimited_decoding: Whether decoding with a cache may go on past ``max_seq_len``.

    Attributes:
        token_types: Embedding of token types, or None; added to each token's own.
        embedding_norm: Norm of the sum of all embeddings, or None.
    """

    token_types: nn.Embedding | None
    embedding_norm: nn.Module | None

    def __init__(
        self,
        *,
        tok_embeddings: nn.Embedding,
        layers: Sequence[nn.Module],
        max_seq_len: int,
        qk_dim: int,
        norm: nn.Module,
        output: nn.Linear | TiedOutput,
        causal: bool,
        absolute_position: ScaledSinusoid | None = None,
        unlimited_decoding: bool = False,
    ) -> None:
        super().__init__(
            tok_embeddings=tok_embeddings,
            layers=nn.ModuleList(layers),
            max_seq_len=max_seq_len,
            num_heads=1,
            head_dim=qk_dim,
            norm=norm,
            output=output,
        )
        self.causal = causal
        self.absolute_position = absolute_position
        self.unlimited_decoding = unlimited_decoding
        self.token_types = None
        self.embedding_norm = None
        self._mask_checks = MaskChecks()
        own = [layer.layer if isinstance(layer, FusionLayer) else layer for layer in layers]
        self._flash = [index for index, layer in enumerate(own) if isinstance(layer, FlashLayer)]
        self._fused = any(isinstance(m, TransformerCrossAttentionLayer) for m in self.modules())
        self._chunk_sizes = {m.chunk_size for m in self.modules() if isinstance(m, MixedChunkMixer)}

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Set up a decoding cache in every layer, in place of those that are there.

        Args:
            batch_size: Rows that every call will have.
            dtype: The model's dtype.
            encoder_max_seq_len: Encoder tokens a row may have, where layers attend to an encoder; ``max_seq_len`` if
                not given.
            decoder_max_seq_len: Tokens a row may have; ``max_seq_len`` if not given.

        Raises:
            ValueError: If it is more than ``max_seq_len``, a size is no positive integer, or the model is
                bidirectional or normalises by the length of the sequence.
        """
        if decoder_max_seq_len is not None and decoder_max_seq_len > self.max_seq_len and not self.unlimited_decoding:
            raise ValueError(
                f"decoder_max_seq_len ({decoder_max_seq_len}) must not exceed max_seq_len ({self.max_seq_len}); ask "
                "for fewer tokens (max_new_tokens, max_seq_length), or set model.max_seq_len higher, or in FLASH "
                "model.unlimited_decoding=True"
            )
        for module in self.modules():
            if isinstance(getattr(module, "kv_cache", None), nn.Module):
                module.kv_cache = None  # torchtune's own attention would keep the one it has
        super().setup_caches(
            batch_size, dtype, encoder_max_seq_len=encoder_max_seq_len, decoder_max_seq_len=decoder_max_seq_len
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: object = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the next token everywhere.

        Args:
            tokens: Token ids, ``[b, s]``.
            mask: torchtune's attention mask ``[b, s, s]`` (or ``BlockMask``), which must say what ``input_pos`` says
                (to a bidirectional model a causal one does, where it has the same documents: torchtune packs with no
                other); or a padding mask ``[b, s]``, True at real tokens. With an enabled cache only torchtune's
                ``[1 or b, s, decoder_max_cache_seq_len]``.
            encoder_input: The encoder's output, ``[b, s_e, d_e]``, where layers attend to one; else None.
            encoder_mask: Which of its tokens each token sees, ``[b, s, s_e]``, likewise.
            input_pos: Position of each token in its document, ``[b, s]`` or ``[s]``; a restart begins a document.
                None means one document a row. With an enabled cache a row goes on with its document where its first
                position is one more than that of its last token; any other begins one.
            token_types: Type of each token, ``[b, s]``, in a model that has them; None means type 0 everywhere.

        Raises:
            ValueError: If the sequence is longer than ``max_seq_len``, a token or position is out of range, or the
                mask cannot be honoured; with an enabled cache also if there is no ``input_pos``, or the number of
                rows is not the cache's.

        Returns:
            Logits ``[b, s, vocab_size]`` in float32, or a list of them cut along s after
            ``set_num_output_chunks``; hidden states first if ``output_hidden_states`` asks for them.
        """
        self._check(tokens, encoder_input, encoder_mask)
        segments, new = None, None
        if self.caches_are_enabled():
            new = self._new_tokens(tokens, mask, input_pos)
        else:
            segments = self._segments(tokens, mask, input_pos)
        h = self._embed(tokens, segments if new is None else new, token_types)
        told: dict[str, Tensor | None] = {}
        if len(self._flash) < len(self.layers):
            placed = segments if new is None else new
            told["input_pos"] = None if placed is None else placed.position
            if any(map(reads_mask, self.layers)):
                told["mask"] = attention_mask(segments, new, self.decoder_max_cache_seq_len)
        if self._fused:
            told["encoder_input"], told["encoder_mask"] = encoder_input, encoder_mask
        hidden = []
        for i, layer in enumerate(self.layers):
            if i in self.output_hidden_states:
                hidden.append(h)
            h = layer(h, segments=segments, new=new, **told)
        output = self.unembed(h)
        return [*hidden, output] if hidden else output

    def _embed(self, tokens: Tensor, placed: Segments | NewTokens | None, token_types: Tensor | None) -> Tensor:
        """Embed ``[b, s]`` tokens, with all that is added to them, as ``[b, s, d]``."""
        h: Tensor = self.tok_embeddings(tokens)
        if self.token_types is not None:
            h = h + self.token_types(torch.zeros_like(tokens) if token_types is None else token_types)
        elif token_types is not None:
            raise ValueError(
                f"token_types (shape {tuple(token_types.shape)}) must be None: the model has no types; leave it out"
            )
        if self.absolute_position is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device)[None] if placed is None else placed.position
            h = h + self.absolute_position(position)
        return h if self.embedding_norm is None else self.embedding_norm(h)

    def _segments(self, tokens: Tensor, mask: object, input_pos: Tensor | None) -> Segments | None:
        position = None if input_pos is None else self._position(tokens, input_pos)
        padding = padding_of(mask, self.causal)
        if position is None and padding is None:
            segments = None
        else:
            if position is not None and padding is not None:
                position = position.expand_as(tokens)
            segments = make_segments(position, padding_mask=padding).with_chunks(self._chunk_sizes)
        self._mask_checks.check(mask, segments, tokens, self.causal, input_pos is not None, self.training)
        return segments

    def _new_tokens(self, tokens: Tensor, mask: object, input_pos: Tensor | None) -> NewTokens:
        first = self.layers[self._flash[0]]
        cache = (first.layer if isinstance(first, FusionLayer) else first).attn.kv_cache
        input_pos = cache.check_call(input_pos, tokens.shape[0])
        new = cache.place(self._position(tokens, input_pos), self._chunk_sizes)
        check_cached_mask(mask, new, self.decoder_max_cache_seq_len)
        return new

    def _position(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """``input_pos`` as ``[1 or b, s]``, in range."""
        position = position_rows(input_pos, *tokens.shape)
        if position.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(position.min()), int(position.max())
            name, limit = "max_seq_len", self.max_seq_len
            remedy = "set model.max_seq_len higher, or restart positions with each document"
            cached = self.caches_are_enabled()
            if cached and self.decoder_max_cache_seq_len < limit:
                name, limit = "decoder_max_seq_len", self.decoder_max_cache_seq_len
                remedy = "set the cache up for more tokens"
            if low < 0 or (high >= limit and not (cached and self.unlimited_decoding)):
                raise ValueError(
                    f"input_pos ({low if low < 0 else high}) must lie in [0, {name}) = [0, {limit}); {remedy}"
                )
        return position

    def _check(self, tokens: Tensor, encoder_input: Tensor | None, encoder_mask: Tensor | None) -> None:
        if not self._fused and (encoder_input is not None or encoder_mask is not None):
            raise ValueError(
                "encoder_input and encoder_mask must be None: no layer of this model attends to an encoder; leave them "
                "out, or put its layers into FusionLayers with FlashCrossAttentionLayers"
            )
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens (shape {tuple(tokens.shape)}) must be [batch, sequence]; add the missing axis")
        unlimited = self.unlimited_decoding and self.caches_are_enabled()
        if tokens.shape[1] > self.max_seq_len and not unlimited:
            raise ValueError(
                f"tokens (sequence length {tokens.shape[1]}) must not be longer than max_seq_len ({self.max_seq_len}); "
                "set model.max_seq_len higher or tokenizer.max_seq_len lower"
            )
        # On an accelerator the check would make it wait at every step; the embedding asserts there.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            vocabulary = self.tok_embeddings.num_embeddings
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"token id ({low if low < 0 else high}) must lie in [0, vocab_size) = [0, {vocabulary}); "
                    "set model.vocab_size to the tokenizer's vocab_size"
                )
