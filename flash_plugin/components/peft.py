"""Low-rank adapters (LoRA, DoRA, QLoRA) on the projections of a FLASH model, as torchtune's recipes want them.

A FLASH layer has one kind of block, whose gated attention unit is attention and MLP in one. So ``lora_attn_modules``
names any of its four projections, ``gate_proj``, ``v_proj``, ``qk_proj`` and ``output_proj``, and ``apply_lora_to_mlp``
has nothing to act on but the Transformer layers that a model may have beside (``attention_layers``).
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params
from torchtune.utils import get_world_size_and_rank

from flash_plugin.components.arguments import config_component
from flash_plugin.components.builders import flash, flash_quad
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.host import copy_what_is_merged
from flash_plugin.kernels.validation import is_number

# NF4 has a scale for 64 numbers and a scale of those for 256 of them, and torchao fills no incomplete block.
_NF4_BLOCK = 64 * 256


class _DoRALinear(DoRALinear):
    """torchtune's layer, which keeps a magnitude that a run resumes with.

    lora_finetune_distributed.py:519 computes it from the weights once they are loaded, over what was loaded of it. It
    does so to layers built on the meta device; if there is nothing to resume, it draws their adapters first.
    """

    _drawn: bool

    def initialize_parameters(self) -> None:
        """Draw the adapter; its magnitude is then to be computed."""
        super().initialize_parameters()
        self._drawn = not self.lora_a.weight.is_meta

    def initialize_dora_magnitude(self) -> None:
        """Compute the magnitude of a drawn adapter; one that was not drawn has been loaded, magnitude and all."""
        if self._drawn:
            super().initialize_dora_magnitude()


def add_adapters(
    model: FlashDecoder,
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> FlashDecoder:
    """Put adapters beside the projections of ``model``, in place. Its logits stay what they were, but for rounding.

    Adapters begin at zero (``lora_b`` is 0) and merge into the weights that a plain FLASH model loads, with the
    keys that torchtune's recipes check, save and merge: ``layers.0.attn.v_proj.lora_a.weight``, say.

    Args:
        model: A model that :func:`~flash_plugin.components.builders.flash` or ``flash_quad`` built.
        lora_attn_modules: Which of ``gate_proj``, ``v_proj``, ``qk_proj`` and ``output_proj`` get adapters, in every
            layer; with ``attention_layers`` also ``q_proj`` and ``k_proj``. An empty list, and False for the next two,
            adds none and has recipes that train nothing but adapters, such as distillation, train every parameter.
        apply_lora_to_mlp: Whether the MLPs of ``attention_layers`` get adapters. FLASH layers have none, so it must be
            False without them. Recipes read this key.
        apply_lora_to_output: Whether the output projection gets an adapter; not possible if it is the embedding table.
        lora_rank: Rank r of the adapters.
        lora_alpha: Adapters are scaled by ``lora_alpha / lora_rank``.
        lora_dropout: Probability of zeroing an adapter's input in training.
        use_dora: Whether to learn each output's magnitude too (DoRA). Not possible with biases, which torchtune's
            layer scales and its merged checkpoint does not.
        quantize_base: Whether to keep the weights of all projections, with and without adapters, in 4 bits (NF4, as
            QLoRA does); state dicts hold them in the model's dtype. Sizes must be multiples of 16384 numbers a process.
            On one device the model is built in full precision first, and takes that memory for a moment.

    Raises:
        ValueError: If an argument is out of range or does not fit the model.

    Returns:
        The same model.
    """
    names = _checked_names(model, lora_attn_modules)
    _check_values(lora_rank, lora_alpha, lora_dropout)
    flags = {"apply_lora_to_mlp": apply_lora_to_mlp, "apply_lora_to_output": apply_lora_to_output}
    for name, flag in {**flags, "use_dora": use_dora, "quantize_base": quantize_base}.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} ({flag!r}) must be True or False; set model.{name} to one of them, unquoted")
    if apply_lora_to_mlp and not any(_linears(layer, "mlp") for layer in model.layers):
        raise ValueError(
            "apply_lora_to_mlp (True) must be False, since a gated attention unit is attention and MLP in one; set it "
            f"to False and name what shall have adapters: {_remedy(model)}"
        )
    if apply_lora_to_output and not isinstance(model.output, nn.Linear):
        raise ValueError(
            "apply_lora_to_output (True) must be False with tie_embeddings=True, where the output projection is the "
            "embedding table; set one of them to False"
        )
    if not names and not any(flags.values()):
        if use_dora or quantize_base:
            option = "use_dora" if use_dora else "quantize_base"
            raise ValueError(
                f"lora_attn_modules ([]) must name projections with {option}=True, since without adapters every "
                f"parameter is trained; {_remedy(model)}, or model.{option}=False"
            )
        # Recipes train what this method names. It is bound to the object, so that copies name their own.
        model.adapter_params = types.MethodType(_all_parameters, model)
        return model

    def adapted(linear: nn.Linear, place: str, quantize: bool) -> nn.Module:
        return _adapted(
            linear, place, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, use_dora=use_dora, quantize=quantize
        )

    for index, layer in enumerate(model.layers):
        for part in ("attn", "mlp"):
            for name, linear in _linears(layer, part).items():
                place = f"layers.{index}.{part}.{name}"
                if name in names if part == "attn" else apply_lora_to_mlp:
                    setattr(getattr(layer, part), name, adapted(linear, place, quantize_base))
                elif quantize_base:
                    setattr(getattr(layer, part), name, _frozen_nf4(linear, place))
    if apply_lora_to_output:
        model.output = adapted(model.output, "output", False)
    model.register_state_dict_post_hook(copy_what_is_merged)
    if quantize_base:
        weight = model.tok_embeddings.weight
        # Off the GPU at once, so that saving does not need its memory.
        _register_reparametrize_state_dict_hooks(model, dtype=weight.dtype, offload_to_cpu=weight.device.type == "cuda")
    return model


def adapter_keys(model: nn.Module) -> frozenset[str]:
    """Names of the adapters' parameters; none where a module declares all of its own, to have all of them trained."""
    adapters = frozenset(get_adapter_params(model))
    return adapters if adapters < frozenset(name for name, _ in model.named_parameters()) else frozenset()


