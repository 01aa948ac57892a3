"""Initial weights of a FLASH model, the same on every rank and for any number of processes."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from flash_plugin.components.gau import GatedAttentionUnit, OffsetScale
from flash_plugin.components.norms import ScaleNorm
from flash_plugin.components.positions import RopeBias, ScaledSinusoid, T5Bias, ToeplitzBias

# Standard deviation of embeddings and relative biases.
_EMBEDDING_STD = 0.02


def initialize_weights(model: nn.Module, *, seed: int | None = None) -> None:
    """Fill every parameter of ``model`` in place.

    Linear weights are N(0, 1 / fan_in), those that write into the residual stream divided by sqrt(number of layers);
    biases are 0, norms 1, embeddings, output projection and relative biases N(0, 0.02), OffsetScale as in the paper.

    Args:
        model: Any model; parameters on the meta device are left alone.
        seed: Each parameter draws from a generator seeded by (seed, its name), so that its values depend on neither
            rank, process count, order nor global random state. None draws from the global generator.
    """
    num_layers = max(sum(isinstance(module, GatedAttentionUnit) for module in model.modules()), 1)
    residual = {id(m.output_proj) for m in model.modules() if isinstance(m, GatedAttentionUnit)}
    with torch.no_grad():
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "meta":
                    continue
                std = _std(module, name)
                if id(module) in residual:
                    std *= num_layers**-0.5
                elif module is getattr(model, "output", None):
                    std = min(std, _EMBEDDING_STD)  # the first predictions are nearly uniform
                _fill(module, name, parameter, std, _generator(seed, f"{prefix}.{name}", parameter.device))


def _std(module: nn.Module, name: str) -> float:
    if isinstance(module, nn.Linear):
        return 0.0 if name == "bias" else module.in_features**-0.5
    if isinstance(module, OffsetScale):
        return 0.0 if name == "beta" else _EMBEDDING_STD
    return _EMBEDDING_STD


def _fill(module: nn.Module, name: str, parameter: nn.Parameter, std: float, generator: torch.Generator | None) -> None:
    if isinstance(module, nn.RMSNorm | nn.LayerNorm | ScaleNorm):
        parameter.fill_(0.0 if name == "bias" else 1.0)
    elif isinstance(module, ScaledSinusoid):
        parameter.fill_(module.dim**-0.5)
    elif isinstance(module, nn.Linear | nn.Embedding | OffsetScale | RopeBias | T5Bias | ToeplitzBias):
        if std == 0.0:
            parameter.zero_()
        else:
            # Drawn in float32 so that the values of a bfloat16 model are the float32 model's, rounded.
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
            parameter.copy_(drawn.normal_(0.0, std, generator=generator))
    else:
        raise ValueError(
            f"{type(module).__name__}.{name} has no initialisation rule in flash_plugin; give the model a checkpoint, "
            "or build it from flash_plugin's own modules"
        )


def _generator(seed: int | None, name: str, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
