"""Adapters: where they sit, that they begin at nothing, merge, and load as torchtune's recipes load them."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import (
    DoRALinear,
    LoRALinear,
    disable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    get_merged_lora_ckpt,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)

import flash_plugin
from flash_plugin.components.checkpointer import ADAPTER_FILE, MODEL_FILE, FlashCheckpointer
from flash_plugin.components.peft import adapter_keys
from flash_plugin.components.sizes import SIZES
from tests.components.decoding import feed
from tests.tolerances import assert_close

TINY = dict(vocab_size=40, num_layers=2, embed_dim=32, max_seq_len=64, qk_dim=16)
RANK, ALPHA = 4, 12
PROJECTIONS = ["gate_proj", "v_proj", "qk_proj", "output_proj"]
FAMILIES = ["flash", "flash_quad"]
KINDS = [
    pytest.param(dict(), id="lora"),
    pytest.param(dict(use_dora=True, tie_embeddings=True), id="dora-tied"),
    pytest.param(dict(apply_lora_to_output=True, proj_bias=True, output_bias=True), id="lora-biases"),
    pytest.param(dict(apply_lora_to_output=True, use_dora=True, lora_attn_modules=["v_proj"]), id="dora-output"),
    pytest.param(dict(quantize_base=True, lora_attn_modules=["v_proj", "qk_proj"]), id="qlora"),
    pytest.param(dict(quantize_base=True, use_dora=True), id="qdora"),
]


def sized(family: str, arguments: dict[str, object]) -> dict[str, object]:
    chunks = {"chunk_size": 8} if family == "flash" else {}
    # 128 x 128 numbers fill one block of NF4.
    wide = {"embed_dim": 128, "qk_dim": 128} if arguments.get("quantize_base") else {}
    return {**TINY, **chunks, **wide, **arguments}


def lively(model: flash_plugin.FlashDecoder) -> flash_plugin.FlashDecoder:
    """``model`` with queries and keys that are not nearly zero, as initial ones are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and any(part in name for part in ("offset_scale", "position_bias")):
                parameter.normal_(std=0.6)
    return model


def plain(family: str = "flash", **arguments: object) -> flash_plugin.FlashDecoder:
    taken = inspect.signature(getattr(flash_plugin, family)).parameters
    fits = {name: value for name, value in sized(family, arguments).items() if name in taken}
    return lively(getattr(flash_plugin, family)(**fits))


def adapted(family: str = "flash", **arguments: object) -> flash_plugin.FlashDecoder:
    adapters = {"lora_attn_modules": PROJECTIONS, "lora_rank": RANK, "lora_alpha": ALPHA}
    return lively(getattr(flash_plugin, f"lora_{family}")(**{**adapters, **sized(family, arguments)}))


def load_as_recipes_do(model: flash_plugin.FlashDecoder, base: dict[str, torch.Tensor], names: list[str]) -> None:
    """Weights without adapters into a model with them, with torchtune's own check of what is missing."""
    missing, unexpected = model.load_state_dict(base, strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    validate_missing_and_unexpected_for_lora(
        [name for name in names if name != "output"],
        False,
        "output" in names,
        base_missing=missing,
        base_unexpected=unexpected,
    )


def train_a_little(model: flash_plugin.FlashDecoder) -> None:
    """Give every adapter values that a run might have."""
    with torch.no_grad():
        for name, parameter in get_adapter_params(model).items():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter)) if "magnitude" in name else parameter.normal_(std=0.1)


def tokens(rows: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [["v_proj"], ["qk_proj", "output_proj"], [*PROJECTIONS, "output"], ["output"]])
def test_what_is_named_gets_adapters_and_nothing_else(family: str, names: list[str]) -> None:
    modules = [name for name in names if name != "output"]
    model = adapted(family, lora_attn_modules=modules, apply_lora_to_output="output" in names)
    places = [f"layers.{layer}.attn.{name}" for layer in range(TINY["num_layers"]) for name in modules]
    places += ["output"] * ("output" in names)
    expected = {f"{place}.lora_{which}.weight" for place in places for which in "ab"}
    assert set(get_adapter_params(model)) == set(adapter_keys(model)) == expected
    assert {name for name, module in model.named_modules() if isinstance(module, LoRALinear)} == set(places)
    assert model.state_dict().keys() - expected == plain(family).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", KINDS)
def test_adapters_begin_at_nothing_and_merge(family: str, arguments: dict[str, object]) -> None:
    base, model = plain(family, **arguments), adapted(family, **arguments)
    names = [
        *arguments.get("lora_attn_modules", PROJECTIONS),
        *["output"] * bool(arguments.get("apply_lora_to_output")),
    ]
    load_as_recipes_do(model, base.state_dict(), names)
    if arguments.get("quantize_base"):
        base.load_state_dict({name: value for name, value in model.state_dict().items() if name in base.state_dict()})
    unadapted = base(tokens())
    assert_close(model(tokens()), unadapted, "parity_fp32")

    train_a_little(model)
    logits = model(tokens())
    assert (logits - unadapted).abs().max() > 0.01 * unadapted.abs().max()
    with disable_adapter(model):
        assert_close(model(tokens()), unadapted, "parity_fp32")
    merged = get_merged_lora_ckpt(dict(model.state_dict()), RANK, ALPHA)
    base.load_state_dict(merged, strict=True)
    assert_close(base(tokens()), logits, "parity_fp32")


