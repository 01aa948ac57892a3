"""FLASH as transformers has it: the same logits, its own decoding, padding, and refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torchtune import generation
from transformers import AutoConfig, AutoModelForCausalLM

import flash_plugin
from flash_plugin.hugging_face import FlashConfig, FlashForCausalLM, FlashState, state
from tests.tolerances import assert_close

VOCABULARY = 40
SIZES = dict(vocab_size=VOCABULARY, num_layers=3, embed_dim=32, max_seq_len=256, qk_dim=16)
MODELS: dict[str, dict[str, Any]] = {
    "flash": dict(chunk_size=16, token_shift=True, position_bias="t5"),
    "sinusoid": dict(chunk_size=16, absolute_position=True, norm="layernorm", proj_bias=True, output_bias=True),
    "tied": dict(chunk_size=16, tie_embeddings=True, position_bias="rope", norm="scalenorm", expansion=1.5),
    "softmax": dict(chunk_size=16, attention_layers=[1], num_heads=4, num_kv_heads=2),
    "hybrid": dict(chunk_size=16, attention_layers=[0], quadratic_layers=[1], token_shift=True),
    "quad": dict(family="flash_quad", position_bias="toeplitz"),
}


def build(name: str = "flash", **options: Any) -> FlashForCausalLM:
    """A model with weights large enough that each token matters to the next."""
    torch.manual_seed(0)
    built = FlashForCausalLM(FlashConfig(**{**SIZES, **MODELS[name], **options})).eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            if "offset_scale" in key or "position_bias" in key:
                parameter.normal_(std=0.6)
            elif "output_proj.weight" in key:
                parameter.mul_(20)  # what layers add outweighs the embedding, whose token would follow itself
    return built


def draw(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def greedy(model: FlashForCausalLM, tokens: Tensor, steps: int) -> Tensor:
    """The most likely token again and again, each time computed from the whole text by the decoder itself."""
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, model.model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_gives_the_same_logits_under_torchtunes_names(name: str, tmp_path: Path) -> None:
    model, tokens = build(name), draw(2, 70)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is FlashForCausalLM
    with torch.no_grad():
        expected = model.model(tokens)
        assert torch.equal(loaded(tokens).logits, expected)
        assert torch.equal(model(tokens, return_dict=False)[0], expected)
        model.config.return_dict = False
        assert torch.equal(model(tokens)[0], expected) and torch.equal(model(tokens, return_dict=True).logits, expected)
    weights, own = load_file(tmp_path / "model.safetensors"), model.model.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], own[key]) for key in own)
    # torchtune's side reads the same folder.
    arguments = dict(
        output_dir=str(tmp_path.with_name("out")), checkpoint_dir=str(tmp_path), init_model=model.config.node()
    )
    read = flash_plugin.FlashCheckpointer(checkpoint_files=["model.safetensors"], **arguments).load_checkpoint()[
        "model"
    ]
    assert all(torch.equal(read[key], own[key]) for key in own)


def test_a_loaded_model_saves_what_it_loaded(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("model-*-of-*.safetensors"))) > 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "c")
    first, last = (sorted((tmp_path / name).iterdir()) for name in "ac")
    assert [path.name for path in first] == [path.name for path in last]
    assert all(a.read_bytes() == c.read_bytes() for a, c in zip(first, last, strict=True))


def test_the_dtype_is_what_is_asked_for(tmp_path: Path) -> None:
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    output = model.generate(draw(1, 5), max_new_tokens=30, do_sample=False)
    assert output.shape == (1, 35)


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_holds_every_argument_of_the_builder(name: str, tmp_path: Path) -> None:
    config = build(name).config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    signature = inspect.signature(getattr(flash_plugin, config.family))
    given = {key: value for key, value in {**SIZES, **MODELS[name]}.items() if key != "family"}
    for key, parameter in signature.parameters.items():
        assert written[key] == given.get(key, parameter.default), key
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict() == written
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 3, 256)
    assert config.tie_word_embeddings == ("tie_embeddings" in MODELS[name])
    assert FlashConfig.from_node(config.node()).to_diff_dict() == config.to_diff_dict()


def test_a_size_becomes_its_numbers() -> None:
    config = FlashConfig.from_node({"_component_": "flash_plugin.flash_quad_125m", "max_seq_len": 512})
    assert (config.family, config.num_layers, config.embed_dim, config.max_seq_len) == ("flash_quad", 24, 768, 512)
    assert config.tie_embeddings
    with torch.device("meta"):
        assert config.build().state_dict().keys() == flash_plugin.flash_quad_125m(max_seq_len=512).state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_greedy_decoding_with_a_prompt_and_then_single_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_FIRST_CAPACITY", 32)  # caches that grow do so twice
    model, prompt = build(name), draw(1, 21)
    fed = []
    model.model.register_forward_pre_hook(lambda _module, arguments: fed.append(arguments[0].shape[1]))
    details = dict(output_logits=True, return_dict_in_generate=True)
    generated = model.generate(prompt, max_new_tokens=80, do_sample=False, **details)
    assert fed == [21] + [1] * 79
    with torch.no_grad():
        expected = model.model(generated.sequences)[:, 20:-1]
    assert_close(torch.stack(generated.logits, dim=1), expected, "law_fp32")
    assert torch.equal(generated.sequences[:, 21:], expected.argmax(-1))
    assert len(set(generated.sequences[0, 21:].tolist())) > 3
    assert not model.model.caches_are_setup()
    # And so does torchtune, whose recipe does this.
    model.model.setup_caches(1, torch.float32, decoder_max_seq_len=101)
    theirs, _ = generation.generate(model.model, prompt, max_generated_tokens=80, pad_id=VOCABULARY, top_k=1)
    assert torch.equal(generated.sequences, theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [dict(do_sample=True, num_return_sequences=2), dict(num_beams=3, do_sample=False)])
def test_draws_and_beams_of_padded_prompts_do_not_depend_on_the_state(name: str, options: dict[str, Any]) -> None:
    model, prompts = build(name), draw(3, 30)
    padding = torch.ones_like(prompts)
    padding[1, :9], padding[2, :29] = 0, 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        inputs = dict(attention_mask=padding, use_cache=use_cache, max_new_tokens=25)
        results.append(model.generate(prompts, **inputs, **options))
    assert torch.equal(*results)
    assert len({tuple(row[30:].tolist()) for row in results[0]}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_prompts_padded_on_the_left_are_continued_as_alone(name: str) -> None:
    model, prompts, lengths = build(name), draw(4, 40), (40, 33, 7, 1)
    padding = (torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]).long()
    together = model.generate(prompts, attention_mask=padding, max_new_tokens=40, do_sample=False)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row, 40 - length :], greedy(model, prompts[row : row + 1, 40 - length :], 40)[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_score(name: str, side: str) -> None:
    model, tokens, lengths = build(name), draw(3, 3), (1, 2, 3)
    for real_length in lengths[:2]:
        tokens = draw(3, 3 * real_length)
        kept = real_length * torch.tensor(lengths)[:, None]
        index = torch.arange(tokens.shape[1])
        real = index < kept if side == "right" else index >= tokens.shape[1] - kept
        with torch.no_grad():
            found = model(tokens, attention_mask=real.long()).logits
            for row in range(3):
                alone = model.model(tokens[row : row + 1, real[row]])
                assert_close(found[row : row + 1, real[row]], alone, "law_fp32")


def test_positions_that_restart_are_documents() -> None:
    model, tokens = build(), draw(1, 30)
    lengths = (11, 19)
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=position).logits
        padded = model(
            torch.cat([draw(1, 4), tokens], 1),
            position_ids=torch.cat([torch.ones(1, 4).long(), position], 1),  # what generation gives padding
            attention_mask=torch.tensor([[0] * 4 + [1] * 30]),
        ).logits[:, 4:]
        alone = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone, "law_fp32")
    assert_close(padded, alone, "law_fp32")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["flash", "hybrid"])
def test_a_state_goes_on_where_it_was(name: str, masked: bool) -> None:
    model, tokens = build(name), draw(2, 60)
    padding = torch.ones(2, 60).long()
    padding[1, :5] = 0

    def mask(stop: int) -> Tensor | None:
        return padding[:, :stop] if masked or stop == 23 else None

    with torch.no_grad():
        expected = model(tokens, attention_mask=padding).logits
        first = model(tokens[:, :23], attention_mask=mask(23), use_cache=True)
        second = model(tokens[:, 23:58], attention_mask=mask(58), past_key_values=first.past_key_values)
        third = model(tokens[:, 58:], attention_mask=mask(60), past_key_values=second.past_key_values)
    assert third.past_key_values.get_seq_length() == 60
    found = torch.cat([part.logits for part in (first, second, third)], dim=1)
    assert_close(found[padding.bool()], expected[padding.bool()], "law_fp32")


def test_the_state_of_flash_does_not_grow() -> None:
    def size(name: str, tokens: int) -> int:
        model = build(name)
        held = model(draw(1, tokens), use_cache=True).past_key_values
        return sum(buffer.numel() for cache in held._caches for buffer in cache.buffers())

    with torch.no_grad():
        assert size("flash", 3) == size("flash", 256)
        assert size("quad", 3) == size("quad", 256)  # its first size
        model = build("flash", unlimited_decoding=True, position_bias="none")
        assert model.generate(draw(1, 250), max_new_tokens=20, do_sample=False).shape == (1, 270)


def test_a_dialogue_goes_on_with_its_state() -> None:
    model, prompt = build("hybrid"), draw(1, 20)
    first = model.generate(prompt, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, draw(1, 7)], dim=1)
    fed = []
    model.model.register_forward_pre_hook(lambda _module, arguments: fed.append(arguments[0].shape[1]))
    options = dict(past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(longer, **options), greedy(model, longer, 10))
    assert fed[:10] == [8] + [1] * 9  # the last token of the answer was not fed yet


def test_the_loss_is_that_of_the_next_token() -> None:
    model, tokens = build(), draw(2, 12)
    labels = tokens.clone()
    labels[0, :5] = -100
    output = model(tokens, labels=labels)
    expected = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, "pair_fp32")
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_can_be_resized_unless_they_are_tied() -> None:
    model = build()
    model.resize_token_embeddings(VOCABULARY + 2)
    assert model(torch.tensor([[VOCABULARY + 1]])).logits.shape == (1, 1, VOCABULARY + 2)
    with pytest.raises(ValueError, match=r"tie_embeddings \(True\) must be False to replace"):
        build("tied").resize_token_embeddings(VOCABULARY + 2)


def call(**arguments: Any) -> Callable[[], object]:
    return lambda: build()(draw(2, 6), **arguments)


def configured(name: str) -> Callable[[], object]:
    def run() -> object:
        model = build()
        setattr(model.config, name, True)
        assert model(draw(1, 4), **{name: False}).logits.shape == (1, 4, VOCABULARY)  # the call has the last word
        return model(draw(1, 4))  # does not mention it

    return run


def set_up_caches(model: FlashForCausalLM) -> FlashForCausalLM:
    model.model.setup_caches(1, torch.float32)
    return model


HOLE, RIGHT = torch.tensor([[1] * 6, [1, 0, 1, 1, 1, 1]]), torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0]])
NODE = {"_component_": "flash_plugin.lora_flash_debug", "lora_attn_modules": ["v_proj"]}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda: FlashConfig(**{**SIZES, "chunk_sise": 8}),
            r"chunk_sise \(8\) is not an argument .* mean chunk_size\?",
        ),
        (lambda: FlashConfig("flash_quad", **SIZES, chunk_size=8), r"chunk_size \(8\) is not an argument of .*quad"),
        (lambda: FlashConfig("gau", **SIZES), r"family \('gau'\) must be one of flash, flash_quad"),
        (lambda: FlashConfig(vocab_size=3), "missing a required argument: 'num_layers'"),
        (lambda: FlashConfig.from_node(NODE), r"model._component_ \(flash_plugin.lora_flash_debug\) must be"),
        (lambda: build(chunk_size=0), r"chunk_size \(0\) must be a positive integer"),
        (lambda: build(causal=False), r"causal \(False\) must be True, since a bidirectional model"),
        (call(attention_mask=HOLE), "padding between real tokens"),
        (call(attention_mask=RIGHT, use_cache=True), "set tokenizer.padding_side='left'"),
        (call(attention_mask=torch.ones(2, 5)), r"attention_mask \(shape \(2, 5\)\) must be \[2, 6\]"),
        (call(attention_mask=torch.ones(2, 6)), r"attention_mask \(torch.float32\) must hold 1 at real tokens"),
        (call(output_attentions=True), "output_attentions and output_hidden_states must be left out"),
        (configured("output_hidden_states"), "must be left out, of the call and of model.config"),
        (configured("output_attentions"), "must be left out, of the call and of model.config"),
        (lambda: build().generate(draw(1, 9), output_hidden_states=True, return_dict_in_generate=True), "left out"),
        (lambda: set_up_caches(build())(draw(1, 9)), r"call torchtune.modules.delete_kv_caches\(model.model\) first"),
        (
            lambda: build("quad").generate(draw(1, 250), max_new_tokens=20),
            r"\(257 tokens a row, .* max_seq_len \(256\)",
        ),
        (lambda: build().generate(draw(1, 9), position_ids=torch.arange(9)[None]), "not used by the model"),
        (lambda: build().generate(draw(1, 9), prompt_lookup_num_tokens=2), "not supported with stateful models"),
    ],
)
def test_what_cannot_be_honoured_is_refused(refused: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refused()


@pytest.mark.parametrize(("change", "words"), [("missing", "1 missing: "), ("more", "1 unexpected: more")])
def test_weights_that_do_not_fit_are_refused(change: str, words: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del weights["layers.1.attn.v_proj.weight"]
    else:
        weights["more"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"must fit config.json, and do not .{words}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_is_reordered_row_by_row() -> None:
    for name in MODELS:
        model, tokens = build(name), draw(3, 20)
        order = torch.tensor([2, 2, 0])
        with torch.no_grad():
            held = FlashState(model.model, 3)
            model(tokens, past_key_values=held)
            held.reorder_cache(order)
            found = model(tokens[:, :1], past_key_values=held).logits
            expected = model(torch.cat([tokens[order], tokens[:, :1]], dim=1)).logits[:, -1:]
        assert_close(found, expected, "law_fp32")
