"""The gated attention unit between two sequences: its formula, its laws, its cache, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchtune.modules import RMSNorm, TanhGate, TransformerCrossAttentionLayer

import flash_plugin
from flash_plugin import CrossGatedAttentionUnit, FlashCrossAttentionLayer
from tests import oracle
from tests.kernels.cases import ACTIVATIONS
from tests.tolerances import assert_close

D, E, Z, DE = 12, 20, 8, 10
B, T, S = 3, 7, 9
FORMS: list[dict[str, Any]] = [dict(form="quadratic", activation=name) for name in ACTIVATIONS] + [dict(form="linear")]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.get("activation", "linear"))


def unit(dtype: torch.dtype = torch.float32, **arguments: Any) -> CrossGatedAttentionUnit:
    """A unit whose weights reach every part, with scores where every activation is neither flat nor 0."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=D, expanded_dim=E, qk_dim=Z, encoder_dim=DE, proj_bias=True)
    built = CrossGatedAttentionUnit(**{**sizes, **arguments})
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "offset_scale" in name or name.endswith("bias"):
                parameter.normal_(0.5 if name.endswith("beta") else 0.0, std=0.5)
    return built.to(dtype)


def sequences(dtype: torch.dtype = torch.float32, b: int = B, t: int = T, s: int = S) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(b, t, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(b, s, DE, generator=generator, dtype=torch.float64).to(dtype)


def padding(b: int = B, s: int = S) -> Tensor:
    """Real encoder tokens ``[b, s]``: all, all but some on both sides, none."""
    real = torch.ones(b, s, dtype=torch.bool)
    real[1, :2] = real[1, -3:] = False
    real[2] = False
    return real


def formula(built: CrossGatedAttentionUnit, x: Tensor, y: Tensor, sees: Tensor) -> Tensor:
    """The unit from its parameters alone."""
    p = dict(built.named_parameters())

    def project(name: str, z: Tensor) -> Tensor:
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    qk = []
    for name, z in (("q", x), ("k", y)):
        scale = f"{name}_offset_scale."
        qk += oracle.offset_scale(project(f"{name}_proj", z), p[scale + "gamma"], p[scale + "beta"], silu=True)
    values, gate = project("v_proj", y), project("gate_proj", x)
    mixed = oracle.cross(*qk, values, gate=gate, sees=sees, activation=built.activation)
    return torch.where(sees.any(dim=-1, keepdim=True), project("output_proj", mixed), 0.0)


def masks(built: CrossGatedAttentionUnit) -> dict[str, Tensor | None]:
    rows = torch.arange(T) % 3 > 0
    pairs = torch.rand(B, T, S, generator=torch.Generator().manual_seed(1)) > 0.5
    found = {"none": None, "padding": padding(), "row": padding()[:, None], "rows": padding()[:, None] & rows[:, None]}
    return found if built.linear else {**found, "pairs": pairs}


def gradients(built: CrossGatedAttentionUnit, child: str) -> Tensor:
    return torch.cat([p.grad.flatten() for p in built.get_submodule(child).parameters()])


@forms
def test_the_formula_and_every_gradient(form: dict[str, Any]) -> None:
    for dtype, kind in ((torch.float64, "law_fp64"), (torch.float32, "law_fp32")):
        built, wide = unit(dtype, **form), unit(torch.float64, **form)
        for name, mask in masks(built).items():
            if mask is None:
                sees = torch.ones(B, T, S, dtype=torch.bool)
            else:
                sees = (mask[:, None] if mask.dim() == 2 else mask).expand(B, T, S)
            given = [z.requires_grad_() for z in sequences(dtype)]
            exact = [z.detach().double().requires_grad_() for z in given]
            found, expected = built(*given, mask=mask), formula(wide, *exact, sees)
            assert_close(found, expected, kind, name)
            weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            (found.double() * weight).sum().backward()
            (expected * weight).sum().backward()
            pairs = [(ours.grad, theirs.grad) for ours, theirs in zip(given, exact, strict=True)]
            # By module: that softmax takes nothing from the keys' offset, which all share, is 0 but for rounding.
            pairs += [(gradients(built, child), gradients(wide, child)) for child, _ in built.named_children()]
            for mine, other in pairs:
                assert_close(mine, other, kind, f"gradient with {name}")
            built.zero_grad(), wide.zero_grad()


@forms
def test_gradcheck(form: dict[str, Any]) -> None:
    built, mask = unit(torch.float64, **form), padding(s=4)
    x, y = (z.requires_grad_() for z in sequences(torch.float64, t=2, s=4))
    assert torch.autograd.gradcheck(lambda x, y: built(x, y, mask=mask), (x, y))


@torch.no_grad()
@forms
def test_padding_says_nothing_on_either_side(form: dict[str, Any]) -> None:
    built = unit(**form)
    x, y = sequences()
    alone = built(x, y)
    for sides in ((4, 0), (0, 5), (2, 3)):
        padded = pad(y, (0, 0, *sides), value=7.0)
        real = pad(torch.ones(B, S, dtype=torch.bool), sides)
        for mask in (real, real[:, None], real[:, None].expand(B, T, -1), real[:1, None]):
            assert_close(built(x, padded, mask=mask), alone, "law_fp32")


@torch.no_grad()
@forms
def test_a_batch_of_mixed_lengths_is_each_alone(form: dict[str, Any]) -> None:
    built, lengths = unit(**form), [S, 1, 4]
    x, y = sequences()
    together = built(x, y, mask=torch.arange(S) < torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        assert_close(together[row], built(x[row : row + 1], y[row : row + 1, :length])[0], "law_fp32")


@forms
def test_a_token_that_sees_nothing_gets_zero_and_finite_gradients(form: dict[str, Any]) -> None:
    built, (x, y) = unit(**form), sequences()
    mask = padding()[:, None].repeat(1, T, 1)
    mask[:, 0] = False
    out = built(x.requires_grad_(), y.requires_grad_(), mask=mask)
    assert (out[:, 0] == 0).all() and (out[2] == 0).all() and (out[:2, 1:] != 0).any(dim=-1).all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, y, *built.parameters()))
    assert (y.grad[~padding()] == 0).all()
    both = FlashCrossAttentionLayer(built, ca_norm=RMSNorm(D))(x, encoder_input=y, encoder_mask=mask)
    assert torch.equal(both[:, 0], x[:, 0]) and torch.equal(both[2], x[2])


