"""The int8 quantizers: what becomes int8 and how exactly, what stays, and which weights a quantized model refuses."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torchtune.utils
from torch import Tensor, nn
from torchtune import training
from torchtune.training.quantization import Int8DynActInt4WeightQATQuantizer, get_quantizer_mode

import flash_plugin
from flash_plugin import FlashCheckpointer, Int8DynActInt8WeightQuantizer, Int8WeightOnlyQuantizer
from flash_plugin.components.quantizers import Int8Quantizer, quantization_of
from tests.tolerances import assert_close

NODE: dict[str, Any] = {
    "vocab_size": 67,
    "num_layers": 2,
    "embed_dim": 64,
    "max_seq_len": 64,
    "qk_dim": 32,
    "chunk_size": 16,
    "position_bias": "t5",
    "proj_bias": True,
}
TOKENS = torch.arange(96).view(2, 48) * 7 % 67
BOTH = pytest.mark.parametrize("quantizer", [Int8WeightOnlyQuantizer, Int8DynActInt8WeightQuantizer])


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    with training.set_default_dtype(dtype):
        return flash_plugin.flash(**NODE | changes).eval()


def debug_model(dtype: torch.dtype) -> nn.Module:
    with training.set_default_dtype(dtype):
        return flash_plugin.flash_debug()


def restored(weight: Tensor) -> Tensor:
    """What a quantized weight stands for, from its integers and scales alone."""
    weight = getattr(weight, "original_weight_tensor", weight)
    stored = weight.tensor_impl
    assert stored.int_data.dtype == torch.int8
    return stored.int_data.double() * stored.scale.double()[:, None]


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torchtune's logger was told."""
    told: list[str] = []
    monkeypatch.setattr(torchtune.utils.get_logger(), "_log", lambda _level, text, *_args, **_rest: told.append(text))
    return told


# What becomes int8


def test_torchtune_knows_them_and_whoever_inherits() -> None:
    class Mine(Int8WeightOnlyQuantizer):
        pass

    assert get_quantizer_mode(Int8WeightOnlyQuantizer()) == get_quantizer_mode(Mine()) == "8w"
    assert get_quantizer_mode(Int8DynActInt8WeightQuantizer()) == "8da8w"
    for mode in ("8w", "8da8w"):
        # How the quantize recipe makes the name of its file.
        assert f"model-{mode}".rstrip("-qat") == f"model-{mode}"


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_weight_becomes_int8_and_nothing_else(quantizer: type[Int8Quantizer], dtype: torch.dtype) -> None:
    float_model, model = build(dtype), build(dtype)
    precision = torch.get_float32_matmul_precision()
    assert quantizer().quantize(model) is model
    assert torch.get_float32_matmul_precision() == precision
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == 2 * 4 + 1
    for name, weight in model.named_parameters():
        expected = float_model.get_parameter(name)
        assert weight.dtype == dtype
        if name in linear:
            assert quantization_of(weight) == quantizer.__name__
            # A row has 127 steps up to its largest weight. Rounding costs half a step; in bfloat16 the scale is off by
            # 1/256, half a step at the largest, and so is the quotient before it is rounded, another quarter.
            largest = expected.double().abs().amax(dim=1, keepdim=True)
            steps = (restored(weight) - expected.double()).abs() / largest * 127
            assert steps.max() <= (0.5 if dtype == torch.float32 else 1.25)
        else:
            assert quantization_of(weight) is None
            assert torch.equal(weight, expected)


def test_weight_only_computes_with_the_restored_weights() -> None:
    model, expected = build(), build()
    Int8WeightOnlyQuantizer().quantize(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if quantization_of(weight):
                expected.get_parameter(name).copy_(restored(weight))
        assert_close(model(TOKENS), expected(TOKENS), "parity_fp32")


def test_dynamic_computes_with_inputs_rounded_for_each_token() -> None:
    layer = nn.Linear(64, 48)
    Int8DynActInt8WeightQuantizer().quantize(layer)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 5)[:, None]
    scale = x.double().abs().amax(dim=-1, keepdim=True) / 127
    expected = (x.double() / scale).round() * scale @ restored(layer.weight).T + layer.bias.double()
    assert_close(layer(x), expected, "oracle_fp32")
    # Decoding, one token a row, computes with the inputs as they are.
    expected = x[:, :1].double() @ restored(layer.weight).T + layer.bias.double()
    assert_close(layer(x[:, :1]), expected, "oracle_fp32")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (1, 5, 64)])
