"""Models of FLASH, FLASH-Quad and Transformer layers obey the laws, and decode with caches of all three kinds."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.data import padded_collate_packed
from torchtune.generation import generate
from torchtune.modules import KVCache, MultiHeadAttention

import flash_plugin
from tests.components.decoding import VOCABULARY, feed, model
from tests.tolerances import assert_close

HYBRID: dict[str, object] = dict(num_layers=4, attention_layers=[0, 2], quadratic_layers=[3], token_shift=True)
PATTERNS = [
    pytest.param(HYBRID, id="all-kinds"),
    pytest.param(dict(attention_layers=[1], num_heads=3, num_kv_heads=1, position_bias="t5"), id="grouped"),
    pytest.param(dict(quadratic_layers=[0], position_bias="toeplitz"), id="quadratic"),
]


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("pattern", PATTERNS)
class TestLaws:
    def test_appending_changes_nothing_before(self, pattern: dict[str, object]) -> None:
        built, tokens = model(**pattern), text(2, 45)
        assert_close(built(tokens[:, :29]), built(tokens)[:, :29], "law_fp32")

    @pytest.mark.parametrize("with_mask", [True, False])
    def test_a_packed_document_is_as_it_is_alone(self, pattern: dict[str, object], with_mask: bool) -> None:
        built, lengths = model(**pattern), [21, 5, 18]
        texts = [text(1, length)[0] for length in lengths]
        pack = {"tokens": torch.cat(texts), "labels": torch.cat(texts), "seq_lens": torch.tensor(lengths)}
        pack["input_pos"] = torch.cat([torch.arange(length) for length in lengths])
        batch = padded_collate_packed([pack])
        together = built(batch["tokens"], input_pos=batch["input_pos"], mask=batch["mask"] if with_mask else None)
        for tokens, found in zip(texts, together[0].split(lengths), strict=True):
            assert_close(found, built(tokens[None])[0], "law_fp32")

    def test_padding_changes_nothing(self, pattern: dict[str, object]) -> None:
        built, tokens = model(**pattern), text(1, 30)
        for left, right in ((7, 0), (0, 9)):
            padded = (
                torch.cat([text(1, left), tokens, text(1, right)], dim=1)
                if left
                else torch.cat([tokens, text(1, right)], dim=1)
            )
            real = torch.zeros(1, left + 30 + right, dtype=torch.bool)
            real[:, left : left + 30] = True
            assert_close(built(padded, mask=real)[:, left : left + 30], built(tokens), "law_fp32")

    @pytest.mark.parametrize("pieces", [[1] * 40, [13] + [1] * 27, [8, 1, 20, 11]], ids=["single", "prompt", "mixed"])
    def test_decoding_is_the_whole_forward(self, pattern: dict[str, object], pieces: list[int]) -> None:
        built, tokens = model(**pattern), text(2, 40)
        whole = built(tokens)
        built.setup_caches(2, torch.float32, decoder_max_seq_len=64)
        for _ in range(2):
            assert_close(feed(built, tokens, torch.arange(40)[None], pieces), whole, "law_fp32")
            built.reset_caches()

    def test_torchtune_generates_the_same_with_and_without_cache(self, pattern: dict[str, object]) -> None:
        built, prompt = model(**pattern), text(2, 11).clamp(min=1)  # 0 is padding
        settings = dict(max_generated_tokens=20, pad_id=0, temperature=0.01, top_k=1)
        plain, _ = generate(built, prompt, **settings)
        built.setup_caches(2, torch.float32, decoder_max_seq_len=64)
        cached, _ = generate(built, prompt, **settings)
        assert torch.equal(plain, cached)


def test_every_kind_keeps_its_own_cache() -> None:
    built = model(**HYBRID)
    built.setup_caches(1, torch.float32, decoder_max_seq_len=64)
    kinds = [type(layer.attn.kv_cache) for layer in built.layers]
    assert kinds == [KVCache, flash_plugin.FlashCache, KVCache, flash_plugin.FlashCache]
    assert built.layers[1].attn.kv_cache.keys.shape[1] < built.layers[3].attn.kv_cache.keys.shape[1] == 64


@pytest.mark.parametrize("attention", ["linear", "mixed_chunk"])
def test_layers_of_a_hybrid_are_swapped_in_turn(attention: str) -> None:
    sizes = dict(vocab_size=VOCABULARY, num_layers=4, embed_dim=24, max_seq_len=256, qk_dim=12, chunk_size=8)
    swap = dict(attention=attention, layers=[1], attention_layers=[1, 3], quadratic_layers=[2])
    torch.manual_seed(0)
    built = flash_plugin.swap_attention("flash_plugin.flash", **swap, **sizes).eval()
    kinds = [type(layer.attn).__name__ for layer in built.layers]
    assert kinds[1] in ("LinearMultiHeadAttention", "MixedChunkMultiHeadAttention")
    assert [kinds[0], *kinds[2:]] == ["GatedAttentionUnit", "GatedAttentionUnit", "MultiHeadAttention"]
    assert built.layers[0].attn.mixer.chunk_size == 8
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if any(part in name for part in ("offset_scale", "global_path")):
                parameter.normal_(std=0.6)
    texts = [text(1, 19)[0], text(1, 26)[0]]
    position = torch.cat([torch.arange(19), torch.arange(26)])[None]
    together = built(torch.cat(texts)[None], input_pos=position)[0].split([19, 26])
    for tokens, found in zip(texts, together, strict=True):
        assert_close(found, built(tokens[None])[0], "law_fp32")
    whole = built(texts[1][None])
    built.setup_caches(1, torch.float32, decoder_max_seq_len=64)
    assert_close(feed(built, texts[1][None], torch.arange(26)[None], [9, 1, 16]), whole, "law_fp32")


@pytest.mark.parametrize("kept", [False, True])
def test_a_mask_is_made_where_a_layer_reads_it(kept: bool) -> None:
    sizes = dict(vocab_size=VOCABULARY, num_layers=3, embed_dim=24, max_seq_len=256, qk_dim=12, chunk_size=8)
    swap = dict(attention="mixed_chunk", layers=[1], attention_layers=[1, 2] if kept else [1])
    built = flash_plugin.swap_attention("flash_plugin.flash", **swap, **sizes).eval()
    square = 0

    class Squares(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal square
            out = func(*args, **(kwargs or {}))
            square += isinstance(out, torch.Tensor) and out.shape[-2:] == (250, 250)
            return out

    with Squares(), torch.no_grad():
        built(text(1, 250), input_pos=torch.arange(250)[None] % 100)
    assert bool(square) == kept


def test_a_cache_set_up_again_knows_nothing() -> None:
    built, tokens = model(**HYBRID), text(2, 20)
    for batch in (1, 2, 2):
        built.setup_caches(batch, torch.float32, decoder_max_seq_len=64)
        found = feed(built, tokens[:batch], torch.arange(20)[None], [7, 13])
        assert_close(found, built_alone(tokens[:batch]), "law_fp32")


def built_alone(tokens: torch.Tensor) -> torch.Tensor:
    return model(**HYBRID)(tokens)


def test_an_attention_layer_has_the_parameters_of_a_flash_layer() -> None:
    built = flash_plugin.flash_125m(attention_layers=[5, 11], num_layers=12)
    assert [i for i, layer in enumerate(built.layers) if isinstance(layer.attn, MultiHeadAttention)] == [5, 11]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in built.layers]
    assert sizes[5] == pytest.approx(sizes[0], rel=1e-3)
    assert built.layers[5].attn.num_heads == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_layers": [2]}, ["attention_layers ([2])", "0 to 1"]),
        ({"attention_layers": [0, 0]}, ["attention_layers ([0, 0])", "different"]),
        ({"attention_layers": [0, 1]}, ["attention_layers ([0, 1])", "leave a layer"]),
        ({"attention_layers": [0], "quadratic_layers": [0]}, ["both [0]"]),
        ({"attention_layers": [0], "unlimited_decoding": True}, ["unlimited_decoding (True)"]),
        ({"attention_layers": [0], "causal": False}, ["causal (False)"]),
        ({"attention_layers": [0], "num_heads": 5}, ["num_heads (5)", "embed_dim (24)"]),
        ({"attention_layers": [0], "num_heads": 8}, ["num_heads (8)", "even"]),
        ({"attention_layers": [0], "num_heads": 4, "num_kv_heads": 3}, ["num_kv_heads (3)", "num_heads (4)"]),
        ({"attention_layers": [0], "expansion": 1}, ["expansion (1)"]),
        ({"num_heads": 4}, ["num_heads (4)", "attention_layers"]),
    ],
)
def test_bad_input_gets_a_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        model(**arguments)
    for word in words:
        assert word in str(error.value)
