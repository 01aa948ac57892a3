"""Swapped models, their layers compiled and checkpointed as recipes do both, or whole steps of decoding compiled.

What a compiled graph keeps for backward depends on what it is given: a layer that is computed again must get what it
got at first, whatever its model was called with in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torchtune import training
from torchtune.generation import generate, generate_next_token
from torchtune.modules import TransformerSelfAttentionLayer

import flash_plugin
from flash_plugin.components import placement
from flash_plugin.kernels import Segments, make_segments
from tests.components.swapped import CHUNK, LLAMA, SIZES, logits, tokens
from tests.tolerances import assert_close

# What dynamo says of hidden states that it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LENGTH = 48
FLASH = dict(
    builder="flash_plugin.flash",
    attention_layers=[1],
    layers=[1],
    **dict(vocab_size=50, num_layers=2, embed_dim=32, qk_dim=16, max_seq_len=256),
)
KINDS = [
    pytest.param({"layers": [1]}, id="mixed-and-original"),
    pytest.param({"attention": "quadratic", "local": "relu2"}, id="quadratic"),
    pytest.param({"attention": "linear"}, id="linear"),
    pytest.param(FLASH, id="mixed-and-flash"),
]


def build(choices: dict[str, Any]) -> nn.Module:
    """A swapped model in training, none of whose parts is trivially zero or one; all of its parameters train."""
    own = choices if "builder" in choices else {"builder": LLAMA, **SIZES, **choices}
    torch.manual_seed(0)
    model = flash_plugin.swap_attention(chunk_size=CHUNK, **own).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def packed(*lengths: int) -> dict[str, Tensor]:
    """Two rows of documents of ``lengths``, as torchtune's collate gives them."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    position = torch.cat([torch.arange(length) for length in lengths])
    return {"input_pos": position.expand(2, -1).contiguous(), "mask": mask.expand(2, -1, -1).contiguous()}


def compiled(model: nn.Module, backend: str) -> nn.Module:
    """The model with its layers compiled as recipes do it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_BACKEND", backend)
        training.compile_model(model, verbose=False)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    """The same with its layers checkpointed, which recipes do behind it (full_finetune_single_device.py:431)."""
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


@pytest.fixture(autouse=True)
def all_is_compiled() -> Iterator[None]:
    """Start with no graph, and let nothing run as it is because torch counts too many graphs or cannot go on in one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    assert not torch._dynamo.utils.counters["graph_break"]


def step(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Loss and all gradients of several calls and one backward."""
    batches = [packed(17, 31), {}, packed(5, 20, 23)]
    loss = sum(logits(model, tokens(2, LENGTH, seed), **batch).square().mean() for seed, batch in enumerate(batches))
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("choices", KINDS)
def test_calls_between_forward_and_backward_change_nothing(choices: dict[str, Any]) -> None:
    loss, gradients = step(build(choices))
    found, found_gradients = step(checkpointed(compiled(build(choices), "aot_eager")))
    assert_close(found, loss, "pair_fp32", "loss")
    assert_close(found_gradients, gradients, "pair_fp32", "gradients")


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "eager"])
def test_documents_are_worked_out_once_for_all_layers_and_one_graph_serves_them_all(
    backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(position: Tensor) -> Segments:
        calls.append(position)
        return make_segments(position)

    monkeypatch.setattr(placement, "make_segments", counted)
    model = build({}) if backend is None else compiled(build({}), backend)
    model(tokens(2, LENGTH), **packed(17, 31))
    assert len(calls) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(tokens(2, LENGTH), **packed(5, 20, 23))
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("choices", KINDS)
def test_torchtune_generates_the_same_with_compiled_steps(choices: dict[str, Any]) -> None:
    model, prompt = build(choices).eval(), tokens(2, 21).clamp(min=1)  # 0 is padding
    settings = dict(max_generated_tokens=24, pad_id=0, temperature=0.01, top_k=1)
    expected, logits = generate(model, prompt, **settings)
    model.setup_caches(2, torch.float32, decoder_max_seq_len=LENGTH)
    # As torchtune's recipe does with quantized models (recipes/generate.py:144).
    step = torch.compile(generate_next_token, fullgraph=True, backend="aot_eager")
    found, found_logits = generate(model, prompt, custom_generate_next_token=step, **settings)
    assert torch.equal(found, expected)
    assert_close(found_logits, logits, "law_fp32")
