"""Layers of flash-linear-attention in torchtune's models: what they are told, what checkpoints do, what is refused.

The package is an optional extra, and no part of what CI installs. Its kernels need a GPU; what needs none is here, and
the four laws are in test_fla_laws.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torchtune import config

import flash_plugin
from flash_plugin.components import fla_layers
from flash_plugin.components.fla_layers import LAYERS, FlaAttention
from tests.components.swapped import LLAMA, LORA_LLAMA, SIZES, original, tokens

needs_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash_plugin[fla]")
GLA = "fla.layers.GatedLinearAttention"
RETENTION = "fla.layers.MultiScaleRetention"
LORA = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4}
LARGER = {"embed_dim": 512}  # wide enough for every class's own rules


def swapped(attention: str = GLA, **arguments: object) -> nn.Module:
    """A Llama with the layer in the place of its attention, with initial weights."""
    torch.manual_seed(0)
    return flash_plugin.swap_attention(LLAMA, attention=attention, **{**SIZES, **arguments}).eval()


class Recorder(nn.Module):
    """Takes what a layer of the package takes, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, object]:
        self.calls.append({**locals(), "shape": tuple(hidden_states.shape)})
        return hidden_states, None, past_key_values


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_layers, "_refuse_cpu", lambda x, path: None)


