"""Does a checkpoint fit a model, and is it in the precision asked for? Every refusal names the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_plugin.components.checkpoint_files import listing
from flash_plugin.components.losses import AFTER_DIVERGENCE
from flash_plugin.components.quantizers import quantization_of

EMBEDDING_KEY = "tok_embeddings.weight"


def check_tensors(weights: Mapping[str, Any], source: str) -> None:
    """Refuse weights that are no tensors or are not finite.

    Args:
        weights: The state dict read from ``source``. Quantized tensors (subclasses) pass unread.
        source: What to call the file in an error.

    Raises:
        ValueError: If a value is no tensor, or a tensor holds NaN or infinity.
    """
    if not weights:
        raise ValueError(f"checkpoint {source} must hold weights, and it is empty; name another file")
    others = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"checkpoint {source} must map names to tensors, and these are no tensors: {listing(others)}; "
            "name the file of the weights, such as epoch_0/model-00001-of-00001.bin"
        )
    broken = _not_finite(weights)
    if broken:
        raise ValueError(
            f"checkpoint {source} must hold finite weights, and these hold NaN or infinity: {listing(broken)}; "
            "training had diverged, so load an earlier epoch and lower the learning rate or clip gradients"
        )


def check_finite(weights: Mapping[str, Tensor], epoch: int) -> None:
    """Refuse to save weights that are not finite.

    Args:
        weights: The state dict to save.
        epoch: The epoch that it would be saved as.

    Raises:
        ValueError: If a tensor holds NaN or infinity.
    """
    broken = _not_finite(weights)
    if broken:
        raise ValueError(
            f"the weights of epoch {epoch} must be finite to be saved, and these hold NaN or infinity: "
            f"{listing(broken)}; training has diverged and earlier checkpoints are as they were: {AFTER_DIVERGENCE}"
        )


def check_precision(weights: Mapping[str, Tensor], source: str, *, quantized: bool) -> None:
    """Refuse what a recipe would evaluate in another precision than it was asked for.

    Args:
        weights: The state dict read from ``source``.
        source: What to call the file in an error.
        quantized: Whether the recipe has quantized its model, and so wants quantized weights.

    Raises:
        ValueError: If the weights are quantized and the recipe did not quantize its model, or the other way round.
    """
    kinds = sorted({kind for kind in map(quantization_of, weights.values()) if kind})
    if quantized and not kinds and not is_packed(weights):
        raise ValueError(
            f"checkpoint {source} must hold quantized weights for a recipe with a quantizer, and it holds "
            "full-precision ones, which would take the quantized ones' place; run `tune run quantize --config "
            "configs/flash_quantize.yaml` and name the file that it writes in checkpointer.checkpoint_files, or set "
            "quantizer=null to run in full precision"
        )
    if not quantized and kinds:
        raise ValueError(
            f"checkpoint {source} must hold full-precision weights for a recipe without a quantizer, and its weights "
            f"are quantized ({', '.join(kinds)}); set the quantizer that they were made with, such as "
            "quantizer._component_=flash_plugin.Int8WeightOnlyQuantizer; if one is set, torchtune does not know its "
            "class: register it in torchtune.training.quantization._quantizer_to_mode; to train or to quantize, name "
            "the checkpoint from before quantization"
        )


def refuse_quantizer(name: str) -> NoReturn:
    """Raise ValueError: a recipe was given this quantizer and loads full-precision weights all the same."""
    raise ValueError(
        f"quantizer ({name}) must be a class that torchtune knows, or the recipe ignores it and runs in full "
        "precision; set quantizer._component_=flash_plugin.Int8WeightOnlyQuantizer, or register yours: "
        "torchtune.training.quantization._quantizer_to_mode[YourClass] = '8w' (a recipe that trains or quantizes "
        "needs no checkpointer.quantizer: leave it out there)"
    )


def is_packed(weights: Mapping[str, Tensor]) -> bool:
    """Whether there are integers among the weights, as quantizers leave them that swap modules."""
    return any(not tensor.is_floating_point() for tensor in weights.values())


def check_fit(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    source: str,
    model: str,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Refuse a checkpoint whose keys or shapes are not the model's.

    Args:
        found: The state dict read from ``source``.
        expected: The model's own state dict (meta tensors do).
        source: What to call the file in an error.
        model: What to call the model in an error.
        optional: Keys of ``expected`` that the checkpoint may lack.

    Raises:
        ValueError: If keys are missing or unexpected, or shapes differ, listing them.
    """
    missing = [key for key in expected if key not in found and key not in optional]
    unexpected = [key for key in found if key not in expected]
    reshaped = [
        f"{key} {list(found[key].shape)} in the file but {list(tensor.shape)} in the model"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {kind}: {listing(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"checkpoint {source} must fit the model ({model}), and its keys do not ({'; '.join(problems)}); "
            f"{_remedy(found, expected)}"
        )


def _remedy(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What to do about a misfit; the commonest is a tokenizer of another size."""
    if EMBEDDING_KEY in found and EMBEDDING_KEY in expected:
        ours, theirs = expected[EMBEDDING_KEY].shape[0], found[EMBEDDING_KEY].shape[0]
        if ours != theirs:
            return (
                f"the checkpoint has vocab_size {theirs} and the model vocab_size {ours}: "
                f"set model.vocab_size={theirs} and use the tokenizer that the checkpoint was trained with"
            )
    return "give the model the arguments that the checkpoint was trained with"


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    return [key for key, tensor in weights.items() if _is_plain_float(tensor) and not tensor.isfinite().all()]


def _is_plain_float(tensor: Tensor) -> bool:
    """Whether the values can be read as they are: not quantized (a subclass), not integers, not float8."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.is_floating_point() and tensor.element_size() > 1
