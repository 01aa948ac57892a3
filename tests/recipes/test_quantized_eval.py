"""Train, quantize and evaluate through torchtune's own recipes, offline, and never in full precision unasked."""

import json
import re
from pathlib import Path

import pytest
import torch

import flash_plugin
from tests.recipes.launching import ROOT, printed, run, tune

pytestmark = pytest.mark.slow

SIZES = {"num_layers": 2, "embed_dim": 128, "qk_dim": 32}
MODEL = [f"model.{name}={value}" for name, value in SIZES.items()]
# Relative to the folder that a test runs in, which is not the repository.
TASKS = f"include_path={ROOT / 'configs/eval_tasks'}"
FLOAT = [
    "checkpointer.checkpoint_dir=outputs/flash_debug/epoch_0",
    "checkpointer.checkpoint_files=[model-00001-of-00001.bin]",
]
INT8 = [
    "checkpointer.checkpoint_dir=outputs/flash_quantized",
    "checkpointer.checkpoint_files=[model-00001-of-00001-8w.pt]",
]
WEIGHT_ONLY, DYNAMIC = "Int8WeightOnlyQuantizer", "Int8DynActInt8WeightQuantizer"
KNOWN, UNKNOWN = (f"quantizer._component_={path}" for path in (f"flash_plugin.{WEIGHT_ONLY}", "mine.Quantizer"))


def recipe(name: str, config: str, *overrides: str, cwd: Path, **options: bool) -> str:
    return tune(name, "--config", str(ROOT / "configs" / config), *MODEL, *overrides, cwd=cwd, **options)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, its two quantized checkpoints, the tasks' data and the probe."""
    folder = tmp_path_factory.mktemp("workspace")
    # A user's own quantizer, of which torchtune knows nothing.
    (folder / "mine.py").write_text("class Quantizer:\n    def quantize(self, model):\n        return model\n")
    steps = ["max_steps_per_epoch=150", "lr_scheduler.num_warmup_steps=10", "tokenizer.max_seq_len=256"]
    recipe("full_finetune_single_device", "flash_debug.yaml", *steps, cwd=folder)
    for quantizer in (WEIGHT_ONLY, DYNAMIC):
        chosen = f"quantizer._component_=flash_plugin.{quantizer}"
        recipe("quantize", "flash_quantize.yaml", chosen, cwd=folder, afresh=quantizer == WEIGHT_ONLY)
    prepare = [str(ROOT / "recipes/prepare_eval.py"), "--config", str(ROOT / "configs/prepare_eval.yaml")]
    printed(run(*prepare, "document_characters=2000", "num_questions=24", cwd=folder))
    return folder


def evaluate(
    folder: Path, config: str, tasks: str, *overrides: str, afresh: bool = False
) -> dict[tuple[str, str], float]:
    """The numbers in the table that an evaluation prints, by task and metric."""
    said = recipe("eleuther_eval", config, TASKS, f"tasks=[{tasks}]", *overrides, cwd=folder, afresh=afresh)
    results, task = {}, ""
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and re.fullmatch(r"[\d.]+", cells[6]):
            task = cells[0] or task
            results[task, cells[4]] = float(cells[6])
    return results


def greedy_lines(folder: Path, contexts: list[str]) -> list[str]:
    """What the trained model adds to each text, up to the end of the line: the most likely byte, again and again."""
    model = flash_plugin.flash_debug(chunk_size=64, token_shift=True, position_bias="t5", **SIZES).eval()
    model.load_state_dict(torch.load(folder / "outputs/flash_debug/epoch_0/model-00001-of-00001.bin"))
    tokenizer = flash_plugin.byte_tokenizer()
    lines = []
    for context in contexts:
        tokens = tokenizer.encode(context, add_bos=False, add_eos=False)
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + 256 and not {tokenizer.eos_id, ord("\n")} & set(tokens[start:]):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        lines.append(tokenizer.decode(tokens[start:]).removesuffix("\n"))
    return lines


