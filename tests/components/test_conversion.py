"""Weights of other implementations become ours and give their results; back they are the same to the bit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config

import flash_plugin
from flash_plugin.components.conversion import Converted, convert_to_ours, convert_to_theirs
from tests.components.published_layouts import (
    DIM,
    TYPES,
    VOCABULARY,
    Weights,
    flash_quad_logits,
    flash_quad_weights,
    gau_alpha_logits,
    gau_alpha_weights,
)
from tests.components.test_flash_pytorch_parity import randomize
from tests.tolerances import assert_close

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flash_pytorch
    from flash_pytorch.autoregressive_wrapper import AutoregressiveWrapper

LAYOUTS = {
    "gau_alpha": ("gau_alpha", lambda: gau_alpha_weights()),
    "gau_alpha-bias": ("gau_alpha", lambda: gau_alpha_weights(bias=True)),
    "gau_alpha-untied": ("gau_alpha", lambda: gau_alpha_weights(tied=False)),
    "flash_quad": ("junnyu", lambda: flash_quad_weights()),
    "flash_quad-layernorm": ("junnyu", lambda: flash_quad_weights(layernorm=True)),
    "flash_quad-long": ("junnyu", lambda: flash_quad_weights(longest=600)),
}


def built(converted: Converted) -> flash_plugin.FlashDecoder:
    model = config.instantiate(OmegaConf.create(converted.arguments))
    model.load_state_dict(converted.weights)
    return model.eval()


def transformer(**arguments: Any) -> torch.nn.Module:
    sizes = dict(dim=DIM, num_tokens=VOCABULARY, depth=2, group_size=16, query_key_dim=36)
    torch.manual_seed(0)
    model = flash_pytorch.FLASHTransformer(**{**sizes, **arguments}).eval()
    randomize(model)
    return model


def junnyu_flash(weights: Weights) -> Weights:
    """FLASH-pytorch's weights under the names that JunnYu's FLASH has for them."""
    names = [
        (r"token_emb\.", "flash.embeddings.word_embeddings."),
        (r"abs_pos_emb\.scale", "flash.embeddings.scale"),
        (r"layers\.", "flash.encoder.layers."),
        (r"(.*)gamma", r"\1weight"),
        (r"(.*)beta", r"\1bias"),
        (r"to_logits\.0", "cls.predictions.LayerNorm"),
        (r"to_logits\.1", "cls.predictions.decoder"),
    ]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in names:
            name = re.sub(rf"^{pattern}", replacement, name)
        renamed[name] = tensor
    del renamed["abs_pos_emb.inv_freq"]
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
@pytest.mark.parametrize(("causal", "shift", "laplace"), [(True, True, False), (False, False, True)])
def test_flash_pytorch_there_and_back(norm: str, causal: bool, shift: bool, laplace: bool) -> None:
    options = dict(group_size=16, causal=causal, shift_tokens=shift, laplace_attn_fn=laplace)
    theirs = transformer(norm_type=norm, expansion_factor=1.7, **options)
    converted = convert_to_ours("flash_pytorch", theirs.state_dict(), {**options, "max_seq_len": 128})
    tokens = torch.randint(VOCABULARY, (2, 75))
    assert_close(built(converted)(tokens), theirs(tokens), "parity_fp32")

    back = convert_to_theirs("flash_pytorch", converted.weights, converted.arguments)
    assert back.weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in theirs.state_dict().items())
    again = flash_pytorch.FLASHTransformer(**back.arguments).eval()
    again.load_state_dict(back.weights)
    assert torch.equal(again(tokens), theirs(tokens))


@torch.no_grad()
def test_a_model_trained_here_becomes_one_of_flash_pytorchs() -> None:
    node = {
        "_component_": "flash_plugin.flash_debug", "vocab_size": VOCABULARY, "num_layers": 2, "embed_dim": DIM,
        "qk_dim": 8, "chunk_size": 16, "max_seq_len": 64, "normalizer": "chunk", "position_bias": "t5",
        "absolute_position": True, "norm": "scalenorm", "norm_eps": 1e-5, "proj_bias": True, "output_bias": True,
        "final_norm": "layernorm",
    }  # fmt: skip
    ours = config.instantiate(OmegaConf.create(node)).eval()
    randomize(ours)
    there = convert_to_theirs("flash_pytorch", ours.state_dict(), node)
    theirs = flash_pytorch.FLASHTransformer(**there.arguments).eval()
    theirs.load_state_dict(there.weights)
    tokens = torch.randint(VOCABULARY, (2, 41))
    assert_close(theirs(tokens), ours(tokens), "parity_fp32")


@torch.no_grad()
def test_wrapped_weights_of_dnaflash_are_flash_pytorchs() -> None:
    theirs = transformer()
    wrapped = AutoregressiveWrapper(theirs).state_dict()
    converted = convert_to_ours("dnaflash", wrapped, {"group_size": 16})
    assert any("prefix 'net.'" in note for note in converted.notes)
    tokens = torch.randint(VOCABULARY, (2, 40))
    assert_close(built(converted)(tokens), theirs(tokens), "parity_fp32")


def test_the_published_sizes_of_dnaflash_are_read_off_its_shapes() -> None:
    with torch.device("meta"):
        theirs = flash_pytorch.FLASHTransformer(dim=1024, num_tokens=4096, depth=36)
    converted = convert_to_ours("dnaflash", theirs.state_dict())
    read = {"vocab_size": 4096, "num_layers": 36, "embed_dim": 1024, "qk_dim": 128, "expansion": 2.0, "rope_dim": 32}
    assert read.items() <= converted.arguments.items()
    assert {"chunk_size": 256, "norm": "scalenorm", "token_shift": True}.items() <= converted.arguments.items()


def test_the_published_sizes_of_gau_alpha_are_read_off_its_shapes() -> None:
    shapes = {
        "gau_alpha.embeddings.word_embeddings.weight": (12000, 768),
        "gau_alpha.embeddings.token_type_embeddings.weight": (2, 768),
    }
    for layer in range(24):
        unit = f"gau_alpha.encoder.layer.{layer}.gau."
        shapes |= {f"{unit}i_dense.weight": (3200, 768), f"{unit}o_dense.weight": (768, 1536)}
        shapes |= {f"{unit}{name}_scaleoffset.weight": (128,) for name in "qk"}
    converted = convert_to_ours("gau_alpha", {name: torch.empty(s, device="meta") for name, s in shapes.items()})
    read = {"vocab_size": 12000, "num_layers": 24, "embed_dim": 768, "qk_dim": 128, "max_seq_len": 512}
    assert read.items() <= converted.arguments.items()
    assert (
        sum(tensor.numel() for tensor in converted.weights.values())
        == sum(torch.Size(shape).numel() for shape in shapes.values()) + 24 * 2 * 128
    )  # our offsets, zeros


@torch.no_grad()
def test_junnyu_flash_is_flash_pytorchs_under_other_names() -> None:
    theirs = transformer(shift_tokens=False)
    weights = junnyu_flash(theirs.state_dict())
    converted = convert_to_ours("junnyu", weights, {"group_size": 16})
    tokens = torch.randint(VOCABULARY, (2, 52))
    mask = torch.arange(52) < torch.tensor([[52], [31]])
    assert_close(built(converted)(tokens, mask=mask)[mask], theirs(tokens, mask=mask)[mask], "parity_fp32")
    back = convert_to_theirs("junnyu", converted.weights, converted.arguments)
    assert back.weights.keys() == weights.keys()
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
@pytest.mark.parametrize("case", LAYOUTS)
def test_encoders_give_the_logits_of_their_formulas(case: str) -> None:
    name, make = LAYOUTS[case]
    weights = make()
    model = built(convert_to_ours(name, weights))
    formula: Callable[[Weights, Tensor, Tensor], Tensor] = gau_alpha_logits
    if name == "junnyu":
        longest = 600 if case.endswith("long") else 64
        formula = lambda *given: flash_quad_logits(*given, longest=longest)  # noqa: E731
    torch.manual_seed(3)
    texts = [torch.randint(VOCABULARY, (length,)) for length in (1, 2, 17, 40)]
    types = [torch.randint(TYPES, text.shape) for text in texts]
    for text, kind in zip(texts, types, strict=True):
        expected = formula(weights, text, kind)
        assert_close(model(text[None], token_types=kind[None])[0], expected, "parity_fp32")
        assert_close(model(text[None])[0], formula(weights, text, torch.zeros_like(kind)), "parity_fp32")
    # The same texts in one batch, padded.
    tokens, kinds = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (texts, types))
    mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(text)] for text in texts])
    logits = model(tokens, mask=mask, token_types=kinds)
    for row, (text, kind) in enumerate(zip(texts, types, strict=True)):
        assert_close(logits[row, : len(text)], formula(weights, text, kind), "parity_fp32")


@pytest.mark.parametrize("case", LAYOUTS)
def test_encoders_come_back_the_same(case: str) -> None:
    name, make = LAYOUTS[case]
    weights = make()
    converted = convert_to_ours(name, weights)
    back = convert_to_theirs(name, converted.weights, converted.arguments)
    assert back.weights.keys() == weights.keys()
    left = {key for note in converted.notes if "left behind" in note for key in re.findall(r"\S+\.[abw]\b", note)}
    assert (left == set()) == (name != "junnyu")
    for key, tensor in weights.items():
        if key in left:
            assert not back.weights[key].any()
        else:
            assert torch.equal(back.weights[key], tensor), key
    again = convert_to_ours(name, back.weights, config=back.arguments)
    assert again.arguments == converted.arguments
    assert all(torch.equal(again.weights[key], tensor) for key, tensor in converted.weights.items())


@torch.no_grad()
def test_token_types_need_a_model_that_has_them() -> None:
    model = flash_plugin.flash_debug(num_layers=1)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"token_types \(shape \(1, 4\)\) must be None"):
        model(tokens, token_types=tokens)
