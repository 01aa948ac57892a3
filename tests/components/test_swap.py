"""Swapped attention: torchtune's models keep their weights, start where they were, and obey the four laws."""

from __future__ import annotations

import pytest
import torch
from torchtune.data import padded_collate_packed
from torchtune.generation import generate
from torchtune.modules import MultiHeadAttention
from torchtune.modules.peft import (
    get_adapter_params,
    get_merged_lora_ckpt,
    validate_missing_and_unexpected_for_lora,
)

import flash_plugin
from tests.components.swapped import CHUNK, FAMILIES, LLAMA, LORA_LLAMA, SIZES, logits, original, swapped, tokens
from tests.tolerances import assert_close

KINDS = [
    pytest.param({"attention": "mixed_chunk"}, id="mixed-softmax"),
    pytest.param({"attention": "mixed_chunk", "local": "relu2"}, id="mixed-relu2"),
    pytest.param({"attention": "quadratic", "local": "relu2"}, id="quadratic-relu2"),
    pytest.param({"attention": "linear"}, id="linear"),
    pytest.param({"attention": "mixed_chunk", "layers": [1]}, id="one-layer"),
]


@pytest.mark.parametrize("builder", FAMILIES)
def test_a_swapped_model_starts_as_the_original_inside_a_chunk(builder: str) -> None:
    before, after = original(builder), swapped(builder, trained=False)
    assert sum(isinstance(m, flash_plugin.MixedChunkMultiHeadAttention) for m in after.modules()) == 2
    short = tokens(2, CHUNK)
    assert_close(logits(after, short), logits(before, short), "parity_fp32")
    # The test can fail: a longer sequence sees chunks, and an open global path more than its chunk.
    long = tokens(2, 3 * CHUNK)
    assert (logits(after, long) - logits(before, long)).abs().max() > 1e-2
    assert (logits(swapped(builder), long) - logits(after, long)).abs().max() > 1e-2


def test_the_global_path_opens_in_training() -> None:
    model = swapped(trained=False)
    model(tokens(1, 3 * CHUNK)).square().sum().backward()
    gains = [p.grad for name, p in model.named_parameters() if name.endswith("global_path.gain.weight")]
    assert len(gains) == 2
    assert all((gain != 0).all() for gain in gains)


def test_a_checkpoint_of_the_swapped_model_loads_as_it_was_saved() -> None:
    trained, fresh = swapped(), swapped(trained=False)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(tokens(1, 40)), trained(tokens(1, 40)))


def test_adapters_by_themselves_leave_the_global_path_alone() -> None:
    lora = dict(lora_attn_modules=["q_proj"], lora_rank=2, lora_alpha=4)
    model = flash_plugin.swap_attention(LORA_LLAMA, chunk_size=CHUNK, **lora, **SIZES)
    adapters = get_adapter_params(model)
    matrices = ["q_proj", "global_path.gain", "global_path.query_scale", "global_path.key_scale"]
    assert {name.split("attn.")[1] for name in adapters} == {f"{m}.lora_{x}.weight" for m in matrices for x in "ab"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    model.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "q_proj.lora" in name}, strict=False
    )
    assert all((parameter == 3.0).all() for parameter in model.parameters())


def test_adapters_of_the_global_path_merge_like_all_others() -> None:
    lora = dict(lora_attn_modules=["q_proj"], lora_rank=2, lora_alpha=4)
    model = flash_plugin.swap_attention(LORA_LLAMA, chunk_size=CHUNK, **lora, **SIZES)
    missing, unexpected = model.load_state_dict(original().state_dict(), strict=False)
    validate_missing_and_unexpected_for_lora(["q_proj"], False, False, missing, unexpected)
    text = tokens(1, 3 * CHUNK)
    assert_close(logits(model, text), logits(swapped(trained=False), text), "parity_fp32")
    with torch.no_grad():
        for parameter in get_adapter_params(model).values():
            parameter.normal_(std=0.5)
    expected = logits(model, text)
    assert (expected - logits(swapped(trained=False), text)).abs().max() > 1e-2
    merged = get_merged_lora_ckpt(model.state_dict(), rank=2, alpha=4)
    plain = swapped(trained=False)
    plain.load_state_dict(merged)
    assert_close(logits(plain, text), expected, "parity_fp32")


