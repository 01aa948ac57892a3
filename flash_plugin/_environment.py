"""The environment check: one sentence at import when the installed stack is not the one that works.

torchtune 0.6.1 is unmaintained and breaks with newer companions, far from the cause. Versions are read from
the installed distributions' metadata; nothing is imported, so the check also speaks where an import would crash.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable

#: What works together: a lower and an upper bound for each distribution. ``tests/test_pins.py`` holds pyproject.toml,
#: constraints.txt and README.md to this table. The bounds of torchao: 0.12 cannot be imported with
#: torch 2.11 or newer, and 0.16 not by torchtune 0.6.1.
PINS = {
    "torch": ">=2.11,<2.14",
    "torchtune": ">=0.6.1,<0.7",
    "torchao": ">=0.13,<0.16",
}


def check_environment(
    *, required: bool = False, installed: Callable[[str], str | None] = importlib.metadata.version
) -> None:
    """Refuse an environment in which torchtune cannot work, in one sentence that names the pins.

    ``flash_plugin.kernels`` needs torch alone. So a missing torchtune is an error only when something of
    torchtune is about to be used (``required``), while a torchtune with the wrong companions always is.

    Args:
        required: Whether torchtune is about to be imported, and must be there.
        installed: Gives the version of a distribution, or raises ``PackageNotFoundError``.

    Raises:
        RuntimeError: If a distribution is missing or out of range.
    """
    found = {name: _version(name, installed) for name in PINS}
    if found["torchtune"] is None and not required:
        return
    wrong = [
        f"{name} {version}" if version else f"no {name}"
        for name, version in found.items()
        if version is None or not _within(version, PINS[name])
    ]
    if wrong:
        pins = [name + bounds for name, bounds in PINS.items()]
        command = " ".join(f"'{pin}'" for pin in pins)
        raise RuntimeError(
            f"flash_plugin needs {', '.join(pins)}, but this environment has {', '.join(wrong)}; "
            f"run: pip install {command}"
        )


def _version(name: str, installed: Callable[[str], str | None]) -> str | None:
    try:
        return installed(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, bounds: str) -> bool:
    """Whether ``version`` (say ``2.13.0+cpu``) lies within ``bounds`` (``>=lower,<upper``)."""
    lower, upper = bounds.removeprefix(">=").split(",<")
    return _release(lower) <= _release(version) < _release(upper)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version; what follows them (``rc1``, ``.dev0``, ``+cpu``) decides nothing here."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()
