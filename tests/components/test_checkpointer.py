"""FlashCheckpointer: from scratch, what it refuses to load, and how it resumes. Saving is in test_checkpoint_saving."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchtune import config, training
from torchtune.modules.peft import LoRALinear
from torchtune.training import FullModelTorchTuneCheckpointer
from torchtune.training.checkpointing._checkpointer import DistributedCheckpointer
from torchtune.training.quantization import Int8DynActInt4WeightQuantizer

from flash_plugin.components.checkpointer import MODEL_FILE, FlashCheckpointer
from flash_plugin.components.initialization import initialize_weights

ROOT = Path(__file__).parents[2]
MODEL = {
    "_component_": "flash_plugin.components.builders.flash",
    "vocab_size": 40,
    "num_layers": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "qk_dim": 16,
    "chunk_size": 16,
}
EMBEDDING = "tok_embeddings.weight"


def build(**changes: Any) -> nn.Module:
    model: nn.Module = config.instantiate(OmegaConf.create(MODEL | changes))
    return model


def drawn(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    model = build(**changes)
    initialize_weights(model, seed=seed)
    return model.state_dict()


def digest(weights: dict[str, Tensor]) -> str:
    """One number for all weights, bit for bit."""
    sha = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a good checkpoint, weights.pt."""
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(drawn(), folder / "weights.pt")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def load(base: Path, output: Path, name: str = "weights.pt", **arguments: Any) -> dict[str, Any]:
    arguments = {"init_model": MODEL} | arguments
    return FlashCheckpointer(
        checkpoint_dir=str(base), checkpoint_files=[name], output_dir=str(output), **arguments
    ).load_checkpoint()


# From scratch


def test_from_scratch_makes_float32_weights_that_load_and_writes_nothing(output: Path) -> None:
    weights = FlashCheckpointer(output_dir=str(output), init_model=MODEL).load_checkpoint()[training.MODEL_KEY]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    build().load_state_dict(weights)
    assert not list(output.iterdir())


def test_from_scratch_depends_on_the_seed_alone(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(seed: int) -> str:
        checkpointer = FlashCheckpointer(output_dir=str(output), init_model=MODEL, init_seed=seed)
        return digest(checkpointer.load_checkpoint()[training.MODEL_KEY])

    torch.manual_seed(1)
    first = digests(0)
    torch.manual_seed(2)
    monkeypatch.setenv("RANK", "1")
    with training.set_default_dtype(torch.bfloat16):
        assert digests(0) == first
    assert digests(1) != first
    assert digest(drawn()) == first


def test_another_process_makes_the_same_weights(output: Path) -> None:
    script = (
        "import sys, torch; torch.manual_seed(7); torch.set_num_threads(1)\n"
        "from tests.components.test_checkpointer import MODEL, digest\n"
        "from flash_plugin.components.checkpointer import FlashCheckpointer\n"
        "checkpointer = FlashCheckpointer(output_dir=sys.argv[1], init_model=MODEL)\n"
        "print(digest(checkpointer.load_checkpoint()['model']))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(output)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.split()[-1] == digest(drawn())


def test_the_global_random_state_stays(output: Path) -> None:
    before = torch.get_rng_state()
    FlashCheckpointer(output_dir=str(output), init_model=MODEL).load_checkpoint()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_recipes_route_from_yaml(output: Path) -> None:
    node = {"_component_": "flash_plugin.components.checkpointer.FlashCheckpointer", "init_model": "${model}"}
    nulls = {"checkpoint_dir": None, "checkpoint_files": None, "model_type": "FLASH"}
    cfg = OmegaConf.create({"model": MODEL, "checkpointer": node | nulls | {"output_dir": str(output)}})
    checkpointer = config.instantiate(cfg.checkpointer, should_load_recipe_state=False)
    assert isinstance(checkpointer, FullModelTorchTuneCheckpointer)
    assert digest(checkpointer.load_checkpoint()[training.MODEL_KEY]) == digest(drawn())
    # The asynchronous client of the distributed recipe builds its own from these.
    DistributedCheckpointer(checkpoint_dir=checkpointer._checkpoint_dir, output_dir=checkpointer._output_dir)


def test_weights_from_scratch_are_drawn_when_they_are_read_and_not_kept(output: Path) -> None:
    large = MODEL | {"vocab_size": 2**20, "embed_dim": 2**16, "num_layers": 10**3, "chunk_size": 16}  # 100 TB
    weights = FlashCheckpointer(output_dir=str(output), init_model=large).load_checkpoint()[training.MODEL_KEY]
    assert len(weights) == len(list(weights)) == 10**3 * 8 + 3
    name = "layers.999.attn.offset_scale.gamma"
    assert weights[name] is not weights[name]
    assert torch.equal(weights[name], weights[name])


# What the constructor refuses


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, r"init_model \(None\) must be given .* write init_model: \$\{model\}"),
        ({"init_model": {"vocab_size": 3}}, r"init_model \(\{'vocab_size': 3\}\) must be a model's node"),
        ({"init_model": MODEL, "init_embedding_std": 0}, r"init_embedding_std \(0\) must be a positive number; set"),
        ({"model_type": "LLAMA2"}, r"model_type \('LLAMA2'\) must be FLASH"),
        ({"model_type": "flash"}, r"model_type \('flash'\) must be FLASH.*set checkpointer.model_type=FLASH"),
        ({"checkpoint_dir": "."}, r"checkpoint_dir \(\.\) must come with checkpoint_files.*to train from scratch"),
        ({"checkpoint_files": ["a.pt"]}, r"checkpoint_dir \(None\) must name the folder of checkpoint_files \(a.pt\)"),
        ({"checkpoint_files": ["a", "b"]}, r"checkpoint_files \(\['a', 'b'\]\) must be a list of one file name"),
        ({"checkpoint_files": "a.pt"}, r"checkpoint_files \(a.pt\) must be a list of one file name"),
        ({"checkpoint_dri": "x"}, r"checkpoint_dri \('x'\) is not an argument.*did you mean checkpoint_dir\?"),
        ({"resume_from_checkpoint": True}, r"recipe_checkpoint \(recipe_state/recipe_state.pt\) must be a file in"),
    ],
)
def test_wrong_arguments(output: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FlashCheckpointer(output_dir=str(output), **arguments)


def test_an_unwritable_output_dir_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "output", Path("/proc/output")):
        with pytest.raises(ValueError, match=rf"output_dir \({folder}\) must be a folder that can be written to"):
            FlashCheckpointer(output_dir=str(folder), init_model=MODEL)


