"""Whole models on a device that is no CPU, without a GPU: nothing mixes devices, nothing waits for the host.

``python -m tests.components.other_device OUT.json`` runs every case (see ``fake_device.py``) and writes what went wrong
in each. It is a process of its own, since the device stays registered.

Not covered are autocast, for which torch has no casts on such a device; ``adamw`` with stochastic rounding, since the
device has no generators; and layers of flash-linear-attention, which read the positions that they are given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune import training
from torchtune.generation import get_causal_mask_from_padding_mask, get_position_ids_from_padding_mask
from torchtune.modules import TransformerCrossAttentionLayer, TransformerSelfAttentionLayer, local_kv_cache
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

import flash_plugin
from flash_plugin.components import masks
from tests.components.fake_device import FAULTS, ROOT, Build, Case, Watch, device, error_of, on_device, registered
from tests.components.swapped import LLAMA, LORA_LLAMA
from tests.components.test_cross_attention_models import ROOM as SOURCE_ROOM
from tests.components.test_cross_attention_models import SOURCE, fused

BATCH, LENGTH = 2, 700  # chunks of 256, the last of them in part
PROMPT, ROOM = 300, 1024
SIZES: dict[str, Any] = dict(vocab_size=512, num_layers=1, embed_dim=128, max_seq_len=2048)
HEADS: dict[str, Any] = dict(num_heads=4, num_kv_heads=2)


def ids(length: int = LENGTH) -> Tensor:
    """Tokens or positions, ``[b, length]``."""
    return torch.zeros(BATCH, length, dtype=torch.long, device=device())


def yes(*shape: int) -> Tensor:
    """A mask."""
    return torch.ones(*shape, dtype=torch.bool, device=device())


def blocks() -> BlockMask:
    """The mask of packed documents where torchtune has flex-attention."""
    number = -(-LENGTH // 128)
    each = torch.ones(BATCH, 1, number, number, dtype=torch.int32, device=device())
    return BlockMask.from_kv_blocks(each[..., 0], each)


#: What a model is told of a batch, besides its tokens.
TOLD: dict[str, Callable[[], dict[str, Any]]] = {
    "whole": dict,
    "packed": lambda: {"input_pos": ids()},
    "packed with mask": lambda: {"input_pos": ids(), "mask": yes(BATCH, LENGTH, LENGTH)},
    "packed with blocks": lambda: {"input_pos": ids(), "mask": blocks()},
    "padded": lambda: {"mask": yes(BATCH, LENGTH)},
    "padded with types": lambda: {"mask": yes(BATCH, LENGTH), "token_types": ids()},
}


def learns(
    build: Build, told: str = "whole", *, loss: Build | None = None, again: bool = False, mask_is_new: bool = False
) -> None:
    """A forward and a backward, as recipes have them.

    Args:
        build: Builds the model.
        told: Key of ``TOLD``.
        loss: Builds the loss; None for the mean of the logits' squares.
        again: Whether layers are computed again in the backward.
        mask_is_new: Whether this is the first mask of its shape, which the model compares with positions.
    """
    model, given = on_device(build).train(), TOLD[told]()
    if again:
        compute_again(model)
    if "mask" in given and not mask_is_new:
        with mock.patch.object(masks, "check_mask"):
            model(ids(), **given)
    measure = None if loss is None else loss()
    chunks = getattr(measure, "num_output_chunks", 0)
    model.set_num_output_chunks(chunks)
    with Watch():
        logits, labels = model(ids(), **given), ids()
        if not chunks:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        (logits.float().square().mean() if measure is None else measure(logits, labels)).backward()
    check_gradients(model)


def compute_again(model: nn.Module) -> None:
    """Have layers computed again in the backward, as ``enable_activation_checkpointing`` has."""
    policy = {TransformerSelfAttentionLayer, TransformerCrossAttentionLayer}
    training.set_activation_checkpointing(model, auto_wrap_policy=policy)


def check_gradients(model: nn.Module) -> None:
    """All that trains has a gradient."""
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {', '.join(without)}"


@torch.no_grad()
def evaluates(build: Build) -> None:
    """A forward outside training."""
    model = on_device(build).eval()
    with Watch():
        model(ids())


@torch.no_grad()
def decodes(build: Build) -> None:
    """Prompts padded on the left, then prompts of one length, as torchtune's ``generate`` gives them; and pieces."""
    model = on_device(build).eval()
    with device():
        model.setup_caches(batch_size=BATCH, dtype=torch.bfloat16, decoder_max_seq_len=ROOM)
    total = PROMPT + 100
    mask = get_causal_mask_from_padding_mask(yes(BATCH, total), ROOM)
    position = get_position_ids_from_padding_mask(yes(BATCH, total))
    with Watch():
        model(ids(PROMPT), input_pos=position[:, :PROMPT].squeeze(), mask=mask[:, :PROMPT])
        model(ids(1), input_pos=position[:, PROMPT].contiguous(), mask=mask[:, PROMPT, None, :].contiguous())
        model.reset_caches()
        mask, position = yes(1, total, ROOM), torch.arange(total, device=device())
        model(ids(PROMPT), input_pos=position[:PROMPT], mask=mask[:, :PROMPT])
        model(ids(total - PROMPT), input_pos=position[PROMPT:], mask=mask[:, PROMPT:])


