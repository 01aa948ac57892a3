"""Inputs for the op tests: document layouts, random tensors, and one comparison of values and every gradient."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from flash_plugin.kernels import make_segments
from tests.tolerances import assert_close

ACTIVATIONS = ("relu2", "laplace", "softplus2", "softmax")
NORMALIZERS = ("visible", "paper", "chunk")
LAYOUTS = ("one", "packed", "begun", "jumps", "left", "right", "left_pos", "holes")

Layout = dict[str, Tensor | None]
Tensors = dict[str, Tensor]


def seed_of(*parts: object) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(repr(parts).encode())


def packed_positions(s: int, rng: random.Random, longest: int, *, first: int = 0, jumps: bool = False) -> list[int]:
    """Positions of documents of random length; the first begins at `first`, with `jumps` each begins anywhere."""
    positions: list[int] = []
    start = first
    while len(positions) < s:
        positions += range(start, start + rng.randint(1, longest))
        start = rng.randint(0, 40) if jumps else 0
    return positions[:s]


def make_layout(name: str, b: int, s: int) -> Layout:
    """`input_pos` and `padding_mask` [b, s] of a named arrangement of documents and padding."""
    rng = random.Random(seed_of(name, b, s))
    rows, masks = [], []
    for row in range(b):
        pads = 0 if row == 0 else rng.randint(0, max(s - 1, 0) * 2 // 3)
        real = [True] * s
        positions = list(range(s))
        if name in ("left", "left_pos"):
            real = [t >= pads for t in range(s)]
            positions = [max(t - pads, 0) for t in range(s)]
        elif name == "right":
            real = [t < s - pads for t in range(s)]
        elif name in ("packed", "holes"):
            positions = packed_positions(s, rng, max(s // 3, 2))
        elif name == "begun":
            positions = packed_positions(s, rng, max(s // 2, 2), first=rng.randint(1, 50))
        elif name == "jumps":
            positions = packed_positions(s, rng, max(s // 4, 2), jumps=True)
        if name == "holes":
            real = [rng.random() > 0.15 for _ in range(s)]
            real[rng.randrange(s)] = True
        rows.append(positions)
        masks.append(real)
    padded = name in ("left", "right", "left_pos", "holes")
    numbered = name in ("packed", "begun", "jumps", "left_pos", "holes")
    return {
        "input_pos": torch.tensor(rows) if numbered else None,
        "padding_mask": torch.tensor(masks) if padded else None,
    }


def segments_of(layout: Layout) -> Any:
    """The `segments` argument of a layout: None where there is nothing to say."""
    if layout["input_pos"] is None and layout["padding_mask"] is None:
        return None
    return make_segments(layout["input_pos"], padding_mask=layout["padding_mask"])


def real_tokens(layout: Layout, b: int, s: int) -> Tensor:
    """[b, s], True where the output is specified."""
    mask = layout["padding_mask"]
    return torch.ones(b, s, dtype=torch.bool) if mask is None else mask


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Normal tensors whose values `dtype` can hold, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()
        for name, shape in shapes.items()
    }


def leaves(inputs: Tensors, dtype: torch.dtype, keep: Iterable[str] = ()) -> Tensors:
    """Copies that want gradients; those named in `keep` stay at least float32 (states)."""
    wide = dtype if dtype == torch.float64 else torch.float32
    return {name: x.detach().clone().to(wide if name in keep else dtype).requires_grad_() for name, x in inputs.items()}


def values_and_gradients(
    call: Callable[[Tensors], list[Tensor]], inputs: Tensors, dtype: torch.dtype, real: Tensor, keep: Iterable[str] = ()
) -> tuple[list[Tensor], Tensors]:
    """Outputs of `call` and the gradients of a fixed random functional of them; padding tokens carry no weight."""
    mine = leaves(inputs, dtype, keep)
    outputs = call(mine)
    shown, loss = [], torch.zeros((), dtype=torch.float64)
    for number, x in enumerate(outputs):
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        weight = weight.to(torch.bfloat16).double()
        if number == 0:  # the output, [b, s, e] or [b, h, s, e]
            mask = real if x.dim() == 3 else real[:, None]
            assert torch.isfinite(x).all(), "output is not finite (padding included)"
            x, weight = torch.where(mask[..., None], x, 0.0), weight * mask[..., None]
        shown.append(x)
        loss = loss + (x.double() * weight).sum()
    gradients = torch.autograd.grad(loss, list(mine.values()), allow_unused=True)
    return shown, {
        n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(mine.items(), gradients, strict=True)
    }


def compare(
    calls: dict[str, Callable[[Tensors], list[Tensor]]],
    oracle: Callable[[Tensors], list[Tensor]],
    inputs: Tensors,
    real: Tensor,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.float64),
    keep: Iterable[str] = (),
) -> None:
    """Every output and every gradient of every call against the oracle, in every dtype."""
    keep = tuple(keep)
    expected, expected_gradients = values_and_gradients(oracle, inputs, torch.float64, real, keep)
    kinds = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    wrong = []
    for (label, call), dtype in product(calls.items(), dtypes):
        kind = "oracle_" + kinds[dtype]
        grad_kind = kind + "_grad" if dtype.itemsize == 2 else kind
        outputs, gradients = values_and_gradients(call, inputs, dtype, real, keep)
        assert outputs[0].dtype == dtype, f"{label}: {dtype} in, {outputs[0].dtype} out"
        pairs = [(f"output {n}", x, y, kind) for n, (x, y) in enumerate(zip(outputs, expected, strict=True))]
        pairs += [(f"gradient of {n}", x, expected_gradients[n], grad_kind) for n, x in gradients.items()]
        for name, x, y, bound in pairs:
            try:
                assert_close(x, y, bound, f"{label} {dtype} {name}")
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def largest_tensor(function: Callable[[], Any]) -> int:
    """Number of elements of the largest tensor that any operator returns while `function` runs, backward included."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self.seen = max(self.seen, x.untyped_storage().nbytes() // x.element_size())
            return out

    with Largest() as mode:
        function()
    return mode.seen