@torch.no_grad()
@forms
def test_decoding_with_the_encoder_cached_is_the_full_forward(form: dict[str, Any]) -> None:
    built = unit(**form)
    x, y = sequences()
    projected: list[int] = []
    built.k_proj.register_forward_hook(lambda _module, _args, out: projected.append(out.shape[1]))
    for room in (S, S + 4):
        real = padding()
        expected = built(x, y, mask=real)
        built.setup_cache(B, torch.float32, room)
        for mask in (real[:, None].expand(B, T, S), pad(real, (0, room - S))[:, None].expand(B, T, room)):
            for rest in (True, False):
                built.reset_cache()
                projected.clear()
                parts = [built(x[:, :3], y, mask=mask[:, :3])]
                # What the cache holds it knows to be padding.
                parts += [built(x[:, t : t + 1], mask=mask[:, t : t + 1] if rest else None) for t in range(3, T)]
                assert_close(torch.cat(parts, dim=1), expected, "law_fp32")
                assert projected == [S]
        built.cache_enabled = False
        assert_close(built(x, y), unit(**form)(x, y), "law_fp32")


@torch.no_grad()
@forms
def test_a_second_encoder_input_goes_behind_the_first(form: dict[str, Any]) -> None:
    built = unit(**form)
    (x, y), real = sequences(), padding()
    built.setup_cache(B, torch.float32, S + 2)
    first = built(x[:, :2], y[:, :5], mask=real[:, :5])
    both = built(x[:, 2:4], y[:, 5:], mask=real)
    later = built(x[:, 4:])
    built.cache_enabled = False
    assert_close(first, built(x[:, :2], y[:, :5], mask=real[:, :5]), "law_fp32")
    assert_close(torch.cat([both, later], dim=1), built(x[:, 2:], y, mask=real), "law_fp32")