def test_compiled_as_the_generate_recipe_does_it_changes_nothing(
    quantizer: type[Int8Quantizer], shape: tuple[int, ...]
) -> None:
    layer = quantizer().quantize(nn.Linear(64, 48))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), "pair_fp32")


@BOTH
def test_the_file_is_little_more_than_half_as_large_as_in_bfloat16(quantizer: type[Int8Quantizer]) -> None:
    half = len(saved(debug_model(torch.bfloat16)).getvalue())
    for dtype in (torch.float32, torch.bfloat16):
        assert len(saved(quantizer().quantize(debug_model(dtype))).getvalue()) < 0.6 * half


# Embeddings, tied and not


@BOTH
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_embeddings_stay_as_they_are_unless_asked(quantizer: type[Int8Quantizer], tied: bool, asked: bool) -> None:
    model, expected = build(tie_embeddings=tied, proj_bias=False), build(tie_embeddings=tied, proj_bias=False)
    quantizer(embeddings=asked).quantize(model)
    table = model.tok_embeddings.weight
    assert quantization_of(table) == ("Int8WeightOnlyQuantizer" if asked else None)
    with torch.no_grad():
        expected.tok_embeddings.weight.copy_(restored(table) if asked else table)
        assert torch.equal(model.tok_embeddings(TOKENS), expected.tok_embeddings(TOKENS))
        if tied:  # the output projection is the table, whatever the quantizer does to linear layers
            h = torch.randn(2, 3, 64)
            assert_close(model.output(h), expected.output(h), "oracle_fp32")
        assert model(TOKENS).isfinite().all()


def test_what_stays_is_named_once(messages: list[str]) -> None:
    Int8WeightOnlyQuantizer().quantize(build(tie_embeddings=True, proj_bias=False))
    (message,) = messages
    assert "made 8 weights int8" in message
    for name in ("tok_embeddings.weight,", "layers.*.attn.offset_scale.gamma (2)", "layers.*.sa_norm.weight (2)"):
        assert name in message
    assert "tied to the embeddings: quantizer.embeddings=True" in message


def test_layers_that_torchao_leaves_as_they_are_are_named(messages: list[str]) -> None:
    # 16 inputs are too few for int8 inputs to pay; only the output projections have 32.
    model = Int8DynActInt8WeightQuantizer().quantize(build(embed_dim=16, proj_bias=False))
    assert quantization_of(model.layers[0].attn.output_proj.weight)
    assert "made 2 weights int8" in messages[0]
    assert "layers.*.attn.gate_proj.weight (2)" in messages[0]
    assert "output.weight" in messages[0]


# What a quantized model and the checkpointer refuse


@BOTH
def test_saved_and_loaded_as_the_recipes_do(quantizer: type[Int8Quantizer], tmp_path: Path) -> None:
    model = quantizer().quantize(build())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpointer = FlashCheckpointer(
        checkpoint_dir=str(tmp_path),
        checkpoint_files=["model.pt"],
        output_dir=str(tmp_path.parent / "output"),
        init_model={"_component_": "flash_plugin.flash", **NODE},
        quantizer={"_component_": f"flash_plugin.{quantizer.__name__}"},
    )
    torch.manual_seed(1)
    other = flash_plugin.flash(**NODE).eval()
    quantizer().quantize(other).to(device="cpu", dtype=torch.float32)
    other.load_state_dict(checkpointer.load_checkpoint(weights_only=False)[training.MODEL_KEY], assign=True)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            assert quantization_of(module.weight) == quantizer.__name__
    assert torch.equal(other(TOKENS), model(TOKENS))
    # As a recipe loads that was given a quantizer which torchtune does not know.
    with pytest.raises(ValueError, match=rf"quantizer \(flash_plugin.{quantizer.__name__}\) must be a class"):
        checkpointer.load_checkpoint()
    # As a recipe loads that was given none.
    checkpointer._quantizer = {}
    with pytest.raises(ValueError, match=rf"its weights are quantized \({quantizer.__name__}\); set the quantizer"):
        checkpointer.load_checkpoint()


