"""The recipe that converts weights: what it writes loads, what does not fit is refused as a whole, and says why."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config

from flash_plugin import FlashCheckpointer, flash_debug
from tests.components.published_layouts import flash_quad_weights, gau_alpha_weights
from tests.components.test_conversion import transformer
from tests.recipes.test_data_recipes import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import flash_pytorch

MODEL_FILE = "model-00001-of-00001.bin"
convert = load("convert")
Launch = Callable[..., str]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Launch:
    """Run the recipe in an empty folder and return what it printed, or what it refused with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
        try:
            convert.main()
        except SystemExit as stop:
            return str(stop.code) if isinstance(stop.code, str) else capsys.readouterr().err
        return capsys.readouterr().out

    return run


def weights_of(**arguments: object) -> dict[str, torch.Tensor]:
    return dict(transformer(**arguments).state_dict())


@torch.no_grad()
def test_what_is_written_loads_and_comes_back(launch: Launch) -> None:
    theirs = transformer(causal=True)
    torch.save({"epoch": 3, "model": theirs.state_dict()}, "run.pt")
    told = launch(
        *("--from", "flash_pytorch", "--input", "run.pt", "--output-dir", "ours"),
        *("group_size=16", "causal=true", "max_seq_len=64"),
    )
    assert "under 'model' in run.pt" in told
    assert "shift_tokens=True, which weights do not tell" in told
    assert "group_size" not in told  # it was given

    cfg = OmegaConf.load("ours/model.yaml")
    loader = FlashCheckpointer(
        checkpoint_dir="ours",
        checkpoint_files=[MODEL_FILE],
        output_dir="out",
        init_model=OmegaConf.to_container(cfg.model),
    )
    model = config.instantiate(cfg.model).eval()
    model.load_state_dict(loader.load_checkpoint()["model"])
    tokens = torch.randint(40, (1, 50))
    torch.testing.assert_close(model(tokens), theirs(tokens))

    launch("--from", "flash_plugin", "--to", "flash_pytorch", "--input", "ours", "--output-dir", "back")
    again = flash_pytorch.FLASHTransformer(**OmegaConf.to_container(OmegaConf.load("back/flash_pytorch.yaml"))).eval()
    again.load_state_dict(torch.load("back/flash_pytorch.pt", weights_only=True))
    assert torch.equal(again(tokens), theirs(tokens))

    told = launch("--from", "flash_pytorch", "--input", "back", "--output-dir", "again", "max_seq_len=64")
    assert "reading back/flash_pytorch.yaml" in told
    assert OmegaConf.load("again/model.yaml") == cfg


def test_a_configuration_beside_the_weights_is_read(launch: Launch) -> None:
    weights = gau_alpha_weights()
    del weights["cls.predictions.decoder.weight"]  # safetensors holds tied tensors once
    save_file(weights, "model.safetensors")
    # Ways of another size, as for `transformers`: read, and compared with the weights.
    settings = {"attention_probs_dropout_prob": 0.2, "layer_norm_eps": 1e-12, "hidden_size": 24, "num_labels": 2}
    Path("config.json").write_text(json.dumps({**settings, "max_position_embeddings": 64, "hidden_act": "swish"}))
    command = ("--from", "gau_alpha", "--input", "model.safetensors", "--output-dir")
    told = launch(*command, "ours", "attention_probs_dropout_prob=0.0")
    assert "max_position_embeddings=64, as its configuration says" in told
    node = OmegaConf.load("ours/model.yaml").model
    assert (node.attn_dropout, node.max_seq_len, node.tie_embeddings) == (0.0, 64, True)

    launch("--from", "flash_plugin", "--to", "gau_alpha", "--input", "ours", "--output-dir", "back")
    written = json.loads(Path("back/config.json").read_text())
    assert written["num_hidden_layers"] == 2
    assert written["intermediate_size"] == 48
    back = torch.load("back/pytorch_model.bin", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())

    Path("config.json").write_text(json.dumps({**settings, "hidden_act": "gelu", "num_hidden_layers": 24}))
    told = launch(*command, "other")
    assert "num_hidden_layers is 24 and must be 2" in told
    assert "hidden_act is 'gelu' and must be 'swish'" in told
    Path("config.json").write_text("[")
    assert "config.json must be whole to be read" in launch(*command, "other")
    assert not Path("other").exists()


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(launch: Launch) -> None:
    weights = weights_of()
    missing = [name for name in weights if ".to_qk.0.bias" in name or "layers.1.norm" in name or "beta" in name]
    unexpected = [f"classifier.{index}.weight" for index in range(20)]
    broken = {name: tensor for name, tensor in weights.items() if name not in missing}
    broken |= {name: torch.ones(3) for name in unexpected}
    broken["layers.0.to_out.bias"] = torch.ones(23)
    broken["layers.1.to_out.bias"] = torch.ones(24, dtype=torch.int8)
    broken["layers.1.rotary_pos_emb.freqs"] = 1.01 * broken["layers.1.rotary_pos_emb.freqs"]
    torch.save(broken, "broken.pt")
    told = launch("--from", "flash_pytorch", "--input", "broken.pt", "--output-dir", "ours")
    for name in missing:
        assert f"missing: {name} " in told
    for name in unexpected:
        assert f"unexpected: {name} [3]" in told
    assert "wrong shape: layers.0.to_out.bias [23] where [24] is expected" in told
    assert "wrong type: layers.1.to_out.bias is torch.int8 and must be floating point" in told
    assert "wrong values: layers.1.rotary_pos_emb.freqs" in told
    assert f"{len(missing) + len(unexpected) + 3} tensors do not fit" in told
    assert not Path("ours").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gau_alpha_weights(), "use --from gau_alpha"),
        (lambda: flash_quad_weights(), "use --from junnyu"),
        (lambda: dict(flash_pytorch.GAU(dim=24).state_dict()), "GAU of FLASH-pytorch, a layer"),
        (lambda: dict(flash_debug(num_layers=1).state_dict()), "flash_plugin's own"),
        (lambda: {"layers.0.attn.q_proj.weight": torch.ones(2, 2)}, "flash_plugin.swap_attention"),
        (lambda: {"conv.weight": torch.ones(2, 2)}, "like no layout known here: conv.weight"),
    ],
    ids=["gau_alpha", "flash_quad", "gau", "ours", "transformer", "unknown"],
)
def test_weights_of_another_model_are_recognised(launch: Launch, make: Callable[[], object], words: str) -> None:
    torch.save(make(), "given.bin")
    told = launch("--from", "dnaflash", "--input", "given.bin", "--output-dir", "ours")
    assert "must be those of DNAFlash" in told
    assert words in told


