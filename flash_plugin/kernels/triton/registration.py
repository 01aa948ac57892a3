"""How an operator gets its autograd: from torch under ``torch.compile``, and from a function of autograd in eager mode.

Both run the same code. Torch's own registration asks the operator's schema for each argument anew at every call: with
the twenty of an attention op that takes the host longer than all that the op itself does there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function
from torch.library import CustomOpDef  # type: ignore[attr-defined]


def differentiable(
    name: str,
    op: CustomOpDef,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
    *,
    listed: bool = False,
) -> Callable[..., Any]:
    """Register ``op``'s autograd.

    Args:
        name: What profiles and error messages call it, as a class.
        op: The operator.
        setup_context: What it keeps for its backward, as ``torch.library.register_autograd`` takes it.
        backward: Gradients of its inputs from those of its outputs, likewise.
        listed: Whether it returns a list of tensors.

    Returns:
        What to call in its place, with the same positional arguments; gives a tuple in the place of a list.
    """
    op.register_autograd(backward, setup_context=setup_context)

    def run(*inputs: Any) -> Any:
        return tuple(op(*inputs)) if listed else op(*inputs)

    def run_back(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return backward(ctx, list(grads)) if listed else backward(ctx, *grads)

    methods = {"forward": run, "setup_context": setup_context, "backward": run_back}
    attributes = {method: staticmethod(does) for method, does in methods.items()}
    function: Any = type(name, (Function,), {**attributes, "generate_vmap_rule": True})

    def call(*inputs: Any) -> Any:
        eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return function.apply(*inputs) if eager else run(*inputs)

    return call
