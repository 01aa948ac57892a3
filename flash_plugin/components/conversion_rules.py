"""Rules that say which tensors of another implementation are which of ours, both ways, and what a layout is.

A rule moves numbers and never changes them: it renames, cuts, joins, reorders or repeats. The shapes that a file must
have follow from the same rules, applied to the shapes of our model.

Shape legend: ``d`` embed, ``e`` expanded width, ``z`` query/key width.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_plugin.components.checkpoint_files import listing

Weights = Mapping[str, Tensor]
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """Some tensors of theirs that are some tensors of ours.

    Attributes:
        theirs: Names in the other layout.
        ours: Names in our state dict.
        to_ours: From theirs, in order, to ours, in order.
        to_theirs: The way back.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_theirs: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def same(theirs: str, ours: str) -> Rule:
    """One tensor under two names."""
    return Rule((theirs,), (ours,), tuple, tuple)


def rows(
    theirs: str, ours: Sequence[str], sizes: Sequence[int], order: Sequence[int] | None = None, dim: int = 0
) -> Rule:
    """One tensor that holds several of ours one below the other.

    Args:
        theirs: Its name.
        ours: Our names.
        sizes: How many rows each of ours has.
        order: Which row of theirs each row of ours is; None for the same order.
        dim: The axis that counts as rows.
    """

    def to_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = tensors
        if order is not None:
            whole = whole.index_select(dim, torch.tensor(order, device=whole.device))
        return whole.split(list(sizes), dim)

    def to_theirs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = torch.cat(list(tensors), dim)
        if order is not None:
            back = torch.tensor(order).argsort()
            whole = whole.index_select(dim, back.to(whole.device))
        return (whole,)

    return Rule((theirs,), tuple(ours), to_ours, to_theirs)


def stacked(theirs: Sequence[str], ours: str) -> Rule:
    """Several tensors that are the rows of one of ours."""
    return Rule(
        tuple(theirs), (ours,), lambda tensors: (torch.stack(list(tensors)),), lambda tensors: tensors[0].unbind()
    )


def column(theirs: str, ours: str) -> Rule:
    """A matrix of one column that is a vector of ours."""
    return Rule(
        (theirs,), (ours,), lambda tensors: (tensors[0].squeeze(1),), lambda tensors: (tensors[0].unsqueeze(1),)
    )


def reversed_vector(theirs: str, ours: str) -> Rule:
    """A vector that counts the other way."""
    return Rule((theirs,), (ours,), lambda tensors: (tensors[0].flip(0),), lambda tensors: (tensors[0].flip(0),))


def repeated(theirs: str, ours: str, times: int) -> Rule:
    """One number that is every entry of a vector of ours."""
    return Rule(
        (theirs,), (ours,), lambda tensors: (tensors[0].expand(times).clone(),), lambda tensors: (tensors[0][:1],)
    )


def zeros(ours: str, shape: Sequence[int]) -> Rule:
    """A tensor of ours that the other implementation does not have: zeros."""
    return Rule((), (ours,), lambda _: (torch.zeros(*shape),), lambda _: ())


@dataclass(frozen=True)
class Option:
    """What the shapes of weights do not tell.

    Attributes:
        argument: The builder's argument.
        default: The other implementation's default.
        values: Their values and ours, where they differ.
    """

    argument: str
    default: Any
    values: Mapping[Any, Any] = field(default_factory=dict)

    def to_ours(self, name: str, value: Any) -> Any:
        """The argument's value.

        Raises:
            ValueError: If ``value`` is not of the default's type.
        """
        wanted = type(self.default)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise ValueError(
                f"{name} ({value!r}) must be of the type of {self.default!r} ({wanted.__name__}); pass such a value"
            )
        return self.values.get(value, value)

    def to_theirs(self, value: Any) -> Any:
        """Their value; ours where they have none of that kind."""
        return {ours: theirs for theirs, ours in self.values.items()}.get(value, value)


class Format(ABC):
    """The layout in which another implementation keeps its weights, and the model of ours that they belong in.

    Attributes:
        title: What to call it.
        mark: A name that no other layout has, behind whatever wrapper's prefix.
        component: Our builder.
        options: What shapes do not tell, under their names.
        choices: Arguments of our builder that shapes tell, and the values which the other implementation has.
        weights_file: How the other implementation calls a file of weights.
        config_file: Where the arguments of its constructor go.
    """

    title: str
    mark: str
    component: str
    options: ClassVar[Mapping[str, Option]]
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {}
    weights_file: str = "pytorch_model.bin"
    config_file: str = "config.json"

    @abstractmethod
    def sizes(self, weights: Weights) -> dict[str, Any]:
        """The builder's arguments that shapes tell.

        Raises:
            ValueError: If a tensor that tells them is missing.
        """

    @abstractmethod
    def fixed(self, arguments: Arguments) -> dict[str, Any]:
        """The builder's arguments that the other implementation leaves no choice of."""

    @abstractmethod
    def rules(self, arguments: Arguments) -> list[Rule]:
        """What is what, for a model with these arguments."""

    @abstractmethod
    def their_arguments(self, arguments: Arguments) -> dict[str, Any]:
        """The arguments of the other implementation's constructor."""

    def remarks(self, arguments: Arguments) -> Sequence[str]:
        """What is worth knowing of a model that was converted to ours."""
        return ()

    def constants(self, arguments: Arguments) -> dict[str, Tensor]:
        """Tensors that a file may hold and that are computed, not learned."""
        return {}

    def unused(self, arguments: Arguments) -> dict[str, Tensor]:
        """Tensors that the other implementation has and does not compute with, with what stands for them."""
        return {}

    def copies(self, arguments: Arguments) -> dict[str, str]:
        """Names under which a file may hold a tensor a second time, always the same, and that tensor's own."""
        return {}

    def tied(self, arguments: Arguments) -> dict[str, str]:
        """Names that a file may lack where they are tied to another, and that other."""
        return {}

    def written_options(self, arguments: Arguments) -> dict[str, Any]:
        """The options that ``arguments`` stand for, under their names."""
        return {name: option.to_theirs(arguments[option.argument]) for name, option in self.options.items()}


def count(weights: Weights, pattern: str) -> int:
    """One more than the highest number that the group of ``pattern`` has at the start of a name."""
    found = [int(match[1]) for match in map(re.compile(pattern).match, weights) if match]
    return max(found, default=-1) + 1


def shape_of(weights: Weights, pattern: str, dims: int) -> tuple[int, ...]:
    """The commonest shape of tensors with ``dims`` axes whose whole name ``pattern`` matches.

    Raises:
        ValueError: If there is none.
    """
    named = re.compile(pattern)
    shapes = Counter(tuple(w.shape) for name, w in weights.items() if named.fullmatch(name) and w.dim() == dims)
    if shapes:
        return shapes.most_common(1)[0][0]
    readable = pattern.replace("\\", "").replace("d+", "0")
    raise ValueError(f"no tensor {readable} of {dims} axes, which tells the sizes (it has {listing(list(weights))})")


def expansion_factor(expanded_dim: int, embed_dim: int) -> float:
    """A factor that others, who round ``factor * embed_dim`` down, turn into ``expanded_dim``."""
    factor = expanded_dim / embed_dim
    return factor if int(factor * embed_dim) == expanded_dim else (expanded_dim + 0.5) / embed_dim


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal to the bit; on the meta device, which has no bits, whether they are one."""
    if first is second:
        return True
    return not first.is_meta and not second.is_meta and first.dtype == second.dtype and torch.equal(first, second)
