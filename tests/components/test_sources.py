import datasets
import pytest
import torchtune.utils

from flash_plugin.components import sources
from flash_plugin.components.sources import in_split, read_documents


def read(*args, **kwargs):
    return {document.name: document.text for document in read_documents(*args, **kwargs)}


@pytest.fixture
def folder(tmp_path):
    for name, text in {"b.txt": "bee", "a.md": "ay", "sub/c.txt": "sea\r\n", ".hidden": "no", "empty.txt": ""}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path


def test_a_folder_is_read_in_order_and_exactly(folder):
    assert list(read(str(folder)).items()) == [("a.md", "ay"), ("b.txt", "bee"), ("sub/c.txt", "sea\r\n")]


def test_files_globs_and_lists(folder):
    assert read(str(folder / "b.txt")) == {"b.txt": "bee"}
    assert read(f"{folder}/**/*.txt") == {"b.txt": "bee", "sub/c.txt": "sea\r\n"}
    assert list(read([f"{folder}/sub", f"{folder}/*.md"]).values()) == ["sea\r\n", "ay"]
    assert len(read(str(folder), max_documents=2)) == 2


def test_python_is_the_standard_library_in_a_fixed_order():
    names = [document.name for document in read_documents("python")]
    assert names == [document.name for document in read_documents()] and len(names) == len(set(names)) > 300
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("test/")]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` leaves CSV files to the collector
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_tables_hold_a_document_in_each_row(tmp_path, kind):
    path = tmp_path / f"rows [1].{kind}"
    table = datasets.Dataset.from_dict({"body": ["one", None, "three\n"], "n": [1, 2, 3]})
    {"jsonl": table.to_json, "parquet": table.to_parquet, "csv": table.to_csv}[kind](path)
    assert read(str(tmp_path), column="body") == {f"{path.name}:0": "one", f"{path.name}:2": "three\n"}
    with pytest.raises(ValueError, match=r"column \('text'\) must be one of .* choose from body, n"):
        read(str(path))
    with pytest.raises(ValueError, match=r"column \('n'\) must hold text, and row 0 .* holds int"):
        read(str(path), column="n")


def test_an_empty_table_is_no_document_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert read(str(tmp_path)) == {}
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"source \('.*broken\.jsonl'\) must be a well-formed json table"):
        read(str(tmp_path))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_a_separator_divides_a_file_wherever_blocks_end(tmp_path, monkeypatch, block):
    monkeypatch.setattr(sources, "_BLOCK_CHARACTERS", block)
    (tmp_path / "a.txt").write_text("one<|end|>two<|end|><|end|>thr<|e")
    assert read(str(tmp_path), separator="<|end|>") == {"a.txt:0": "one", "a.txt:1": "two", "a.txt:3": "thr<|e"}


def test_files_that_are_not_text_are_skipped_counted_and_named(folder, monkeypatch):
    (folder / "image.png").write_bytes(b"\x89PNG\xff")
    messages = []
    monkeypatch.setattr(torchtune.utils.get_logger(), "_log", lambda level, text, args, **kwargs: messages.append(text))
    assert len(read(str(folder))) == 3
    assert len(messages) == 1 and "Skipped 1 of 5 files" in messages[0] and "image.png" in messages[0]


@pytest.mark.parametrize("source", ["missing.txt", "/nowhere", "./nowhere", "no/such/*.txt", "a/b/c", "rows.jsonl"])
def test_a_source_that_does_not_exist_is_refused_before_anything_is_read(folder, source):
    with pytest.raises(ValueError, match=r"source \('.*'\) must be python, a file, a folder, a glob"):
        read_documents([str(folder), source])


def test_hub_arguments_are_passed_on_and_only_to_the_hub(folder, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("org/name", load_dataset_kwargs={"name": "en"}) == {"org/name:0": "from the hub"}
    assert calls == [(("org/name",), {"split": "train", "name": "en"})]
    with pytest.raises(ValueError, match="load_dataset_kwargs .* must be null for local files"):
        read(str(folder), load_dataset_kwargs={"name": "en"})


@pytest.mark.parametrize(("raised", "expected"), [(ConnectionError, RuntimeError), (FileNotFoundError, ValueError)])
def test_a_hub_that_fails_is_one_sentence(monkeypatch, raised, expected):
    def load_dataset(*args, **kwargs):
        raise raised("long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=r"source \('org/name'\)"):
        read("org/name")


def test_splits_depend_on_names_alone_and_have_the_asked_size():
    names = [f"file{number}.txt" for number in range(2000)]
    held_out = [name for name in names if in_split(name, "validation", 0.1)]
    assert 150 < len(held_out) < 250
    assert [name for name in names if not in_split(name, "train", 0.1)] == held_out
    assert all(in_split(name, "all", 0.1) for name in names)
    assert not any(in_split(name, "validation", 0.0) for name in names)
    # Raising the fraction moves documents to validation, never back: what was held out stays held out.
    assert all(in_split(name, "validation", 0.2) for name in held_out)
