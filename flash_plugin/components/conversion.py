"""Weights of other implementations as ours, and back: all of them or nothing.

What a file holds must be exactly what its layout holds: every tensor that is missing, unexpected or of another shape is
listed, and nothing is loaded in part.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flash_plugin
from flash_plugin.components.checkpoint_files import listing
from flash_plugin.components.checkpoint_fit import check_fit, check_tensors
from flash_plugin.components.conversion_encoders import GauAlpha, JunnyuFlashQuad
from flash_plugin.components.conversion_flash import DnaFlash, FlashPytorch, JunnyuFlash
from flash_plugin.components.conversion_rules import Format, Option, Rule, Weights, is_same
from flash_plugin.components.sizes import SIZES

#: By name the layouts that go by it; which one a file has, its names tell.
FORMATS: dict[str, tuple[Format, ...]] = {
    "flash_pytorch": (FlashPytorch(),),
    "dnaflash": (DnaFlash(),),
    "gau_alpha": (GauAlpha(),),
    "junnyu": (JunnyuFlash(), JunnyuFlashQuad()),
}
OURS = "flash_plugin"

# Names that only these have, of which none can be converted.
_NOT_CONVERTED = {
    "attn.offset_scale.gamma": "flash_plugin's own, which need no conversion (or give --to)",
    "qk_offset_scale.gamma": "layers of FLASH-pytorch without the model around them",
    "i_dense.weight": "a part of GAU-alpha: convert the whole GAUAlphaForMaskedLM",
    "uv.weight": "a part of JunnYu's FLASH-Quad: convert the whole FLASHQuadForMaskedLM",
    "offsetscale.gamma": "GAU of FLASH-pytorch, a layer, not a model: load it into a flash_plugin.GatedAttentionUnit",
    "self_attn.q_proj.weight": "a Transformer: swap its attention with flash_plugin.swap_attention",
    "attn.q_proj.weight": "a Transformer: swap its attention with flash_plugin.swap_attention",
}
# Of a config.json: what says nothing about the numbers in the file.
_NOT_COMPARED = ("architectures", "tie_word_embeddings")


class Converted(NamedTuple):
    """What a conversion gives.

    Attributes:
        weights: The state dict.
        arguments: The model's node, or the arguments of the other implementation's constructor.
        notes: What was assumed and left behind, in sentences.
        layout: The other implementation's layout.
    """

    weights: dict[str, Tensor]
    arguments: dict[str, Any]
    notes: list[str]
    layout: Format


def options_of(name: str) -> dict[str, Option]:
    """What can be told about weights of the implementation called ``name``."""
    return {key: option for layout in FORMATS[name] for key, option in layout.options.items()}


def convert_to_ours(
    name: str, weights: Weights, options: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> Converted:
    """Make another implementation's weights ours.

    Args:
        name: One of :data:`FORMATS`.
        weights: Its state dict. Tensors on the meta device tell the model's arguments, and no more.
        options: What shapes do not tell, under the other implementation's names.
        config: The arguments that the other implementation was built with, if they are known; they stand for options
            that are not given, and its defaults for those that are not there either.

    Raises:
        ValueError: If an option is unknown or of the wrong kind, or tensors are missing, unexpected or of another shape
            (all are listed), or hold other values where the other implementation computes them, or ``config`` says what
            the weights or our model contradict.
    """
    layout, weights, prefix = _recognise(name, weights)
    given = dict(options or {})
    for key, value in given.items():
        if key not in layout.options:
            raise ValueError(f"{key} ({value!r}) must be one of {', '.join(layout.options)} for {layout.title}")
    notes = [f"names without their prefix {prefix!r}"] if prefix else []
    try:
        arguments = layout.sizes(weights)
    except ValueError as error:
        raise ValueError(f"weights must be those of {layout.title}, and there is {error}") from error
    for key, option in layout.options.items():
        known = {**(config or {}), **given}
        arguments[option.argument] = option.to_ours(key, known.get(key, option.default))
        if key not in known:
            notes.append(f"{key}={option.default}, which weights do not tell: give {key}=VALUE if it was another")
        elif key not in given:
            notes.append(f"{key}={known[key]}, as its configuration says")
    arguments.update(layout.fixed(arguments))
    read = {key: value for key, value in layout.their_arguments(arguments).items() if key not in given}
    _check_config(layout, read, config or {})
    node = {"_component_": f"flash_plugin.{layout.component}"}
    node.update({key: value for key, value in arguments.items() if value is not None})
    own = _meta_model(layout.component, node).state_dict()
    rules = layout.rules(arguments)
    weights = _completed(weights, {**layout.copies(arguments), **layout.tied(arguments)})
    _check_layout(layout, arguments, rules, own, weights)
    converted = {
        ours: tensor
        for rule in rules
        for ours, tensor in zip(rule.ours, rule.to_ours([weights[key] for key in rule.theirs]), strict=True)
    }
    dtype = converted["tok_embeddings.weight"].dtype
    added = {key: converted[key].to(dtype) for rule in rules if not rule.theirs for key in rule.ours}
    converted = {key: added.get(key, converted[key]).contiguous() for key in own}
    left = [key for key in layout.unused(arguments) if key in weights]
    if left:
        notes.append(
            f"{len(left)} tensors are left behind, which {layout.title} does not compute with: {listing(left)}"
        )
    return Converted(converted, node, [*notes, *layout.remarks(arguments)], layout)


def convert_to_theirs(name: str, weights: Weights, node: Mapping[str, Any]) -> Converted:
    """Make our weights another implementation's.

    Args:
        name: One of :data:`FORMATS`.
        weights: Our state dict.
        node: The model's node, with its ``_component_``.

    Raises:
        ValueError: If the other implementation has no such model, listing every argument that it cannot have, or has no
            place for the values of some tensors.
    """
    family, arguments = _resolve(node)
    layout = next((each for each in FORMATS[name] if each.component == family), None)
    if layout is None:
        have = " or ".join(f"flash_plugin.{each.component}" for each in FORMATS[name])
        raise ValueError(f"model ({node['_component_']}) must be {have} to be converted to {name}; choose another --to")
    if arguments.get("final_norm", "") is None:
        arguments["final_norm"] = arguments["norm"]
    if arguments.get("rope_dim", "") is None:
        arguments["rope_dim"] = arguments["qk_dim"]
    arguments.update({key: None for key in ("attention_layers", "quadratic_layers") if arguments.get(key) == []})
    _check_arguments(layout, arguments)
    own = _meta_model(str(node["_component_"]).rpartition(".")[2], node).state_dict()
    check_fit(weights, own, source="to convert", model=str(node["_component_"]))
    check_tensors(weights, "to convert")
    rules = layout.rules(arguments)
    converted: dict[str, Tensor] = {}
    lost = []
    for rule in rules:
        ours = [weights[key] for key in rule.ours]
        theirs = rule.to_theirs(ours)
        converted.update(zip(rule.theirs, (tensor.contiguous() for tensor in theirs), strict=True))
        back = rule.to_ours(list(theirs))
        pairs = zip(rule.ours, ours, back, strict=True)
        lost += [key for key, mine, again in pairs if not torch.equal(mine, again.to(mine.dtype))]
    if lost:
        raise ValueError(
            f"{layout.title} must have a place for every value, and for those of {len(lost)} tensors it has none: "
            f"{', '.join(lost)}; convert the weights from before they were trained here"
        )
    dtype = weights["tok_embeddings.weight"].dtype
    for key, tensor in layout.constants(arguments).items():
        converted[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    converted.update({copy: converted[original] for copy, original in layout.copies(arguments).items()})
    unused = {key: tensor.to(dtype) for key, tensor in layout.unused(arguments).items()}
    converted.update(unused)
    notes = (
        [f"{len(unused)} tensors that it does not compute with are zeros: {listing(list(unused))}"] if unused else []
    )
    return Converted(converted, layout.their_arguments(arguments), notes, layout)


def looks_like(weights: Iterable[str]) -> str | None:
    """What the names of a state dict look like, in words, or None."""
    names = list(weights)
    for name, layouts in FORMATS.items():
        for layout in layouts:
            if any(_prefix(each, layout.mark) is not None for each in names):
                alias = "flash_pytorch or dnaflash" if name in ("flash_pytorch", "dnaflash") else name
                return f"{layout.title}: use --from {alias}"
    for mark, what in _NOT_CONVERTED.items():
        if any(_prefix(each, mark) is not None for each in names):
            return what
    return None


def _prefix(name: str, mark: str) -> str | None:
    """What stands before ``mark`` in ``name``, if it is a wrapper's prefix."""
    before, found, after = name.rpartition(mark)
    return before if found and not after and (not before or before.endswith(".")) else None


