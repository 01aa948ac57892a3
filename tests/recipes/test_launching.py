"""What is forked finds what a process finds that Python has started, but for what is imported."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.launching import ROOT, TORCHRUN, run

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
surroundings = [__name__, __file__, sys.argv, sys.path, os.getcwd(), dict(os.environ)]
sys.stdout.write(json.dumps([*surroundings, "flash_plugin" in sys.modules]) + "\\n")
print("said", file=sys.stderr)
"""
# Different in each launch of torchrun's.
OF_A_LAUNCH = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")


def write(folder: Path, text: str) -> str:
    (folder / "scripts").mkdir()
    (folder / "scripts/script.py").write_text(text)
    return str(folder / "scripts/script.py")


def both(*command: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    return run(*command, cwd=cwd), run(*command, cwd=cwd, afresh=True)


def test_a_script_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/mine:{ROOT}")
    monkeypatch.setenv("NEW", "of this test")
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    forked, fresh = both(write(tmp_path, SCRIPT), "one", "two=2", cwd=tmp_path)
    assert forked.returncode == fresh.returncode == 0, forked.stderr + fresh.stderr
    assert forked.stderr == fresh.stderr == "said\n"
    found = json.loads(forked.stdout)
    assert found == json.loads(fresh.stdout)
    assert found[0] == "__main__" and found[2][1:] == ["one", "two=2"] and found[5]["NEW"] == "of this test"
    assert not found[6], "flash_plugin must not have been imported"


def test_the_workers_of_torchrun_find_the_same(tmp_path: Path) -> None:
    command = [TORCHRUN, "--standalone", "--nproc_per_node", "2", write(tmp_path, SCRIPT), "one"]
    found: list[list[Any]] = []
    for done in both(*command, cwd=tmp_path):
        assert done.returncode == 0, done.stderr
        ranks = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda rank: rank[5]["RANK"])
        assert [rank[5]["RANK"] for rank in ranks] == ["0", "1"]
        for rank in ranks:
            for name in OF_A_LAUNCH:
                del rank[5][name]
        found.append(ranks)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("text", "status"),
    [("raise ValueError('one sentence')", 1), ("raise SystemExit(3)", 3), ("raise SystemExit('words')", 1), ("", 0)],
)
def test_a_script_ends_the_same(tmp_path: Path, text: str, status: int) -> None:
    forked, fresh = both(write(tmp_path, text), cwd=tmp_path)
    assert forked.returncode == fresh.returncode == status
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("failure", "words"), [("raise ValueError('one')", "ValueError: one"), ("raise SystemExit(3)", "exit code 3")]
)
def test_a_worker_of_torchrun_that_fails_ends_the_others(tmp_path: Path, failure: str, words: str) -> None:
    script = write(tmp_path, f"import os, time\nif os.environ['RANK'] == '0':\n    {failure}\ntime.sleep(90)")
    start = time.monotonic()
    done = run(TORCHRUN, "--standalone", "--nproc_per_node", "2", script, cwd=tmp_path)
    assert time.monotonic() - start < 80
    assert done.returncode == 1
    assert words in done.stderr