class TestWithoutThePackage:
    def test_nothing_imports_it_unasked(self) -> None:
        script = "import sys; sys.modules['fla'] = None; import flash_plugin; flash_plugin.swap_attention"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr

    def test_its_absence_gets_a_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("fla", "fla.layers"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RuntimeError, match=r"needs flash-linear-attention.*pip install 'flash_plugin\[fla\]'"):
            swapped()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"attention": "fla.layers.Mamba2"}, ["'fla.layers.Mamba2'", "documents", "GatedLinearAttention"]),
            ({"attention": "fla.layers.GatedDeltanet"}, ["did you mean fla.layers.GatedDeltaNet?"]),
            ({"attention": "linear", "attention_args": {"a": 1}}, ["attention_args ({'a': 1})", "fla.layers"]),
        ],
    )
    def test_bad_input_gets_a_sentence(self, arguments: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            swapped(**arguments)
        for word in words:
            assert word in str(error.value)


@needs_fla
@pytest.mark.filterwarnings("ignore:The correction_factor is set to 1 by default")  # Comba, whatever it is given
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_interface_that_we_map(name: str) -> None:
    path = f"fla.layers.{name}"
    forward = fla_layers.find_layer(path, {}).forward
    own = set(inspect.signature(Recorder.forward).parameters) - {"cu_seqlens"}
    assert own <= set(inspect.signature(forward).parameters)
    source = inspect.getsource(forward)
    # All three forms in one place each: packed rows and padding, and the state before and behind the call.
    for part in ("unpad_hidden_states(", "get_layer_cache(", "update_layer_cache(", "cu_seqlens=cu_seqlens"):
        assert part in source
    choices = dict(layers=[1], **LARGER)
    built = swapped(path, **choices)
    with torch.device("meta"):
        sharded = swapped(path, **choices)
    shapes = {key: value.shape for key, value in built.state_dict().items()}
    assert {key: value.shape for key, value in sharded.state_dict().items()} == shapes
    assert isinstance(built.layers[1].attn, FlaAttention)
    with pytest.raises(RuntimeError, match=rf"{name}'\) must run on a GPU.*device=cuda"):
        built(tokens(1, 4))


@needs_fla
class TestBuilding:
    def test_a_config_gives_arguments_as_a_mapping(self) -> None:
        node = {"_component_": "flash_plugin.swap_attention", "builder": LLAMA, "attention": GLA, "layers": [1]}
        node.update(attention_args={"expand_k": 1.0, "num_heads": 2}, **SIZES)
        built = config.instantiate(OmegaConf.create(node))
        layer = built.layers[1].attn.fla
        assert (layer.hidden_size, layer.expand_k, layer.num_heads, layer.layer_idx) == (32, 1.0, 2, 1)
        assert not isinstance(built.layers[0].attn, FlaAttention)

    def test_heads_are_the_models(self) -> None:
        assert swapped().layers[0].attn.fla.num_heads == SIZES["num_heads"]
        delta = swapped("fla.layers.GatedDeltaNet").layers[0].attn.fla
        assert (delta.num_heads, delta.head_dim) == (4, 8)

    def test_weights_have_the_models_dtype(self) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            built = swapped("fla.layers.GatedDeltaNet")
        finally:
            torch.set_default_dtype(torch.float32)
        assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}

    def test_buffers_come_back_behind_meta(self) -> None:
        with torch.device("meta"):
            built = swapped(RETENTION, **LARGER)
        built.to_empty(device="cpu")
        for layer in built.layers:
            layer.attn.rope_init()
            expected = swapped(RETENTION, **LARGER).layers[0].attn.fla.rotary.inv_freq
            assert torch.equal(layer.attn.fla.rotary.inv_freq, expected)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"attention_args": {"expandk": 1.0}}, ["attention_args.expandk (1.0)", "did you mean expand_k?"]),
            ({"attention_args": {"hidden_size": 8}}, ["attention_args.hidden_size (8)", "left out"]),
            ({"attention_args": {"mode": "fused_chunk"}}, ["attention_args.mode ('fused_chunk')", "mode=chunk"]),
            ({"attention_args": {"num_heads": 7}}, ["num_heads=7", "divisible", "model.attention_args"]),
            ({"attn_dropout": 0.1}, ["attn_dropout (0.1)"]),
            ({"builder": LORA_LLAMA, **LORA}, ["adapters alone", "lora_llama3_2"]),
        ],
    )
    def test_bad_input_gets_a_sentence(self, arguments: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(ValueError) as error:
            flash_plugin.swap_attention(**{"builder": LLAMA, "attention": GLA, **SIZES, **arguments})
        for word in words:
            assert word in str(error.value)


@needs_fla
class TestWhatALayerIsTold:
    @pytest.fixture
    def recorded(self, on_cpu: None) -> tuple[nn.Module, list[Recorder]]:
        built = swapped()
        for layer in built.layers:
            layer.attn.fla = Recorder()
        return built, [layer.attn.fla for layer in built.layers]

    def test_whole_rows_are_given_as_they_are(self, recorded: tuple[nn.Module, list[Recorder]]) -> None:
        built, (layer, _) = recorded
        for position in (None, torch.arange(5)[None]):
            built(tokens(2, 5), input_pos=position)
            call = layer.calls.pop()
            assert call["shape"] == (2, 5, 32)
            assert call["cu_seqlens"] is call["attention_mask"] is call["past_key_values"] is None

    def test_documents_are_told_once_for_all_layers(self, recorded: tuple[nn.Module, list[Recorder]]) -> None:
        built, (first, second) = recorded
        position = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 0, 1, 2]])
        built(tokens(2, 5), input_pos=position)
        assert first.calls[0]["shape"] == (1, 10, 32)
        assert first.calls[0]["cu_seqlens"].tolist() == [0, 3, 5, 7, 10]
        assert first.calls[0]["cu_seqlens"].dtype == torch.int32
        assert first.calls[0]["cu_seqlens"] is second.calls[0]["cu_seqlens"]

    def test_a_cache_is_told_of_left_padding(self, recorded: tuple[nn.Module, list[Recorder]]) -> None:
        built, (layer, second) = recorded
        built.setup_caches(2, torch.float32, decoder_max_seq_len=16)
        for position in ([[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[0, 0, 1], [0, 1, 2]]):
            shape = (2, len(position[0]))
            for attention in (built.layers[0].attn, built.layers[1].attn):
                attention(torch.ones(*shape, 32), input_pos=torch.tensor(position))
        prompt, step, other = layer.calls
        assert prompt["attention_mask"].tolist() == [[False, False, True, True], [True] * 4]
        assert step["attention_mask"].tolist() == [[False, False, True, True, True], [True] * 5]
        assert other["attention_mask"].tolist() == [[False, True, True], [True] * 3]
        assert all(call["use_cache"] and call["cu_seqlens"] is None for call in layer.calls)
        assert step["past_key_values"] is prompt["past_key_values"] is not second.calls[0]["past_key_values"]

    @pytest.mark.parametrize(
        ("calls", "words"),
        [
            ([[[0, 1, 0, 1]] * 2], "one document a row"),
            ([[[0, 1, 2]] * 2, [[3, 4, 0]] * 2], "one document a row"),
            ([[[0, 1, 2]] * 2, [[3], [0]]], "row 1 alone begins one"),
        ],
    )
    def test_what_the_cache_cannot_take_is_refused(
        self, recorded: tuple[nn.Module, list[Recorder]], calls: list[list[list[int]]], words: str
    ) -> None:
        built, _ = recorded
        built.setup_caches(2, torch.float32, decoder_max_seq_len=16)
        attention = built.layers[0].attn
        for position in calls[:-1]:
            attention(torch.ones(2, len(position[0]), 32), input_pos=torch.tensor(position))
        with pytest.raises(ValueError, match=words):
            attention(torch.ones(2, len(calls[-1][0]), 32), input_pos=torch.tensor(calls[-1]))


@needs_fla
class TestCheckpoints:
    def test_one_of_the_original_loads_strictly_with_new_layers(self, caplog: pytest.LogCaptureFixture) -> None:
        before = original().state_dict()
        built = swapped(layers=[1])
        torch.manual_seed(3)
        expected = built.layers[1].attn.initial_values()
        torch.manual_seed(3)
        with caplog.at_level(logging.INFO):
            built.load_state_dict(dict(before))
        assert "layers [1] (fla.layers.GatedLinearAttention) begin from initial weights" in caplog.text
        after = built.state_dict()
        assert {name for name in after if name not in before} == {f"layers.1.attn.fla.{name}" for name in expected}
        for name, value in after.items():
            assert torch.equal(value, before[name] if name in before else expected[name.split("attn.fla.")[1]])

    def test_one_of_its_own_loads_as_it_was_saved(self, caplog: pytest.LogCaptureFixture) -> None:
        saved = swapped().state_dict()
        built = swapped(layers="all")
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.zero_()
        with caplog.at_level(logging.INFO):
            built.load_state_dict(saved)
        assert all(torch.equal(value, saved[name]) for name, value in built.state_dict().items())
        assert "initial weights" not in caplog.text

    @pytest.mark.parametrize(
        ("lost", "added", "words"),
        [
            ("layers.0.attn.fla.o_proj.weight", None, "Missing key.*attn.fla.o_proj.weight"),
            (None, "layers.0.attn.q_proj.weight", "Unexpected key.*attn.q_proj.weight"),
        ],
    )
    def test_others_are_left_to_the_strict_load(self, lost: str | None, added: str | None, words: str) -> None:
        saved = swapped().state_dict()
        if lost:
            del saved[lost]
        if added:
            saved[added] = torch.zeros(1)
        with pytest.raises(RuntimeError, match=f"(?s){words}"):
            swapped().load_state_dict(saved)

    def test_what_is_no_whole_model_changes_nothing(self) -> None:
        built = swapped()
        before = {name: value.clone() for name, value in built.state_dict().items()}
        built.load_state_dict({"norm.scale": built.norm.scale.detach()}, strict=False)
        assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())

    def test_a_model_on_meta_gets_real_weights(self) -> None:
        with torch.device("meta"):
            built = swapped()
        built.load_state_dict(original().state_dict(), assign=True)
        assert all(not parameter.is_meta and parameter.isfinite().all() for parameter in built.parameters())

    def test_a_sharded_model_is_refused(self) -> None:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            built, mesh = swapped(), init_device_mesh("cpu", (1,))
            layer = built.layers[0].attn.fla
            layer.o_proj.weight = nn.Parameter(DTensor.from_local(layer.o_proj.weight.detach(), mesh, [Replicate()]))
            with pytest.raises(ValueError, match="layer 0's weights of fla.layers.Gated.*single-device recipe"):
                built.load_state_dict(original().state_dict())
        finally:
            torch.distributed.destroy_process_group()
