"""FlashCache as torchtune handles it: set-up, reset, size, masks, errors, generation, compilation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.generation import generate
from torchtune.modules import delete_kv_caches, disable_kv_cache, local_kv_cache

import flash_plugin
from tests.components.decoding import VOCABULARY, feed, model
from tests.tolerances import assert_close

FAMILIES = pytest.mark.parametrize("family", ["flash", "flash_quad"])


def caches(built: flash_plugin.FlashDecoder) -> list[flash_plugin.FlashCache]:
    return [module for module in built.modules() if isinstance(module, flash_plugin.FlashCache)]


def cache_bytes(built: flash_plugin.FlashDecoder) -> int:
    return sum(buffer.nbytes for cache in caches(built) for buffer in cache.buffers())


def test_flash_keeps_as_much_of_a_long_context_as_of_a_short_one() -> None:
    sizes = []
    for length in (1_000, 100_000):
        built = model(max_seq_len=length, token_shift=True)
        built.setup_caches(2, torch.float32, decoder_max_seq_len=length)
        sizes.append(cache_bytes(built))
    z, e, c, d = 12, 48, 8, 24
    numbers = 4 * (z * e + c * (2 * z + e) + d // 2) + 8 * 3  # float32, and the cursor's three int64
    assert sizes == [2 * 2 * numbers] * 2  # rows, layers


def test_flash_quad_keeps_keys_and_values_of_every_token() -> None:
    built = model("flash_quad")
    built.setup_caches(2, torch.bfloat16, decoder_max_seq_len=100)
    assert cache_bytes(built) == 2 * 2 * (2 * 100 * (12 + 48) + 8 * 3)


@FAMILIES
def test_torchtunes_functions_find_the_cache(family: str) -> None:
    built = model(family)
    tokens = torch.randint(VOCABULARY, (2, 20))
    expected = built(tokens)
    assert not built.caches_are_setup() and not built.caches_are_enabled()

    built.setup_caches(2, torch.float32, decoder_max_seq_len=40)
    assert built.caches_are_setup() and built.caches_are_enabled()
    assert built.decoder_max_cache_seq_len == 40
    for layer in built.layers:
        assert isinstance(layer.attn.kv_cache, flash_plugin.FlashCache) and layer.attn.cache_enabled
    with torch.no_grad():
        feed(built, tokens, torch.arange(20), [7, 1, 12])
    held = copy.deepcopy([list(cache.buffers()) for cache in caches(built)])

    with disable_kv_cache(built):
        assert built.caches_are_setup() and not built.caches_are_enabled()
        assert torch.equal(built(tokens), expected)
    assert built.caches_are_enabled()
    for cache, buffers in zip(caches(built), held, strict=True):
        assert all(torch.equal(*pair) for pair in zip(cache.buffers(), buffers, strict=True))

    built.reset_caches()
    fresh = model(family)
    fresh.setup_caches(2, torch.float32, decoder_max_seq_len=40)
    for cache, other in zip(caches(built), caches(fresh), strict=True):
        assert cache.empty
        assert all(torch.equal(*pair) for pair in zip(cache.buffers(), other.buffers(), strict=True))

    delete_kv_caches(built)
    assert not built.caches_are_setup() and not built.caches_are_enabled() and not caches(built)
    with local_kv_cache(built, batch_size=2, device=torch.device("cpu"), dtype=torch.float32, decoder_max_seq_len=20):
        assert_close(feed(built, tokens, torch.arange(20), [20]), expected, "law_fp32")
    assert not caches(built)
    assert torch.equal(built(tokens), expected)


@FAMILIES
def test_the_cache_is_in_no_checkpoint_and_setting_up_again_replaces_it(family: str) -> None:
    built = model(family)
    keys = list(built.state_dict())
    built.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    assert list(built.state_dict()) == keys
    built.load_state_dict(model(family).state_dict())
    built.setup_caches(3, torch.bfloat16)
    assert all(cache.batch_size == 3 and cache.values.dtype == torch.bfloat16 for cache in caches(built))
    assert built.decoder_max_cache_seq_len == 256


def ragged(lengths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Prompts, and the batch of them padded on the left with 0."""
    torch.manual_seed(1)
    prompts = [torch.randint(1, VOCABULARY, (length,)) for length in lengths]
    return prompts, torch.stack([F.pad(prompt, (max(lengths) - len(prompt), 0)) for prompt in prompts])


