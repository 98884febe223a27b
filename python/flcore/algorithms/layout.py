"""Where the tensors of a model lie in one vector, and whom each of them belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flcore.errors import InvalidInputError

__all__ = ["GROUPS", "Layout", "Parameters", "Vector", "named_views"]

Vector = np.ndarray
"""All numbers of a model, or of a change of one, as one (d,) array."""

Parameters = dict[str, np.ndarray]
"""The same by name: views of a `Vector`, each in its own shape."""

GROUPS = ("shared", "personal", "frozen", "server")
"""Whom a tensor belongs to: all (averaged), one client (kept there), nobody (never changed), or the
server (kept there, never sent)."""


def named_views(vector: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> Parameters:
    """View consecutive pieces of one vector as the parameters that `shapes` names."""
    named, first = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        named[name] = vector[first : first + size].reshape(shape)
        first += size
    return named


@dataclass(frozen=True)
class Layout:
    """Names, shapes and groups of the tensors in a model's vector.

    Trained parameters come first, statistics that the model keeps by itself (the running mean and
    variance of BatchNorm) after them.

    Parameters
    ----------
    shapes : dict of name to shape
        In the order of the vector.
    trained : int
        Values at the start of the vector that gradients change; the rest are statistics.
    groups : dict of name to group, optional
        One of `GROUPS` for the tensors that are not shared.
    kinds : dict of name to kind, optional
        What module a tensor is of, where an algorithm may care: "batch_norm", or "classifier" for
        the last layer.
    """

    shapes: dict[str, tuple[int, ...]]
    trained: int
    groups: dict[str, str]
    kinds: dict[str, str]

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        trained: int | None = None,
        groups: dict[str, str] | None = None,
        kinds: dict[str, str] | None = None,
    ) -> None:
        object.__setattr__(self, "shapes", dict(shapes))
        size = sum(math.prod(shape) for shape in shapes.values())
        object.__setattr__(self, "trained", size if trained is None else trained)
        object.__setattr__(self, "groups", dict(groups or {}))
        object.__setattr__(self, "kinds", dict(kinds or {}))
        for name, group in self.groups.items():
            if name not in self.shapes or group not in GROUPS:
                raise InvalidInputError(
                    f"groups: expected tensors of the model in one of the groups "
                    f"{', '.join(GROUPS)}, got {name!r}: {group!r}"
                )

    @cached_property
    def numel(self) -> int:
        """Values of the whole vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Place of each tensor in the vector."""
        places, first = {}, 0
        for name, shape in self.shapes.items():
            places[name] = slice(first, first + math.prod(shape))
            first += math.prod(shape)
        return places

    @cached_property
    def statistics(self) -> slice:
        """Place of the statistics in the vector of the shared tensors."""
        sizes = {name: piece.stop - piece.start for name, piece in self.slices.items()}
        shared = self.names()
        trained = [name for name in shared if self.slices[name].stop <= self.trained]
        return slice(sum(sizes[name] for name in trained), sum(sizes[name] for name in shared))

    def group(self, name: str) -> str:
        """Group of one tensor."""
        return self.groups.get(name, "shared")

    def grouped(self, choose: Callable[[str], str]) -> Layout:
        """Give the same layout with the group that `choose` names for each tensor."""
        return replace_groups(self, {name: choose(name) for name in self.shapes})

    def named(self, vector: Vector) -> Parameters:
        """View a vector as named tensors."""
        return named_views(vector, self.shapes)

    def names(self, groups: str | Sequence[str] = "shared") -> list[str]:
        """Tensors of one group, or of several, in order."""
        wanted = (groups,) if isinstance(groups, str) else tuple(groups)
        return [name for name in self.shapes if self.group(name) in wanted]

    def size(self, groups: str | Sequence[str] = "shared") -> int:
        """Values in the tensors of these groups."""
        return sum(math.prod(self.shapes[name]) for name in self.names(groups))

    def take(self, vector: Vector, groups: str | Sequence[str] = "shared") -> Vector:
        """Give the values of these groups as one vector; the vector itself if that is all of it."""
        pieces = [vector[piece] for piece in self.pieces(groups)]
        if len(pieces) == 1 and pieces[0].size == vector.size:
            return vector
        return np.concatenate(pieces) if pieces else vector[:0]

    def put(self, vector: Vector, values: Vector, groups: str | Sequence[str] = "shared") -> Vector:
        """Give a copy of `vector` with the values of these groups replaced."""
        if values.size == vector.size:
            return values.copy()
        out, first = vector.copy(), 0
        for piece in self.pieces(groups):
            size = piece.stop - piece.start
            out[piece] = values[first : first + size]
            first += size
        return out

    def pieces(self, groups: str | Sequence[str]) -> Iterator[slice]:
        """Yield the ranges of these groups, neighbours joined."""
        wanted = set(self.names(groups))
        first = last = 0
        for name, piece in self.slices.items():
            if name not in wanted:
                continue
            if piece.start != last:
                if last > first:
                    yield slice(first, last)
                first = piece.start
            last = piece.stop
        if last > first:
            yield slice(first, last)


def replace_groups(layout: Layout, groups: dict[str, str]) -> Layout:
    """Give the layout with other groups."""
    named = {name: group for name, group in groups.items() if group != "shared"}
    return Layout(layout.shapes, layout.trained, named, layout.kinds)
