"""Linear attention for any number of heads and any widths."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flash_plugin.kernels.autocast import like_matrix_products
from flash_plugin.kernels.batched import linear_batched
from flash_plugin.kernels.layout import Layout, LinearState, counted, state_dtype
from flash_plugin.kernels.segments import Segments, unless_single
from flash_plugin.kernels.validation import (
    check_implementation,
    check_key_sum,
    check_queries_and_keys,
    check_segments,
    check_state,
    check_values,
    is_number,
    size_not_in_triton,
    use_triton,
)

# Tokens worked on at once: pairs inside a block cost block * (z + e) a token, the state z * e / block.
_BLOCK = 128


@like_matrix_products
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    normalize: bool = False,
    scale: float = 1.0,
    eps: float = 1e-6,
    segments: Segments | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention (Katharopoulos et al. 2020, equations 9 to 12): ``out_t = sum_s (scale q_t.k_s) v_s`` in O(s).

    Args:
        q: Queries, ``[b, h, s, z]``, after the feature map.
        k: Keys, ``[b, h, s, z]``, after the feature map.
        v: Values, ``[b, h, s, e]``; e may be smaller or larger than z.
        causal: Whether the sum runs over ``s <= t`` or over the whole document.
        normalize: Divide by ``sum_s scale q_t.k_s + eps``.
        scale: Factor of q.k.
        eps: Keeps the denominator from 0; used with ``normalize`` only.
        segments: Documents and padding, from :func:`make_segments`; None means one document a row.
        initial_state: What lies before each row's first document; with ``normalize`` or ``return_state`` it needs
            its ``key_sum``.
        return_state: Also return the state of each row's last document. Both are for causal attention only.
        impl: ``auto``, ``triton`` or ``reference`` (PyTorch, chunked).

    Raises:
        ValueError: If an argument is out of range or does not fit the others.
        RuntimeError: If ``impl`` cannot run here.

    Returns:
        ``[b, h, s, e]`` in the dtype of ``v``, and a :class:`LinearState` if ``return_state``.
    """
    check_implementation(impl)
    check_queries_and_keys({"q": q, "k": k}, dims=4)
    check_values("v", v, "q", q)
    check_segments(segments, q)
    batch, heads, length, _ = v.shape
    check_state(initial_state, causal, return_state, (batch, heads, q.shape[-1], v.shape[-1]))
    for name, value in (("scale", scale), ("eps", eps)):
        if not is_number(value):
            raise ValueError(f"{name} ({value!r}) must be a number; multiply q by a scale that is learned")
    sums_keys = normalize or return_state
    check_key_sum(initial_state, sums_keys)
    segments = unless_single(segments)
    lay_out = partial(Layout.of, segments, length, None, v.device)
    if use_triton(impl, v, size_not_in_triton(v)):
        from flash_plugin.kernels.triton.calls import call_linear

        out, kv, key_sum = call_linear(
            q,
            k,
            v,
            segments=segments,
            causal=causal,
            normalize=normalize,
            scale=scale,
            eps=eps,
            initial=initial_state,
            final=return_state,
        )
        if kv is None:
            return out
        return out, LinearState(kv, counted(lay_out(), initial_state, batch), key_sum)
    layout, segmented = lay_out(), segments is not None
    # All of it in float32: the quotient of two rounded sums would lose half precision's few digits.
    dtype = state_dtype(v.dtype)
    queries, keys, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    initial_kv = None if initial_state is None else initial_state.kv.to(dtype)
    if sums_keys:
        # The denominator is linear attention over values of 1: one more column of v carries it and the sum of keys.
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        if initial_state is not None and initial_kv is not None:
            assert initial_state.key_sum is not None
            initial_kv = torch.cat([initial_kv, initial_state.key_sum.to(dtype)[..., None]], dim=-1)
    out, final = linear_batched(
        queries.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        None if initial_kv is None else initial_kv.flatten(0, 1),
        layout.repeated(heads) if segmented else layout,
        segmented=segmented,
        causal=causal,
        block=_BLOCK,
    )
    out = out.unflatten(0, (batch, heads))
    if sums_keys:
        out, denominator = out[..., :-1], out[..., -1:]
        if normalize:
            out = out / (denominator + eps)
    out = out.to(v.dtype)
    if not return_state:
        return out
    assert final is not None
    final = final.unflatten(0, (batch, heads))
    return out, LinearState(final[..., :-1], counted(layout, initial_state, batch), final[..., -1])
