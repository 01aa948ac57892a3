"""FLASH as a model of ``transformers``'.

Shape legend: ``b`` batch, ``s`` new tokens, ``t`` all tokens of a row so far.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_plugin.components.checkpoint_files import listing
from flash_plugin.hugging_face.configuration import FlashConfig
from flash_plugin.hugging_face.state import FlashState

_PREFIX = "model"


class FlashForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`flash_plugin.FlashDecoder` with the methods of ``transformers``' language models.

    Files hold weights under the names that torchtune's checkpoints have, so each side reads the other's. ``generate``
    computes the prompt once and then one token a step, greedily, with draws or with beams; the state of FLASH layers
    does not grow with the text. Rows of a batch may be padded on either side, and those to be continued on the left.

    Args:
        config: The configuration.

    Raises:
        ValueError: If the model would be bidirectional, or the configuration's values do not fit together.
    """

    config_class = FlashConfig
    base_model_prefix = _PREFIX
    # Generation then neither makes a cache of its own nor asks for one to be wound back.
    _is_stateful = True

    def __init__(self, config: FlashConfig) -> None:
        super().__init__(config)
        if not config.causal:
            raise ValueError(
                "causal (False) must be True, since a bidirectional model predicts no next token; set causal=True"
            )
        self.model = config.build()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Load a model, as ``PreTrainedModel.from_pretrained`` does, but never one whose weights do not fit.

        Raises:
            ValueError: If weights are missing, of another shape, or not the model's.
        """
        model, info = super().from_pretrained(*arguments, output_loading_info=True, **options)
        kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
        found = {kind: sorted(str(name) for name in info[keys]) for kind, keys in kinds.items()}
        problems = [f"{len(names)} {kind}: {listing(names)}" for kind, names in found.items() if names]
        if problems:
            raise ValueError(
                f"the weights in {model.name_or_path} must fit config.json, and do not ({'; '.join(problems)}); load "
                "them with the arguments that they were trained with"
            )
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: FlashState | None = None,
        inputs_embeds: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token everywhere.

        Args:
            input_ids: Token ids ``[b, s]``.
            attention_mask: 1 at real tokens, 0 at padding, ``[b, t]`` with t = s without a state.
            position_ids: Position of each token in its document, ``[b, s]``; a restart begins a document, and so packs
                several in a row. None: a row is one document.
            past_key_values: The state of an earlier call, which ``input_ids`` go on from. It is changed in place.
            inputs_embeds: Must be None.
            labels: Token ids ``[b, s]``, -100 where there is nothing to predict; shifted here.
            use_cache: Whether to return a state. Unlike other models' it is False if not given, for scoring needs
                none; ``generate`` asks for it.
            output_attentions: Must not be True; None asks the configuration, in which it must not be either.
            output_hidden_states: Likewise.
            return_dict: False returns a tuple; None asks the configuration.

        Returns:
            Logits ``[b, s, vocab_size]`` in float32, the mean loss if there are labels, and the state.

        Raises:
            ValueError: If a mask is no padding on one side or both, is on the right where tokens shall follow, or does
                not have the length of the row; if the decoder's own caches are set up; or as
                :meth:`flash_plugin.FlashDecoder.forward` says.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.use_return_dict
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError(
                "inputs_embeds, output_attentions and output_hidden_states must be left out, of the call and of "
                "model.config: FLASH takes token ids, and has neither attention matrices nor hidden states to return"
            )
        if self.model.caches_are_setup():
            raise ValueError(
                "the decoder's own caches must not be set up where transformers runs it, which keeps a state instead; "
                "call torchtune.modules.delete_kv_caches(model.model) first"
            )
        state = past_key_values
        if state is None and use_cache:
            state = FlashState(self.model, input_ids.shape[0])
        position = _positions(input_ids, attention_mask, position_ids, state)
        if state is None:
            logits = self.model(input_ids, input_pos=position)
        else:
            with state.lent(self.model, input_ids.shape[1]):
                logits = self.model(input_ids, input_pos=position)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=state)
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: FlashState | None = None,
        attention_mask: Tensor | None = None,
        cache_position: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> dict[str, Any]:
        """What ``generate`` calls the model with: of the tokens ``[b, t]`` those that the state has not seen yet."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding.

        Raises:
            ValueError: If it is the output projection too.
        """
        if self.config.tie_embeddings:
            raise ValueError(
                "tie_embeddings (True) must be False to replace the token embedding, which the output projection "
                "shares; build a model with another vocab_size"
            )
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection; None if it is the token embedding."""
        return None if self.config.tie_embeddings else self.model.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output projection, of which a model with tied embeddings has none."""
        self.model.output = new_embeddings

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: str = "1000TB", **kwargs: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, one file unless ``max_shard_size`` says otherwise.

        torchtune's checkpointers take one. See ``PreTrainedModel`` for the other arguments.
        """
        super().save_pretrained(save_directory, max_shard_size=max_shard_size, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: what is saved names its code already, and a copy of ours would go stale."""

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the builder has drawn the weights."""

    def _fix_state_dict_keys_on_save(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names as torchtune's checkpoints have them; reading puts the prefix back."""
        return {name.removeprefix(f"{_PREFIX}."): value for name, value in state_dict.items()}


def _positions(
    tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, state: FlashState | None
) -> Tensor | None:
    """Positions ``[b, s]`` as :class:`flash_plugin.FlashDecoder` wants them; None for one document a row from 0.

    Padding on the left repeats one position, so that each of its tokens is a document that nobody goes on with.
    Padding on the right goes on counting: nothing behind it sees it.
    """
    seen = 0 if state is None else state.get_seq_length()
    batch, length = tokens.shape
    padding = None
    if attention_mask is not None:
        padding = _left_padding(attention_mask, (batch, seen + length), ends=state is not None)
    if position_ids is not None:
        position = position_ids.expand(batch, -1)
        if padding is not None and position.shape == tokens.shape:
            first = padding[:, None].clamp(seen, seen + length - 1) - seen
            index = torch.arange(length, device=tokens.device)
            position = torch.where(index < first, position.gather(1, first), position)
        return position
    if padding is not None:
        index = torch.arange(seen, seen + length, device=tokens.device)
        return (index - padding[:, None]).clamp(min=0)
    if state is None:
        return None
    return (state.next_position() if seen else 0) + torch.arange(length, device=tokens.device).expand(batch, -1)


def _left_padding(attention_mask: Tensor, shape: tuple[int, int], *, ends: bool) -> Tensor | None:
    """How many tokens of padding each row begins with, ``[b]``; None if there are none.

    Args:
        attention_mask: 1 at real tokens.
        shape: What its shape must be.
        ends: Whether tokens may follow, so that rows must end in a real one.

    Raises:
        ValueError: If it has another shape, other values, or padding between real tokens or where rows must not end.
    """
    if tuple(attention_mask.shape) != shape:
        raise ValueError(
            f"attention_mask (shape {tuple(attention_mask.shape)}) must be {list(shape)}: rows, and tokens with those "
            "in past_key_values; FLASH takes padding masks alone, and documents from position_ids"
        )
    real = attention_mask != 0
    if attention_mask.is_floating_point() or (attention_mask != real).any():
        raise ValueError(
            f"attention_mask ({attention_mask.dtype}) must hold 1 at real tokens and 0 at padding; pass the tokenizer's"
        )
    if real.all():
        return None
    begins, stops = real[:, 1:] & ~real[:, :-1], real[:, :-1] & ~real[:, 1:]
    if ends and stops.any():
        raise ValueError(
            "attention_mask (padding behind real tokens) must have padding on the left alone where tokens shall "
            "follow; set tokenizer.padding_side='left'"
        )
    if ((begins.sum(1) + real[:, 0]) > 1).any():
        raise ValueError(
            "attention_mask (padding between real tokens) must have padding on the left and the right alone; give "
            "documents of one row position_ids that restart"
        )
    # Rows of padding alone have nothing to count from.
    first = torch.where(real.any(dim=1), real.int().argmax(dim=1), shape[1])
    return first if bool(first.any()) else None


AutoModelForCausalLM.register(FlashConfig, FlashForCausalLM)