def _recognise(name: str, weights: Weights) -> tuple[Format, Weights, str]:
    """The layout, the weights without a wrapper's prefix, and that prefix."""
    if name not in FORMATS:
        raise ValueError(f"source ({name!r}) must be one of {', '.join(FORMATS)}; choose one of them")
    for layout in FORMATS[name]:
        for key in weights:
            prefix = _prefix(key, layout.mark)
            if prefix is not None:
                return layout, {each.removeprefix(prefix): tensor for each, tensor in weights.items()}, prefix
    guess = looks_like(weights)
    titles = " or ".join(layout.title for layout in FORMATS[name])
    marks = " or ".join(layout.mark for layout in FORMATS[name])
    raise ValueError(
        f"weights must be those of {titles} for --from {name}, and none is called {marks}; "
        + (f"they look like {guess}" if guess else f"they are like no layout known here: {listing(list(weights))}")
    )


def _completed(weights: Weights, second_names: Mapping[str, str]) -> dict[str, Tensor]:
    """``weights`` with what some writers of files leave out because it is there under another name."""
    completed = dict(weights)
    for one, other in second_names.items():
        for missing, present in ((one, other), (other, one)):
            if missing not in weights and present in weights:
                completed[missing] = weights[present]
    return completed


def _check_layout(
    layout: Format, arguments: Mapping[str, Any], rules: list[Rule], own: Weights, weights: Weights
) -> None:
    """Refuse weights that are not the layout's, with a list of all that is wrong."""
    shapes = {
        key: tensor.shape
        for rule in rules
        for key, tensor in zip(rule.theirs, rule.to_theirs([own[name] for name in rule.ours]), strict=True)
    }
    copies, constants = layout.copies(arguments), layout.constants(arguments)
    shapes |= {copy: shapes[original] for copy, original in copies.items()}
    may_lack = {**constants, **layout.unused(arguments)}
    shapes |= {key: tensor.shape for key, tensor in may_lack.items()}
    problems = [f"missing: {key} {list(shapes[key])}" for key in shapes if key not in weights and key not in may_lack]
    problems += [f"unexpected: {key} {list(tensor.shape)}" for key, tensor in weights.items() if key not in shapes]
    for key, shape in shapes.items():
        if key in weights and weights[key].shape != shape:
            problems.append(f"wrong shape: {key} {list(weights[key].shape)} where {list(shape)} is expected")
        elif key in weights and key not in constants and not weights[key].is_floating_point():
            problems.append(f"wrong type: {key} is {weights[key].dtype} and must be floating point")
        elif key in weights and not weights[key].is_meta:
            if key in copies and not is_same(weights[key], weights[copies[key]]):
                problems.append(f"wrong values: {key} is not {copies[key]}, which it stands for")
            if key in constants and not _is_constant(weights[key], constants[key]):
                problems.append(f"wrong values: {key} is not what {layout.title} computes")
    if problems:
        raise ValueError(
            f"weights must be those of {layout.title}, and {len(problems)} tensors do not fit; convert the whole "
            "model, as that implementation saves it:\n  " + "\n  ".join(problems)
        )