@pytest.mark.parametrize("files", [None, ["model.pt"]])
def test_full_precision_weights_for_a_quantized_model_are_refused(tmp_path: Path, files: list[str] | None) -> None:
    torch.save(build().state_dict(), tmp_path / "model.pt")
    checkpointer = FlashCheckpointer(
        checkpoint_dir=str(tmp_path) if files else None,
        checkpoint_files=files,
        output_dir=str(tmp_path.parent / "output"),
        init_model={"_component_": "flash_plugin.flash", **NODE},
    )
    assert checkpointer.load_checkpoint()
    with pytest.raises(ValueError, match="must hold quantized weights .*`tune run quantize"):
        checkpointer.load_checkpoint(weights_only=False)


@BOTH
@pytest.mark.parametrize("assign", [False, True])
def test_no_other_checkpointer_gets_full_precision_in_either(quantizer: type[Int8Quantizer], assign: bool) -> None:
    model = nn.ModuleDict({"inner": quantizer().quantize(build())})
    weights = {f"inner.{name}": weight for name, weight in build().state_dict().items()}
    with pytest.raises(ValueError, match=r"in full precision: layers.0.attn.gate_proj.weight, .* and 1 more"):
        model.load_state_dict(weights, assign=assign)


@pytest.mark.parametrize(
    ("saved_by", "dtype", "words"),
    [
        (Int8DynActInt8WeightQuantizer(), torch.float32, "these are by Int8DynActInt8WeightQuantizer: layers.0"),
        (Int8WeightOnlyQuantizer(embeddings=True), torch.float32, r"WeightOnlyQuantizer: tok_embeddings.weight; give"),
        (Int8WeightOnlyQuantizer(), torch.bfloat16, r"checkpoint \(torch.bfloat16\) must have the dtype of the model"),
    ],
)
def test_weights_quantized_otherwise_are_refused(saved_by: Int8Quantizer, dtype: torch.dtype, words: str) -> None:
    weights = saved_by.quantize(build(dtype)).state_dict()
    with pytest.raises(ValueError, match=words):
        Int8WeightOnlyQuantizer().quantize(build()).load_state_dict(weights, assign=True)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be quantized before"):
        Int8WeightOnlyQuantizer().quantize(Int8DynActInt8WeightQuantizer().quantize(build()))
    with pytest.raises(ValueError, match="must have linear layers"):
        Int8WeightOnlyQuantizer().quantize(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"embeddings \('yes'\) must be True or False"):
        Int8WeightOnlyQuantizer(embeddings="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"groupsize \(256\) is not an argument"):
        Int8WeightOnlyQuantizer(groupsize=256)  # type: ignore[call-arg]


# Quantization-aware training


def test_quantization_aware_training_takes_a_flash_model() -> None:
    """What `qat_distributed` does with it; a host without NCCL stops that recipe before it begins."""
    model = build(proj_bias=False)
    names = set(model.state_dict())
    quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    prepared = quantizer.prepare(model)
    linear = [module for module in prepared.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 9
    assert all(type(module).__name__ == "Int8DynActInt4WeightQATLinear" for module in linear)
    prepared(TOKENS).logsumexp(-1).mean().backward()
    assert all(module.weight.grad.abs().sum() > 0 for module in linear)
    # Its checkpoint is an ordinary one, for this quantizer or any other.
    assert set(prepared.state_dict()) == names
    trained = build(proj_bias=False)
    trained.load_state_dict(prepared.state_dict())
    before = prepared(TOKENS).detach()
    converted = quantizer.convert(prepared)
    assert_close(converted(TOKENS), before, "parity_fp32")
    assert Int8WeightOnlyQuantizer().quantize(trained)(TOKENS).isfinite().all()