def test_the_cache_of_the_linear_form_does_not_grow_with_the_encoder() -> None:
    def held(**form: Any) -> list[int]:
        built = unit(**form)
        found = []
        for room in (16, 1024):
            built.setup_cache(1, torch.bfloat16, room)
            found.append(sum(buffer.numel() for buffer in built.kv_cache.buffers() if buffer.dtype != torch.bool))
        return found

    assert held(form="linear") == [Z * E, Z * E]
    assert held(form="quadratic") == [16 * (Z + E), 1024 * (Z + E)]
    built = unit(form="linear")
    built.setup_cache(1, torch.bfloat16, 4)
    assert built.kv_cache.kv.dtype == torch.float32
    assert not [name for name in built.state_dict() if "cache" in name]


@torch.no_grad()
def test_the_layer_stands_where_torchtunes_does() -> None:
    (x, y), built = sequences(), unit(form="linear")
    layer = FlashCrossAttentionLayer(built, ca_norm=RMSNorm(D), ca_scale=TanhGate())
    assert isinstance(layer, TransformerCrossAttentionLayer)
    assert torch.equal(layer(x), x) and torch.equal(layer(x, encoder_mask=torch.ones(B, T, S, dtype=torch.bool)), x)
    assert torch.equal(layer(x, encoder_input=y), x)  # the gate starts closed
    layer.ca_scale.scale.fill_(0.3)
    opened = x + built(layer.ca_norm(x), y) * torch.tensor(0.3).tanh()
    assert_close(layer(x, encoder_input=y, mask="unread", input_pos=torch.arange(T)), opened, "law_fp32")
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S, decoder_max_seq_len=4)
    assert layer.caches_are_setup() and layer.caches_are_enabled()
    assert torch.equal(layer(x), x)  # nothing is held yet
    layer(x, encoder_input=y)
    assert not torch.equal(layer(x), x)
    layer.reset_cache()
    assert torch.equal(layer(x), x)


@torch.no_grad()
@forms
def test_the_encoder_may_compute_in_another_dtype(form: dict[str, Any]) -> None:
    (x, y), built = sequences(torch.bfloat16), unit(torch.bfloat16, **form)
    expected = built(x, y, mask=padding())
    assert expected.dtype == torch.bfloat16
    assert torch.equal(built(x, y.float(), mask=padding()), expected)
    built.setup_cache(B, torch.bfloat16, S)
    assert torch.equal(built(x, y.float(), mask=padding()), expected)
    assert_close(built(x), expected, "oracle_bf16")


@forms
def test_it_compiles_whole_and_runs_on_meta(form: dict[str, Any]) -> None:
    (x, y), built = sequences(), unit(**form)
    mask = padding()[:, None].expand(B, T, S)
    compiled = torch.compile(built, backend="eager", fullgraph=True)
    assert_close(compiled(x, y, mask=mask), built(x, y, mask=mask), "law_fp32")
    with torch.device("meta"):
        assert unit(**form)(x.to("meta"), y.to("meta"), mask=mask.to("meta")).shape == x.shape


