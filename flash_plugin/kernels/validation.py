"""Checks that every public op shares: shapes, dtypes, names of choices, and which implementation runs."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_plugin.kernels.activations import ACTIVATIONS
from flash_plugin.kernels.layout import NORMALIZERS, LinearState
from flash_plugin.kernels.segments import Segments
from flash_plugin.kernels.triton.availability import why_unavailable

# Programs along the second and third axis of a CUDA grid, on which the kernels put rows.
_MOST_ROWS = 65535
IMPLEMENTATIONS = ("auto", "triton", "reference")


def is_number(value: object) -> bool:
    """Whether a value from a config is a number: YAML reads ``1e-6`` as a string."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of ``choices``, listing them."""
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}; set {name} to one of them")


def check_implementation(impl: str) -> None:
    """Refuse an implementation that is unknown; whether it can run is known when it runs (:func:`use_triton`)."""
    check_choice("impl", impl, IMPLEMENTATIONS)


def use_triton(impl: str, tensor: Tensor, unsupported: str | None = None) -> bool:
    """Whether a call runs Triton kernels: if asked for, or if ``impl`` is ``auto`` and they can on this CUDA device.

    Args:
        impl: ``auto``, ``triton`` or ``reference``.
        tensor: Any input of the call; its device decides.
        unsupported: What of the call the kernels lack, such as ``activation='softmax'``; None if nothing.

    Raises:
        ValueError: If Triton was asked for and the kernels lack something.
        RuntimeError: If Triton was asked for and cannot run on the tensor's device.
    """
    check_implementation(impl)
    if impl == "reference" or (impl == "auto" and (unsupported is not None or tensor.device.type != "cuda")):
        return False
    if unsupported is not None:
        raise ValueError(
            f"impl ('triton') must be 'auto' or 'reference' with {unsupported}, which the Triton kernels lack; "
            "set impl='auto'"
        )
    reason = why_unavailable(tensor.device)
    if reason is not None and impl == "triton":
        raise RuntimeError(
            f"impl ('triton') must be able to run on {tensor.device}, and cannot: {reason}; set impl='auto' or "
            "impl='reference'"
        )
    return reason is None


def not_in_triton(activation: str, dropout: float, v: Tensor) -> str | None:
    """What of a call the Triton kernels of attention lack, for :func:`use_triton`; None if nothing."""
    if activation == "softmax":
        return "activation='softmax'"
    if dropout > 0.0:
        return f"dropout={dropout}"
    return size_not_in_triton(v)


def size_not_in_triton(v: Tensor) -> str | None:
    """The dtype, or the number of rows ``[rows, s, e]`` or ``[b, h, s, e]``, if the Triton kernels lack it."""
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {v.dtype}"
    rows = v.shape[:-2].numel()
    return f"batch times heads = {rows} (at most {_MOST_ROWS})" if rows > _MOST_ROWS else None


def check_chunk_size(chunk_size: object) -> None:
    """Refuse a chunk size that is no positive integer."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be a positive integer; set chunk_size=256, for example")


def check_attention(*, activation: str, normalizer: str, dropout: float, impl: str) -> None:
    """Refuse unknown choices and values out of range."""
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_implementation(impl)
    if not is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout ({dropout!r}) must lie in [0, 1); set dropout=0.0 to switch it off")


def check_softcap(softcap: float | None, activation: str) -> None:
    """Refuse a bound of the scores that is no positive number, or that the activation has no use for."""
    if softcap is None:
        return
    if not is_number(softcap) or not softcap > 0:
        raise ValueError(f"softcap ({softcap!r}) must be a positive number; set softcap=None for no bound")
    if activation != "softmax":
        raise ValueError(f"softcap ({softcap}) must come with activation='softmax', not {activation!r}; set it to None")


def check_queries_and_keys(tensors: dict[str, Tensor], dims: int) -> None:
    """Refuse queries and keys that differ in shape, dtype or device, by name; the first one sets the rule."""
    (first, reference), *others = tensors.items()
    if reference.dim() != dims or 0 in reference.shape:
        axes = "[batch, sequence, dim]" if dims == 3 else "[batch, heads, sequence, dim]"
        raise ValueError(f"{first} (shape {tuple(reference.shape)}) must be {axes} with no empty axis; reshape it")
    if not reference.is_floating_point():
        raise ValueError(f"{first} (dtype {reference.dtype}) must be floating point; cast it first")
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} (shape {tuple(tensor.shape)}) must have the shape of {first} "
                f"{tuple(reference.shape)}; project both to the same size"
            )
        _check_same_kind(name, tensor, first, reference)


def check_values(name: str, tensor: Tensor, like: str, reference: Tensor) -> None:
    """Refuse values or a gate whose leading axes, dtype or device differ from ``reference``'s."""
    if tensor.dim() != reference.dim() or tensor.shape[:-1] != reference.shape[:-1] or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} (shape {tuple(tensor.shape)}) must be {tuple(reference.shape[:-1])} + (width,) like "
            f"{like}; pass the same tokens"
        )
    _check_same_kind(name, tensor, like, reference)


