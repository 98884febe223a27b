"""Where ByzFL 0.0.11 goes wrong or its results depend on chance, and what flcore does instead."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from flcore.aggregation import (
    ARC,
    CAF,
    SMEA,
    CenteredClipping,
    Clipping,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    TrimmedMean,
)
from flcore.bench.byzfl_peer import byzfl_aggregators
from flcore.errors import NonFiniteError
from support import HAS_TORCH
from tables import MIDDLE, TABLE

byzfl, WHY_NOT = byzfl_aggregators()
pytestmark = pytest.mark.skipif(byzfl is None, reason=f"byzfl: {WHY_NOT}")
if HAS_TORCH:
    import torch


def krum(f):
    return Krum(f, convention="byzfl")


def test_krum_of_byzfl_returns_the_row_with_a_nan():
    rows = TABLE.copy()
    rows[5, 1] = np.nan
    assert np.isnan(byzfl.Krum(1)(rows)).any()
    with pytest.raises(NonFiniteError, match=r"updates\[5\]"):
        krum(1)(rows)
    excluding = Krum(1, convention="byzfl", nonfinite="exclude")
    np.testing.assert_array_equal(excluding(rows), TABLE[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_value_reaches_whole_results_of_byzfl(value):
    rows = TABLE.copy()
    rows[5, 1] = value
    clean = TABLE[:5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = byzfl.CenteredClipping(tau=1.0)(rows)
    assert np.isnan(theirs).any()
    ours = CenteredClipping(radius=1.0, nonfinite="exclude")
    np.testing.assert_allclose(ours(rows), ours(clean))
    if np.isnan(value):
        assert np.isnan(byzfl.GeometricMedian()(rows)).all()
        # a client that was left out counts among the f bad ones
        np.testing.assert_allclose(TrimmedMean(1, nonfinite="exclude")(rows), clean.mean(axis=0))
    geometric = GeometricMedian("byzfl", nonfinite="exclude")
    np.testing.assert_allclose(geometric(rows), geometric(clean))


def test_without_bad_clients_the_filter_of_byzfl_returns_nothing():
    assert byzfl.CAF(0)(TABLE) is None
    np.testing.assert_allclose(CAF(0)(TABLE), TABLE.mean(axis=0))


def test_equal_rows_are_an_error_or_nothing_in_byzfl():
    rows = np.ones((5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert byzfl.CAF(1)(rows) is None
        with pytest.raises(IndexError):
            byzfl.SMEA(1)(rows)
    for rule in (CAF(1), CAF(1, convention="byzfl"), SMEA(1)):
        np.testing.assert_array_equal(rule(rows), rows[0])


def test_smea_of_byzfl_depends_on_its_random_vector(monkeypatch):
    found = set()
    for seed in range(8):
        monkeypatch.setattr(np.random, "randn", np.random.default_rng(seed).standard_normal)
        found.add(tuple(np.round(byzfl.SMEA(2)(TABLE), 6)))
    assert len(found) > 1
    np.testing.assert_allclose(SMEA(2)(TABLE), TABLE[:4].mean(axis=0))  # eigenvalue 0.03828


def test_filter_of_byzfl_keeps_the_bad_row_when_its_random_vector_misses_it(monkeypatch):
    away = TABLE - TABLE.mean(axis=0)
    widest = np.linalg.eigh(away.T @ away)[1][:, -1]
    misses = np.random.default_rng(0).standard_normal(4)
    misses -= misses @ widest * widest
    monkeypatch.setattr(np.random, "randn", lambda dimension: misses)
    np.testing.assert_allclose(byzfl.CAF(1)(TABLE), TABLE.mean(axis=0))
    assert np.abs(CAF(1, convention="byzfl")(TABLE) - TABLE[:5].mean(axis=0)).max() < 0.01


def test_centred_clipping_of_byzfl_takes_no_centre_and_remembers_its_result():
    with pytest.raises(TypeError):
        byzfl.CenteredClipping(m=np.zeros(4))
    theirs = byzfl.CenteredClipping(tau=1.0)
    first, second = theirs(TABLE), theirs(TABLE)
    assert not np.allclose(first, second)
    ours = CenteredClipping(radius=1.0)
    np.testing.assert_allclose(ours(TABLE), first)
    np.testing.assert_allclose(ours(TABLE), first)
    np.testing.assert_allclose(ours(TABLE, center=first), second)


@pytest.mark.parametrize(("theirs", "ours"), [("Clipping", Clipping(2.0)), ("ARC", ARC(1))])
def test_clipping_of_byzfl_overwrites_the_updates_and_truncates_integers(theirs, ours):
    make = (lambda: byzfl.Clipping(2.0)) if theirs == "Clipping" else (lambda: byzfl.ARC(1))
    rows = TABLE.copy()
    make()(rows)
    assert not np.array_equal(rows, TABLE)
    rows = TABLE.copy()
    (ours >> Mean())(rows)
    np.testing.assert_array_equal(rows, TABLE)
    if theirs == "Clipping":
        whole = np.array([(3, 4), (6, 8)])
        np.testing.assert_array_equal(make()(whole), [(1, 1), (1, 1)])


def test_options_of_byzfl_take_one_python_type_each():
    with pytest.raises(ValueError):
        byzfl.TrMean(np.int64(1))
    with pytest.raises(TypeError):
        byzfl.GeometricMedian(nu=1)
    np.testing.assert_allclose(TrimmedMean(np.int64(1))(TABLE), MIDDLE)
    one = GeometricMedian("byzfl", smoothing=1)(TABLE)
    np.testing.assert_allclose(one, byzfl.GeometricMedian(nu=1.0)(TABLE))


def test_byzfl_computes_float64_tensors_in_float32():
    rows = torch.from_numpy(TABLE) + 1e-9
    assert byzfl.Median()(rows).dtype == torch.float32
    ours = Median()(rows)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), np.median(TABLE, axis=0) + 1e-9, rtol=1e-15)


def test_more_than_25_tensors_with_a_common_part_mislead_byzfl():
    """`torch.cdist` then takes norms and products, in which the distances drown."""
    rng = np.random.default_rng(5)
    rows = (1000 + 0.01 * rng.standard_normal((26, 500))).astype(np.float32)
    exact = byzfl.Krum(6)(rows.astype(np.float64))
    theirs = byzfl.Krum(6)(torch.from_numpy(rows)).numpy()
    assert not np.array_equal(theirs, exact)
    np.testing.assert_array_equal(krum(6)(torch.from_numpy(rows)).numpy(), exact)
    np.testing.assert_array_equal(krum(6)(rows), exact)
