"""The check that transformers is there, in a version that works; importing this makes it, before transformers is."""

from __future__ import annotations

import importlib.metadata

from flash_plugin._environment import _version, _within, check_environment

#: The bounds of the extra ``hf`` in pyproject.toml. transformers 5 has other base classes for tokenizers.
TRANSFORMERS = ">=4.57,<5"

check_environment(required=True)
_found = _version("transformers", importlib.metadata.version)
if _found is None or not _within(_found, TRANSFORMERS):
    _had = "no transformers" if _found is None else f"transformers {_found}"
    raise ImportError(
        f"flash_plugin.hugging_face needs transformers{TRANSFORMERS}, but this environment has {_had}; "
        "run: pip install 'flash_plugin[hf]'"
    )
