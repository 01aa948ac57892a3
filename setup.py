"""What pyproject.toml cannot say: a wheel carries configs/ and recipes/, which flash_plugin/shipped.py finds."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Copies the two folders beside the modules; an editable install reads them where they lie."""

    def run(self) -> None:
        """Build the modules, then copy."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "recipes"):
                target = Path(self.build_lib, "flash_plugin", "_shipped", folder)
                shutil.rmtree(target, ignore_errors=True)
                # The figures are this repository's README's.
                ignored = shutil.ignore_patterns("results", "__pycache__", "figures.*")
                shutil.copytree(ROOT / folder, target, ignore=ignored)


setup(cmdclass={"build_py": BuildWithConfigs})
