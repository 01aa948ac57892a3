"""The four laws for models with layers of flash-linear-attention.

Without a GPU one layer runs with the package's own plain recurrence in place of its kernels: its packing, its padding
and its cache are then the package's own, and so is all that is checked. With a GPU all layers run as they are.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.data import padded_collate_packed
from torchtune.generation import generate
from torchtune.modules.common_utils import disable_kv_cache

import flash_plugin
from flash_plugin.components import fla_layers
from flash_plugin.components.fla_layers import LAYERS
from tests.components.swapped import LLAMA, SIZES, tokens
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash_plugin[fla]")
GLA = "GatedLinearAttention"
LENGTHS = [23, 1, 5, 27]
PIECES = [pytest.param(pieces, id=name) for name, pieces in (("single", [1] * 30), ("prompt", [20] + [1] * 10))]


def swapped(name: str = GLA, **arguments: object) -> nn.Module:
    """A Llama with the layer in every second place, so that caches of both kinds lie side by side."""
    torch.manual_seed(0)
    sizes = {**SIZES, "layers": "every_2", **arguments}
    return flash_plugin.swap_attention(LLAMA, attention=f"fla.layers.{name}", **sizes).eval()


def causal(given: int, length: int, held: int, padding: int = 0) -> Tensor:
    """Torchtune's mask ``[1, s, held]`` over a cache: nothing of left padding, but that it sees itself."""
    index, now = torch.arange(held), given + torch.arange(length)[:, None]
    return ((index <= now) & ((index >= padding) & (now >= padding) | (index == now)))[None]


def check_packing(model: nn.Module, device: str = "cpu") -> None:
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    pack = {"tokens": torch.cat(texts), "labels": torch.cat(texts), "seq_lens": torch.tensor(LENGTHS)}
    pack["input_pos"] = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = padded_collate_packed([pack])
    batch.pop("labels")
    together = model(**{name: value.to(device) for name, value in batch.items()})[0].split(LENGTHS)
    for text, found in zip(texts, together, strict=True):
        assert_close(found, model(text[None].to(device))[0], "law_fp32")


def check_decoding(model: nn.Module, pieces: list[int], device: str = "cpu") -> None:
    """Three times: a document in an empty cache, one more behind it, and one behind a reset."""
    text = tokens(2, sum(pieces)).to(device)
    whole = model(text)
    with torch.device(device):
        model.setup_caches(2, torch.float32, decoder_max_seq_len=64)
    for before in (0, text.shape[1], 0):
        if not before:
            model.reset_caches()
        found, given = [], 0
        for part in text.split(pieces, dim=1):
            size = part.shape[1]
            where = torch.arange(given, given + size, device=device)[None].expand(2, -1)
            mask = causal(before + given, size, 64, before).to(device)
            found.append(model(part, mask=mask, input_pos=where))
            given += size
        assert_close(torch.cat(found, dim=1), whole, "law_fp32")
        with disable_kv_cache(model):
            assert_close(model(text), whole, "law_fp32")


