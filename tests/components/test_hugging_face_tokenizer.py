"""Our tokenizers as transformers has them: the same ids for every text, and back."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torchtune import config
from transformers import AutoTokenizer

from flash_plugin.components.tokenizers import TiktokenTokenizer, byte_tokenizer, tiktoken_tokenizer
from flash_plugin.hugging_face import TRANSFORMERS, FlashTokenizer
from tests.components.test_tokenizers import RANKS, TEXTS, write_ranks
from tests.test_architecture import PACKAGE, ROOT, imports

# Where regular expression engines and orders of merges differ, and what is no text at all.
HARD = [
    *TEXTS,
    "it'S we'LL \u017f'\u017f don't I\u2019M",
    "aaaaaaa abababa  a  \n\n \r\n\u00a0\u2028\u3000\x85\x1c x",
    "१२३४५ ٣٤ ⅷ ½ 12345678 1,000.5",
    "e\u0301 n\u0303 ﬁ \u200d\ufeff\u0000 \U0001f469\u200d\U0001f4bb \U00010ffff \U0001e900",
    "\ud800 a\udfff \udc80\udcff",
    "<|pad|><|end_of_text|><|user|>",
    "Ünïcödé ÄÖß ελληνικά кириллица עברית العربية ไทย 한국어 日本語",
]


def random_texts() -> Iterator[str]:
    draw = random.Random(0)
    for length in (1, 2, 3, 5, 50, 400):
        for _ in range(10):
            yield "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0x11_0000)])) for _ in range(length))
            yield draw.randbytes(length).decode("utf-8", errors="surrogateescape")


@pytest.fixture(params=["bytes", "pairs", "pattern", "named ids"])
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> TiktokenTokenizer:
    path = write_ranks(tmp_path / "pairs.tiktoken", {**RANKS, b"aaa": 932, b"aaaa": 933})
    return {
        "bytes": lambda: byte_tokenizer(),
        "pairs": lambda: tiktoken_tokenizer(path, special_tokens=["<|user|>", "<|assistant|>"]),
        "pattern": lambda: tiktoken_tokenizer(path, pattern=r"\s+|\S{1,7}"),
        "named ids": lambda: byte_tokenizer(special_tokens={"<|end_of_text|>": 300, "<|user|>": 256}),
    }[request.param]()


@pytest.fixture
def theirs(ours: TiktokenTokenizer, tmp_path: Path) -> FlashTokenizer:
    FlashTokenizer.from_flash(ours, tmp_path / "folder", model_max_length=10**6)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert type(loaded) is FlashTokenizer
    return loaded


def test_every_text_has_our_ids_and_comes_back(ours: TiktokenTokenizer, theirs: FlashTokenizer) -> None:
    for text in (*HARD, *random_texts()):
        expected = ours.encode(text, add_eos=False)
        assert theirs(text)["input_ids"] == expected
        assert theirs.encode(text, add_special_tokens=False) == expected[1:]
        assert theirs.decode(expected, skip_special_tokens=True) == ours.decode(expected)
    assert theirs.convert_tokens_to_ids(theirs.tokenize("naïve 漢字")) == ours.encode("naïve 漢字", False, False)


def test_ids_that_are_no_text_decode_alike(ours: TiktokenTokenizer, theirs: FlashTokenizer) -> None:
    draw = random.Random(0)
    known = sorted({*ours.encoding._mergeable_ranks.values(), *ours.special_tokens.values()})
    for length in (0, 1, 2, 5, 60):
        tokens = draw.choices(known, k=length)
        for skip in (True, False):
            expected = ours.decode(tokens, truncate_at_eos=False, skip_special_tokens=skip)
            assert theirs.decode(tokens, skip_special_tokens=skip) == expected


def test_the_tokenizer_of_the_folder_is_ours_again(
    ours: TiktokenTokenizer, theirs: FlashTokenizer, tmp_path: Path
) -> None:
    node = OmegaConf.create(theirs.node(str(tmp_path / "folder/vocabulary.tiktoken")))
    assert config.instantiate(node).fingerprint == ours.fingerprint
    theirs.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.flash.fingerprint == ours.fingerprint
    assert again.get_vocab() == theirs.get_vocab()
    assert again.model_max_length == theirs.model_max_length == 10**6


def test_special_tokens_have_our_ids_and_are_made_of_text_on_demand_alone(
    ours: TiktokenTokenizer, theirs: FlashTokenizer
) -> None:
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.get_added_vocab() == ours.special_tokens
    assert sorted(theirs.all_special_ids) == sorted(ours.special_tokens.values())
    assert len(theirs) == ours.base_vocab_size + len(ours.special_tokens)
    text = "a<|end_of_text|> b"
    assert ours.eos_id not in theirs.encode(text)
    a, b = (ours.encode(part, add_bos=False, add_eos=False) for part in ("a", " b"))
    assert theirs.encode(text, split_special_tokens=False) == [ours.bos_id, *a, ours.eos_id, *b]


def test_batches_are_padded_on_the_left_and_nothing_else_is_made(theirs: FlashTokenizer) -> None:
    batch = theirs(["abc", "z"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    width = batch["input_ids"].shape[1]
    alone = theirs("z")["input_ids"]
    assert batch["input_ids"][1].tolist() == [theirs.pad_token_id] * (width - len(alone)) + alone
    assert batch["attention_mask"][1].tolist() == [0] * (width - len(alone)) + [1] * len(alone)
    pair = theirs("ab", "c", return_special_tokens_mask=True)
    assert pair["special_tokens_mask"] == [1] + [0] * (len(pair["input_ids"]) - 1)
    assert theirs.get_special_tokens_mask(alone, already_has_special_tokens=True)[0] == 1


def test_a_token_that_was_added_is_kept(theirs: FlashTokenizer, tmp_path: Path) -> None:
    before = theirs.get_vocab()
    theirs.add_tokens(["<tool>"], special_tokens=True)
    added = theirs.convert_tokens_to_ids("<tool>")
    assert added not in before.values()
    theirs.save_pretrained(tmp_path / "more")
    again = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert again.get_vocab() == {**before, "<tool>": added}
    assert again.encode("<tool>", split_special_tokens=False)[1:] == [added]


def save(tokenizer: Any, tmp_path: Path) -> FlashTokenizer:
    return FlashTokenizer.from_flash(tokenizer, tmp_path / "refused")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    template = {"user": ["Q:", "\n"]}
    with pytest.raises(ValueError, match="prompt_template .* must be null"):
        save(byte_tokenizer(prompt_template=template), tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer \(object\) must be flash_plugin.byte_tokenizer or"):
        save(object(), tmp_path)
    path = write_ranks(tmp_path / "x.tiktoken", {**RANKS, b"<|pad|>": 932})
    with pytest.raises(ValueError, match=r"special_tokens \(<\|pad\|>\) must not be ordinary tokens too"):
        save(tiktoken_tokenizer(path), tmp_path)
    with pytest.raises(ValueError, match=r"token id \(259\) must be one of the vocabulary of 259"):
        save(byte_tokenizer(), tmp_path).decode([65, 259])


def test_nothing_but_the_package_for_transformers_needs_it() -> None:
    for path in PACKAGE:
        packages = {name.partition(".")[0] for name in imports(path)}
        assert not packages & {"transformers", "huggingface_hub", "lm_eval"} or path.parent.name == "hugging_face"


@pytest.mark.parametrize(
    ("version", "named"),
    [(None, "no transformers"), ("5.0.1", "transformers 5.0.1"), ("4.56.2", "transformers 4.56.2")],
)
def test_a_missing_or_another_transformers_is_one_sentence(version: str | None, named: str) -> None:
    script = (
        "import importlib.metadata as metadata\n"
        "real, answer = metadata.version, " + repr(version) + "\n"
        "def version(name):\n"
        "    if name == 'transformers' and answer is None:\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return answer if name == 'transformers' else real(name)\n"
        "metadata.version = version\n"
        "import flash_plugin.hugging_face\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    sentence = (
        f"ImportError: flash_plugin.hugging_face needs transformers{TRANSFORMERS}, but this environment has {named}; "
        "run: pip install 'flash_plugin[hf]'"
    )
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, sentence)


def test_the_bounds_are_those_of_the_extra() -> None:
    assert f'hf = ["transformers{TRANSFORMERS}"]' in (ROOT / "pyproject.toml").read_text()
