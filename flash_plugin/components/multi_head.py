"""Multi-head attention of other people's models with FLASH's attention in its place; projections stay theirs.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed, ``h`` heads, ``z`` head width, ``c`` chunk size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention

from flash_plugin.components.cache import FlashCache, LinearCache
from flash_plugin.components.global_path import GlobalPath
from flash_plugin.components.placement import Placement
from flash_plugin.kernels import Segments, linear_attention, mixed_chunk_attention, quadratic_attention
from flash_plugin.kernels.decode import mixed_chunk_decode, quadratic_decode
from flash_plugin.kernels.new_tokens import NewTokens

_TAKEN_OVER = ("embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "is_causal", "attn_dropout")


class _SwappedAttention(MultiHeadAttention):
    """The projections, rotation and norms of an attention module, and another rule for what attends to what.

    It stays a ``MultiHeadAttention``, with the names and weights that it had, for whatever of torchtune looks for one.

    Args:
        attention: The module to replace; its submodules are taken over.
        placement: Where documents and new tokens lie; shared by the model's layers.
        activation: Attention function.
        impl: Implementation of the op.
    """

    chunk_size: int | None = None
    kv_cache: FlashCache | LinearCache | None

    def __init__(
        self, attention: MultiHeadAttention | Gemma2Attention, placement: Placement, *, activation: str, impl: str
    ) -> None:
        nn.Module.__init__(self)  # The parent's own constructor wants parts that are there already.
        for name in _TAKEN_OVER:
            setattr(self, name, getattr(attention, name))
        for name in ("q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "pos_embeddings"):
            setattr(self, name, getattr(attention, name))
        # Gemma 2 scales queries by its own number, and bounds the scores of its softmax.
        self.query_factor = getattr(attention, "scaling", self.head_dim**-0.5) * self.head_dim**0.5
        self.softcap = getattr(attention, "softcapping", None) if activation == "softmax" else None
        self.placement = placement
        self.activation = activation
        self.impl = impl
        self.kv_cache = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Set up and enable a decoding cache, in place of one that is there; arguments as of torchtune's."""
        self.kv_cache = FlashCache(
            batch_size=batch_size * self.num_heads,
            dtype=dtype,
            max_seq_len=max_seq_len,
            qk_dim=self.head_dim,
            expanded_dim=self.head_dim,
            chunk_size=self.chunk_size,
        )
        self.cache_enabled = True

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: object = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Attend, ``[b, s, d]``.

        Args:
            x: Input, ``[b, s, d]``.
            y: The same; torchtune passes it twice.
            mask: Not read: the model checks that it says what ``input_pos`` says.
            input_pos: Position of each token in its document, as torchtune gives it to a layer.

        Raises:
            ValueError: If ``y`` is another sequence.

        Returns:
            ``[b, s, d]``.
        """
        if y is not None and y.shape != x.shape:
            raise ValueError(
                f"y (shape {tuple(y.shape)}) must be x (shape {tuple(x.shape)}): a swapped attention attends to its "
                "own sequence; leave cross-attention as it is"
            )
        cache = self.kv_cache if self.cache_enabled else None
        segments, new = self.placement.of(x, input_pos, self.num_heads, cache)
        q, k, v = self._heads(x, input_pos)
        if cache is None:
            out = self._attend(q, k, v, segments)
        else:
            assert new is not None
            out = self._decode(q, k, v, cache, new)
            cache.advance(new)
        out = out.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)
        return self.output_proj(out)

    def _heads(self, x: Tensor, input_pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[b, h, s, z]``, in torchtune's order of rotation and norm."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.pos_embeddings is not None:
            q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.query_factor != 1.0:
            q = q * self.query_factor
        queries_per_key = self.num_heads // self.num_kv_heads
        if queries_per_key > 1:
            k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        """``[b * h, s, z]`` from ``[b, h, s, z]``."""
        raise NotImplementedError

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: FlashCache | LinearCache, new: NewTokens) -> Tensor:
        """The same for tokens behind those in the cache."""
        raise NotImplementedError

    def _dropout(self) -> float:
        return self.attn_dropout if self.training else 0.0


class MixedChunkMultiHeadAttention(_SwappedAttention):
    """Attention inside chunks, linear attention across them, for each head (paper section 3.1; its MC-TFM).

    Args:
        attention: The module to replace.
        placement: Where documents and new tokens lie.
        chunk_size: Tokens of a chunk.
        activation: Attention function inside chunks. With ``softmax`` the global part starts at 0, and a sequence of
            one chunk gets what the replaced module gave it; with any other it starts at 1.
        impl: Implementation of the op.
        lora: Rank and alpha where a LoRA recipe trains the model.
    """

    chunk_size: int

    def __init__(
        self,
        attention: MultiHeadAttention | Gemma2Attention,
        placement: Placement,
        *,
        chunk_size: int,
        activation: str = "softmax",
        impl: str = "auto",
        lora: tuple[int, float] | None = None,
    ) -> None:
        super().__init__(attention, placement, activation=activation, impl=impl)
        self.chunk_size = chunk_size
        gain = 0.0 if activation == "softmax" else 1.0
        self.global_path = GlobalPath(self.num_heads, self.head_dim, gain, lora)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        q_local, k_local, q_global, k_global, values = _folded(q, k, *self.global_path(q, k), v)
        out = mixed_chunk_attention(
            q_local,
            k_local,
            q_global,
            k_global,
            values,
            chunk_size=self.chunk_size,
            segments=segments,
            activation=self.activation,
            normalizer="visible",
            softcap=self.softcap,
            dropout=self._dropout(),
            impl=self.impl,
        )
        assert isinstance(out, Tensor)
        return out

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: FlashCache | LinearCache, new: NewTokens) -> Tensor:
        assert isinstance(cache, FlashCache)
        q_local, k_local, q_global, k_global, values = _folded(q, k, *self.global_path(q, k), v)
        return mixed_chunk_decode(
            q_local,
            k_local,
            q_global,
            k_global,
            values,
            None,
            cache.chunk_memory(),
            new,
            chunk_size=self.chunk_size,
            bias=None,
            activation=self.activation,
            normalizer="visible",
            softcap=self.softcap,
            dropout=self._dropout(),
            impl=self.impl,
            silu=False,
        )


class QuadraticMultiHeadAttention(_SwappedAttention):
    """FLASH-Quad's attention, element-wise in place of softmax, for each head (paper section 2).

    Args:
        attention: The module to replace.
        placement: Where documents and new tokens lie.
        activation: Attention function.
        impl: Implementation of the op.
    """

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        queries, keys, values = _folded(q, k, v)
        return quadratic_attention(
            queries,
            keys,
            values,
            segments=segments,
            activation=self.activation,
            dropout=self._dropout(),
            impl=self.impl,
        )

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: FlashCache | LinearCache, new: NewTokens) -> Tensor:
        assert isinstance(cache, FlashCache)
        queries, keys, values = _folded(q, k, v)
        return quadratic_decode(
            queries,
            keys,
            values,
            None,
            cache.document_memory(),
            new,
            bias=None,
            activation=self.activation,
            dropout=self._dropout(),
            impl=self.impl,
            silu=False,
        )


class LinearMultiHeadAttention(_SwappedAttention):
    """Linear attention with its denominator, for each head (Katharopoulos et al. 2020), features ``elu(x) + 1``.

    Nothing of softmax is left in it: a pretrained model starts far from where it was.

    Args:
        attention: The module to replace.
        placement: Where documents and new tokens lie.
        impl: Implementation of the op.
    """

    def __init__(self, attention: MultiHeadAttention | Gemma2Attention, placement: Placement, *, impl: str) -> None:
        super().__init__(attention, placement, activation="elu", impl=impl)

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Set up and enable a decoding cache, in place of one that is there; arguments as of torchtune's."""
        self.kv_cache = LinearCache(
            batch_size=batch_size * self.num_heads,
            dtype=dtype,
            max_seq_len=max_seq_len,
            qk_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        self.cache_enabled = True

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        queries, keys, values = (tensor.unsqueeze(1) for tensor in _folded(F.elu(q) + 1, F.elu(k) + 1, v))
        out = linear_attention(queries, keys, values, normalize=True, segments=segments, impl=self.impl)
        assert isinstance(out, Tensor)
        return out.squeeze(1)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, cache: FlashCache | LinearCache, new: NewTokens) -> Tensor:
        assert isinstance(cache, LinearCache)
        queries, keys, values = (tensor.unsqueeze(1) for tensor in _folded(F.elu(q) + 1, F.elu(k) + 1, v))
        result = linear_attention(
            queries,
            keys,
            values,
            normalize=True,
            segments=new.segments,
            initial_state=cache.state(new),
            return_state=True,
            impl=self.impl,
        )
        assert isinstance(result, tuple)
        out, state = result
        cache.keep(state)
        return out.squeeze(1)


def _folded(*tensors: Tensor) -> list[Tensor]:
    """Heads as rows: ``[b, h, s, z]`` to ``[b * h, s, z]``."""
    return [tensor.flatten(0, 1) for tensor in tensors]
