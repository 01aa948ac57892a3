"""torchtune's distillation recipe teaches FLASH models: with adapters or all of their parameters, and by a Llama."""

import shutil
from pathlib import Path

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

import flash_plugin
from tests.recipes.launching import ROOT, tune
from tests.recipes.small import ADAPTER_FILE, FEW_TOKENS, MODEL_FILE, PROJECTIONS, SMALL, SMALL_MODEL, load, losses
from tests.tolerances import assert_close

CONFIG = ["--config", str(ROOT / "configs/flash_kd_debug.yaml"), *SMALL, *FEW_TOKENS]
TEACHER = [override.replace("model.", "teacher_model.") for override in SMALL_MODEL]
# Half as wide as its teacher.
STUDENT = ["model.embed_dim=64", "model.qk_dim=32"]
OUTPUT = "outputs/flash_kd_debug"

pytestmark = pytest.mark.slow


def distil(folder: Path, *overrides: str, afresh: bool = False) -> Path:
    """Run the recipe; return where it saved."""
    tune("knowledge_distillation_single_device", *CONFIG, *overrides, cwd=folder, afresh=afresh)
    return folder / OUTPUT


def initial() -> dict[str, torch.Tensor]:
    """The weights that a student begins with, from the config's seed."""
    student = flash_plugin.flash_debug(num_layers=2, embed_dim=64, qk_dim=32, chunk_size=64, token_shift=True)
    flash_plugin.initialize_weights(student, seed=0)
    return student.state_dict()


def test_a_student_learns_with_all_its_parameters_and_resumes(base: Path, tmp_path: Path) -> None:
    overrides = [*STUDENT, *TEACHER, f"teacher_checkpointer.checkpoint_dir={base}", "epochs=2"]
    (tmp_path / "whole").mkdir()
    whole = distil(tmp_path / "whole", *overrides)
    for name in ("loss", "class_loss", "kd_loss"):
        found = losses(whole, name)
        assert len(found) == 12
        assert found[-1] < found[0], name

    # A plain model of the size loads it, and there is nothing in it that was not trained.
    weights, before = load(whole / f"epoch_1/{MODEL_FILE}"), initial()
    assert weights.keys() == before.keys()
    assert not [name for name in before if torch.equal(weights[name], before[name])]
    assert not list(whole.rglob(ADAPTER_FILE))

    # As after a stop at the end of the first epoch, whose recipe state the whole run leaves behind.
    stopped = tmp_path / "stopped" / OUTPUT
    shutil.copytree(whole / "epoch_0", stopped / "epoch_0")
    shutil.copytree(whole / "recipe_state", stopped / "recipe_state")
    distil(tmp_path / "stopped", *overrides, "resume_from_checkpoint=True", afresh=True)
    assert losses(stopped) == losses(whole)[6:]
    resumed = load(stopped / f"epoch_1/{MODEL_FILE}")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@torch.no_grad()
def test_a_student_learns_with_adapters(base: Path, tmp_path: Path) -> None:
    before = initial()
    (tmp_path / "student").mkdir()
    torch.save(before, tmp_path / "student" / MODEL_FILE)
    modules = f"model.lora_attn_modules=[{','.join(PROJECTIONS)}]"
    files = [f"checkpointer.checkpoint_dir={tmp_path / 'student'}", f"checkpointer.checkpoint_files=[{MODEL_FILE}]"]
    taught_by = [*TEACHER, f"teacher_checkpointer.checkpoint_dir={base}"]
    output = distil(tmp_path, *STUDENT, modules, "model.apply_lora_to_output=True", *files, *taught_by)
    found = losses(output)
    assert found[-1] < found[0]

    merged, adapters = load(output / f"epoch_0/{MODEL_FILE}"), load(output / f"epoch_0/{ADAPTER_FILE}")
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert changed == {name.replace("lora_a.", "") for name in adapters if "lora_a" in name}
    options = dict(num_layers=2, embed_dim=64, qk_dim=32, chunk_size=64, token_shift=True)
    plain = flash_plugin.flash_debug(**options).eval()
    plain.load_state_dict(merged, strict=True)
    student = flash_plugin.lora_flash_debug(PROJECTIONS, apply_lora_to_output=True, **options).eval()
    student.load_state_dict({**before, **adapters}, strict=True)
    tokens = torch.randint(256, (2, 100))
    assert_close(plain(tokens), student(tokens), "parity_fp32")


def test_a_llama_teaches_a_student_with_the_same_tokenizer(tmp_path: Path) -> None:
    sizes = dict(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128)
    torch.manual_seed(0)
    llama = llama3_2(vocab_size=259, max_seq_len=2048, **sizes)
    (tmp_path / "teacher").mkdir()
    torch.save(llama.state_dict(), tmp_path / "teacher/llama.pt")
    teacher = ["teacher_model=torchtune.models.llama3_2.llama3_2"]
    teacher += [f"~teacher_model.{name}" for name in ("chunk_size", "token_shift", "position_bias")]
    teacher += [f"teacher_model.{name}={value}" for name, value in sizes.items()]
    files = [
        "teacher_checkpointer=torchtune.training.FullModelTorchTuneCheckpointer",
        "~teacher_checkpointer.init_model",
        "teacher_checkpointer.model_type=LLAMA3_2",
        f"teacher_checkpointer.checkpoint_dir={tmp_path / 'teacher'}",
        "teacher_checkpointer.checkpoint_files=[llama.pt]",
    ]
    found = losses(distil(tmp_path, *STUDENT, *teacher, *files, "kd_ratio=1.0"), "kd_loss")
    assert len(found) == 6
    assert found[-1] < found[0]