def test_int8_evaluates_like_float_and_is_not_float(workspace: Path) -> None:
    # Contexts of several lengths, one batch and a rest; the answers are the model's own, computed without a cache.
    contexts = [
        "import o",
        "def read_lines(path):",
        "class Stack:\n    def push(self,",
        *(f"x = {i}" for i in range(7)),
    ]
    rows = zip(contexts, greedy_lines(workspace, contexts), strict=True)
    data = "".join(json.dumps({"context": context, "target": target}) + "\n" for context, target in rows)
    (workspace / "outputs/eval/heldout_complete_line.jsonl").write_text(data)
    tasks = "heldout_text,heldout_next_line"
    expected = evaluate(workspace, "flash_eval.yaml", tasks + ",heldout_complete_line")
    assert expected["heldout_complete_line", "exact_match"] == 1
    assert 0 < expected["heldout_next_line", "acc"] < 1
    assert expected["heldout_text", "byte_perplexity"] < 16  # of 256: it has learned something
    dynamic = [f"quantizer._component_=flash_plugin.{DYNAMIC}", INT8[1].replace("8w", "8da8w")]
    for overrides, bound in (([], 0.005), (dynamic, 0.02)):
        found = evaluate(workspace, "flash_eval_int8.yaml", tasks, *overrides, afresh=not overrides)
        assert found.keys() == expected.keys() - {("heldout_complete_line", "exact_match")}
        for metric in ("byte_perplexity", "word_perplexity"):
            assert abs(found["heldout_text", metric] / expected["heldout_text", metric] - 1) < bound
        # Eight digits that agree would be those of a model in full precision.
        assert found["heldout_text", "word_perplexity"] != expected["heldout_text", "word_perplexity"]


def test_the_evaluated_model_is_int8(workspace: Path) -> None:
    """Look into the stock recipe, set up as its command sets it up."""
    script = workspace / "look.py"
    script.write_text(
        "import runpy, sys\n"
        "from omegaconf import OmegaConf\n"
        "from torch import nn\n"
        "from flash_plugin.components.quantizers import quantization_of\n"
        "cfg = OmegaConf.merge(OmegaConf.load(sys.argv[2]), OmegaConf.from_dotlist(sys.argv[3:]))\n"
        "recipe = runpy.run_path(sys.argv[1])['EleutherEvalRecipe'](cfg)\n"
        "recipe.setup(cfg)\n"
        "model = recipe.eleuther_model_wrapper.model\n"
        "print('kinds', {quantization_of(m.weight) for m in model.modules() if isinstance(m, nn.Linear)})\n"
    )
    stock = Path(torch.__file__).parents[1] / "recipes/eleuther_eval.py"
    done = run(str(script), str(stock), str(ROOT / "configs/flash_eval_int8.yaml"), *MODEL, cwd=workspace)
    assert "kinds {'Int8WeightOnlyQuantizer'}" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "config", "overrides", "words"),
    [
        ("eleuther_eval", "flash_eval_int8.yaml", FLOAT, "must hold quantized weights for a recipe with a quantizer"),
        ("generate", "generate.yaml", [KNOWN], "must hold quantized weights"),
        ("eleuther_eval", "flash_eval.yaml", INT8, r"its weights are quantized \(Int8WeightOnlyQuantizer\)"),
        ("generate", "generate.yaml", INT8, r"its weights are quantized \(Int8WeightOnlyQuantizer\)"),
        ("eleuther_eval", "flash_eval.yaml", [UNKNOWN], r"quantizer \(mine.Quantizer\) must be"),
        ("generate", "generate.yaml", [UNKNOWN], r"quantizer \(mine.Quantizer\) must be"),
    ],
)
def test_another_precision_than_asked_for_is_refused(
    workspace: Path, name: str, config: str, overrides: list[str], words: str
) -> None:
    said = recipe(name, config, *overrides, cwd=workspace, fails=True)
    assert re.search(rf"^ValueError: .*{words}", said, re.MULTILINE), said[-2000:]
