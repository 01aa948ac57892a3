"""The rules about who may import whom, and how long a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "flash_plugin").rglob("*.py"))
KERNELS = [path for path in PACKAGE if "kernels" in path.parts]
COMPONENTS = [path for path in PACKAGE if "components" in path.parts]
SOURCES = [path for folder in ("flash_plugin", "recipes", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_LINES = 350


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imports(path: Path) -> Iterator[str]:
    """Every module, and every name out of a module, that a file imports anywhere in it, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_from(path: Path, module: str) -> list[str]:
    return [name for name in imports(path) if name == module or name.startswith(f"{module}.")]


def public_names(path: Path) -> Iterator[str]:
    """Functions, classes, arguments and module-level variables that carry no leading underscore."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_there_is_something_to_check() -> None:
    assert KERNELS
    assert COMPONENTS


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_kernels_know_neither_torchtune_nor_modules(path: Path) -> None:
    forbidden = ("torchtune", "torchao", "torch.nn.Module", "torch.nn.modules", "flash_plugin.components")
    assert not [name for module in forbidden for name in imports_from(path, module)]
    assert "nn.Module" not in [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text()))]


@pytest.mark.parametrize("path", COMPONENTS, ids=names(COMPONENTS))
def test_components_leave_triton_to_the_kernels(path: Path) -> None:
    assert not imports_from(path, "triton")


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_no_file_has_two_subjects(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", PACKAGE, ids=names(PACKAGE))
def test_flash_here_is_not_flash_attention(path: Path) -> None:
    assert not [name for name in public_names(path) if "flash_attention" in name.lower()]


def test_kernels_import_with_torch_alone() -> None:
    script = (
        "import sys\n"
        "for name in ('torchtune', 'torchao', 'tiktoken', 'triton', 'omegaconf', 'datasets', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "import flash_plugin.kernels\n"
        "import torch\n"
        "q = k = torch.ones(1, 5, 4)\n"
        "assert flash_plugin.kernels.quadratic_attention(q, k, torch.ones(1, 5, 6)).shape == (1, 5, 6)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_no_package_is_named_like_torchtunes_recipes() -> None:
    assert not (ROOT / "recipes" / "__init__.py").exists()
    assert 'include = ["flash_plugin*"]' in (ROOT / "pyproject.toml").read_text()
