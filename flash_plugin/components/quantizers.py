"""Int8 quantizers for torchtune's ``quantize``, ``eleuther_eval`` and ``generate``, on torchao's configurations.

They use version 1 of those configurations, the default of every torchao that torchtune can import. Version 2, new in
0.15, bounds its scales from below by the machine epsilon of the weights' dtype: in bfloat16 that is 1/128, so rows
whose largest weight is below 1 (nearly all) keep 20 to 80 of 255 steps, and a model's output is off by 12 % instead
of 1 %.
"""

from __future__ import annotations

import functools
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.dtypes import AffineQuantizedTensor
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    LinearActivationQuantizedTensor,
    quantize_,
)
from torchao.quantization.quant_api import _int8_symm_per_token_reduced_range_quant_noop_decode
from torchao.utils import TorchAOBaseTensor
from torchtune.modules import TiedLinear
from torchtune.training.quantization import _quantizer_to_mode
from torchtune.utils import get_logger, log_rank_zero

from flash_plugin.components.arguments import config_component
from flash_plugin.components.checkpoint_files import listing

logger = get_logger("DEBUG")

# Part of every checkpoint of Int8DynActInt8WeightQuantizer. torchao lists its other functions of this kind as safe to
# load; with this one too, a recipe without a quantizer reads such a file and can be told what it holds.
torch.serialization.add_safe_globals([_int8_symm_per_token_reduced_range_quant_noop_decode])


class Int8Quantizer(ABC):
    """What the int8 quantizers share. A subclass sets ``mode`` and says how linear layers are quantized.

    Every subclass is registered with torchtune when it is defined: recipes look up the exact class, and would
    evaluate in full precision, without a word, with one that they do not find.

    Args:
        embeddings: Whether to quantize embedding tables too, weight-only. A tied output projection is the embedding
            table, so this decides about both. The default leaves them in full precision.
    """

    #: What torchtune calls this kind of quantization; part of the name of the file that `tune run quantize` writes.
    mode: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _quantizer_to_mode[cls] = cls.mode

    @config_component
    def __init__(self, *, embeddings: bool = False) -> None:
        if not isinstance(embeddings, bool):
            raise ValueError(f"embeddings ({embeddings!r}) must be True or False; set quantizer.embeddings to one")
        self.embeddings = embeddings

    def quantize(self, model: nn.Module) -> nn.Module:
        """Quantize the weights of all linear layers in place, and log what stays in full precision.

        The model then accepts from ``load_state_dict`` only weights that are quantized in the same way.

        Args:
            model: A model in float32, bfloat16 or float16.

        Raises:
            ValueError: If the model is quantized already, or nothing in it can be quantized.

        Returns:
            The same model.
        """
        done = [name for name, weight in model.named_parameters() if quantization_of(weight)]
        if done:
            raise ValueError(
                f"model must not be quantized before {type(self).__name__} quantizes it, and it is "
                f"({listing(done)}); build it anew"
            )
        with warnings.catch_warnings():
            # torchao 0.15 announces that version 1 (see above) will go, in releases that torchtune cannot import.
            warnings.filterwarnings("ignore", message="Config Deprecation", category=UserWarning)
            quantize_(model, self._linear_config(), lambda module, _name: isinstance(module, nn.Linear))
            if self.embeddings:
                quantize_(model, _weight_only(), lambda module, _name: isinstance(module, nn.Embedding))
        if not any(quantization_of(weight) for weight in model.parameters()):
            raise ValueError(
                f"model (a {type(model).__name__}) must have linear layers that {type(self).__name__} can quantize, "
                "and has none; quantize another model, or set quantizer=null"
            )
        self._report(model)
        model.register_load_state_dict_pre_hook(functools.partial(_check_loaded, type(self).__name__))
        return model

    @abstractmethod
    def _linear_config(self) -> AOBaseConfig:
        """What torchao shall do to linear layers."""

    def _report(self, model: nn.Module) -> None:
        """Log which weights are int8 and name all others."""
        weights = dict(model.named_parameters())
        quantized = [weight for weight in weights.values() if quantization_of(weight)]
        kept = {name: weight for name, weight in weights.items() if not quantization_of(weight)}
        share = sum(weight.numel() for weight in quantized) / sum(weight.numel() for weight in weights.values())
        tied = getattr(model, "output", None)
        note = ""
        if isinstance(tied, TiedLinear) and not self.embeddings:
            note = "; the output projection is tied to the embeddings: quantizer.embeddings=True quantizes both"
        log_rank_zero(
            logger,
            f"{type(self).__name__} made {len(quantized)} weights int8, {share:.1%} of all parameters; "
            f"in full precision are {_summary(kept)}{note}",
        )


