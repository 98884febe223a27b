"""Centred clipping about the aggregate of the round before."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    CenteredClipping,
    Krum,
)
from flcore.errors import InvalidInputError, NonFiniteError

# ---- centred clipping --------------------------------------------------------------------------


def clip_about(x, v, radius, steps):
    for _ in range(steps):
        r = np.minimum(1, radius / np.linalg.norm(x - v, axis=1))
        v = v + (r[:, None] * (x - v)).mean(axis=0)
    return v


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_clipping_about_the_previous_aggregate(steps, offset, rng):
    rule, v, layered = CenteredClipping(2.0, steps), None, None
    want = np.zeros(40)
    for _ in range(4):
        x = offset + rng.standard_normal((6, 40))
        updates = [[r[:30].reshape(5, 6), np.array([7]), r[30:]] for r in x]
        want = clip_about(x, want, 2.0, steps)
        v = rule(x, center=v)
        layered = rule(updates, center=layered)
        np.testing.assert_allclose(v, want, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(layered[2], want[30:], rtol=1e-9, atol=1e-11)
        assert layered[1][0] == 7
    seen = rule.diagnose(x, center=v)
    np.testing.assert_allclose(seen.norms, np.linalg.norm(x - v, axis=1), rtol=1e-9)


def test_limits_of_the_radius(rng):
    x, v = rng.standard_normal((5, 12)), rng.standard_normal(12)
    np.testing.assert_array_equal(CenteredClipping(0.0, 2)(x, center=v), v)
    np.testing.assert_array_equal(CenteredClipping(0.0)(x), np.zeros(12))
    np.testing.assert_allclose(CenteredClipping(1e9)(x, center=v), x.mean(axis=0), rtol=1e-9)
    norms = np.linalg.norm(x, axis=1)
    want = norms.min() * (x / norms[:, None]).mean(axis=0)
    np.testing.assert_allclose(CenteredClipping(norms.min())(x), want, rtol=1e-12)


def test_a_center_must_fit_and_be_finite(rng):
    x = rng.standard_normal((5, 4))
    rule = CenteredClipping(1.0, nonfinite="exclude")
    with pytest.raises(InvalidInputError, match="center: expected shape"):
        rule(x, center=np.zeros(3))
    with pytest.raises(NonFiniteError, match="center: NaN"):
        rule(x, center=np.full(4, np.nan))
    with pytest.raises(NonFiniteError, match="center: NaN"):
        rule.diagnose(x, center=np.full(4, np.nan))
    with pytest.raises(InvalidInputError, match="center: Krum has no centre"):
        Krum(1)(x, center=x[0])