@pytest.mark.parametrize("choices", KINDS)
class TestLaws:
    def test_appending_changes_nothing_before(self, choices: dict[str, object]) -> None:
        model, text = swapped(**choices), tokens(2, 61)
        assert_close(logits(model, text[:, :37]), logits(model, text)[:, :37], "law_fp32")

    def test_a_packed_document_is_as_it_is_alone(self, choices: dict[str, object]) -> None:
        model = swapped(**choices)
        texts = [tokens(1, length, seed=length)[0] for length in (23, 5, 36)]
        pack = {"tokens": torch.cat(texts), "labels": torch.cat(texts), "seq_lens": torch.tensor([23, 5, 36])}
        pack["input_pos"] = torch.cat([torch.arange(len(text)) for text in texts])
        batch = padded_collate_packed([pack])
        batch.pop("labels")
        together = logits(model, **batch)[0].split([23, 5, 36])
        for text, found in zip(texts, together, strict=True):
            assert_close(found, logits(model, text[None])[0], "law_fp32")

    def test_left_padding_changes_nothing(self, choices: dict[str, object]) -> None:
        model, text = swapped(**choices), tokens(1, 40)
        position = torch.cat([torch.zeros(9, dtype=torch.long), torch.arange(40)])[None]
        index = torch.arange(49)
        mask = (index >= 9) & (index <= index[:, None]) | (index == index[:, None])
        padded = logits(model, torch.cat([tokens(1, 9, seed=5), text], dim=1), input_pos=position, mask=mask[None])
        assert_close(padded[:, 9:], logits(model, text), "law_fp32")

    @pytest.mark.parametrize("pieces", [[1] * 50, [20] + [1] * 30, [7, 16, 1, 26]], ids=["single", "prompt", "mixed"])
    def test_decoding_is_the_whole_forward(self, choices: dict[str, object], pieces: list[int]) -> None:
        model, text = swapped(**choices), tokens(2, 50)
        whole = logits(model, text)
        model.setup_caches(2, torch.float32, decoder_max_seq_len=64)
        causal = torch.ones(64, 64, dtype=torch.bool).tril()
        for _ in range(2):
            found, at = [], 0
            for size in pieces:
                where = torch.arange(at, at + size)
                found.append(
                    logits(
                        model, text[:, at : at + size], mask=causal[None, where], input_pos=where[None].expand(2, -1)
                    )
                )
                at += size
            assert_close(torch.cat(found, dim=1), whole, "law_fp32")
            model.reset_caches()

    def test_torchtune_generates_the_same_with_and_without_cache(self, choices: dict[str, object]) -> None:
        model, prompt = swapped(**choices), tokens(2, 21).clamp(min=1)  # 0 is padding
        settings = dict(max_generated_tokens=24, pad_id=0, temperature=0.01, top_k=1)
        plain, _ = generate(model, prompt, **settings)
        model.setup_caches(2, torch.float32, decoder_max_seq_len=64)
        cached, _ = generate(model, prompt, **settings)
        assert torch.equal(plain, cached)


@pytest.mark.parametrize("builder", FAMILIES)
def test_every_family_obeys_the_laws_beyond_a_chunk(builder: str) -> None:
    model, lengths = swapped(builder), (19, 34)
    texts = [tokens(1, length, seed=length) for length in lengths]
    whole = logits(model, texts[1])
    assert_close(logits(model, texts[1][:, :27]), whole[:, :27], "law_fp32")
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    assert_close(logits(model, torch.cat(texts, dim=1), input_pos=position)[:, 19:], whole, "law_fp32")
    model.setup_caches(1, torch.float32, decoder_max_seq_len=64)
    causal, found, at = torch.ones(64, 64, dtype=torch.bool).tril(), [], 0
    for size in (18, 1, 1, 14):
        where = torch.arange(at, at + size)
        found.append(logits(model, texts[1][:, where], mask=causal[None, where], input_pos=where[None]))
        at += size
    assert_close(torch.cat(found, dim=1), whole, "law_fp32")


def test_the_state_of_decoding_is_of_constant_size() -> None:
    sizes = {}
    for attention in ("mixed_chunk", "linear"):
        for length in (64, 256):
            model = swapped(attention=attention)
            model.setup_caches(1, torch.float32, decoder_max_seq_len=length)
            caches = [m.kv_cache for m in model.modules() if isinstance(m, MultiHeadAttention)]
            sizes[attention, length] = sum(buffer.numel() for cache in caches for buffer in cache.buffers())
        assert sizes[attention, 64] == sizes[attention, 256] > 0


def test_dropout_acts_in_training_alone() -> None:
    model, text = swapped(attn_dropout=0.5), tokens(1, 40)
    assert torch.equal(model(text), swapped()(text))
    model.train()
    assert not torch.equal(model(text), model(text))


