"""The optimizer decays what should decay, and bfloat16 weights move."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import flash_plugin
from flash_plugin.components import optimizers
from flash_plugin.components.optimizers import _round_at_random, adamw

DECAYING = {"tok_embeddings", "output", "gate_proj", "v_proj", "qk_proj", "output_proj"}


def model(**choices: object) -> nn.Module:
    sizes = dict(vocab_size=32, num_layers=1, embed_dim=16, max_seq_len=64, qk_dim=8, chunk_size=16)
    return flash_plugin.flash(**{**sizes, **choices})


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "scalenorm"])
@pytest.mark.parametrize("position_bias", ["none", "rope", "toeplitz", "t5"])
def test_projections_and_embeddings_decay_and_nothing_else(norm: str, position_bias: str) -> None:
    built = model(norm=norm, position_bias=position_bias, proj_bias=True, absolute_position=True)
    optimizer = adamw(built.parameters(), weight_decay=0.25)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        module, kind = name.split(".")[-2:]
        assert decay == (0.25 if module in DECAYING and kind == "weight" else 0.0), name


def test_without_decay_it_is_torchs(seed: int = 0) -> None:
    results = []
    for build in (lambda p: adamw(p, lr=0.1, weight_decay=0.0), lambda p: torch.optim.AdamW(p, 0.1, (0.9, 0.95))):
        torch.manual_seed(seed)
        built = model()
        optimizer = build(built.parameters())
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        for _ in range(3):
            built(torch.arange(32)[None]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(dict(built.state_dict()))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (8,)])
def test_a_parameter_alone_has_one_group(shape: tuple[int, ...]) -> None:
    assert len(adamw([nn.Parameter(torch.ones(shape))]).param_groups) == 1


def test_stochastic_rounding_keeps_the_mean_of_small_updates() -> None:
    size, steps, lr = 4096, 20, 1e-4  # half an ulp of 1 in bfloat16 is 2e-3 below it
    moved = {}
    for stochastic in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(size, 8, dtype=torch.bfloat16))
        optimizer = adamw([weight], lr=lr, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = float((1 - weight.detach().double()).mean())
    assert moved[False] == 0
    # Of 32,768 weights each moves 2^-8 with probability 0.4 in the end: the mean is known to 1 %.
    assert moved[True] == pytest.approx(steps * lr, rel=0.05)


def test_stochastic_rounding_is_torchs_update_but_for_rounding() -> None:
    results = []
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, True)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(64, 64).bfloat16().to(dtype))
        optimizer = adamw([weight, nn.Parameter(torch.ones(8, dtype=dtype))], lr=0.05, stochastic_rounding=stochastic)
        for _ in range(5):
            weight.grad = torch.randn(64, 64).bfloat16().to(dtype)
            optimizer.step()
        results.append(weight.detach().float())
    assert (results[0] - results[1]).abs().max() < 5 * 2**-7 * results[0].abs().max()
    assert ((results[0] - results[1]).mean()).abs() < 1e-3


def test_moments_keep_their_mean_too() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = adamw([weight], lr=1e-4, betas=[0.9, 0.999], stochastic_rounding=True)
    for _ in range(1500):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # To the nearest, the second moment would stop at a quarter of what it tends to.
    assert optimizer.state[weight]["exp_avg_sq"].float().mean() == pytest.approx(1 - 0.999**1500, rel=0.01)


def test_rounding_keeps_what_is_not_finite() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800000, -0x800000], dtype=torch.int32)
    rounded = _round_at_random(bits.view(torch.float32), torch.Generator().manual_seed(0)).float()
    assert rounded[:2].isnan().all()
    assert rounded[2:].tolist() == [float("inf"), float("-inf")]


def trained(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 2) -> Tensor:
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().clone()


def rounding() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8).bfloat16())
    return weight, adamw([weight], lr=1e-3, stochastic_rounding=True)


def test_a_step_rounds_alike_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        monkeypatch.setattr(optimizers, "_NUMBERS", itertools.count())  # as in a new process
        weights.append(trained(*rounding()))
    assert torch.equal(*weights)


def test_a_resumed_optimizer_rounds_as_the_one_it_goes_on_for() -> None:
    weight, optimizer = rounding()
    trained(weight, optimizer)
    later, resumed = rounding()
    with torch.no_grad():
        later.copy_(weight)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(trained(weight, optimizer), trained(later, resumed))


def test_an_optimizer_for_each_parameter_rounds_each_in_its_own_way() -> None:
    """As optimizer_in_bwd builds them."""
    assert len({tuple(trained(*rounding()).flatten().tolist()) for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("arguments", "dtype", "words"),
    [
        ({"stochastic_rounding": True}, torch.float32, ["stochastic_rounding (True)", "torch.float32", "dtype=bf16"]),
        ({"stochastic_rounding": True, "fused": True}, torch.bfloat16, ["fused (True)", "optimizer.fused=False"]),
        ({"weight_decy": 0.1}, torch.float32, ["weight_decy", "did you mean weight_decay?"]),
        ({"betas": [0.9]}, torch.float32, ["betas ([0.9])", "two"]),
    ],
)
def test_bad_input_gets_a_sentence(arguments: dict[str, object], dtype: torch.dtype, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        adamw([nn.Parameter(torch.ones(8, 8, dtype=dtype))], **arguments)
    for word in words:
        assert word in str(error.value)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="unfreeze"):
        adamw([])
