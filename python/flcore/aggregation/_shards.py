"""Updates cut by coordinates, one shard a process, and put together again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from flcore import _arrays, _updates
from flcore.aggregation._checks import whole
from flcore.aggregation._integers import split_layers
from flcore.aggregation._team import Team
from flcore.errors import InvalidInputError

__all__ = ["SHARD_CHUNK", "gather", "shard", "shard_bounds"]

# Coordinates whose squares are added in floating point before they are added exactly: CHUNK tiles
# of GRAM_TILE in csrc/cpu/gram.isa.cpp. Shards that end there leave every such sum whole.
SHARD_CHUNK = 16 * 1024


def shard_bounds(numel: int | Sequence[int], world_size: int) -> list[int]:
    """Return where shards begin, and the end: ``world_size + 1`` positions.

    Parameters
    ----------
    numel : int, or sequence of int
        Coordinates of an update; or those of each of its layers, and then cuts fall on multiples of
        `SHARD_CHUNK` within a layer, not of the whole.
    world_size : int
        Number of shards, at least 1. Some are empty when there are more than chunks.

    Examples
    --------
    >>> from flcore.aggregation import shard_bounds
    >>> shard_bounds(100_000, 3)
    [0, 32768, 65536, 100000]
    """
    world_size = whole("world_size", world_size, 1)
    several = isinstance(numel, Sequence | np.ndarray)
    sizes = [whole("numel", m, 0) for m in (numel if several else [numel])]  # type: ignore[list-item, union-attr]
    starts = [0, *accumulate(sizes)]
    chunks = [0, *accumulate(-(-m // SHARD_CHUNK) for m in sizes)]
    bounds = []
    for r in range(world_size + 1):
        c = chunks[-1] * r // world_size
        layer = bisect_right(chunks, c) - 1
        inside = (c - chunks[layer]) * SHARD_CHUNK if layer < len(sizes) else 0
        bounds.append(starts[layer] + inside)
    return bounds


def shard(update: Any, rank: int, world_size: int, *, per_layer: bool = False) -> Any:
    """Return the part of an update that process `rank` of `world_size` holds.

    Parameters
    ----------
    update : update
        Its floating layers are cut, in their order, as one long vector. Layers that are contiguous
        are not copied.
    rank, world_size : int
        ``0 <= rank < world_size``.
    per_layer : bool
        Cut at multiples of `SHARD_CHUNK` within each layer: for rules that work layer by layer
        (`PrincipalGradient`).

    Returns
    -------
    update
        With the same number and names of layers, each a flat piece that may be empty. Integer and
        boolean layers are whole on every rank.

    Examples
    --------
    >>> import numpy as np
    >>> from flcore.aggregation import shard
    >>> model = {"w": np.zeros((200, 200)), "b": np.zeros(200)}
    >>> [{k: len(v) for k, v in shard(model, r, 2).items()} for r in range(2)]
    [{'w': 16384, 'b': 0}, {'w': 23616, 'b': 200}]
    """
    world_size = whole("world_size", world_size, 1)
    rank = whole("rank", rank, 0, world_size - 1)
    layout, layers = _updates.flatten(update)
    floats, _ = split_layers(layout)
    sizes = [_arrays.numel(layers[j]) for j in floats]
    begin, end = shard_bounds(sizes if per_layer else sum(sizes), world_size)[rank : rank + 2]
    pieces, start = list(layers), 0
    for j, size in zip(floats, sizes, strict=True):
        flat = layers[j] if isinstance(layers[j], np.ndarray) else layers[j].detach()
        low, high = max(begin - start, 0), max(min(end - start, size), 0)
        pieces[j] = flat.reshape(-1)[min(low, high) : high]
        start += size
    return layout.build(pieces)


def gather(piece: Any, like: Any = None, *, group: Any = None) -> Any:
    """Put the shards of an update together on every process of a group.

    Parameters
    ----------
    piece : update
        The shard of this process, as `shard` cuts it: ranks in order hold the parts of each layer.
    like : update, optional
        Gives the shapes of the result; its values are not used. By default layers are flat.
    group : torch.distributed.ProcessGroup, optional
        By default all processes.

    Returns
    -------
    update
        Of the kinds and dtypes of `piece`, in new memory; integer layers are those of this process.

    Raises
    ------
    InvalidInputError, DTypeError
        Shards that do not fit together, or do not make `like`; on every process.
    """
    team = Team(group)

    def describe() -> tuple[Any, ...]:
        layout, layers = _updates.flatten(piece, "piece")
        floats, _ = split_layers(layout)
        shapes = _shapes(layout, floats, like)
        kinds = [layout.specs[j][1] for j in floats]
        return (layout.keys, kinds, shapes), [_arrays.numel(layers[j]) for j in floats]

    everyone = team.together(describe)
    for rank, (facts, _) in enumerate(everyone):
        if facts != everyone[0][0]:
            raise InvalidInputError(
                "piece, like: expected names, dtypes and shapes of rank 0 on every rank, "
                f"{everyone[0][0]}; rank {rank} has {facts}"
            )
    layout, layers = _updates.flatten(piece, "piece")
    floats, _ = split_layers(layout)
    shapes = _shapes(layout, floats, like)
    sizes = np.array([numels for _, numels in everyone], np.int64).reshape(team.size, -1)
    out: dict[int, Any] = {}
    for place, j in enumerate(floats):
        total = int(sizes[:, place].sum())
        shape = (total,) if shapes is None else shapes[place]
        if int(np.prod(shape, dtype=np.int64)) != total:
            raise InvalidInputError(
                f"{layout.label('like', j)}: expected {total} values like the shards together, "
                f"got shape {shape}"
            )
        out[j] = _joined(team, layers[j], sizes[:, place]).reshape(shape)
    return layout.build([out.get(j, x) for j, x in enumerate(layers)])


def _shapes(
    layout: _updates.Layout, floats: Sequence[int], like: Any
) -> list[tuple[int, ...]] | None:
    if like is None:
        return None
    whole_layout, _ = _updates.flatten(like, "like")
    if (whole_layout.kind, whole_layout.keys) != (layout.kind, layout.keys):
        raise InvalidInputError(
            f"like: expected the layers of the shard, {layout.keys}, got {whole_layout.keys}"
        )
    return [whole_layout.specs[j][2] for j in floats]


def _joined(team: Team, piece: Any, sizes: np.ndarray) -> Any:
    """One flat layer from the pieces of all ranks."""
    total = int(sizes.sum())
    if isinstance(piece, np.ndarray):
        flat = np.empty(total, piece.dtype.newbyteorder("="))
    else:
        flat = piece.new_empty(total)
    start = 0
    for rank, size in enumerate(int(m) for m in sizes):
        part = flat[start : start + size]
        if rank == team.rank:
            _arrays.assign(part, piece)
        if size:
            team.broadcast(part, rank)
        start += size
    return flat
