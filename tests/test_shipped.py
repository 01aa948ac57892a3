"""``python -m flash_plugin ls | cp``: every config and recipe is listed, copied with what it needs, and runs there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flash_plugin import shipped
from flash_plugin.__main__ import main

ROOT = Path(__file__).parents[1]
# The README's tables and figure are the repository's own.
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != "figures")


def test_everything_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line for line in lines}
    scripts = {path.name for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text()} - {"figures.py"}
    assert set(listed) == set(CONFIGS) | scripts
    for name in CONFIGS:
        assert "tune run " in listed[name] or "python recipes/" in listed[name], name
    assert "tune run full_finetune_single_device" in listed["flash_debug"]
    assert "from scratch" in listed["flash_debug"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_needs_nothing_of_the_repository(name: str, tmp_path: Path) -> None:
    first, *_ = copies = shipped.copy(name, tmp_path)
    assert first == tmp_path / f"{name}.yaml"
    assert OmegaConf.load(first).keys() == OmegaConf.load(ROOT / "configs" / f"{name}.yaml").keys()
    for path in copies:
        mentioned = re.findall(r"\b(?:configs|recipes)/[\w./-]*\w", path.read_text())
        assert not [one for one in mentioned if (ROOT / one).is_file() and "results" not in one]
        if path.suffix == ".py":
            siblings = {other.stem for other in (ROOT / "recipes").glob("*.py")}
            imported = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
            assert imported & siblings <= {other.stem for other in copies}
    prepare = re.search(r"^# Prepare.*?(?=^# Launch)", (ROOT / f"configs/{name}.yaml").read_text(), re.M | re.S)
    assert prepare
    for named in re.findall(r"\b(?:configs|recipes)/(\S+?\.(?:yaml|py))\b", prepare[0]):
        assert tmp_path / named in copies
    launched = re.search(r"python (\w+\.py) --config (\S+)", first.read_text())
    if launched and shipped.described(f"configs/{name}.yaml")[0].startswith("python"):
        assert (tmp_path / launched[1]).is_file()
        assert (tmp_path / launched[2]).is_file()


def test_evaluation_comes_with_its_tasks(tmp_path: Path) -> None:
    shipped.copy("flash_eval", tmp_path)
    assert OmegaConf.load(tmp_path / "flash_eval.yaml").include_path == "eval_tasks"
    for original in (ROOT / "configs/eval_tasks").iterdir():
        assert OmegaConf.load(tmp_path / "eval_tasks" / original.name) == OmegaConf.load(original)


def test_what_a_header_says_to_prepare_with_comes_along_and_is_kept_if_it_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = shipped.copy("flash_1b", tmp_path / "1b")
    assert {path.name for path in copies} >= {"prepare_data.py", "prepare_data.yaml"}
    assert "python prepare_data.py --config prepare_data.yaml" in (tmp_path / "1b/flash_1b.yaml").read_text()
    shipped.copy("flash_debug", tmp_path)
    (tmp_path / "flash_debug.yaml").write_text("mine")
    for options in ([], ["--force"]):
        assert main(["cp", "generate", str(tmp_path), *options]) == 0
        printed = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [[said, Path(path).name] for said, path in printed] == [
            ["Copied", "generate.yaml"],
            ["Kept", "flash_debug.yaml"],
        ]
    assert (tmp_path / "flash_debug.yaml").read_text() == "mine"
    # Its own recipe is another matter.
    (tmp_path / "prepare_data.py").write_text("mine")
    assert main(["cp", "prepare_data", str(tmp_path)]) == 1
    assert "prepare_data.py) must not exist" in capsys.readouterr().err


def test_a_copy_may_have_another_name(tmp_path: Path) -> None:
    (copied,) = shipped.copy("flash_debug.yaml", tmp_path / "new/mine.yaml")
    assert copied == tmp_path / "new/mine.yaml"
    assert "--config mine.yaml" in copied.read_text()
    with pytest.raises(ValueError, match=r"flash_debug.yaml\) must not be that of configs/flash_debug.yaml"):
        shipped.copy("generate", tmp_path / "other/flash_debug.yaml")
    assert not (tmp_path / "other").exists()


def test_nothing_is_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "measuring.py").write_text("mine")
    assert main(["cp", "bench_layer", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "measuring.py" in said
    assert "--force" in said
    assert [path.name for path in tmp_path.iterdir()] == ["measuring.py"]
    assert main(["cp", "bench_layer", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "measuring.py").read_text() != "mine"


def test_an_unknown_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", "flash_debg"]) == 1
    said = capsys.readouterr().err
    assert "NAME (flash_debg)" in said
    assert "flash_debug" in said


@pytest.mark.slow
def test_a_wheel_carries_them_and_trains(tmp_path: Path) -> None:
    """Installed from a wheel, and away from the repository, a copied config trains."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = tmp_path / "source"  # setuptools leaves a folder where it builds
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "outputs", "data", "build", "gpt2", "__pycache__")
    )
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flash_plugin"}  # no package named recipes
    shipped_configs = {
        Path(n).stem for n in names if n.startswith("flash_plugin/_shipped/configs/") and n.count("/") == 3
    }
    assert shipped_configs == set(CONFIGS)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    away = tmp_path / "away"
    away.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=away, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert str(tmp_path / "site") in run(sys.executable, "-c", "import flash_plugin; print(flash_plugin.__file__)")
    run(sys.executable, "-m", "flash_plugin", "cp", "flash_debug", ".")
    tune = str(Path(sys.executable).parent / "tune")
    few = ["model.num_layers=2", "model.embed_dim=64", "max_steps_per_epoch=3", "dataset.max_tokens=20000"]
    run(tune, "run", "full_finetune_single_device", "--config", "flash_debug.yaml", *few)
    assert list((away / "outputs/flash_debug").glob("epoch_0/*.bin"))
