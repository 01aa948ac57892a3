"""Bidirectional FLASH: what it is built from, that padding says nothing to it, and that batches do not matter."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torchtune.data import padded_collate_packed

import flash_plugin
from flash_plugin.components.masked_lm import _CAUSAL_ONLY
from flash_plugin.components.sizes import SIZES
from tests.components.test_model_laws import model
from tests.tolerances import assert_close, error

VOCABULARY, CHUNK = 30, 8
FAMILIES = ["mlm_flash", "mlm_flash_quad"]
VARIANTS: list[dict[str, object]] = [
    dict(activation="relu2"),
    dict(activation="laplace", position_bias="rope", absolute_position=True, rope_dim=0, norm="layernorm"),
    dict(activation="softplus2", position_bias="toeplitz", token_shift=True, rope_dim=4, norm="scalenorm"),
    dict(activation="softmax", position_bias="t5", token_shift=True, proj_bias=True, tie_embeddings=True),
]
CASES = [(family, arguments) for family in FAMILIES for arguments in VARIANTS]
CASES.append(("mlm_flash_quad", dict(activation="softmax_plus", norm="plain_rmsnorm")))


def build(family: str, **arguments: object) -> flash_plugin.FlashDecoder:
    return model(family, **({"chunk_size": CHUNK} if family == "mlm_flash" else {}), **arguments)


def documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_knob_is_that_of_the_causal_builder_but_for_what_is_causal(family: str) -> None:
    ours = inspect.signature(getattr(flash_plugin, family)).parameters
    theirs = inspect.signature(getattr(flash_plugin, family.removeprefix("mlm_"))).parameters
    assert set(theirs) - set(ours) == set(_CAUSAL_ONLY) & set(theirs)
    assert all(ours[name] == theirs[name] for name in ours)
    assert ours["token_shift"].default is False
    built = build(family, token_shift=True)
    causal = model(family.removeprefix("mlm_"), token_shift=True, causal=False)
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in causal.state_dict().items()
    }
    assert not built.causal and all(layer.token_shift and not layer.attn.mixer.causal for layer in built.layers)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_causal_models(family: str, size: str) -> None:
    ours, theirs = getattr(flash_plugin, f"{family}_{size}"), getattr(flash_plugin, f"{family[4:]}_{size}")
    defaults = [
        {name: parameter.default for name, parameter in inspect.signature(builder).parameters.items()}
        for builder in (ours, theirs)
    ]
    different = {name for name in defaults[0] if defaults[0][name] != defaults[1][name]}
    assert different == ({"vocab_size"} if size == "debug" else set())
    tokenizer = flash_plugin.byte_tokenizer(special_tokens=["<|mask|>"])
    assert size != "debug" or defaults[0]["vocab_size"] == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(causal=False), ["causal (False) is not an argument of mlm_flash"]),
        (dict(attention_layers=[0]), ["attention_layers ([0]) is not an argument of mlm_flash"]),
        (dict(chunck_size=8), ["chunck_size (8)", "did you mean chunk_size?"]),
        (dict(activation="gelu"), ["activation ('gelu')", "relu2"]),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build("mlm_flash", **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_cannot_decode_token_by_token(family: str) -> None:
    with pytest.raises(ValueError, match=r"causal \(False\) must be True to decode with a cache"):
        build(family).setup_caches(1, torch.float32, decoder_max_seq_len=8)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_sees_every_other(family: str) -> None:
    built, (tokens,) = build(family), documents(3 * CHUNK + 1)
    before = built(tokens[None])
    for place in (0, CHUNK, 3 * CHUNK):
        other = tokens.clone()
        other[place] = (tokens[place] + 1) % VOCABULARY
        moved = (built(other[None]) - before).abs().amax(dim=-1)[0]
        assert (moved > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("family", "arguments"), CASES, ids=str)
def test_padding_changes_nothing_at_real_tokens(family: str, arguments: dict[str, object], left: bool) -> None:
    built = build(family, **arguments)
    for tokens in documents(37, 5, 1, 2 * CHUNK):
        alone = built(tokens[None])
        for extra in (1, 2 * CHUNK + 3):
            sides = (extra, 0) if left else (0, extra)
            mask = torch.nn.functional.pad(torch.ones_like(tokens, dtype=torch.bool), sides)
            for padding in (0, 7):
                row = torch.nn.functional.pad(tokens, sides, value=padding)
                assert_close(built(row[None], mask=mask[None])[:, mask], alone, "law_fp32")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalizer", ["paper", "chunk"])
def test_the_other_normalisers_do_not_claim_that(family: str, normalizer: str) -> None:
    built, (tokens,) = build(family, normalizer=normalizer), documents(20)
    mask = torch.arange(30) < 20
    padded = built(torch.nn.functional.pad(tokens, (0, 10))[None], mask=mask[None])[:, mask]
    assert error(padded, built(tokens[None]), worst=True) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("family", "arguments"), CASES, ids=str)
def test_a_batch_of_mixed_lengths_scores_like_one_by_one(family: str, arguments: dict[str, object]) -> None:
    built = build(family, **arguments)
    samples = [{"tokens": tokens.tolist(), "targets": tokens.tolist()} for tokens in documents(37, 5, 1, 64, 16)]
    batch = flash_plugin.mlm_collate(samples, padding_idx=2)
    labels = batch.pop("labels")
    logits = built(**batch)
    for row, sample in enumerate(samples):
        alone = flash_plugin.mlm_collate([sample], padding_idx=2)
        del alone["labels"]
        length = len(sample["tokens"])
        assert_close(logits[row, :length], built(**alone)[0, :length], "law_fp32")
        assert_close(logits[row, :length], built(torch.tensor([sample["tokens"]]))[0], "law_fp32")
        assert labels[row, 1 : length + 1].tolist() == sample["tokens"]


@torch.no_grad()
@pytest.mark.parametrize(("family", "arguments"), CASES, ids=str)
def test_documents_of_a_stock_packed_batch_do_not_see_each_other(family: str, arguments: dict[str, object]) -> None:
    built = build(family, **arguments)
    lengths = [[10, 1, 29], [40], [5, 20, 15]]
    rows = [torch.cat(documents(*row)) for row in lengths]
    batch = padded_collate_packed(
        [
            {
                "tokens": tokens,
                "labels": tokens,
                "input_pos": torch.cat([torch.arange(length) for length in row]),
                "seq_lens": torch.tensor(row),
            }
            for tokens, row in zip(rows, lengths, strict=True)
        ]
    )
    del batch["labels"]
    for training in (False, True):
        logits = built.train(training)(**batch)
        for row, tokens in enumerate(rows):
            for document, found in zip(tokens.split(lengths[row]), logits[row].split(lengths[row]), strict=True):
                assert_close(found, built(document[None])[0], "law_fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_mask_is_refused_where_it_does_not_stand_for_documents(family: str) -> None:
    built, tokens = build(family), torch.zeros(1, 12, dtype=torch.long)
    causal = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"mask\[0, 0, 1\] \(False\) must be True"):
        built(tokens, mask=causal)
    two = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match="agree with input_pos"):
        built(tokens, mask=causal, input_pos=two)