def _is_constant(found: Tensor, computed: Tensor) -> bool:
    """Whether ``found`` is ``computed``, but for how ``found``'s dtype and another machine's functions round.

    Frequencies span four orders of magnitude and are compared as ratios; sines of angles that grow with the position,
    and their rounding with them, are not.
    """
    if not found.is_floating_point():
        return torch.equal(found, computed.to(found.dtype))
    bound = max(4 * torch.finfo(found.dtype).eps, 1e-6)
    sines = computed.dim() == 2
    found, computed = found.double(), computed.double()
    return torch.allclose(found, computed, rtol=0.0 if sines else bound, atol=max(bound, 1e-4) if sines else 0.0)


def _check_config(layout: Format, read: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a configuration that is not of these weights, or of a model that is not to be had here."""
    width = read.get("dim", read.get("hidden_size"))
    wrong = [
        f"{key} is {config[key]!r} and must be {value!r}"
        for key, value in read.items()
        if key in config
        and key not in _NOT_COMPARED
        and config[key] != value
        # Others round the factor times the width down, so that several factors are one model.
        and not (key == "expansion_factor" and width and int(config[key] * width) == int(value * width))
    ]
    if wrong:
        raise ValueError(
            f"the configuration beside weights of {layout.title} must be theirs and of a model that is to be had here, "
            f"and it is not ({len(wrong)} arguments):\n  " + "\n  ".join(wrong)
        )


def _check_arguments(layout: Format, arguments: Mapping[str, Any]) -> None:
    """Refuse a model that the other implementation does not have, with a list of all that it cannot have."""
    allowed: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in layout.fixed(arguments).items()}
    allowed |= {key: tuple(values) for key, values in layout.choices.items()}
    allowed |= {option.argument: tuple(option.values.values()) for option in layout.options.values() if option.values}
    wrong = [
        f"{key} is {arguments[key]!r} and must be {' or '.join(map(repr, values))}"
        for key, values in allowed.items()
        if arguments[key] not in values
    ]
    if wrong:
        raise ValueError(
            f"{layout.title} must have a model like this one, and it has none ({len(wrong)} arguments):\n  "
            + "\n  ".join(wrong)
        )


def _resolve(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family of builders that ``node`` names, and all arguments, defaults included."""
    component = str(node.get("_component_", ""))
    module, _, name = component.rpartition(".")
    if module != OURS or not hasattr(flash_plugin, name):
        raise ValueError(f"model ({component!r}) must be a builder of flash_plugin; give the model's own node")
    family = name
    for prefix in ("mlm_flash_quad", "mlm_flash", "flash_quad", "flash"):
        if name == prefix or name.removeprefix(f"{prefix}_") in SIZES:
            family = prefix
            break
    arguments: dict[str, Any] = {}
    if family.startswith("mlm_"):
        family = family.removeprefix("mlm_")
        arguments = {**_defaults(family), "causal": False}
    return family, {**arguments, **_defaults(name), **{key: node[key] for key in node if key != "_component_"}}


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(flash_plugin, name)).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def _meta_model(name: str, node: Mapping[str, Any]) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = getattr(flash_plugin, name)(**{k: v for k, v in node.items() if k != "_component_"})
    return model
