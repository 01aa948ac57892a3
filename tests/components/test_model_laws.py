"""Laws 1 to 3 (DESIGN section 1) for whole models, through the arguments torchtune passes."""

import itertools

import pytest
import torch
from torch import Tensor
from torchtune.data import padded_collate_packed
from torchtune.datasets import PackedDataset
from torchtune.generation import generate

import flash_plugin
from tests.tolerances import assert_close

VOCABULARY, CHUNK = 30, 8


def model(family: str = "flash", **arguments: object) -> flash_plugin.FlashDecoder:
    """A model whose weights reach every part: initial queries and keys are near zero, biases are zero."""
    torch.manual_seed(0)
    if family == "flash":
        arguments = {"chunk_size": CHUNK, **arguments}
    sizes = dict(vocab_size=VOCABULARY, num_layers=2, embed_dim=24, max_seq_len=1024, qk_dim=12)
    built = getattr(flash_plugin, family)(**sizes, **arguments).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if any(part in name for part in ("offset_scale", "position_bias")):
                parameter.normal_(std=0.6)
    return built


VARIANTS = [
    pytest.param(
        family,
        dict(
            activation=activation,
            position_bias=bias,
            token_shift=shift,
            absolute_position=absolute,
            rope_dim=rope_dim,
            norm=norm,
        ),
        id=f"{family}-{activation}-{bias}",
    )
    for (family, activation), (bias, shift, absolute, rope_dim, norm) in itertools.product(
        itertools.product(["flash", "flash_quad"], ["relu2", "laplace", "softplus2", "softmax"]),
        [
            ("none", True, False, None, "rmsnorm"),
            ("rope", False, True, 0, "layernorm"),
            ("toeplitz", True, True, 4, "scalenorm"),
            ("t5", True, False, 6, "rmsnorm"),
        ],
    )
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "arguments"), VARIANTS)
def test_prefix_logits_do_not_change_when_tokens_follow(family: str, arguments: dict[str, object]) -> None:
    built = model(family, **arguments)
    tokens = torch.randint(VOCABULARY, (2, 130))
    whole = built(tokens)
    for length in (1, 7, 63, 128):
        assert_close(built(tokens[:, :length]), whole[:, :length], "law_fp32")


@torch.no_grad()
@pytest.mark.parametrize(("family", "arguments"), VARIANTS)
def test_a_packed_document_gets_the_logits_it_gets_alone(family: str, arguments: dict[str, object]) -> None:
    built = model(family, **arguments)
    lengths = [1, 7, 63, 20, 1, 38]
    tokens = torch.randint(VOCABULARY, (1, sum(lengths)))
    packed = built(tokens, input_pos=torch.cat([torch.arange(length) for length in lengths])[None])
    for document, logits in zip(tokens.split(lengths, dim=1), packed.split(lengths, dim=1), strict=True):
        assert_close(logits, built(document), "law_fp32")


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("family", "arguments"), VARIANTS)
def test_padding_changes_nothing_at_real_tokens(family: str, arguments: dict[str, object], causal: bool) -> None:
    built = model(family, causal=causal, **arguments)
    documents = [torch.randint(VOCABULARY, (1, length)) for length in (37, 5)]
    alone = [built(document) for document in documents]
    for left in (True, False):
        rows, masks = [], []
        for document in documents:
            padding = (40 - document.shape[1], 0) if left else (0, 40 - document.shape[1])
            rows.append(torch.nn.functional.pad(document, padding, value=3))
            masks.append(torch.nn.functional.pad(torch.ones_like(document, dtype=torch.bool), padding))
        mask = torch.cat(masks)
        logits = built(torch.cat(rows), mask=mask)
        for row in range(2):
            assert_close(logits[row, mask[row]][None], alone[row], "law_fp32")


@torch.no_grad()
@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_a_key_mask_of_s_by_s_is_padding_for_a_bidirectional_model(family: str) -> None:
    built = model(family, causal=False)
    tokens = torch.randint(VOCABULARY, (2, 20))
    padding = torch.arange(20) < torch.tensor([[20], [11]])
    logits = built(tokens, mask=padding[:, None, :].expand(-1, 20, -1))
    assert_close(logits[padding], built(tokens, mask=padding)[padding], "law_fp32")


