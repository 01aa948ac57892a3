"""Encoder-decoders: FLASH cross-attention layers in torchtune's fusion models, beside FLASH's and torchtune's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.generation import generate
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import (
    RMSNorm,
    TanhGate,
    TransformerCrossAttentionLayer,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    delete_kv_caches,
    disable_kv_cache,
    local_kv_cache,
)
from torchtune.modules.model_fusion import DeepFusionModel, FusionLayer, get_fusion_params

import flash_plugin
from flash_plugin import CrossGatedAttentionUnit, FlashCrossAttentionLayer
from tests.tolerances import assert_close

VOCABULARY, D, LENGTH, SOURCE, ROOM = 30, 24, 13, 9, 11
# FLASH's decoder, FLASH's layers in torchtune's decoder, torchtune's layers in it.
KINDS = [(decoder, form) for decoder in ("flash", "mixed", "torchtune") for form in ("quadratic", "linear")]
kinds = pytest.mark.parametrize(("decoder", "form"), KINDS)


def cross_layer(form: str) -> FlashCrossAttentionLayer:
    unit = CrossGatedAttentionUnit(embed_dim=D, expanded_dim=2 * D, qk_dim=12, form=form)
    return FlashCrossAttentionLayer(unit, ca_norm=RMSNorm(D), ca_scale=TanhGate())


def fused(decoder: str, form: str) -> DeepFusionModel:
    """A FLASH encoder whose output is no logits, and a decoder with a cross-attention layer beside one of its two."""
    sizes = dict(vocab_size=VOCABULARY, num_layers=2, embed_dim=D, max_seq_len=32)
    torch.manual_seed(0)
    encoder = flash_plugin.mlm_flash(**sizes, qk_dim=12, chunk_size=4)
    encoder.output = nn.Identity()
    if decoder == "torchtune":
        base: TransformerDecoder = llama3_2(**sizes, num_heads=2, num_kv_heads=1, intermediate_dim=2 * D)
        layers = [base.layers[0], FusionLayer(base.layers[1], cross_layer(form))]
    else:
        base = flash_plugin.flash(**sizes, qk_dim=12, chunk_size=4)
        layers = [FusionLayer(base.layers[0], cross_layer(form), fusion_first=False), base.layers[1]]
    parts = dict(tok_embeddings=base.tok_embeddings, layers=layers, max_seq_len=32, norm=base.norm, output=base.output)
    if decoder == "flash":
        fusion: TransformerDecoder = flash_plugin.FlashDecoder(**parts, qk_dim=12, causal=True)
    else:
        fusion = TransformerDecoder(**parts, num_heads=base.num_heads, head_dim=base.head_dim)
    model = DeepFusionModel(fusion, encoder, encoder_trainable=True, decoder_trainable=True)
    flash_plugin.initialize_weights(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "offset_scale" in name or name.endswith("ca_scale.scale"):
                parameter.normal_(0.3, std=0.5)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Three rows: a whole source, a padded one, and none at all."""
    generator = torch.Generator().manual_seed(4)
    real = torch.arange(SOURCE) < torch.tensor([SOURCE, 4, 0])[:, None]
    return {
        "tokens": torch.randint(VOCABULARY, (3, LENGTH), generator=generator),
        "source": torch.randint(VOCABULARY, (3, SOURCE), generator=generator),
        "real": real,
        "encoder_mask": real[:, None].repeat(1, LENGTH, 1),
    }


def forward(model: DeepFusionModel, given: dict[str, Tensor], **arguments: Tensor) -> Tensor:
    encoder_input = {"tokens": given["source"], "mask": given["real"]}
    out = model(given["tokens"], encoder_input=encoder_input, encoder_mask=given["encoder_mask"], **arguments)
    assert isinstance(out, Tensor)
    return out


@kinds
def test_the_decoder_sees_the_source_and_all_learn(decoder: str, form: str) -> None:
    model, given = fused(decoder, form), batch()
    logits = forward(model, given)
    assert logits.shape == (3, LENGTH, VOCABULARY)
    other = given | {"source": given["source"].roll(1, dims=1)}
    moved = (forward(model, other) - logits).abs().amax(dim=(1, 2))
    assert (moved[:2] > 1e-6).all() and moved[2] == 0
    padded = given | {"source": torch.where(given["real"], given["source"], 7)}
    assert_close(forward(model, padded), logits, "law_fp32")
    alone = model(given["tokens"][1:2, :5], encoder_input={"tokens": given["source"][1:2, :4]})
    assert_close(logits[1:2, :5], alone, "law_fp32")
    assert_close(logits[2:], model(given["tokens"][2:]), "law_fp32")
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [] and all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
@kinds
def test_decoding_with_caches_is_the_full_forward(decoder: str, form: str) -> None:
    model, given = fused(decoder, form), batch()
    expected = forward(model, given)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    encoded: list[int] = []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    sizes = dict(batch_size=3, dtype=torch.float32, encoder_max_seq_len=ROOM, decoder_max_seq_len=16)
    with local_kv_cache(model, device=torch.device("cpu"), **sizes):
        for prompt in (1, 5, LENGTH):
            # As the stock evaluation and generation recipes call it: masks as long as the caches.
            mask = torch.nn.functional.pad(given["encoder_mask"], (0, ROOM - SOURCE))
            first = given | {"tokens": given["tokens"][:, :prompt], "encoder_mask": mask[:, :prompt]}
            position = torch.arange(16).expand(3, -1)
            parts = [forward(model, first, mask=causal[None, :prompt], input_pos=position[:, :prompt])]
            for t in range(prompt, LENGTH):
                parts.append(
                    model(
                        given["tokens"][:, t : t + 1],
                        mask=causal[None, t, None, :],
                        encoder_input=None,
                        encoder_mask=mask[:, -1:],
                        input_pos=position[:, t : t + 1],
                    )
                )
            assert_close(torch.cat(parts, dim=1), expected, "law_fp32")
            with disable_kv_cache(model):
                # torchtune's own attention is not causal by itself while it has a cache.
                again = forward(model, given, mask=causal[None, :LENGTH, :LENGTH])
                assert_close(again, expected, "law_fp32")
            model.reset_caches()
        assert len(encoded) == 2 * 3
    assert not model.caches_are_setup()
    assert all(m.attn.kv_cache is None for m in crosses(model))


