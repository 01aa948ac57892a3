"""The FLASH model: torchtune's ``TransformerDecoder`` over FLASH layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from flash_plugin.components.layer import FlashLayer
from flash_plugin.components.masks import check_mask, padding_of
from flash_plugin.components.mixers import MixedChunkMixer
from flash_plugin.components.positions import ScaledSinusoid
from flash_plugin.kernels import Segments, make_segments


class FlashDecoder(TransformerDecoder):
    """Token embeddings, FLASH layers, final norm, output projection.

    Documents and padding are worked out from ``input_pos`` once a forward and shared by all layers; a ``mask`` must
    agree with them (it is compared on every call outside training and once a shape in training) and is not used.

    Args:
        tok_embeddings: Token embedding.
        layers: FLASH layers.
        max_seq_len: Longest sequence accepted.
        qk_dim: Width z of queries and keys, torchtune's ``head_dim``.
        norm: Normalisation before the output projection.
        output: Output projection.
        causal: Whether the layers are causal.
        absolute_position: Absolute position embedding, or None.
    """

    def __init__(
        self,
        *,
        tok_embeddings: nn.Embedding,
        layers: list[FlashLayer],
        max_seq_len: int,
        qk_dim: int,
        norm: nn.Module,
        output: nn.Module,
        causal: bool,
        absolute_position: ScaledSinusoid | None = None,
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
        self._checked_masks: set[tuple[int, ...]] = set()
        self._chunk_sizes = {m.chunk_size for m in self.modules() if isinstance(m, MixedChunkMixer)}

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: object = None,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the next token everywhere.

        Args:
            tokens: Token ids, ``[b, s]``.
            mask: torchtune's attention mask ``[b, s, s]`` (or ``BlockMask``), which must say what ``input_pos`` says;
                or a padding mask ``[b, s]``, True at real tokens.
            encoder_input: Must be None: FLASH has no encoder.
            encoder_mask: Must be None.
            input_pos: Position of each token in its document, ``[b, s]`` or ``[s]``; a restart begins a document.
                None means one document a row.

        Raises:
            ValueError: If the sequence is longer than ``max_seq_len``, a token or position is out of range, or the
                mask cannot be honoured.

        Returns:
            Logits ``[b, s, vocab_size]`` in float32, or a list of them cut along s after
            ``set_num_output_chunks``; hidden states first if ``output_hidden_states`` asks for them.
        """
        self._check(tokens, encoder_input, encoder_mask)
        segments = self._segments(tokens, mask, input_pos)
        h = self.tok_embeddings(tokens)
        if self.absolute_position is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device)[None]
            h = h + self.absolute_position(position if segments is None else segments.position)
        hidden = []
        for i, layer in enumerate(self.layers):
            if i in self.output_hidden_states:
                hidden.append(h)
            h = layer(h, segments=segments)
        output = self.unembed(h)
        return [*hidden, output] if hidden else output

    def _segments(self, tokens: Tensor, mask: object, input_pos: Tensor | None) -> Segments | None:
        position = None if input_pos is None else self._position(tokens, input_pos)
        padding = padding_of(mask, self.causal)
        if position is None and padding is None:
            segments = None
        else:
            if position is not None and padding is not None:
                position = position.expand_as(tokens)
            segments = make_segments(position, padding_mask=padding).with_chunks(self._chunk_sizes)
        if mask is not None:
            kind = (input_pos is None, *getattr(mask, "shape", ()))
            # A recipe's collate makes the same kind of mask at every step: comparing s x s entries once is enough.
            if not self.training or kind not in self._checked_masks:
                check_mask(mask, segments, tokens, self.causal, has_positions=input_pos is not None)
                self._checked_masks.add(kind)
        return segments

    def _position(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """``input_pos`` as ``[1 or b, s]``: torchtune also passes ``[s]``, and ``[b]`` for one token a row."""
        batch, length = tokens.shape
        position = input_pos
        if position.dim() == 1:
            position = position[:, None] if length == 1 and position.shape[0] == batch else position[None]
        if position.dim() != 2 or position.shape[0] not in (1, batch) or position.shape[1] != length:
            raise ValueError(
                f"input_pos (shape {tuple(input_pos.shape)}) must be [b, s] or [s] for tokens of shape "
                f"{(batch, length)}; pass one position for each token"
            )
        if position.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(position.min()), int(position.max())
            if low < 0 or high >= self.max_seq_len:
                raise ValueError(
                    f"input_pos ({low if low < 0 else high}) must lie in [0, max_seq_len) = [0, {self.max_seq_len}); "
                    "set model.max_seq_len higher, or restart positions with each document"
                )
        return position

    def _check(self, tokens: Tensor, encoder_input: Tensor | None, encoder_mask: Tensor | None) -> None:
        if encoder_input is not None or encoder_mask is not None:
            raise ValueError(
                "encoder_input and encoder_mask must be None: a FLASH decoder has no encoder; leave them out"
            )
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens (shape {tuple(tokens.shape)}) must be [batch, sequence]; add the missing axis")
        if tokens.shape[1] > self.max_seq_len:
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
