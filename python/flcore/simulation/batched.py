"""Training the clients of a round together: their models are the rows of one matrix.

What a small network costs is calls, not arithmetic, so a hundred clients take little longer than
one. Gradients come from `torch.func.vmap` over stacked parameters, recorded once and replayed
(`flcore.simulation._gradients`); the local steps are those of the sequential trainer, on rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from flcore.algorithms.layout import Vector
from flcore.algorithms.state import LocalResult
from flcore.algorithms.step import StepSpec
from flcore.algorithms.tools import BatchLoss
from flcore.errors import InvalidInputError
from flcore.losses import stablemax_cross_entropy
from flcore.simulation._functional import FunctionalModel
from flcore.simulation._gradients import Gradients
from flcore.simulation._together import Together
from flcore.simulation._trace import UntraceableError

if TYPE_CHECKING:
    from flcore.simulation.local import Job, LocalTrainer, Trainer

__all__ = ["BatchedTrainer", "choose_trainer", "why_not"]

LARGEST = 1 << 20
"""Parameters up to which training together takes clearly less time on a CPU.

Measured: with 4,810 a tenth of the time of the sequential trainer, with 85,002 a third, with
670,000 three quarters.
"""

WIDEST = 1 << 13
"""Values of a convolution's output for one example up to which that is so.

