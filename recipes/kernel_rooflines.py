"""What each attention core and block must compute and move: the floor that ``bench_kernels.py`` compares times with.

    floor = max(FLOPs / rate of a large matrix product, bytes / rate of a large copy)

A FLOP is one multiplication or one addition, so a product of ``[m, k]`` and ``[k, n]`` takes ``2 m k n``. Element-wise
work costs no FLOPs here, only the bytes that it cannot avoid. Everything is causal: of an ``l x l`` score matrix half
counts. Bytes are those of a form whose work is parallel over the sequence: a tensor crosses memory once for each pass
that the data dependencies force, listed beside each formula. A kernel that merges passes may beat such a floor.

Shape legend: ``N`` tokens (batch * s), ``s`` sequence, ``d`` embed, ``e`` value width, ``z`` query/key width, ``c``
chunk. In the lists of passes, ``U`` is a tensor ``[N, e]``, ``Q`` one ``[N, z]``, ``D`` one ``[N, d]``, ``A`` the local
weights (half of ``[N, c]``), ``M`` the states of all chunks ``[N / c, z, e]``, in the dtype of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Sizes:
    """One problem; ``tokens`` is batch size times ``seq_len``, ``seq_len`` a multiple of ``chunk_size``."""

    tokens: int
    seq_len: int
    embed_dim: int
    expanded_dim: int
    qk_dim: int
    chunk_size: int
    head_dim: int
    itemsize: int

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.tokens // self.seq_len

    def elements(self, width: float) -> float:
        """Bytes of a tensor ``[N, width]``."""
        return self.tokens * width * self.itemsize

    @property
    def states(self) -> float:
        """Bytes of the states of all chunks (M)."""
        return self.tokens / self.chunk_size * self.qk_dim * self.expanded_dim * self.itemsize


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Costs(NamedTuple):
    """The work of a forward pass that records what its backward needs, and of that backward."""

    forward: Work
    backward: Work


class Rates(NamedTuple):
    """What the device reaches: FLOP/s in a large matrix product, bytes/s (read and written) in a large copy."""

    flops: float
    bytes: float


def floor_seconds(work: Work, rates: Rates) -> tuple[float, str]:
    """The least time for ``work``, and which of ``compute`` and ``memory`` sets it."""
    compute, memory = work.flops / rates.flops, work.bytes / rates.bytes
    return max(compute, memory), "compute" if compute >= memory else "memory"


def mixed_chunk_costs(sizes: Sizes) -> Costs:
    """Gated mixed chunk attention.

    Forward, FLOPs: local scores and outputs ``2 N (c/2) (z + e)``, state and readout ``2 N z e`` each.
    Forward, passes: scores (q, k -> A), state (k, v -> M), out (A, q, v, M, gate -> out): 4U + 4Q + 2A + 2M.

    Backward, with A and the ungated output recomputed from inputs and states that the forward kept: scores again
    ``2 N (c/2) z``; output again ``2 N (c/2 e + z e)``; reversed state ``2 N z e``; dA ``2 N (c/2) e``; dv
    ``2 N (c/2 e + z e)``; global dq and dk ``2 N z e`` each; local dq and dk ``2 N (c/2) z`` each.
    Passes: scores (q, k -> A), dgate (A, q, v, M, dout -> dgate), reversed state (dout, gate, q -> dmix, R), dA
    (dmix, v, A -> dA), dv (A, k, dmix, R -> dv), global dq and dk (dmix, M, v, R -> dq, dk), local dq and dk
    (dA twice, q, k -> dq, dk): 12U + 11Q + 7A + 5M.
    """
    u, q, a, m = _chunk_bytes(sizes)
    local, linear = _chunk_products(sizes)
    z, e = sizes.qk_dim, sizes.expanded_dim
    forward = Work(local * (z + e) + 2 * linear, 4 * u + 4 * q + 2 * a + 2 * m)
    backward = Work(local * (3 * z + 3 * e) + 5 * linear, 12 * u + 11 * q + 7 * a + 5 * m)
    return Costs(forward, backward)


def linear_costs(sizes: Sizes) -> Costs:
    """Causal linear attention without gate and denominator, in chunks of c: as mixed chunk attention, less its gate.

    Forward, FLOPs: those of :func:`mixed_chunk_costs`; passes: the same without the gate, 3U + 4Q + 2A + 2M.
    Backward, FLOPs: those of :func:`mixed_chunk_costs` without the output again. Passes: without dgate, and dout
    serves as dmix: reversed state (dout, q -> R), dA (dout, v -> dA), dv (A, k, dout, R -> dv), dq and dk in one pass
    (dA twice, q, k, dout, M, v, R -> dq, dk), scores (q, k -> A): 7U + 8Q + 5A + 4M.
    """
    u, q, a, m = _chunk_bytes(sizes)
    local, linear = _chunk_products(sizes)
    z, e = sizes.qk_dim, sizes.expanded_dim
    forward = Work(local * (z + e) + 2 * linear, 3 * u + 4 * q + 2 * a + 2 * m)
    backward = Work(local * (3 * z + 2 * e) + 4 * linear, 7 * u + 8 * q + 5 * a + 4 * m)
    return Costs(forward, backward)


def out_pass_costs(sizes: Sizes) -> Costs:
    """The plain batched product ``[A | q] @ [v ; M]`` with which mixed chunk attention ends, nothing skipped.

    Forward: ``2 N (c + z) e`` FLOPs; weights and values are read, the result is written. Backward: twice the FLOPs;
    the gradient, weights and values are read, two gradients are written.
    """
    c, z, e = sizes.chunk_size, sizes.qk_dim, sizes.expanded_dim
    weights, values, out = sizes.elements(c + z), sizes.elements(e) + sizes.states, sizes.elements(e)
    flops = 2 * sizes.tokens * (c + z) * e
    return Costs(Work(flops, weights + values + out), Work(2 * flops, 2 * weights + 2 * values + out))


def quadratic_costs(sizes: Sizes) -> Costs:
    """Gated quadratic attention, scores never in memory and the ungated output kept for the backward.

    Forward, FLOPs: scores and outputs ``2 N (s/2) (z + e)``; passes: q, k, v, gate -> ungated output, out: 4U + 2Q.
    Backward, FLOPs: scores again, dq and dk ``2 N (s/2) z`` each, dA and dv ``2 N (s/2) e`` each; passes: gate (dout,
    gate, ungated output -> dmix, dgate), values (q, k, dmix -> dv), scores (q, k, v, dmix -> dq, dk): 9U + 6Q.
    """
    z, e = sizes.qk_dim, sizes.expanded_dim
    u, q = sizes.elements(e), sizes.elements(z)
    half = sizes.tokens * sizes.seq_len
    return Costs(Work(half * (z + e), 4 * u + 2 * q), Work(half * (3 * z + 2 * e), 9 * u + 6 * q))


def softmax_costs(sizes: Sizes) -> Costs:
    """Multi-head softmax attention, all heads together d wide, in FlashAttention's form.

    Forward, FLOPs: scores and outputs ``2 N (s/2) d`` each; passes: q, k, v -> out: 4D.
    Backward, FLOPs: scores again, dA, dv, dq, dk ``2 N (s/2) d`` each; passes: q, k, v, out, dout -> dq, dk, dv: 8D.
    """
    half, width = sizes.tokens * sizes.seq_len, sizes.embed_dim
    d = sizes.elements(width)
    return Costs(Work(2 * half * width, 4 * d), Work(5 * half * width, 8 * d))


def gau_pair_costs(sizes: Sizes, core: Costs) -> Costs:
    """Two gated attention units round ``core``: projections d -> 2e + z and e -> d, norm and residual."""
    d, e, z = sizes.embed_dim, sizes.expanded_dim, sizes.qk_dim
    return _sum([core, _projection(sizes, d, 2 * e + z), _projection(sizes, e, d), _norm_and_residual(sizes)] * 2)


def transformer_layer_costs(sizes: Sizes) -> Costs:
    """Multi-head attention and a feed-forward network 4d wide: projections, two norms and residuals."""
    d = sizes.embed_dim
    projections = [_projection(sizes, d, width) for width in (3 * d, d, 4 * d)]
    parts = [softmax_costs(sizes), *projections, _projection(sizes, 4 * d, d), *[_norm_and_residual(sizes)] * 2]
    return _sum(parts)


def _chunk_bytes(sizes: Sizes) -> tuple[float, float, float, float]:
    """U, Q, A and M."""
    return (
        sizes.elements(sizes.expanded_dim),
        sizes.elements(sizes.qk_dim),
        sizes.elements(sizes.chunk_size / 2),
        sizes.states,
    )


def _chunk_products(sizes: Sizes) -> tuple[float, float]:
    """FLOPs of a local product for each feature it runs over, and of one product between tokens and states."""
    return sizes.tokens * sizes.chunk_size, 2 * sizes.tokens * sizes.qk_dim * sizes.expanded_dim


def _projection(sizes: Sizes, inputs: int, outputs: int) -> Costs:
    """``x W``: x, W -> y; backward x, W, dy -> dx, dW."""
    flops = 2 * sizes.tokens * inputs * outputs
    weight = inputs * outputs * sizes.itemsize
    forward = Work(flops, sizes.elements(inputs + outputs) + weight)
    return Costs(forward, Work(2 * flops, sizes.elements(2 * inputs + outputs) + 2 * weight))


def _norm_and_residual(sizes: Sizes) -> Costs:
    """Norm x -> normed, the sum in the last product's epilogue reads x; backward x, dnormed, dout -> dx: 3D and 4D."""
    return Costs(Work(0, sizes.elements(3 * sizes.embed_dim)), Work(0, sizes.elements(4 * sizes.embed_dim)))


def _sum(parts: list[Costs]) -> Costs:
    nothing = Work(0, 0)
    return Costs(sum((part.forward for part in parts), nothing), sum((part.backward for part in parts), nothing))