def fused_learns(decoder: str, form: str, again: bool) -> None:
    """A forward and a backward of an encoder-decoder."""
    model = on_device(partial(fused, decoder, form)).train()
    if again:
        compute_again(model)
    with Watch():
        logits = model(ids(8), encoder_input=source(), encoder_mask=yes(BATCH, 8, SOURCE))
        logits.float().square().mean().backward()
    check_gradients(model)


@torch.no_grad()
def fused_decodes(decoder: str, form: str) -> None:
    """Decoding with what the encoder said kept."""
    model = on_device(partial(fused, decoder, form)).eval()
    sizes = dict(batch_size=BATCH, dtype=torch.bfloat16, encoder_max_seq_len=SOURCE_ROOM, decoder_max_seq_len=16)
    with local_kv_cache(model, device=device(), **sizes), Watch():
        for told in ({"encoder_input": source()}, {}):
            position = torch.arange(8 if told else 1, device=device()).expand(BATCH, -1)
            seen, mask = yes(BATCH, position.shape[1], SOURCE_ROOM), yes(BATCH, position.shape[1], 16)
            model(ids(position.shape[1]), input_pos=position, encoder_mask=seen, mask=mask, **told)
        model.reset_caches()


def softcapped() -> nn.Module:
    """A swapped model whose scores are bounded, as Gemma 2's are, whose embeddings are scaled by a CPU's number."""
    model = SWAP()
    model.layers[0].attn.softcap = 50.0
    return model


def source() -> dict[str, Tensor]:
    """What an encoder is told."""
    return {"tokens": ids(SOURCE), "mask": yes(BATCH, SOURCE)}


def adapted(builder: Build, **arguments: Any) -> nn.Module:
    """A model of which adapters alone train, as LoRA recipes have it."""
    model = builder(**SIZES, lora_rank=4, lora_alpha=8, **arguments)
    set_trainable_params(model, get_adapter_params(model))
    return model


def quantized(quantizer: type) -> nn.Module:
    """A quantized model."""
    return quantizer(embeddings=True).quantize(flash_plugin.flash(**SIZES))