class Int8WeightOnlyQuantizer(Int8Quantizer):
    """Int8 weights, one scale for each output feature; activations keep their precision (torchtune mode ``8w``).

    Args:
        embeddings: Whether to quantize embedding tables too, and with them a tied output projection.
    """

    mode = "8w"

    def _linear_config(self) -> AOBaseConfig:
        return _weight_only()


class Int8DynActInt8WeightQuantizer(Int8Quantizer):
    """Int8 weights and, one scale for each token, int8 inputs of linear layers (torchtune mode ``8da8w``).

    Inputs of one token a row (decoding) keep their precision. torchao leaves layers of 16 input features or fewer as
    they are. A tied output projection is quantized weight-only, since the embedding table is.

    Args:
        embeddings: Whether to quantize embedding tables too, and with them a tied output projection.
    """

    mode = "8da8w"

    def _linear_config(self) -> AOBaseConfig:
        # Int8 products of a single row are not to be had: compiled for a CPU they are garbage (torch 2.13's _int_mm
        # misreads the stride that inductor gives one row), and on a GPU they want 17 rows.
        return Int8DynamicActivationInt8WeightConfig(weight_only_decode=True, set_inductor_config=False)


def quantization_of(tensor: Tensor) -> str | None:
    """Say how a tensor is quantized.

    Returns:
        The name of the quantizer here that makes such tensors, or else of the tensor's type; None if it is not
        quantized by torchao.
    """
    if not isinstance(tensor, TorchAOBaseTensor):
        return None
    if _is_int8(tensor):
        return Int8WeightOnlyQuantizer.__name__
    if isinstance(tensor, LinearActivationQuantizedTensor) and _is_int8(tensor.original_weight_tensor):
        return Int8DynActInt8WeightQuantizer.__name__
    return type(tensor).__name__


def _weight_only() -> AOBaseConfig:
    # Otherwise torchao would lower the precision of every float32 matrix product in the process.
    return Int8WeightOnlyConfig(set_inductor_config=False)


def _is_int8(tensor: Tensor) -> bool:
    """Whether this is a matrix with int8 values and a scale for each row."""
    # 4-bit weights may lie in int8 too, between other bounds.
    return (
        isinstance(tensor, AffineQuantizedTensor)
        and tensor.tensor_impl.dtype == torch.int8
        and tensor.quant_min in (None, -128)
        and tensor.block_size[-1] == tensor.shape[-1]
    )


def _check_loaded(quantizer: str, model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_rest: object) -> None:
    """Refuse to load weights that are not quantized as the model is: ``assign=True`` would put them in its place."""
    floats: list[str] = []
    others: list[str] = []
    dtypes: list[str] = []
    for name, own in model.named_parameters():
        found = state_dict.get(prefix + name)
        if found is None:
            continue  # load_state_dict reports it
        if quantization_of(found) != quantization_of(own):
            (others if quantization_of(found) else floats).append(name)
        elif found.dtype != own.dtype:
            dtypes.append(name)
    if floats:
        raise ValueError(
            f"checkpoint must be quantized to be loaded into a model that {quantizer} has quantized, and in it these "
            f"are in full precision: {listing(floats)}; run `tune run quantize` with the same quantizer and name the "
            "file that it writes in checkpointer.checkpoint_files"
        )
    if others:
        made_by = quantization_of(state_dict[prefix + others[0]])
        raise ValueError(
            f"checkpoint must be quantized as {quantizer} does it, and these are by {made_by}: {listing(others)}; "
            "give the recipe the quantizer, with the arguments, that the checkpoint was quantized with"
        )
    if dtypes:
        raise ValueError(
            f"checkpoint ({state_dict[prefix + dtypes[0]].dtype}) must have the dtype of the model "
            f"({model.get_parameter(dtypes[0]).dtype}), and these have not: {listing(dtypes)}; set dtype as in the run "
            "of `tune run quantize`, or quantize again with this one"
        )


def _summary(names: Iterable[str]) -> str:
    """Names with the layers' numbers left out, each said once, with how many it stands for."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items()) or "none"
