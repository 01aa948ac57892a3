"""What published encoders need beyond FLASH: softmax-plus, a scale of one's own, post-norm, a norm without a weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import flash_plugin
from flash_plugin.components.norms import build_norm
from flash_plugin.kernels import make_segments
from tests.components.decoding import VOCABULARY, feed, model
from tests.tolerances import assert_close

OPTIONS = {
    "softmax_plus": dict(activation="softmax_plus", position_bias="t5"),
    "scale": dict(position_bias="toeplitz"),
    "post_norm": dict(norm="plain_rmsnorm"),
}


def variant(name: str, **arguments: object) -> flash_plugin.FlashDecoder:
    built = model("flash_quad", **OPTIONS[name], **arguments)
    for layer in built.layers:
        layer.post_norm = name == "post_norm"
        layer.attn.mixer.scale = 0.7 if name == "scale" else None
    return built


@torch.no_grad()
def test_softmax_plus_is_softmax_of_scores_as_sharp_as_the_text_is_long() -> None:
    torch.manual_seed(0)
    mixer = flash_plugin.QuadraticMixer(activation="softmax_plus", causal=False)
    causal = flash_plugin.QuadraticMixer(activation="softmax_plus")
    for length in (1, 5, 512, 700):
        q, k = torch.randn(2, 1, length, 8, dtype=torch.float64) * 2
        v, gate = torch.randn(2, 1, length, 6, dtype=torch.float64)
        opened, values = gate[0] * torch.sigmoid(gate[0]), v[0] * torch.sigmoid(v[0])
        scores = q[0] @ k[0].T / math.sqrt(8)
        expected = opened * (torch.softmax(scores * math.log(length) / math.log(512), dim=1) @ values)
        assert_close(mixer((q, k), v, gate, None)[0], expected, "oracle_fp64")
        visible = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        seen = (scores * visible.log() / math.log(512)).masked_fill(hidden, -math.inf)
        assert_close(causal((q, k), v, gate, None)[0], opened * (torch.softmax(seen, dim=1) @ values), "oracle_fp64")


@torch.no_grad()
@pytest.mark.parametrize("name", OPTIONS)
def test_prefix_packing_and_decoding(name: str) -> None:
    built = variant(name)
    lengths = [1, 7, 63, 20]
    tokens = torch.randint(VOCABULARY, (1, sum(lengths)))
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = built(tokens, input_pos=position)
    for document, logits in zip(tokens.split(lengths, dim=1), packed.split(lengths, dim=1), strict=True):
        alone = built(document)
        assert_close(logits, alone, "law_fp32")
        half = (document.shape[1] + 1) // 2
        assert_close(built(document[:, :half]), alone[:, :half], "law_fp32")
    built.setup_caches(batch_size=1, dtype=torch.float32, decoder_max_seq_len=sum(lengths))
    assert_close(feed(built, tokens, position, [40, 1, 1, 30, 1, 18]), packed, "law_fp32")


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_changes_nothing_at_real_tokens(name: str, causal: bool) -> None:
    built = variant(name, causal=causal)
    document = torch.randint(VOCABULARY, (1, 23))
    for padding in ((0, 9), (9, 0)):
        tokens = nn.functional.pad(document, padding, value=3)
        mask = nn.functional.pad(torch.ones_like(document, dtype=torch.bool), padding)
        assert_close(built(tokens, mask=mask)[mask][None], built(document), "law_fp32")


@torch.no_grad()
def test_the_scale_is_the_factor_of_scores_whatever_the_length() -> None:
    q, k = torch.randn(2, 1, 30, 8)
    v, gate = torch.randn(2, 1, 30, 6)
    plain = flash_plugin.QuadraticMixer(normalizer="paper", causal=False)
    scaled = flash_plugin.QuadraticMixer(normalizer="paper", causal=False, scale=1 / 30)
    segments = make_segments(padding_mask=torch.arange(30)[None] < 20)
    assert_close(scaled((q, k), v, gate, segments), plain((q, k), v, gate, segments), "pair_fp32")
    short = [tensor[:, :20] for tensor in (q, k, v, gate)]
    assert_close(
        scaled((q, k), v, gate, segments)[:, :20], scaled((short[0], short[1]), short[2], short[3], None), "pair_fp32"
    )


@torch.no_grad()
def test_post_norm_normalises_the_sum() -> None:
    layer = variant("post_norm").layers[0]
    x = torch.randn(2, 9, 24)
    summed = (x + layer.attn(x)).double()
    assert_close(layer(x), summed / (summed.square().mean(-1, keepdim=True) + 1e-6).sqrt(), "oracle_fp32")
    assert not list(layer.sa_norm.parameters())


@pytest.mark.parametrize("family", ["gau_alpha", "junnyu_flash_quad"])
def test_encoders_build_on_meta_train_and_start_from_seeds(family: str) -> None:
    sizes = dict(vocab_size=30, num_layers=2, embed_dim=24, qk_dim=12, max_seq_len=32)
    with torch.device("meta"):
        meta = getattr(flash_plugin, family)(**sizes)
    torch.manual_seed(1)
    built = getattr(flash_plugin, family)(**sizes)
    assert meta.state_dict().keys() == built.state_dict().keys()
    tokens = torch.randint(30, (2, 20))
    logits = built(tokens, token_types=torch.randint(2, tokens.shape))
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert [name for name, parameter in built.named_parameters() if not parameter.grad.abs().max() > 0] == []
    flash_plugin.initialize_weights(built, seed=3)
    first = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    flash_plugin.initialize_weights(built, seed=3)
    assert all(torch.equal(first[name], tensor) for name, tensor in built.state_dict().items())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: flash_plugin.QuadraticMixer(activation="softplus"), ["activation ('softplus')", "softmax_plus"]),
        (lambda: flash_plugin.QuadraticMixer(scale=0), ["scale (0)", "positive number", "scale=None"]),
        (lambda: flash_plugin.MixedChunkMixer(8, activation="softmax_plus"), ["activation ('softmax_plus')", "relu2"]),
        (lambda: build_norm("plain", 4, 1e-6), ["norm ('plain')", "plain_rmsnorm"]),
        (
            lambda: flash_plugin.FlashLayer(nn.Identity(), sa_norm=nn.Identity(), token_shift=True, post_norm=True),
            ["token_shift (True)", "post_norm=True"],
        ),
        (
            lambda: flash_plugin.gau_alpha(vocab_size=9, num_layers=1, embed_dim=8, num_token_types=0),
            ["num_token_types (0)", "model.num_token_types=2"],
        ),
        (lambda: flash_plugin.gau_alpha(vocab_size=9, num_layers=1, embed_dim=8, causal=True), ["causal (True)"]),
        (
            lambda: flash_plugin.junnyu_flash_quad(vocab_size=9, num_layers=1, embed_dim=9),
            ["embed_dim (9)", "absolute_position"],
        ),
    ],
)
def test_refusals_name_argument_value_and_remedy(make: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value
