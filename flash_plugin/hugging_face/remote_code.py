"""The file that a saved folder carries, so that ``trust_remote_code=True`` finds flash_plugin without an import."""

from __future__ import annotations

import os
from pathlib import Path

_MODULE = "flash_for_transformers"
_SOURCE = '''"""Lets transformers load this folder with trust_remote_code=True: pip install 'flash_plugin[hf]'."""

from flash_plugin.hugging_face import FlashConfig, FlashForCausalLM, FlashTokenizer  # noqa: F401
'''


def reference(name: str) -> str:
    """What an ``auto_map`` calls a class of ours."""
    return f"{_MODULE}.{name}"


def write_remote_code(folder: str | os.PathLike[str]) -> Path:
    """Write the file into ``folder``, which must exist, and return its path."""
    path = Path(folder) / f"{_MODULE}.py"
    path.write_text(_SOURCE)
    return path
