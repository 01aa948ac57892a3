import itertools
import random

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import ConcatDataset
from torchtune.modules.attention_utils import create_block_causal_mask

from flash_plugin.components import datasets
from flash_plugin.components.datasets import DocumentDataset, WindowDataset, text_dataset, token_dataset
from flash_plugin.components.sources import read_documents
from flash_plugin.components.token_files import METADATA, TokenWriter
from flash_plugin.components.tokenizers import byte_tokenizer

PAD = byte_tokenizer().pad_id


def corpus(lengths):
    """Documents of these lengths, each token different from its neighbours, and their offsets."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    return tokens, np.cumsum([0, *lengths])


def plain_windows(lengths, size):
    """The rules of a window, one token at a time."""
    stream = [(token, document) for document, length in enumerate(lengths) for token in range(length)]
    values = iter(range(len(stream)))
    for start in range(0, len(stream), size):
        window = {"tokens": [], "labels": [], "input_pos": [], "seq_lens": []}
        piece = None
        for t in range(size):
            inside = start + t < len(stream)
            owner = stream[start + t][1] if inside else "padding"
            begins = owner != piece
            piece = owner
            value = next(values) if inside else PAD
            window["tokens"].append(value)
            window["labels"].append(value if inside and not begins else -100)
            window["input_pos"].append(0 if begins else window["input_pos"][-1] + 1)
            window["seq_lens"] += [1] if begins else []
            window["seq_lens"][-1] += not begins
        yield window


RANDOM = random.Random(0)
CORPORA = [
    [8],
    [3],
    [8, 8],
    [5, 3, 8],
    [16, 2],
    [30],
    [1, 1, 1, 1, 1],
    [7, 2, 9, 2],
    *([RANDOM.randint(1, 20) for _ in range(12)] for _ in range(5)),
]


@pytest.mark.parametrize("lengths", CORPORA, ids=str)
def test_windows_follow_the_plain_rules(lengths):
    dataset = WindowDataset(*corpus(lengths), 8, PAD)
    expected = list(plain_windows(lengths, 8))
    if sum(lengths) % 8 == 1:  # one token left over predicts nothing
        expected.pop()
    assert [{key: value.tolist() for key, value in window.items()} for window in dataset] == expected
    assert all(value.dtype == torch.int64 for window in dataset for value in window.values())
    assert all(int(window["seq_lens"].sum()) == 8 for window in dataset)


@pytest.mark.parametrize("lengths", CORPORA, ids=str)
def test_unpacked_samples_are_the_documents_in_pieces(lengths):
    tokens, offsets = corpus(lengths)
    documents = [tokens[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]
    pieces = [document[i : i + 8] for document in documents for i in range(0, len(document), 8)]
    expected = [piece for piece in pieces if len(piece) > 1]
    dataset = DocumentDataset(tokens, offsets, 8)
    assert [sample["tokens"] for sample in dataset] == expected
    assert all(sample["labels"] == sample["tokens"] for sample in dataset)
    assert [sample["tokens"] for sample in DocumentDataset(tokens, offsets, None)] == [
        document for document in documents if len(document) > 1
    ]


def test_a_window_can_be_asked_for_in_any_order_and_not_beyond_the_end():
    dataset = WindowDataset(*corpus([20]), 8, PAD)
    assert dataset[-1]["tokens"].tolist() == dataset[2]["tokens"].tolist()
    with pytest.raises(IndexError):
        dataset[3]


def test_torchtune_collates_packed_samples_into_the_mask_that_positions_imply(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 5)
    (tmp_path / "b.txt").write_text("de")
    dataset = text_dataset(byte_tokenizer(max_seq_len=8), str(tmp_path), packed=True, split="all")
    batch = padded_collate_packed(list(dataset))
    assert batch["tokens"].shape == batch["labels"].shape == batch["input_pos"].shape == (3, 8)
    segment = (batch["input_pos"] == 0).cumsum(1)
    same = segment[:, :, None] == segment[:, None, :]
    # What batch["mask"] is on a CPU; with CUDA it is a BlockMask of the same.
    mask = create_block_causal_mask([sample["seq_lens"] for sample in dataset])
    assert torch.equal(mask, same & torch.ones(8, 8, dtype=torch.bool).tril())
    targets = torch.hstack((batch["labels"][:, 1:], torch.full((3, 1), -100)))  # as the recipe shifts them
    learned = targets[targets != -100].tolist()
    assert learned == [*b"abcabca", *b"cabcabc", *b"de", 257]


def test_torchtune_collates_unpacked_samples(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("d")
    dataset = text_dataset(byte_tokenizer(max_seq_len=8), str(tmp_path), split="all", add_eos=False)
    batch = padded_collate_sft(list(dataset), padding_idx=PAD)
    assert batch["tokens"].tolist() == [[256, *b"abc"], [256, *b"d", PAD, PAD]]
    assert batch["labels"].tolist() == [[256, *b"abc"], [256, *b"d", -100, -100]]


def test_torchtune_concatenates_packed_data_sets_as_packed(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 5)
    tokenizer = byte_tokenizer(max_seq_len=8)
    packed, unpacked = (text_dataset(tokenizer, str(tmp_path), packed=packed, split="all") for packed in (True, False))
    assert ConcatDataset([packed, packed]).packed and packed.packed
    assert not ConcatDataset([unpacked, unpacked]).packed and not unpacked.packed


def test_a_config_without_the_packed_key_gets_what_the_recipe_will_collate():
    cfg = OmegaConf.create({"_component_": "flash_plugin.components.datasets.text_dataset", "max_documents": 9})
    dataset = config.instantiate(cfg, byte_tokenizer(max_seq_len=64))
    assert dataset.packed == cfg.get("packed", False)  # the recipe's own words


@pytest.fixture(scope="module")
def standard_library():
    tokenizer = byte_tokenizer(max_seq_len=2048)
    return {name: text_dataset(tokenizer, packed=True, split=name) for name in ("train", "validation", "all")}


def test_the_standard_library_is_there_without_a_file_or_a_network(standard_library):
    everything = standard_library["all"]
    assert len(everything) * 2048 > 5_000_000
    decode = byte_tokenizer().decode
    for document, (start, stop) in zip(read_documents(), itertools.pairwise(everything._offsets), strict=True):
        assert decode(everything._tokens[start:stop].tolist()) == document.text


def test_train_and_validation_share_nothing_and_leave_nothing_out(standard_library):
    train, validation, everything = (
        [dataset._tokens[start:stop].tobytes() for start, stop in itertools.pairwise(dataset._offsets)]
        for dataset in standard_library.values()
    )
    assert sorted(train + validation) == sorted(everything)
    assert 0 < len(validation) < 0.1 * len(everything)


def test_max_tokens_keeps_the_first(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("ijk")
    tokenizer = byte_tokenizer(max_seq_len=8)
    for limit, documents in ((4, [[256, *b"abc"]]), (13, [[256, *b"abcdefg"], [*b"h", 257], [256, *b"ij"]])):
        dataset = text_dataset(tokenizer, str(tmp_path), split="all", max_tokens=limit)
        assert [sample["tokens"] for sample in dataset] == documents


@pytest.mark.parametrize("packed", [True, False])
def test_too_few_samples_are_refused(tmp_path, monkeypatch, packed):
    (tmp_path / "a.txt").write_text("abc" * 5)  # 17 tokens: 2 windows of 8 and one left over
    arguments = {"source": str(tmp_path), "packed": packed, "split": "all"}
    tokenizer = byte_tokenizer(max_seq_len=8)
    assert len(text_dataset(tokenizer, **arguments, min_samples=2)) == 2
    with pytest.raises(ValueError, match=r"min_samples \(3\) .* 17 tokens, which make 2 for each of 1; give more text"):
        text_dataset(tokenizer, **arguments, min_samples=3)
    monkeypatch.setattr(datasets, "get_world_size_and_rank", lambda: (2, 1))
    assert len(text_dataset(tokenizer, **arguments, min_samples=1)) == 2
    with pytest.raises(ValueError, match=r"min_samples \(2\) .* make 1 for each of 2"):
        text_dataset(tokenizer, **arguments, min_samples=2)


def test_a_data_set_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for packed in (True, False):
        with pytest.raises(ValueError, match="must hold at least one document"):
            text_dataset(byte_tokenizer(max_seq_len=8), str(tmp_path), packed=packed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split \('test'\) must be one of train, validation, all"),
        ({"validation_fraction": 1.0}, r"validation_fraction \(1.0\)"),
        ({"min_samples": 0}, r"min_samples \(0\)"),
        ({"max_tokens": 1}, r"max_tokens \(1\)"),
        ({"max_documents": 0}, r"max_documents \(0\)"),
        ({"separator": ""}, "separator"),
        ({"packed": True}, r"set tokenizer\.max_seq_len"),
        ({"packd": True}, "did you mean packed"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match=message):
        text_dataset(byte_tokenizer(), str(tmp_path), **({"split": "all"} | arguments))


TEXTS = {"train": ["abcdefghij", "k", "lmnopqr"], "validation": ["stu"]}


@pytest.fixture
def prepared(tmp_path):
    folder, tokenizer = tmp_path / "tokens", byte_tokenizer()
    with TokenWriter(folder, tokenizer, {}) as writer:
        for split, texts in TEXTS.items():
            for text in texts:
                writer.append(split, np.array(tokenizer.encode(text), np.uint32))
        writer.commit(4, "last")
        writer.finish()
    return folder


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_prepared_corpus_gives_the_samples_of_its_text(prepared, tmp_path, split, packed):
    (tmp_path / "a.txt").write_text("|".join(TEXTS[split]))
    tokenizer = byte_tokenizer(max_seq_len=8)
    expected = text_dataset(tokenizer, str(tmp_path / "a.txt"), separator="|", split="all", packed=packed)
    dataset = token_dataset(tokenizer, str(prepared), split=split, packed=packed)
    assert isinstance(dataset._tokens, np.memmap) and dataset._tokens.dtype == np.uint16
    assert len(dataset) == len(expected) > 0
    for sample, other in zip(dataset, expected, strict=True):
        assert sample.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(other[key])) for key in sample)


def test_seq_len_shortens_samples_and_cannot_lengthen_them(prepared):
    tokenizer = byte_tokenizer(max_seq_len=8)
    assert token_dataset(tokenizer, prepared, packed=True, seq_len=4)[0]["tokens"].shape == (4,)
    for seq_len in (9, 0):
        with pytest.raises(ValueError, match=rf"seq_len \({seq_len}\)"):
            token_dataset(tokenizer, prepared, seq_len=seq_len)


def test_a_corpus_of_another_tokenizer_is_refused(prepared):
    with pytest.raises(ValueError, match="was made with another one, of vocab_size 259"):
        token_dataset(byte_tokenizer(8, special_tokens=["<|user|>"]), prepared)


def test_a_corpus_that_is_unfinished_damaged_or_missing_is_refused(prepared, tmp_path):
    tokenizer = byte_tokenizer(max_seq_len=8)
    with pytest.raises(ValueError, match=r"split \('all'\) .* train, validation"):
        token_dataset(tokenizer, prepared, split="all")
    with open(prepared / "train.tokens", "ab") as file:
        file.write(b"xx")
    with pytest.raises(RuntimeError, match=r"train\.tokens must hold 48 bytes, and holds 50"):
        token_dataset(tokenizer, prepared)
    (prepared / METADATA).rename(prepared / "progress.json")
    with pytest.raises(ValueError, match="holds an unfinished one"):
        token_dataset(tokenizer, prepared)
    with pytest.raises(ValueError, match=r"holds none; run recipes/prepare_data\.py"):
        token_dataset(tokenizer, tmp_path / "nowhere")