@FAMILIES
@pytest.mark.parametrize("lengths", [(11, 3, 8, 1), (17, 16, 9), (5,), (1,), (1, 1)])
def test_ragged_prompts_generate_what_each_does_alone_without_a_cache(family: str, lengths: tuple[int, ...]) -> None:
    built = model(family, token_shift=True, position_bias="t5")
    prompts, batch = ragged(lengths)
    alone = [generate(built, prompt, max_generated_tokens=25, pad_id=0, top_k=1) for prompt in prompts]
    built.setup_caches(len(lengths), torch.float32, decoder_max_seq_len=max(lengths) + 25)
    for _ in range(2):
        tokens, logits = generate(built, batch, max_generated_tokens=25, pad_id=0, top_k=1)
        for row, (expected, expected_logits) in enumerate(alone):
            assert torch.equal(tokens[row, max(lengths) :], expected[0, lengths[row] :])
            # Without a cache torchtune returns the logits of every token at each step.
            assert_close(logits[row, -1], expected_logits[0, -1], "law_fp32")
        built.reset_caches()


@torch.no_grad()
@FAMILIES
def test_a_quantized_model_decodes_what_it_gives_to_whole_sequences(family: str) -> None:
    built = flash_plugin.Int8WeightOnlyQuantizer().quantize(model(family, token_shift=True))
    tokens = torch.randint(VOCABULARY, (2, 30))
    expected = built(tokens)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=30)
    assert_close(feed(built, tokens, torch.arange(30), [13] + [1] * 17), expected, "law_fp32")


@FAMILIES
def test_stop_tokens_end_rows_of_a_cached_batch(family: str) -> None:
    built = model(family)
    _, batch = ragged((6, 4))
    plain, _ = generate(built, batch, max_generated_tokens=12, pad_id=0, top_k=1)
    stop = [int(plain[0, 9])]
    expected, _ = generate(built, batch, max_generated_tokens=12, pad_id=0, top_k=1, stop_tokens=stop)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=18)
    found, _ = generate(built, batch, max_generated_tokens=12, pad_id=0, top_k=1, stop_tokens=stop)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("flash", dict(causal=False), ["causal (False)", "enable_kv_cache=False"]),
        ("flash_quad", dict(causal=False), ["causal (False)", "enable_kv_cache=False"]),
        ("flash", dict(normalizer="paper"), ["normalizer ('paper')", "visible or chunk", "model.normalizer=visible"]),
        ("flash_quad", dict(normalizer="paper"), ["normalizer ('paper')", "must be visible to"]),
        ("flash_quad", dict(normalizer="chunk", activation="softmax"), ["normalizer ('chunk')", "must be visible to"]),
    ],
)
def test_a_model_that_cannot_decode_says_so(family: str, arguments: dict[str, object], words: list[str]) -> None:
    built = model(family, **arguments)
    with pytest.raises(ValueError) as caught:
        built.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    assert not built.caches_are_setup()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch_size=0, dtype=torch.float32), ["batch_size (0)", "positive integer"]),
        (dict(batch_size=1, dtype=torch.int8), ["dtype (torch.int8)", "floating"]),
        (dict(batch_size=1, dtype=torch.float32, decoder_max_seq_len=0), ["decoder_max_seq_len (0)", "positive"]),
        (
            dict(batch_size=1, dtype=torch.float32, decoder_max_seq_len=257),
            ["decoder_max_seq_len (257)", "max_seq_len (256)", "max_new_tokens", "unlimited_decoding=True"],
        ),
    ],
)
def test_a_cache_that_cannot_be_gets_a_sentence(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        model().setup_caches(**arguments)
    for word in words:
        assert word in str(caught.value)


@FAMILIES
@pytest.mark.parametrize(
    ("rows", "position", "words"),
    [
        (2, None, ["input_pos (None)", "cache"]),
        (3, [[4]], ["batch size 3", "cache (2)"]),
        (2, [[20]], ["input_pos (20)", "[0, decoder_max_seq_len) = [0, 20)", "set the cache up for more"]),
        (2, [[-1]], ["input_pos (-1)"]),
        (2, [4, 5, 6], ["input_pos (shape (3,))", "(2, 1)"]),
    ],
)
def test_a_bad_call_gets_a_sentence(family: str, rows: int, position: object, words: list[str]) -> None:
    built = model(family)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=20)
    with pytest.raises(ValueError) as caught:
        built(torch.ones(rows, 1, dtype=torch.long), input_pos=None if position is None else torch.tensor(position))
    for word in words:
        assert word in str(caught.value)


@torch.no_grad()
def test_flash_quad_says_when_its_cache_is_full() -> None:
    built = model("flash_quad")
    built.setup_caches(1, torch.float32, decoder_max_seq_len=20)
    tokens = torch.randint(VOCABULARY, (1, 20))
    feed(built, tokens, torch.arange(20) % 10, [13, 1, 6])  # two documents fill it
    with pytest.raises(ValueError, match=r"decoder_max_seq_len 20.* 21 tokens .*reset_caches"):
        built(tokens[:, :1], input_pos=torch.tensor([10]))


