"""README, constraints, pyproject and the environment check name the same versions."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import flash_plugin
from flash_plugin._environment import PINS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README_HEADER = "| package | supported | tested |"
# Needs another transformers than the rest of what CI installs; flash_plugin[dev] leaves it out.
NOT_IN_CI = {"flash-linear-attention"}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> dict[str, str]:
    """The version bounds of every distribution that pyproject.toml names, extras included."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [line for group in (PROJECT["dependencies"], *extras) for line in group]
    parsed = [re.fullmatch(r"([\w-]+)([<>=!~][^;]*)?(;.*)?", line) for line in lines if "[" not in line]
    return {match[1]: (match[2] or "").strip() for match in parsed if match}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    return {_normal(name): version for name, version in pins}


def readme_rows() -> dict[str, tuple[str, str]]:
    """The rows of the README's version table: package -> (supported, tested)."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert README_HEADER in lines, f"README.md must hold a table with the header {README_HEADER!r}"
    start = lines.index(README_HEADER) + 2
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return {package: (supported, tested) for package, supported, tested in cells}


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def test_the_environment_check_has_pyprojects_bounds() -> None:
    assert {name: requirements()[name] for name in PINS} == PINS


@pytest.mark.parametrize("name", sorted(requirements().keys() - NOT_IN_CI))
def test_constraints_pin_every_requirement_within_its_bounds(name: str) -> None:
    pinned = constraints()[_normal(name)]
    for bound in filter(None, requirements()[name].split(",")):
        operator, limit = re.fullmatch(r"([<>=]+)(.+)", bound).groups()  # type: ignore[union-attr]
        ordered = {">=": _release(pinned) >= _release(limit), "<": _release(pinned) < _release(limit)}
        assert pinned == limit if operator == "==" else ordered[operator]


@pytest.mark.parametrize("name", sorted(NOT_IN_CI))
def test_what_ci_does_not_install_names_the_version_that_was_tested(name: str) -> None:
    assert requirements()[name].startswith("==")
    assert _normal(name) not in constraints()


def test_torch_is_pinned_without_a_local_version() -> None:
    # With +cpu only one index could serve it; without, pip takes the build that the machine's index offers.
    assert constraints()["torch"] == "2.13.0"


def test_triton_is_pinned_to_what_a_cuda_build_of_torch_brings() -> None:
    # PyPI's torch 2.13.0 for Linux requires this one: with another pin pip finds no solution there, where `make` is run
    # on a machine whose index offers CUDA's build. The CPU's, which CI has, requires none and would not notice.
    assert constraints()["triton"] == "3.7.1"


def test_the_readme_table_agrees() -> None:
    rows = readme_rows()
    assert set(PINS) <= set(rows)
    for package, (supported, tested) in rows.items():
        if package.lower() == "python":
            assert supported == PROJECT["requires-python"]
        else:
            assert supported == requirements()[package], f"supported versions of {package}"
            assert tested == constraints()[_normal(package)], f"tested version of {package}"


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == flash_plugin.__version__


def test_the_licence_is_the_same_everywhere() -> None:
    assert PROJECT["license"] == "BSD-3-Clause"
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
