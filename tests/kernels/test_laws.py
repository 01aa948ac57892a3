"""Laws 1 to 3 of DESIGN section 1 at op level: prefix, packing and padding, for every variant that claims them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels import linear_attention, make_segments, mixed_chunk_attention, quadratic_attention
from tests.kernels.cases import ACTIVATIONS, Tensors, draw
from tests.tolerances import assert_close, error

LENGTHS = (1, 63, 257, 1000)
TOTAL = sum(LENGTHS)
CHUNK = 48  # divides none of the lengths
WIDTHS = {"q_local": 6, "k_local": 6, "q_global": 6, "k_global": 6, "q": 6, "k": 6, "v": 5, "gate": 5}
ARGUMENTS = {
    "quadratic": ("q", "k", "v", "gate"),
    "mixed": ("q_local", "k_local", "q_global", "k_global", "v", "gate"),
    "linear": ("q", "k", "v"),
}

# family, normaliser, scale, causal: what it claims. `paper` divides the global sum by the length of the tensor and
# claims nothing in mixed chunk attention; so does bidirectional `chunk`. Given no scale, `paper` and `chunk` put that
# length inside the square of the quadratic form: only with an explicit scale do they claim anything there.
CLAIMS = {
    ("quadratic", "visible", None, True): {"prefix", "packing", "padding"},
    ("quadratic", "visible", None, False): {"packing", "padding"},
    ("quadratic", "paper", 0.1, True): {"prefix", "packing", "padding"},
    ("quadratic", "chunk", 0.1, True): {"prefix", "packing", "padding"},
    ("mixed", "visible", None, True): {"prefix", "packing", "padding"},
    ("mixed", "visible", None, False): {"packing", "padding"},
    ("mixed", "chunk", None, True): {"prefix", "packing", "padding"},
}
LINEAR_CLAIMS = {True: {"prefix", "packing", "padding"}, False: {"packing", "padding"}}
CASES = [
    pytest.param(family, causal, {"normalizer": normalizer, "scale": scale, "activation": activation}, laws)
    for (family, normalizer, scale, causal), laws in CLAIMS.items()
    for activation in ACTIVATIONS
    # softmax normalises itself: in the quadratic form the three normalisers are one formula at a given scale
    if not (family == "quadratic" and normalizer == "chunk" and activation == "softmax")
] + [
    pytest.param("linear", causal, {"normalize": normalize}, laws)
    for causal, laws in LINEAR_CLAIMS.items()
    for normalize in (True, False)
]


def name_of(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(str(x) for x in value.values() if x is not None)
    return {True: "causal", False: "both_ways"}[value] if isinstance(value, bool) else str(value)


IDS = ["-".join(name_of(x) for x in case.values[:3]) for case in CASES]


def inputs_for(family: str, length: int, dtype: torch.dtype, *, seed: int = 0) -> Tensors:
    """One row of tokens, and the bias over all distances."""
    shapes: dict[str, tuple[int, ...]] = {name: (1, length, WIDTHS[name]) for name in ARGUMENTS[family]}
    if family != "linear":
        shapes["bias"] = (2 * (length if family == "quadratic" else CHUNK) - 1,)
    return {name: x.to(dtype) for name, x in draw(shapes, seed).items()}


def cut(family: str, inputs: Tensors, start: int, stop: int) -> Tensors:
    """The tokens from start to stop and the biases of the distances among them."""
    part = {name: x[:, start:stop] for name, x in inputs.items() if name != "bias"}
    if family == "quadratic":
        middle, reach = inputs["bias"].numel() // 2, stop - start - 1
        part["bias"] = inputs["bias"][middle - reach : middle + reach + 1]
    elif family == "mixed":
        part["bias"] = inputs["bias"]
    return part


def run(family: str, inputs: Tensors, segments: Any, options: dict[str, Any], causal: bool) -> Tensor:
    """The op of a family on [b, s, width] tensors; linear attention with positive features and one head."""
    call = {"segments": segments, "causal": causal, "impl": "reference"} | options
    if family == "linear":
        q, k, v = (x[:, None] for x in inputs.values())
        return linear_attention(q.abs() + 0.1, k.abs() + 0.1, v, **call)[:, 0]
    if family == "quadratic":
        return quadratic_attention(**inputs, **call)
    return mixed_chunk_attention(**inputs, **call, chunk_size=CHUNK)


def check_prefix(family: str, causal: bool, options: dict[str, Any], inputs: Tensors, kind: str) -> None:
    """Law 1: what a token gives does not change when tokens are appended."""
    whole = run(family, inputs, None, options, causal)
    for n in LENGTHS:
        alone = run(family, cut(family, inputs, 0, n), None, options, causal)
        assert_close(whole[:, :n], alone, kind, f"first {n} tokens of {TOTAL}")


def check_packing(family: str, causal: bool, options: dict[str, Any], inputs: Tensors, kind: str) -> None:
    """Law 2: a document in a pack gives what it gives alone."""
    order = (63, 1, 257, 1000)
    pos = torch.cat([torch.arange(n) for n in order])[None]
    packed = run(family, inputs, make_segments(pos), options, causal)
    start = 0
    for n in order:
        alone = run(family, cut(family, inputs, start, start + n), None, options, causal)
        assert_close(packed[:, start : start + n], alone, kind, f"document of {n} tokens at {start}")
        start += n


def check_padding(family: str, causal: bool, options: dict[str, Any], inputs: Tensors, kind: str) -> None:
    """Law 3: padding on the left, on the right or on both sides changes nothing at real tokens."""
    sides = torch.tensor([29, 0, 11])
    for n in LENGTHS:
        long = cut(family, inputs, 0, n + 29)
        rows = {x: t if x == "bias" else torch.stack([t[0].roll(int(r), 0) for r in sides]) for x, t in long.items()}
        index = torch.arange(n + 29)[None]
        real = (index >= sides[:, None]) & (index < sides[:, None] + n)
        pos = (index - sides[:, None]).clamp(min=0)
        alone = run(family, cut(family, inputs, 0, n), None, options, causal)[0]
        for segments in (make_segments(padding_mask=real), make_segments(pos, padding_mask=real)):
            padded = run(family, rows, segments, options, causal)
            for row, side in enumerate(sides.tolist()):
                assert_close(padded[row, side : side + n], alone, kind, f"{n} tokens behind {side} of padding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("family", "causal", "options", "laws"), CASES, ids=IDS)
def test_claimed_laws_hold(family, causal, options, laws, dtype):
    inputs, kind = inputs_for(family, TOTAL, dtype), "law_fp32" if dtype == torch.float32 else "law_fp64"
    if "prefix" in laws:
        check_prefix(family, causal, options, inputs, kind)
    check_packing(family, causal, options, inputs, kind)
    check_padding(family, causal, options, inputs, kind)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_paper_does_not_keep_the_prefix_law_in_mixed_chunks_and_visible_does(activation):
    inputs = inputs_for("mixed", 257, torch.float64)
    for normalizer, keeps in (("paper", False), ("visible", True)):
        options = {"normalizer": normalizer, "activation": activation}
        whole = run("mixed", inputs, None, options, True)[:, :130]
        alone = run("mixed", cut("mixed", inputs, 0, 130), None, options, True)
        assert (error(whole, alone, worst=True) < 1e-10) == keeps


def test_paper_does_not_keep_the_prefix_law_in_the_quadratic_form_at_its_own_scale():
    inputs = inputs_for("quadratic", 257, torch.float64)
    whole = run("quadratic", inputs, None, {"normalizer": "paper"}, True)[:, :130]
    alone = run("quadratic", cut("quadratic", inputs, 0, 130), None, {"normalizer": "paper"}, True)
    assert error(whole, alone, worst=True) > 1e-3


@pytest.mark.parametrize("family", ["quadratic", "mixed", "linear"])
def test_what_stands_in_padding_and_in_other_documents_does_not_reach_a_document(family):
    inputs, other = inputs_for(family, 90, torch.float64), inputs_for(family, 90, torch.float64, seed=1)
    pos = torch.cat([torch.arange(37), torch.arange(53)])[None]
    real = torch.ones(1, 90, dtype=torch.bool)
    real[:, 70:] = False
    segments, mine = make_segments(pos, padding_mask=real), slice(37, 70)
    mixed = {name: x.clone() for name, x in other.items()}
    for name, x in inputs.items():
        mixed[name] = (
            x if name == "bias" else torch.cat([1e3 * other[name][:, :37], x[:, mine], 1e3 * other[name][:, 70:]], 1)
        )
    for causal in (True, False):
        clean = run(family, inputs, segments, {}, causal)[:, mine]
        assert_close(run(family, mixed, segments, {}, causal)[:, mine], clean, "law_fp64")
