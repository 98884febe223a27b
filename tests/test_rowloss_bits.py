"""Row losses have the same bits at every level of the instruction set and thread count."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore.ops.rowloss import MAPS, RowLossForm, row_loss_gradient
from support import outputs_per_level


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops.rowloss import *
rng, digest = np.random.default_rng(1), hashlib.sha256()
def both(x, y, form, **options):
    for part in row_loss_gradient(x, y, form, **options): digest.update(part.tobytes())
    loss, stats = row_loss(x, y, form, **options)
    for part in (loss, stats.rest, stats.own): digest.update(part.tobytes())
    digest.update(row_loss_backward(x, y, stats, form, **options).tobytes())
for kind in ("softmax", "stablemax", "taylor"):
    for form in (RowLossForm(kind), RowLossForm(kind, label_smoothing=0.1, z_loss=0.01, tau=1.5)):
        for classes in (1, 2, 5, 16, 33, 64, 65, 500, 9001):
            for dtype in (np.float32, np.float64, np.float16):
                x = 3 * rng.standard_normal((19, classes))
                y = rng.integers(0, classes, 19)
                both(x.astype(dtype), y, form, weight=rng.random(classes))
        x = rng.standard_normal((4, 30, 21)).astype(np.float32)
        both(x, rng.integers(0, 30, (4, 21)), form, class_dim=1)
    x = rng.standard_normal((3000, 100)).astype(np.float32)
    z = rng.standard_normal((2, 200_000)).astype(np.float32)
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        digest.update(row_loss_gradient(x, np.arange(3000) % 100, RowLossForm(kind))[1].tobytes())
        digest.update(row_loss_gradient(z, np.arange(2), RowLossForm(kind))[1].tobytes())
    flcore.set_num_threads(None)
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


@pytest.mark.parametrize("shape", [(3001, 100), (2, 300_001), (40_001, 9), (1, 500_000)])
def test_threads_do_not_change_a_bit(shape, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    y = rng.integers(0, shape[1], shape[0])
    for kind in MAPS:
        found = set()
        for threads in (1, 2, 3):
            flcore.set_num_threads(threads)
            loss, grad = row_loss_gradient(x, y, RowLossForm(kind))
            found.add(loss.tobytes() + grad.tobytes())
        assert len(found) == 1
