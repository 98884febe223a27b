"""What was recorded, run again and again on the same memory.

All tensors of a computation are made once, and all views of them are taken once; what is left is a
list of calls without arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from flcore.simulation._trace import Operation, Trace, rename, resolve

__all__ = ["Call", "Replay"]

Call = Callable[[], Any]

aten = torch.ops.aten

FAST: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.exp.default: torch.exp,
    aten.gather.default: torch.gather,
    aten.log.default: torch.log,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum,
    aten.tanh.default: torch.tanh,
}
"""Functions of torch that do what an operator does, into `out`, and take less time to call."""

SHAPES_ONLY = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Operators that look at the shape of their argument only."""


class Replay:
    """A trace, for one number of clients and with its arguments at fixed places.

    Parameters
    ----------
    trace : Trace
    clients : int
    inputs : tensors
        Read by every call, where they are.
    into : dict of position to tensor
        Where outputs should go, by position among the outputs.
    late : name of an input, optional
        That is not there yet when the early calls run.

    Attributes
    ----------
    early, late : list of calls
        What does not need the late input, and then what does.
    outputs : list of tensors
        Overwritten by every run, and free to be overwritten by others between runs.
    nbytes : int
        Memory of the results.
    """

    def __init__(
        self,
        trace: Trace,
        clients: int,
        inputs: Sequence[torch.Tensor],
        into: dict[int, torch.Tensor],
        late: str | None = None,
    ) -> None:
        self._trace, self._clients = trace, clients
        self.early: list[Call] = []
        self.late: list[Call] = []
        self._waiting = {late}
        self._constant = set(trace.constants)
        self.nbytes = 0
        given = dict(zip(trace.inputs, inputs, strict=True)) | trace.constants
        memory = self._first_run(given)
        places = self._places(memory, into) if trace.pure else {}
        values = self._schedule(given, memory, places)
        self.outputs = [values[name] for name in trace.outputs]
        for position, place in into.items():
            source, name = self.outputs[position], trace.outputs[position]
            if source.data_ptr() != place.data_ptr() or name in self._constant:
                self.late.append(partial(place.copy_, source))
                self.outputs[position] = place

    def _first_run(self, given: dict[str, Any]) -> dict[str, Any]:
        """Run everything once; gives all results, whose memory is that of all later runs."""
        values = dict(given)
        for op in self._trace.operations:
            args, kwargs = self._arguments(op, values)
            _store(op, op.target(*args, **kwargs), values)
        return values

    def _schedule(
        self, given: dict[str, Any], memory: dict[str, Any], places: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """List the calls that are needed in every run; gives all tensors."""
        values = dict(given)
        seen: dict[str, Operation] = {}
        same: dict[str, str] = {}
        pure = self._trace.pure
        for op in self._trace.operations:
            used = op.names
            if self._waiting.intersection(used) or (self.late and not pure):
                self._waiting.update(op.results)
            key = repr((str(op.target), rename((op.args, op.kwargs), same)))
            if pure and (op.target in SHAPES_ONLY or self._constant.issuperset(used)):
                self._constant.update(op.results)  # type: ignore[arg-type]
                _store(op, [memory.get(name) for name in op.results], values)  # type: ignore[arg-type]
            elif pure and key in seen and not places.keys() & op.results:
                same |= dict(zip(op.results, seen[key].results, strict=True))  # type: ignore[arg-type]
                _store(op, [values.get(name) for name in seen[key].results], values)  # type: ignore[arg-type]
            elif _is_view(op):
                _store(op, self._view(op, values), values)
                seen[key] = op
            else:
                args, kwargs = self._arguments(op, values)
                buffers = [places.get(name, memory.get(name)) for name in op.results]  # type: ignore[arg-type]
                call = _into(op.target, args, kwargs, buffers)
                late = not self._waiting.isdisjoint(op.results)
                (self.late if late else self.early).append(call)
                self.nbytes += sum(b.numel() * b.element_size() for b in buffers if b is not None)
                _store(op, buffers, values)
                seen.setdefault(key, op)
        return values

    def _arguments(self, op: Operation, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (
            resolve(op.args, values, self._clients),
            resolve(op.kwargs, values, self._clients),
        )

    def _view(self, op: Operation, values: dict[str, Any]) -> Any:
        args, kwargs = self._arguments(op, values)
        if op.target is aten._unsafe_view.default:
            return args[0].view(args[1])
        if op.target is aten.mul.Scalar:
            return args[0]
        return op.target(*args, **kwargs)

    def _places(
        self, memory: dict[str, Any], into: dict[int, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Give the results that can be written where an output should go, and that place.

        An output is often a transposed view of a product: then the product is written so that the
        view lies in its place.
        """
        made = {name: op for op in self._trace.operations for name in op.results}
        users = Counter(name for op in self._trace.operations for name in op.names)
        users.update(self._trace.outputs)
        places: dict[str, torch.Tensor] = {}
        for position, place in into.items():
            name = self._trace.outputs[position]
            at: torch.Tensor | None = place
            while at is not None and name in made and users[name] == 1:
                op = made[name]
                if not _is_view(op):
                    places[name] = at
                    break
                args, _ = self._arguments(op, memory)
                at, name = _undo(op, args, at), op.args[0].name
        return places


def _store(op: Operation, result: Any, values: dict[str, Any]) -> None:
    """Put results under their names."""
    if isinstance(result, torch.Tensor):
        result = (result,)
    values.update(
        (name, item) for name, item in zip(op.results, result, strict=True) if name is not None
    )


def _is_view(op: Operation) -> bool:
    """Whether the result is memory of the argument; some operators do not say so."""
    if op.target is aten.mul.Scalar:
        return bool(op.args[1] == 1)
    return bool(op.target.is_view or op.target is aten._unsafe_view.default)


def _undo(op: Operation, args: Sequence[Any], place: torch.Tensor) -> torch.Tensor | None:
    """Give the tensor whose view, as `op` takes it, lies in `place`; None if there is none."""
    shape = args[0].shape
    if op.target is aten.transpose.int:
        return place.transpose(args[1], args[2])
    if op.target is aten.t.default:
        return place.t()
    if op.target is aten.permute.default:
        order = [axis % len(shape) for axis in args[1]]
        return place.permute([order.index(axis) for axis in range(len(shape))])
    if place.numel() != shape.numel() or op.target is aten.as_strided.default:
        return None
    try:
        return place.view(shape)
    except RuntimeError:  # its strides do not allow it
        return None


def _into(target: Any, args: Sequence[Any], kwargs: dict[str, Any], buffers: list[Any]) -> Call:
    """Give the call that computes an operation into its buffers."""
    if target is aten.relu.default:
        return partial(torch.clamp_min, args[0], 0, out=buffers[0])
    if target in FAST:
        return partial(FAST[target], *args, **kwargs, out=buffers[0])
    variant = _out_variant(target)
    if variant is None or any(buffer is None for buffer in buffers):
        return partial(_copy, buffers, partial(target, *args, **kwargs))
    overload, outs = variant
    return partial(overload, *args, **kwargs, **dict(zip(outs, buffers, strict=True)))


def _copy(buffers: list[Any], function: Call) -> None:
    results = function()
    if isinstance(results, torch.Tensor):
        results = (results,)
    for buffer, result in zip(buffers, results, strict=True):
        if buffer is not None:
            buffer.copy_(result)


@cache
def _out_variant(target: Any) -> tuple[Any, list[str]] | None:
    """Give the overload of an operator that writes into given tensors, and their names."""
    arguments = [(a.name, str(a.type)) for a in target._schema.arguments]
    packet = target.overloadpacket
    for name in packet.overloads():
        overload = getattr(packet, name)
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out]
        if outs and rest == arguments and len(outs) == len(target._schema.returns):
            return overload, outs
    return None
