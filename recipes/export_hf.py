"""Write a trained model and its tokenizer as a folder that Hugging Face's `from_pretrained` reads, and torchtune too.

Run: python recipes/export_hf.py --config configs/export_hf.yaml

The folder needs no way back: its weights have the names that torchtune's checkpoints have, in a file that
`flash_plugin.FlashCheckpointer` reads, and its `torchtune.yaml` holds the nodes that a recipe's configuration needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training
from torchtune.utils import get_logger

from flash_plugin import FlashCheckpointer
from flash_plugin.components.arguments import config_component
from flash_plugin.components.checkpoint_fit import check_fit
from flash_plugin.components.tokenizers import TiktokenTokenizer
from flash_plugin.hugging_face import FlashConfig, FlashForCausalLM, FlashTokenizer
from flash_plugin.hugging_face.tokenization import VOCABULARY_FILE

TOKENIZER_FILES = (VOCABULARY_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

NODES_FILE = "torchtune.yaml"


@config_component
def export_hf(
    *,
    model: Mapping[str, Any],
    checkpointer: FlashCheckpointer,
    output_dir: str,
    tokenizer: TiktokenTokenizer | None = None,
) -> FlashForCausalLM:
    """Write the folder.

    Args:
        model (Mapping[str, Any]): The model's node: `flash_plugin.flash`, `flash_plugin.flash_quad` or one of their
            sizes, with their arguments.
        checkpointer (FlashCheckpointer): Finds the weights, whose dtype is kept.
        output_dir (str): The folder; files of an earlier export are replaced.
        tokenizer (TiktokenTokenizer | None): From `flash_plugin.byte_tokenizer` or `flash_plugin.tiktoken_tokenizer`.
            Default is None: no tokenizer is written, and generation knows no end of text.

    Returns:
        FlashForCausalLM: The model that was written.

    Raises:
        ValueError: If the model is of another kind or bidirectional, the weights do not fit it, the tokenizer has more
            tokens than it or cannot be written, or the folder holds another kind of model.
    """
    folder = Path(output_dir)
    _check_folder(folder)
    configuration = FlashConfig.from_node(model)
    if tokenizer is not None:
        if tokenizer.vocab_size > configuration.vocab_size:
            raise ValueError(
                f"tokenizer (vocab_size {tokenizer.vocab_size}) must not have more tokens than the model (vocab_size "
                f"{configuration.vocab_size}); give the tokenizer that the model was trained with"
            )
        for name in ("bos", "eos", "pad"):
            setattr(configuration, f"{name}_token_id", getattr(tokenizer, f"{name}_id"))
    weights = checkpointer.load_checkpoint()[training.MODEL_KEY]
    with torch.device("meta"):
        exported = FlashForCausalLM(configuration)
    check_fit(weights, exported.model.state_dict(), source="of checkpointer", model=str(model["_component_"]))
    exported.model.load_state_dict(dict(weights), assign=True)
    for module in exported.modules():
        if hasattr(module, "rope_init"):
            module.rope_init()  # tables, which are in no checkpoint, and so still on meta
    exported.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)  # an earlier export's
    nodes: dict[str, Any] = {"folder": str(folder), "model": configuration.node()}
    if tokenizer is not None:
        written = FlashTokenizer.from_flash(tokenizer, folder, model_max_length=configuration.max_seq_len)
        node = written.node(VOCABULARY_FILE)
        # OmegaConf would take it for an interpolation.
        node["pattern"] = node["pattern"].replace("${", "\\${")
        nodes["tokenizer"] = node | {"path_or_name": "${folder}/" + VOCABULARY_FILE}
    nodes["checkpointer"] = {
        "_component_": "flash_plugin.FlashCheckpointer",
        "checkpoint_dir": "${folder}",
        "checkpoint_files": ["model.safetensors"],
        "init_model": "${model}",
        "output_dir": "${output_dir}",
        "model_type": "FLASH",
    }
    header = "# What a torchtune recipe's configuration needs to start from this folder.\n"
    (folder / NODES_FILE).write_text(header + OmegaConf.to_yaml(OmegaConf.create(nodes)))
    get_logger().info(f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return exported


def _check_folder(folder: Path) -> None:
    """Refuse to mix the files of two models."""
    path = folder / "config.json"
    kind = json.loads(path.read_text()).get("model_type") if path.is_file() else FlashConfig.model_type
    if kind != FlashConfig.model_type:
        raise ValueError(
            f"output_dir ({folder}) must be a new folder or one that this recipe wrote, and it holds a model of type "
            f"{kind}; set output_dir to another"
        )


@config.parse
def main(cfg: DictConfig) -> None:
    """Export what the configuration names."""
    get_logger("INFO")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in ("checkpointer", "tokenizer"):
        if settings.get(name) is not None:
            settings[name] = config.instantiate(cfg[name])
    export_hf(**settings)


if __name__ == "__main__":
    main()
