"""ByzFL 0.0.11 as a second definition: equal results where both have a rule, and where they differ.

The golden values need no ByzFL: they were computed with its NumPy path in float64.
"""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest

from flcore.aggregation import (
    ARC,
    CAF,
    MDA,
    NNM,
    SMEA,
    CenteredClipping,
    Clipping,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    TrimmedMean,
)
from flcore.bench.byzfl_peer import byzfl_aggregators
from flcore.errors import NonFiniteError
from support import HAS_TORCH

byzfl, WHY_NOT = byzfl_aggregators()
needs_byzfl = pytest.mark.skipif(byzfl is None, reason=f"byzfl: {WHY_NOT}")
if HAS_TORCH:
    import torch

# ---- golden values -------------------------------------------------------------------------------

STEPS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])

# Five rows close together and one far off.
TABLE = np.array(
    [
        [1.0, 2.0, -1.0, 0.5],
        [1.2, 1.8, -0.9, 0.4],
        [0.9, 2.1, -1.1, 0.6],
        [1.1, 1.9, -1.0, 0.3],
        [0.8, 2.2, -1.2, 0.7],
        [10.0, -9.0, 8.0, -7.0],
    ]
)
GOOD = [1.0, 2.0, -1.04, 0.5]  # mean of the first five
MIDDLE = [1.05, 1.95, -1.0, 0.45]


def krum(f):
    return Krum(f, convention="byzfl")


def multi_krum(f):
    return MultiKrum(f, convention="byzfl")


ON_TABLE = [
    (Mean(), [2.5, 0.1666666667, 0.4666666667, -0.75]),
    (Median(), MIDDLE),
    (TrimmedMean(1), MIDDLE),
    (TrimmedMean(2), MIDDLE),
    (GeometricMedian(nu=0.1, iterations=3), [1.0902860686, 1.9053968862, -0.9728370839, 0.4119433217]),
    (
        GeometricMedian(nu=1e-6, iterations=50),
        [1.0042280732, 1.9949802901, -1.0011979287, 0.4956532577],
    ),
    (krum(1), [1.0, 2.0, -1.0, 0.5]),
    (multi_krum(1), GOOD),
    (MDA(1), GOOD),
    (NearestNeighborAverage(1, pivot=0), GOOD),
    (MeaMed(1), GOOD),
    (SMEA(1), GOOD),
    (multi_krum(2), MIDDLE),
    (NearestNeighborAverage(2, pivot=3), MIDDLE),
    (MeaMed(2), MIDDLE),
    (
        CenteredClipping(radius=1.0, iterations=3),
        [1.0487776054, 1.6905379168, -0.8340756831, 0.3529082630],
    ),
    (CAF(1), [1.00505698, 1.99494302, -1.03406542, 0.49214880]),  # with the exact eigenvector
    (NNM(1) >> Median(), GOOD),
    (NNM(1) >> TrimmedMean(1), GOOD),
]


@pytest.mark.parametrize(("rule", "expected"), ON_TABLE, ids=lambda x: repr(x)[:40])
def test_golden_values_of_the_table(rule, expected):
    np.testing.assert_allclose(rule(TABLE), expected, rtol=0, atol=6e-9)
