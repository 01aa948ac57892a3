"""A pretrained Llama, in Hugging Face's layout, is swapped and goes through torchtune's own recipes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models import convert_weights
from torchtune.models.llama3_2 import llama3_2

import flash_plugin
from tests.components.swapped import LLAMA, LORA_LLAMA
from tests.recipes.launching import ROOT, printed, run, tune
from tests.recipes.on_cpu import run_on_cpu
from tests.recipes.small import losses

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 259,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 2048,
    "intermediate_dim": 128,
}
CHUNK = 32
MODEL = [*(f"model.{name}={size}" for name, size in SIZES.items()), f"model.chunk_size={CHUNK}"]
TOKENIZER = ["tokenizer._component_=flash_plugin.byte_tokenizer", "~tokenizer.path", "tokenizer.max_seq_len=256"]
RUN = [
    *MODEL,
    *TOKENIZER,
    *("dataset._component_=flash_plugin.text_dataset", "dataset.source=python", "~dataset.column"),
    *("dataset.split=train", "dataset.max_tokens=40000"),
    *("device=cpu", "dtype=fp32", "optimizer.stochastic_rounding=False", "optimizer.lr=3e-3"),
    *("batch_size=4", "gradient_accumulation_steps=1", "max_steps_per_epoch=5", "lr_scheduler.num_warmup_steps=2"),
    *("log_peak_memory_stats=False", "checkpointer.checkpoint_dir=hf"),
]
SAVED = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a pretrained model in `hf`."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) / 8 for name, weight in llama3_2(**SIZES).state_dict().items()}
    named = convert_weights.tune_to_hf(weights, num_heads=4, num_kv_heads=2, dim=64)
    (tmp_path / "hf").mkdir()
    save_file({name: weight.contiguous() for name, weight in named.items()}, tmp_path / "hf/model.safetensors")
    numbers = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "hf/config.json").write_text(json.dumps(numbers))
    return tmp_path


def train(recipe: str, kind: str, *overrides: str, cwd: Path, builder: str = LLAMA) -> list[float]:
    """Run a stock recipe with one of the configs; return all losses of its output folder."""
    config = ROOT / f"configs/llama3_2_1b_mixed_chunk_{kind}.yaml"
    tune(recipe, "--config", str(config), f"model.builder={builder}", *RUN, *overrides, cwd=cwd)
    return losses(cwd / f"outputs/llama3_2_1b_mixed_chunk_{kind}")


def gains(folder: Path, epoch: int, key: str = "model") -> list[torch.Tensor]:
    saved = torch.load(folder / f"epoch_{epoch}/global_path.pt")[key]
    return [weight for name, weight in saved.items() if "gain" in name]


def test_all_weights_train_and_the_run_resumes(folder: Path) -> None:
    found = train("full_finetune_single_device", "full", "epochs=2", cwd=folder)
    assert len(found) == 10
    assert found[-1] < found[0]
    output = folder / "outputs/llama3_2_1b_mixed_chunk_full"
    assert all((gain != 0).any() for gain in gains(output, 1))

    # The weights are a checkpoint of the original architecture still, under the names it had.
    before, after = load_file(folder / "hf/model.safetensors"), load_file(output / "epoch_0" / SAVED)
    assert before.keys() == after.keys()
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())

    resume = ["resume_from_checkpoint=True", f"checkpointer.checkpoint_files=[epoch_0/{SAVED}]"]
    whole = gains(output, 1)
    assert train("full_finetune_single_device", "full", "epochs=2", *resume, cwd=folder)[10:] == found[5:]
    assert all(torch.equal(a, b) for a, b in zip(gains(output, 1), whole, strict=True))

    # What was saved is what generates and is evaluated; a quantized copy too.
    trained = ["checkpointer.checkpoint_dir=outputs/llama3_2_1b_mixed_chunk_full/epoch_1"]
    trained += [f"checkpointer.checkpoint_files=[{SAVED}]", "checkpointer.model_type=LLAMA3_2"]
    trained += ["checkpointer._component_=flash_plugin.SwapCheckpointer", "~checkpointer.init_model", "quantizer=null"]
    swapped = ["model._component_=flash_plugin.swap_attention", f"model.builder={LLAMA}", *MODEL]
    generate = ["--config", str(ROOT / "configs/generate.yaml"), *swapped, "~model.token_shift", "~model.position_bias"]
    generate += [*trained, "~checkpointer.quantizer", "prompt.user=import os", "max_new_tokens=40", "top_k=1"]
    texts = [tune("generate", *generate, f"enable_kv_cache={on}", cwd=folder) for on in (True, False)]
    continued = [re.search(r"(?s)import os.*?(?=INFO|Time for inference|$)", text).group() for text in texts]  # type: ignore[union-attr]
    assert continued[0] == continued[1]
    assert len(continued[0]) > 40


def test_adapters_train_and_merge(folder: Path) -> None:
    lora = {"builder": LORA_LLAMA, "cwd": folder}
    found = train("lora_finetune_single_device", "lora", **lora)
    assert found[-1] < found[0]
    output = folder / "outputs/llama3_2_1b_mixed_chunk_lora"
    assert all((gain != 0).any() for gain in gains(output, 0))

    merged = flash_plugin.SwapCheckpointer(
        checkpoint_dir=str(output / "epoch_0"),
        checkpoint_files=[SAVED],
        model_type="LLAMA3_2",
        output_dir=str(folder / "x"),
    ).load_checkpoint()["model"]
    adapters = {
        **torch.load(output / "epoch_0/adapter_model.pt"),
        **torch.load(output / "epoch_0/global_path.pt")["adapter"],
    }
    choices = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
    model = flash_plugin.swap_attention(
        LORA_LLAMA, chunk_size=CHUNK, **SIZES, **choices, lora_rank=64, lora_alpha=128
    ).eval()
    plain = flash_plugin.swap_attention(LLAMA, chunk_size=CHUNK, **SIZES).eval()
    weights = load_file(folder / "hf/model.safetensors")
    model.load_state_dict(convert_weights.hf_to_tune(weights, num_heads=4, num_kv_heads=2, dim=64), strict=False)
    assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    plain.load_state_dict(merged)
    text = torch.arange(100)[None]
    torch.testing.assert_close(plain(text), model(text), rtol=1e-4, atol=1e-4)


def test_adapters_resume(folder: Path) -> None:
    lora = {"builder": LORA_LLAMA, "cwd": folder}
    found = train("lora_finetune_single_device", "lora", "epochs=2", **lora)
    output = folder / "outputs/llama3_2_1b_mixed_chunk_lora"
    trained = gains(output, 1, "adapter")
    # The host resumes from the adapter of the highest epoch, and a finished run leaves one more than its recipe state.
    shutil.rmtree(output / "epoch_1")
    assert (
        train("lora_finetune_single_device", "lora", "epochs=2", "resume_from_checkpoint=True", **lora)[10:]
        == found[5:]
    )
    assert len(trained) == 4
    assert all(torch.equal(a, b) for a, b in zip(gains(output, 1, "adapter"), trained, strict=True))


def test_the_original_teaches_the_swapped_model(folder: Path) -> None:
    teacher = ["teacher_checkpointer.checkpoint_dir=hf", f"teacher_model._component_={LLAMA}"]
    teacher += [f"teacher_model.{name}={size}" for name, size in SIZES.items()]
    found = train("knowledge_distillation_single_device", "kd", *teacher, cwd=folder, builder=LORA_LLAMA)
    assert len(found) == 5
    assert found[-1] < found[0]


def test_two_processes_train_as_one_does(folder: Path) -> None:
    config = str(ROOT / "configs/llama3_2_1b_mixed_chunk_full.yaml")
    found = []
    for processes in (1, 2):
        overrides = [*RUN, f"batch_size={4 // processes}", f"model.builder={LLAMA}", f"output_dir=outputs/{processes}"]
        launch = ["--nproc_per_node", str(processes), "full_finetune_distributed", "--config", config]
        tune(*launch, *overrides, "enable_activation_checkpointing=True", cwd=folder)
        found.append(losses(folder / f"outputs/{processes}"))
    assert len(found[0]) == 5
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    one, two = (load_file(folder / f"outputs/{n}/epoch_0" / SAVED) for n in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-4)


def test_adapters_train_on_two_processes(folder: Path) -> None:
    config = str(ROOT / "configs/llama3_2_1b_mixed_chunk_lora.yaml")
    arguments = ["--config", config, *RUN, f"model.builder={LORA_LLAMA}", "batch_size=2"]
    run_on_cpu("lora_finetune_distributed", *arguments, cwd=folder, processes=2)
    output = folder / "outputs/llama3_2_1b_mixed_chunk_lora"
    found = losses(output)
    assert found[-1] < found[0]
    assert all((gain != 0).any() for gain in gains(output, 0))


def test_a_swapped_model_is_quantized_and_evaluated(folder: Path) -> None:
    prepare = [str(ROOT / "recipes/prepare_eval.py"), "--config", str(ROOT / "configs/prepare_eval.yaml")]
    printed(run(*prepare, "document_characters=500", "num_documents=4", cwd=folder))
    swapped = ["model._component_=flash_plugin.swap_attention", f"model.builder={LLAMA}", *MODEL]
    swapped += ["~model.token_shift", "~model.position_bias"]
    base = ["checkpointer.checkpoint_dir=hf", "checkpointer.checkpoint_files=[model.safetensors]"]
    base += ["checkpointer._component_=flash_plugin.SwapCheckpointer", "checkpointer.model_type=LLAMA3_2"]
    drop = ["~checkpointer.init_model"]
    tune("quantize", "--config", str(ROOT / "configs/flash_quantize.yaml"), *swapped, *base, *drop, cwd=folder)
    tasks = [f"include_path={ROOT / 'configs/eval_tasks'}", "tasks=[heldout_text]"]
    results = []
    int8 = ["checkpointer.checkpoint_dir=outputs/flash_quantized", "checkpointer.checkpoint_files=[model-8w.pt]"]
    for name, start in (("flash_eval", [*base, *drop, "~checkpointer.quantizer"]), ("flash_eval_int8", int8)):
        evaluation = ["eleuther_eval", "--config", str(ROOT / f"configs/{name}.yaml")]
        said = tune(*evaluation, *swapped, *start, *tasks, cwd=folder)
        found = re.search(r"\|byte_perplexity\|↓ +\| +([\d.]+)\|", said)
        assert found
        results.append(float(found.group(1)))
    assert results[1] == pytest.approx(results[0], rel=0.02)
