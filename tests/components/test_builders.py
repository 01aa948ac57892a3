"""Builders: parameter counts, names of sizes, and what torchtune's utilities find in a model."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune import training
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

import flash_plugin
from flash_plugin.components.sizes import SIZED_BUILDERS, SIZES

TINY = dict(vocab_size=40, num_layers=3, embed_dim=32, max_seq_len=64, qk_dim=16)


def tiny(family: str = "flash", **arguments: object) -> flash_plugin.FlashDecoder:
    if family == "flash":
        arguments = {"chunk_size": 8, **arguments}
    return getattr(flash_plugin, family)(**{**TINY, **arguments})


def expected_parameters(family: str, size: dict[str, int]) -> int:
    d, z, vocabulary, layers = size["embed_dim"], size.get("qk_dim", 128), size["vocab_size"], size["num_layers"]
    projections = 4 if family == "flash" else 2
    layer = 3 * d * (2 * d) + d * z + 2 * projections * z + d + 32  # 3de + dz, gamma and beta, norm, T5 buckets
    embeddings = vocabulary * d * (1 if size.get("tie_embeddings") else 2)
    return layers * layer + embeddings + d


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_parameters_of_the_formula_and_of_their_name(family: str, size: str) -> None:
    with torch.device("meta"):
        model = getattr(flash_plugin, f"{family}_{size}")()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == expected_parameters(family, SIZES[size])
    if size != "debug":
        claimed = float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]]
        assert abs(count / claimed - 1) < 0.05


def test_every_sized_builder_is_a_public_name() -> None:
    assert {name for name in flash_plugin.__all__ if name.split("_")[-1] in SIZES} == set(SIZED_BUILDERS)


def test_a_size_accepts_every_argument_of_its_family() -> None:
    model = flash_plugin.flash_debug(num_layers=1, activation="laplace", chunk_size=32, tie_embeddings=True)
    assert model.layers[0].attn.mixer.activation == "laplace"
    assert model.layers[0].attn.mixer.chunk_size == 32


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_activation_checkpointing_wraps_every_layer_and_changes_nothing(family: str) -> None:
    model = tiny(family)
    wrapped = copy.deepcopy(model)
    training.set_activation_checkpointing(wrapped, auto_wrap_policy={TransformerSelfAttentionLayer})
    assert sum(isinstance(module, CheckpointWrapper) for module in wrapped.modules()) == TINY["num_layers"]
    tokens = torch.randint(TINY["vocab_size"], (2, 30))
    for each in (model, wrapped):
        each(tokens).square().mean().backward()
    for plain, checkpointed in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(plain.grad, checkpointed.grad)


def test_compile_compiles_every_layer() -> None:
    model = tiny()
    assert all(layer._compiled_call_impl is None for layer in model.layers)
    training.compile_model(model, verbose=False)
    assert all(layer._compiled_call_impl is not None for layer in model.layers)


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_a_layer_is_one_graph_with_and_without_segments(family: str) -> None:
    model = tiny(family, position_bias="t5", token_shift=True)
    layer, x = model.layers[0], torch.randn(2, 21, TINY["embed_dim"])
    segments = flash_plugin.kernels.make_segments(torch.cat([torch.arange(9), torch.arange(12)]).expand(2, -1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x, segments=segments), layer(x, segments=segments))


def test_fsdp_finds_every_layer() -> None:
    model = tiny()
    found = [name for name, module in model.named_modules() if training.get_shard_conditions(name, module)]
    assert found == [f"layers.{i}" for i in range(TINY["num_layers"])]


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_model_built_on_the_meta_device_loads_and_equals_the_original(family: str, tie: bool) -> None:
    arguments = dict(tie_embeddings=tie, absolute_position=True, position_bias="rope")
    original = tiny(family, **arguments)
    with torch.device("meta"):
        model = tiny(family, **arguments)
    # As torchtune's distributed recipe does it.
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()
    training.load_from_full_model_state_dict(model, original.state_dict(), torch.device("cpu"), strict=True)
    training.validate_no_params_on_meta_device(model)
    tokens = torch.randint(TINY["vocab_size"], (1, 20))
    torch.testing.assert_close(model(tokens), original(tokens))


def test_a_tied_output_reads_the_table_from_within_a_call_of_the_embedding() -> None:
    model, tokens = tiny(tie_embeddings=True), torch.randint(TINY["vocab_size"], (1, 20))
    expected, embedding = model(tokens), model.tok_embeddings
    table, shard = embedding.weight, nn.Parameter(embedding.weight[:1].detach())
    # What FSDP does to a module that it shards by itself.
    embedding.register_forward_pre_hook(lambda module, _: setattr(module, "weight", table))
    embedding.register_forward_hook(lambda module, *_: setattr(module, "weight", shard))
    embedding.weight = shard
    torch.testing.assert_close(model(tokens), expected)
    assert isinstance(model.output, TiedLinear)  # what torchtune's activation offloading looks for


def test_a_model_is_what_the_evaluation_recipe_asks_for() -> None:
    model = tiny()
    assert isinstance(model, TransformerDecoder)
    assert all(isinstance(layer, TransformerSelfAttentionLayer) for layer in model.layers)
    assert (model.num_heads, model.head_dim, model.max_seq_len) == (1, TINY["qk_dim"], TINY["max_seq_len"])
    assert not model.caches_are_setup() and not model.caches_are_enabled()


def test_chunked_output_holds_the_same_logits() -> None:
    model, tokens = tiny(), torch.randint(TINY["vocab_size"], (2, 32))
    whole = model(tokens)
    model.set_num_output_chunks(4)
    torch.testing.assert_close(torch.cat([chunk.float() for chunk in model(tokens)], dim=1), whole)


def test_initial_weights_depend_on_the_seed_and_the_name_alone() -> None:
    first, second, other = tiny(), tiny(num_layers=2), tiny()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    flash_plugin.initialize_weights(first, seed=1)
    flash_plugin.initialize_weights(second, seed=1)
    flash_plugin.initialize_weights(other, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    # The number of layers scales what is written into the residual stream, and nothing else.
    for name, parameter in second.named_parameters():
        if "output_proj" not in name:
            assert torch.equal(parameter, first.get_parameter(name)), name
    assert not torch.equal(first.tok_embeddings.weight, other.tok_embeddings.weight)


def test_a_bfloat16_model_starts_as_the_rounded_float32_model() -> None:
    wide, narrow = tiny(), tiny().bfloat16()
    for model in (wide, narrow):
        flash_plugin.initialize_weights(model, seed=3)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))


def test_a_module_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv1d.weight has no initialisation rule"):
        flash_plugin.initialize_weights(nn.Conv1d(1, 1, 1), seed=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(chunk_size=0), ["chunk_size (0)", "positive integer", "chunk_size="]),
        (dict(chunk_size=-4), ["chunk_size (-4)", "positive integer"]),
        (dict(rope_dim=7), ["rope_dim (7)", "even", "rope_dim=6"]),
        (dict(rope_dim=32), ["rope_dim (32)", "qk_dim (16)", "qk_dim=32"]),
        (dict(qk_dim=15), ["rope_dim (15)", "even"]),
        (dict(activation="gelu"), ["activation ('gelu')", "relu2, laplace, softplus2, softmax"]),
        (dict(normalizer="none"), ["normalizer ('none')", "visible, paper, chunk"]),
        (dict(position_bias="alibi"), ["position_bias ('alibi')", "none, rope, toeplitz, t5"]),
        (dict(norm="batchnorm"), ["norm ('batchnorm')", "rmsnorm, layernorm, scalenorm"]),
        (dict(norm_eps=0.0), ["norm_eps (0.0)", "between 0 and 1"]),
        (dict(norm_eps="1e-6"), ["norm_eps ('1e-6')", "number", "1.0e-6"]),
        (dict(norm_eps=float("nan")), ["norm_eps (nan)"]),
        (dict(chunk_size=0, position_bias="toeplitz"), ["chunk_size (0)", "positive integer"]),
        (dict(rope_base=0.5), ["rope_base (0.5)", "at least 1"]),
        (dict(rope_dim="abc"), ["rope_dim ('abc')", "even"]),
        (dict(qk_dim=15, rope_dim=0, position_bias="rope"), ["qk_dim (15)", "even"]),
        (dict(expansion="2"), ["expansion ('2')", "number"]),
        (dict(causal="False"), ["causal ('False')", "True or False"]),
        (dict(final_norm=""), ["norm ('')", "rmsnorm"]),
        (dict(attn_dropout="a"), ["dropout ('a')", "[0, 1)"]),
        (dict(attn_dropout=1.0), ["dropout (1.0)", "[0, 1)"]),
        (dict(num_layers=0), ["num_layers (0)", "positive integer"]),
        (dict(vocab_size=-1), ["vocab_size (-1)", "positive integer"]),
        (dict(expansion=0.0), ["expansion (0.0)", "positive"]),
        (dict(embed_dim=33, absolute_position=True), ["embed_dim (33)", "even", "absolute_position=False"]),
        (dict(tie_embeddings=True, output_bias=True), ["output_bias (True)", "tie_embeddings"]),
        (dict(impl="cuda"), ["impl ('cuda')", "auto, triton, reference"]),
        (dict(chunck_size=8), ["chunck_size (8)", "did you mean chunk_size?"]),
    ],
)
def test_bad_arguments_get_a_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ValueError, match="missing a required keyword-only argument: 'vocab_size'|vocab_size"):
        flash_plugin.flash(num_layers=1, embed_dim=8, max_seq_len=8)