def masks_of(position: Tensor, length: int) -> Tensor:
    """What torchtune's generate passes: each token sees its document's places, of ``length``."""
    index = torch.arange(position.shape[1])
    starts = (position == 0) | (index == 0)
    first = torch.where(starts, index, 0).cummax(dim=1).values
    places = torch.arange(length)
    return (places <= index[:, None]) & (places >= first[..., None])


POSITION = torch.stack([torch.arange(20), (torch.arange(20) - 6).clamp(min=0)])


def changed(mask: Tensor, *where: int) -> Tensor:
    mask = mask.clone()
    mask[where] = ~mask[where]
    return mask


@torch.no_grad()
@FAMILIES
def test_masks_of_the_cache_must_agree_with_positions(family: str) -> None:
    built = model(family)
    tokens = torch.randint(VOCABULARY, (2, 20))
    expected = built(tokens, input_pos=POSITION)
    mask = masks_of(POSITION, 30)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=30)

    def call(start: int, stop: int, mask: Tensor) -> Tensor:
        return built(tokens[:, start:stop], input_pos=POSITION[:, start:stop], mask=mask)

    for wrong, words in [
        (mask[:, :12, :20], "(2, 12, 20)"),
        (mask[:, :12].float(), "dtype torch.float32"),
        (mask[0, :12], "must be [1 or b, s, decoder_max_cache_seq_len] = (2, 12, 30)"),
        (changed(mask[:, :12], 1, 9, 3), "mask[1, 9, 3] (True)"),
        (changed(mask[:, :12], 0, 9, 3), "mask[0, 9, 3] (False)"),
        (changed(mask[:, :12], 0, 9, 25), "mask[0, 9, 25] (True)"),
        (mask[:1, :12], "mask[1, 1, 0] (True) must be False"),
    ]:
        with pytest.raises(ValueError) as caught:
            call(0, 12, wrong)
        assert words in str(caught.value)
    assert all(cache.empty for cache in caches(built))

    found = [call(0, 12, mask[:, :12]), call(12, 13, mask[:, 12:13]), call(13, 20, mask[:, 13:])]
    assert_close(torch.cat(found, dim=1), expected, "law_fp32")
    with pytest.raises(ValueError, match=r"the 20 tokens given to the cache before; call reset_caches"):
        call(0, 5, mask[:, :5])


@torch.no_grad()
@FAMILIES
def test_prefill_and_steps_compile_without_a_break(family: str) -> None:
    built = model(family, position_bias="t5", token_shift=True, absolute_position=True)
    tokens = torch.randint(VOCABULARY, (2, 20))
    expected, mask = built(tokens, input_pos=POSITION), masks_of(POSITION, 30)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=30)
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    found = [compiled(tokens[:, :9], input_pos=POSITION[:, :9], mask=mask[:, :9])]
    found += [compiled(tokens[:, t, None], input_pos=POSITION[:, t], mask=mask[:, t, None]) for t in (9, 10)]
    with torch._dynamo.config.patch(error_on_recompile=True):  # further steps are the same graph
        found += [compiled(tokens[:, t, None], input_pos=POSITION[:, t], mask=mask[:, t, None]) for t in range(11, 19)]
    assert_close(torch.cat(found, dim=1), expected[:, :19], "law_fp32")
    with pytest.raises(RuntimeError, match="mask must agree with input_pos"):
        compiled(tokens[:, 19, None], input_pos=POSITION[:, 19], mask=changed(mask[:, 19, None], 1, 0, 2))


@FAMILIES
@pytest.mark.parametrize("activation", ["relu2", "softmax"])
def test_no_value_is_read_back_from_a_device(family: str, activation: str) -> None:
    # A meta tensor has none to read: whatever would wait for an accelerator raises here.
    arguments = dict(position_bias="rope", token_shift=True, absolute_position=True, activation=activation)
    with torch.device("meta"):
        built = model(family, **arguments)
        built.setup_caches(2, torch.float32, decoder_max_seq_len=30)
    mask = masks_of(POSITION, 30).to("meta")
    for start, stop in [(0, 9), (9, 10), (10, 11), (11, 17)]:
        tokens = torch.zeros(2, stop - start, dtype=torch.long, device="meta")
        logits = built(tokens, input_pos=POSITION[:, start:stop].to("meta"), mask=mask[:, start:stop])
        assert logits.shape == (2, stop - start, VOCABULARY)
    built.reset_caches()


@FAMILIES
def test_a_call_with_gradients_leaves_none_in_the_cache(family: str) -> None:
    built = model(family, token_shift=True)
    built.setup_caches(2, torch.float32, decoder_max_seq_len=30)
    feed(built, torch.randint(VOCABULARY, (2, 20)), POSITION, [9, 1, 10])
    assert not any(buffer.requires_grad for cache in caches(built) for buffer in cache.buffers())