def test_initial_weights() -> None:
    with torch.device("meta"):
        model = nn.ModuleList([FlashCrossAttentionLayer(unit(), ca_norm=RMSNorm(D), ca_scale=TanhGate())] * 2)
    model = model.to_empty(device="cpu")
    flash_plugin.initialize_weights(model, seed=1)
    layer = model[0]
    assert layer.ca_scale.scale.item() == 0.0 and (layer.ca_norm.scale == 1).all()
    assert (layer.attn.q_offset_scale.beta == 0).all() and 0 < layer.attn.k_offset_scale.gamma.std() < 0.05
    assert (layer.attn.output_proj.bias == 0).all() and 0.7 < layer.attn.output_proj.weight.std() * E**0.5 < 1.3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(form="mixed_chunk"), ["form ('mixed_chunk')", "no counterpart", "form='linear'"]),
        (dict(form="linear", activation="relu2"), ["activation ('relu2') must be None", "form='quadratic'"]),
        (dict(form="linear", dropout=0.1), ["dropout (0.1) must be 0.0"]),
        (dict(activation="gelu"), ["activation ('gelu')", "laplace"]),
        (dict(dropout=1.0), ["dropout (1.0)"]),
        (dict(qk_dim=0), ["qk_dim (0) must be a positive integer"]),
        (dict(encoder_dim=2.5), ["encoder_dim (2.5)"]),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        unit(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


PAIRS = torch.eye(T, S, dtype=torch.bool).expand(B, T, S)


@pytest.mark.parametrize("form", ["quadratic", "linear"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(y=None), ["y (None) must be given"]),
        (dict(x=torch.zeros(B, T, D + 1)), [f"x (shape ({B}, {T}, {D + 1}))"]),
        (dict(y=torch.zeros(B, S, D)), [f"encoder_input (shape ({B}, {S}, {D}))", f"encoder_dim={D}"]),
        (dict(y=torch.zeros(B, 0, DE)), ["s > 0"]),
        (dict(y=torch.zeros(B + 1, S, DE)), [f"[{B}, s, {DE}]"]),
        (dict(mask=torch.ones(B, T, S)), ["encoder_mask (dtype torch.float32) must be a bool tensor"]),
        (dict(mask="causal"), ["encoder_mask (str)"]),
        (dict(mask=PAIRS[..., :-1]), [f"encoder_mask (shape ({B}, {T}, {S - 1}))", f"{(B, T, S)}"]),
        (dict(mask=PAIRS[:, :-1]), [f"encoder_mask (shape ({B}, {T - 1}, {S}))"]),
    ],
)
def test_bad_inputs_get_a_sentence(form: str, given: dict[str, Any], words: list[str]) -> None:
    x, y = sequences()
    given = dict(x=x, y=y) | given
    with pytest.raises(ValueError) as caught:
        unit(form=form)(**given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@torch.no_grad()
def test_what_a_sum_cannot_honour_is_refused() -> None:
    (x, y), built = sequences(), unit(form="linear")
    with pytest.raises(ValueError, match=r"form='linear'.* build the unit with form='quadratic' \(wrong at row 0"):
        built(x, y, mask=PAIRS)
    with pytest.raises(RuntimeError, match="form='linear'"):
        torch.compile(built, backend="eager")(x, y, mask=PAIRS)
    built.setup_cache(B, torch.float32, S)
    built(x, y, mask=padding())
    with pytest.raises(ValueError, match=r"row 1, token 0, encoder token 0"):
        built(x[:, :1], mask=torch.ones(B, 1, S, dtype=torch.bool))


@torch.no_grad()
@pytest.mark.parametrize("form", ["quadratic", "linear"])
def test_a_cache_that_does_not_fit_is_refused(form: str) -> None:
    (x, y), built = sequences(), unit(form=form)
    with pytest.raises(RuntimeError, match="must be set up before"):
        built.reset_cache()
    with pytest.raises(ValueError, match=r"encoder_max_seq_len \(0\)"):
        built.setup_cache(B, torch.float32, 0)
    with pytest.raises(ValueError, match=r"dtype \(torch.int64\)"):
        built.setup_cache(B, torch.int64, S)
    built.setup_cache(B, torch.float32, S + 1)
    with pytest.raises(ValueError, match=r"x \(batch size 2\) must have the batch size of the cache \(3\)"):
        built(x[:2], y[:2])
    with pytest.raises(ValueError, match=f"must be False behind the {S} encoder tokens"):
        built(x, y, mask=torch.ones(B, T, S + 1, dtype=torch.bool))
    built(x, y)
    with pytest.raises(ValueError, match=rf"{S} tokens behind {S} held.*encoder_max_seq_len {S + 1}"):
        built(x, y)
