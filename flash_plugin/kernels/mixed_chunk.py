"""FLASH's mixed chunk attention: quadratic inside chunks, linear across them."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from flash_plugin.kernels.activations import gated
from flash_plugin.kernels.autocast import like_matrix_products
from flash_plugin.kernels.batched import mixed_chunk_batched
from flash_plugin.kernels.blocked import Options, blocked_applies, mixed_chunk_blocked
from flash_plugin.kernels.layout import (
    Layout,
    LinearState,
    counted,
    default_scale,
    global_weight,
    state_dtype,
)
from flash_plugin.kernels.linear import linear_attention
from flash_plugin.kernels.segments import Segments, unless_single
from flash_plugin.kernels.validation import (
    check_attention,
    check_bias,
    check_chunk_size,
    check_gate,
    check_queries_and_keys,
    check_segments,
    check_softcap,
    check_state,
    check_values,
    not_in_triton,
    use_triton,
)


@like_matrix_products
def mixed_chunk_attention(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    segments: Segments | None = None,
    causal: bool = True,
    activation: str = "relu2",
    normalizer: str = "visible",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    silu: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """FLASH (paper section 3.1, equations 7 and 8): ``out_t = gate_t * (local_t + global_t)`` in O(s c).

    ``local_t`` is the quadratic form among the tokens of t's chunk; ``global_t = q_global_t . sum k_global^T v`` over
    the chunks strictly before t's (causal) or over t's whole document, divided as ``normalizer`` says.

    Args:
        q_local: Queries inside the chunk, ``[b, s, z]``.
        k_local: Keys inside the chunk, ``[b, s, z]``.
        q_global: Queries across chunks, ``[b, s, z]``.
        k_global: Keys across chunks, ``[b, s, z]``.
        v: Values, ``[b, s, e]``.
        chunk_size: Tokens of a chunk, c; it need not divide s.
        gate: Multiplies the result, ``[b, s, e]``.
        bias: Added to the local scores, ``[2c - 1]``, indexed by ``(t - s) + c - 1``.
        segments: Documents and padding, from :func:`make_segments`; None means one document a row.
        causal: Whether tokens see only themselves and what lies before them.
        activation: ``relu2``, ``laplace``, ``softplus2`` or ``softmax`` (over the visible keys of the chunk).
        normalizer: ``visible`` divides both parts by the number of keys they sum over; ``paper`` the global part by
            s; ``chunk`` by c (causal) or s. ``paper``, and a bidirectional ``chunk``, depend on
            the tensor's length: with them a token's output changes when text or padding is added.
        scale: Factor of the local q.k; by default ``z**-0.5`` for ``visible`` and ``1/c`` for the others.
        softcap: Bound that the local scores approach, ``softcap * tanh(score / softcap)``, as in Gemma 2; ``softmax``
            only.
        dropout: Probability of zeroing a local attention weight; the caller passes 0 outside training.
        initial_state: What lies before each row's first document, counted as earlier chunks. Causal only.
        return_state: Also return the state of each row's last document. Causal only.
        silu: Apply SiLU to ``v`` and ``gate`` inside the op.
        impl: ``auto``, ``triton`` or ``reference`` (PyTorch, chunked).

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        ``[b, s, e]`` in the dtype of ``v``, and a :class:`LinearState` if ``return_state``.
    """
    check_attention(activation=activation, normalizer=normalizer, dropout=dropout, impl=impl)
    check_chunk_size(chunk_size)
    check_softcap(softcap, activation)
    check_queries_and_keys({"q_local": q_local, "k_local": k_local, "q_global": q_global, "k_global": k_global}, dims=3)
    check_values("v", v, "q_local", q_local)
    check_gate(gate, v)
    check_bias(bias, chunk_size, v)
    check_segments(segments, v)
    check_state(initial_state, causal, return_state, (v.shape[0], q_global.shape[-1], v.shape[-1]))
    segments = unless_single(segments)
    segmented = segments is not None
    if scale is None:
        scale = default_scale(normalizer, q_local.shape[-1], chunk_size)
    lay_out = partial(Layout.of, segments, v.shape[1], chunk_size, v.device)
    weigh = partial(
        global_weight, normalizer, causal=causal, chunk_size=chunk_size, initial=initial_state,
        dtype=state_dtype(v.dtype),
    )  # fmt: skip

    final: Tensor | None
    if use_triton(impl, v, not_in_triton(activation, dropout, v)):
        from flash_plugin.kernels.triton.calls import call_mixed_chunk

        # A bidirectional global part takes in its whole row, so that of several documents is left to linear attention.
        apart = segmented and not causal
        out, final = call_mixed_chunk(
            q_local,
            k_local,
            q_global,
            k_global,
            v,
            chunk_size=chunk_size,
            gate=None if apart else gate,
            bias=bias,
            segments=segments,
            causal=causal,
            activation=activation,
            normalizer=normalizer,
            scale=scale,
            linear=not apart,
            initial=initial_state,
            final=return_state,
            silu=silu,
        )
        if apart:
            values = F.silu(v) if silu else v
            across = linear_attention(
                _times(q_global, weigh(layout=lay_out())).unsqueeze(1), k_global.unsqueeze(1), values.unsqueeze(1),
                causal=False, segments=segments, impl=impl,
            )  # fmt: skip
            assert isinstance(across, Tensor)
            out = gated(out + across.squeeze(1), gate, silu)
    elif blocked_applies(v, segmented, causal, activation, dropout, scale):
        options = Options(chunk_size, activation, normalizer, float(scale), silu, return_state)
        initial_kv, factor = None if initial_state is None else initial_state.kv, weigh(layout=lay_out())
        out, final = mixed_chunk_blocked(
            q_local, k_local, q_global, k_global, v, gate, bias, initial_kv, factor, options
        )
    else:
        layout = lay_out()
        mixed, final = mixed_chunk_batched(
            q_local,
            k_local,
            _times(q_global, weigh(layout=layout)),
            k_global,
            F.silu(v) if silu else v,
            bias,
            None if initial_state is None else initial_state.kv,
            layout,
            segmented=segmented,
            chunk_size=chunk_size,
            causal=causal,
            activation=activation,
            normalizer=normalizer,
            scale=scale,
            softcap=softcap,
            dropout=dropout,
        )
        out = gated(mixed, gate, silu)
    if not return_state:
        return out
    assert final is not None
    return out, LinearState(final, counted(lay_out(), initial_state, v.shape[0]))


def _times(queries: Tensor, factor: Tensor) -> Tensor:
    """``[b, s, z]`` times ``[b, s]``, rounded once: a rounded factor would be off for all features alike."""
    return (queries.to(factor.dtype) * factor[..., None]).to(queries.dtype)
