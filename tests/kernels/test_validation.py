"""Refusals of the ops name the argument, the value it got, the rule and the remedy (DESIGN section 5)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from flash_plugin.kernels import (
    LinearState,
    linear_attention,
    make_segments,
    mixed_chunk_attention,
    quadratic_attention,
)

B, S, Z, E, C, H = 2, 12, 4, 6, 5, 3


def quadratic(**changes: Any) -> Any:
    """A valid call but for `changes`."""
    arguments: dict[str, Any] = {"q": torch.randn(B, S, Z), "k": torch.randn(B, S, Z), "v": torch.randn(B, S, E)}
    return quadratic_attention(**(arguments | changes))


def mixed(**changes: Any) -> Any:
    """A valid call but for `changes`."""
    arguments: dict[str, Any] = {n: torch.randn(B, S, Z) for n in ("q_local", "k_local", "q_global", "k_global")}
    return mixed_chunk_attention(**(arguments | {"v": torch.randn(B, S, E), "chunk_size": C} | changes))


def linear(**changes: Any) -> Any:
    """A valid call but for `changes`."""
    arguments: dict[str, Any] = {n: torch.randn(B, H, S, Z) for n in ("q", "k")} | {"v": torch.randn(B, H, S, E)}
    return linear_attention(**(arguments | changes))


def refused(call: Any, *words: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    """The call is refused and its sentence holds every word, case aside."""
    with pytest.raises(error) as caught:
        call(**changes)
    sentence = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {sentence}"
    missing = [word for word in words if word.lower() not in sentence.lower()]
    assert not missing, f"{missing} not in: {sentence}"
    assert re.search(r";|\b(set|pass|use|give|cast|call|make|convert|choose)\b", sentence), f"no remedy in: {sentence}"


def state(z: int = Z, e: int = E, b: int = B, n: int = B) -> LinearState:
    return LinearState(torch.zeros(b, z, e), torch.zeros(n, dtype=torch.int64), None)


def linear_state(z: int = Z, e: int = E, keys: int | None = Z) -> LinearState:
    key_sum = None if keys is None else torch.zeros(B, H, keys)
    return LinearState(torch.zeros(B, H, z, e), torch.zeros(B, dtype=torch.int64), key_sum)


def test_valid_calls_are_not_refused():
    assert quadratic().shape == mixed().shape == (B, S, E)
    assert mixed(chunk_size=10 * S, initial_state=state()).shape == (B, S, E)
    assert linear(initial_state=linear_state()).shape == (B, H, S, E)


@pytest.mark.parametrize("call", [quadratic, mixed])
def test_unknown_choices_list_the_valid_ones(call):
    refused(call, "activation", "gelu", "relu2", "laplace", "softplus2", "softmax", activation="gelu")
    refused(call, "normalizer", "batch", "visible", "paper", "chunk", normalizer="batch")


@pytest.mark.parametrize("call", [quadratic, mixed, linear])
def test_unknown_implementation_lists_the_valid_ones(call):
    refused(call, "impl", "cuda", "auto", "triton", "reference", impl="cuda")
    refused(call, "impl", "None", "auto", impl=None)


@pytest.mark.parametrize("call", [quadratic, mixed, linear])
def test_triton_that_cannot_run_says_so_and_does_not_fall_back(call, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(call, "triton", "cpu", "TRITON_INTERPRET", error=RuntimeError, impl="triton")


@pytest.mark.parametrize("value", [0, -256, 2.5, 16.0, "16", None, True], ids=repr)
def test_chunk_size_must_be_a_positive_integer(value):
    refused(mixed, "chunk_size", str(value), "positive", chunk_size=value)


@pytest.mark.parametrize("value", [0, -1.0, "50", True], ids=repr)
def test_softcap_must_be_a_positive_number(value):
    refused(mixed, "softcap", str(value), "positive", softcap=value, activation="softmax")


def test_softcap_bounds_softmax_alone():
    refused(mixed, "softcap (50.0)", "relu2", softcap=50.0)


@pytest.mark.parametrize("length", [2 * S, 2 * S - 2, S, 1])
def test_bias_of_the_wrong_length_names_the_right_one(length):
    refused(quadratic, "bias", str(length), str(2 * S - 1), bias=torch.zeros(length))
    refused(mixed, "bias", str(length), str(2 * C - 1), bias=torch.zeros(length))


def test_a_bias_matrix_is_refused():
    refused(quadratic, "bias", str(2 * S - 1), bias=torch.zeros(S, S))
    refused(mixed, "bias", str(2 * C - 1), bias=torch.zeros(C, C))


@pytest.mark.parametrize("shape", [(B, S, Z + 1), (B, S + 1, Z), (B + 1, S, Z), (S, Z), (1, S, Z)], ids=str)
def test_keys_must_have_the_queries_shape(shape):
    refused(quadratic, "k", str(shape), str((B, S, Z)), k=torch.randn(shape))
    refused(mixed, "k_local", str(shape), k_local=torch.randn(shape))
    refused(mixed, "k_global", str(shape), k_global=torch.randn(shape))
    refused(mixed, "q_global", str(shape), q_global=torch.randn(shape))


@pytest.mark.parametrize("shape", [(B, S + 1, E), (B + 1, S, E), (S, E), (B, S, E, 1)], ids=str)
def test_values_must_cover_the_same_tokens(shape):
    refused(quadratic, "v", str(shape), v=torch.randn(shape))
    refused(mixed, "v", str(shape), v=torch.randn(shape))


@pytest.mark.parametrize("shape", [(B, S, E + 1), (B, S, 1), (B, S + 1, E), (E,)], ids=str)
def test_gate_must_have_the_values_shape(shape):
    refused(quadratic, "gate", str(shape), str((B, S, E)), gate=torch.randn(shape))
    refused(mixed, "gate", str(shape), str((B, S, E)), gate=torch.randn(shape))


def test_linear_attention_checks_its_shapes():
    refused(linear, "q", str((B, S, Z)), q=torch.randn(B, S, Z), k=torch.randn(B, S, Z), v=torch.randn(B, S, E))
    refused(linear, "k", str((B, H, S, Z + 1)), k=torch.randn(B, H, S, Z + 1))


@pytest.mark.parametrize("value", ["1e-6", torch.tensor(0.5, requires_grad=True), None])
@pytest.mark.parametrize("name", ["scale", "eps"])
def test_linear_attention_takes_plain_numbers(name, value):
    refused(linear, name, str(value), "number", **{name: value})
    refused(linear, "v", str((B, H, S + 1, E)), v=torch.randn(B, H, S + 1, E))
    refused(linear, "k", str((B, 1, S, Z)), k=torch.randn(B, 1, S, Z))


@pytest.mark.parametrize("name", ["k", "v", "gate"])
def test_dtypes_must_agree(name):
    width = Z if name == "k" else E
    wrong = torch.randn(B, S, width, dtype=torch.float64)
    refused(quadratic, name, "float64", "float32", **{name: wrong})
    refused(mixed, name, "float64", "float32", **{{"k": "k_global"}.get(name, name): wrong})
    if name != "gate":
        refused(linear, name, "float64", "float32", **{name: torch.randn(B, H, S, width, dtype=torch.float64)})


def test_integers_are_refused():
    refused(quadratic, "int64", **{n: torch.ones(B, S, 3, dtype=torch.int64) for n in "qkv"})
    refused(linear, "int64", **{n: torch.ones(B, H, S, 3, dtype=torch.int64) for n in "qkv"})
    refused(quadratic, "bias", "int64", bias=torch.zeros(2 * S - 1, dtype=torch.int64))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")], ids=str)
def test_dropout_must_be_below_one(value):
    for call in (quadratic, mixed):
        refused(call, "dropout", str(value), "0", "1", dropout=value)


def test_states_belong_to_causal_attention():
    refused(mixed, "initial_state", "causal", causal=False, initial_state=state())
    refused(mixed, "return_state", "causal", causal=False, return_state=True)
    refused(linear, "initial_state", "causal", causal=False, initial_state=linear_state())
    refused(linear, "return_state", "causal", causal=False, return_state=True)


@pytest.mark.parametrize("wrong", [{"z": Z + 1}, {"e": E + 1}, {"b": B + 1}, {"b": 1}], ids=str)
def test_initial_state_must_fit(wrong):
    refused(mixed, "initial_state", str((B, Z, E)), initial_state=state(**wrong))


def test_initial_state_s_count_must_fit():
    refused(mixed, "initial_state", "count", str(B), initial_state=state(n=B + 1))


def test_initial_state_of_linear_attention_must_fit():
    refused(linear, "initial_state", str((B, H, Z, E)), initial_state=linear_state(z=Z + 1))
    refused(linear, "initial_state", str((B, H, Z, E)), initial_state=state())
    refused(linear, "initial_state", "key_sum", initial_state=linear_state(keys=Z + 1), normalize=True)
    refused(linear, "initial_state", "key_sum", "normalize", initial_state=linear_state(keys=None), normalize=True)


@pytest.mark.parametrize("shape", [(B, S + 1), (B, S - 1), (B + 1, S)], ids=str)
def test_segments_of_other_tokens_are_refused(shape):
    segments = make_segments(torch.arange(shape[1]).expand(shape))
    for call in (quadratic, mixed, linear):
        refused(call, "segments", str(shape), str((B, S)), segments=segments)


def test_something_else_than_segments_is_refused_by_name():
    for call in (quadratic, mixed, linear):
        refused(call, "segments", "make_segments", segments=torch.zeros(B, S))


def test_make_segments_checks_its_arguments():
    refused(make_segments, "input_pos", "padding_mask")
    refused(make_segments, "input_pos", str((S,)), input_pos=torch.arange(S))
    refused(make_segments, "input_pos", "float32", "integer", input_pos=torch.zeros(B, S))
    refused(make_segments, "padding_mask", "int64", "bool", padding_mask=torch.ones(B, S, dtype=torch.int64))
    pos, mask = torch.zeros(B, S, dtype=torch.int64), torch.ones(B, S + 1, dtype=torch.bool)
    refused(make_segments, "padding_mask", "input_pos", str((B, S)), str((B, S + 1)), input_pos=pos, padding_mask=mask)


def test_misspelt_arguments_are_not_swallowed():
    for call in (quadratic, mixed, linear):
        with pytest.raises(TypeError, match="causl"):
            call(causl=True)
