"""What ``torch.autocast`` means for the ops of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# Biases, scales and states keep their precision: an op widens what it takes from them.
_CAST = ("q", "k", "q_local", "k_local", "q_global", "k_global", "v", "gate")


def like_matrix_products(op: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let an op take queries, keys, values and gate in autocast's dtype, as torch's own matrix products take theirs.

    Inside, autocast is off: sums that an op keeps in float32 stay there.
    """

    @functools.wraps(op)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        device = "cpu" if first is None or first.device.type == "meta" else first.device.type
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)

        def cast(x: object) -> object:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

        with torch.autocast(device, enabled=False):
            named = {name: cast(x) if name in _CAST else x for name, x in kwargs.items()}
            return op(*map(cast, args), **named)  # type: ignore[arg-type]

    return wrapper