def check_gate(gate: Tensor | None, v: Tensor) -> None:
    """Refuse a gate that is not of the shape and kind of ``v``."""
    if gate is not None and gate.shape != v.shape:
        raise ValueError(
            f"gate (shape {tuple(gate.shape)}) must have the shape of v {tuple(v.shape)}; project both "
            "to the expanded width"
        )
    if gate is not None:
        _check_same_kind("gate", gate, "v", v)


def check_bias(bias: Tensor | None, length: int, reference: Tensor) -> None:
    """Refuse a bias vector whose length is not 2 * length - 1."""
    if bias is None:
        return
    if bias.shape != (2 * length - 1,):
        raise ValueError(
            f"bias (shape {tuple(bias.shape)}) must be a vector over t - s of length 2 * {length} - 1 = "
            f"{2 * length - 1}; index it by (t - s) + {length - 1}"
        )
    if bias.device != reference.device or not bias.is_floating_point():
        raise ValueError(
            f"bias (dtype {bias.dtype}, device {bias.device}) must be floating point on "
            f"{reference.device}; move it there"
        )


def check_segments(segments: Segments | None, reference: Tensor) -> None:
    """Refuse segments made for other tokens, or a mask in their place."""
    if segments is not None and not isinstance(segments, Segments):
        raise ValueError(
            f"segments (a {type(segments).__name__}) must be Segments; make them with "
            "make_segments(input_pos, padding_mask=...)"
        )
    tokens = (reference.shape[0], reference.shape[-2])
    if segments is not None and tuple(segments.shape) not in (tokens, (1, tokens[1])):
        raise ValueError(
            f"segments (shape {tuple(segments.shape)}) must describe the [batch, sequence] = {tokens} of "
            "the queries; make them with make_segments from the same input_pos"
        )


def check_state(state: LinearState | None, causal: bool, return_state: bool, shape: tuple[int, ...]) -> None:
    """Refuse states of bidirectional attention, and an initial state that does not fit."""
    if not causal and (state is not None or return_state):
        name = "initial_state" if state is not None else "return_state"
        raise ValueError(f"{name} must be left out when causal=False: every token sees all others; set causal=True")
    if state is None:
        return
    if tuple(state.kv.shape) != shape:
        raise ValueError(
            f"initial_state.kv (shape {tuple(state.kv.shape)}) must be {shape}; pass a state of the same "
            "model and batch"
        )
    if tuple(state.count.shape) != shape[:1]:
        raise ValueError(
            f"initial_state.count (shape {tuple(state.count.shape)}) must be {shape[:1]}; pass one count for each row"
        )


def check_key_sum(state: LinearState | None, needed: bool) -> None:
    """Refuse a state of linear attention whose sum of keys is missing where it is needed, or does not fit."""
    if state is None:
        return
    if state.key_sum is None and needed:
        raise ValueError(
            "initial_state.key_sum (None) must be given with normalize=True or return_state=True; pass the state that "
            "linear_attention returned"
        )
    if state.key_sum is not None and state.key_sum.shape != state.kv.shape[:-1]:
        raise ValueError(
            f"initial_state.key_sum (shape {tuple(state.key_sum.shape)}) must be {tuple(state.kv.shape[:-1])}; pass "
            "the state that linear_attention returned"
        )


def in_eager_cpu(tensor: Tensor) -> bool:
    """Whether a hand-written CPU backward may serve: eager float32 or float64, outside function transforms."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _check_same_kind(name: str, tensor: Tensor, like: str, reference: Tensor) -> None:
    if tensor.dtype != reference.dtype or tensor.device != reference.device:
        raise ValueError(
            f"{name} (dtype {tensor.dtype}, device {tensor.device}) must match {like} ({reference.dtype}, "
            f"{reference.device}); cast or move one of them"
        )