def _all_parameters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _adapted(
    linear: nn.Linear, name: str, *, rank: int, alpha: float, dropout: float, use_dora: bool, quantize: bool
) -> LoRALinear | _DoRALinear:
    """Make torchtune's layer around the weight of ``linear``."""
    biased = linear.bias is not None
    if use_dora and biased:
        raise ValueError(
            f"use_dora (True) must be False for {name}, which has a bias: torchtune scales it in training and not in "
            "the merged checkpoint; set model.use_dora=False, or model.proj_bias=False and model.output_bias=False"
        )
    weight = nn.Parameter(_nf4(linear.weight, name)) if quantize else linear.weight
    kind = _DoRALinear if use_dora else LoRALinear
    # On the meta device, so that nothing is drawn and quantized for a weight that is replaced.
    with torch.device("meta"):
        adapter = kind(
            linear.in_features, linear.out_features, rank=rank, alpha=alpha, dropout=dropout, use_bias=biased,
            quantize_base=quantize,
        )  # fmt: skip
    adapter.to_empty(device=linear.weight.device)  # torchtune's own: the adapter's parameters alone
    adapter.initialize_parameters()
    adapter.weight, adapter.bias = weight, linear.bias
    if use_dora and not linear.weight.is_meta:
        # Recipes do it again when they have loaded the weights.
        adapter.initialize_dora_magnitude()
    return adapter


