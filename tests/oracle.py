"""The ops, written a second time from the formulas alone: dense, float64, one row of the batch at a time.

Nothing here is shared with ``flash_plugin``: documents and chunks are found token by token in Python, who sees whom is
an explicit s x s mask, and every sum is one matrix product with it. Slow on purpose; differentiable through autograd.

Shapes: b batch, s sequence, z query/key width, e value width, c chunk size, h heads, d width, n projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What came before the row's first document: sum of k^T v, how many tokens, sum of k."""

    kv: Tensor
    count: Tensor
    key_sum: Tensor | None = None


def place_tokens(
    b: int, s: int, chunk_size: int = 1, input_pos: Tensor | None = None, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The document and the chunk of every token, both [b, s] and numbered from 0 in each row; -1 marks padding."""
    documents, chunks = torch.full((b, s), -1), torch.full((b, s), -1)
    for row in range(b):
        document, chunk, position = -1, -1, 0
        for t in range(s):
            if padding_mask is not None and not bool(padding_mask[row, t]):
                continue
            starts = t == 0 or (padding_mask is not None and not bool(padding_mask[row, t - 1]))
            if input_pos is None:
                position = 0 if starts else position + 1
            else:
                position = int(input_pos[row, t])
                starts = starts or position == 0 or position != int(input_pos[row, t - 1]) + 1
            document += int(starts)
            chunk += int(starts or position % chunk_size == 0)
            documents[row, t], chunks[row, t] = document, chunk
    return documents, chunks


def activate(scores: Tensor, activation: str) -> Tensor:
    """The elementwise activations of the scores."""
    if activation == "relu2":
        return scores.clamp(min=0) ** 2
    if activation == "softplus2":
        return torch.logaddexp(scores, torch.zeros_like(scores)) ** 2
    if activation == "laplace":
        mu, sigma = math.sqrt(1 / 2), math.sqrt(1 / (4 * math.pi))
        return 0.5 * (1 + torch.erf((scores - mu) / (sigma * math.sqrt(2))))
    raise AssertionError(activation)


def weigh(scores: Tensor, sees: Tensor, activation: str, normalizer: str) -> Tensor:
    """The weights A [s, s] of one row; a query that sees nothing gets zeros."""
    if activation == "softmax":
        top = scores.detach().masked_fill(~sees, -math.inf).amax(dim=1, keepdim=True)
        powers = torch.exp((scores - top.clamp(min=-1e300)).masked_fill(~sees, -math.inf))
        return powers / torch.where(sees.any(dim=1, keepdim=True), powers.sum(dim=1, keepdim=True), 1.0)
    weights = torch.where(sees, activate(scores, activation), 0.0)
    if normalizer == "visible":
        weights = weights / sees.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def add_bias(scores: Tensor, bias: Tensor | None) -> Tensor:
    """scores[t, s] + bias[t - s], the vector's middle entry standing for t == s."""
    if bias is None:
        return scores
    middle = (bias.numel() - 1) // 2
    index = torch.arange(scores.shape[0])
    return scores + bias.double()[(index[:, None] - index[None, :]).clamp(-middle, middle) + middle]


def gated(v: Tensor, gate: Tensor | None, silu: bool) -> tuple[Tensor, Tensor | float]:
    """Values and gate, after SiLU if it is asked for."""
    v = v.double()
    if gate is None:
        return v * torch.sigmoid(v) if silu else v, 1.0
    gate = gate.double()
    return (v * torch.sigmoid(v), gate * torch.sigmoid(gate)) if silu else (v, gate)


def default_scale(scale: float | Tensor | None, normalizer: str, z: int, length: int) -> float | Tensor:
    """The factor on q.k: 1/sqrt(z), or 1/L where the paper's square holds the length."""
    if scale is not None:
        return scale
    return z**-0.5 if normalizer == "visible" else 1 / length


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    input_pos: Tensor | None = None,
    padding_mask: Tensor | None = None,
    causal: bool = True,
    activation: str = "relu2",
    normalizer: str = "visible",
    scale: float | Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Sum over the s that t sees of A_ts v_s."""
    b, s, z = q.shape
    documents, _ = place_tokens(b, s, 1, input_pos, padding_mask)
    factor = default_scale(scale, normalizer, z, s)
    values, gates = gated(v, gate, silu)
    rows = []
    for row in range(b):
        sees = who_sees(documents[row], documents[row], causal)
        scores = add_bias(factor * q[row].double() @ k[row].double().T, bias)
        rows.append(weigh(scores, sees, activation, normalizer) @ values[row])
    return torch.stack(rows) * gates


def who_sees(group: Tensor, documents: Tensor, causal: bool) -> Tensor:
    """sees[t, s]: both are real, in the same group, and s is not later where the form is causal."""
    sees = (group[:, None] == group[None, :]) & (documents[:, None] >= 0) & (documents[None, :] >= 0)
    return sees.tril() if causal else sees


def mixed_chunk(
    q_local: Tensor,
    k_local: Tensor,
    q_global: Tensor,
    k_global: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    input_pos: Tensor | None = None,
    padding_mask: Tensor | None = None,
    causal: bool = True,
    activation: str = "relu2",
    normalizer: str = "visible",
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    silu: bool = False,
    initial_state: State | None = None,
) -> tuple[Tensor, State]:
    """The quadratic form inside each chunk plus linear attention over the chunks before it (both ways: over all)."""
    b, s, z = q_local.shape
    documents, chunks = place_tokens(b, s, chunk_size, input_pos, padding_mask)
    factor = default_scale(scale, normalizer, z, chunk_size)
    values, gates = gated(v, gate, silu)
    rows, sums, counts = [], [], []
    for row in range(b):
        document, chunk = documents[row], chunks[row]
        scores = add_bias(factor * q_local[row].double() @ k_local[row].double().T, bias)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        local = weigh(scores, who_sees(chunk, document, causal), activation, normalizer) @ values[row]

        queries, keys = q_global[row].double(), k_global[row].double()
        sees = who_sees(document, document, False)
        if causal:
            sees = sees & (chunk[None, :] < chunk[:, None])
        far = torch.where(sees, queries @ keys.T, 0.0) @ values[row]
        count = sees.sum(dim=1, keepdim=True)
        if initial_state is not None:
            first = (document == 0)[:, None]
            far = far + torch.where(first, queries @ initial_state.kv[row].double(), 0.0)
            count = count + torch.where(first, initial_state.count[row], 0)
        if normalizer == "visible":
            far = far / count.clamp(min=1)
        elif normalizer == "chunk" and causal:
            far = far / chunk_size
        else:
            far = far / s
        rows.append(local + far)

        last = (document == document.max()) & (document >= 0)
        carried = initial_state is not None and int(document.max()) <= 0
        kv = (keys * last[:, None]).T @ values[row]
        sums.append(kv + initial_state.kv[row].double() if initial_state is not None and carried else kv)
        counts.append(last.sum() + (initial_state.count[row] if initial_state is not None and carried else 0))
    return torch.stack(rows) * gates, State(torch.stack(sums), torch.stack(counts))


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    normalize: bool = False,
    scale: float = 1.0,
    eps: float = 1e-6,
    input_pos: Tensor | None = None,
    padding_mask: Tensor | None = None,
    initial_state: State | None = None,
) -> tuple[Tensor, State]:
    """Sum over the s that t sees of (scale q_t.k_s) v_s, divided by the weights' sum where asked; [b, h, s, e]."""
    b, _, s, _ = q.shape
    documents, _ = place_tokens(b, s, 1, input_pos, padding_mask)
    q, k, v = q.double(), k.double(), v.double()
    rows, sums, counts, key_sums = [], [], [], []
    for row in range(b):
        document = documents[row]
        weights = torch.where(who_sees(document, document, causal), scale * q[row] @ k[row].mT, 0.0)
        out, denominator = weights @ v[row], weights.sum(dim=-1, keepdim=True)
        last = (document == document.max()) & (document >= 0)
        kept = k[row] * last[:, None]
        kv, key_sum, count = kept.mT @ v[row], kept.sum(dim=-2), last.sum()
        if initial_state is not None:
            first = (document == 0)[:, None]
            before, before_keys = initial_state.kv[row].double(), initial_state.key_sum
            out = out + torch.where(first, scale * q[row] @ before, 0.0)
            if before_keys is not None:
                near = scale * (q[row] * before_keys[row].double()[:, None]).sum(dim=-1, keepdim=True)
                denominator = denominator + torch.where(first, near, 0.0)
            if int(document.max()) <= 0:
                kv, count = kv + before, count + initial_state.count[row]
                key_sum = key_sum if before_keys is None else key_sum + before_keys[row].double()
        rows.append(out / (denominator + eps) if normalize else out)
        sums.append(kv)
        counts.append(count)
        key_sums.append(key_sum)
    return torch.stack(rows), State(torch.stack(sums), torch.stack(counts), torch.stack(key_sums))


def cross(q: Tensor, k: Tensor, v: Tensor, *, gate: Tensor, sees: Tensor, activation: str | None) -> Tensor:
    """Sum over the s that t sees, [b, t, s], of A_ts v_s, gated; without an activation A_ts is q_t.k_s / n_t."""
    v, gate = v.double() * torch.sigmoid(v.double()), gate.double() * torch.sigmoid(gate.double())
    rows = []
    for row in range(q.shape[0]):
        scores, seen = q[row].double() @ k[row].double().T, sees[row]
        if activation is None:
            weights = torch.where(seen, scores, 0.0) / seen.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            weights = weigh(scores / q.shape[-1] ** 0.5, seen, activation, "visible")
        rows.append(weights @ v[row])
    return torch.stack(rows) * gate


def offset_scale(
    base: Tensor, gamma: Tensor, beta: Tensor, *, angles: Tensor | None = None, silu: bool = False
) -> list[Tensor]:
    """Each of the n projections, its pairs of features turned by the angle whose cosine and sine are given."""
    x = base.double()
    x = x * torch.sigmoid(x) if silu else x
    projections = []
    for factor, offset in zip(gamma.double(), beta.double(), strict=True):
        columns = list((x * factor + offset).unbind(-1))
        for j in range(0 if angles is None else angles.shape[-2]):
            cosine, sine = angles[..., j, :].double().unbind(-1)
            first, second = columns[2 * j : 2 * j + 2]
            columns[2 * j : 2 * j + 2] = [first * cosine - second * sine, first * sine + second * cosine]
        projections.append(torch.stack(columns, dim=-1))
    return projections


def norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    scale_norm: bool = False,
    token_shift: bool = False,
    input_pos: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """RMS norm or ScaleNorm of [b, s, d], then the shift of the first half of the features by one token."""
    x, weight = x.double(), weight.double()
    square = (x**2).mean(dim=-1, keepdim=True)
    size = torch.clamp(square**0.5, min=eps) if scale_norm else (square + eps) ** 0.5
    normalised = x / size * weight
    if not token_shift:
        return normalised
    b, s, d = x.shape
    half = (d + 1) // 2
    documents, _ = place_tokens(b, s, 1, input_pos, padding_mask)
    rows = []
    for row in range(b):
        for t in range(s):
            same = t > 0 and bool(documents[row, t - 1] == documents[row, t])
            moved = normalised[row, t - 1, :half] if same else torch.zeros(half, dtype=torch.float64)
            rows.append(torch.cat([moved, normalised[row, t, half:]]))
    return torch.stack(rows).view(b, s, d)
