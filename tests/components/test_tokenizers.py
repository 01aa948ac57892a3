import base64
import itertools
import string
import time

import pytest
import requests
import tiktoken
from omegaconf import OmegaConf
from torchtune import config
from torchtune.data import Message
from torchtune.datasets._sft import SFTTransform
from torchtune.models.llama3._tokenizer import CL100K_PATTERN
from torchtune.modules.transforms.tokenizers import TikTokenBaseTokenizer

from flash_plugin.components import tokenizers
from flash_plugin.components.tokenizers import byte_tokenizer, tiktoken_tokenizer

PAIRS = ("".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2))
RANKS = {bytes([byte]): 255 - byte for byte in range(256)} | {pair.encode(): 256 + i for i, pair in enumerate(PAIRS)}
TEXTS = [
    "plain",
    "naïve 漢字 שלום \r\n\t",
    "👩🏽‍🚀 family 👨‍👩‍👧",
    "nul \0 and \x7f",
    "<|begin_of_text|>a<|end_of_text|>b<|pad|>",
    " " * 70_000 + "x" * 70_000,
    "",
]


def write_ranks(path, ranks):
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return str(path)


@pytest.fixture
def rank_file(tmp_path):
    return write_ranks(tmp_path / "pairs.tiktoken", RANKS)


@pytest.fixture(params=["bytes", "pairs"])
def tokenizer(request, rank_file):
    return byte_tokenizer() if request.param == "bytes" else tiktoken_tokenizer(rank_file)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_never_becomes_a_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not set(tokens[1:-1]) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode(text, add_bos=False, add_eos=False) == tokens[1:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_the_id_of_a_byte_is_the_byte(text):
    assert byte_tokenizer().encode(text, add_bos=False, add_eos=False) == list(text.encode())


def test_lone_surrogates_encode(tokenizer):
    assert len(tokenizer.decode(tokenizer.encode("a\ud800b"))) == 3


def test_special_tokens_follow_the_vocabulary(tokenizer):
    base = tokenizer.base_vocab_size
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id] == [base, base + 1, base + 2]
    assert (tokenizer.vocab_size, tokenizer.stop_tokens) == (base + 3, [tokenizer.eos_id])


def test_a_config_can_add_special_tokens_and_fix_their_ids():
    cfg = OmegaConf.create(
        {"_component_": "flash_plugin.components.tokenizers.byte_tokenizer", "special_tokens": ["<|user|>"]}
    )
    assert config.instantiate(cfg).special_tokens["<|user|>"] == 259
    cfg.special_tokens = {"<|end_of_text|>": 300, "<|user|>": 256}
    fixed = config.instantiate(cfg)
    assert fixed.special_tokens == {"<|end_of_text|>": 300, "<|user|>": 256, "<|begin_of_text|>": 257, "<|pad|>": 258}
    assert (fixed.eos_id, fixed.vocab_size) == (300, 301)


@pytest.mark.parametrize("special_tokens", [{"<|x|>": 65}, {"<|x|>": -1}, ["<|pad|>"], ["<|x|>", "<|x|>"], [""], "x"])
def test_impossible_special_tokens_are_refused(special_tokens):
    with pytest.raises(ValueError, match="special_tokens"):
        byte_tokenizer(special_tokens=special_tokens)


@pytest.mark.parametrize("tokens", [[128], [0xF0, 0x9F], [255] * 3, list(range(256))])
def test_ill_formed_bytes_decode(tokens):
    assert "\ufffd" in byte_tokenizer().decode(tokens)


def test_decoding_stops_at_the_first_eos_and_can_show_special_tokens():
    tokenizer = byte_tokenizer()
    a, b = b"ab"
    assert tokenizer.decode([256, a, 257, b, 258]) == "a"
    assert tokenizer.decode([257, a]) == ""
    assert tokenizer.decode([256, a, 257, b, 258], truncate_at_eos=False) == "ab"
    shown = tokenizer.decode([256, a, 257, b], truncate_at_eos=False, skip_special_tokens=False)
    assert shown == "<|begin_of_text|>a<|end_of_text|>b"


@pytest.mark.parametrize("token", [259, -1])
def test_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match="vocabulary of 259"):
        byte_tokenizer().decode([65, token])


def dialogue(*answers):
    for answer in answers:
        yield Message(role="user", content="ab", masked=True)
        yield Message(role="assistant", content=answer)


