"""FLASH for Hugging Face's ``transformers``: ``pip install 'flash_plugin[hf]'``.

Importing this package registers :class:`FlashConfig`, :class:`FlashForCausalLM` and :class:`FlashTokenizer`, so that
``AutoConfig``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` know them. Folders that they save carry a file which
imports it: ``trust_remote_code=True`` takes the place of the import, and nothing but flash_plugin's code is trusted.

Nothing else in flash_plugin imports ``transformers``.
"""

from __future__ import annotations

# Checks first that the others can be imported.
from flash_plugin.hugging_face._requirements import TRANSFORMERS
from flash_plugin.hugging_face.configuration import FlashConfig
from flash_plugin.hugging_face.modeling import FlashForCausalLM
from flash_plugin.hugging_face.state import FlashState
from flash_plugin.hugging_face.tokenization import FlashTokenizer

__all__ = ["TRANSFORMERS", "FlashConfig", "FlashForCausalLM", "FlashState", "FlashTokenizer"]