def test_output_inside_the_base_folder_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="output directory cannot be"):
        load(base, base / "output")


# What loading refuses


def test_a_good_checkpoint_loads(base: Path, output: Path) -> None:
    assert digest(load(base, output)[training.MODEL_KEY]) == digest(drawn())
    assert digest(load(base, output, init_model=None)[training.MODEL_KEY]) == digest(drawn())


def test_a_missing_file_is_named_with_those_that_exist(base: Path, output: Path) -> None:
    with pytest.raises(ValueError, match=rf"\(other.pt\) must be a file in {base}.*{base} holds weights.pt"):
        load(base, output, "other.pt")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load(base / "nowhere", output)


@pytest.mark.parametrize("kept", [0, 10, 3000, -1])
def test_a_truncated_file(base: Path, output: Path, kept: int) -> None:
    path = base / "weights.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=rf"checkpoint {path} must be whole .* truncated.*the previous epoch's"
    ) as error:
        load(base, output)
    assert "\n" not in str(error.value)


def test_files_of_before_torch_1_6_load(base: Path, output: Path) -> None:
    torch.save(drawn(), base / "weights.pt", _use_new_zipfile_serialization=False)
    assert digest(load(base, output)[training.MODEL_KEY]) == digest(drawn())


def test_safetensors_load(base: Path, output: Path) -> None:
    save_file(drawn(), base / "weights.safetensors")
    assert digest(load(base, output, "weights.safetensors")[training.MODEL_KEY]) == digest(drawn())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(2)], r"\(a list\) must hold a dictionary"),
        ({}, "it is empty"),
        ({"model": drawn(), "seed": 1}, "these are no tensors: model, seed"),
    ],
)
def test_a_file_of_another_kind(base: Path, output: Path, content: object, sentence: str) -> None:
    torch.save(content, base / "weights.pt")
    with pytest.raises(ValueError, match=sentence):
        load(base, output)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(base: Path, output: Path, value: float, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in drawn().items()}
    weights["layers.1.attn.output_proj.weight"][3, 4] = value
    torch.save(weights, base / "weights.pt")
    with pytest.raises(ValueError, match=r"NaN or infinity: layers.1.attn.output_proj.weight; .*earlier epoch"):
        load(base, output)


