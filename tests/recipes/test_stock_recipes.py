"""torchtune's own recipes, started through ``tune``, train, resume and sample FLASH."""

import re
from pathlib import Path

import pytest

from tests.recipes.launching import ROOT, printed, run, tune

TINY = [
    "model.num_layers=2",
    "model.embed_dim=64",
    "model.qk_dim=32",
    "tokenizer.max_seq_len=128",
    "dataset.max_tokens=20000",
    "batch_size=4",
    "max_steps_per_epoch=6",
    "lr_scheduler.num_warmup_steps=2",
]

pytestmark = pytest.mark.slow


def train(cwd: Path, *overrides: str, **options: bool) -> str:
    config = str(ROOT / "configs/flash_debug.yaml")
    return tune("full_finetune_single_device", "--config", config, *TINY, *overrides, cwd=cwd, **options)


def losses(cwd: Path) -> list[float]:
    """All losses in the logs of ``cwd``, run after run."""
    logs = sorted(cwd.glob("outputs/flash_debug/logs/log_*.txt"), key=lambda path: path.stat().st_mtime)
    return [float(loss) for path in logs for loss in re.findall(r" loss:(\S+)", path.read_text())]


def test_train_resume_sample_and_plot(tmp_path: Path) -> None:
    train(tmp_path, "epochs=2", afresh=True)
    assert (tmp_path / "outputs/flash_debug/epoch_1/model-00001-of-00001.bin").is_file()
    first = losses(tmp_path)
    assert len(first) == 12
    assert first[-1] < first[0]

    # A finished run leaves the recipe state of the epoch before its last, from which a resumed run repeats the last.
    train(tmp_path, "epochs=2", "resume_from_checkpoint=True", "checkpointer.checkpoint_files=null")
    assert losses(tmp_path)[12:] == first[6:]

    model = [override for override in TINY if override.startswith("model.")]
    generate = str(ROOT / "configs/generate.yaml")
    prompt = "import os"
    sample = ["--config", generate, *model, f"prompt.user={prompt}", "max_new_tokens=20"]
    assert prompt in tune("generate", *sample, cwd=tmp_path, afresh=True).split("Model is initialized")[1]

    plot = [str(ROOT / "recipes/plot_loss.py"), "--config", str(ROOT / "configs/plot_loss.yaml")]
    printed(run(*plot, cwd=tmp_path, afresh=True))
    assert (tmp_path / "outputs/flash_debug/loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "overrides",
    [
        ["enable_activation_checkpointing=True", "gradient_accumulation_steps=2", "dataset.packed=False"],
        ["dtype=bf16", "loss=torchtune.modules.loss.CEWithChunkedOutputLoss", "model.tie_embeddings=True"],
        ["optimizer_in_bwd=True", "clip_grad_norm=null", "model.activation=softmax", "model.normalizer=paper"],
        ["model=flash_plugin.flash_quad_debug", "~model.chunk_size", "model.position_bias=toeplitz"],
    ],
    ids=["checkpointed-accumulated-unpacked", "bf16-chunked-tied", "optimizer-in-backward", "quad"],
)
def test_the_loss_falls_with_the_options_of_the_recipe(tmp_path: Path, overrides: list[str]) -> None:
    train(tmp_path, *overrides)
    found = losses(tmp_path)
    assert len(found) == 6
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.chunck_size=64"], ["chunck_size (64)", "did you mean chunk_size?"]),
        (["dataset.max_tokens=200"], ["min_samples", "4"]),
        (["model.vocab_size=100"], ["token id", "vocab_size"]),
        (["dataset.source=nowhere/*.txt"], ["nowhere/*.txt"]),
    ],
)
def test_a_wrong_config_stops_with_a_sentence(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    said = train(tmp_path, *overrides, fails=True)
    # Behind the traceback may come what is left of a progress bar.
    sentences = [line for line in said.splitlines() if line.startswith("ValueError: ")]
    assert len(sentences) == 1
    for word in words:
        assert word in sentences[0]
