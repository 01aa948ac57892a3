"""A kernel that does everything that ``tests/aot.py`` must notice, a switch for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from flash_plugin.kernels.triton.tuning import Config, tuned

SIZE = 512


def _fits(config: Config, named: dict[str, object]) -> bool:
    return config.meta["COLUMNS"] == (256 if named["CROWDED"] else 64)


@tuned(
    [
        Config({"ROWS": 64, "COLUMNS": 64}, num_warps=4, num_stages=3),
        Config({"ROWS": 128, "COLUMNS": 256}, num_warps=8, num_stages=4),
    ],
    key=["n"],
    fits=_fits,
)
@triton.jit
def control_kernel(
    a, b, c, n, CROWDED: tl.constexpr, TURNED: tl.constexpr, FROM_REGISTERS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A matrix product; ``TURNED``: multiplied again, transposed; ``FROM_REGISTERS``: of twice its first operand."""
    rows, columns, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 64)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, n, 64):
        x = tl.load(a + rows[:, None] * n + (k + step)[None, :])
        if FROM_REGISTERS:
            x = x * 2
        acc = tl.dot(x, tl.load(b + (k + step)[:, None] * n + columns[None, :]), acc)
    if TURNED:
        other = tl.load(b + rows[:, None] * n + columns[None, :])
        acc = tl.dot(tl.trans(acc.to(a.dtype.element_ty)), other)
        tl.store(c + columns[:, None] * n + columns[None, :], acc.to(c.dtype.element_ty))
    else:
        tl.store(c + rows[:, None] * n + columns[None, :], acc.to(c.dtype.element_ty))


def _run(
    dtype: torch.dtype = torch.bfloat16, crowded: bool = False, turned: bool = False, scaled: bool = False
) -> None:
    a, b, c = (torch.empty(SIZE, SIZE, dtype=dtype) for _ in range(3))
    control_kernel[(1,)](a, b, c, SIZE, crowded, turned, scaled)


CALLS: dict[str, Callable[[], None]] = {
    "plain": _run,
    "plain again": _run,
    "float32": partial(_run, torch.float32, crowded=True),
    "turned": partial(_run, turned=True),
    "from registers": partial(_run, scaled=True),
    "crowded": partial(_run, crowded=True, turned=True),
}