def crosses(model: nn.Module) -> Iterator[FlashCrossAttentionLayer]:
    return (m for m in model.modules() if isinstance(m, FlashCrossAttentionLayer))


@torch.no_grad()
@kinds
def test_stock_generate_of_the_decoder_alone(decoder: str, form: str) -> None:
    # It passes no encoder's output, so that cross-attention is skipped, as torchtune's own is.
    model, prompt = fused(decoder, form).decoder, batch()["tokens"][:1, :6]
    full, _ = generate(model, prompt, max_generated_tokens=5, top_k=1)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=11)
    cached, _ = generate(model, prompt, max_generated_tokens=5, top_k=1)
    assert torch.equal(full, cached)
    delete_kv_caches(model)
    assert not model.caches_are_enabled()


@kinds
def test_checkpoints_and_fusion_parameters_are_torchtunes(decoder: str, form: str) -> None:
    model = fused(decoder, form)
    state = model.state_dict()
    assert not [name for name in state if ".layer." in name]
    loaded = fused(decoder, form)
    flash_plugin.initialize_weights(loaded, seed=9)
    loaded.load_state_dict(state, strict=True)
    assert torch.equal(forward(loaded, batch()), forward(model, batch()))
    fusion = get_fusion_params(model)
    unit = "gate_proj q_proj k_proj v_proj output_proj".split()
    assert {name.split("fusion_layer.")[1] for name in fusion} == {
        "ca_norm.scale",
        "ca_scale.scale",
        *(f"attn.{name}.weight" for name in unit),
        *(f"attn.{side}_offset_scale.{name}" for side in "qk" for name in ("gamma", "beta")),
    }
    frozen = DeepFusionModel(model.decoder, model.encoder)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == set(fusion)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, of hidden states
@kinds
def test_activation_checkpointing_and_compilation_find_the_layers(decoder: str, form: str) -> None:
    gradients = []
    for changed in ("nothing", "checkpointed", "compiled"):
        model = fused(decoder, form)
        if changed == "checkpointed":
            policy = {TransformerSelfAttentionLayer, TransformerCrossAttentionLayer}
            training.set_activation_checkpointing(model, auto_wrap_policy=policy)
            assert sum("CheckpointWrapper" in type(m).__name__ for m in model.modules()) == 2 + 2 + 1
        elif changed == "compiled":
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TORCH_COMPILE_BACKEND", "eager")
                training.compile_model(model, verbose=False)
            assert all(layer._compiled_call_impl is not None for layer in crosses(model))
        forward(model, batch()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for found in gradients[1:]:
        assert_close(found, gradients[0], "law_fp32")


@torch.no_grad()
def test_a_pretrained_decoder_starts_as_it_was() -> None:
    model, given = fused("flash", "linear"), batch()
    for layer in crosses(model):
        layer.ca_scale.scale.zero_()
    assert torch.equal(forward(model, given), model(given["tokens"]))


@torch.no_grad()
def test_initial_predictions_are_nearly_uniform() -> None:
    model = fused("flash", "linear")
    flash_plugin.initialize_weights(model, seed=2)
    assert model.decoder.output.weight.std() < 0.025
    assert all(layer.ca_scale.scale == 0 for layer in crosses(model))


def test_a_flash_decoder_still_checks_its_own_mask_and_needs_a_layer_that_reads_the_encoder() -> None:
    model, given = fused("flash", "linear"), batch()
    with pytest.raises(ValueError, match=r"mask\[0, 0, 1\] \(True\) must be False in a causal model"):
        forward(model, given, mask=torch.ones(3, LENGTH, LENGTH, dtype=torch.bool))
    plain = flash_plugin.flash(vocab_size=VOCABULARY, num_layers=1, embed_dim=D, max_seq_len=32, qk_dim=12)
    with pytest.raises(ValueError, match=r"encoder_input and encoder_mask must be None.*FlashCrossAttentionLayers"):
        plain(given["tokens"], encoder_mask=given["encoder_mask"])
