"""Linear-time attention in models people already have: another attention behind the same projections and names."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer

from flash_plugin.components.fla_layers import PREFIX, FlaAttention, FlaPlacement, find_layer, start_new_layers
from flash_plugin.components.global_path import start_where_checkpoint_is_silent
from flash_plugin.components.host import copy_what_is_merged
from flash_plugin.components.hybrid import check_layers
from flash_plugin.components.multi_head import (
    LinearMultiHeadAttention,
    MixedChunkMultiHeadAttention,
    QuadraticMultiHeadAttention,
)
from flash_plugin.components.placement import Placement
from flash_plugin.kernels.validation import check_attention, check_choice, check_chunk_size

ATTENTIONS = ("mixed_chunk", "quadratic", "linear")


def swap_attention(
    builder: str,
    *,
    attention: str = "mixed_chunk",
    layers: str | Sequence[int] = "all",
    chunk_size: int = 256,
    local: str = "softmax",
    impl: str = "auto",
    attention_args: Mapping[str, Any] | None = None,
    **builder_args: Any,
) -> TransformerDecoder:
    """Build a model of torchtune's, LoRA builders included, and put FLASH's attention into its layers.

    Projections keep their names and weights, so that its checkpoints load as they are, strictly. With
    ``attention="mixed_chunk"`` and ``local="softmax"`` the model starts as the original with attention inside chunks
    only: sequences of one chunk get the original's logits, and the global part opens in training, from zero. With
    ``local="relu2"``, from scratch, it is the paper's MC-TFM.

    A layer of flash-linear-attention, such as ``attention="fla.layers.GatedLinearAttention"``, brings weights of its
    own instead. Where a checkpoint has none for it, it begins with initial ones, and the attention that it replaces
    is left out: it is for training of all weights. It runs on a GPU alone.

    Args:
        builder: Dotted path of the builder, such as ``torchtune.models.llama3_2.llama3_2_1b``.
        attention: ``mixed_chunk``, linear in the sequence; ``quadratic``, FLASH-Quad's; ``linear``, with features
            ``elu(x) + 1`` and a denominator; or the dotted path of a layer below ``fla.layers``.
        layers: ``all``; ``every_N``, the last of each N layers; or a list of indices. Others keep their attention.
        chunk_size: Tokens c that attend to each other quadratically; read by ``mixed_chunk`` alone. A sliding window
            must be as long; inside chunks it is kept, while the global part reaches beyond it.
        local: Attention function: ``softmax`` (``mixed_chunk`` alone), ``relu2``, ``laplace`` or ``softplus2``; not
            read by ``linear``. A bound of the scores (Gemma 2) belongs to softmax, and goes with it.
        impl: Implementation of the op: ``auto``, ``triton`` or ``reference``.
        attention_args: Arguments of a layer of flash-linear-attention, such as ``{expand_k: 1.0}``, besides its width,
            which is the model's. Heads are the model's too, unless they are given or the layer has its own rule.
        **builder_args: The builder's own arguments. FLASH's builders go too, with the layers that are swapped among
            their ``attention_layers``; ``chunk_size`` and ``impl`` are then theirs as well.

    Raises:
        ValueError: If an argument is wrong, the builder is not to be found or builds something else than a decoder with
            self-attention, or a layer's attention has what cannot be honoured.
        RuntimeError: If flash-linear-attention is asked for and not to be imported.

    Returns:
        The builder's model, changed in place.
    """
    foreign = find_layer(attention, attention_args or {}) if attention.startswith(PREFIX) else None
    if foreign is None:
        check_choice("attention", attention, ATTENTIONS)
        if attention_args is not None:
            raise ValueError(
                f"attention_args ({dict(attention_args)}) must come with a layer of flash-linear-attention; leave them "
                "out, or set model.attention=fla.layers.GatedLinearAttention, say"
            )
    check_attention(activation=local, normalizer="visible", dropout=0.0, impl=impl)
    check_chunk_size(chunk_size)
    if attention == "quadratic" and local == "softmax":
        raise ValueError(
            "local ('softmax') with attention='quadratic' is the attention that the model has already; set "
            "model.local=relu2, or model.attention=mixed_chunk"
        )
    model, lora = _build(builder, {"chunk_size": chunk_size, "impl": impl}, builder_args)
    if foreign is not None and lora is not None:
        raise ValueError(
            f"builder ({builder}) trains adapters alone, and layers of flash-linear-attention, being new, must be "
            "trained themselves; name the builder without adapters, or set model.attention=mixed_chunk"
        )
    chosen = _chosen(layers, len(model.layers))
    placement = FlaPlacement() if foreign else Placement({chunk_size} if attention == "mixed_chunk" else set())
    for index in chosen:
        layer = model.layers[index]
        replaced = getattr(layer, "attn", None)
        _check_layer(index, layer, replaced, builder, attention, chunk_size)
        if foreign is not None:
            assert isinstance(placement, FlaPlacement)
            layer.attn = FlaAttention(
                replaced, placement, path=attention, layer=foreign, index=index, arguments=attention_args or {}
            )
        elif attention == "mixed_chunk":
            layer.attn = MixedChunkMultiHeadAttention(
                replaced, placement, chunk_size=chunk_size, activation=local, impl=impl, lora=lora
            )
        elif attention == "linear":
            layer.attn = LinearMultiHeadAttention(replaced, placement, impl=impl)
        else:
            layer.attn = QuadraticMultiHeadAttention(replaced, placement, activation=local, impl=impl)
    if lora is not None:
        model.register_state_dict_post_hook(copy_what_is_merged)
    if foreign is not None:
        model.register_load_state_dict_pre_hook(start_new_layers)
    elif attention == "mixed_chunk":
        model.register_load_state_dict_pre_hook(start_where_checkpoint_is_silent)
    model.register_forward_pre_hook(placement.prepare, with_kwargs=True)
    return model


def _build(
    path: str, shared: dict[str, Any], arguments: dict[str, Any]
) -> tuple[TransformerDecoder, tuple[int, float] | None]:
    """The builder's model, and the rank and alpha of its adapters if it has any.

    What FLASH's builders call as :func:`swap_attention` does (``shared``) is for both.
    """
    try:
        builder = _get_component_from_path(path)
    except (InstantiationError, ValueError) as error:
        raise ValueError(
            f"builder ({path!r}) must be the dotted path of a model builder, and is not to be found "
            f"({str(error).splitlines()[0]}); set model.builder=torchtune.models.llama3_2.llama3_2_1b, say"
        ) from error
    if not callable(builder):
        raise ValueError(
            f"builder ({path!r}) must be the dotted path of a model builder, and is a {type(builder).__name__}; set "
            "model.builder=torchtune.models.llama3_2.llama3_2_1b, say"
        )
    parameters = inspect.signature(builder).parameters
    arguments = {**{name: value for name, value in shared.items() if name in parameters}, **arguments}
    bound = _bound(path, builder, arguments)
    model = builder(**arguments)
    if not isinstance(model, TransformerDecoder):
        raise ValueError(
            f"builder ({path}) must build a TransformerDecoder, and builds a {type(model).__name__}; name the builder "
            "of a text model"
        )
    return model, (bound["lora_rank"], bound["lora_alpha"]) if "lora_rank" in bound else None


def _bound(path: str, builder: Callable[..., nn.Module], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the builder's defaults; what neither it nor :func:`swap_attention` knows is refused."""
    parameters = inspect.signature(builder).parameters
    own = [name for name in inspect.signature(swap_attention).parameters if name != "builder_args"]
    for name, value in arguments.items():
        if name not in parameters:
            nearest = difflib.get_close_matches(name, [*parameters, *own], n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"theirs are: {', '.join([*own, *parameters])}"
            raise ValueError(f"{name} ({value!r}) is an argument of neither swap_attention nor {path}; {remedy}")
    try:
        bound = inspect.signature(builder).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{path}: {error}; its arguments are: {', '.join(parameters)}") from None
    bound.apply_defaults()
    return bound.arguments


def _chosen(layers: str | Sequence[int], count: int) -> list[int]:
    """Indices of the layers that ``layers`` names among ``count``."""
    if layers == "all":
        return list(range(count))
    if not isinstance(layers, str | Sequence):
        raise ValueError(f"layers ({layers!r}) must be all, every_N or a list of indices; set model.layers=all")
    if isinstance(layers, str):
        found = re.fullmatch(r"every_([1-9]\d*)", layers)
        if not found:
            raise ValueError(
                f"layers ({layers!r}) must be all, every_N or a list of indices; set model.layers=every_2, say"
            )
        step = int(found.group(1))
        if step > count:
            raise ValueError(f"layers ({layers!r}) must name a layer of the {count} there are; set model.layers=all")
        return list(range(step - 1, count, step))
    if not layers:
        raise ValueError("layers ([]) must name at least one layer; set model.layers=all")
    return sorted(check_layers("layers", layers, count))


def _check_layer(index: int, layer: nn.Module, attention: object, builder: str, kind: str, chunk_size: int) -> None:
    """Refuse a layer whose attention cannot be replaced without losing something."""
    known = isinstance(attention, MultiHeadAttention | Gemma2Attention)
    if not known or not isinstance(layer, TransformerSelfAttentionLayer):
        raise ValueError(
            f"layer {index} of {builder} (a {type(layer).__name__} with {type(attention).__name__}) must have "
            "torchtune's self-attention to be swapped; leave it out of model.layers, or name another builder"
        )
    assert isinstance(attention, MultiHeadAttention | Gemma2Attention)
    if not attention.is_causal:
        raise ValueError(f"layer {index} of {builder} must be causal to be swapped; leave it out of model.layers")
    window = getattr(attention, "sliding_window_size", None)
    if window is not None and (kind != "mixed_chunk" or chunk_size > window):
        raise ValueError(
            f"layer {index} of {builder} has a sliding window of {window} tokens, which attention={kind!r} with "
            f"chunk_size={chunk_size} cannot keep; set model.attention=mixed_chunk with a chunk_size of at most "
            f"{window}, or leave the layer out of model.layers"
        )
    if kind not in ("mixed_chunk", "quadratic") and attention.attn_dropout > 0:
        raise ValueError(
            f"layer {index} of {builder} has attn_dropout ({attention.attn_dropout}), and linear attention has no "
            "weights to drop; set model.attn_dropout=0.0"
        )