@torch.no_grad()
def test_merging_as_recipes_do_leaves_the_model_alone() -> None:
    model = adapted(apply_lora_to_output=True)
    train_a_little(model)
    logits = model(tokens())
    get_merged_lora_ckpt({name: weights.cpu() for name, weights in model.state_dict().items()}, RANK, ALPHA)
    assert torch.equal(model(tokens()), logits)
    # Whoever asks for the parameters themselves still gets them.
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("mlp", [True, False])
def test_transformer_layers_beside_flash_take_adapters_too(mlp: bool) -> None:
    hybrid = dict(attention_layers=[1])
    names = ["q_proj", "k_proj", "output_proj"]
    base, model = plain(**hybrid), adapted(**hybrid, lora_attn_modules=names, apply_lora_to_mlp=mlp)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    validate_missing_and_unexpected_for_lora(names, mlp, False, base_missing=missing, base_unexpected=unexpected)
    places = ["layers.0.attn.output_proj", *(f"layers.1.attn.{name}" for name in names)]
    places += [f"layers.1.mlp.w{i}" for i in (1, 2, 3)] * mlp
    assert {name for name, module in model.named_modules() if isinstance(module, LoRALinear)} == set(places)
    assert_close(model(tokens()), base(tokens()), "parity_fp32")
    train_a_little(model)
    base.load_state_dict(get_merged_lora_ckpt(dict(model.state_dict()), RANK, ALPHA), strict=True)
    assert_close(base(tokens()), model(tokens()), "parity_fp32")


def test_the_magnitude_is_the_length_of_the_loaded_rows() -> None:
    base, model = plain(), adapted(use_dora=True)
    load_as_recipes_do(model, base.state_dict(), PROJECTIONS)
    for layer, other in zip(model.layers, base.layers, strict=True):
        assert isinstance(layer.attn.v_proj, DoRALinear)
        assert_close(layer.attn.v_proj.magnitude, other.attn.v_proj.weight.norm(dim=1), "pair_fp32")


def test_a_magnitude_that_was_loaded_stays() -> None:
    original = adapted(use_dora=True)
    train_a_little(original)
    with torch.device("meta"):
        model = adapted(use_dora=True)
    # As lora_finetune_distributed resumes: adapters, then the base, then the magnitudes.
    load_as_recipes_do(model.to_empty(device="cpu"), original.state_dict(), PROJECTIONS)
    for name, parameter in get_adapter_params(original).items():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_only_the_base_of_the_layers_is_quantized() -> None:
    model = adapted(quantize_base=True, lora_attn_modules=["v_proj"], apply_lora_to_output=True)
    places = {f"layers.{layer}.attn.{name}.weight" for layer in range(TINY["num_layers"]) for name in PROJECTIONS}
    assert {name for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)} == places
    state = model.state_dict()
    assert all(type(state[place]) is torch.Tensor and state[place].dtype == torch.float32 for place in places)
    set_trainable_params(model, get_adapter_params(model))
    model(tokens()).square().mean().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == set(adapter_keys(model))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_laws_hold_with_adapters(family: str) -> None:
    model = adapted(family, position_bias="t5", token_shift=True, apply_lora_to_output=True).eval()
    train_a_little(model)
    whole = model(tokens(2, 40))
    assert_close(model(tokens(2, 40)[:, :21]), whole[:, :21], "law_fp32")
    packed = model(tokens(2, 40), input_pos=torch.cat([torch.arange(13), torch.arange(27)]).expand(2, -1))
    assert_close(packed[:, 13:], model(tokens(2, 40)[:, 13:]), "law_fp32")
    padding = torch.arange(40) >= 9
    assert_close(model(tokens(2, 40), mask=padding.expand(2, -1))[:, 9:], model(tokens(2, 40)[:, 9:]), "law_fp32")
    model.setup_caches(2, torch.float32, decoder_max_seq_len=40)
    assert_close(feed(model, tokens(2, 40), torch.arange(40)[None], [11, *[1] * 29]), whole, "law_fp32")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", KINDS)
def test_a_model_built_on_the_meta_device_loads_and_equals_the_original(
    family: str, arguments: dict[str, object]
) -> None:
    original = adapted(family, **arguments)
    train_a_little(original)
    # As lora_finetune_distributed does it; a base that holds adapters gives them their values.
    with torch.device("meta"):
        model = adapted(family, **arguments)
    for module in model.modules():
        if isinstance(module, LoRALinear | DoRALinear):
            module.to_empty(device="cpu")
            module.initialize_parameters()
        if hasattr(module, "rope_init"):
            module.rope_init()
    if arguments.get("quantize_base"):
        # The recipe's loader quantizes what FSDP has sharded; one process without FSDP has to assign.
        model.load_state_dict(dict(original.named_parameters()), assign=True)
    else:
        training.load_from_full_model_state_dict(model, original.state_dict(), torch.device("cpu"), strict=True)
    training.validate_no_params_on_meta_device(model)
    torch.testing.assert_close(model(tokens()), original(tokens()))


