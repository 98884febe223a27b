"""A frozen base in few bits, over which clients train and send adapters only.

A model that is named (`MODELS`) has random parameters, so the server trains it first, on a share of
the training examples that no client gets: `SHARE` of them, for `WARM_UP` epochs of the run's own
local steps. A module that the caller brings is taken as it is. Then every linear layer becomes a
`flcore.nn.QuantLinear` with adapters; what else there is stays as it is and is not trained.

Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685; Dettmers et al., "QLoRA", NeurIPS 2023,
arXiv 2305.14314. The server averages A and B of the clients each by itself, as FedIT does (Zhang
et al., ICASSP 2024, arXiv 2305.05644): the product of the means is not the mean of the products.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flcore._extras import require
from flcore.algorithms import Algorithm, DataView, LocalWork
from flcore.errors import InvalidInputError
from flcore.simulation.datasets import Dataset
from flcore.simulation.local import Job, LocalTrainer
from flcore.simulation.seeds import Purpose, generator
from flcore.simulation.settings import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["SHARE", "WARM_UP", "Base", "held_out", "make_base"]

SHARE = 0.2
"""Part of the training examples that the server keeps to train a named model on."""

WARM_UP = 20
"""Epochs of that training."""


@dataclass(frozen=True)
class Base:
    """What the base of a run is; part of its configuration.

    Parameters
    ----------
    bits : int
        Of the weights of linear layers.
    rank : int
        Of the adapters.
    layers : int
        Linear layers that were quantised.
    examples : int
        Training examples that the server kept.
    parameters : int
        Values of the base, which are not trained.
    bytes : int
        What a client gets once: quantised weights, scales and zeros, and float32 for the rest.
    accuracy_float, accuracy : float
        Of the base on the test data, before and after it was quantised.
    """

    bits: int
    rank: int
    layers: int
    examples: int
    parameters: int
    bytes: int
    accuracy_float: float
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values."""
        return asdict(self)


def held_out(data: Dataset, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Give the training examples of the server, and those that are left for the clients.

    Returns
    -------
    Two int64 arrays, disjoint, in increasing order.

    Raises
    ------
    InvalidInputError
        If fewer examples are left than there are clients.
    """
    n = len(data.y_train)
    count = max(1, round(SHARE * n))
    if n - count < settings.clients:
        raise InvalidInputError(
            f"clients: {settings.clients} clients share the {n - count} of {n} training examples "
            f"that the server leaves them; use at most {max(n - count, 0)} clients"
        )
    order = generator(settings.seed, Purpose.BASE).permutation(n)
    return np.sort(order[:count]), np.sort(order[count:])


def make_base(
    model: torch.nn.Module,
    data: Dataset,
    settings: Settings,
    algorithm: Algorithm,
    examples: np.ndarray,
) -> Base:
    """Train the model on the server's examples, if there are any, and put it into few bits.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: its linear layers have adapters, and nothing else is trained.
    data : Dataset
    settings : Settings
        With `base_bits` and `lora`.
    algorithm : Algorithm
        Whose local steps the training takes.
    examples : (n,) int64
        The server's; none: the model is taken as it is.

    Raises
    ------
    InvalidInputError
        If there is no linear layer, or the training diverges.
    """
    from flcore.quantization import quantize_model

    torch = require("torch", extra="train")
    tensors = [torch.from_numpy(getattr(data, name)) for name in ("x_test", "y_test")]
    trainer = LocalTrainer(
        model,
        torch.from_numpy(data.x_train),
        torch.from_numpy(data.y_train),
        loss=settings.loss,
        optimizer=settings.optimizer,
    )
    parameters = sum(p.numel() for p in model.parameters())
    start = trainer.initial
    if len(examples):
        rng = generator(settings.seed, Purpose.BASE, round=1)
        seed = int(rng.integers(2**63))
        view = DataView.epochs(examples, WARM_UP, algorithm.batch_size, rng)
        work = LocalWork(start, algorithm.spec(0))
        (result,) = trainer.train([Job(-1, work, view, seed)])
        if not math.isfinite(result.loss):
            raise InvalidInputError(
                "base_bits: the training of the base diverged; lower the local learning rate, or "
                "clip gradients"
            )
        start = result.end
    before, _ = trainer.evaluate(start, *tensors)
    report = quantize_model(model, f"int{settings.base_bits}", lora_rank=settings.lora)
    _draw_adapters(model, generator(settings.seed, Purpose.BASE, round=2))
    adapters = LocalTrainer(model, loss=settings.loss)
    after, _ = adapters.evaluate(adapters.initial, *tensors)
    quantised = sum(math.prod(layer.shape) for layer in report.quantized)
    return Base(
        bits=report.scheme.bits,
        rank=settings.lora,
        layers=len(report.quantized),
        examples=len(examples),
        parameters=parameters,
        bytes=report.bytes_after + 4 * (parameters - quantised),
        accuracy_float=before,
        accuracy=after,
    )


def _draw_adapters(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Draw every A, independently of the version of torch; B is 0."""
    torch = require("torch", extra="train")
    from flcore.nn import QuantLinear

    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, QuantLinear) and layer.lora_a is not None:
                bound = 1 / math.sqrt(layer.in_features)
                draw = rng.uniform(-bound, bound, tuple(layer.lora_a.shape))
                layer.lora_a.copy_(torch.from_numpy(draw.astype(np.float32)))