def test_training_messages_learn_each_answer_and_its_end():
    tokens, mask = byte_tokenizer().tokenize_messages(list(dialogue("c", "d")))
    assert tokens == [256, *b"ab", *b"c", 257, *b"ab", *b"d", 257]
    assert mask == [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2


def test_a_prompt_ends_where_the_model_shall_continue():
    sample = {"messages": list(dialogue("c", "")), "name": "kept"}
    result = byte_tokenizer()(sample, inference=True)
    assert result == {"tokens": [256, *b"ab", *b"c", 257, *b"ab"], "mask": [True] * 3 + [False] * 2 + [True] * 2} | {
        "name": "kept"
    }
    assert "messages" in sample
    assert byte_tokenizer()({"messages": list(dialogue(""))}, inference=True)["tokens"] == [256, *b"ab"]


def test_the_prompt_template_frames_messages():
    template = {"user": ["Q:", "\n"], "assistant": ["A:", ""]}
    tokenizer = byte_tokenizer(prompt_template=template)
    assert tokenizer({"messages": list(dialogue("c"))})["tokens"] == [256, *b"Q:ab\nA:c", 257]
    assert tokenizer({"messages": list(dialogue(""))}, inference=True)["tokens"] == [256, *b"Q:ab\nA:"]


def test_max_seq_len_cuts_training_messages_but_never_a_prompt():
    tokenizer = byte_tokenizer(max_seq_len=3)
    tokens, mask = tokenizer.tokenize_messages(list(dialogue("c")))
    assert (tokens, mask) == ([256, *b"ab"], [True] * 3)
    assert tokenizer({"messages": list(dialogue(""))}, inference=True)["tokens"] == [256, *b"ab"]
    with pytest.raises(ValueError, match=r"messages \(4 tokens\) must fit max_seq_len \(3\)"):
        tokenizer({"messages": [Message(role="user", content="abc")]}, inference=True)


def test_images_are_refused():
    with pytest.raises(ValueError, match="text only"):
        byte_tokenizer().tokenize_messages([Message(role="user", content=[{"type": "image", "content": None}])])


def test_torchtune_finetuning_labels_only_the_answer():
    labels = SFTTransform(model_transform=byte_tokenizer())({"messages": list(dialogue("c"))})["labels"]
    assert labels == [-100, -100, -100, ord("c"), 257]


def test_a_file_tokenises_as_tiktoken_does(rank_file):
    expected = tiktoken.Encoding("x", pat_str=CL100K_PATTERN, mergeable_ranks=RANKS, special_tokens={})
    text = "The quick brown fox, 1234 times!"
    assert tiktoken_tokenizer(rank_file).encode(text, False, False) == expected.encode_ordinary(text)


def test_a_file_that_was_trained_again_is_read_again(tmp_path):
    path = tmp_path / "same.tiktoken"
    first = tiktoken_tokenizer(write_ranks(path, RANKS))
    second = tiktoken_tokenizer(write_ranks(path, {token: 931 - rank for token, rank in RANKS.items()}))
    assert first.encode("hello") != second.encode("hello")
    assert first.fingerprint != second.fingerprint


def test_the_fingerprint_tells_tokenizers_apart_and_nothing_else(rank_file):
    make = (
        lambda: byte_tokenizer(),
        lambda: byte_tokenizer(special_tokens=["<|x|>"]),
        lambda: tiktoken_tokenizer(rank_file),
        lambda: tiktoken_tokenizer(rank_file, pattern=r"\s+|\S+"),
    )
    assert len({build().fingerprint for build in make}) == len(make)
    assert byte_tokenizer(max_seq_len=8).fingerprint == byte_tokenizer().fingerprint


@pytest.mark.parametrize("content", ["not base64 1\n", "QQ==\n", "QQ== x\n"])
def test_a_malformed_file_is_refused_with_its_line(tmp_path, content):
    path = write_ranks(tmp_path / "bad.tiktoken", RANKS)
    with open(path, "a") as file:
        file.write(content)
    with pytest.raises(ValueError, match="line 933"):
        tiktoken_tokenizer(path)


@pytest.mark.parametrize("ranks", [{b"a": 0}, RANKS | {b"zzz": 0}])
def test_a_file_that_cannot_encode_all_text_is_refused(tmp_path, ranks):
    with pytest.raises(ValueError, match="all 256 single bytes and each rank once"):
        tiktoken_tokenizer(write_ranks(tmp_path / "bad.tiktoken", ranks))


@pytest.mark.parametrize("name", ["gpt5", "/nowhere/a.tiktoken"])
def test_an_unknown_name_or_path_lists_the_names(name):
    with pytest.raises(ValueError, match=r"existing \.tiktoken file or one of gpt2, .*cl100k_base"):
        tiktoken_tokenizer(name)


def test_a_bad_pattern_is_refused(rank_file):
    with pytest.raises(ValueError, match=r"pattern \('\(a'\)"):
        tiktoken_tokenizer(rank_file, pattern="(a")


def test_a_named_encoding_keeps_its_own_special_tokens(monkeypatch):
    own = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=RANKS, special_tokens={"<|endoftext|>": 932})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", own)
    tokenizer = tiktoken_tokenizer("gpt2")
    assert (tokenizer.special_tokens["<|endoftext|>"], tokenizer.bos_id, tokenizer.vocab_size) == (932, 933, 936)
    with pytest.raises(ValueError, match=r"pattern .* must be null for gpt2"):
        tiktoken_tokenizer("gpt2", pattern=r"\S+")


def test_a_named_encoding_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    def offline(path):
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "o200k_base", raising=False)
    with pytest.raises(RuntimeError, match=r"set TIKTOKEN_CACHE_DIR .* or give a \.tiktoken file"):
        tiktoken_tokenizer("o200k_base")


@pytest.mark.parametrize("length", [24_999, 25_000, 25_001, 50_000, 50_001, 75_002])
@pytest.mark.parametrize("run", [" ", "x"])
def test_long_runs_are_cut_where_torchtune_cuts_them(length, run):
    text = f"a {run * length} b{run * length}"
    assert list(tokenizers._cut_long_runs(text)) == list(
        TikTokenBaseTokenizer._split_long_repetitions(None, text, 25_000)
    )


@pytest.mark.parametrize(
    "text",
    ["xy" * 500_000, " " * 1_000_000, "ab cd\n" * 500_000, ("x" * 20_000 + " ") * 50, (" " * 20_000 + "x") * 50],
    ids=["word", "blank", "lines", "long words", "long blanks"],
)
def test_long_texts_take_seconds(tokenizer, text):
    start = time.perf_counter()
    tokens = tokenizer.encode(text)
    assert time.perf_counter() - start < 10
    assert tokenizer.decode(tokens) == text


def test_misspelt_keys_and_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="did you mean max_seq_len"):
        byte_tokenizer(max_seq_length=8)
    with pytest.raises(ValueError, match=r"max_seq_len \(0\)"):
        byte_tokenizer(max_seq_len=0)
