"""The checkpointer: makes the first weights, loads only what fits, and never loses the last good checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config, training
from torchtune.training import FullModelTorchTuneCheckpointer
from torchtune.training.checkpointing._utils import (
    ADAPTER_MODEL_FNAME,
    RECIPE_STATE_DIRNAME,
    SHARD_FNAME,
    check_outdir_not_in_ckptdir,
)
from torchtune.utils import get_logger, log_rank_zero

from flash_plugin.components.arguments import config_component
from flash_plugin.components.checkpoint_files import (
    AtomicSave,
    base_of_adapter,
    check_same_epoch,
    check_writable,
    content_id,
    find_checkpoint,
    first_line,
    listing,
    present,
    read_checkpoint,
)
from flash_plugin.components.checkpoint_fit import (
    check_finite,
    check_fit,
    check_precision,
    check_tensors,
    is_packed,
    refuse_quantizer,
)
from flash_plugin.components.initialization import EMBEDDING_STD, InitialWeights, check_embedding_std
from flash_plugin.components.peft import adapter_keys

MODEL_FILE = SHARD_FNAME.format(cpt_idx="00001", num_shards="00001") + ".bin"
ADAPTER_FILE = ADAPTER_MODEL_FNAME + ".pt"
RECIPE_STATE_FILE = f"{RECIPE_STATE_DIRNAME}/recipe_state.pt"

#: In the recipe state: the :func:`content_id` of the weights it was saved with.
TRAINED_WEIGHTS_KEY = "flash_trained_weights"

logger = get_logger("DEBUG")


class FlashCheckpointer(FullModelTorchTuneCheckpointer):
    """torchtune's own checkpoint layout, with training from scratch, checks on loading and atomic saves.

    * **From scratch**: with no ``checkpoint_files``, ``init_model`` is built and its weights are drawn from
      ``init_seed``: the same ones in every process, and nothing is written to disk.
    * **Loading**: a file that is damaged, holds NaN, or does not fit ``init_model`` is refused, and so are
      full-precision weights for a quantized model and quantized weights for any other.
    * **Resuming**: with no ``checkpoint_files``, the epoch that the recipe state belongs to is found.
    * **Saving**: a kill or a full disk leaves the last checkpoint loadable and resumable. Weights that are not finite
      are refused.

    The layout below ``output_dir`` is ``epoch_N/model-00001-of-00001.bin``, ``epoch_N/adapter_model.pt`` (LoRA) and
    ``recipe_state/recipe_state.pt``. The stock constructor is not called: it demands a file, and a ``model_type``
    from a closed list on which FLASH is missing.

    Args:
        output_dir: Where to save. Must not lie within ``checkpoint_dir``.
        checkpoint_dir: The folder of the weights to start from, or null to train from scratch or to resume.
        checkpoint_files: A list of the one file to load: in ``checkpoint_dir``, or when resuming in ``output_dir``
            (an adapter's base stays in ``checkpoint_dir``). Null to train from scratch or to resume.
        model_type: Must be ``FLASH``.
        init_model: The model's own node; in YAML ``init_model: ${model}``. Needed to train from scratch; when a file
            is loaded, the file is compared with it.
        init_seed: Seed of the weights drawn from scratch.
        init_embedding_std: Standard deviation of embeddings drawn from scratch.
        quantizer: The quantizer's own node; in YAML ``quantizer: ${quantizer}``, in configs that run a quantized
            model (``eleuther_eval``, ``generate``). One that the recipe does not know, and would ignore, is refused.
        keep_last: How many epochs to keep: with each save, the folders ``epoch_N`` of older ones are removed, with all
            that they hold, except for the one that the recipe state belongs to. Null keeps all.
        adapter_checkpoint: The adapter to resume, in ``output_dir``; by default the matching epoch's, if there is one.
        recipe_checkpoint: The recipe state to resume, in ``output_dir``; by default ``recipe_state/recipe_state.pt``.
        resume_from_checkpoint: The same as ``should_load_recipe_state``.
        should_load_recipe_state: Whether to resume a run; recipes set it from their ``resume_from_checkpoint``.

    Raises:
        ValueError: If an argument is wrong, a file is missing, or the files to resume do not belong together.
    """

    @config_component
    def __init__(
        self,
        *,
        output_dir: str,
        checkpoint_dir: str | None = None,
        checkpoint_files: list[str] | None = None,
        model_type: str = "FLASH",
        init_model: Mapping[str, Any] | None = None,
        init_seed: int = 0,
        init_embedding_std: float = EMBEDDING_STD,
        quantizer: Mapping[str, Any] | None = None,
        keep_last: int | None = None,
        adapter_checkpoint: str | None = None,
        recipe_checkpoint: str | None = None,
        resume_from_checkpoint: bool = False,
        should_load_recipe_state: bool = False,
    ) -> None:
        if model_type != "FLASH":
            raise ValueError(
                f"model_type ({model_type!r}) must be FLASH, since no other family's weights are converted here; "
                f"set checkpointer.model_type=FLASH, or name the checkpointer that torchtune has for {model_type}"
            )
        if init_model and "_component_" not in init_model:
            raise ValueError(
                f"init_model ({init_model!r}) must be a model's node with its _component_; "
                "write init_model: ${model} below checkpointer"
            )
        if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
            raise ValueError(f"keep_last ({keep_last!r}) must be a positive integer, or null to keep all; set it so")
        if type(init_seed) is not int:
            raise ValueError(f"init_seed ({init_seed!r}) must be an integer; set checkpointer.init_seed=0")
        check_embedding_std(init_embedding_std)
        self._keep_last = keep_last
        self._init_model, self._init_seed, self._quantizer = dict(init_model or {}), init_seed, dict(quantizer or {})
        self._init_embedding_std = init_embedding_std
        self._output_dir = Path(output_dir)
        # DistributedCheckpointer, which saves asynchronously, copies this attribute and wants a path.
        self._checkpoint_dir = Path(checkpoint_dir or output_dir)
        self._should_load_recipe_state = should_load_recipe_state or resume_from_checkpoint
        if checkpoint_dir is not None:
            check_outdir_not_in_ckptdir(ckpt_dir=self._checkpoint_dir, out_dir=self._output_dir)
        check_writable(self._output_dir)

        file = _single_file(checkpoint_files)
        self._checkpoint_path: Path | None = None
        self._adapter_checkpoint: Path | None = None
        self._recipe_checkpoint: Path | None = None
        if self._should_load_recipe_state:
            self._find_resume_files(file, checkpoint_dir, adapter_checkpoint, recipe_checkpoint)
        elif file is not None:
            self._checkpoint_path = self._find_base(file, checkpoint_dir)
        elif checkpoint_dir is not None:
            raise ValueError(
                f"checkpoint_dir ({checkpoint_dir}) must come with checkpoint_files; name the file to load "
                f"({present(self._checkpoint_dir)}), or set checkpointer.checkpoint_dir=null to train from scratch"
            )
        elif not self._init_model:
            raise ValueError(
                f"init_model ({init_model}) must be given when checkpoint_files is not, to say which model to make; "
                "write init_model: ${model} below checkpointer, or set checkpoint_dir and checkpoint_files"
            )

    def load_checkpoint(self, weights_only: bool = True) -> dict[str, Any]:
        """Load the checkpoint, or make the weights that training from scratch begins with.

        Args:
            weights_only: Passed on to ``torch.load``; recipes set it to ``False`` when they have quantized the model.

        Returns:
            The state dict under ``model`` (from scratch a mapping that draws each tensor when it is read); when
            resuming also the recipe state's keys, and LoRA's under ``adapter``.

        Raises:
            ValueError: If a file is damaged, holds values that are not finite, is not in the precision that the
                recipe was asked for, or does not fit ``init_model``.
        """
        if weights_only and self._quantizer:
            refuse_quantizer(str(self._quantizer.get("_component_")))
        if self._checkpoint_path is None:
            initial = self._initial_weights()
            check_precision(initial.parameters, "(None, weights from scratch)", quantized=not weights_only)
            return {training.MODEL_KEY: initial}
        weights = read_checkpoint(self._checkpoint_path, weights_only=weights_only)
        check_tensors(weights, str(self._checkpoint_path))
        check_precision(weights, str(self._checkpoint_path), quantized=not weights_only)
        # Quantizers that swap modules store packed integers under names of their own: nothing to compare.
        if self._init_model and (weights_only or not is_packed(weights)):
            self._check_fit(weights)
        checkpoint: dict[str, Any] = {training.MODEL_KEY: weights}
        if self._adapter_checkpoint is not None:
            checkpoint[training.ADAPTER_KEY] = read_checkpoint(self._adapter_checkpoint)
            check_tensors(checkpoint[training.ADAPTER_KEY], str(self._adapter_checkpoint))
        elif self._recipe_checkpoint is not None and self._init_model and not adapter_keys(self._build_meta_model()):
            # Recipes that train adapters resume with nothing else, though all that they train may be in the model.
            checkpoint[training.ADAPTER_KEY] = {}
        if self._recipe_checkpoint is not None:
            checkpoint.update(read_checkpoint(self._recipe_checkpoint, mmap=False))
            checkpoint.pop(TRAINED_WEIGHTS_KEY, None)
        return checkpoint

    def save_checkpoint(
        self,
        state_dict: dict[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Save an epoch, all of it or nothing. Distributed recipes call this on rank 0 alone.

        Args:
            state_dict: ``model``, ``adapter`` (LoRA), and the recipe state under all other keys.
            epoch: Names the folder, ``epoch_N``.
            intermediate_checkpoint: Whether training goes on, so that the recipe state is saved too.
            adapter_only: Whether to leave the model out.

        Raises:
            ValueError: If weights are not finite, or ``adapter_only`` is set and there is no adapter.
            RuntimeError: If the files cannot be written; earlier checkpoints are then as they were.
        """
        if adapter_only and not state_dict.get(training.ADAPTER_KEY):
            raise ValueError(
                "adapter_only (True) must come with adapter weights, and the state dict holds none; "
                "set save_adapter_weights_only=False"
            )
        for key in (training.MODEL_KEY, training.ADAPTER_KEY):
            check_finite(state_dict.get(key, {}), epoch)
        folder = f"epoch_{epoch}"
        try:
            with AtomicSave(self._output_dir) as save:
                if self._checkpoint_dir != self._output_dir:
                    save.copy_companions(self._checkpoint_dir, folder)
                if not adapter_only:
                    trained = save.write(f"{folder}/{MODEL_FILE}", state_dict[training.MODEL_KEY])
                if state_dict.get(training.ADAPTER_KEY):
                    trained = save.write(f"{folder}/{ADAPTER_FILE}", state_dict[training.ADAPTER_KEY])
                if intermediate_checkpoint:
                    weights = (training.MODEL_KEY, training.ADAPTER_KEY, training.ADAPTER_CONFIG)
                    recipe_state = {key: value for key, value in state_dict.items() if key not in weights}
                    recipe_state[TRAINED_WEIGHTS_KEY] = content_id(trained)
                    save.write(RECIPE_STATE_FILE, recipe_state)
                if self._keep_last is not None:
                    # A run's last save leaves the recipe state of the epoch before.
                    kept = self._keep_last if intermediate_checkpoint else max(self._keep_last, 2)
                    save.retire_epochs(last=epoch - kept, spare=self._checkpoint_dir)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            free = shutil.disk_usage(self._output_dir).free / 2**30
            raise RuntimeError(
                f"the checkpoint of epoch {epoch} could not be written to {self._output_dir} "
                f"({first_line(error)}; {free:.2f} GiB are free there) and earlier checkpoints are as "
                "they were; make room or set checkpointer.output_dir to another disk, and resume"
            ) from error
        logger.info(f"Saved the checkpoint of epoch {epoch} to {self._output_dir / folder}")

    def _find_base(self, file: str, checkpoint_dir: str | None) -> Path:
        """The weights to start from, in ``checkpoint_dir``."""
        if checkpoint_dir is None:
            raise ValueError(
                f"checkpoint_dir (None) must name the folder of checkpoint_files ({file}); set "
                "checkpointer.checkpoint_dir, or set checkpointer.checkpoint_files=null to train from scratch"
            )
        return find_checkpoint("checkpoint_files", file, self._checkpoint_dir)

    def _find_resume_files(
        self, file: str | None, checkpoint_dir: str | None, adapter: str | None, recipe_state: str | None
    ) -> None:
        """Find the recipe state and the weights that belong to it.

        After a kill during a save, weights of one more epoch than the recipe state knows may exist. So the recipe
        state decides, not the highest epoch.
        """
        recipe_path = find_checkpoint(
            "recipe_checkpoint",
            recipe_state or RECIPE_STATE_FILE,
            self._output_dir,
            remedy="only a run that has finished one epoch of several can go on: set resume_from_checkpoint=False",
        )
        state = read_checkpoint(recipe_path)
        epochs_run = state.get(training.EPOCHS_KEY)
        if not isinstance(epochs_run, int) or epochs_run < 1:
            raise ValueError(
                f"recipe_checkpoint ({recipe_path}) must say how many epochs have run, and its "
                f"{training.EPOCHS_KEY} is {epochs_run}; name the recipe_state.pt of the run to resume"
            )
        folder = f"epoch_{epochs_run - 1}"
        if adapter is None and (self._output_dir / folder / ADAPTER_FILE).is_file():
            adapter = f"{folder}/{ADAPTER_FILE}"
        if adapter is None:
            trained = find_checkpoint("checkpoint_files", file or f"{folder}/{MODEL_FILE}", self._output_dir)
            self._checkpoint_path = trained
        else:
            trained = find_checkpoint("adapter_checkpoint", adapter, self._output_dir)
            self._checkpoint_path = self._find_base(base_of_adapter(file, trained), checkpoint_dir)
            self._adapter_checkpoint = trained
        self._recipe_checkpoint = recipe_path
        check_same_epoch(trained, recipe_path, folder)
        if state.get(TRAINED_WEIGHTS_KEY) not in (None, content_id(trained)):
            raise ValueError(
                f"recipe_checkpoint ({recipe_path}) must be of the same run as {trained}, which has been replaced "
                "since; set resume_from_checkpoint=False and name that file in checkpoint_files to start a run from it"
            )
        log_rank_zero(logger, f"Resuming after epoch {epochs_run - 1} with {trained} and {recipe_path}")

    def _initial_weights(self) -> InitialWeights:
        """The weights of ``init_model`` drawn from ``init_seed``, in float32 on the CPU, whenever they are read."""
        model = self._build_meta_model()
        if adapter_keys(model):
            raise ValueError(
                f"checkpoint_files (None) must name trained weights for {self._model_name}, whose adapters cannot mend "
                "random ones; set checkpointer.checkpoint_dir and checkpointer.checkpoint_files"
            )
        weights = InitialWeights(model, self._init_seed, self._init_embedding_std)
        undefined = sorted(model.state_dict().keys() - weights.keys())
        if undefined:
            raise ValueError(
                f"init_model ({self._model_name}) must keep nothing but parameters in its state dict, and it has the "
                f"buffers {listing(undefined)}; register them with persistent=False"
            )
        log_rank_zero(logger, f"Training {self._model_name} from scratch: weights drawn with seed {self._init_seed}")
        return weights

    def _check_fit(self, weights: Mapping[str, Tensor]) -> None:
        model = self._build_meta_model()
        check_fit(
            weights,
            model.state_dict(),
            source=str(self._checkpoint_path),
            model=self._model_name,
            optional=adapter_keys(model),
        )

    def _build_meta_model(self) -> nn.Module:
        """Build ``init_model`` without memory for its weights, and without touching the global random state."""
        with training.set_default_dtype(torch.float32), torch.device("meta"):
            model: nn.Module = config.instantiate(OmegaConf.create(self._init_model))
        return model

    @property
    def _model_name(self) -> str:
        return str(self._init_model["_component_"])


def _single_file(checkpoint_files: list[str] | None) -> str | None:
    """The one name in ``checkpoint_files``, or ``None`` where there is none."""
    if not checkpoint_files:
        return None
    if not isinstance(checkpoint_files, list) or len(checkpoint_files) != 1:
        raise ValueError(
            f"checkpoint_files ({checkpoint_files}) must be a list of one file name; "
            f"write checkpoint_files: [{MODEL_FILE}]"
        )
    return str(checkpoint_files[0])