def test_keys_and_shapes_that_do_not_fit_are_listed(base: Path, output: Path) -> None:
    weights = drawn()
    weights["stranger"] = weights.pop("output.weight")
    weights["norm.scale"] = torch.ones(7)
    torch.save(weights, base / "weights.pt")
    with pytest.raises(ValueError) as error:
        load(base, output)
    sentence = str(error.value)
    assert "must fit the model (flash_plugin.components.builders.flash)" in sentence
    assert "1 missing: output.weight" in sentence
    assert "stranger" in sentence.partition("unexpected: ")[2]
    assert "vocab_size" not in sentence


def test_another_shape_is_listed_with_both(base: Path, output: Path) -> None:
    weights = drawn()
    weights["layers.0.attn.output_proj.weight"] = torch.ones(7, 5)
    torch.save(weights, base / "weights.pt")
    shapes = r"layers.0.attn.output_proj.weight \[7, 5\] in the file but \[32, 64\] in the model"
    with pytest.raises(ValueError, match=rf"1 of another shape: {shapes}\)"):
        load(base, output)


def test_long_lists_end_in_a_count(base: Path, output: Path) -> None:
    missing = len(drawn(num_layers=8)) - len(drawn())
    with pytest.raises(ValueError, match=rf"{missing} missing: .* and {missing - 8} more"):
        load(base, output, init_model=MODEL | {"num_layers": 8})


def test_another_vocabulary_is_said_in_words(base: Path, output: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size 40 and the model vocab_size 50: set model.vocab_size=40"):
        load(base, output, init_model=MODEL | {"vocab_size": 50})


@pytest.mark.filterwarnings("ignore:Config Deprecation:UserWarning", "ignore:`[iI]nt8_?[dD]ynamic:UserWarning")
@pytest.mark.parametrize("kind", ["8w", "8w, version 2", "8da4w"])
def test_quantized_weights_pass(base: Path, output: Path, kind: str) -> None:
    model = build()
    if kind == "8da4w":
        model = Int8DynActInt4WeightQuantizer(groupsize=32).quantize(model)
    else:
        quantize_(model, Int8WeightOnlyConfig(version=2 if "2" in kind else 1))
    torch.save(model.state_dict(), base / "weights.pt")
    arguments = {"checkpoint_dir": str(base), "checkpoint_files": ["weights.pt"], "output_dir": str(output)}
    checkpointer = FlashCheckpointer(init_model=MODEL, **arguments)
    weights = checkpointer.load_checkpoint(weights_only=False)[training.MODEL_KEY]
    model.load_state_dict(weights, assign=True)
    with pytest.raises(ValueError, match="vocab_size"):
        FlashCheckpointer(init_model=MODEL | {"vocab_size": 50}, **arguments).load_checkpoint(weights_only=False)


def test_packed_integers_under_names_of_their_own_pass(base: Path, output: Path) -> None:
    """As quantizers leave them that swap modules instead of tensors."""
    weights = drawn()
    weights["output.weight"] = torch.zeros(40, 16, dtype=torch.int8)
    weights["output.scales"] = torch.ones(40, 1)
    torch.save(weights, base / "weights.pt")
    checkpointer = FlashCheckpointer(
        checkpoint_dir=str(base), checkpoint_files=["weights.pt"], output_dir=str(output), init_model=MODEL
    )
    assert checkpointer.load_checkpoint(weights_only=False)[training.MODEL_KEY]
    with pytest.raises(ValueError, match=r"1 unexpected: output.scales"):
        checkpointer.load_checkpoint()


# Adapters


def lora_model(**changes: Any) -> nn.Module:
    """A stand-in for a LoRA builder: its projections' adapters are what it declares."""
    model = build(**changes)
    model.output = LoRALinear(32, 40, rank=2, alpha=4.0)
    return model


LORA = MODEL | {"_component_": "tests.components.test_checkpointer.lora_model"}


def test_a_base_may_lack_adapters_but_nothing_else(base: Path, output: Path) -> None:
    load(base, output, init_model=LORA)
    weights = drawn()
    del weights[EMBEDDING]
    torch.save(weights, base / "weights.pt")
    with pytest.raises(ValueError, match=rf"1 missing: {EMBEDDING}\)"):
        load(base, output, init_model=LORA)


def test_adapters_on_random_weights_are_refused(output: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_files .* must name trained weights .* adapters cannot mend"):
        FlashCheckpointer(output_dir=str(output), init_model=LORA).load_checkpoint()


def test_the_file_name_is_the_stock_one() -> None:
    assert MODEL_FILE == "model-00001-of-00001.bin"
