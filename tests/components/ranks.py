"""What two processes make of small models that flash_tp_plan splits between them, and what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torchtune.models.llama3 import llama3

import flash_plugin
from tests.components.decoding import feed, model

RANKS = 2
EMBED = 24
# Between them: every norm, position bias, kind of output projection, and vocabularies that can and cannot be halved.
CASES: dict[str, dict[str, Any]] = {
    "shift-t5-biases-odd": dict(
        position_bias="t5", token_shift=True, norm="scalenorm", absolute_position=True, proj_bias=True,
        output_bias=True, vocab_size=31,
    ),
    "quad-rope-tied-odd": dict(
        family="flash_quad", position_bias="rope", norm="layernorm", tie_embeddings=True, vocab_size=31
    ),
    "toeplitz-softmax": dict(position_bias="toeplitz", activation="softmax", normalizer="paper", output_bias=True),
    "quad-bidirectional-tied": dict(
        family="flash_quad", activation="laplace", causal=False, proj_bias=True, tie_embeddings=True, rope_dim=0
    ),
    "compiled": dict(position_bias="rope", norm="layernorm", proj_bias=True),
}  # fmt: skip
DECODED = "shift-t5-biases-odd"
TOKENS = torch.randint(0, 30, (2, 41), generator=torch.Generator().manual_seed(0))
# Two packed documents.
POSITION = torch.cat([torch.arange(13), torch.arange(28)])[None]


def build(case: str) -> flash_plugin.FlashDecoder:
    return model(dtype=torch.float64, **CASES[case])


def step(built: flash_plugin.FlashDecoder) -> dict[str, Tensor]:
    """Logits and loss in float64 (those that are not cut into chunks are float32), then every gradient by name."""
    built.train().set_num_output_chunks(2)
    logits = built(TOKENS, input_pos=POSITION)
    loss = nn.functional.cross_entropy(torch.cat(logits, dim=1).flatten(0, 1), TOKENS.roll(-1).flatten())
    loss.backward()
    results = {"logits": torch.cat(logits, dim=1), "loss": loss}
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        results[f"gradient of {name}"] = parameter.grad
    results["norm"] = nn.utils.clip_grad_norm_(built.parameters(), 1e-3)
    return {name: x.detach() for name, x in results.items()}


def decode(built: flash_plugin.FlashDecoder) -> Tensor:
    """Logits of one document, token by token."""
    built.eval().set_num_output_chunks(0)
    built.setup_caches(len(TOKENS), torch.float64, decoder_max_seq_len=64)
    return feed(built, TOKENS[:, :20], torch.arange(20)[None], [11, *[1] * 9]).detach()


def refusal(built: nn.Module, mesh: Any) -> str:
    """What the plan says to a model that it cannot split."""
    try:
        parallelize_module(built, mesh, flash_plugin.flash_tp_plan())
    except ValueError as error:
        return str(error)
    return ""


def run(rank: int, folder: Path) -> None:
    """Write what this rank has of every case to ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    results: dict[str, Any] = {}
    sizes = dict(vocab_size=30, num_layers=1, embed_dim=EMBED, max_seq_len=64)
    lora = dict(sizes, qk_dim=8, lora_rank=2)
    refused = {
        "odd": model(expansion=25 / EMBED),
        "adapted": flash_plugin.lora_flash(["v_proj"], **lora),
        "adapted output": flash_plugin.lora_flash([], apply_lora_to_output=True, **lora),
        "llama": llama3(**sizes, num_heads=2, num_kv_heads=2),
    }
    results["refusals"] = {name: refusal(built, mesh) for name, built in refused.items()}
    for case in CASES:
        built = build(case)
        if case == "compiled":
            for layer in built.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        parallelize_module(built, mesh, flash_plugin.flash_tp_plan())
        found = step(built)
        results[case] = {
            "plain": [name for name, parameter in built.named_parameters() if not isinstance(parameter, DTensor)],
            "sizes": {name: parameter.to_local().numel() for name, parameter in built.named_parameters()},
            "own": {name: x.to_local() if isinstance(x, DTensor) else x for name, x in found.items()},
            "whole": {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()},
        }
        if case == DECODED:
            results["decoded"] = decode(built)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
