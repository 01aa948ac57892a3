"""torchtune's own recipes train masked language models, packed and padded, in one process and in two, and resume."""

from pathlib import Path

import pytest
import torch

import flash_plugin
from tests.recipes.launching import ROOT, tune
from tests.recipes.small import FEW_TOKENS, MODEL_FILE, load, losses

CONFIG = str(ROOT / "configs/flash_mlm_debug.yaml")
OUTPUT = Path("outputs/flash_mlm_debug")
MODEL = {"num_layers": 2, "embed_dim": 128, "qk_dim": 32}
SMALL = [*(f"model.{name}={value}" for name, value in MODEL.items()), "tokenizer.max_seq_len=128"]
SHORT = [*SMALL, *FEW_TOKENS, "max_steps_per_epoch=6", "lr_scheduler.num_warmup_steps=2"]
QUAD = ["model=flash_plugin.mlm_flash_quad_debug", "~model.chunk_size"]

pytestmark = pytest.mark.slow


def train(cwd: Path, *overrides: str, fails: bool = False) -> str:
    return tune("full_finetune_single_device", "--config", CONFIG, *overrides, cwd=cwd, fails=fails)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a short run of the debug config, as it is but for its size, was saved."""
    folder = tmp_path_factory.mktemp("mlm")
    train(folder, *SMALL, "batch_size=16", "max_steps_per_epoch=150", "optimizer.lr=1.5e-2")
    return folder / OUTPUT


def test_the_loss_of_the_debug_run_falls(trained: Path) -> None:
    found = losses(trained)
    assert len(found) == 150
    assert sum(found[-10:]) / 10 < sum(found[:10]) / 10 - 2


@torch.no_grad()
def test_its_checkpoint_guesses_hidden_bytes_of_held_out_text(trained: Path) -> None:
    model = flash_plugin.mlm_flash(vocab_size=260, max_seq_len=2048, chunk_size=64, position_bias="t5", **MODEL).eval()
    model.load_state_dict(load(trained / "epoch_0" / MODEL_FILE))
    tokenizer = flash_plugin.byte_tokenizer(128, special_tokens=["<|mask|>"])
    dataset = flash_plugin.mlm_dataset(tokenizer, mask_share=1.0, random_share=0.0, split="validation")
    samples = [dataset[index] for index in range(0, len(dataset), len(dataset) // 300)]
    batch = flash_plugin.mlm_collate(samples, padding_idx=tokenizer.pad_id)
    targets = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    hidden = targets != -100
    assert (batch["tokens"][hidden] == 259).all() and hidden.sum() > 5000
    right = (model(**batch).argmax(dim=-1)[hidden] == targets[hidden]).float().mean()
    # One guess for all, the most frequent byte, is what a model knows that does not look at the text.
    blind = targets[hidden].bincount().max() / hidden.sum()
    assert right > blind + 0.1


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.packed=False", "dataset.masking=span", "enable_activation_checkpointing=True"],
        [
            "dataset.packed=False",
            "dataset.mask_fraction=0.4",
            "loss=torchtune.modules.loss.CEWithChunkedOutputLoss",
            *QUAD,
        ],
        ["dataset.masking=span", "dtype=bf16", "model.tie_embeddings=True", "gradient_accumulation_steps=2", *QUAD],
        [
            "dataset.maskings=3",
            "batch_size=1",
            "model.token_shift=True",
            "model.activation=softmax",
            "loss=torch.nn.CrossEntropyLoss",
        ],
    ],
    ids=["padded-span-checkpointed", "padded-chunked-quad", "packed-span-accumulated-quad", "packed-single-softmax"],
)
def test_the_loss_falls_with_the_options_of_recipe_and_data(tmp_path: Path, overrides: list[str]) -> None:
    train(tmp_path, *SHORT, *overrides)
    found = losses(tmp_path / OUTPUT)
    assert len(found) == 6
    assert found[-1] < found[0]


def test_a_resumed_run_masks_as_one_that_never_stopped(tmp_path: Path) -> None:
    arguments = [*SHORT, "epochs=2"]
    train(tmp_path, *arguments)
    first = losses(tmp_path / OUTPUT)
    assert len(first) == 12
    # A finished run leaves the recipe state of the epoch before its last, from which a resumed run repeats the last.
    train(tmp_path, *arguments, "resume_from_checkpoint=True")
    assert losses(tmp_path / OUTPUT)[12:] == first[6:]


def test_two_processes_train_it(tmp_path: Path) -> None:
    recipe = ["--nproc_per_node", "2", "full_finetune_distributed", "--config", CONFIG]
    tune(*recipe, *SHORT, "dataset.packed=False", "batch_size=2", cwd=tmp_path)
    found = losses(tmp_path / OUTPUT)
    assert len(found) == 6
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["dataset.packed=False", "~collate_fn"], ["collate_fn", "set collate_fn=flash_plugin.mlm_collate"]),
        (["tokenizer.special_tokens=null"], ["mask_token ('<|mask|>')", "set tokenizer.special_tokens=[<|mask|>]"]),
        (["model.vocab_size=259"], ["token id (259)", "vocab_size"]),
        (["dataset.mask_fraction=15"], ["mask_fraction (15)", "between 0 and 1"]),
    ],
)
def test_a_wrong_config_stops_with_a_sentence(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    printed = train(tmp_path, *SHORT, *overrides, fails=True)
    sentences = [line for line in printed.splitlines() if line.startswith("ValueError: ")]
    assert len(sentences) == 1
    for word in words:
        assert word in sentences[0]
