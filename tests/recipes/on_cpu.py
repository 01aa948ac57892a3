"""Runs torchtune's recipes that ask for NCCL where there is none: with that one line replaced, and nothing else."""

from pathlib import Path

import torch

from tests.recipes.launching import TORCHRUN, printed, run

# The stock recipe with gloo for CUDA's NCCL: qat_distributed.py:950, lora_finetune_distributed.py:918 and
# full_dpo_distributed.py:1068 all say init_process_group("cuda:nccl,cpu:gloo").
_SCRIPT = """
import runpy, sys
import torch.distributed as distributed

init_process_group = distributed.init_process_group
distributed.init_process_group = lambda _backend: init_process_group("gloo")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run_on_cpu(recipe: str, *arguments: str, cwd: Path, processes: int = 1) -> str:
    """Run the stock ``recipe`` in ``cwd`` in so many processes; return what they printed."""
    script = cwd / "on_cpu.py"
    script.write_text(_SCRIPT)
    stock = Path(torch.__file__).parents[1] / "recipes" / f"{recipe}.py"
    launch = [TORCHRUN, "--standalone", "--nproc_per_node", str(processes), script.name, str(stock)]
    return printed(run(*launch, *arguments, cwd=cwd))
