"""One clear sentence for a configuration key that no component knows.

torchtune hands every key below ``_component_`` to the component as a keyword argument, so a misspelt
key surfaces as a bare ``TypeError``. :func:`config_component` turns it into a ``ValueError`` that names
the key, its value and the nearest valid spelling.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def config_component(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make ``function`` (a builder, or a class's ``__init__``) refuse unknown keyword arguments clearly.

    Args:
        function: A callable whose signature lists every accepted argument (no ``**kwargs``).

    Returns:
        The same callable, raising ``ValueError`` instead of ``TypeError`` for unknown and missing keys.
    """
    signature = inspect.signature(function)
    name = function.__qualname__.removesuffix(".__init__")
    keywords = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY and parameter.name != "self"
    ]

    @functools.wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for key, value in kwargs.items():
            if key not in signature.parameters:
                nearest = difflib.get_close_matches(key, keywords, n=1)
                remedy = f"did you mean {nearest[0]}?" if nearest else f"its arguments are: {', '.join(keywords)}"
                raise ValueError(f"{key} ({value!r}) is not an argument of {name}; {remedy}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{name}: {error}; its arguments are: {', '.join(keywords)}") from None
        return function(*args, **kwargs)

    return checked
