"""Layers of flash-linear-attention in the place of a model's attention: its packing and its cache, told of ours.

The package (``pip install 'flash_plugin[fla]'``) is imported when a model asks for one of its layers. Its kernels are
Triton's: models build, shard, save and load without a GPU, and run with one.

Shape legend: ``b`` batch, ``s`` sequence, ``d`` embed.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules import MultiHeadAttention
from torchtune.utils import get_logger, log_rank_zero

from flash_plugin.components.cache import DecodingCache
from flash_plugin.components.placement import Placement
from flash_plugin.kernels import Segments
from flash_plugin.kernels.new_tokens import NewTokens

PREFIX = "fla."
#: Classes below ``fla.layers`` (0.6.0) that take documents as ``cu_seqlens``, padding as ``attention_mask`` and a cache
#: as ``past_key_values``, and see positions through these alone. The others lack one of them, some without a word.
LAYERS = (
    "Comba", "DeltaNet", "GatedDeltaNet", "GatedDeltaNet2", "GatedDeltaProduct", "GatedLinearAttention",
    "GatedSlotAttention", "HGRN2Attention", "KimiDeltaAttention", "LightNetAttention", "LinearAttention", "MesaNet",
    "MultiScaleRetention", "PrecondGatedDeltaNet", "PrecondKDA",
)  # fmt: skip
#: Ways of computing that know documents; ``fused_chunk`` of some layers runs over their borders.
MODES = ("chunk", "fused_recurrent")
_OWN = ("hidden_size", "layer_idx")
_INSTALL = "run: pip install 'flash_plugin[fla]', in an environment without flash_plugin[eval]"


def find_layer(path: str, arguments: Mapping[str, Any]) -> type[nn.Module]:
    """The layer class that ``path`` names, once it and the arguments for it are known to do.

    Args:
        path: Dotted path, such as ``fla.layers.GatedLinearAttention``.
        arguments: What its constructor is to be given besides the model's sizes.

    Raises:
        ValueError: If the layer or an argument is none that can be used.
        RuntimeError: If flash-linear-attention is not to be imported.
    """
    names = {f"fla.layers.{name}": name for name in LAYERS}
    if path not in names:
        nearest = difflib.get_close_matches(path, names, n=1)
        raise ValueError(
            f"attention ({path!r}) must be a layer that takes documents, padding and a cache, "
            f"{'did you mean ' + nearest[0] + '?' if nearest else 'one of:'} (below fla.layers: {', '.join(LAYERS)})"
        )
    try:
        with warnings.catch_warnings():
            # Said at import on a machine without a GPU, and before every forward there by us; and of classes not ours.
            warnings.filterwarnings("ignore", "Triton is not supported on current platform")
            warnings.filterwarnings("ignore", "Flash Attention is not installed")
            found = getattr(import_module("fla.layers"), names[path])
    except (AttributeError, ImportError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"attention ({path!r}) needs flash-linear-attention, which is not to be imported here ({first}); {_INSTALL}"
        ) from error
    assert isinstance(found, type)
    _check_arguments(path, found, arguments)
    return found


def _check_arguments(path: str, layer: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    # Several constructors have **kwargs, which would swallow a misspelt name.
    parameters = inspect.signature(layer).parameters
    known = [
        name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD and name not in _OWN
    ]
    for name, value in arguments.items():
        if name in _OWN:
            raise ValueError(f"attention_args.{name} ({value!r}) must be left out: the model decides it")
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"its arguments are: {', '.join(known)}"
            raise ValueError(f"attention_args.{name} ({value!r}) is not an argument of {path}; {remedy}")
    if arguments.get("mode", "chunk") not in MODES:
        raise ValueError(
            f"attention_args.mode ({arguments['mode']!r}) must be chunk or fused_recurrent, which know where documents "
            "begin; set model.attention_args.mode=chunk"
        )


class FlaCache(DecodingCache):
    """The package's own cache and our cursor; arguments and errors are those of all decoding caches.

    Attributes:
        held: The package's cache, whose state does not grow with the tokens.
        real: Which of the tokens given to it are no padding, ``[b, tokens]`` bool; None where all are real.
    """

    def __init__(self, *, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len)
        self.held: Any = import_module("fla.models.utils").Cache()
        self.real: Tensor | None = None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.held.reset()
        self.real = None


class _Call(NamedTuple):
    """A forward pass in the package's terms.

    Attributes:
        cu_seqlens: Where documents begin in rows laid end to end, and where the last ends, int32; None for whole rows.
        begins: Whether the cache is to forget what it holds.
        real: What :attr:`FlaCache.real` is with the tokens of this call.
    """

    cu_seqlens: Tensor | None = None
    begins: bool = False
    real: Tensor | None = None


class FlaPlacement(Placement):
    """Documents, padding and places behind a cache in the package's terms, worked out once a forward."""

    def __init__(self) -> None:
        super().__init__(set())
        self._of: tuple[Segments | NewTokens | None, _Call] = (None, _Call())

    def call(self, x: Tensor, input_pos: Tensor | None, cache: FlaCache | None) -> tuple[_Call, NewTokens | None]:
        """How to call a layer with ``[b, s, d]`` inputs, and the tokens' places behind ``cache``.

        Raises:
            ValueError: If the package's cache cannot take what ``input_pos`` says.
        """
        segments, new = self.of(x, input_pos, 1, cache)
        key = segments if new is None else new
        if key is None or key is not self._of[0]:
            self._of = (key, _packed(segments) if new is None or cache is None else _cached(new, cache))
        return self._of[1], new


