"""Law 4 (DESIGN section 1): decoding with the cache equals the full forward, however the tokens are cut."""

import itertools
import random

import pytest
import torch
from torchtune.modules import TransformerDecoder, disable_kv_cache

import flash_plugin
from tests.components.decoding import CHUNK, VOCABULARY, feed, model
from tests.tolerances import assert_close

# Each activation with each kind of positions; norms, shift and normalisers ride along.
CHOICES = [
    dict(position_bias="none", token_shift=True, norm="rmsnorm"),
    dict(position_bias="rope", absolute_position=True, rope_dim=0, norm="layernorm", proj_bias=True),
    dict(position_bias="toeplitz", token_shift=True, absolute_position=True, rope_dim=4, norm="scalenorm"),
    dict(position_bias="t5", token_shift=True, rope_dim=6, tie_embeddings=True, embed_dim=25),
]
ACTIVATIONS = ["relu2", "laplace", "softplus2", "softmax"]
VARIANTS = [
    pytest.param(family, dict(activation=activation, **choice), id=f"{family}-{activation}-{choice['position_bias']}")
    for family, activation, choice in itertools.product(["flash", "flash_quad"], ACTIVATIONS, CHOICES)
] + [
    pytest.param("flash", dict(normalizer="chunk", activation=activation), id=f"flash-{activation}-chunk")
    for activation in ACTIVATIONS
]
LENGTH = 45


def pieces_of(length: int, seed: int) -> list[int]:
    """Random sizes, single tokens among them, that sum to ``length``."""
    rng, sizes = random.Random(seed), []
    while sum(sizes) < length:
        sizes.append(min(rng.choice([1, 1, 2, 5, CHUNK, 13]), length - sum(sizes)))
    return sizes


CUTS = {
    "at once": [LENGTH],
    "token by token": [1] * LENGTH,
    "whole chunks": [2 * CHUNK, CHUNK, 2 * CHUNK, LENGTH - 5 * CHUNK],
    "anywhere": pieces_of(LENGTH, 1),
}

# Rows at different positions: left padding, packed documents, documents begun in their middle, all in one batch.
PADDED = [(torch.arange(LENGTH) - pads).clamp(min=0) for pads in (7, 20, LENGTH - 1)]
PACKED = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((11, 1, 1, CHUNK, 24), (3, 42))]
BEGUN = [
    torch.arange(LENGTH) + 21,
    torch.cat([torch.arange(5, 30), torch.arange(3, 23)]),
    torch.cat([torch.arange(16, 36), torch.arange(16, 41)]),  # to whole chunks and back
    torch.cat([torch.arange(10, 30), torch.arange(31, 56)]),  # one position skipped
]
# One document a row is apart: the ops of whole sequences are faster there, and others.
LAYOUTS = {"one document": torch.arange(LENGTH).expand(2, -1), "rows apart": torch.stack([*PADDED, *PACKED, *BEGUN])}


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "arguments"), VARIANTS)
def test_any_cut_gives_the_full_forward(family: str, arguments: dict[str, object], layout: str) -> None:
    built, position = model(family, **arguments), LAYOUTS[layout]
    tokens = torch.randint(VOCABULARY, position.shape)
    expected = built(tokens, input_pos=position)
    built.setup_caches(len(position), torch.float32, decoder_max_seq_len=LENGTH + 21)
    for name, pieces in CUTS.items():
        built.reset_caches()
        assert_close(feed(built, tokens, position, pieces), expected, "law_fp32", name)


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64])
@pytest.mark.parametrize("normalizer", ["visible", "chunk"])
def test_chunks_of_any_size(chunk_size: int, normalizer: str) -> None:
    for name, position in LAYOUTS.items():
        built = model(chunk_size=chunk_size, normalizer=normalizer, position_bias="t5", token_shift=True)
        tokens = torch.randint(VOCABULARY, position.shape)
        expected = built(tokens, input_pos=position)
        built.setup_caches(len(position), torch.float32, decoder_max_seq_len=LENGTH + 21)
        assert_close(feed(built, tokens, position, CUTS["anywhere"]), expected, "law_fp32", name)
        with disable_kv_cache(built):
            assert torch.equal(built(tokens, input_pos=position), expected)


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1, 12, 1, 6], [12, 8], [16, 4]])
@pytest.mark.parametrize(("first", "held"), [(0, 32), (0, 33), (16, 32), (19, 33), (35, 33)])
@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_a_row_forgets_what_it_held_when_its_positions_restart(
    family: str, first: int, held: int, pieces: list[int]
) -> None:
    built = model(family, token_shift=True)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=80)
    tokens, longer = torch.randint(VOCABULARY, (2, 20)), torch.randint(VOCABULARY, (2, held))
    feed(built, longer, torch.arange(held), [held - 3, 3])
    # The second row goes on where it was; the first begins anew.
    position = torch.stack([first + torch.arange(20), torch.arange(held, held + 20)])
    found = feed(built, tokens, position, pieces)
    with disable_kv_cache(built):
        assert_close(found[:1], built(tokens[:1], input_pos=position[:1]), "law_fp32")
        assert_close(found[1:], built(torch.cat([longer, tokens], dim=1)[1:])[:, held:], "law_fp32")


@torch.no_grad()
def test_an_unlimited_model_goes_on_past_its_length() -> None:
    arguments = dict(unlimited_decoding=True, token_shift=True, position_bias="toeplitz", absolute_position=True)
    short, long = model(max_seq_len=16, **arguments), model(max_seq_len=120, **arguments)
    tokens = torch.randint(VOCABULARY, (2, 120))
    short.setup_caches(2, torch.float32, decoder_max_seq_len=20)
    found = feed(short, tokens, torch.arange(120), [10] + [1] * 30 + [35, 40, 5])
    assert_close(found, long(tokens), "law_fp32")
    # Without the cache the limit stands.
    with disable_kv_cache(short), pytest.raises(ValueError, match="max_seq_len"):
        short(tokens)


def test_unlimited_decoding_is_for_flash_and_a_boolean() -> None:
    with pytest.raises(ValueError, match=r"unlimited_decoding \(True\) is not an argument of flash_quad"):
        model("flash_quad", unlimited_decoding=True)
    with pytest.raises(ValueError, match=r"unlimited_decoding \('yes'\) must be True or False"):
        model(unlimited_decoding="yes")


def test_unlimited_rotary_angles_are_the_tables() -> None:
    table = flash_plugin.components.positions.RotaryPositions(16, 300, 10000)
    computed = flash_plugin.components.positions.RotaryPositions(16, 300, 10000, unlimited=True)
    assert_close(computed.angles(300, None), table.angles(300, None), "oracle_fp32")
    assert computed.cache.numel() == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_layers_decode_in_torchtunes_own_decoder(family: str) -> None:
    built = model(family, token_shift=True)
    stock = TransformerDecoder(
        tok_embeddings=built.tok_embeddings,
        layers=built.layers,
        max_seq_len=256,
        num_heads=1,
        head_dim=12,
        norm=built.norm,
        output=built.output,
    )
    tokens = torch.randint(VOCABULARY, (2, 30))
    expected = built(tokens)
    stock.setup_caches(2, torch.float32, decoder_max_seq_len=30)
    mask = torch.ones(2, 30, 30, dtype=torch.bool).tril()
    parts = [stock(tokens[:, :12], input_pos=torch.arange(12), mask=mask[:, :12])]
    parts += [stock(tokens[:, t, None], input_pos=torch.tensor([t]), mask=mask[:, t, None]) for t in range(12, 30)]
    assert_close(torch.cat(parts, dim=1), expected, "law_fp32")
