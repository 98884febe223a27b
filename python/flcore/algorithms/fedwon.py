"""FedWon: no normalisation, standardised weights and gradients clipped by unit; then FedAvg."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flcore.algorithms.base import check_number
from flcore.algorithms.fedavg import FedAvg
from flcore.algorithms.layout import Layout
from flcore.algorithms.state import Client, LocalWork, Payload
from flcore.algorithms.step import UnitClip

__all__ = ["FedWon", "output_units"]


@dataclass(frozen=True, kw_only=True)
class FedWon(FedAvg):
    r"""Federated learning without normalisation (Zhuang and Lyu, ICLR 2024, arXiv 2306.05879).

    Batch normalisations are taken out of the model.  A convolution with weight W, whose row o has
    N entries of mean :math:`\mu_o` and variance :math:`\sigma_o^2` (divided by N), uses

    .. math::
        \hat W_o = \gamma_o \frac{W_o - \mu_o}{\sqrt{\max(N \sigma_o^2, \epsilon)}}

    with a learned gain :math:`\gamma_o`, at first 1.  Before anything else, the gradient of each
    output unit r of each tensor is clipped in proportion to its weights,

    .. math::
        G_r \leftarrow G_r \min \left( 1, \,
            c \frac{\max(\|W_r\|, \epsilon_w)}{\|G_r\|} \right)

    The rest is FedAvg over all parameters; clients keep nothing, and batches of one will do.

    Parameters
    ----------
    threshold : float or None
        c; larger for small batches.  None: no clipping by unit.
    floor : float
        :math:`\epsilon_w`.
    epsilon : float
        :math:`\epsilon`.

    Notes
    -----
    The last layer is neither standardised nor clipped.  Biases and gains count as one unit each.
    The defaults are those that the paper is said to have for batches of 32.
    """

    name: ClassVar[str] = "fedwon"

    local_lr: float = 0.01
    lr_decay: float = 1.0
    local_epochs: int = 1
    batch_size: int = 32
    weight_decay: float = 0.0
    clip: float | None = None
    threshold: float | None = 1.28
    floor: float = 1e-3
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("threshold", "floor", "epsilon"):
            value = getattr(self, option)
            if option != "threshold" or value is not None:
                check_number(option, value, lambda v: v > 0, "a number above 0")

    def prepare_model(self, model: Any) -> Any:
        """Take normalisations out, and standardise the weights of convolutions."""
        from flcore.nn import normalizer_free

        return normalizer_free(model, eps=self.epsilon)

    def client_begin(self, payload: Payload, client: Client) -> LocalWork:
        """Take FedAvg's steps with gradients clipped by unit."""
        work = super().client_begin(payload, client)
        if self.threshold is None:
            return work
        clip = UnitClip(self.threshold, output_units(client.layout), self.floor)
        return replace(work, spec=replace(work.spec, unit_clip=clip))


def output_units(layout: Layout) -> np.ndarray:
    """Give the number of the output unit of each trained value, -1 in the last layer.

    A row of a tensor with several axes is a unit, and so is a tensor with one axis.
    """
    units, count = [], 0
    for name, shape in layout.shapes.items():
        if layout.slices[name].start >= layout.trained:
            continue
        if layout.kinds.get(name) == "classifier":
            units.append(np.full(math.prod(shape), -1))
            continue
        rows = shape[0] if len(shape) > 1 else 1
        units.append(count + np.repeat(np.arange(rows), math.prod(shape) // rows))
        count += rows
    return np.concatenate(units).astype(np.int64)