def _packed(segments: Segments | None) -> _Call:
    if segments is None or segments.single:
        return _Call()
    batch, length = segments.shape
    starts = segments.start == torch.arange(length, device=segments.start.device)
    first = starts.flatten().nonzero().flatten()
    return _Call(cu_seqlens=torch.cat([first, first.new_tensor([batch * length])]).int())


def _cached(new: NewTokens, cache: FlaCache) -> _Call:
    """What the package's cache can take: in each row one document, which all rows begin or all go on with."""
    begins = cache.empty or not bool(new.continues.any())
    remedy = "; feed one document to all rows at a time"
    if not begins and not bool(new.continues.all()):
        raise ValueError(
            "input_pos must go on by one in all rows or begin a document in all, while the cache of "
            f"flash-linear-attention is enabled, and row {int(new.continues.long().argmin())} alone begins one{remedy}"
        )
    length = new.position.shape[1]
    index = torch.arange(length, device=new.position.device)
    last = torch.zeros_like(new.position[:, :1]) if new.segments is None else new.segments.start[:, -1:]
    # A prompt's left padding, all at position 0, is a document for each token; what comes last is the prompt.
    padding = (index < last) & (new.position == 0)
    if bool(((index < last) & ~padding).any()) or (not begins and bool(padding.any())):
        raise ValueError(
            "input_pos must hold one document a row, behind left padding at position 0 if there is any, while the "
            f"cache of flash-linear-attention is enabled{remedy}"
        )
    if begins:
        return _Call(begins=True, real=~padding if bool(padding.any()) else None)
    if cache.real is None:
        return _Call()
    return _Call(real=torch.cat([cache.real, cache.real.new_ones(1, 1).expand(cache.real.shape[0], length)], dim=1))