@pytest.mark.parametrize("arguments", KINDS)
def test_activation_checkpointing_changes_nothing(arguments: dict[str, object]) -> None:
    model = adapted(**arguments)
    train_a_little(model)
    wrapped = copy.deepcopy(model)
    training.set_activation_checkpointing(wrapped, auto_wrap_policy={TransformerSelfAttentionLayer})
    for each in (model, wrapped):
        set_trainable_params(each, get_adapter_params(each))
        each(tokens()).square().mean().backward()
    compared = 0
    for direct, checkpointed in zip(model.parameters(), wrapped.parameters(), strict=True):
        assert (direct.grad is None) == (checkpointed.grad is None)
        if direct.grad is not None:
            torch.testing.assert_close(direct.grad, checkpointed.grad)
            compared += 1
    assert compared == len(get_adapter_params(model))


def test_without_modules_recipes_train_everything(tmp_path: Path) -> None:
    node = {"_component_": "flash_plugin.lora_flash", "lora_attn_modules": [], **sized("flash", {})}
    model = adapted(lora_attn_modules=[])
    assert model.state_dict().keys() == plain().state_dict().keys()
    for each in (model, copy.deepcopy(model)):
        found = get_adapter_params(each)
        assert all(found[name] is parameter for name, parameter in each.named_parameters())
    assert not adapter_keys(model)

    # From scratch it starts as the plain model does.
    def scratch(init_model: dict[str, object]) -> dict[str, torch.Tensor]:
        checkpointer = FlashCheckpointer(output_dir=str(tmp_path), init_model=init_model, init_seed=3)
        return dict(checkpointer.load_checkpoint()[training.MODEL_KEY])

    weights = scratch(node)
    expected = scratch({"_component_": "flash_plugin.flash", **sized("flash", {})})
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    # Recipes hand over, and want back, adapters that are not there.
    saver = FlashCheckpointer(output_dir=str(tmp_path), init_model=node)
    state = {training.MODEL_KEY: weights, training.ADAPTER_KEY: get_adapter_state_dict(weights), training.EPOCHS_KEY: 1}
    saver.save_checkpoint(state, 0, intermediate_checkpoint=True)
    assert (tmp_path / "epoch_0" / MODEL_FILE).is_file() and not (tmp_path / "epoch_0" / ADAPTER_FILE).exists()
    resumed = FlashCheckpointer(output_dir=str(tmp_path), init_model=node, should_load_recipe_state=True)
    checkpoint = resumed.load_checkpoint()
    assert checkpoint[training.ADAPTER_KEY] == {}
    assert all(torch.equal(weights[name], checkpoint[training.MODEL_KEY][name]) for name in weights)
    with pytest.raises(ValueError, match=r"adapter_only \(True\) must come with adapter weights"):
        saver.save_checkpoint(state, 0, adapter_only=True)


@pytest.mark.parametrize("kind", [dict(), dict(use_dora=True), dict(quantize_base=True)])
def test_the_checkpointer_loads_a_base_for_a_model_with_adapters(tmp_path: Path, kind: dict[str, object]) -> None:
    arguments = {"lora_attn_modules": ["v_proj"], **sized("flash", kind)}
    node = {"_component_": "flash_plugin.lora_flash", **arguments}
    (tmp_path / "base").mkdir()
    base = plain(**kind).state_dict()
    files = dict(
        checkpoint_dir=str(tmp_path / "base"), checkpoint_files=["base.pt"], output_dir=str(tmp_path / "output")
    )
    torch.save(base, tmp_path / "base" / "base.pt")
    loaded = FlashCheckpointer(**files, init_model=node).load_checkpoint()[training.MODEL_KEY]
    assert loaded.keys() == base.keys()
    with pytest.raises(ValueError, match="1 missing: layers.0.attn.gate_proj.weight"):
        base.pop("layers.0.attn.gate_proj.weight")
        torch.save(base, tmp_path / "base" / "base.pt")
        FlashCheckpointer(**files, init_model=node).load_checkpoint()
    with pytest.raises(ValueError, match="whose adapters cannot mend random ones"):
        FlashCheckpointer(output_dir=str(tmp_path / "output"), init_model=node).load_checkpoint()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_takes_adapters(family: str, size: str) -> None:
    with torch.device("meta"):
        base = getattr(flash_plugin, f"{family}_{size}")()
        model = getattr(flash_plugin, f"lora_{family}_{size}")(["v_proj"], lora_rank=16)
    width = SIZES[size]["embed_dim"]
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert added == SIZES[size]["num_layers"] * 16 * 3 * width


def test_a_layer_with_adapters_is_one_graph() -> None:
    layer, x = adapted().layers[0], torch.randn(2, 21, TINY["embed_dim"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
