"""Parameters that tensor parallelism copies to every rank, as the ordinary tensors that ops take."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(parameter: Tensor, *, terms: bool = False) -> Tensor:
    """What to compute with in place of ``parameter``: itself, or the copy of this rank, if it is a DTensor.

    The ops have no rules for DTensors, and need none: what goes in and comes out is the same on every rank.

    Args:
        parameter: A parameter; as a DTensor, one that is copied, not sharded.
        terms: Whether what this rank passes back is one term of a sum over the ranks, as it is inside a gated
            attention unit (see :mod:`flash_plugin.components.tensor_parallel`). Then the gradients are summed.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    copy = parameter.to_local()
    return summed(DTensor.from_local(copy, parameter.device_mesh, [Replicate()], run_check=False)) if terms else copy


def summed(copied: DTensor) -> Tensor:
    """The local tensor of a copied DTensor, whose gradient will be the sum of what the ranks pass back."""
    return copied.to_local(grad_placements=[Partial()])
