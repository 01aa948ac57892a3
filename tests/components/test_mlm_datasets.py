"""What a masked language model is trained on: which tokens it must guess, what it sees, and where labels stand."""

import importlib.util
import inspect
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import config
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import ConcatDataset

from flash_plugin.components.mlm_datasets import mlm_collate, mlm_dataset, mlm_token_dataset
from flash_plugin.components.token_files import TokenWriter
from flash_plugin.components.tokenizers import byte_tokenizer

IGNORED = -100
PAD, MASK = 258, 259


def tokenizer(max_seq_len: int | None = 64) -> Any:
    return byte_tokenizer(max_seq_len, special_tokens=["<|mask|>"])


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Three documents of 300, 40 and 5 letters."""
    letters = np.random.default_rng(0)
    for name, length in (("a", 300), ("b", 40), ("c", 5)):
        (tmp_path / f"{name}.txt").write_bytes(letters.integers(97, 123, length, dtype=np.uint8).tobytes())
    return str(tmp_path)


def make(texts: str, **arguments: Any) -> Any:
    source = arguments.pop("source", texts)
    return mlm_dataset(tokenizer(arguments.pop("max_seq_len", 64)), source, split="all", **arguments)


def test_the_mask_token_takes_an_id_of_its_own_and_moves_none() -> None:
    plain, masked = byte_tokenizer(), tokenizer()
    assert plain.vocab_size == 259 and masked.vocab_size == 260
    assert {name: masked.special_tokens[name] for name in plain.special_tokens} == plain.special_tokens
    assert masked.encode("<|mask|>", add_bos=False, add_eos=False) == list(b"<|mask|>")


# Where labels stand, by the recipe's own shift.


@pytest.fixture(scope="module", params=["full_finetune_single_device", "full_finetune_distributed"])
def recipe(request: pytest.FixtureRequest) -> ModuleType:
    """A stock recipe as a module; its package refuses to be imported."""
    path = Path(torch.__file__).parents[1] / f"recipes/{request.param}.py"
    spec = importlib.util.spec_from_file_location(f"stock_{request.param}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(recipe: ModuleType, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The target that the recipe's loss gets for each position, ``[b, s]``, and what the model gets."""
    given: dict[str, Tensor] = {}
    (stock,) = [value for name, value in vars(recipe).items() if name.startswith("FullFinetuneRecipe")]

    def model(**arguments: Tensor) -> Tensor:
        given.update(arguments)
        return torch.arange(arguments["tokens"].numel()).reshape(*arguments["tokens"].shape, 1)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(logits[:, 0], torch.arange(len(labels)))
        return labels

    cache = torch.full((batch["tokens"].shape[0], 1), IGNORED)
    self = SimpleNamespace(
        _model=model, _loss_fn=loss, activations_handling_ctx=nullcontext(), ignore_labels_cache=cache
    )
    if hasattr(stock, "_loss_step"):
        return stock._loss_step(self, dict(batch)).reshape(batch["tokens"].shape), given
    # The distributed recipe has this line in the middle of its loop, where no test can call it.
    assert "(labels[..., 1:], self.ignore_labels_cache[: labels.shape[0]])" in inspect.getsource(stock.train)
    labels = batch["labels"]
    model(**{key: value for key, value in batch.items() if key != "labels"})
    return torch.hstack((labels[..., 1:], cache)), given


