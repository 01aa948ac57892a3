"""quadratic_attention with impl="triton": values and every gradient against the float64 oracle."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from flash_plugin.kernels import quadratic_attention
from tests.kernels.cases import LAYOUTS, make_layout, seed_of
from tests.kernels.test_quadratic import check, inputs_for

OPS = {"triton": partial(quadratic_attention, impl="triton")}
ACTIVATIONS = ("relu2", "laplace", "softplus2")


@pytest.fixture
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile a panel, as at lengths that no test can afford."""
    from flash_plugin.kernels.triton import quadratic

    monkeypatch.setattr(quadratic, "_PANEL_BYTES", 1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both_ways"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_oracle_s_values_and_gradients(layout, causal):
    rng = random.Random(seed_of(layout, causal))
    for activation in ACTIVATIONS:
        s, (z, e) = rng.choice((63, 130, 150)), rng.choice([(16, 48), (40, 16)])
        inputs = inputs_for(2, s, z, e, bias=rng.random() < 0.5, gate=rng.random() < 0.6)
        options = {"silu": rng.random() < 0.5, "scale": rng.choice([None, 0.3])}
        options |= {"activation": activation, "causal": causal, "normalizer": rng.choice(("visible", "paper", "chunk"))}
        check(make_layout(layout, 2, s), inputs, [torch.float32], OPS, **options)


@pytest.mark.usefixtures("small_panels")
@pytest.mark.parametrize("s", [1, 64, 65, 200])
@pytest.mark.parametrize("layout", ["one", "holes"])
def test_panels_add_up(layout, s):
    for causal in (True, False):
        inputs = inputs_for(1, s, 16, 32, bias=True, gate=causal)
        check(make_layout(layout, 1, s), inputs, [torch.float32], OPS, causal=causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("normalizer", ["visible", "paper"])
def test_half_precision_stays_near_the_oracle(normalizer, dtype):
    for causal, layout, bias in ((True, "one", True), (True, "packed", False), (False, "right", True)):
        inputs = inputs_for(1, 300, 32, 80, bias=bias, gate=True, dtype=dtype)
        options = {"causal": causal, "normalizer": normalizer, "silu": causal}
        check(make_layout(layout, 1, 300), inputs, [dtype], OPS, **options)


def test_a_scale_that_is_learned_gets_its_gradient():
    inputs = {name: x.float() for name, x in inputs_for(2, 80, 16, 16, bias=False, gate=True).items()}
    gradients = []
    for impl in ("triton", "reference"):
        scale = torch.tensor(0.375, requires_grad=True)
        quadratic_attention(**inputs, scale=scale, impl=impl).square().sum().backward()
        gradients.append(scale.grad)
    torch.testing.assert_close(*gradients)
