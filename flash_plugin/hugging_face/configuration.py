"""What ``config.json`` holds: every argument of the builder that makes the model."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torchtune.config._utils import _get_component_from_path
from transformers import AutoConfig, PretrainedConfig

from flash_plugin.components.builders import flash, flash_quad
from flash_plugin.components.decoder import FlashDecoder
from flash_plugin.components.sizes import SIZED_BUILDERS
from flash_plugin.hugging_face.remote_code import reference, write_remote_code

_FAMILIES: dict[str, Callable[..., FlashDecoder]] = {"flash": flash, "flash_quad": flash_quad}
_ARGUMENTS = {name for builder in _FAMILIES.values() for name in inspect.signature(builder).parameters}


class FlashConfig(PretrainedConfig):
    """The arguments of :func:`flash_plugin.flash` or :func:`flash_plugin.flash_quad`, under their own names.

    ``hidden_size``, ``num_hidden_layers``, ``max_position_embeddings`` and ``tie_word_embeddings`` are other names of
    ``embed_dim``, ``num_layers``, ``max_seq_len`` and ``tie_embeddings``, for programs that look for those.

    Args:
        family: ``flash`` or ``flash_quad``.
        options: Arguments of that builder, of which it needs ``vocab_size``, ``num_layers``, ``embed_dim`` and
            ``max_seq_len``; and what ``PretrainedConfig`` takes, such as ``bos_token_id``.

    Raises:
        ValueError: If the family is unknown, an argument that the builder needs is missing, or one is misspelt or of
            the other family. What the values must be is checked by :meth:`build`.
    """

    model_type = "flash_plugin"
    has_no_defaults_at_init = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, family: str = "flash", **options: Any) -> None:
        if family not in _FAMILIES:
            raise ValueError(f"family ({family!r}) must be one of {', '.join(_FAMILIES)}; set family=flash")
        signature = inspect.signature(_FAMILIES[family])
        for alias, name in self.attribute_map.items():
            if alias in options:
                value = options.pop(alias)
                if options.setdefault(name, value) != value:
                    raise ValueError(
                        f"{alias} ({value!r}) must be {name} ({options[name]!r}), whose other name it is; give one"
                    )
        given = {name: options.pop(name) for name in signature.parameters if name in options}
        _check_spelling(options, family, list(signature.parameters))
        try:
            arguments = signature.bind(**given)
        except TypeError as error:
            raise ValueError(f"FlashConfig: {error}, an argument of flash_plugin.{family}; give it") from None
        arguments.apply_defaults()
        super().__init__(**options)
        self.family = family
        for name, value in arguments.arguments.items():
            setattr(self, name, value)
        self.auto_map = {
            "AutoConfig": reference("FlashConfig"),
            "AutoModelForCausalLM": reference("FlashForCausalLM"),
        }

    @classmethod
    def from_node(cls, node: Mapping[str, Any], **options: Any) -> FlashConfig:
        """The configuration of a ``model`` node of torchtune's.

        Args:
            node: ``_component_``, one of ``flash_plugin.flash``, ``flash_plugin.flash_quad`` and their sizes, and the
                arguments that it is given.
            options: What ``PretrainedConfig`` takes.

        Raises:
            ValueError: If it names another component, or gives it an argument that it does not have.
        """
        arguments = dict(node)
        name = str(arguments.pop("_component_", None))
        builders = {**_FAMILIES, **{key: value for key, value in SIZED_BUILDERS.items() if key.startswith("flash_")}}
        component = _get_component_from_path(name) if "." in name else None
        found = [key for key, builder in builders.items() if builder is component]
        if not found:
            raise ValueError(
                f"model._component_ ({name}) must be flash_plugin.flash, flash_plugin.flash_quad or a size of theirs "
                "such as flash_plugin.flash_1b, since no other model is known to transformers here; name the plain "
                "builder of a model with adapters, whose merged weights it takes"
            )
        family = "flash_quad" if found[0].startswith("flash_quad") else "flash"
        sized = inspect.signature(builders[found[0]]).parameters.values()
        defaults = {parameter.name: parameter.default for parameter in sized}
        given = {key: value for key, value in defaults.items() if value is not inspect.Parameter.empty}
        return cls(family, **{**given, **arguments}, **options)

    def node(self) -> dict[str, Any]:
        """The ``model`` node that builds this model in torchtune's recipes."""
        return {"_component_": f"flash_plugin.{self.family}", **self._arguments()}

    def build(self) -> FlashDecoder:
        """Build the model, with weights drawn from the global random state.

        Raises:
            ValueError: If an argument is out of range or does not fit the others, as the builder says.
        """
        return _FAMILIES[self.family](**self._arguments())

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json``, and the file that ``trust_remote_code=True`` asks for; see ``PretrainedConfig``."""
        os.makedirs(save_directory, exist_ok=True)
        write_remote_code(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: what is saved names its code already, and a copy of ours would go stale."""

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(_FAMILIES[self.family]).parameters}


def _check_spelling(options: Mapping[str, Any], family: str, names: list[str]) -> None:
    """Refuse a name that the builder does not have, and that looks as if it should.

    ``PretrainedConfig`` keeps whatever it is given, and programs around it give it much that is not ours.
    """
    usual = PretrainedConfig()
    for key, value in options.items():
        if key.startswith("_") or hasattr(usual, key):
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.75)
        if nearest or key in _ARGUMENTS:
            remedy = f"did you mean {nearest[0]}?" if nearest else f"its arguments are: {', '.join(names)}"
            raise ValueError(f"{key} ({value!r}) is not an argument of flash_plugin.{family}; {remedy}")


AutoConfig.register(FlashConfig.model_type, FlashConfig)
