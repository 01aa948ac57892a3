"""Optimizers a config can name: what decays, and how bfloat16 weights take in small updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw as adamw_update

from flash_plugin.components.arguments import config_component
from flash_plugin.kernels.validation import is_number

# OffsetScale stacks a vector for each of its at most four queries and keys: a matrix in shape alone.
_MAX_STACKED_VECTORS = 4
# One for each group of parameters, in the order they are built, which is the same on all processes.
_NUMBERS = itertools.count()


@config_component
def adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: float = 3e-4,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = None,
    stochastic_rounding: bool = False,
) -> Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019) that decays matrices only.

    Norm scales, biases, position biases and OffsetScale's gamma and beta are vectors, or stacks of at most four, whose
    size means something: they do not decay (nor do, being no larger, LoRA's matrices of rank 4 and less). Everything
    else is ``torch.optim.AdamW``.

    Args:
        params: The model's parameters; the recipe passes them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Decay of matrices.
        fused: Use torch's fused kernel; None lets torch choose.
        stochastic_rounding: Round the sum of a bfloat16 weight and its update up or down with probabilities that keep
            its mean, and the two moments likewise. To the nearest, a bfloat16 weight w swallows updates below
            ``|w| / 512``, and so most of training at small learning rates. A step rounds alike in a run that resumes,
            and alike all copies of a weight on several processes.

    Raises:
        ValueError: If an argument is unknown or out of range, there are no parameters, or ``stochastic_rounding`` is
            asked for with ``fused`` or where no weight is bfloat16.
    """
    if len(betas) != 2:
        raise ValueError(f"betas ({list(betas)}) must be two numbers; set optimizer.betas=[0.9,0.95]")
    if not is_number(weight_decay) or weight_decay < 0:
        raise ValueError(
            f"weight_decay ({weight_decay!r}) must be a number of at least 0; set optimizer.weight_decay=0.1"
        )
    if not is_number(lr) or lr < 0:
        raise ValueError(f"lr ({lr!r}) must be a number of at least 0; set optimizer.lr=3.0e-4")
    params = list(params)
    if not params:
        raise ValueError("params (none) must hold a parameter to train; unfreeze some of the model")
    decaying = [parameter for parameter in params if _is_matrix(parameter)]
    others = [parameter for parameter in params if not _is_matrix(parameter)]
    # optimizer_in_bwd builds an optimizer for each parameter: no group may be empty.
    groups = [
        {"params": group, "weight_decay": decay} for group, decay in ((decaying, weight_decay), (others, 0.0)) if group
    ]
    if not stochastic_rounding:
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    if fused:
        raise ValueError(
            f"fused ({fused}) must be False with stochastic_rounding=True, for which torch has no fused kernel; "
            "set optimizer.fused=False"
        )
    if not any(parameter.dtype == torch.bfloat16 for parameter in params):
        raise ValueError(
            f"stochastic_rounding (True) must come with bfloat16 weights, and they are {params[0].dtype}; "
            "set dtype=bf16 or optimizer.stochastic_rounding=False"
        )
    return StochasticAdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps)


class StochasticAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose bfloat16 weights and moments take in each update at its exact mean.

    torch's own update runs in float32, one parameter at a time; what is kept is then rounded up or down at random.
    torchao has such an optimizer, which cannot do it to the DTensors of a distributed run (0.15 with torch 2.13).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have gradients.

        Args:
            closure: Computes the loss anew, as torch's optimizers have it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, group, seed=group["number"] << 32 | index)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a number that tells their rounding from that of all others.

        The state keeps it: ``optimizer_in_bwd`` builds an optimizer for each parameter, and those of one shape must not
        be rounded alike.
        """
        super().add_param_group({"number": next(_NUMBERS), **param_group})

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], seed: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        held = [_own(tensor) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        weight, *moments = (tensor.float() for tensor in held)
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
            # Tensor parallelism may leave the gradient of a split table whole on every process.
            gradient = gradient.redistribute(placements=parameter.placements)
        assert gradient is not None
        adamw_update(
            [weight],
            [_own(gradient).float()],
            [moments[0]],
            [moments[1]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        new = [weight, *moments]
        if parameter.dtype == torch.bfloat16:
            # Seeded by the step, not drawn on: copies of a weight on several processes stay the same, and a run that
            # resumes rounds as the uninterrupted one does, though recipes keep no random state.
            seeds = (seed, int(state["step"]), *_shard_of(parameter))
            generator = torch.Generator(weight.device).manual_seed(hash(seeds))
            new = [_round_at_random(tensor, generator) for tensor in new]
        for tensor, value in zip(held, new, strict=True):
            tensor.copy_(value)


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shard_of(tensor: Tensor) -> list[int]:
    """Which part of a sharded tensor this process holds: the same for copies, another for each part."""
    if not isinstance(tensor, DTensor):
        return []
    coordinate: Sequence[int] = tensor.device_mesh.get_coordinate() or []
    return [place for place, kind in zip(coordinate, tensor.placements, strict=False) if not kind.is_replicate()]


def _round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values to a bfloat16 neighbour each, up or down with probabilities that make ``x`` the mean."""
    # bfloat16 is the upper half of float32: a random number below 2^16 carries into it as often as the lower half says.
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # The carry would make a zero of some NaN.
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 1 and min(parameter.shape) > _MAX_STACKED_VECTORS