Measured with the CNN of `flcore.simulation.MODELS`: 8 x 8 pixels (2,048 values) half of the time,
16 x 16 (8,192) four fifths, 28 x 28 (25,088) as long, 32 x 32 (32,768) a tenth longer. A vmapped
convolution is one of groups.
"""

EACH = ("lr", "alpha", "decay", "clip", "pull", "rho")
"""Numbers of a step that may differ from client to client, unless they are 0 or 1."""

STEP = [field.name for field in fields(StepSpec)]

VALUES = 1 << 21
"""Parameters that are trained together: 8 MB of them; more would not stay in cache."""


class BatchedTrainer:
    """Trains clients together.

    Parameters
    ----------
    one : LocalTrainer
        Whose model and data are used; it trains what cannot be trained together.
    loss, optimizer : str
        See `flcore.simulation.Settings`.
    batch_loss : BatchLoss, optional
        What is minimised in the place of the mean loss of the batch.
    strict : bool
        Raise where clients cannot be trained together; False: leave them to `one`, also where
        their loss reads the number of the step and so has to be recorded for each step.
    device : optional
        Where clients are trained; by default where the training data are.

    Raises
    ------
    InvalidInputError
        If the model cannot be trained so; see `why_not`.

    Notes
    -----
    The result is that of `one`, to rounding: clients have the same mini-batches in the same order.
    Who else is trained in the same call makes a difference by rounding only.
    """

    def __init__(
        self,
        one: LocalTrainer,
        *,
        loss: str = "softmax",
        optimizer: str = "sgd",
        batch_loss: BatchLoss | None = None,
        strict: bool = False,
        device: Any = None,
    ) -> None:
        if (reason := why_not(one.model)) is not None:
            raise InvalidInputError(f"execution: {reason}")
        self.layout, self.initial = one.layout, one.initial
        self.one, self.optimizer, self._strict = one, optimizer, strict
        self.device = torch.device(device or (one.x.device if one.x is not None else "cpu"))
        function = stablemax_cross_entropy if loss == "stablemax" else cross_entropy
        network = FunctionalModel(one.model, one.layout)
        # a loss that differs from step to step is recorded so often that it rarely pays
        self.gradients = Gradients(
            network, loss, function, batch_loss, self.device, stepwise=strict
        )
        self.aux: dict[Any, torch.Tensor] = {}
        self._impossible: set[Any] = set()
        self._moved: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, jobs: Sequence[Job]) -> list[LocalResult]:
        """Train several clients.

        Returns
        -------
        One LocalResult a job, in order; where training diverged, its loss is NaN.

        Raises
        ------
        InvalidInputError
            If `strict`, and the loss of these clients cannot be computed together.
        """
        results: dict[int, LocalResult] = {}
        groups: dict[Any, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(_signature(job), []).append(i)
        together = max(VALUES // self.layout.numel, 1)
        for signature, members in groups.items():
            members.sort(key=lambda i: -len(jobs[i].view.sizes))
            for first in range(0, len(members), together):
                part = members[first : first + together]
                done = self._train([jobs[i] for i in part], signature)
                results.update(zip(part, done, strict=True))
        return [results[i] for i in range(len(jobs))]

    def evaluate(self, model: Vector, x: Any, y: Any) -> tuple[float, float]:
        """Give accuracy (0 to 1) and mean loss on the examples `x`, `y`."""
        return self.one.evaluate(model, x, y)

    def data(self, name: str) -> torch.Tensor:
        """Give the training data, "x" or "y", on the device."""
        source = getattr(self.one, name)
        if name not in self._moved or self._moved[name][0] is not source:
            self._moved[name] = source, source.to(self.device)
        return self._moved[name][1]

    def _train(self, jobs: list[Job], signature: Any) -> list[LocalResult]:
        """Train clients whose steps are alike, who has most steps first."""
        if signature not in self._impossible and jobs[0].view.sizes:
            try:
                with torch.inference_mode():
                    return Together(self, jobs).run()
            except UntraceableError as error:
                if self._strict:
                    raise InvalidInputError(
                        "execution: the losses of clients cannot be computed together: "
                        f'{error}; use execution="sequential"'
                    ) from error
                self._impossible.add(signature)
        return self.one.train(jobs)


def choose_trainer(
    one: LocalTrainer,
    *,
    execution: str,
    participants: int,
    loss: str = "softmax",
    optimizer: str = "sgd",
    batch_loss: BatchLoss | None = None,
) -> Trainer:
    """Give what trains the clients of a round.

    Parameters
    ----------
    one : LocalTrainer
        Trains one client after another.
    execution : {"auto", "batched", "sequential"}
        "batched": together, "auto": together where that is possible and takes less time.
    participants : int
        Clients in a round.
    loss, optimizer, batch_loss
        As `BatchedTrainer`.

    Raises
    ------
    InvalidInputError
        If "batched" was asked for and is impossible.

    Notes
    -----
    "auto" goes by what can be known before the run, so that it chooses the same again when the run
    is resumed: from two clients a round, on a CPU up to `LARGEST` parameters and images whose
    convolutions give up to `WIDEST` values.
    """
    auto = execution == "auto"
    if execution == "sequential" or (auto and not _pays(one, participants)):
        return one
    return BatchedTrainer(
        one, loss=loss, optimizer=optimizer, batch_loss=batch_loss, strict=not auto
    )


def _pays(one: LocalTrainer, participants: int) -> bool:
    """Whether training together is possible, as far as can be seen, and takes less time."""
    if participants < 2 or why_not(one.model) is not None:
        return False
    if one.x is None or one.x.device.type != "cpu":
        return True
    return one.layout.numel <= LARGEST and _widest(one) <= WIDEST


def _widest(one: LocalTrainer) -> int:
    """Give the most values that a convolution makes of one example."""
    widest = [0]

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        widest.append(output.numel())

    kinds = torch.nn.modules.conv._ConvNd
    convolutions = [m for m in one.model.modules() if isinstance(m, kinds)]
    if not convolutions or one.x is None:
        return 0
    hooks = [module.register_forward_hook(note) for module in convolutions]
    try:
        one.scores(one.initial, one.x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return max(widest)


def why_not(model: torch.nn.Module) -> str | None:
    """Say why clients with this model cannot be trained together; None if they can."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, (torch.nn.modules.batchnorm._NormBase, torch.nn.SyncBatchNorm)):
            return (
                f"layer {name} ({kind}) keeps statistics of the examples that it sees, so clients "
                'cannot be trained together; use GroupNorm, or execution="sequential"'
            )
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            return (
                f"layer {name} ({kind}) draws random numbers, which would not be those of clients "
                'trained one after another; use execution="sequential"'
            )
    return None


def _signature(job: Job) -> Any:
    """Give what clients have in common that are trained together."""
    view, spec = job.view, job.work.spec
    steps = tuple([_alike(name, getattr(spec, name)) for name in STEP])
    aux = tuple([(name, _alike(name, value)) for name, value in sorted(job.work.aux.items())])
    return _alike("x", view.x), _alike("y", view.y), steps, aux


def _alike(name: str, value: Any) -> Any:
    """Give what the values of clients trained together have in common."""
    if value is None or isinstance(value, (bool, str, tuple)):
        return value
    if isinstance(value, (int, float)):
        return (value == 0, value == 1) if name in EACH else value
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return tuple(value.shape[name in ("x", "y") :]), str(value.dtype)
    if is_dataclass(value):
        return type(value), *(_alike(f.name, getattr(value, f.name)) for f in fields(value))
    return value if isinstance(value, Hashable) else id(value)
