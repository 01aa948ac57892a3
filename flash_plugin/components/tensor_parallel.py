"""Tensor parallelism: every rank computes a slice of the expanded width e of each gated attention unit.

Gate and values are cut by columns, the output projection by rows. The single head's queries and keys, norms and
position biases are computed by every rank; embedding and output projection are cut by tokens or by features. A unit
costs one all-reduce of ``[b, s, d]`` forward, of its output, and one backward, of its input's gradient.

Inside a unit a rank has its slice of the values alone, so that its gradients of queries, keys and position biases are
one term each of a sum over the ranks. What comes of them in the unit's backward is linear in them: the terms are
carried on as they are, and summed where they leave the unit, at its input and at its copied parameters
(``local(..., terms=True)``). Outside, all gradients are whole and the same on every rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from flash_plugin.components.arguments import config_component
from flash_plugin.components.copies import local, summed
from flash_plugin.components.gau import GatedAttentionUnit, OffsetScale
from flash_plugin.components.norms import LayerNorm, RMSNorm, ScaleNorm
from flash_plugin.components.positions import RopeBias, ScaledSinusoid, T5Bias, ToeplitzBias


@config_component
def flash_tp_plan() -> dict[str, ParallelStyle]:
    """How ``parallelize_module`` splits FLASH and FLASH-Quad models; a ``tensor_parallel_plan``.

    All options of the builders go, but for ``attention_layers``, and adapters do not.

    Every parameter becomes a DTensor and keeps its name. With ``attn_dropout`` each rank draws masks of its own: every
    slice of the values loses other attention weights.

    Returns:
        dict[str, ParallelStyle]: What is done to the modules of each name. It raises ValueError where e is no multiple
            of the number of processes, or the model has parts that it does not know.
    """
    return {"tok_embeddings": _Table(), "layers.*.attn": _Unit(), "": _Rest()}


class _Table(ParallelStyle):
    """A token embedding, also one that projects, or an output projection: each rank has a part of ``[vocab_size, d]``.

    torch's own styles do this too, but leave their last collective under way, and a compiled layer that is given such a
    tensor fails in its backward (torch 2.13).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding | nn.Linear)
        # By tokens, which gathers the ranks' logits; by features, which adds them up, where tokens cannot be cut.
        dim = 0 if _even(module.weight.shape[0]) else 1
        for name, parameter in list(module.named_parameters()):
            part = distribute_tensor(parameter, device_mesh, [Shard(dim) if dim < parameter.dim() else Replicate()])
            module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))

        def leave(_: nn.Module, __: object, output: DTensor) -> Tensor:
            return output.full_tensor()

        module.register_forward_pre_hook(_entrance(device_mesh))
        module.register_forward_hook(leave)
        return module


class _Unit(ParallelStyle):
    """A gated attention unit: e is split, the rest copied."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, GatedAttentionUnit):
            raise _foreign("attn", module)
        for name in ("gate_proj", "v_proj", "qk_proj", "output_proj"):
            if not isinstance(getattr(module, name), nn.Linear):
                raise _foreign(name, getattr(module, name))
        ranks = device_mesh.size()
        if not _even(module.expanded_dim):
            raise ValueError(
                f"expansion * embed_dim ({module.expanded_dim}) must be a multiple of the number of processes "
                f"({get_world_size()}): tensor_parallel_dim ({ranks}) of them split it, and FSDP each part again; set "
                "model.expansion so, or start fewer processes"
            )
        plan = {"gate_proj": ColwiseParallel(), "v_proj": ColwiseParallel(), "output_proj": RowwiseParallel()}
        parallelize_module(module, device_mesh, plan)
        module.expanded_dim //= ranks  # a decoding cache holds this rank's slice
        distribute_module(module.qk_proj, device_mesh)
        module.qk_proj.__class__ = _CopiedLinear
        _copy_rest(module, device_mesh, (OffsetScale, RopeBias, T5Bias, ToeplitzBias))
        # The projections' terms of the input's gradient are added up before they are summed over the ranks, once.
        module.register_forward_pre_hook(_entrance(device_mesh))
        return module


class _CopiedLinear(nn.Linear):
    """A projection inside a unit that every rank computes whole."""

    def forward(self, input: Tensor) -> Tensor:
        """Project a copied ``[b, s, d]`` to this rank's ``[b, s, z]``."""
        assert isinstance(input, DTensor)
        bias = None if self.bias is None else local(self.bias, terms=True)
        return F.linear(summed(input), local(self.weight, terms=True), bias)


class _Rest(ParallelStyle):
    """What lies outside of the units: the output projection is split, unless the embedding is it, the rest copied."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module.output, nn.Linear):
            parallelize_module(module.output, device_mesh, _Table())
        _copy_rest(module, device_mesh, (RMSNorm, LayerNorm, ScaleNorm, ScaledSinusoid))
        return module


def _entrance(device_mesh: DeviceMesh) -> Any:
    """A hook that makes a module's first input, the same on every rank, a DTensor."""

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return DTensor.from_local(inputs[0], device_mesh, [Replicate()], run_check=False), *inputs[1:]

    return enter


def _copy_rest(root: nn.Module, device_mesh: DeviceMesh, kinds: tuple[type[nn.Module], ...]) -> None:
    """Copy all parameters below ``root`` that are left to every rank; ``kinds`` compute with their ``local`` ones."""
    for name, module in root.named_modules():
        if not all(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            if not isinstance(module, kinds):
                raise _foreign(name, module)
            distribute_module(module, device_mesh)


def _foreign(name: str, module: nn.Module) -> ValueError:
    return ValueError(
        "tensor_parallel_plan (flash_plugin.flash_tp_plan) must be given a FLASH model without adapters or other "
        f"foreign parts, and here {name} is a {type(module).__name__}; set tensor_parallel_dim=1"
    )


def _even(size: int) -> bool:
    """Whether ``size`` rows can be split, and the parts sharded by FSDP, which needs equal ones then."""
    return size % get_world_size() == 0
