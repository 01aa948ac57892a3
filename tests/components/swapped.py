"""What the tests of swapped attention share: torchtune's families at toy size, with all their parts at work."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtune.config._utils import _get_component_from_path

import flash_plugin

VOCABULARY, CHUNK = 50, 16

SIZES = dict(
    vocab_size=VOCABULARY, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=256, intermediate_dim=48
)
LLAMA = "torchtune.models.llama3_2.llama3_2"
LORA_LLAMA = "torchtune.models.llama3_2.lora_llama3_2"
#: Component builders of the families, with what they need beyond :data:`SIZES`.
FAMILIES: dict[str, dict[str, object]] = {
    "torchtune.models.llama2.llama2": {},
    "torchtune.models.llama3.llama3": {},
    "torchtune.models.llama3_1.llama3_1": {},
    LLAMA: {},
    "torchtune.models.qwen2.qwen2": {},
    "torchtune.models.gemma.gemma": {"head_dim": 16},
    "torchtune.models.gemma2.gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24},
    "torchtune.models.mistral.mistral": {},
    "torchtune.models.phi3.phi3": {},
}


def original(builder: str = LLAMA, **arguments: object) -> nn.Module:
    """The model as torchtune builds it, none of whose parts is trivially zero or one."""
    torch.manual_seed(0)
    built = _get_component_from_path(builder)(**{**SIZES, **FAMILIES.get(builder, {}), **arguments}).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.25)
    return built


def swapped(builder: str = LLAMA, *, trained: bool = True, **arguments: object) -> nn.Module:
    """The swapped model, with the weights of :func:`original`; ``trained`` opens its global path."""
    own = {"chunk_size": CHUNK, **arguments}
    built = flash_plugin.swap_attention(builder, **{**SIZES, **FAMILIES.get(builder, {}), **own}).eval()
    passed = {name: value for name, value in arguments.items() if name not in ("attention", "layers", "local")}
    passed.pop("chunk_size", None)
    built.load_state_dict(original(builder, **passed).state_dict())
    if trained:
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "global_path" in name:
                    parameter.normal_()
    return built


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids ``[b, s]``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, *arguments: Tensor, **named: Tensor) -> Tensor:
    """The model's logits ``[b, s, v]``, also of models that hand them out in chunks."""
    out = model(*arguments, **named)
    return torch.cat(out, dim=1) if isinstance(out, list) else out
