"""What mixed chunk attention has that the attention it replaces had not.

Shape legend: ``b`` batch, ``s`` sequence, ``h`` heads, ``z`` head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torchtune.modules.peft import LoRALinear
from torchtune.utils import get_logger, log_rank_zero

_PART = ".global_path."

_logger = get_logger("INFO")


class Matrix(nn.Module):
    """A linear layer that quantizers pass by: what it holds is small, and scales everything across chunks.

    Args:
        columns: Width of the input.
        rows: Width of the output.
        start: Where all its entries start.
    """

    def __init__(self, columns: int, rows: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., columns]`` to ``[..., rows]``."""
        return x @ self.weight.T


class GlobalPath(nn.Module):
    """What mixed chunk attention adds to a model that was trained without it: how much, and of which features.

    Where a LoRA recipe trains the model its three matrices are LoRA layers, so that they train, are saved and merged as
    all others.

    Args:
        num_heads: Heads h.
        head_dim: Width z of a head.
        gain: Where the global part's weight starts: at 0 the model starts as it would without one.
        lora: Rank and alpha where a LoRA recipe trains the model; None where all weights are trained.
    """

    def __init__(self, num_heads: int, head_dim: int, gain: float, lora: tuple[int, float] | None = None) -> None:
        super().__init__()
        # Scales are held as their distance from 1, where weight decay pulls them.
        self.starts = {"gain": gain, "query_scale": 0.0, "key_scale": 0.0}

        def matrix(name: str, columns: int) -> nn.Module:
            if lora is None:
                return Matrix(columns, num_heads, self.starts[name])
            return LoRALinear(columns, num_heads, rank=lora[0], alpha=lora[1])

        self.gain = matrix("gain", 1)
        self.query_scale = matrix("query_scale", head_dim)
        self.key_scale = matrix("key_scale", head_dim)
        for name, start in self.starts.items():
            nn.init.constant_(self.get_parameter(f"{name}.weight"), start)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys across chunks from those inside them, all ``[b, h, s, z]``."""
        one = torch.ones(1, 1, dtype=q.dtype, device=q.device)
        each = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        query_scale = (1 + self.query_scale(each).T) * self.gain(one).T
        return q * query_scale[:, None], k * (1 + self.key_scale(each).T)[:, None]


def start_where_checkpoint_is_silent(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: object) -> None:
    """Let checkpoints of the model as it was load strictly: what they lack starts where it would from scratch.

    Only a checkpoint of the whole model that knows nothing of any global path is completed. Adapters, which come by
    themselves, and checkpoints that have some of it are left to what ``load_state_dict`` says of them.
    """
    if any(_PART in name for name in state_dict):
        return
    filled = 0
    for found, own in model.named_parameters():
        # State dicts leave out what activation checkpointing puts into names.
        name = prefix + found.replace(_CHECKPOINT_PREFIX, "")
        before, part, rest = name.partition(_PART)
        projection = state_dict.get(f"{before}.q_proj.weight")
        if not part or projection is None:
            continue
        matrix, kind = rest.split(".", 1)
        value = own.detach()  # an adapter's two matrices, which recipes have drawn by now
        if kind == "weight":
            path = model.get_submodule(found.removesuffix(f".{rest}"))
            assert isinstance(path, GlobalPath)
            start = path.starts[matrix]
            dtype = projection.dtype if projection.dtype.is_floating_point else own.dtype
            value = torch.full_like(own, start, dtype=dtype, device=projection.device, requires_grad=False)
        state_dict[name] = value
        filled += kind == "weight"
    if filled:
        log_rank_zero(
            _logger,
            "The checkpoint is of a model without a global path, which starts from its initial weights (a trained one "
            "lies beside Hugging Face weights, in global_path.pt, and flash_plugin.SwapCheckpointer loads it)",
        )
