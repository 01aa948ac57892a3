"""Which tokens are hidden, how often, and what is seen of them."""

import base64
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flash_plugin.components.masking import _SPAN_LENGTHS, _SPAN_WEIGHTS, make_masker
from flash_plugin.components.tokenizers import byte_tokenizer, tiktoken_tokenizer

IGNORED = -100
BOS, EOS, PAD, MASK = 256, 257, 258, 259


def masker(masking: str, fraction: float = 0.15, mask_share: float = 0.8, random_share: float = 0.1) -> Any:
    return make_masker(
        byte_tokenizer(special_tokens=["<|mask|>"]), masking, fraction, mask_share, random_share, "<|mask|>"
    )


def runs(chosen: Any) -> list[int]:
    """Lengths of the runs of True."""
    return [len(list(group)) for value, group in itertools.groupby(chosen.tolist()) if value]


@pytest.mark.parametrize("masking", ["token", "span"])
def test_shares_are_15_percent_and_80_10_10(masking: str) -> None:
    mask, random = masker(masking), np.random.default_rng(1)
    tokens = np.random.default_rng(2).integers(0, 256, (400, 1000))
    fates: Counter[str] = Counter()
    for row in tokens:
        seen, targets = mask(row, random)
        chosen = targets != IGNORED
        assert np.array_equal(targets[chosen], row[chosen])
        assert np.array_equal(seen[~chosen], row[~chosen])
        assert chosen.sum() == 150
        fates["mask"] += int((seen[chosen] == MASK).sum())
        fates["kept"] += int((seen[chosen] == row[chosen]).sum())
        fates["random"] += int(((seen[chosen] != MASK) & (seen[chosen] != row[chosen])).sum())
        assert seen.max() <= MASK and not np.isin(seen, [BOS, EOS, PAD]).any()
    total = 400 * 150
    # Five standard deviations of as many coin tosses, of which a span shares one.
    shared = (_SPAN_LENGTHS**2 @ _SPAN_WEIGHTS) / (_SPAN_LENGTHS @ _SPAN_WEIGHTS) if masking == "span" else 1.0
    spread = 5 * (shared / total) ** 0.5
    random_share = 0.1 * 255 / 256  # one draw in 256 is what was there
    assert abs(fates["mask"] / total - 0.8) < spread * (0.8 * 0.2) ** 0.5
    assert abs(fates["random"] / total - random_share) < spread * (0.1 * 0.9) ** 0.5
    assert abs(fates["kept"] / total - (0.2 - random_share)) < spread * (0.1 * 0.9) ** 0.5


@pytest.mark.parametrize("masking", ["token", "span"])
def test_every_place_is_chosen_as_often(masking: str) -> None:
    mask, random = masker(masking), np.random.default_rng(1)
    counts = np.zeros(40)
    for _ in range(5000):
        counts += mask(np.arange(40), random)[1] != IGNORED
    assert counts.sum() == 6 * 5000  # 15 % of 40
    assert np.abs(counts / 5000 - 0.15).max() < 5 * (0.15 * 0.85 / 5000) ** 0.5


def test_random_tokens_are_ordinary_ones_all_alike() -> None:
    mask, random = masker("token", 0.5, mask_share=0.0, random_share=1.0), np.random.default_rng(1)
    seen, targets = mask(np.full(200_000, 7), random)
    drawn = np.bincount(seen[targets != IGNORED], minlength=260)
    assert drawn.sum() == 100_000 and drawn[256:].sum() == 0
    expected = 100_000 / 256
    assert ((drawn[:256] - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5


def test_spans_have_spanberts_lengths_and_one_fate_each() -> None:
    assert abs(float(_SPAN_LENGTHS @ _SPAN_WEIGHTS) - 3.8) < 0.01
    mask, random = masker("span"), np.random.default_rng(1)
    found: Counter[int] = Counter()
    for _ in range(200):
        tokens = random.integers(0, 256, 2000)
        seen, targets = mask(tokens, random)
        chosen = targets != IGNORED
        found.update(runs(chosen))
        for start, stop in itertools.pairwise([0, *(np.flatnonzero(np.diff(chosen)) + 1), len(chosen)]):
            if chosen[start]:
                hidden = seen[start:stop] == MASK
                assert hidden.all() or not hidden.any()
    spans = sum(found.values())
    assert max(found) == 10
    # The last span of a sample, one of 80, is cut short.
    for length, weight in zip(_SPAN_LENGTHS.tolist(), _SPAN_WEIGHTS.tolist(), strict=True):
        assert abs(found[length] / spans - weight) < 1 / 80 + 5 * (weight / spans) ** 0.5, length


def test_spans_do_not_touch_while_there_is_room() -> None:
    mask, random = masker("span", 0.5), np.random.default_rng(1)
    longest = [max(runs(mask(np.arange(40), random)[1] != IGNORED)) for _ in range(1000)]
    assert max(longest) == 10


@pytest.mark.parametrize("masking", ["token", "span"])
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.9, 0.99])
def test_special_tokens_are_never_targets_and_short_samples_have_one(masking: str, fraction: float) -> None:
    mask, random = masker(masking, fraction), np.random.default_rng(1)
    counts = []
    for _ in range(300):
        tokens = np.array([BOS, 1, 2, 3, EOS, BOS, 4, 5, 6, 7, 8, MASK, EOS, PAD, PAD])
        seen, targets = mask(tokens, random)
        special = tokens > 255
        assert np.array_equal(seen[special], tokens[special]) and (targets[special] == IGNORED).all()
        counts.append(int((targets != IGNORED).sum()))
    assert set(counts) <= ({1} if fraction * 8 < 1 else {int(fraction * 8), int(fraction * 8) + 1})
    assert fraction * 8 < 1 or abs(np.mean(counts) - fraction * 8) < 5 * 0.5 / 300**0.5
    nothing = np.array([BOS, EOS, PAD])
    assert mask(nothing, random)[1].tolist() == [IGNORED] * 3


def test_random_tokens_of_a_trained_vocabulary_leave_its_special_tokens_out(tmp_path: Path) -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"ab", b"cd"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    (tmp_path / "small.tiktoken").write_bytes(b"\n".join(lines))
    made = tiktoken_tokenizer(str(tmp_path / "small.tiktoken"), 64, special_tokens=["<|mask|>", "<|user|>"])
    mask = make_masker(made, "token", 0.15, 0.8, 0.1, "<|mask|>")
    assert mask.ordinary_ids.tolist() == list(range(258))
    assert mask.special_ids.tolist() == [258, 259, 260, 261, 262] and mask.mask_id == 261
