"""The passes as functions of tensors: each allocates its result, finds its grid and launches one kernel.

Shape legend: ``b`` batch, ``s`` sequence, ``n`` states, ``z`` query/key width, ``e`` value width; buffers of weights
are ``[b, rows, width]`` as in ``scores.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_plugin.kernels.triton import gate as gating
from flash_plugin.kernels.triton import products, projections, scores
from flash_plugin.kernels.triton import states as running
from flash_plugin.kernels.triton.plan import Plan
from flash_plugin.kernels.triton.shapes import block_size, input_precision

# Row tiles whose diagonals one program of the bias gradient sums.
_GROUP_TILES = 8


class Options(NamedTuple):
    """How scores become weights: ``gain act(scale q.k + bias)``."""

    activation: str
    scale: float
    gain: float


class Panel(NamedTuple):
    """The part of the score matrix that a buffer holds: every row tile's band, or a rectangle of whole tiles.

    Attributes:
        rows: Rows of the buffer.
        width: Columns of the buffer.
        row0: First row.
        col0: First key; None for bands.
    """

    rows: int
    width: int
    row0: int = 0
    col0: int | None = None

    @classmethod
    def bands(cls, plan: Plan) -> Panel:
        """All bands of a plan."""
        return cls(plan.tiles * plan.tile, plan.width)


class States(NamedTuple):
    """States ``[b, n, z, e]`` and how many tokens lie between two of them."""

    tensor: Tensor
    spacing: int

    @property
    def stride(self) -> int:
        """Elements from one state to the next, the same from one row of the batch to the next."""
        return self.tensor.stride(1 if self.tensor.shape[1] > 1 else 0)


class Quotient(NamedTuple):
    """Divides each token's sum by that of its weights.

    Attributes:
        scale: Factor of the weights.
        eps: Added to the sum of the weights.
        unit: What the last column of the values holds everywhere: it sums the weights.
        factor: Gets what each sum is multiplied by, ``scale / (scale weights + eps)``, ``[b, s]`` float32.
    """

    scale: float
    eps: float
    unit: float
    factor: Tensor


def compute_scores(
    plan: Plan,
    panel: Panel,
    options: Options,
    local: tuple[Tensor, Tensor] | None,
    linear: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    *,
    with_slopes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weights of a panel, and slopes if asked for; ``local`` and ``linear`` are q and k, ``[b, s, z]`` each."""
    given = local or linear
    assert given is not None
    batch, length, z = given[0].shape
    weights = given[0].new_empty(batch, panel.rows, panel.width)
    # A bias sums score gradients of both signs along a diagonal: what is left would drown in their rounding.
    wide = weights.dtype if bias is None else torch.float32
    slopes = torch.empty_like(weights, dtype=wide) if with_slopes else None
    scores.scores_kernel[lambda meta: (panel.rows // plan.tile, panel.width // meta["BLOCK_C"], batch)](
        *(local or (None, None)), *(linear or (None, None)), None if bias is None else bias.contiguous(),
        plan.first, plan.last, plan.document, plan.real, plan.begin, plan.end, weights, slopes,
        length, _stride(plan, length), _stride(plan, plan.tiles), panel.row0, panel.col0 or 0, panel.rows, panel.width,
        options.scale, options.gain, 0 if bias is None else bias.shape[0] // 2,
        Z=z, BLOCK_Z=block_size(z, weights.dtype, 32), TILE=plan.tile, ACTIVATION=options.activation,
        CAUSAL=plan.last is None, LOCAL=local is not None, DIRECT=plan.direct, HAS_BIAS=bias is not None,
        HAS_REAL=plan.real is not None, BAND=panel.col0 is None, SLOPES=with_slopes,
        PRECISION=input_precision(weights.dtype),
    )  # fmt: skip
    return weights, slopes


def score_gradient(
    plan: Plan,
    panel: Panel,
    gradient: Tensor,
    values: Tensor,
    slopes: Tensor,
    *,
    split: bool = False,
    diagonals: BiasGradient | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of a panel's scores (of its products, at linear pairs) from that of the mixed values ``[b, s, e]``.

    ``split`` puts linear pairs into a second buffer; ``diagonals`` gets everything, unrounded.
    """
    batch, length, e = values.shape
    out = torch.empty_like(slopes, dtype=values.dtype)
    linear = torch.empty_like(out) if split else None
    wide = out if diagonals is None else torch.empty_like(slopes)
    scores.score_gradient_kernel[(panel.rows // plan.tile, panel.width // plan.tile, batch)](
        gradient, values, slopes, out, linear, wide, plan.first, plan.begin, plan.end,
        length, _stride(plan, length), _stride(plan, plan.tiles), panel.col0 or 0, panel.rows, panel.width,
        E=e, TILE=plan.tile, BAND=panel.col0 is None, SPLIT=split, WIDE=diagonals is not None,
        EVEN_ROWS=length % plan.tile == 0, PRECISION=input_precision(values.dtype),
    )  # fmt: skip
    if diagonals is not None:
        diagonals.add(panel, wide)
    return out, linear


def mix(
    plan: Plan,
    panel: Panel,
    weights: Tensor,
    values: Tensor,
    queries: Tensor | None,
    states: States | None,
    row_scale: Tensor | None,
    gate: Tensor | None,
    silu: bool,
    mixed: Tensor | None,
    out: Tensor,
    quotient: Quotient | None = None,
) -> None:
    """``mixed = row_scale (weights values + queries state)`` and ``out = open(gate) mixed`` for a panel's rows.

    ``out`` may be narrower than ``values``; ``quotient`` stands in the place of ``row_scale``.
    """
    (batch, length, e), width = values.shape, out.shape[-1]
    z = 16 if queries is None else queries.shape[-1]
    tiles = panel.rows // plan.tile
    scale, eps, unit = (1.0, 0.0, 1.0) if quotient is None else quotient[:3]
    products.mix_kernel[lambda meta: (tiles * _blocks(width, meta["BLOCK_E"]), batch)](
        weights, values, queries, None if states is None else states.tensor,
        row_scale if quotient is None else quotient.factor, gate, mixed, out,
        plan.begin, plan.end, length, _stride(plan, length), _stride(plan, plan.tiles), panel.row0, panel.rows,
        panel.width, 1 if states is None else states.tensor.shape[1], 1 if states is None else states.spacing,
        scale, eps, unit,
        Z=z, E=e, OUT=width, TILE=plan.tile, BAND=panel.col0 is None, HAS_STATE=states is not None,
        SCALED=row_scale is not None, QUOTIENT=quotient is not None, GATED=gate is not None, SILU=silu,
        KEEP_MIXED=mixed is not None, EVEN_ROWS=length % plan.tile == 0, PRECISION=input_precision(values.dtype),
    )  # fmt: skip


def value_gradient(
    plan: Plan,
    panel: Panel,
    weights: Tensor,
    gradient: Tensor,
    keys: Tensor | None,
    states: States | None,
    raw_values: Tensor | None,
    out: Tensor,
) -> None:
    """``out = weights^T gradient + keys state`` for a panel's keys, times SiLU's slope at ``raw_values`` if given.

    ``out`` may be narrower than ``gradient``.
    """
    (batch, length, e), width = gradient.shape, out.shape[-1]
    z = 16 if keys is None else keys.shape[-1]
    tiles = plan.tiles if panel.col0 is None else panel.width // plan.tile
    products.value_gradient_kernel[lambda meta: (tiles * _blocks(width, meta["BLOCK_E"]), batch)](
        weights, gradient, None if keys is None else keys.mT.contiguous(), None if states is None else states.tensor,
        raw_values, out, plan.begin, plan.row_begin, plan.row_end, length, _stride(plan, plan.tiles), panel.col0 or 0,
        panel.rows, panel.width, 1 if states is None else states.tensor.shape[1],
        1 if states is None else states.spacing,
        Z=z, E=e, OUT=width, TILE=plan.tile, BAND=panel.col0 is None, HAS_STATE=states is not None,
        SILU=raw_values is not None, EVEN_ROWS=length % plan.tile == 0, PRECISION=input_precision(gradient.dtype),
    )  # fmt: skip


def query_gradient(
    plan: Plan, panel: Panel, gradient: Tensor, keys: Tensor, out: Tensor, *, scale: float = 1.0, add: bool = False
) -> None:
    """``out = scale gradient keys`` ``[b, s, z]``; with ``add``, unscaled, added to what ``out`` (float32) holds."""
    batch, length, z = keys.shape
    block = block_size(z, gradient.dtype)
    projections.query_gradient_kernel[(panel.rows // plan.tile, _blocks(z, block), batch)](
        gradient, keys, out, plan.begin, plan.end,
        length, _stride(plan, plan.tiles), panel.col0 or 0, panel.rows, panel.width, scale,
        Z=z, BLOCK_Z=block, TILE=plan.tile, BAND=panel.col0 is None, ADD=add, PRECISION=input_precision(gradient.dtype),
    )  # fmt: skip


def key_gradient(
    plan: Plan, panel: Panel, gradient: Tensor, queries: Tensor, out: Tensor, *, scale: float = 1.0
) -> None:
    """``out = scale gradient^T queries`` ``[b, s, z]`` at the panel's keys."""
    batch, length, z = queries.shape
    block = block_size(z, gradient.dtype)
    tiles = plan.tiles if panel.col0 is None else panel.width // plan.tile
    projections.key_gradient_kernel[(tiles, _blocks(z, block), batch)](
        gradient, queries, out, plan.begin, plan.row_begin, plan.row_end,
        length, _stride(plan, plan.tiles), panel.col0 or 0, panel.rows, panel.width, scale,
        Z=z, BLOCK_Z=block, TILE=plan.tile, BAND=panel.col0 is None, PRECISION=input_precision(gradient.dtype),
    )  # fmt: skip


def state_gradient(
    plan: Plan, x: Tensor, states: States, direct: Tensor | None, mark: Tensor | None, *, queries: bool, out: Tensor,
    row_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """``out = row_scale (direct + x state^T)``: global queries' gradient from that of ``x``, or keys' from values.

    ``mark`` ``[b, s]`` int8 is 0 at tokens that get the first part only.
    """
    batch, length, e = x.shape
    z = out.shape[-1]
    block = block_size(z, x.dtype)
    projections.state_gradient_kernel[(plan.tiles, _blocks(z, block), batch)](
        x, states.tensor, mark, direct, row_scale, plan.begin, out,
        length, _stride(plan, length), _stride(plan, plan.tiles), states.stride, states.tensor.shape[1], states.spacing,
        Z=z, E=e, BLOCK_Z=block, TILE=plan.tile, QUERIES=queries, DIRECT=direct is not None, MARKED=mark is not None,
        SCALED=row_scale is not None, EVEN_ROWS=length % plan.tile == 0, PRECISION=input_precision(x.dtype),
    )  # fmt: skip


def running_states(
    plan: Plan, x: Tensor, y: Tensor, initial: Tensor | None, *, reverse: bool, final: bool, into: Tensor | None = None
) -> tuple[States, Tensor | None]:
    """States ``[b, n, z, e]``: sums of ``x^T y`` before each block (behind it, if ``reverse``), and over all of them.

    Backwards, a block's rows are those that read its state, and ``x`` and ``y`` are queries and gradients. ``into``
    ``[b, n, 1 or 2, z, e]`` takes the states, if given, and what rounding took from them.
    """
    batch, length, z = x.shape
    e = y.shape[-1]
    states = States(x.new_empty(batch, plan.states, z, e) if into is None else into[:, :, 0], plan.spacing)
    total = x.new_empty(batch, z, e, dtype=torch.float32) if final else None
    block = block_size(z, x.dtype)
    running.state_kernel[lambda meta: (_blocks(e, meta["BLOCK_E"]), _blocks(z, block), batch)](
        x, y, None if initial is None else initial.contiguous(), plan.query_rows if reverse else plan.key_rows,
        plan.keep, states.tensor, total,
        length, _stride(plan, plan.states + 1), _stride(plan, plan.states), states.stride, plan.states,
        Z=z, E=e, BLOCK_Z=block, REVERSE=reverse, HAS_INITIAL=initial is not None, HAS_KEEP=plan.direct,
        SPLIT=into is not None and into.shape[2] == 2, FINAL=final,
        EVEN_ROWS=length % plan.tile == 0, PRECISION=input_precision(x.dtype),
    )  # fmt: skip
    return states, total


def gate_gradient(
    plan: Plan, gradient: Tensor, gate: Tensor | None, mixed: Tensor | None, row_scale: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the sum before ``row_scale`` and of the gate, from that of the output; all ``[b, s, e]``."""
    if gate is None and row_scale is None:
        return gradient, None
    batch, length, e = gradient.shape
    dmixed = torch.empty_like(gradient)
    dgate = None if gate is None else torch.empty_like(gate)
    gating.gate_gradient_kernel[
        lambda meta: (_blocks(length, meta["BLOCK_ROWS"]), _blocks(e, meta["BLOCK_E"]), batch)
    ](
        gradient, gate, mixed, row_scale, dmixed, dgate, length, _stride(plan, length),
        E=e, GATED=gate is not None, SILU=silu, SCALED=row_scale is not None,
    )  # fmt: skip
    return dmixed, dgate


def quotient_gradient(gradient: Tensor, out: Tensor, factor: Tensor, width: int, unit: float) -> Tensor:
    """Gradient of the sums that a :class:`Quotient` divided, ``[b, s, width]``; the last two sum the weights."""
    batch, length, e = gradient.shape
    dmixed = gradient.new_empty(batch, length, width)
    gating.quotient_gradient_kernel[lambda meta: (_blocks(length, meta["BLOCK_ROWS"]), batch)](
        gradient, out, factor, dmixed, length, unit, E=width, OUT=e
    )
    return dmixed


class BiasGradient:
    """Sums of the score gradient along its diagonals, panel by panel; the same bits every time.

    Args:
        plan: The tiles.
        bias: The bias, ``[l]``.
        batch: Rows of the batch.
    """

    def __init__(self, plan: Plan, bias: Tensor, batch: int) -> None:
        self.bias = bias
        self.plan = plan
        groups = _blocks(plan.tiles, _GROUP_TILES)
        self.partial = bias.new_zeros(batch, groups, bias.shape[0], dtype=torch.float32)

    def add(self, panel: Panel, gradient: Tensor) -> None:
        """Add the diagonals of a panel's float32 score gradient."""
        plan, (batch, groups, size) = self.plan, self.partial.shape
        length = plan.first.shape[1]
        gating.bias_gradient_kernel[lambda meta: (_blocks(size, meta["BLOCK_L"]), groups, batch)](
            gradient, self.partial, plan.first, plan.begin, plan.end, length, _stride(plan, length),
            _stride(plan, plan.tiles), panel.col0 or 0, panel.rows, panel.width, groups, size // 2,
            TILE=plan.tile, GROUP_TILES=_GROUP_TILES, BAND=panel.col0 is None,
        )  # fmt: skip

    def total(self) -> Tensor:
        """The gradient of the bias, ``[l]`` in its dtype."""
        return self.partial.sum((0, 1)).to(self.bias.dtype)


def times(x: Tensor, factor: Tensor | None) -> Tensor:
    """``[b, s, z]`` times ``[b, s]`` in the dtype of the former, rounded once; itself if there is no factor."""
    return x if factor is None else torch.mul(x, factor.unsqueeze(-1), out=torch.empty_like(x))


def _stride(plan: Plan, size: int) -> int:
    """Elements between two rows of a tensor of the plan; 0 where one row serves all."""
    return 0 if plan.rows_agree else size


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
