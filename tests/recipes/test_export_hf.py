"""A trained model becomes a folder that transformers and the harness read, and that torchtune reads again."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import generation
from transformers import AutoModelForCausalLM

from flash_plugin import FlashCheckpointer, byte_tokenizer
from flash_plugin.hugging_face import FlashTokenizer
from tests.recipes.launching import LM_EVAL, ROOT, run, tune
from tests.recipes.small import MODEL_FILE, SMALL_MODEL, load, small_model

spec = importlib.util.spec_from_file_location("recipe_export_hf", ROOT / "recipes/export_hf.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

TASKS = "heldout_text,heldout_next_line"
PROMPTS = ["def read_lines(path):", "import os\n\n\nclass Stack:\n    def push(self,", "x"]

# What a user does who never heard of flash_plugin: everything comes from the folder.
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(prompts, padding=True, return_tensors="pt")
texts = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=steps, do_sample=False))
model.save_pretrained(folder + "_again"), tokenizer.save_pretrained(folder + "_again")
print("TEXTS", json.dumps(texts))
"""


NODE = {"_component_": "flash_plugin.flash_debug", "num_layers": 2, "embed_dim": 32, "qk_dim": 16, "chunk_size": 16}


def export(folder: Path, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    """Export a small model with weights from seed 3."""
    weights = folder / "weights"
    weights.mkdir()
    drawn = FlashCheckpointer(output_dir=str(weights), init_model=NODE, init_seed=3).load_checkpoint()["model"]
    torch.save({name: value.to(dtype) for name, value in drawn.items()}, weights / "weights.bin")
    found = dict(checkpoint_dir=str(weights), checkpoint_files=["weights.bin"], output_dir=str(folder / "hf"))
    checkpointer = FlashCheckpointer(**found)
    settings = dict(model=NODE, checkpointer=checkpointer, output_dir=str(folder / "hf"), tokenizer=byte_tokenizer())
    return recipe.export_hf(**{**settings, **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    exported = export(tmp_path, dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(exported(tokens).logits, model(tokens).logits)  # what is returned can be used
    expected = load(tmp_path / "weights/weights.bin")
    found = model.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in found)
    ids = model.generation_config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (256, 257, 258)
    tokenizer = FlashTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.model_max_length == model.config.max_seq_len == 2048


def test_a_folder_of_its_own_is_written_again_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "flash_plugin"}')
    export(tmp_path, tokenizer=None)
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "flash_for_transformers.py", "generation_config.json", "model.safetensors"} | {
        "torchtune.yaml"
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(model={**NODE, "vocab_size": 258}), r"tokenizer \(vocab_size 259\) must not have more tokens .* 258"),
        (dict(model={**NODE, "num_layers": 1}), r"must fit the model .*\(8 unexpected"),
        (dict(model={**NODE, "causal": False}), r"causal \(False\) must be True"),
        (dict(model={**NODE, "chunksize": 8}), r"chunksize \(8\) is not an argument .* did you mean chunk_size"),
        (dict(model={"_component_": "flash_plugin.mlm_flash_debug"}), r"model._component_ \(flash_plugin.mlm_flash"),
        (dict(model={"_component_": "flash_plugin.mlm_flash_quad_debug"}), r"model._component_ \(flash_plugin.mlm"),
        (dict(model={"_component_": "torchtune.models.llama3_2.llama3_2_1b"}), r"model._component_ \(torchtune"),
        (dict(model={}), r"model._component_ \(None\) must be flash_plugin.flash"),
        (dict(tokeniser=None), r"tokeniser \(None\) is not an argument of export_hf; did you mean tokenizer"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        export(tmp_path, **arguments)
    assert not list((tmp_path / "hf").iterdir())


def test_another_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="holds a model of type gpt2; set output_dir to another"):
        export(tmp_path)


def answer(*command: str, cwd: Path, afresh: bool = False) -> str:
    done = run(*command, cwd=cwd, afresh=afresh)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint where configs look for it, and its export in outputs/flash_hf.

    The weights are drawn so that greedy text is of many printable characters; a few steps of training make spaces.
    """
    folder = tmp_path_factory.mktemp("workspace")
    torch.manual_seed(0)
    model = small_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset_scale" in name or "position_bias" in name:
                parameter.normal_(std=0.6)
            elif name.endswith("output_proj.weight"):
                parameter.mul_(20)
        model.output.weight[[*range(32), *range(127, 259)]] = 0.0
    (folder / "outputs/flash_debug/epoch_0").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "outputs/flash_debug/epoch_0" / MODEL_FILE)
    answer(
        str(ROOT / "recipes/export_hf.py"), "--config", str(ROOT / "configs/export_hf.yaml"), *SMALL_MODEL, cwd=folder
    )
    return folder


def generated(folder: Path, prompts: list[str], steps: int, cwd: Path, *, afresh: bool) -> list[str]:
    """What the script makes of the prompts, in a process in which nothing has named flash_plugin."""
    (cwd / "generate.py").write_text(SCRIPT)
    command = [str(cwd / "generate.py"), str(folder), json.dumps(prompts), str(steps)]
    return list(json.loads(answer(*command, cwd=cwd, afresh=afresh).partition("TEXTS ")[2]))


@pytest.mark.slow
def test_the_folder_alone_generates_what_torchtune_does(workspace: Path, tmp_path: Path) -> None:
    folder, tokenizer = workspace / "outputs/flash_hf", byte_tokenizer()
    texts = generated(folder, PROMPTS, 60, tmp_path, afresh=True)
    model = small_model()
    model.load_state_dict(load(workspace / "outputs/flash_debug/epoch_0" / MODEL_FILE))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        tokens = torch.tensor(tokenizer.encode(prompt, add_eos=False))
        # Every token of torchtune's own greedy generation, which the recipe decodes.
        expected, _ = generation.generate(model, tokens, max_generated_tokens=60, top_k=1)
        assert text.replace("<|pad|>", "") == tokenizer.decode(expected[0].tolist(), False, False)
        assert len(set(text[-60:])) > 5
    config = str(ROOT / "configs/generate.yaml")
    options = ["top_k=1", "max_new_tokens=60", f"prompt.user='{PROMPTS[0]}'"]
    printed = tune("generate", "--config", config, *SMALL_MODEL, *options, cwd=workspace)
    text = printed.split("precision torch.float32.")[1].split("Time for inference")[0]
    assert texts[0].replace("<|pad|>", "").removeprefix("<|begin_of_text|>") in text
    # Saved again by transformers, it is as good.
    assert generated(Path(f"{folder}_again"), PROMPTS, 60, tmp_path, afresh=False) == texts


@pytest.mark.slow
def test_torchtune_reads_the_folder(workspace: Path, tmp_path: Path) -> None:
    """The nodes that the folder holds, in the place of a configuration's own; generation is then the same."""
    given = OmegaConf.load(ROOT / "configs/generate.yaml")
    nodes = OmegaConf.load(workspace / "outputs/flash_hf/torchtune.yaml")
    (tmp_path / "back.yaml").write_text(OmegaConf.to_yaml({**given, **nodes}))
    texts = []
    for arguments in ([str(ROOT / "configs/generate.yaml"), *SMALL_MODEL], [str(tmp_path / "back.yaml")]):
        printed = tune("generate", "--config", *arguments, "max_new_tokens=60", "seed=3", cwd=workspace)
        texts.append(printed.split("precision torch.float32.")[1].split("Time for inference")[0])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_harness_gives_transformers_the_scores_it_gives_torchtune(workspace: Path) -> None:
    prepare = [str(ROOT / "recipes/prepare_eval.py"), "--config", str(ROOT / "configs/prepare_eval.yaml")]
    answer(*prepare, "document_characters=600", "num_questions=4", "num_documents=2", cwd=workspace)
    include = str(ROOT / "configs/eval_tasks")
    options = [*SMALL_MODEL, f"include_path={include}", "batch_size=4", "max_seq_length=320", f"tasks=[{TASKS}]"]
    stock = tune("eleuther_eval", "--config", str(ROOT / "configs/flash_eval.yaml"), *options, cwd=workspace)
    harness = [LM_EVAL, "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    model = "pretrained=outputs/flash_hf,trust_remote_code=True,max_length=320"
    theirs = answer(*harness, "--model_args", model, "--include_path", include, "--tasks", TASKS, cwd=workspace)
    expected = scores(stock)
    assert len(expected) == 5
    assert scores(theirs) == expected
    assert expected["heldout_text", "byte_perplexity"] > 1


def scores(printed: str) -> dict[tuple[str, str], float]:
    """The numbers in the table that the harness prints, by task and metric."""
    results, task = {}, ""
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and re.fullmatch(r"[\d.]+", cells[6]):
            task = cells[0] or task
            results[task, cells[4]] = float(cells[6])
    return results
