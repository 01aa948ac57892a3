"""Initial weights of a FLASH model, the same on every rank and for any number of processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward, MultiHeadAttention, TanhGate, TransformerDecoder
from torchtune.modules import RMSNorm as TorchtuneRMSNorm

from flash_plugin.components.cross_attention import CrossGatedAttentionUnit
from flash_plugin.components.gau import GatedAttentionUnit, OffsetScale
from flash_plugin.components.global_path import Matrix
from flash_plugin.components.norms import ScaleNorm
from flash_plugin.components.positions import RopeBias, ScaledSinusoid, T5Bias, ToeplitzBias
from flash_plugin.kernels.validation import is_number

#: Standard deviation of embeddings, unless another is asked for, of relative biases, and of logits' projection.
EMBEDDING_STD = 0.02


def initialize_weights(model: nn.Module, *, seed: int | None = None, embedding_std: float = EMBEDDING_STD) -> None:
    """Fill every parameter of ``model`` in place.

    Linear weights are N(0, 1 / fan_in), those that write into the residual stream divided by the root of their number;
    biases and tanh gates are 0, norms 1, embeddings, output projection and relative biases N(0, 0.02), OffsetScale as
    in the paper.

    Args:
        model: Any model; parameters on the meta device are left alone.
        seed: Each parameter draws from a generator seeded by (seed, its name), so that its values depend on neither
            rank, process count, order nor global random state. None draws from the global generator.
        embedding_std: Standard deviation of embeddings. A Llama learns faster from 1, FLASH from 0.02
            (``recipes/study_quality.py``).
    """
    with torch.no_grad():
        for name, rule in _rules(model, embedding_std):
            if rule.parameter.device.type != "meta":
                _fill(rule, rule.parameter, _generator(seed, name, rule.parameter.device))


class InitialWeights(Mapping[str, Tensor]):
    """The state dict that :func:`initialize_weights` gives a model, drawn anew at each look and held by nobody.

    Every process of a distributed recipe goes through all initial weights, one after another, and keeps its shards. So
    it needs memory for one tensor at a time; flash_7b in float32 is 28 GB for each of them otherwise.

    Args:
        model: The model, on any device; meta costs nothing.
        seed: Seed of every parameter, together with its name.
        embedding_std: Standard deviation of embeddings.
    """

    def __init__(self, model: nn.Module, seed: int, embedding_std: float = EMBEDDING_STD) -> None:
        self._seed = seed
        self._rules = {id(rule.parameter): (name, rule) for name, rule in _rules(model, embedding_std)}
        # From the state dict itself, whose names are not always the modules': torchtune's FusionLayers change them.
        held = model.state_dict(keep_vars=True).items()
        #: The model's own parameters, under their names in its state dict.
        self.parameters = {name: value for name, value in held if id(value) in self._rules}

    def __getitem__(self, name: str) -> Tensor:
        """Draw one tensor, in float32 on the CPU."""
        parameter = self.parameters[name]
        full_name, rule = self._rules[id(parameter)]
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        _fill(rule, values, _generator(self._seed, full_name, values.device))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


class _Rule(NamedTuple):
    """A parameter, the module and name it has there, and the standard deviation of its values."""

    parameter: nn.Parameter
    module: nn.Module
    name: str
    std: float


def _rules(model: nn.Module, embedding_std: float) -> Iterator[tuple[str, _Rule]]:
    """Every parameter's full name and how to fill it."""
    units = GatedAttentionUnit | CrossGatedAttentionUnit | MultiHeadAttention
    attentions = [m for m in model.modules() if isinstance(m, units)]
    outputs = {
        id(getattr(m, "output", None)) for m in model.modules() if m is model or isinstance(m, TransformerDecoder)
    }
    residual = {id(m.output_proj) for m in attentions} | {
        id(m.w2) for m in model.modules() if isinstance(m, FeedForward)
    }
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            std = _std(module, name, embedding_std)
            if id(module) in residual:
                std *= len(residual) ** -0.5
            elif id(module) in outputs:
                std = min(std, EMBEDDING_STD)  # the first predictions are nearly uniform
            yield f"{prefix}.{name}", _Rule(parameter, module, name, std)


def check_embedding_std(std: float) -> None:
    """Refuse a standard deviation that is not a positive number.

    Raises:
        ValueError: If it is not.
    """
    if not is_number(std) or not 0 < std < math.inf:
        raise ValueError(
            f"init_embedding_std ({std!r}) must be a positive number; set checkpointer.init_embedding_std=0.02"
        )


def _std(module: nn.Module, name: str, embedding_std: float) -> float:
    if isinstance(module, nn.Linear):
        return 0.0 if name == "bias" else module.in_features**-0.5
    if isinstance(module, OffsetScale):
        return 0.0 if name == "beta" else EMBEDDING_STD
    return embedding_std if isinstance(module, nn.Embedding) else EMBEDDING_STD


def _fill(rule: _Rule, values: Tensor, generator: torch.Generator | None) -> None:
    module = rule.module
    if isinstance(module, Matrix):
        values.fill_(module.start)
    elif isinstance(module, TanhGate):
        values.zero_()
    elif isinstance(module, nn.RMSNorm | nn.LayerNorm | ScaleNorm | TorchtuneRMSNorm):
        values.fill_(0.0 if rule.name == "bias" else 1.0)
    elif isinstance(module, ScaledSinusoid):
        values.fill_(module.dim**-0.5)
    elif isinstance(module, nn.Linear | nn.Embedding | OffsetScale | RopeBias | T5Bias | ToeplitzBias):
        if rule.std == 0.0:
            values.zero_()
        else:
            # Drawn in float32 so that the values of a bfloat16 model are the float32 model's, rounded.
            drawn = torch.empty(values.shape, dtype=torch.float32, device=values.device)
            values.copy_(drawn.normal_(0.0, rule.std, generator=generator))
    else:
        raise ValueError(
            f"{type(module).__name__}.{rule.name} has no initialisation rule in flash_plugin; give the model a "
            "checkpoint, or build it from modules of flash_plugin's or Llama's"
        )


def _generator(seed: int | None, name: str, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