def test_other_files_are_refused(launch: Launch) -> None:
    command = ("--from", "flash_pytorch", "--output-dir", "ours", "--input")
    torch.save(weights_of(), "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:2000])
    Path("cut.safetensors").write_bytes(b"\x00" * 20)
    Path("model.ckpt").write_bytes(b"tensorflow")
    torch.save(torch.ones(3), "tensor.pt")
    torch.save({**weights_of(), "to_logits.1.bias": torch.full((40,), torch.nan)}, "diverged.pt")
    torch.save({"weights": weights_of()}, "nested.pt")
    for name, words in {
        "cut.pt": "truncated, corrupt or of another kind",
        "cut.safetensors": "truncated, corrupt or of another kind",
        "model.ckpt": "must be a file of PyTorch weights",
        "tensor.pt": "must hold a dictionary",
        "diverged.pt": "hold NaN or infinity: to_logits.1.bias",
        "nested.pt": "these are no tensors: weights",
        "nowhere.pt": "must be a file of weights",
        ".": "must be a file of weights; name one (. holds cut.pt",
    }.items():
        assert words in launch(*command, name), name
    assert not Path("ours").exists()


def test_arguments_are_refused_by_name(launch: Launch) -> None:
    torch.save(weights_of(), "whole.pt")
    command = ("--from", "flash_pytorch", "--input", "whole.pt", "--output-dir", "ours")
    for options, words in {
        ("groupsize=16",): "groupsize (16) must be one of group_size, causal",
        ("group_size=many",): "group_size ('many') must be of the type of 256 (int)",
        ("causal=1",): "causal (1) must be of the type of False (bool)",
        ("causal",): "must be NAME=VALUE",
        ("group_size=0",): "chunk_size (0) must be a positive integer",
        ("--model", "x.yaml"): "--model (x.yaml) must be left out",
        ("--to", "gau_alpha"): "must be flash_plugin, and one must not",
    }.items():
        assert words in launch(*command, *options), options
    assert not Path("ours").exists()
    launch(*command)
    assert f"must not hold {MODEL_FILE} yet" in launch(*command)


def test_what_the_other_implementation_has_no_place_for_is_listed(launch: Launch) -> None:
    node = {"_component_": "flash_plugin.flash_debug", "num_layers": 1}
    OmegaConf.save(OmegaConf.create({"model": node}), "model.yaml")
    torch.save(flash_debug(num_layers=1).state_dict(), "ours.pt")
    back = ("--from", "flash_plugin", "--input", "ours.pt", "--output-dir", "back", "--to")
    told = launch(*back, "flash_pytorch", "--model", "model.yaml")
    for argument in ("normalizer is 'visible' and must be 'chunk'", "norm is 'rmsnorm'", "rope_dim is 64", "proj_bias"):
        assert argument in told
    assert "must be flash_plugin.gau_alpha to be converted" in launch(*back, "gau_alpha", "--model", "model.yaml")
    assert "--model (nowhere.yaml) must be a YAML file" in launch(*back, "flash_pytorch", "--model", "nowhere.yaml")

    torch.save(gau_alpha_weights(), "gau.bin")
    launch("--from", "gau_alpha", "--input", "gau.bin", "--output-dir", "gau")
    trained = torch.load(f"gau/{MODEL_FILE}", weights_only=True)
    trained["layers.1.attn.offset_scale.beta"][0, 3] = 0.5
    torch.save(trained, f"gau/{MODEL_FILE}")
    told = launch("--from", "flash_plugin", "--to", "gau_alpha", "--input", "gau", "--output-dir", "back")
    assert "for those of 1 tensors it has none: layers.1.attn.offset_scale.beta" in told
    assert not Path("back").exists()
