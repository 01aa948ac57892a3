"""The gated attention unit between two sequences, and the layer that holds it in torchtune's encoder-decoders.

Shape legend: ``b`` batch, ``t`` decoder tokens, ``s`` encoder tokens, ``d`` embed, ``e`` expanded width, ``z``
query/key width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TransformerCrossAttentionLayer

from flash_plugin.components.cross_attention_cache import EncoderCache, check_padding, fit_mask
from flash_plugin.components.gau import OffsetScale
from flash_plugin.kernels.cross import cross_linear, cross_quadratic, sum_over_keys
from flash_plugin.kernels.validation import check_attention

FORMS = ("quadratic", "linear")


class CrossGatedAttentionUnit(nn.Module):
    """``output_proj(silu(gate_proj(x)) * mix(q, k, silu(v_proj(y))))`` for decoder tokens x and encoder tokens y.

    Queries come from x, as the gate does, and keys from y, as the values do. Sums are divided by the number of encoder
    tokens that are no padding, so that padding says nothing. There are no positions: x and y are different sequences,
    and tell their own apart by themselves.

    Args:
        embed_dim: Width d of x and of the output.
        expanded_dim: Width e of gate and values.
        qk_dim: Width z of queries and keys.
        encoder_dim: Width of y; None for ``embed_dim``.
        form: ``quadratic``, where each token weighs each encoder token by an activation, O(t s); or ``linear``, where
            the encoder's tokens are summed up once for all tokens, O(t + s). Mixed chunks there are none: the chunks
            of one sequence have no counterpart in another.
        activation: ``relu2`` (the default), ``laplace``, ``softplus2`` or ``softmax``; the linear form has none.
        dropout: Probability of zeroing an attention weight in training; the linear form has none to zero.
        proj_bias: Whether the projections have biases.

    Raises:
        ValueError: If an argument is unknown, out of range, or does not fit the form.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        expanded_dim: int,
        qk_dim: int,
        encoder_dim: int | None = None,
        form: str = "quadratic",
        activation: str | None = None,
        dropout: float = 0.0,
        proj_bias: bool = False,
    ) -> None:
        super().__init__()
        encoder_dim = embed_dim if encoder_dim is None else encoder_dim
        sizes = dict(embed_dim=embed_dim, expanded_dim=expanded_dim, qk_dim=qk_dim, encoder_dim=encoder_dim)
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} ({size!r}) must be a positive integer; pass {name}=...")
        if form not in FORMS:
            raise ValueError(
                f"form ({form!r}) must be one of {', '.join(FORMS)}: chunks of one sequence have no counterpart in "
                "another; set form='linear' for a cost that does not grow with the product of the lengths"
            )
        self.linear = form == "linear"
        if self.linear and activation is not None:
            raise ValueError(
                f"activation ({activation!r}) must be None with form='linear', which weighs no pairs; leave it out, or "
                "set form='quadratic'"
            )
        check_attention(activation=activation or "relu2", normalizer="visible", dropout=dropout, impl="auto")
        if self.linear and dropout:
            raise ValueError(
                f"dropout ({dropout}) must be 0.0 with form='linear', which has no attention weights; leave it out, or "
                "set form='quadratic'"
            )
        self.activation = None if self.linear else activation or "relu2"
        self.embed_dim = embed_dim
        self.encoder_dim = encoder_dim
        self.expanded_dim = expanded_dim
        self.qk_dim = qk_dim
        self.dropout = dropout
        self.gate_proj = nn.Linear(embed_dim, expanded_dim, bias=proj_bias)
        self.q_proj = nn.Linear(embed_dim, qk_dim, bias=proj_bias)
        self.k_proj = nn.Linear(encoder_dim, qk_dim, bias=proj_bias)
        self.v_proj = nn.Linear(encoder_dim, expanded_dim, bias=proj_bias)
        self.q_offset_scale = OffsetScale(qk_dim, 1)
        self.k_offset_scale = OffsetScale(qk_dim, 1)
        self.output_proj = nn.Linear(expanded_dim, embed_dim, bias=proj_bias)
        # torchtune looks for these two names.
        self.kv_cache: EncoderCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Set up and enable a cache of the encoder's side, in place of one that is there.

        Args:
            batch_size: Rows that every call will have.
            dtype: The model's dtype.
            max_seq_len: Encoder tokens a row may have.

        Raises:
            ValueError: If a size is no positive integer.
        """
        self.kv_cache = EncoderCache(
            batch_size=batch_size,
            dtype=dtype,
            max_seq_len=max_seq_len,
            qk_dim=self.qk_dim,
            expanded_dim=self.expanded_dim,
            summed=self.linear,
        )
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Make the cache forget the encoder's tokens."""
        if self.kv_cache is None:
            raise RuntimeError(
                "the cache (None) must be set up before it can be reset; call model.setup_caches() first"
            )
        self.kv_cache.reset()

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Give ``[b, t, d]`` (normalised) decoder tokens what they find in the encoder's.

        Args:
            x: Decoder tokens, ``[b, t, d]``.
            y: Encoder tokens, ``[b, s, encoder_dim]``, taken in the dtype of x. With an enabled cache they go behind
                those it holds, and None means those alone.
            mask: Which encoder tokens each token sees, those in the cache first: ``[b, t, s]`` or, for padding,
                ``[b, s]``, bool. None means all; of those in the cache, all that some token saw in the call that they
                came with. The quadratic form honours any; in the linear form a token sees all encoder tokens that are
                no padding, or none.

        Raises:
            ValueError: If a shape does not fit, the mask cannot be honoured, or there are no encoder tokens.

        Returns:
            ``[b, t, d]``; 0 for a token that sees nothing.
        """
        cache = self.kv_cache if self.cache_enabled else None
        held = 0 if cache is None else cache.size
        self._check_inputs(x, y, held)
        fresh = 0 if y is None else y.shape[1]
        if cache is not None:
            cache.check_room(x.shape[0], fresh)
        places = None if cache is None else cache.max_seq_len
        visible = fit_mask(mask, x.shape[0], x.shape[1], held + fresh, places)
        real = self._real_keys(visible, held, fresh, x.device)
        if visible is not None and self.linear:
            check_padding(visible, real)

        keys = values = None
        if y is not None:
            y = y.to(x.dtype)  # torchtune's decoders, as encoders, give float32 whatever they compute in
            (keys,) = self.k_offset_scale(self.k_proj(y), silu=True)
            values = F.silu(self.v_proj(y))
        (q,) = self.q_offset_scale(self.q_proj(x), silu=True)
        gate = self.gate_proj(x)
        seen = real[:, None] if visible is None else visible
        if self.activation is None:
            kv = self._sum(keys, values, real[:, held:])
            mixed = cross_linear(q, gate=gate, kv=kv, count=real.sum(dim=-1))
        else:
            keys, values = self._pairs(keys, values, real[:, held:], q.dtype)
            dropout = self.dropout if self.training else 0.0
            mixed = cross_quadratic(
                q, keys, values, gate=gate, visible=seen, activation=self.activation, dropout=dropout
            )
        out: Tensor = self.output_proj(mixed)
        if visible is None and not held:
            return out
        return out.masked_fill(~seen.any(dim=-1, keepdim=True), 0.0)

    def _real_keys(self, visible: Tensor | None, held: int, fresh: int, device: torch.device) -> Tensor:
        """Encoder tokens that are no padding, ``[1 or b, held + fresh]``: those that some token sees when they come."""
        if visible is None:
            came = torch.ones(1, fresh, dtype=torch.bool, device=device)
        else:
            came = visible[..., held:].any(dim=1)
        if not held:
            return came
        assert self.kv_cache is not None
        before = self.kv_cache.real[:, :held]
        return torch.cat([before, came.expand(before.shape[0], -1)], dim=1)

    def _sum(self, keys: Tensor | None, values: Tensor | None, real: Tensor) -> Tensor:
        """The sum over all encoder tokens, those in the cache included, which keeps it."""
        cache = self.kv_cache if self.cache_enabled else None
        before = cache.kv if cache is not None and cache.size else None
        if keys is None or values is None:
            assert before is not None
            return before
        kv = sum_over_keys(keys, values, real=real)
        if before is not None:
            kv = before + kv
        if cache is not None:
            cache.add(real, kv=kv)
        return kv

    def _pairs(
        self, keys: Tensor | None, values: Tensor | None, real: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all encoder tokens, those in the cache included, which keeps the new ones."""
        cache = self.kv_cache if self.cache_enabled else None
        before = None
        if cache is not None and cache.size:
            before = cache.keys[:, : cache.size].to(dtype), cache.values[:, : cache.size].to(dtype)
        if keys is None or values is None:
            assert before is not None
            return before
        if cache is not None:
            cache.add(real, keys=keys, values=values)
        if before is not None:
            # Not read back from the cache: gradients reach what came with this call.
            keys, values = torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)
        return keys, values

    def _check_inputs(self, x: Tensor, y: Tensor | None, held: int) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x (shape {tuple(x.shape)}) must be [b, t, embed_dim] = [b, t, {self.embed_dim}]; pass the decoder's "
                "tokens, or build the unit with their width"
            )
        if y is None:
            if not held:
                raise ValueError(
                    "y (None) must be given while no cache holds an encoder's tokens; pass them, or set up and fill "
                    "the caches first"
                )
        elif y.dim() != 3 or y.shape[0] != x.shape[0] or y.shape[1] == 0 or y.shape[2] != self.encoder_dim:
            raise ValueError(
                f"encoder_input (shape {tuple(y.shape)}) must be [b, s, encoder_dim] = [{x.shape[0]}, s, "
                f"{self.encoder_dim}] with s > 0; pass None for no encoder, or build the unit with encoder_dim="
                f"{y.shape[-1]}"
            )