def check_padded_decoding(model: nn.Module, device: str = "cpu") -> None:
    """Left padding in one call with the cache, then single tokens; another row has none, and is further on."""
    padding, prompt, after = 9, 12, 6
    text = tokens(2, padding + prompt + after).to(device)
    position = torch.arange(text.shape[1], device=device).repeat(2, 1)
    position[1] = (position[1] - padding).clamp(min=0)
    with torch.device(device):
        plain = [model(text[:1]), model(text[1:, padding:])]
        model.setup_caches(2, torch.float32, decoder_max_seq_len=64)
    found, given = [], 0
    for size in [padding + prompt] + [1] * after:
        now = slice(given, given + size)
        mask = torch.cat([causal(given, size, 64), causal(given, size, 64, padding)]).to(device)
        found.append(model(text[:, now], mask=mask, input_pos=position[:, now]))
        given += size
    together = torch.cat(found, dim=1)
    assert_close(together[0], plain[0][0], "law_fp32")
    assert_close(together[1, padding:], plain[1][0], "law_fp32")


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gated linear attention on the CPU: the package's own layer and cache over its plain recurrence."""
    fla_layers.find_layer(f"fla.layers.{GLA}", {})
    layer, ops, modules = (import_module(f"fla.{name}") for name in ("layers.gla", "ops.gla.naive", "modules"))

    def recurrence(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            return ops.naive_recurrent_gla(q, k, v, gate, state, output_final_state=True)
        parts = []
        for document, (first, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
            held = None if state is None else state[document : document + 1]
            own = (tensor[:, first:end] for tensor in (q, k, v, gate))
            parts.append(ops.naive_recurrent_gla(*own, held, output_final_state=True))
        outs, states = zip(*parts, strict=True)
        return torch.cat(outs, dim=1), torch.cat(states)

    def fused_recurrent_gla(*, q, k, v, gk, initial_state, output_final_state, state_v_first, cu_seqlens):  # type: ignore[no-untyped-def]
        return recurrence(q, k, v, gk, initial_state, cu_seqlens)

    def chunk_gla(*, q, k, v, g, initial_state, output_final_state, state_v_first, cu_seqlens):  # type: ignore[no-untyped-def]
        return recurrence(q, k, v, g, initial_state, cu_seqlens)

    def gated_norm(self: nn.Module, x: Tensor, g: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(g)

    for stand_in in (fused_recurrent_gla, chunk_gla):
        theirs = inspect.signature(getattr(layer, stand_in.__name__)).parameters
        assert set(inspect.signature(stand_in).parameters) <= set(theirs)
        monkeypatch.setattr(layer, stand_in.__name__, stand_in)
    monkeypatch.setattr(modules.FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(fla_layers, "_refuse_cpu", lambda x, path: None)
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("naive")
class TestOnTheCpu:
    def test_appending_changes_nothing_before(self) -> None:
        model, text = swapped(), tokens(2, 61)
        assert_close(model(text[:, :37]), model(text)[:, :37], "law_fp32")
        # The test can fail: the layer sees what came before.
        other = torch.cat([tokens(2, 1, seed=9), text[:, 1:]], dim=1)
        assert (model(other) - model(text))[:, 36].abs().max() > 1e-4

    def test_a_packed_document_is_as_it_is_alone(self) -> None:
        check_packing(swapped(layers="all"))

    def test_left_padding_changes_nothing(self) -> None:
        model, text = swapped(), tokens(1, 40)
        position = torch.cat([torch.zeros(9, dtype=torch.long), torch.arange(40)])[None]
        padded = torch.cat([tokens(1, 9, seed=5), text], dim=1)
        found = model(padded, input_pos=position, mask=causal(0, 49, 49, 9))
        assert_close(found[:, 9:], model(text), "law_fp32")

    @pytest.mark.parametrize("pieces", [*PIECES, pytest.param([7, 16, 1, 6], id="mixed")])
    def test_decoding_is_the_whole_forward(self, pieces: list[int]) -> None:
        check_decoding(swapped(layers="all"), pieces)

    def test_decoding_behind_left_padding_is_the_whole_forward(self) -> None:
        check_padded_decoding(swapped())

    def test_torchtune_generates_the_same_with_and_without_cache(self) -> None:
        model, prompt = swapped(), tokens(2, 21).clamp(min=1)  # 0 is padding
        prompt[1, :6] = 0
        settings = dict(max_generated_tokens=24, pad_id=0, temperature=0.01, top_k=1)
        plain, _ = generate(model, prompt, **settings)
        model.setup_caches(2, torch.float32, decoder_max_seq_len=64)
        cached, _ = generate(model, prompt, **settings)
        assert torch.equal(plain, cached)

    def test_the_state_of_decoding_is_of_constant_size(self) -> None:
        model, sizes = swapped(layers="all"), []
        model.setup_caches(1, torch.float32, decoder_max_seq_len=64)
        for given in range(3):
            model(tokens(1, 1), mask=causal(given, 1, 64), input_pos=torch.tensor([[given]]))
            states = [layer.attn.kv_cache.held[index]["recurrent_state"] for index, layer in enumerate(model.layers)]
            sizes.append(sum(state.numel() for state in states))
        assert sizes[0] == sizes[2] > 0
        model.reset_caches()
        assert [layer.attn.kv_cache.held[index] for index, layer in enumerate(model.layers)] == [None, None]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")
@pytest.mark.parametrize("name", LAYERS)
class TestOnAGpu:
    """Fewer than 65 tokens a row, which the package gives to its recurrent kernels, in float32 without TF32."""

    def build(self, name: str) -> nn.Module:
        return swapped(name, embed_dim=512).cuda()

    @torch.no_grad()
    def test_a_packed_document_is_as_it_is_alone(self, name: str) -> None:
        check_packing(self.build(name), "cuda")

    @torch.no_grad()
    @pytest.mark.parametrize("pieces", PIECES)
    def test_decoding_is_the_whole_forward(self, name: str, pieces: list[int]) -> None:
        check_decoding(self.build(name), pieces, "cuda")

    @torch.no_grad()
    def test_decoding_behind_left_padding_is_the_whole_forward(self, name: str) -> None:
        check_padded_decoding(self.build(name), "cuda")

    def test_a_packed_document_gets_the_gradients_it_gets_alone(self, name: str) -> None:
        model = self.build(name).to(torch.bfloat16).train()
        texts = [tokens(1, length, seed=length).cuda() for length in (100, 70)]
        position = torch.cat([torch.arange(100), torch.arange(70)])[None].cuda()
        embedding = model.tok_embeddings.weight
        model(torch.cat(texts, dim=1), input_pos=position).float().logsumexp(-1).sum().backward()
        together, embedding.grad = embedding.grad, None
        for text in texts:
            model(text).float().logsumexp(-1).sum().backward()
        assert_close(together, embedding.grad, "oracle_bf16_grad")
