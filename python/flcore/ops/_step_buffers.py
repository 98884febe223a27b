"""The arrays a server step reads and writes: given by the caller, allocated, or scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flcore import _arrays, _updates
from flcore._arrays import View
from flcore.errors import DTypeError
from flcore.ops._step import CAST, Step, Stepped

__all__ = ["StepBuffers"]


class StepBuffers:
    """What a step reads and writes, as views: `old` and `new` hold model, m, v (and the copy)."""

    def __init__(
        self,
        step: Step,
        layout: _updates.Layout,
        model: list[View],
        arrays: Sequence[Any],
        given: dict[str, list[Any]],
        cast: str | None,
        rows: Iterable[View],
    ) -> None:
        self._given = given
        state = ["float64" if v.dtype == "float64" else "float32" for v in model]
        self.old = [model]
        self.new: list[list[View]] = []
        self._back: list[tuple[list[Any], list[View]]] = []  # to copy when all went well
        self.names = ["model", *step.states]
        for name in step.states:
            if name in given:
                old = layout.views(given[name], name)
                for j, (view, dtype) in enumerate(zip(old, state, strict=True)):
                    if view.dtype != dtype:
                        raise DTypeError(
                            f"{layout.label(name, j)}: expected {dtype} for a {model[j].dtype} "
                            f"layer of the model, got {view.dtype}"
                        )
            else:
                old = [_zeros(x, dtype) for x, dtype in zip(arrays, state, strict=True)]
            self.old.append(old)
        read = [*rows, *(view for layers in self.old for view in layers)]
        wanted = [("out", [v.dtype for v in model])]
        wanted += [(f"{name}_out", state) for name in step.states]
        if cast is not None or "cast" in given:
            self.names.append("cast")
            kinds = [cast] if cast else [_arrays.dtype_name(x) for x in given["cast"]]
            if len(set(kinds)) > 1 or not set(kinds) <= set(CAST):
                raise DTypeError(f"cast: expected one of {CAST}, got {sorted(set(kinds))}")
            wanted.append(("cast", [kinds[0] if kinds else CAST[0]] * len(model)))
        for name, dtypes in wanted:
            likes = [v._replace(dtype=d) for v, d in zip(model, dtypes, strict=True)]
            fresh = [
                _arrays.view(_arrays.empty_like(x, d))
                for x, d in zip(arrays, dtypes, strict=True)
                if name not in given
            ]
            if name in given:
                fresh = self._targets(given[name], likes, arrays, name, layout, read)
            self.new.append(fresh)

    def _targets(
        self,
        out: list[Any],
        likes: list[View],
        arrays: Sequence[Any],
        name: str,
        layout: _updates.Layout,
        read: list[View],
    ) -> list[View]:
        """Views of the caller's arrays, or of scratch where a result could not go there at once."""
        found = [
            _arrays.writable_view(x, layout.label(name, j), likes[j]) for j, x in enumerate(out)
        ]
        direct = [v for v in found if v is not None]
        if len(direct) == len(found) and not _arrays.overlap(direct, read):
            return direct
        scratch = [
            _arrays.view(_arrays.empty_like(x, v.dtype)) for x, v in zip(arrays, likes, strict=True)
        ]
        self._back.append((out, scratch))
        return scratch

    def finish(self) -> Stepped:
        """Bring scratch to where it belongs; return lists of layers."""
        for out, scratch in self._back:
            for target, result in zip(out, scratch, strict=True):
                _arrays.assign(target, result.array)
        found: dict[str, list[Any]] = {}
        for name, layers in zip(self.names, self.new, strict=True):
            key = {"model": "out", "cast": "cast"}.get(name, f"{name}_out")
            found[name] = self._given.get(key) or [v.array for v in layers]
        return Stepped(*(found.get(name) for name in ("model", "m", "v", "cast")))


def _zeros(x: Any, dtype: str) -> View:
    zeros = _arrays.empty_like(x, dtype)
    zeros[...] = 0
    return _arrays.view(zeros)