def _frozen_nf4(linear: nn.Linear, name: str) -> FrozenNF4Linear:
    """``linear`` with its weight in 4 bits."""
    weight = nn.Parameter(_nf4(linear.weight, name), requires_grad=False)
    with torch.device("meta"):
        frozen = FrozenNF4Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    frozen.weight, frozen.bias = weight, linear.bias
    return frozen


def _nf4(weight: Tensor, name: str) -> Tensor:
    # Recipes shard a model among all processes, and each shard needs whole blocks.
    processes = get_world_size_and_rank()[0]
    if weight.numel() % (_NF4_BLOCK * processes):
        rows, columns = weight.shape
        among = f" for each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"quantize_base (True) must be False for {name}, whose {rows} x {columns} weight is no multiple of "
            f"{_NF4_BLOCK} numbers{among}, as NF4 wants; set model.quantize_base=False, or choose embed_dim, expansion "
            "and qk_dim so that it is one"
        )
    return to_nf4(weight.detach())


def _linears(layer: nn.Module, part: str) -> dict[str, nn.Linear]:
    """Projections of a layer's ``attn`` or ``mlp``, if it has one."""
    owner = getattr(layer, part, None)
    children = [] if owner is None else owner.named_children()
    return {name: child for name, child in children if isinstance(child, nn.Linear)}


def _attention_names(model: FlashDecoder) -> list[str]:
    """What ``lora_attn_modules`` may name, in the order of the layers."""
    return list(dict.fromkeys(name for layer in model.layers for name in _linears(layer, "attn")))


def _remedy(model: FlashDecoder) -> str:
    return f"set model.lora_attn_modules=[{','.join(_attention_names(model))}] or some of these"


def _checked_names(model: FlashDecoder, lora_attn_modules: Sequence[str]) -> list[str]:
    if isinstance(lora_attn_modules, str) or not isinstance(lora_attn_modules, Sequence):
        raise ValueError(f"lora_attn_modules ({lora_attn_modules!r}) must be a list of names; {_remedy(model)}")
    names, valid = list(lora_attn_modules), _attention_names(model)
    if any(name not in valid for name in names):
        raise ValueError(
            f"lora_attn_modules ({names}) must hold names of this model's projections, which are {', '.join(valid)}; "
            f"{_remedy(model)}"
        )
    return names


def _check_values(rank: int, alpha: float, dropout: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora_rank ({rank!r}) must be a positive integer; set model.lora_rank=8")
    if not is_number(alpha) or not 0 < alpha < float("inf"):
        raise ValueError(f"lora_alpha ({alpha!r}) must be a positive number; set model.lora_alpha=16")
    if not is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout ({dropout!r}) must lie in [0, 1); set model.lora_dropout=0.0")


def _with_adapters(builder: Callable[..., FlashDecoder]) -> Callable[..., FlashDecoder]:
    """``builder`` with the arguments of :func:`add_adapters` before its own."""
    adapters = list(inspect.signature(add_adapters).parameters.values())[1:]
    arguments = list(inspect.signature(builder).parameters.values())
    order = [*(one for one in adapters if one.kind is not one.KEYWORD_ONLY), *arguments]
    order += [one for one in adapters if one.kind is one.KEYWORD_ONLY]

    def build(*positional: Any, **given: Any) -> FlashDecoder:
        own = {argument.name: given.pop(argument.name) for argument in arguments if argument.name in given}
        return add_adapters(builder(**own), *positional, **given)

    build.__name__ = build.__qualname__ = f"lora_{builder.__name__}"
    build.__module__ = __name__
    build.__signature__ = inspect.signature(builder).replace(parameters=order)  # type: ignore[attr-defined]
    build.__doc__ = (
        f"Build :func:`flash_plugin.{builder.__name__}`, which takes the same arguments, with adapters.\n\n"
        f"{inspect.getdoc(add_adapters)}"
    )
    return config_component(build)


lora_flash = _with_adapters(flash)
lora_flash_quad = _with_adapters(flash_quad)
