"""Convert weights of other implementations of FLASH to ours, or ours to theirs.

Run: python recipes/convert.py --from flash_pytorch --input flash.pt --output-dir outputs/converted causal=true
     python recipes/convert.py --from flash_plugin --to flash_pytorch --input outputs/converted \
         --output-dir outputs/back

What weights do not tell is given as NAME=VALUE under the other implementation's names; its defaults stand for what is
not given, and the output says which they are. A `config.json` beside the input (`flash_pytorch.yaml`, as this recipe
writes it, beside weights of FLASH-pytorch) is read and compared with the weights. Nothing is written where a
tensor is missing, unexpected or of another shape; all of these are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor
from yaml import YAMLError

from flash_plugin.components.checkpoint_files import (
    CHECKPOINT_SUFFIXES,
    AtomicSave,
    check_writable,
    first_line,
    present,
    read_checkpoint,
)
from flash_plugin.components.checkpoint_fit import check_tensors
from flash_plugin.components.checkpointer import MODEL_FILE
from flash_plugin.components.conversion import (
    FORMATS,
    OURS,
    Converted,
    convert_to_ours,
    convert_to_theirs,
    options_of,
)

MODEL_NODE = "model.yaml"
# Under which training scripts keep the weights in what they save.
_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict")


def find_weights(given: Path, wanted: str) -> Path:
    """The file of weights that `given` is, or that lies in it under the name `wanted`.

    Raises:
        ValueError: If there is none, or it is of a kind that holds no PyTorch weights.
    """
    path = given / wanted if given.is_dir() else given
    if not path.is_file():
        folder = given if given.is_dir() else given.parent
        raise ValueError(f"--input ({given}) must be a file of weights; name one ({present(folder)})")
    if path.suffix not in CHECKPOINT_SUFFIXES:
        raise ValueError(
            f"--input ({path}) must be a file of PyTorch weights ({', '.join(CHECKPOINT_SUFFIXES)}); "
            "load weights of another framework with the implementation that reads them and save its state dict"
        )
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, also where a training script saved it beside other things.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    content: dict[str, Any] = read_checkpoint(path)
    held = [key for key in _WEIGHTS_KEYS if isinstance(content.get(key), Mapping)]
    if held:
        print(f"reading the weights under {held[0]!r} in {path}")
        content = dict(content[held[0]])
    check_tensors(content, str(path))
    return content


def read_node(path: Path) -> dict[str, Any]:
    """The model's node in a YAML file: all of it, or what stands under `model`.

    Raises:
        ValueError: If there is none.
    """
    if not path.is_file():
        raise ValueError(
            f"--model ({path}) must be a YAML file with the model's node; name the one it was trained with"
        )
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    node = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(node, dict) or "_component_" not in node:
        raise ValueError(f"--model ({path}) must hold a model's node with its _component_; name another file")
    print(f"reading the model's node in {path}")
    return {str(key): value for key, value in node.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The arguments of the other implementation's constructor in a JSON or YAML file; nothing where there is none.

    Raises:
        ValueError: If the file holds something else.
    """
    if not path.is_file():
        return {}
    text = path.read_text()
    try:
        content = json.loads(text) if path.suffix == ".json" else OmegaConf.to_container(OmegaConf.create(text))
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{path} must be whole to be read ({first_line(error)}); mend it or take it away") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} (a {type(content).__name__}) must map names to values; mend it or take it away")
    print(f"reading {path}")
    return {str(key): value for key, value in content.items()}


def write(converted: Converted, output_dir: Path, weights_file: str, arguments_file: str, arguments: str) -> None:
    """Write weights and what describes them into a folder.

    Raises:
        ValueError: If the folder cannot be written to or holds such files already.
    """
    for name in (weights_file, arguments_file):
        if (output_dir / name).exists():
            raise ValueError(f"--output-dir ({output_dir}) must not hold {name} yet; name another folder")
    check_writable(output_dir)
    with AtomicSave(output_dir) as save:
        save.write(weights_file, converted.weights)
    (output_dir / arguments_file).write_text(arguments)
    print(
        f"{len(converted.weights)} tensors in {output_dir / weights_file}, arguments in {output_dir / arguments_file}"
    )
    for note in converted.notes:
        print(f"note: {note}")


def to_ours(source: str, given: Path, output_dir: Path, options: Mapping[str, Any]) -> None:
    """Convert weights of `source` into a checkpoint and a model's node."""
    layout = FORMATS[source][0]  # all of a source call their files alike
    path = find_weights(given, layout.weights_file)
    converted = convert_to_ours(source, read_weights(path), options, read_config(path.parent / layout.config_file))
    header = (
        f"# Converted from {converted.layout.title} by recipes/convert.py. To load the weights:\n"
        "#   checkpointer:\n"
        "#     _component_: flash_plugin.FlashCheckpointer\n"
        f"#     checkpoint_dir: {output_dir}\n"
        f"#     checkpoint_files: [{MODEL_FILE}]\n"
        "#     init_model: ${model}\n"
    )
    write(converted, output_dir, MODEL_FILE, MODEL_NODE, header + OmegaConf.to_yaml({"model": converted.arguments}))


def to_theirs(target: str, given: Path, output_dir: Path, model: Path | None) -> None:
    """Convert a checkpoint of ours into what `target` loads."""
    path = find_weights(given, MODEL_FILE)
    node = read_node(path.parent / MODEL_NODE if model is None else model)
    converted = convert_to_theirs(target, read_weights(path), node)
    layout = converted.layout
    as_json = layout.config_file.endswith(".json")
    arguments = json.dumps(converted.arguments, indent=2) + "\n" if as_json else OmegaConf.to_yaml(converted.arguments)
    write(converted, output_dir, layout.weights_file, layout.config_file, arguments)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    names = (OURS, *FORMATS)
    told = "\n".join(
        f"  {name}: " + ", ".join(f"{key}={option.default}" for key, option in options_of(name).items())
        for name in FORMATS
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"NAME=VALUE by --from, with defaults:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, choices=names, help="whose weights the input holds")
    parser.add_argument("--to", dest="target", default=OURS, choices=names, help=f"whose to write; {OURS} by default")
    parser.add_argument("--input", type=Path, required=True, help="the file of weights, or its folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--model", type=Path, help=f"--from {OURS}: YAML with the model's node; by default {MODEL_NODE}"
    )
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="what the weights do not tell")
    parsed = parser.parse_args(arguments)
    if (parsed.source == OURS) == (parsed.target == OURS):
        parser.error(f"one of --from ({parsed.source}) and --to ({parsed.target}) must be {OURS}, and one must not")
    if parsed.source == OURS and parsed.options:
        parser.error(
            f"NAME=VALUE ({' '.join(parsed.options)}) must be left out with --from {OURS}: --model tells it all"
        )
    if parsed.source != OURS and parsed.model is not None:
        parser.error(f"--model ({parsed.model}) must be left out with --from {parsed.source}: the weights tell it")
    broken = [option for option in parsed.options if "=" not in option]
    if broken:
        parser.error(f"options ({' '.join(broken)}) must be NAME=VALUE, such as causal=true")
    return parsed


def main() -> None:
    """Entry point."""
    parsed = parse()
    try:
        if parsed.source == OURS:
            to_theirs(parsed.target, parsed.input, parsed.output_dir, parsed.model)
        else:
            options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(parsed.options))
            to_ours(parsed.source, parsed.input, parsed.output_dir, options)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