class Documents:
    """Unpacked samples, longer and shorter than a pack."""

    def __init__(self, lengths: list[int]) -> None:
        self.samples = [torch.randint(1, VOCABULARY, (length,)).tolist() for length in lengths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": self.samples[index], "labels": self.samples[index]}


@torch.no_grad()
@pytest.mark.parametrize("split_across_pack", [True, False])
@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_stock_packed_batches_are_accepted_with_their_masks(family: str, split_across_pack: bool) -> None:
    built = model(family)
    lengths = [10, 70, 33, 64, 5, 150] if split_across_pack else [10, 30, 33, 64, 5, 50]
    packs = PackedDataset(Documents(lengths), max_seq_len=64, split_across_pack=split_across_pack)
    batch = padded_collate_packed([packs[i] for i in range(len(packs))])
    del batch["labels"]
    with_mask = built(**batch)
    del batch["mask"]
    assert_close(with_mask, built(**batch), "law_fp32")


@pytest.mark.parametrize("family", ["flash", "flash_quad"])
def test_ragged_prompts_in_a_batch_generate_what_they_generate_alone(family: str) -> None:
    built = model(family)
    prompts = [torch.randint(1, VOCABULARY, (length,)) for length in (11, 3, 8)]
    batch = torch.stack([torch.nn.functional.pad(prompt, (11 - len(prompt), 0)) for prompt in prompts])
    together, _ = generate(built, batch, max_generated_tokens=12, pad_id=0, top_k=1)
    for row, prompt in enumerate(prompts):
        alone, _ = generate(built, prompt, max_generated_tokens=12, pad_id=0, top_k=1)
        assert torch.equal(together[row, 11:], alone[0, len(prompt) :])


def causal_mask(length: int) -> Tensor:
    return torch.ones(1, length, length, dtype=torch.bool).tril()


def changed(mask: Tensor, row: int, column: int) -> Tensor:
    mask = mask.clone()
    mask[0, row, column] = ~mask[0, row, column]
    return mask


PACKED = torch.cat([torch.arange(5), torch.arange(7)])[None]
BLOCKS = torch.block_diag(torch.ones(5, 5).tril(), torch.ones(7, 7).tril()).bool()[None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mask", "input_pos", "words"),
    [
        (changed(causal_mask(12), 3, 9), None, ["mask[0, 3, 9] (True)", "later"]),
        (torch.ones(1, 12, 12, dtype=torch.bool), None, ["mask[0, 0, 1] (True)", "causal=False"]),
        (changed(causal_mask(12), 9, 3), None, ["mask[0, 9, 3] (False)", "single document"]),
        (BLOCKS, None, ["mask[0, 5, 0]", "single document", "input_pos"]),
        (causal_mask(12), PACKED, ["mask[0, 5, 0] (True)", "agree with input_pos"]),
        (changed(BLOCKS, 4, 1), PACKED, ["mask[0, 4, 1] (False)", "agree with input_pos"]),
        (causal_mask(12).float(), None, ["dtype torch.float32", "bool"]),
        (causal_mask(9), None, ["shape (1, 9, 9)", "(1, 12)"]),
        (object(), None, ["mask (object)", "input_pos"]),
        (causal_mask(12)[0], None, ["mask (shape (12, 12), causal)", "batch axis"]),
    ],
)
def test_a_mask_that_cannot_be_honoured_is_refused(
    mask: object, input_pos: Tensor | None, words: list[str], training: bool
) -> None:
    built = model().train(training)
    rows = 12 if isinstance(mask, Tensor) and mask.dim() == 2 else 1
    with pytest.raises(ValueError) as caught:
        built(torch.randint(VOCABULARY, (rows, 12)), mask=mask, input_pos=input_pos)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "input_pos", "words"),
    [
        (torch.tensor([[1, 30]]), None, ["token id (30)", "vocab_size", "[0, 30)"]),
        (torch.tensor([[-1, 2]]), None, ["token id (-1)"]),
        (torch.zeros(1, 1025, dtype=torch.long), None, ["1025", "max_seq_len (1024)", "tokenizer.max_seq_len"]),
        (torch.zeros(2, 4, dtype=torch.long), torch.arange(5), ["input_pos (shape (5,))", "(2, 4)"]),
        (torch.zeros(1, 2, dtype=torch.long), torch.tensor([1023, 1024]), ["input_pos (1024)", "max_seq_len"]),
        (torch.zeros(4, dtype=torch.long), None, ["tokens (shape (4,))", "[batch, sequence]"]),
    ],
)
def test_bad_inputs_get_a_sentence(tokens: Tensor, input_pos: Tensor | None, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        model()(tokens, input_pos=input_pos)
    for word in words:
        assert word in str(caught.value)


@torch.no_grad()
def test_positions_of_one_row_serve_a_batch_with_padding() -> None:
    built, tokens = model(), torch.randint(VOCABULARY, (2, 16))
    mask = torch.arange(16) < torch.tensor([[16], [9]])
    assert_close(built(tokens, mask=mask, input_pos=torch.arange(16))[mask], built(tokens, mask=mask)[mask], "law_fp32")


@pytest.mark.parametrize("shape", ["[s]", "[1, s]", "[b, s]"])
def test_positions_of_every_shape_torchtune_uses(shape: str) -> None:
    built, tokens = model(), torch.randint(VOCABULARY, (3, 9))
    position = {"[s]": torch.arange(9), "[1, s]": torch.arange(9)[None], "[b, s]": torch.arange(9).expand(3, -1)}[shape]
    assert_close(built(tokens, input_pos=position), built(tokens), "law_fp32")
