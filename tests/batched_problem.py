"""Clients with random examples, trained one after another and together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flcore.algorithms import DataView, LocalResult, LocalWork, StepSpec
from flcore.simulation.batched import BatchedTrainer
from flcore.simulation.local import Job, LocalTrainer
from flcore.simulation.models import build_model

EXAMPLES, CLASSES = 120, 5


def make_trainer(
    model: str | torch.nn.Module = "mlp", shape: Sequence[int] = (1, 8, 8), **options: Any
) -> LocalTrainer:
    """Give the sequential trainer of a model and random examples."""
    rng = np.random.default_rng(7)
    if isinstance(model, str):
        if model == "char":
            x = rng.integers(0, CLASSES, (EXAMPLES, *shape)).astype(np.float32)
        else:
            x = rng.standard_normal((EXAMPLES, *shape)).astype(np.float32)
        model = build_model(model, tuple(shape), CLASSES, rng)
    else:
        x = rng.standard_normal((EXAMPLES, *shape)).astype(np.float32)
    y = rng.integers(0, CLASSES, EXAMPLES)
    return LocalTrainer(model, torch.from_numpy(x), torch.from_numpy(y), **options)


def make_jobs(
    one: LocalTrainer,
    sizes: Sequence[int] = (12, 1, 25, 7),
    *,
    epochs: int = 2,
    batch_size: int = 10,
    specs: Sequence[dict[str, Any]] = ({},),
    aux: Sequence[dict[str, Any]] = ({},),
) -> list[Job]:
    """Give clients with so many examples, each with its own start, which take `specs` in turn."""
    rng = np.random.default_rng(8)
    jobs = []
    for i, size in enumerate(sizes):
        drift = 0.05 * rng.standard_normal(one.layout.numel)
        start = one.initial + drift.astype(np.float32)
        options = {"lr": 0.1, "decay": 1e-3, "clip": 1.0} | specs[i % len(specs)]
        view = DataView.epochs(rng.permutation(EXAMPLES)[:size], epochs, batch_size, rng)
        work = LocalWork(start, StepSpec(**options), aux[i % len(aux)])
        jobs.append(Job(i, work, view, seed=i))
    return jobs


def check_equal(
    one: LocalTrainer, jobs: Sequence[Job], rtol: float = 1e-5, **options: Any
) -> list[LocalResult]:
    """Compare the batched trainer with the sequential one; gives what the former found."""
    expected = one.train(jobs)
    results = BatchedTrainer(one, strict=True, **options).train(jobs)
    for job, a, b in zip(jobs, expected, results, strict=True):
        assert b.work is job.work
        assert a.steps == b.steps == len(job.view.sizes)
        assert np.abs(a.end - a.start).max() > 1e-4  # there was something to do
        np.testing.assert_allclose(b.end, a.end, rtol=0, atol=rtol * np.abs(a.end).max())
        np.testing.assert_allclose(b.loss, a.loss, rtol=rtol)
    return results