@pytest.mark.parametrize("masking", ["token", "span"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_recipe_compares_each_hidden_token_with_what_it_was(
    recipe: ModuleType, texts: str, packed: bool, masking: str
) -> None:
    dataset = make(texts, packed=packed, masking=masking, mask_fraction=0.9, maskings=20)
    plain = make(texts, packed=packed, mask_fraction=1e-9)
    collate: Any = padded_collate_packed if packed else partial(mlm_collate, padding_idx=PAD, ignore_idx=IGNORED)
    hidden = 0
    reached = set()
    for start in range(0, len(dataset), 4):
        indices = list(range(start, min(start + 4, len(dataset))))
        targets, given = compared(recipe, collate(dataset.__getitems__(indices)))
        assert set(given) == ({"tokens", "mask", "input_pos"} if packed else {"tokens", "mask"})
        for row, index in enumerate(indices):
            original = plain._source[index % len(plain)]["tokens"]
            length = len(original)
            seen, wanted = given["tokens"][row], targets[row]
            chosen = wanted != IGNORED
            text = torch.as_tensor(original)
            assert torch.equal(wanted[:length][chosen[:length]], text[chosen[:length]])
            assert not chosen[length:].any() and (seen[length:] == PAD).all()
            assert torch.equal(seen[:length][~chosen[:length]], text[~chosen[:length]])
            assert (seen == MASK).sum() == ((seen == MASK) & chosen).sum()
            hidden += int((seen == MASK).sum())
            reached |= {"first"} if chosen[0] else set()
            reached |= {"last"} if chosen[length - 1] and length == 63 else set()
    assert hidden > 1000
    assert reached == {"first", "last"}


@pytest.mark.parametrize("packed", [True, False])
def test_samples_with_their_added_place_are_as_long_as_asked(texts: str, packed: bool) -> None:
    dataset = make(texts, packed=packed, max_seq_len=32)
    collated = (padded_collate_packed if packed else mlm_collate)(list(dataset))
    assert collated["tokens"].shape[1] == collated["labels"].shape[1] == 32
    assert (collated["labels"][:, 0] == IGNORED).all()


def test_a_window_is_that_of_text_and_a_document_of_padding(texts: str) -> None:
    dataset = make(texts, packed=True)
    for index, sample in enumerate(dataset):
        window = dataset._source[index]
        assert sample["input_pos"].tolist() == [*window["input_pos"].tolist(), 0]
        assert sample["seq_lens"].tolist() == [*window["seq_lens"].tolist(), 1]
        assert sample["tokens"][-1] == PAD and sample["tokens"].dtype == torch.int64


def test_collate_tells_padding() -> None:
    samples = [
        {"tokens": [5, MASK, 7], "targets": [IGNORED, 6, IGNORED]},
        {"tokens": [9], "targets": [9]},
    ]
    batch = mlm_collate(samples, padding_idx=PAD, ignore_idx=-1)
    assert batch["tokens"].tolist() == [[5, MASK, 7, PAD], [9, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[-1, -1, 6, -1], [-1, 9, -1, -1]]
    assert batch["mask"].tolist() == [[True, True, True, False], [True, False, False, False]]


# When a sample is masked how.


def epoch(dataset: Any, number: int, *, batch_size: int = 4, workers: int = 0, shuffle: bool = True) -> dict[int, Any]:
    """What the model sees of every sample in one epoch, as the recipe loads it."""
    sampler = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=0)
    sampler.set_epoch(number)
    loader = StatefulDataLoader(dataset, batch_size, sampler=sampler, collate_fn=list, num_workers=workers)
    seen = [torch.as_tensor(sample["tokens"]).tolist() for batch in loader for sample in batch]
    sampler.set_epoch(number)
    return dict(zip(list(sampler), seen, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_each_epoch_masks_anew_and_the_same_in_every_process(texts: str, packed: bool) -> None:
    arguments: dict[str, Any] = dict(packed=packed, max_seq_len=24, masking="span")
    first, second = (epoch(make(texts, **arguments), number) for number in (0, 1))
    assert first.keys() == second.keys() and len(first) == len(make(texts, **arguments)) > 15
    assert sum(first[index] == second[index] for index in first) <= 1
    # Whoever resumes begins with the second epoch; workers share its batches, in whatever number.
    for workers in (1, 2):
        assert epoch(make(texts, **arguments), 1, workers=workers) == second
    assert epoch(make(texts, **arguments, seed=1), 1) != second


def test_what_a_sample_shares_its_batch_with_decides_and_nothing_else(texts: str) -> None:
    dataset, again = make(texts), make(texts)
    pair = dataset.__getitems__([3, 1])
    torch.rand(1), np.random.default_rng().random()
    assert pair == again.__getitems__([3, 1])
    assert dataset[3] == again.__getitems__([3])[0]
    assert dataset[3] not in (pair[0], dataset.__getitems__([3, 2])[0])
    assert dataset[-1] == dataset[len(dataset) - 1]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_maskings_repeat_samples_masked_differently_where_batches_do_not_differ(texts: str) -> None:
    once, often = make(texts), make(texts, maskings=5)
    assert len(often) == 5 * len(once)
    for alone in (epoch(often, 0, batch_size=1), epoch(often, 0, shuffle=False), epoch(ConcatDataset([often]), 0)):
        for index in range(len(once) - 1):  # the last document is too short to be masked in five ways
            assert len({tuple(alone[index + turn * len(once)]) for turn in range(5)}) == 5
    # What the docstring warns of.
    assert epoch(once, 0, batch_size=1) == epoch(once, 1, batch_size=1)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(mask_fraction=0.0), ["mask_fraction (0.0)", "between 0 and 1", "dataset.mask_fraction=0.15"]),
        (dict(mask_fraction=1), ["mask_fraction (1)"]),
        (dict(mask_fraction=float("nan")), ["mask_fraction (nan)"]),
        (dict(mask_fraction="15%"), ["mask_fraction ('15%')"]),
        (dict(masking="word"), ["masking ('word')", "token, span"]),
        (dict(mask_share=1.2), ["mask_share (1.2)", "between 0 and 1"]),
        (dict(random_share=-0.1), ["random_share (-0.1)"]),
        (dict(random_share=0.3), ["mask_share (0.8) and random_share (0.3)", "at most 1"]),
        (dict(maskings=0), ["maskings (0)", "positive integer"]),
        (dict(seed=-1), ["seed (-1)", "at least 0"]),
        (dict(seed=None), ["seed (None)"]),
        (dict(mask_token="[MASK]"), ["mask_token ('[MASK]')", "<|mask|>", "tokenizer.special_tokens=[[MASK]]"]),
        (dict(mask_token="<|pad|>"), ["mask_token ('<|pad|>')", "must not begin, end or fill up"]),
        (dict(packed=True, max_seq_len=None), ["packed (True)", "set tokenizer.max_seq_len"]),
        (dict(max_seq_len=2), ["tokenizer.max_seq_len (2)", "at least 3"]),
        (dict(min_samples=99), ["min_samples (99)"]),
        (dict(mask_fracton=0.1), ["mask_fracton (0.1)", "did you mean mask_fraction?"]),
    ],
)
def test_bad_arguments_get_a_sentence(texts: str, arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make(texts, **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_tokenizer_without_a_mask_token_is_refused(texts: str) -> None:
    with pytest.raises(
        ValueError, match=r"mask_token \('<\|mask\|>'\) must be a special token .*<\|pad\|>; set tokenizer"
    ):
        mlm_dataset(byte_tokenizer(64), texts)


def test_a_collate_function_that_forgets_padding_is_refused(texts: str) -> None:
    with pytest.raises(ValueError, match=r"set collate_fn=flash_plugin\.mlm_collate"):
        padded_collate_sft([make(texts)[0]])
    with pytest.raises(ValueError, match=r"batch \(samples of tokens, labels, input_pos, seq_lens\)"):
        mlm_collate([make(texts, packed=True)[0]])


# The ways of the recipes to name it, and corpora on disk.


def test_a_config_names_it_and_the_recipe_takes_packed_from_there(texts: str) -> None:
    cfg = OmegaConf.create({"_component_": "flash_plugin.mlm_dataset", "source": texts, "split": "all"})
    dataset = config.instantiate(cfg, tokenizer())
    assert dataset.packed is cfg.get("packed", False)
    packed = make(texts, packed=True)
    assert ConcatDataset([packed, packed]).packed and not ConcatDataset([dataset, dataset]).packed


@pytest.mark.parametrize("packed", [True, False])
def test_a_prepared_corpus_is_masked_as_its_text_is(texts: str, tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "tokens"
    with TokenWriter(folder, tokenizer(), {}) as writer:
        for path in sorted(Path(texts).glob("*.txt")):
            writer.append("train", np.array(tokenizer().encode(path.read_text()), np.uint32))
        writer.commit(3, "c.txt")
        writer.finish()
    expected = make(texts, packed=packed, source=[str(path) for path in sorted(Path(texts).glob("*.txt"))])
    found = mlm_token_dataset(tokenizer(), folder, packed=packed)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)
    with pytest.raises(ValueError, match="was made with another one"):
        mlm_token_dataset(byte_tokenizer(64, special_tokens=["<|mask|>", "<|user|>"]), folder)
