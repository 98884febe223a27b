"""Runs of the model over the user's calibration batches, and what is recorded on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from flcore._extras import require
from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization.preparation._groups import ScalingGroup, check_groups
from flcore.quantization.preparation._statistics import ActivationStatistics, select_tokens

__all__ = ["Calibration", "Recorded", "Tell", "collect_statistics", "first_tensor", "record"]

torch: Any = require("torch", extra="torch")

Tell = Callable[[int, int, str], None]


def _run(model: Any, batch: Any) -> Any:
    """Call the model as the kind of batch says."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@dataclass(frozen=True)
class Calibration:
    """Batches, how the model takes one, and which of its tokens are padding.

    Parameters
    ----------
    batches : iterable
        A batch is a tensor, a tuple of arguments or a mapping of keyword arguments of the model.
        Read once and kept (token ids are small; activations are not kept).
    forward : callable, optional
        ``forward(model, batch)``, for models that want something else.
    mask : str or callable, optional
        A key of the batches, or ``mask(batch)``: [batch, time] with False or 0 for padding. By
        default ``"attention_mask"`` where batches are mappings that have it.
    """

    batches: Sequence[Any]
    forward: Callable[[Any, Any], Any] = _run
    mask: str | Callable[[Any], Any] | None = "attention_mask"

    @classmethod
    def of(
        cls,
        batches: Iterable[Any],
        forward: Callable[[Any, Any], Any] | None = None,
        mask: str | Callable[[Any], Any] | None = "attention_mask",
    ) -> Calibration:
        """Return the batches as a list, checked."""
        if isinstance(batches, Calibration):
            return batches
        if isinstance(batches, (torch.Tensor, Mapping)):
            batches = [batches]
        if not isinstance(batches, Iterable):
            raise DTypeError(
                f"batches: expected an iterable of batches, got {type(batches).__name__}"
            )
        kept = list(batches)
        if not kept:
            raise InvalidInputError("batches: expected at least one, got none")
        return cls(kept, forward or _run, mask)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def mask_of(self, batch: Any) -> Any:
        """Return the mask of a batch, or None."""
        if callable(self.mask):
            return self.mask(batch)
        if self.mask is not None and isinstance(batch, Mapping):
            return batch.get(self.mask)
        return None


@dataclass
class Recorded:
    """What one group saw: its input of every call, and the calls of the inspected module.

    `inputs`, `masks` and `targets` are lists over calls; `targets` are outputs in float.
    """

    inputs: list[Any] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    call_masks: list[Any] = field(default_factory=list)

    def rows(self) -> Any:
        """Return all tokens [T, K], padding left out, in at least float32."""
        rows = torch.cat(
            [select_tokens(x, m) for x, m in zip(self.inputs, self.masks, strict=True)]
        )
        return rows if rows.dtype == torch.float64 else rows.float()


def first_tensor(value: Any) -> Any:
    """Return the first floating-point tensor in an output, whatever wraps it."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    return next((t for t in map(first_tensor, value) if t is not None), None)


def _copies(value: Any) -> Any:
    """Copy the tensors in a tuple of arguments or in one argument."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copies, value))
    return value


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients and dropout; training flags are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def record(
    model: Any,
    groups: Sequence[ScalingGroup],
    calibration: Calibration,
    tell: Callable[[], None] = lambda: None,
) -> list[Recorded]:
    """Run every batch once and record what the groups need; `model` is evaluating.

    Raises
    ------
    InvalidInputError
        A linear or inspected module was not run.
    """
    found = [Recorded() for _ in groups]
    current: list[Any] = [None]
    hooks = []

    def watch_input(into: Recorded) -> Callable[..., None]:
        def hook(_module: Any, args: tuple) -> None:
            into.inputs.append(args[0].detach().clone())  # later ops may write in place
            into.masks.append(current[0])

        return hook

    def watch_call(into: Recorded) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(_module: Any, args: tuple, kwargs: dict) -> None:
            into.calls.append((_copies(args), {k: _copies(v) for k, v in kwargs.items()}))
            into.call_masks.append(current[0])

        def after(_module: Any, _args: tuple, output: Any) -> None:
            into.targets.append(first_tensor(output).detach().clone())

        return before, after

    for group, into in zip(groups, found, strict=True):
        linear = model.get_submodule(group.linears[0])
        hooks.append(linear.register_forward_pre_hook(watch_input(into)))
        if isinstance(group.inspect, str):
            module = model.get_submodule(group.inspect)
            before, after = watch_call(into)
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after))
    try:
        for batch in calibration.batches:
            current[0] = calibration.mask_of(batch)
            calibration.forward(model, batch)
            tell()
    finally:
        for hook in hooks:
            hook.remove()
    for number, (group, into) in enumerate(zip(groups, found, strict=True)):
        if not into.inputs:
            raise InvalidInputError(f"groups[{number}]: {group.linears[0]!r} was not run")
        if isinstance(group.inspect, str) and not into.calls:
            raise InvalidInputError(f"groups[{number}]: {group.inspect!r} was not run")
        if sum(x.numel() for x in into.inputs) == 0 or into.rows().shape[0] == 0:
            raise InvalidInputError(f"groups[{number}]: no token reached {group.linears[0]!r}")
    return found


def collect_statistics(
    model: Any,
    groups: Iterable[ScalingGroup],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any, Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "attention_mask",
    progress: bool | Tell = True,
) -> dict[str, ActivationStatistics]:
    """Run the batches once and return the channel statistics of every group's input.

    Parameters
    ----------
    model : torch.nn.Module
    groups : sequence of ScalingGroup
    batches : iterable
        Tensors, tuples of arguments or mappings of keyword arguments of `model`.
    forward : callable, optional
        ``forward(model, batch)``.
    mask : str or callable, optional
        A key of the batches, or ``mask(batch)``: False or 0 for padding.
    progress : bool or callable
        A bar on a terminal (needs rich), or a function of (done, all, what).

    Returns
    -------
    dict
        By the name of the first linear of each group. `merge_statistics` joins those of clients.
    """
    groups = check_groups(model, groups)
    calibration = Calibration.of(batches, forward, mask)
    found = {g.linears[0]: ActivationStatistics.empty(_width(model, g)) for g in groups}
    current: list[Any] = [None]

    def watch(into: ActivationStatistics) -> Callable[..., None]:
        def hook(_module: Any, args: tuple) -> None:
            into.update(args[0], current[0])

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(watch(into))
        for name, into in found.items()
    ]
    try:
        with evaluating(model), progress_bar(progress, len(calibration.batches)) as tell:
            for batch in calibration.batches:
                current[0] = calibration.mask_of(batch)
                calibration.forward(model, batch)
                tell("statistics")
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistics in found.items():
        if statistics.count == 0:
            raise InvalidInputError(f"groups: no token reached {name!r}")
    return found


def _width(model: Any, group: ScalingGroup) -> int:
    return int(model.get_submodule(group.linears[0]).in_features)


@contextmanager
def progress_bar(progress: bool | Tell, total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function of what was just done: each call is one step of `total`."""
    done = 0
    draw: Tell = (lambda done, total, what: None) if isinstance(progress, bool) else progress
    bar: Any = nullcontext()
    if progress is True and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ModuleNotFoundError:
            pass
        else:
            bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            task = bar.add_task("", total=total)

            def draw(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, description=what)

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        draw(done, total, what)

    with bar:
        yield tell
