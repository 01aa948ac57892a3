"""torchtune's LoRA recipes train adapters of a FLASH model, and nothing else; they merge, reload and resume."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed
from torchtune.modules.peft import get_merged_lora_ckpt

import flash_plugin
from tests.recipes.launching import ROOT, tune
from tests.recipes.on_cpu import run_on_cpu
from tests.recipes.small import (
    ADAPTER_FILE,
    FEW_TOKENS,
    MODEL_FILE,
    PROJECTIONS,
    SMALL,
    SMALL_MODEL,
    load,
    losses,
    small_model,
)
from tests.tolerances import TOLERANCES, assert_close

LORA = ["--config", str(ROOT / "configs/flash_lora_debug.yaml"), *SMALL, *FEW_TOKENS, "epochs=2"]
OUTPUT = "outputs/flash_lora_debug"
RANK, ALPHA = 8, 16

pytestmark = pytest.mark.slow

Run = Callable[..., Path]


def train(folder: Path, base: Path, *overrides: str, afresh: bool = False) -> Path:
    """Train adapters on ``base`` with the recipe of one device; return where it saved."""
    arguments = [*LORA, f"checkpointer.checkpoint_dir={base}", *overrides]
    tune("lora_finetune_single_device", *arguments, cwd=folder, afresh=afresh)
    return folder / OUTPUT


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Run:
    """Runs of the recipe of one device, each made once."""

    @cache
    def run(*overrides: str) -> Path:
        return train(tmp_path_factory.mktemp("trained"), base, *overrides)

    return run


def with_adapters(base: Path, adapters: Path, **arguments: object) -> flash_plugin.FlashDecoder:
    """The model that the recipe trained, put together from its two files."""
    options = dict(max_seq_len=2048, chunk_size=64, token_shift=True, position_bias="t5")
    sizes = dict(num_layers=2, embed_dim=128, qk_dim=256, lora_rank=RANK, lora_alpha=ALPHA)
    model = flash_plugin.lora_flash_debug(PROJECTIONS, **sizes, **options, **arguments).eval()
    model.load_state_dict(load(base / MODEL_FILE), strict=False)
    missing, unexpected = model.load_state_dict(load(adapters), strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name or "magnitude" in name]
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_dora": True}, {"quantize_base": True}, {"quantize_base": True, "use_dora": True}],
    ids=["lora", "dora", "qlora", "qdora"],
)
def test_adapters_learn_and_merge(trained: Run, base: Path, arguments: dict[str, bool]) -> None:
    output = trained(*(f"model.{name}={value}" for name, value in arguments.items()))
    found = losses(output)
    assert len(found) == 12
    assert found[-1] < found[0]

    adapters = load(output / f"epoch_1/{ADAPTER_FILE}")
    kinds = ["lora_a.weight", "lora_b.weight", *["magnitude"] * ("use_dora" in arguments)]
    assert set(adapters) == {
        f"layers.{i}.attn.{name}.{kind}" for i in range(2) for name in PROJECTIONS for kind in kinds
    }
    assert all(weights.abs().max() > 0 for name, weights in adapters.items() if "lora_b" in name)

    merged, before = load(output / f"epoch_1/{MODEL_FILE}"), load(base / MODEL_FILE)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {f"layers.{i}.attn.{name}.weight" for i in range(2) for name in PROJECTIONS}

    tokens = torch.randint(256, (2, 150))
    plain = small_model()
    plain.load_state_dict(before)
    unadapted = plain(tokens)
    plain.load_state_dict(merged, strict=True)
    model = with_adapters(base, output / f"epoch_1/{ADAPTER_FILE}", **arguments)
    assert_close(plain(tokens), model(tokens), "parity_fp32")
    assert (plain(tokens) - unadapted).abs().max() > 0.1


def stop_after_an_epoch(whole: Path, folder: Path) -> Path:
    """What a run that was stopped at the end of its first epoch has saved, in ``folder``."""
    for kept in ("epoch_0", "recipe_state"):
        shutil.copytree(whole / kept, folder / OUTPUT / kept)
    return folder / OUTPUT


def assert_went_on(output: Path, whole: Path) -> None:
    """The losses and adapters of a resumed run are, bit for bit, those of the run that was not stopped."""
    assert losses(output) == losses(whole)[6:]
    one, two = load(whole / f"epoch_1/{ADAPTER_FILE}"), load(output / f"epoch_1/{ADAPTER_FILE}")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_bit_for_bit(trained: Run, base: Path, tmp_path: Path) -> None:
    whole, output = trained(), stop_after_an_epoch(trained(), tmp_path)
    train(tmp_path, base, "resume_from_checkpoint=True", "save_adapter_weights_only=True", afresh=True)
    assert_went_on(output, whole)
    # Only adapters were asked for; they and the base make the merged weights.
    assert not (output / f"epoch_1/{MODEL_FILE}").exists()
    adapters = load(output / f"epoch_1/{ADAPTER_FILE}")
    merged = get_merged_lora_ckpt({**load(base / MODEL_FILE), **adapters}, RANK, ALPHA)
    expected = load(whole / f"epoch_1/{MODEL_FILE}")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_the_merged_model_generates(trained: Run, tmp_path: Path) -> None:
    folder = trained() / "epoch_1"
    generate = ["--config", str(ROOT / "configs/generate.yaml"), *SMALL_MODEL, "prompt.user=import", "max_new_tokens=8"]
    printed = tune("generate", *generate, f"checkpointer.checkpoint_dir={folder}", cwd=tmp_path)
    assert "import" in printed.split("Model is initialized")[1]


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="the recipe asks for NCCL, which is there")
def test_without_nccl_the_host_stops_the_distributed_recipe(base: Path, tmp_path: Path) -> None:
    arguments = ["--nproc_per_node", "1", "lora_finetune_distributed", *LORA, f"checkpointer.checkpoint_dir={base}"]
    printed = tune(*arguments, cwd=tmp_path, fails=True)
    assert 'init_process_group("cuda:nccl,cpu:gloo")' in printed
    assert "RuntimeError: Distributed package doesn't have NCCL built in" in printed


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.use_dora=True", "enable_activation_checkpointing=True"], ["model.quantize_base=True"]],
    ids=["lora", "dora-checkpointed", "qlora"],
)
def test_two_processes_learn_what_one_does_and_resume(base: Path, tmp_path: Path, overrides: list[str]) -> None:
    # Recipes draw adapters on each rank by itself. A base that holds the adapters' first values makes them the same.
    started = tmp_path / "started"
    started.mkdir()
    torch.manual_seed(0)
    seeded = flash_plugin.lora_flash_debug(PROJECTIONS, num_layers=2, embed_dim=128, qk_dim=256).state_dict()
    first = {name: weights for name, weights in seeded.items() if "lora" in name}
    torch.save({**load(base / MODEL_FILE), **first}, started / MODEL_FILE)

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = train(tmp_path / "one", started, *overrides), tmp_path / "two" / OUTPUT
    distributed = ["lora_finetune_distributed", *LORA, f"checkpointer.checkpoint_dir={started}", "batch_size=2"]
    distributed += overrides
    run_on_cpu(*distributed, cwd=tmp_path / "two", processes=2)
    found, expected = losses(two), losses(one)
    assert len(found) == len(expected) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) <= TOLERANCES["step_loss_fp32"]
    for file in (MODEL_FILE, ADAPTER_FILE):
        ours, theirs = load(two / f"epoch_1/{file}"), load(one / f"epoch_1/{file}")
        assert ours.keys() == theirs.keys()
        for name, weights in theirs.items():
            assert_close(ours[name], weights, "stepped_weights_fp32", name)

    resumed = stop_after_an_epoch(two, tmp_path / "resumed")
    # The recipe loads the base last, so it must not hold the first values any more.
    resume = [f"checkpointer.checkpoint_dir={base}", "resume_from_checkpoint=True"]
    run_on_cpu(*distributed, *resume, cwd=tmp_path / "resumed", processes=2)
    assert_went_on(resumed, two)
