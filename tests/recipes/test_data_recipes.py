"""The recipes that prepare data, each run as its YAML file runs it, but in this process where that is enough."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from flash_plugin.components.datasets import text_dataset, token_dataset
from flash_plugin.components.sources import read_documents
from flash_plugin.components.token_files import METADATA, PROGRESS
from flash_plugin.components.tokenizers import byte_tokenizer, tiktoken_tokenizer

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare_data, train_tokenizer = load("prepare_data"), load("train_tokenizer")


@pytest.fixture
def launch(monkeypatch):
    """Run a recipe with its own configuration file and overrides, as its launch line does."""

    def run(module, *overrides):
        name = Path(module.__file__).stem
        monkeypatch.setattr(sys, "argv", [name, "--config", str(ROOT / "configs" / f"{name}.yaml"), *overrides])
        with pytest.raises(SystemExit) as exit_:
            module.main()
        assert not exit_.value.code

    return run


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"document {number} " * (number % 7 + 1))
    return str(folder)


def prepare(corpus, output_dir, tokenizer=None, **arguments):
    settings = {"documents": {"source": corpus}, "validation_fraction": 0.2, "batch_characters": 300} | arguments
    return prepare_data.prepare_data(tokenizer or byte_tokenizer(), output_dir=str(output_dir), **settings)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


class Killed(BaseException):
    """What no recipe may catch."""


class DyingTokenizer:
    """Bytes, until it is killed at the n-th document."""

    def __init__(self, life):
        self.tokenizer, self.life = byte_tokenizer(), life

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, add_bos=True, add_eos=True):
        self.life -= 1
        if self.life < 0:
            raise Killed
        return self.tokenizer.encode(text, add_bos, add_eos)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_launch_line_prepares_what_text_dataset_would_tokenise(launch, corpus, tmp_path, packed, split):
    launch(prepare_data, f"documents.source={corpus}", f"output_dir={tmp_path}/out", "validation_fraction=0.2")
    tokenizer = byte_tokenizer(max_seq_len=32)
    expected = text_dataset(tokenizer, corpus, packed=packed, split=split, validation_fraction=0.2)
    dataset = token_dataset(tokenizer, f"{tmp_path}/out", packed=packed, split=split)
    assert len(dataset) == len(expected) > 0
    for sample, other in zip(dataset, expected, strict=True):
        assert all(np.array_equal(sample[key], other[key]) for key in other)


@pytest.mark.parametrize("workers", [1, 3])
def test_killed_at_any_document_the_result_is_the_same_to_the_byte(corpus, tmp_path, workers):
    prepare(corpus, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert sorted(whole) == [
        METADATA,
        *(f"{s}.{kind}" for s in ("train", "validation") for kind in ("offsets", "tokens")),
    ]
    broken = tmp_path / "broken"
    for life in (0, 1, 13, 29, 40, 59):
        shutil.rmtree(broken, ignore_errors=True)
        with pytest.raises(Killed):
            prepare(corpus, broken, DyingTokenizer(life), num_workers=workers)
        assert METADATA not in contents(broken)
        for path in broken.glob("*.*s"):  # a kill between two commits leaves part of a batch behind
            path.write_bytes(path.read_bytes() + b"partial")
        (broken / f"{PROGRESS}.tmp").write_text("{")
        with pytest.raises(Killed):  # killed again, a little later
            prepare(corpus, broken, DyingTokenizer(min(life, 3)), num_workers=workers)
        prepare(corpus, broken, batch_characters=100, num_workers=workers)
        assert {name: data for name, data in contents(broken).items() if name != f"{PROGRESS}.tmp"} == whole


def test_a_restart_repeats_only_the_last_batch(corpus, tmp_path):
    with pytest.raises(Killed):
        prepare(corpus, tmp_path / "out", DyingTokenizer(40))
    tokenizer = DyingTokenizer(1000)
    prepare(corpus, tmp_path / "out", tokenizer)
    assert 20 <= 1000 - tokenizer.life < 35
    prepare(corpus, tmp_path / "out", DyingTokenizer(0))  # complete: nothing left to tokenise


def test_killed_by_the_system_it_continues(launch, tmp_path):
    command = [sys.executable, "recipes/prepare_data.py", "--config", "configs/prepare_data.yaml"]
    process = subprocess.Popen(
        [*command, "batch_characters=1", f"output_dir={tmp_path}/out"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / PROGRESS).is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed = contents(tmp_path / "out")
    assert PROGRESS in killed and METADATA not in killed
    for folder in ("out", "whole"):
        launch(prepare_data, f"output_dir={tmp_path}/{folder}")
    resumed = contents(tmp_path / "out")
    resumed.pop(f"{PROGRESS}.tmp", None)
    assert resumed == contents(tmp_path / "whole")


def test_a_folder_of_another_job_is_left_alone(corpus, tmp_path):
    prepare(corpus, tmp_path / "done")
    with pytest.raises(Killed):
        prepare(corpus, tmp_path / "begun", DyingTokenizer(30))
    for folder in (tmp_path / "done", tmp_path / "begun"):
        before = contents(folder)
        for change in ({"add_eos": False}, {"tokenizer": byte_tokenizer(special_tokens=["<|x|>"])}):
            with pytest.raises(ValueError, match="must be empty or belong to this very job"):
                prepare(corpus, folder, **change)
        assert contents(folder) == before


def test_a_source_that_changed_is_not_continued(corpus, tmp_path):
    with pytest.raises(Killed):
        prepare(corpus, tmp_path / "out", DyingTokenizer(30))
    (Path(corpus) / "00a.txt").write_text("new")
    with pytest.raises(ValueError, match="must be the same as when output_dir"):
        prepare(corpus, tmp_path / "out")


def test_large_vocabularies_take_four_bytes(corpus, tmp_path):
    tokenizer = byte_tokenizer(32, special_tokens={"<|end_of_text|>": 70_000})
    counts = prepare(corpus, tmp_path / "out", tokenizer)
    assert (tmp_path / "out" / "train.tokens").stat().st_size == 4 * counts["train"]["tokens"]
    assert token_dataset(tokenizer, tmp_path / "out")[0]["tokens"][-1] == 70_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_characters": 0}, r"batch_characters \(0\)"),
        ({"num_workers": 0}, r"num_workers \(0\)"),
        ({"validation_fraction": 2}, r"validation_fraction \(2\)"),
        ({"documents": {"sauce": "x"}}, "did you mean source"),
        ({"output": "x"}, "did you mean output_dir"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(corpus, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(corpus, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_source_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="must hold at least one document with text"):
        prepare(str(tmp_path / "empty.txt"), tmp_path / "out")


def test_a_trained_vocabulary_tokenises_and_comes_back(launch, tmp_path):
    path = tmp_path / "new" / "trained.tiktoken"
    overrides = ("vocab_size=700", "documents.max_documents=40", f"output_file={path}")
    launch(train_tokenizer, *overrides)
    tokenizer = tiktoken_tokenizer(str(path))
    assert (tokenizer.base_vocab_size, tokenizer.vocab_size) == (700, 703)
    text = "".join(document.text for document in read_documents(max_documents=50)) + "naïve 漢字 👩🏽‍🚀 \0"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text and len(tokens) < len(text) / 2
    assert os.listdir(path.parent) == [path.name]

    launch(train_tokenizer, *overrides[:2], f"output_file={tmp_path}/again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=r"output_file .* must not exist"):
        train_tokenizer.train_tokenizer(documents={}, output_file=str(path))


def test_a_vocabulary_that_tiktoken_would_use_otherwise_is_refused(corpus, tmp_path, monkeypatch):
    settings = {"documents": {"source": corpus}, "vocab_size": 270, "output_file": f"{tmp_path}/a.tiktoken"}
    ranks = train_tokenizer._byte_ranks

    def shuffled(trained):
        return {token: 269 - rank for token, rank in ranks(trained).items()}

    monkeypatch.setattr(train_tokenizer, "_byte_ranks", shuffled)
    with pytest.raises(RuntimeError, match="tiktoken must tokenise the training text"):
        train_tokenizer.train_tokenizer(**settings)
    assert not (tmp_path / "a.tiktoken").exists()


def test_the_trained_ids_are_those_of_tiktoken_with_the_same_pattern(corpus, tmp_path):
    pattern = r"\S+|\s+"
    path = str(tmp_path / "a.tiktoken")
    documents = {"source": corpus}
    trained = train_tokenizer.train_tokenizer(documents=documents, output_file=path, vocab_size=266, pattern=pattern)
    ranks = trained.encoding._mergeable_ranks
    expected = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    text = "document 12 document"
    assert tiktoken_tokenizer(path, pattern=pattern).encode(text, False, False) == expected.encode_ordinary(text)
    assert b"document" in ranks and ranks[b"document"] in expected.encode_ordinary(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 255}, r"vocab_size \(255\) must be at least 256"),
        ({"vocab_size": 50_000}, r"vocab_size \(50000\) must not exceed the \d+ tokens"),
        ({"validation_fraction": -1}, r"validation_fraction \(-1\)"),
        ({"vocabulary_size": 300}, "did you mean vocab_size"),
    ],
)
def test_bad_training_settings_are_refused(corpus, tmp_path, arguments, message):
    settings = {"documents": {"source": corpus}, "output_file": f"{tmp_path}/a.tiktoken"} | arguments
    with pytest.raises(ValueError, match=message):
        train_tokenizer.train_tokenizer(**settings)
