"""A function of tensors, recorded once as a list of operators, for any number of clients.

`torch.func` finds out what to compute, but to run through its layers costs more time than the
arithmetic of a small network. So the batched gradient is recorded, and only what was recorded runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flcore.errors import InvalidInputError

__all__ = ["Name", "Operation", "Trace", "UntraceableError", "record", "rename", "resolve"]

FEW, MORE = 2, 3
"""Numbers of clients of the two recordings.

One would be special: a dimension of one value may be viewed in ways that others may not.
"""

DIFFERENT = "it does different things for different numbers of clients"


class UntraceableError(InvalidInputError):
    """The function cannot be recorded; the message says why."""


class Name(NamedTuple):
    """Stands for a tensor: an input, a constant or a result."""

    name: str


class Size(NamedTuple):
    """Stands for the number ``base + slope * clients``."""

    base: int
    slope: int


@dataclass(frozen=True)
class Operation:
    """One call, its arguments with `Name` and `Size` in them.

    Parameters
    ----------
    target : torch._ops.OpOverload
    args, kwargs : arguments
    results : list
        A name for each result, None where there is no tensor.
    """

    target: Any
    args: Any
    kwargs: Any
    results: list[str | None]

    @cached_property
    def names(self) -> list[str]:
        """Names in the arguments, as often as they occur."""
        found: list[str] = []
        _walk((self.args, self.kwargs), lambda item: found.append(getattr(item, "name", "")))
        return [name for name in found if name]


@dataclass(frozen=True)
class Trace:
    """What a function does.

    Parameters
    ----------
    inputs : list of str
        Names of its arguments.
    constants : dict of name to tensor
        Tensors that it took from elsewhere.
    operations : list of Operation
    outputs : list of str
        Names of its results.
    """

    inputs: list[str]
    constants: dict[str, torch.Tensor]
    operations: list[Operation]
    outputs: list[str]

    @cached_property
    def pure(self) -> bool:
        """Whether no operation writes to a tensor that another one made."""
        return not any(op.target._schema.is_mutable for op in self.operations)


def record(
    function: Callable[..., Sequence[torch.Tensor]],
    arguments: Callable[[int], Sequence[torch.Tensor]],
) -> Trace:
    """Record `function` for any number of clients.

    Parameters
    ----------
    function : callable
        Takes tensors, gives tensors, and does the same whatever their values are.
    arguments : callable
        Gives arguments for so many clients.

    Raises
    ------
    UntraceableError
        If the function looks at values, draws random numbers, writes to what it did not make, or
        its sizes do not grow in proportion to the number of clients.

    Notes
    -----
    Sizes that differ between recordings for two and for three clients are taken to be linear in
    the number of clients.
    """
    few, more = (_record(function, list(arguments(clients))) for clients in (FEW, MORE))
    if len(few.operations) != len(more.operations) or few.outputs != more.outputs:
        raise UntraceableError(DIFFERENT)
    joined = []
    for a, b in zip(few.operations, more.operations, strict=True):
        if a.target != b.target or a.results != b.results:
            raise UntraceableError(DIFFERENT)
        joined.append(
            Operation(a.target, _join(a.args, b.args), _join(a.kwargs, b.kwargs), a.results)
        )
    return Trace(few.inputs, few.constants, joined, few.outputs)


def resolve(value: Any, tensors: dict[str, Any], clients: int) -> Any:
    """Put tensors and numbers into the arguments of an operation."""
    return _walk(
        value,
        lambda item: (
            tensors[item.name] if isinstance(item, Name) else item.base + item.slope * clients
        ),
    )


def rename(value: Any, other: dict[str, str]) -> Any:
    """Put other names into the arguments of an operation."""
    return _walk(
        value,
        lambda item: Name(other.get(item.name, item.name)) if isinstance(item, Name) else item,
    )


def _walk(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every Name and Size."""
    if isinstance(value, (Name, Size)):
        return change(value)
    if isinstance(value, dict):
        return {key: _walk(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    if isinstance(value, tuple):
        return tuple(_walk(item, change) for item in value)
    return value


def _join(few: Any, more: Any) -> Any:
    """Join the arguments of both recordings."""
    if isinstance(few, Name) or isinstance(more, Name):
        if few != more:
            raise UntraceableError(DIFFERENT)
        return few
    if isinstance(few, dict):
        return {key: _join(value, more[key]) for key, value in few.items()}
    if isinstance(few, (tuple, list)):
        if len(few) != len(more):
            raise UntraceableError(DIFFERENT)
        joined = [_join(a, b) for a, b in zip(few, more, strict=True)]
        return joined if isinstance(few, list) else tuple(joined)
    if few == more:
        return few
    if isinstance(few, int) and isinstance(more, int):
        slope = (more - few) // (MORE - FEW)
        return Size(few - slope * FEW, slope)
    raise UntraceableError(f"a number in it, {few!r}, depends on the number of clients")


def _record(function: Any, arguments: list[torch.Tensor]) -> Trace:
    recorder = _Recorder(arguments)
    try:
        with _no_loops(), recorder:
            outputs = function(*arguments)
    except UntraceableError:
        raise
    except Exception as error:  # whatever the user's code and torch.func may raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UntraceableError(text[0]) from error
    return recorder.trace(list(outputs))


@contextmanager
def _no_loops() -> Iterator[None]:
    """Let vmap refuse operators that it would run client by client."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


class _Recorder(TorchDispatchMode):
    """Notes every operator that runs on plain tensors, below autograd and `torch.func`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports torch's compiler, which takes a second

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._operations: list[Operation] = []
        self._constants: dict[str, torch.Tensor] = {}
        self._names: dict[Any, str] = {}
        self._alive: list[torch.Tensor] = []  # so that no key in `_names` is used again
        self._made: set[int] = set()
        self._inputs = [self._name(tensor) for tensor in inputs]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UntraceableError(f"it draws random numbers ({func}), as dropout does")
        if torch.Tag.dynamic_output_shape in func.tags and not _plain_index(func, args):
            raise UntraceableError(f"shapes in it depend on the values of tensors ({func})")
        self._check_writes(func, args, kwargs)
        result = func(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not any(isinstance(item, torch.Tensor) for item in results):
            raise UntraceableError(f"what it does depends on the values of tensors ({func})")
        encoded = self._encode(args), self._encode(kwargs)
        if not func.is_view:
            self._made.update(_memory(item) for item in results if item is not None)
        named = [None if item is None else self._name(item) for item in results]
        self._operations.append(Operation(func, *encoded, named))
        return result

    def trace(self, outputs: Sequence[torch.Tensor]) -> Trace:
        """Give what led to these results."""
        ends = [self._encode(tensor).name for tensor in outputs]
        wanted = set(ends)
        needed = []
        for op in reversed(self._operations):
            if op.target._schema.is_mutable or wanted.intersection(op.results):
                wanted.update(op.names)
                needed.append(op)
        constants = {k: v for k, v in self._constants.items() if k in wanted}
        return Trace(self._inputs, constants, needed[::-1], ends)

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            tensor = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in self._made:
                raise UntraceableError(
                    f"it changes a tensor that it did not make ({func}), as running statistics do"
                )

    def _name(self, tensor: torch.Tensor) -> str:
        self._alive.append(tensor)
        name = self._names.setdefault(id(tensor), f"t{len(self._names)}")
        # autograd may keep a result as another object of the same memory
        self._names.setdefault(_place(tensor), name)
        return name

    def _encode(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = self._names.get(id(value)) or self._names.get(_place(value))
            if name is None:
                name = self._name(value)
                self._constants[name] = value.detach()
            return Name(name)
        if isinstance(value, dict):
            return {key: self._encode(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._encode(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._encode(item) for item in value)
        return value


def _plain_index(func: Any, args: Any) -> bool:
    """Whether this is indexing by numbers, not by masks."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(t is None or t.dtype not in (torch.bool, torch.uint8) for t in args[1])


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(tensor: torch.Tensor) -> Any:
    offset = tensor.storage_offset()
    return _memory(tensor), offset, tensor.shape, tensor.stride(), tensor.dtype