FLASH, QUAD = partial(flash_plugin.flash, **SIZES), partial(flash_plugin.flash_quad, **SIZES)
SWAP = partial(flash_plugin.swap_attention, LLAMA, **SIZES, **HEADS)
CHOICES: dict[str, dict[str, Any]] = {
    "t5": {},
    "rope": dict(position_bias="rope", activation="laplace", norm="layernorm", absolute_position=True, proj_bias=True),
    "toeplitz": dict(position_bias="toeplitz", activation="softplus2", norm="scalenorm", token_shift=True, rope_dim=32),
    "softmax": dict(position_bias="none", activation="softmax", norm="plain_rmsnorm", tie_embeddings=True, rope_dim=0),
    "chunk": dict(normalizer="chunk", token_shift=True, output_bias=True),
    "paper": dict(normalizer="paper", attn_dropout=0.1),
}
HYBRID: dict[str, Any] = dict(num_layers=2, attention_layers=[1], **HEADS)
FLASH_ALONE: dict[str, dict[str, Any]] = {
    "hybrid": HYBRID,
    "quadratic": dict(num_layers=2, quadratic_layers=[1]),
    "unlimited": dict(unlimited_decoding=True, absolute_position=True),
}
SWAPPED: dict[str, dict[str, Any]] = {
    "softmax": dict(),
    "relu2": dict(local="relu2"),
    "quadratic": dict(attention="quadratic", local="relu2"),
    "linear": dict(attention="linear"),
    "every second": dict(layers="every_2", num_layers=2),
}
PROJECTIONS = ["gate_proj", "v_proj", "qk_proj", "output_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": dict(builder=flash_plugin.lora_flash, lora_attn_modules=PROJECTIONS, apply_lora_to_output=True),
    "DoRA": dict(builder=flash_plugin.lora_flash_quad, lora_attn_modules=PROJECTIONS, use_dora=True, lora_dropout=0.1),
    "QLoRA": dict(builder=flash_plugin.lora_flash, lora_attn_modules=PROJECTIONS, quantize_base=True),
    "swapped LoRA": dict(
        builder=partial(flash_plugin.swap_attention, LORA_LLAMA), lora_attn_modules=["q_proj", "v_proj"], **HEADS
    ),
}


#: Where the reference runs on a GPU whatever was asked for: Triton has no softmax, and no dropout.
BY_REFERENCE = ("softmax", "paper", "every second")


def model_cases(impl: str) -> Iterator[tuple[str, Case]]:
    """Every kind of model."""

    def built(builder: str, *path: str, **arguments: Any) -> Build:
        return partial(getattr(flash_plugin, builder), *path, **SIZES | dict(impl=impl) | arguments)

    auto = impl == "auto"
    for family, choice in product(("flash", "flash_quad"), CHOICES | FLASH_ALONE):
        if (choice in FLASH_ALONE and not (auto and family == "flash")) or (choice in BY_REFERENCE and not auto):
            continue
        build = built(family, **(CHOICES | FLASH_ALONE)[choice])
        if auto:
            yield f"{family} {choice}: whole", partial(learns, build)
        yield f"{family} {choice}: packed", partial(learns, build, "packed")
        # Some divide by the sequence's length, and do not decode. For the hybrid see READS.
        if choice not in ("hybrid", "paper") and (family, choice) != ("flash_quad", "chunk"):
            yield f"{family} {choice}: decoding", partial(decodes, build)
        if choice in CHOICES:
            told = "padded" if auto else "packed"
            yield f"mlm_{family} {choice}: {told}", partial(learns, built(f"mlm_{family}", **CHOICES[choice]), told)
    for name, arguments in SWAPPED.items():
        build = built("swap_attention", LLAMA, **HEADS, **arguments)
        if auto:
            yield f"swapped {name}: whole", partial(learns, build)
        if auto or name not in BY_REFERENCE:
            yield f"swapped {name}: packed", partial(learns, build, "packed")
            if name != "every second":
                yield f"swapped {name}: decoding", partial(decodes, build)


