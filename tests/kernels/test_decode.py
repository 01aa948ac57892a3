"""The decoding ops against the oracle, in every dtype, with sums that run over many chunks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from flash_plugin.kernels.decode import ChunkMemory, DocumentMemory, mixed_chunk_decode, quadratic_decode, tokens_held
from flash_plugin.kernels.layout import state_dtype
from flash_plugin.kernels.new_tokens import empty_cursor, place_new_tokens
from tests import oracle
from tests.kernels.cases import ACTIVATIONS, Tensors, draw, largest_tensor, packed_positions, seed_of
from tests.tolerances import assert_close

B, S, C, Z, E = 3, 300, 16, 10, 14
KINDS = {torch.float64: "oracle_fp64", torch.float32: "oracle_fp32", torch.bfloat16: "oracle_bf16"}
PIECES = [1, 1, 70, 3, 32, *[1] * 60, 33, 100 - 1, 1]


def positions() -> Tensor:
    """A long document, one begun in its middle, and packed ones."""
    packed = packed_positions(S, random.Random(seed_of("decode")), 90)
    return torch.stack([torch.arange(S), torch.arange(S) + 21, torch.tensor(packed)])


def inputs(names: str, reach: int, dtype: torch.dtype) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {name: (B, S, Z) for name in names.split()}
    shapes |= {"v": (B, S, E), "gate": (B, S, E), "bias": (2 * reach - 1,)}
    return {name: x.to(dtype) for name, x in draw(shapes, seed_of(names), dtype).items()}


def pieces(tensors: list[Tensor]) -> list[tuple[Tensor, ...]]:
    assert sum(PIECES) == S
    return list(zip(*(tensor.split(PIECES, dim=1) for tensor in tensors), strict=True))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("normalizer", ["visible", "chunk"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mixed_chunk_attention_piece_by_piece(activation: str, normalizer: str, dtype: torch.dtype) -> None:
    given, position = inputs("q_local k_local q_global k_global", C, dtype), positions()
    choices = dict(chunk_size=C, activation=activation, normalizer=normalizer)
    expected, state = oracle.mixed_chunk(**given, **choices, input_pos=position, silu=True)
    wide = state_dtype(dtype)
    rings = [torch.zeros(B, C, width, dtype=dtype) for width in (Z, Z, E)]
    memory, cursor = ChunkMemory(*rings, torch.zeros(B, Z, E, dtype=wide)), empty_cursor(B)
    bias = given.pop("bias")
    found = []
    for *qk, v, gate, where in pieces([*given.values(), position]):
        new = place_new_tokens(cursor, where, chunk_sizes=[C], empty=not found)
        out = mixed_chunk_decode(*qk, v, gate, memory, new, bias=bias, dropout=0.0, impl="auto", **choices)
        found.append(out)
        cursor = new.cursor
    assert found[0].dtype == dtype
    assert_close(torch.cat(found, dim=1), expected, KINDS[dtype])
    assert_close(memory.kv, state.kv, KINDS[dtype], "state")
    assert torch.equal(cursor[:, 1] - cursor[:, 0] + 1, state.count)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_quadratic_attention_piece_by_piece(activation: str, dtype: torch.dtype) -> None:
    given, position = inputs("q k", S, dtype), positions()
    expected = oracle.quadratic(**given, activation=activation, input_pos=position, silu=True)
    memory = DocumentMemory(torch.zeros(B, S, Z, dtype=dtype), torch.zeros(B, S, E, dtype=dtype))
    bias, cursor, found = given.pop("bias"), empty_cursor(B), []
    for *qk, v, gate, where in pieces([*given.values(), position]):
        new = place_new_tokens(cursor, where, empty=not found)
        held = tokens_held(memory, new)
        near = bias[S - held : S + held - 1]
        found.append(
            quadratic_decode(*qk, v, gate, memory, new, bias=near, activation=activation, dropout=0.0, impl="auto")
        )
        cursor = new.cursor
    assert_close(torch.cat(found, dim=1), expected, KINDS[dtype])


def test_a_step_costs_the_same_however_many_tokens_are_held() -> None:
    given = inputs("q_local k_local q_global k_global", C, torch.float32)
    rings = [torch.zeros(B, C, width) for width in (Z, Z, E)]
    memory = ChunkMemory(*rings, torch.zeros(B, Z, E))
    one = [tensor[:, :1].clone() for name, tensor in given.items() if name != "bias"]

    def step(position: int) -> None:
        cursor = torch.tensor([[0, position - 1, position]] * B)
        new = place_new_tokens(cursor, torch.tensor([[position]]), chunk_sizes=[C])
        mixed_chunk_decode(
            *one, memory, new, chunk_size=C, bias=given["bias"], activation="relu2",
            normalizer="visible", dropout=0.0, impl="auto",
        )  # fmt: skip

    assert largest_tensor(lambda: step(10)) == largest_tensor(lambda: step(1_000_000)) <= B * max(Z, C) * max(E, C)


def test_under_autocast_tokens_take_its_dtype_and_sums_stay_wide() -> None:
    given, position = inputs("q_local k_local q_global k_global", C, torch.bfloat16), positions()
    choices = dict(chunk_size=C, bias=given.pop("bias"), activation="relu2", normalizer="visible", dropout=0.0)
    found = []
    for autocast in (False, True):
        rings = [torch.zeros(B, C, width, dtype=torch.bfloat16) for width in (Z, Z, E)]
        memory, cursor = ChunkMemory(*rings, torch.zeros(B, Z, E)), empty_cursor(B)
        for start, stop in [(0, 40), (40, 41), (41, 80)]:
            tokens = [x[:, start:stop].float() if autocast else x[:, start:stop] for x in given.values()]
            new = place_new_tokens(cursor, position[:, start:stop], chunk_sizes=[C])
            with torch.autocast("cpu", enabled=autocast):
                found.append(mixed_chunk_decode(*tokens, memory, new, impl="auto", **choices))
            cursor = new.cursor
        assert memory.kv.dtype == torch.float32
    for plain, cast in zip(found[:3], found[3:], strict=True):
        assert torch.equal(plain, cast)
