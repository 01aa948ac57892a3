"""What evaluation needs: data from held-out text, a probe that the harness takes, configs that fit together."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from flash_plugin.components.sources import in_split
from flash_plugin.components.tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("recipe_prepare_eval", ROOT / "recipes/prepare_eval.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)

TASKS = {"heldout_text", "heldout_next_line", "heldout_complete_line"}


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents, each of whose lines says which document it is of."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        lines = [f"document {number:02} says in line {line}" for line in range(12)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return str(folder)


def prepare(corpus, folder, **arguments):
    settings = {"documents": {"source": corpus}, "validation_fraction": 0.2, "probe_dir": None} | arguments
    return recipe.prepare_eval(byte_tokenizer(), output_dir=str(folder), **settings)


def rows(folder, task):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_every_task_has_its_data_from_held_out_documents(corpus, tmp_path):
    counts = prepare(corpus, tmp_path / "eval", num_questions=40)
    held_out = {f"document {n:02}" for n in range(60) if in_split(f"{n:02}.txt", "validation", 0.2)}
    assert 0 < len(held_out) < 30
    assert counts == {"heldout_text": len(held_out), "heldout_next_line": 40, "heldout_complete_line": 40}
    assert {row["text"][:11] for row in rows(tmp_path / "eval", "heldout_text")} == held_out
    for row in rows(tmp_path / "eval", "heldout_next_line"):
        last, answer = row["context"].splitlines()[-1], row["choices"][row["answer"]]
        assert last[:11] == answer[:11]
        assert int(answer.split()[-1]) == int(last.split()[-1]) + 1
        assert len(set(row["choices"])) == 4
    answers = {row["answer"] for row in rows(tmp_path / "eval", "heldout_next_line")}
    assert answers == {0, 1, 2, 3}
    for row in rows(tmp_path / "eval", "heldout_complete_line"):
        *_, before, line = (row["context"] + row["target"]).splitlines()
        assert len(row["target"].strip()) in (1, 2)
        assert int(line.split()[-1]) == int(before.split()[-1]) + 1


def test_the_seed_alone_decides(corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(corpus, tmp_path / name, seed=seed)
    for task in TASKS:
        first, again, other = ((tmp_path / name / f"{task}.jsonl").read_bytes() for name in "abc")
        assert first == again != other


def test_long_texts_are_cut_and_contexts_are_whole_lines():
    text = "\n".join(f"line {number} " + "x" * 40 for number in range(50))
    before, line = recipe._line(text, random.Random(0))
    assert len(before) <= recipe.CONTEXT_CHARACTERS
    assert before + line in text
    assert before.startswith("line ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_documents": 0}, r"num_documents \(0\) must be at least 1"),
        ({"completed_characters": 16}, r"completed_characters \(16\) must be at least 1 and less than 16"),
        ({"validation_fraction": 0.0}, r"validation_fraction \(0.0\) must hold out"),
        ({"document_characters": 10}, "document_characters and num_documents must leave text"),
        ({"questions": 3}, r"questions \(3\) is not an argument of prepare_eval; did you mean num_questions"),
    ],
)
def test_wrong_arguments_are_refused(corpus, tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        prepare(corpus, tmp_path / "eval", **arguments)


@pytest.mark.parametrize("bos_id", [0, 256])
def test_the_probe_starts_texts_with_the_models_own_token(tmp_path, bos_id):
    recipe.write_probe(tmp_path / "gpt2", bos_id)
    recipe.write_probe(tmp_path / "gpt2", bos_id)  # its own it may write again
    assert AutoTokenizer.from_pretrained(str(tmp_path / "gpt2")).bos_token_id == bos_id


def test_another_model_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="a model of another make; launch from another folder"):
        recipe.write_probe(tmp_path, 256)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_launch_line_writes_what_the_configs_read(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = [f"documents.source={corpus}", "validation_fraction=0.2"]
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(ROOT / "configs/prepare_eval.yaml"), *overrides])
    with pytest.raises(SystemExit) as exit_:
        recipe.main()
    assert not exit_.value.code
    assert Path("gpt2/model.safetensors").is_file()
    shipped = {path.stem: OmegaConf.load(path) for path in (ROOT / "configs/eval_tasks").glob("*.yaml")}
    assert shipped.keys() == TASKS
    for name, task in shipped.items():
        assert task.task == name
        assert Path(task.dataset_kwargs.data_files).is_file()


def test_the_configs_fit_together():
    names = ("flash_debug", "flash_quantize", "flash_eval", "flash_eval_int8")
    trained, quantized, floats, int8 = (OmegaConf.load(ROOT / f"configs/{name}.yaml") for name in names)
    for cfg in (quantized, floats, int8):
        assert cfg.model == trained.model
    for cfg in (quantized, floats):
        assert cfg.checkpointer.checkpoint_dir == f"{trained.output_dir}/epoch_{trained.epochs - 1}"
    assert int8.checkpointer.checkpoint_dir == quantized.output_dir
    assert int8.quantizer == quantized.quantizer
    assert int8.dtype == quantized.dtype
    same = ("model", "tokenizer", "tasks", "include_path", "max_seq_length", "batch_size", "dtype", "seed")
    assert all(floats[key] == int8[key] for key in same)
    assert set(int8.tasks) == TASKS