class FlashCrossAttentionLayer(TransformerCrossAttentionLayer):
    """``x + ca_scale(attn(ca_norm(x), encoder_input))``, in the place of torchtune's cross-attention layer.

    It is one so that torchtune's ``FusionLayer``, ``DeepFusionModel``, caches and compilation find it; it has no MLP,
    the gated attention unit is both. Without ``encoder_input``, or an encoder's tokens in the cache, it passes ``x``
    on, as that layer does.

    Args:
        attn: The gated attention unit.
        ca_norm: Normalisation before it.
        ca_scale: What its result goes through before it is added, as torchtune's ``TanhGate``, which starts at 0 so
            that a pretrained decoder starts as it was; None for nothing.
    """

    def __init__(self, attn: CrossGatedAttentionUnit, *, ca_norm: nn.Module, ca_scale: nn.Module | None = None) -> None:
        nn.Module.__init__(self)  # The parent's own constructor wants an attention with heads and an MLP.
        self.attn = attn
        self.ca_norm = ca_norm
        self.ca_scale = nn.Identity() if ca_scale is None else ca_scale

    def setup_caches(
        self, batch_size: int, dtype: torch.dtype, *, encoder_max_seq_len: int, decoder_max_seq_len: int | None
    ) -> None:
        """Set up a cache of the encoder's side, in place of one that is there.

        Args:
            batch_size: Rows that every call will have.
            dtype: The model's dtype.
            encoder_max_seq_len: Encoder tokens a row may have.
            decoder_max_seq_len: Not used; torchtune passes it to every kind of layer.

        Raises:
            ValueError: If a size is no positive integer.
        """
        self.attn.setup_cache(batch_size, dtype, max_seq_len=encoder_max_seq_len)

    def forward(
        self,
        x: Tensor,
        *,
        encoder_input: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        mask: object = None,
        input_pos: Tensor | None = None,
        segments: object = None,
        new: object = None,
    ) -> Tensor:
        """Transform ``[b, t, d]``.

        Args:
            x: Input, ``[b, t, d]``.
            encoder_input: The encoder's output, ``[b, s, encoder_dim]``; with an enabled cache None means what it
                holds.
            encoder_mask: Which of the encoder's tokens each token sees, ``[b, t, s]`` bool (with a cache s may be
                ``encoder_max_seq_len``), or ``[b, s]``, True at those that are no padding; see
                :class:`CrossGatedAttentionUnit`.
            mask: Not used; torchtune passes it to every kind of layer.
            input_pos: Not used, likewise.
            segments: Not used; FLASH models pass it to every kind of layer.
            new: Not used, likewise.

        Raises:
            ValueError: If a shape does not fit, or the mask cannot be honoured.

        Returns:
            ``[b, t, d]``; x itself where a token sees nothing.
        """
        cache = self.attn.kv_cache if self.attn.cache_enabled else None
        if encoder_input is None and (cache is None or cache.size == 0):
            return x
        return x + self.ca_scale(self.attn(self.ca_norm(x), encoder_input, mask=encoder_mask))