class FlaAttention(nn.Module):
    """A layer of flash-linear-attention behind the interface of torchtune's attention.

    Its weights are new: nothing of the attention that it replaces is left. They have the dtype of the model, as the
    recipes demand, where the package would keep a few in float32.

    Args:
        attention: The module to replace.
        placement: Where documents and new tokens lie; shared by the model's layers.
        path: Dotted path of the layer's class, for messages.
        layer: The class, as :func:`find_layer` gives it.
        index: Which layer of the model it is.
        arguments: Arguments of its constructor, besides width and index. Heads are those of ``attention`` by default,
            as many and as wide, where the class does not work them out of the width.

    Raises:
        ValueError: If the class refuses the sizes.
        RuntimeError: If it wants a package that is not there.
    """

    #: Rows that each sequence takes in an op: heads are no part of the batch here.
    num_heads = 1
    kv_cache: FlaCache | None

    def __init__(
        self,
        attention: MultiHeadAttention,
        placement: FlaPlacement,
        *,
        path: str,
        layer: type[nn.Module],
        index: int,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.placement = placement
        self.path = path
        #: Names of the replaced module's weights, which its checkpoints have.
        self.replaced = tuple(attention.state_dict())
        parameters = inspect.signature(layer).parameters
        heads = {"num_heads": attention.num_heads, "head_dim": attention.head_dim}
        defaults = {name: heads[name] for name in heads if name in parameters and parameters[name].default is not None}
        self._layer = layer
        self._arguments = {"hidden_size": attention.embed_dim, "layer_idx": index, **defaults, **arguments}
        self._dtype = next(attention.parameters()).dtype
        self.fla = self._build()
        self.kv_cache = None
        self.cache_enabled = False

    def _build(self) -> nn.Module:
        given = ", ".join(f"{name}={value}" for name, value in self._arguments.items())
        try:
            layer = self._layer(**self._arguments)
        except ImportError as error:
            raise RuntimeError(f"attention ({self.path!r}) cannot be built here: {error}") from error
        except (ArithmeticError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"attention ({self.path!r}) does not take {given}: {error}; set model.attention_args to what it takes"
            ) from error
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self._dtype)
        return layer

    def initial_values(self) -> dict[str, Tensor]:
        """Draw the package's initial weights from the global random state, by their names in ``fla``, on the CPU."""
        with torch.device("cpu"):
            return {name: value.detach() for name, value in self._build().state_dict().items()}

    def rope_init(self) -> None:
        """Fill the buffers that checkpoints do not have, on the default device; recipes ask for it behind meta."""
        lost = {name for name, _ in self.fla.named_buffers()} - self.fla.state_dict().keys()
        made = dict(self._build().named_buffers()) if lost else {}
        for name in lost:
            path, _, leaf = name.rpartition(".")
            setattr(self.fla.get_submodule(path), leaf, made[name])

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Set up and enable a decoding cache, in place of one that is there; arguments as of torchtune's."""
        self.kv_cache = FlaCache(batch_size=batch_size, dtype=dtype, max_seq_len=max_seq_len)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Forget the tokens in the cache; a RuntimeError if there is none."""
        if self.kv_cache is None:
            raise RuntimeError("Key value caches are not setup. Call setup_caches first.")
        self.kv_cache.reset()

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: object = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Mix the tokens of each document, ``[b, s, d]``.

        Args:
            x: Input, ``[b, s, d]``.
            y: The same, which torchtune passes twice; not read, since only self-attention is ever replaced.
            mask: Not read: the model checks that it says what ``input_pos`` says.
            input_pos: Position of each token in its document, as torchtune gives it to a layer.

        Raises:
            RuntimeError: If ``x`` is on the CPU.
            ValueError: If the package's cache cannot take what ``input_pos`` says.

        Returns:
            ``[b, s, d]``. With a cache, what left padding gets is zero.
        """
        _refuse_cpu(x, self.path)
        cache = self.kv_cache if self.cache_enabled else None
        call, new = self.placement.call(x, input_pos, cache)
        if cache is None:
            if call.cu_seqlens is None:
                return self.fla(x)[0]
            return self.fla(x.reshape(1, -1, x.shape[-1]), cu_seqlens=call.cu_seqlens)[0].view_as(x)
        assert new is not None
        if call.begins:
            cache.held.reset()
        out = self.fla(x, attention_mask=call.real, past_key_values=cache.held, use_cache=True)[0]
        cache.real = call.real
        cache.advance(new)
        return out


def _refuse_cpu(x: Tensor, path: str) -> None:
    if x.device.type == "cpu":
        raise RuntimeError(
            f"attention ({path!r}) must run on a GPU, and its input is on the CPU: the kernels of "
            "flash-linear-attention are Triton's; set device=cuda, or model.attention=mixed_chunk, which runs anywhere"
        )


def start_new_layers(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: object) -> None:
    """Hook: let checkpoints of the model as it was load strictly, with initial weights where layers are new.

    A layer is new if the checkpoint has the attention that it replaced, and nothing of its own. What was replaced is
    left out. The rest, adapters by themselves included, is for the strict load to judge.

    Raises:
        ValueError: If a layer is new and the model is sharded.
    """
    layers: Any = model.layers
    started = []
    for index, layer in enumerate(layers):
        attention, at = layer.attn, f"{prefix}layers.{index}.attn."
        if not isinstance(attention, FlaAttention) or any(key.startswith(f"{at}fla.") for key in state_dict):
            continue
        old = [at + name for name in attention.replaced if at + name in state_dict]
        if not old:
            continue
        if any(isinstance(parameter, DTensor) for parameter in attention.parameters()):
            raise ValueError(
                f"the checkpoint must hold layer {index}'s weights of {attention.path}, and holds those of the "
                "attention that it replaced, which a sharded model cannot begin from; load it with a single-device "
                "recipe, and name what that saves"
            )
        device = state_dict[old[0]].device
        state_dict.update({f"{at}fla.{name}": one.to(device) for name, one in attention.initial_values().items()})
        for key in old:
            del state_dict[key]
        started.append(index)
    if started:
        log_rank_zero(
            get_logger(),
            f"layers {started} ({layers[started[0]].attn.path}) begin from initial weights: the checkpoint has none "
            "for them, and what it has of the attention that they replace is not used",
        )