def single_cases() -> Iterator[tuple[str, Case]]:
    """What one model shows for all."""
    hybrid = partial(FLASH, **HYBRID)
    for told in ("packed with mask", "packed with blocks", "padded"):
        for name, build in (("flash", FLASH), ("flash_quad", QUAD), ("hybrid", hybrid)):
            yield f"{name}: {told}", partial(learns, build, told)
    for builder in (flash_plugin.mlm_flash, flash_plugin.mlm_flash_quad):
        build = partial(builder, **SIZES)
        yield f"{builder.__name__}: packed with mask", partial(learns, build, "packed with mask")
    for encoder in (flash_plugin.gau_alpha, flash_plugin.junnyu_flash_quad):
        build = partial(encoder, **SIZES | {"max_seq_len": 1024})
        yield f"{encoder.__name__}: padded with types", partial(learns, build, "padded with types")
    yield "softmax_plus: packed", partial(learns, partial(QUAD, activation="softmax_plus"), "packed")
    yield "softmax_plus: decoding", partial(decodes, partial(QUAD, activation="softmax_plus"))
    yield "output in chunks", partial(learns, FLASH, loss=CEWithChunkedOutputLoss)
    yield "torch's loss", partial(learns, QUAD, loss=nn.CrossEntropyLoss)
    for name, build in (("flash", FLASH), ("flash_quad", QUAD), ("hybrid", hybrid), ("swapped", SWAP)):
        yield f"{name}: computed again", partial(learns, build, "packed", again=True)
    yield "swapped softcap: packed", partial(learns, softcapped, "packed")
    yield "swapped softcap: decoding", partial(decodes, softcapped)
    for name, options in ADAPTERS.items():
        yield f"{name}: packed", partial(learns, partial(adapted, **options), "packed")
    for quantizer in (flash_plugin.Int8WeightOnlyQuantizer, flash_plugin.Int8DynActInt8WeightQuantizer):
        yield f"{quantizer.__name__}: whole", partial(evaluates, partial(quantized, quantizer))
        yield f"{quantizer.__name__}: decoding", partial(decodes, partial(quantized, quantizer))
    for decoder, form in (("flash", "quadratic"), ("mixed", "linear")):
        yield f"fused {decoder} {form}", partial(fused_learns, decoder, form, again=decoder == "flash")
        yield f"fused {decoder} {form}: decoding", partial(fused_decodes, decoder, form)


CASES: dict[str, Case] = {
    **{f"{name}, {impl}": case for impl in ("auto", "reference") for name, case in model_cases(impl)},
    **dict(single_cases()),
}

#: What reads the device knowingly, where, and why.
READS: dict[str, tuple[Case, str]] = {
    # Once a shape, since a recipe's masks are all of one kind; FlashDecoder's documentation says so.
    "first mask": (partial(learns, FLASH, "packed with mask", mask_is_new=True), "flash_plugin/components/masks.py"),
    # Once a batch, to stop a run that diverges; the module's documentation says so.
    "loss": (partial(learns, FLASH, loss=flash_plugin.CrossEntropyLoss), "flash_plugin/components/losses.py"),
    "chunked loss": (
        partial(learns, FLASH, loss=flash_plugin.CEWithChunkedOutputLoss),
        "flash_plugin/components/losses.py",
    ),
    # torchtune's own: its cache asserts that there is room, in each layer at each step.
    "softmax decoding": (partial(decodes, partial(FLASH, **HYBRID)), "torchtune/modules/kv_cache.py"),
    "swapped softmax decoding": (
        partial(decodes, partial(SWAP, **SWAPPED["every second"])),
        "torchtune/modules/kv_cache.py",
    ),
}


def run(output: Path) -> dict[str, str | None]:
    """Run everything in a process of its own: what went wrong in each case, None where nothing did."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the same wherever it runs
    command = [sys.executable, "-m", "tests.components.other_device", str(output)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    errors: dict[str, str | None] = json.loads(output.read_text())
    return errors


def main() -> None:
    """Run all cases and write what went wrong."""
    parser = argparse.ArgumentParser(description="Run whole models on a device that is no CPU, without a GPU.")
    parser.add_argument("output", type=Path, help="gets the error of each case as JSON, null where there is none")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    arguments = parser.parse_args()
    known = {name: case for name, (case, _) in (READS | FAULTS).items()}
    with registered():
        errors = {name: error_of(case) for name, case in (CASES | known).items() if arguments.only in name}
    arguments.output.write_text(json.dumps(errors, indent=1))


if __name__ == "__main__":
    main()