def test_layers_are_chosen() -> None:
    for layers, expected in (("all", [0, 1, 2, 3]), ("every_2", [1, 3]), ("every_4", [3]), ([2, 0], [0, 2])):
        model = flash_plugin.swap_attention(LLAMA, layers=layers, chunk_size=CHUNK, **{**SIZES, "num_layers": 4})
        kinds = [isinstance(layer.attn, flash_plugin.MixedChunkMultiHeadAttention) for layer in model.layers]
        assert [index for index, kind in enumerate(kinds) if kind] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention": "flash"}, ["attention ('flash')", "mixed_chunk"]),
        ({"attention": "quadratic"}, ["local ('softmax')", "model.local=relu2"]),
        ({"local": "relu"}, ["relu", "relu2"]),
        ({"chunk_size": 0}, ["chunk_size (0)", "positive"]),
        ({"chunk_sise": 64}, ["chunk_sise (64)", "did you mean chunk_size?"]),
        ({"num_head": 4}, ["num_head (4)", "did you mean num_heads?"]),
        ({"layers": [0, 2]}, ["layers ([0, 2])", "0 to 1"]),
        ({"layers": []}, ["layers ([])", "at least one"]),
        ({"layers": "some"}, ["layers ('some')", "every_N"]),
        ({"layers": "every_3"}, ["layers ('every_3')", "2 there are"]),
        (
            {"builder": "torchtune.models.llama9.llama9"},
            ["builder ('torchtune.models.llama9.llama9')", "not to be found"],
        ),
        ({"builder": "torchtune.models.clip.clip_text_encoder"}, ["clip_text_encoder"]),
        ({"attention": "linear", "attn_dropout": 0.1}, ["attn_dropout (0.1)", "attn_dropout=0.0"]),
    ],
)
def test_bad_input_gets_a_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        flash_plugin.swap_attention(**{"builder": LLAMA, **SIZES, **arguments})
    for word in words:
        assert word in str(error.value)


def test_a_sliding_window_is_kept_or_refused() -> None:
    gemma = "torchtune.models.gemma2.gemma2"
    arguments = {**SIZES, **FAMILIES[gemma], "sliding_window_size": 32}
    flash_plugin.swap_attention(gemma, chunk_size=32, **arguments)
    flash_plugin.swap_attention(gemma, chunk_size=64, layers=[1], **arguments)
    with pytest.raises(ValueError, match=r"sliding window of 32 tokens.*chunk_size of at most 32"):
        flash_plugin.swap_attention(gemma, chunk_size=64, **arguments)


def test_a_model_with_nothing_to_swap_is_refused() -> None:
    with pytest.raises(ValueError, match="must have torchtune's self-attention"):
        flash_plugin.swap_attention("flash_plugin.flash_debug", num_layers=1)


def test_a_mask_that_positions_do_not_say_is_refused() -> None:
    model, text = swapped(), tokens(1, 8)
    with pytest.raises(ValueError, match="must be True to agree with"):
        model(text, mask=torch.eye(8, dtype=torch.bool)[None])


def test_a_padding_mask_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must not be a padding mask \[b, s\]"):
        swapped()(tokens(1, 8), mask=torch.tensor([[False] * 2 + [True] * 6]))


@pytest.mark.parametrize("position", [-1, 256])
def test_positions_lie_in_the_rotary_table(position: int) -> None:
    with pytest.raises(ValueError, match=rf"input_pos \({position}\) must lie in \[0, max_seq_len\)"):
        swapped()(tokens(1, 1), input_pos=torch.tensor([[position]]))


def test_layers_that_keep_their_attention_are_told_of_packed_documents() -> None:
    model, lengths = swapped(layers=[1]), (23, 14)
    texts = [tokens(1, length, seed=length) for length in lengths]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    together = logits(model, torch.cat(texts, dim=1), input_pos=position)
    for text, found in zip(texts, together.split(lengths, dim=1), strict=True):
        assert_close(found, logits(model, text), "law_fp32")


def test_part_of_a_global_path_is_no_checkpoint() -> None:
    weights = swapped().state_dict()
    del weights["layers.0.attn.global_path.key_scale.weight"]
    for partial in (weights, swapped(layers=[1]).state_dict()):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layers.0.attn.global_path.key_scale"):
            swapped().load_state_dict(partial)


def test_a_cache_wants_the_batch_it_was_set_up_for() -> None:
    model = swapped()
    model.setup_caches(2, torch.float32)
    where = torch.arange(4)[None].expand(3, -1)
    with pytest.raises(ValueError, match=r"tokens \(batch size 3\) must have the batch size of the cache \(2\)"):
        model(tokens(3, 4), input_pos=where, mask=torch.ones(256, 256, dtype=torch.bool).tril()[None, :4])


def test_a_cache_wants_positions() -> None:
    model = swapped()
    model.setup_caches(1, torch.float32)
    with pytest.raises(ValueError, match=r"input_pos \(None\) must be given while the cache is enabled"):
        model(tokens(1, 4), mask=torch.ones(1, 4, 256, dtype=torch.bool))
