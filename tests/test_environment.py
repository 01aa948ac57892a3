"""The environment check speaks one sentence, and only when it must."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from flash_plugin._environment import PINS, check_environment

ROOT = Path(__file__).parent.parent
WORKING = {"torch": "2.13.0+cpu", "torchtune": "0.6.1", "torchao": "0.15.0"}


def environment(**changes: str | None) -> Callable[[str], str]:
    """A lookup that answers as an environment with these versions would; ``None`` means not installed."""
    versions = WORKING | changes

    def installed(name: str) -> str:
        version = versions[name]
        if version is None:
            raise PackageNotFoundError(name)
        return version

    return installed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": "2.11.0+cu130"},
        {"torch": "2.13.1a0+gitabc", "torchao": "0.13"},
        {"torchtune": "0.6.1+cpu", "torchao": "0.15.0.post1"},
    ],
)
@pytest.mark.parametrize("required", [False, True])
def test_working_environments_pass(changes: dict[str, str], required: bool) -> None:
    check_environment(required=required, installed=environment(**changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"torchao": "0.16.0"}, "torchao 0.16.0"),
        ({"torchao": "0.18.0.dev20261001"}, "torchao 0.18.0.dev20261001"),
        ({"torchao": "0.12.0"}, "torchao 0.12.0"),
        ({"torchao": None}, "no torchao"),
        ({"torch": "2.14.0"}, "torch 2.14.0"),
        ({"torch": "2.9.1+cu128"}, "torch 2.9.1+cu128"),
        ({"torch": None}, "no torch"),
        ({"torchtune": "0.7.0"}, "torchtune 0.7.0"),
        ({"torchtune": "0.5.0"}, "torchtune 0.5.0"),
        ({"torchtune": "0.6.0"}, "torchtune 0.6.0"),
        ({"torch": "2.10.0", "torchao": "0.16.0"}, "torch 2.10.0, torchao 0.16.0"),
    ],
)
@pytest.mark.parametrize("required", [False, True])
def test_wrong_companions_of_torchtune_are_one_sentence(
    changes: dict[str, str | None], named: str, required: bool
) -> None:
    with pytest.raises(RuntimeError) as error:
        check_environment(required=required, installed=environment(**changes))
    sentence = str(error.value)
    assert f"this environment has {named};" in sentence
    assert all(f"'{name}{bounds}'" in sentence for name, bounds in PINS.items())
    assert "\n" not in sentence


@pytest.mark.parametrize("changes", [{}, {"torchao": None}, {"torchao": "0.18.0"}, {"torch": "2.4.0"}])
def test_without_torchtune_only_what_needs_it_is_refused(changes: dict[str, str | None]) -> None:
    installed = environment(torchtune=None, **changes)
    check_environment(installed=installed)
    with pytest.raises(RuntimeError, match="this environment has .*no torchtune.*run: pip install 'torch>="):
        check_environment(required=True, installed=installed)


def test_the_installed_distributions_are_read_and_never_imported(tmp_path: Path) -> None:
    """A torchao of which nothing but its metadata exists, ahead of the real one on the path."""
    metadata = tmp_path / "torchao-0.16.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.16.0\n")
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]\n"
        "import importlib.util\n"
        f"path = {str(ROOT / 'flash_plugin' / '_environment.py')!r}\n"
        "spec = importlib.util.spec_from_file_location('environment', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "try:\n"
        "    module.check_environment()\n"
        "finally:\n"
        "    assert not {'torch', 'torchtune', 'torchao'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    last_line = run.stderr.strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError: flash_plugin needs torch>=2.11,<2.14")
    assert "this environment has torchao 0.16.0" in last_line
