"""Second derivatives of functions whose backward is written out: differentiate the plain form in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_backward(
    plain: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``plain(*inputs)`` as a graph, for a backward under ``create_graph=True``.

    Args:
        plain: The same function in differentiable operations; gives one tensor for each of ``grads``.
        inputs: What it is differentiated by; None where an argument is left out.
        grads: Gradients of its outputs; None where nothing depends on one.

    Returns:
        One gradient for each input; None for those that want none.
    """
    # Views of them: one input may be another, or made from it, and each must get its own part of the gradient alone.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    outs = zip(plain(*inputs), grads, strict=True)
    pairs = [(out, grad) for out, grad in outs if grad is not None and out.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            [tensor for tensor in inputs if tensor is not None and tensor.requires_grad],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
