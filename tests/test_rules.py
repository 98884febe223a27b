"""Rules end to end: worked numbers, structures and dtypes, diagnoses, mistakes."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    CAF,
    MDA,
    SMEA,
    Bulyan,
    CenteredClipping,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    Phocas,
    PrincipalGradient,
    TrimmedMean,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from rule_list import RULES, ident
from support import EPS, HAS_TORCH, np_dtype
from tables import GOOD, MIDDLE, SEVEN, STEPS, TABLE

# ---- worked numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "rows", "want"),
    [
        (Krum(1), TABLE, TABLE[0]),
        (Krum(1, "byzfl"), TABLE, TABLE[0]),
        (Krum(1, "byzfl"), STEPS, STEPS[0]),  # a tie
        (MultiKrum(1, convention="byzfl"), STEPS, [2.5, 3.5, 4.5]),
        (MultiKrum(1, convention="byzfl"), TABLE, GOOD),
        (MultiKrum(2, convention="byzfl"), TABLE, MIDDLE),
        (MultiKrum(1, 5), TABLE, GOOD),
        (Bulyan(1), SEVEN, [0.3, 0.3666666667]),
        (Bulyan(1, iterative=False), SEVEN, [0.3, 0.7]),
        (GeometricMedian("byzfl"), STEPS, [3.7878876412, 4.7878876412, 5.7878876412]),
        (
            GeometricMedian("byzfl"),
            TABLE,
            [1.0902860686, 1.9053968862, -0.9728370839, 0.4119433217],
        ),
        (
            GeometricMedian("byzfl", smoothing=1e-6, iterations=50),
            TABLE,
            [1.0042280732, 1.9949802901, -1.0011979287, 0.4956532577],
        ),
        (CenteredClipping(), STEPS, [4, 5, 6]),
        (
            CenteredClipping(1.0, 3),
            TABLE,
            [1.0487776054, 1.6905379168, -0.8340756831, 0.3529082630],
        ),
        (MDA(1), STEPS, [2.5, 3.5, 4.5]),
        (MDA(1), TABLE, GOOD),
        (NearestNeighborAverage(1, pivot=1), STEPS, [2.5, 3.5, 4.5]),
        (NearestNeighborAverage(1), TABLE, GOOD),
        (NearestNeighborAverage(2, pivot=3), TABLE, MIDDLE),
        (NearestNeighborAverage(1, keep=3), [[1.0], [1.2], [0.6], [50]], [0.9333333333]),
        (NearestNeighborAverage(1), [[1.0], [1.2], [0.6], [0.9], [50]], [0.925]),
        (SMEA(1), STEPS, [2.5, 3.5, 4.5]),
        (SMEA(1), TABLE, GOOD),
        (SMEA(2), TABLE, MIDDLE),
        (CAF(1), STEPS, [4, 5, 6]),
        (CAF(1, "byzfl"), TABLE, [1.00505698, 1.99494302, -1.03406542, 0.49214880]),
        (Median(), TABLE, MIDDLE),
        (TrimmedMean(1), TABLE, MIDDLE),
        (TrimmedMean(2), TABLE, MIDDLE),
        (MeaMed(1), TABLE, GOOD),
        (MeaMed(2), TABLE, MIDDLE),
        (FlagAggregator(1), [[3.0, 4, 0]] * 5, [3, 4, 0]),
        (FlagAggregator(2, rescale="mean-norm"), [[3.0, 4, 0]] * 5, [3, 4, 0]),
        (
            PrincipalGradient(),
            [[1, 0, 0.5], [0.2, 1, 0], [1, 0.8, 1]],
            [0.64769196, 0.57123696, 0.50587890],
        ),
    ],
    ids=lambda v: ident(v) if hasattr(v, "diagnose") else "",
)
def test_worked_numbers(rule, rows, want):
    rows = np.asarray(rows, dtype=np.float64)
    np.testing.assert_allclose(rule(rows), want, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(rule(rows.astype(np.float32)), want, rtol=2e-5)


def test_ties_go_to_the_first_client_of_the_call():
    for rows in (STEPS, STEPS[::-1]):  # both ends and the middle are one distance apart
        np.testing.assert_array_equal(Krum(1, "byzfl")(rows), rows[0])
        np.testing.assert_array_equal(MDA(1)(rows), rows[:2].mean(axis=0))
        np.testing.assert_array_equal(SMEA(1)(rows), rows[:2].mean(axis=0))
        assert NearestNeighborAverage(1, pivot=1).diagnose(rows).selected == (0, 1)


def test_scores_by_hand():
    paper = [0.2, 0.4, 0.26, 0.28, 0.58, 999.61]
    np.testing.assert_allclose(Krum(1).diagnose(TABLE).scores, paper, rtol=1e-12)
    byzfl = [0.09, 0.225, 0.13, 0.165, 0.27, 336.55]
    np.testing.assert_allclose(Krum(1, "byzfl").diagnose(TABLE).scores, byzfl, rtol=1e-12)
    roots = np.sqrt(((TABLE[:, None] - TABLE) ** 2).sum(axis=2))
    want = np.sort(roots, axis=1)[:, 1:5].sum(axis=1)
    for convention in ("garfield", "monna"):
        np.testing.assert_allclose(Krum(1, convention).diagnose(TABLE).scores, want, rtol=1e-12)
    want = np.sort(roots, axis=1)[:, 1:3].sum(axis=1)
    got = Krum(1, neighbours=2, squared=False).diagnose(TABLE).scores
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("convention", "neighbours", "averaged"),
    [
        ("paper", 6, 6),
        ("byzfl", 7, 8),
        ("flower", 6, 1),
        ("garfield", 7, 6),
        ("garfield-native", 6, 6),
        ("monna", 7, 8),
    ],
)
def test_conventions_count_as_their_source(convention, neighbours, averaged, rng):
    x = rng.standard_normal((10, 5))
    seen = MultiKrum(2, convention=convention).diagnose(x)
    same = MultiKrum(2, averaged, convention, neighbours).diagnose(x)
    assert len(seen.selected) == averaged
    np.testing.assert_array_equal(seen.scores, same.scores)
    order = np.argsort(seen.scores)
    assert seen.selected == tuple(sorted(order[:averaged]))


def test_without_bad_clients_many_rules_are_the_mean(rng):
    x = rng.standard_normal((7, 30))
    for rule in (
        MultiKrum(0, m=7),
        MultiKrum(0, convention="byzfl"),
        MDA(0),
        SMEA(0),
        CAF(0),
        NearestNeighborAverage(0),
        TrimmedMean(0),
        MeaMed(0),
        Phocas(0),
        CenteredClipping(np.inf, 4),
        GeometricMedian(smoothing=1e9),
    ):
        np.testing.assert_allclose(rule(x), x.mean(axis=0), rtol=1e-12, atol=1e-13)


# ---- structures, dtypes, outputs ---------------------------------------------------------------


def as_layers(x: np.ndarray) -> list[dict]:
    """Cut rows of 40 numbers into layers, one of them empty, and add two integer layers."""
    return [
        {
            "w": r[:24].reshape(4, 6),
            "none": r[:0].reshape(0, 3),
            "steps": np.array([10 * i, i]),
            "b": r[24:39],
            "scalar": r[39:].reshape(()),
            "on": np.array([i % 3 == 0]),
        }
        for i, r in enumerate(x)
    ]


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_layers_give_what_one_array_gives(rule, rng):
    x = rng.standard_normal((7, 40)).astype(np.float32)
    got = rule(as_layers(x))
    assert list(got) == ["w", "none", "steps", "b", "scalar", "on"]
    assert got["w"].shape == (4, 6) and got["none"].shape == (0, 3) and got["scalar"].shape == ()
    assert got["steps"].dtype == np.int64 and got["on"].dtype == bool
    if not isinstance(rule, PrincipalGradient):
        flat = np.concatenate([got["w"].ravel(), got["b"], got["scalar"].ravel()])
        assert flat.tobytes() == rule(x).tobytes()
    listed = rule([list(u.values()) for u in as_layers(x)])
    assert isinstance(listed, list) and listed[0].tobytes() == got["w"].tobytes()
    assert isinstance(rule([tuple(u.values()) for u in as_layers(x)]), tuple)


def test_integer_layers_get_the_same_aggregate(rng):
    x = rng.standard_normal((7, 40))
    x[6] += 100
    updates = as_layers(x)
    winner = Krum(1).diagnose(x).selected[0]
    got = Krum(1)(updates)
    assert list(got["steps"]) == [10 * winner, winner] and got["on"][0] == (winner % 3 == 0)
    six = [MDA(1), SMEA(1), NearestNeighborAverage(1), MultiKrum(1, convention="byzfl")]
    for rule in six:
        assert rule(updates)["steps"][0] == 25  # 10 times the mean of 0 .. 5
    for rule in (PrincipalGradient(), FlagAggregator(2), CenteredClipping(0.0)):
        assert list(rule(updates)["steps"]) == [30, 3]  # all seven
    assert list(Median()(updates)["steps"]) == [30, 3]


def test_updates_of_integers_alone(rng):
    updates = [[np.array([i])] for i in (1, 2, 3, 4, 5, 6, 7)]
    assert Krum(1)(updates)[0][0] == 1  # nothing to tell clients apart: the first
    assert Median()(updates)[0][0] == 4
    assert GeometricMedian()(updates)[0][0] == 4


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_storage_types_and_out(dtype, rule, rng):
    x = (rng.standard_normal((7, 33)) + 1).astype(np_dtype(dtype))
    got = rule(x)
    assert got.dtype == x.dtype and got.shape == (33,)
    want = rule(x.astype(np.float64))
    scale = np.abs(want).max()
    assert np.abs(got.astype(np.float64) - want).max() <= max(EPS[dtype], 2e-6) * scale
    out = np.full((33, 2), 7, x.dtype)[:, 0]  # not contiguous
    assert rule(x, out=out) is out and out.tobytes() == got.tobytes()


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_the_reference_variant_agrees(rule, rng):
    x = (rng.standard_normal((7, 300)) + 1).astype(np.float32)
    np.testing.assert_allclose(rule(x, variant="reference"), rule(x), rtol=1e-5, atol=1e-5)
    want, got = rule.diagnose(x, variant="reference"), rule.diagnose(x)
    assert got.selected == want.selected
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-6)


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_torch_tensors(rule, rng):
    import torch

    x = rng.standard_normal((7, 40)).astype(np.float32)
    updates = [
        {k: torch.from_numpy(np.array(v)) for k, v in u.items() if v.dtype != bool}
        for u in as_layers(x)
    ]
    got = rule(updates)
    want = rule([{k: v for k, v in u.items() if v.dtype != bool} for u in as_layers(x)])
    for key, value in got.items():
        assert isinstance(value, torch.Tensor) and value.shape == want[key].shape
        assert value.numpy().tobytes() == want[key].tobytes()
    out = {k: torch.full_like(v, 3) for k, v in updates[0].items()}
    assert rule(updates, out=out) is out and torch.equal(out["w"], got["w"])
    half = rule([u["w"].to(torch.bfloat16) for u in updates])
    assert half.dtype == torch.bfloat16


def test_out_stays_as_it_is_when_the_call_raises():
    out = np.full(4, 7.0)
    bad = TABLE.copy()
    bad[2, 1] = np.inf
    for rule in (Krum(1), GeometricMedian(), PrincipalGradient(), CAF(1), Median()):
        with pytest.raises(NonFiniteError, match=r"updates\[2\]"):
            rule(bad, out=out)
    assert (out == 7).all()


def test_krum_returns_one_of_the_updates_bit_for_bit(rng):
    x = rng.standard_normal((9, 1000)).astype(np.float32)
    x[:, ::7] = -0.0
    x[:, 1::7] = 1e-42  # denormal
    got = Krum(2)(x)
    winner = Krum(2).diagnose(x).selected[0]
    assert (got == x[winner]).all() and (got != 0).any()


# ---- principal gradients -----------------------------------------------------------------------


def test_principal_gradients_work_layer_by_layer(rng):
    x = rng.standard_normal((6, 40)) + 0.4
    updates = [
        {"a": r[:25].reshape(5, 5), "one": r[25:26], "n": np.array([3]), "b": r[26:]} for r in x
    ]
    got = PrincipalGradient()(updates)
    np.testing.assert_allclose(got["a"].ravel(), PrincipalGradient()(x[:, :25]), rtol=1e-9)
    np.testing.assert_allclose(got["b"], PrincipalGradient()(x[:, 26:]), rtol=1e-9)
    np.testing.assert_allclose(got["one"], x[:, 25:26].mean(axis=0), rtol=1e-12)
    plain = PrincipalGradient(plain=["b", "n"])(updates)
    np.testing.assert_allclose(plain["b"], x[:, 26:].mean(axis=0), rtol=1e-12)
    assert plain["a"].tobytes() == got["a"].tobytes()
    assert np.abs(got["b"] - plain["b"]).max() > 1e-3
    with pytest.raises(InvalidInputError, match=r"plain: no such layers.*'c'"):
        PrincipalGradient(plain=["c"])(updates)


# ---- diagnosis ---------------------------------------------------------------------------------


def test_diagnosis_is_in_the_order_of_the_call(rng):
    x = rng.standard_normal((8, 50)).astype(np.float32)
    x[2] += 40
    x[6, 3] = np.nan
    seen = MultiKrum(2, 4).diagnose(x)
    good = [0, 1, 2, 3, 4, 5, 7]
    wide = x[good].astype(np.float64)
    np.testing.assert_allclose(seen.norms[good], np.linalg.norm(wide, axis=1), rtol=1e-6)
    pairs = np.linalg.norm(wide[:, None] - wide, axis=2)
    np.testing.assert_allclose(seen.distances[np.ix_(good, good)], pairs, rtol=1e-6)
    assert np.isinf(seen.norms[6]) and np.isinf(seen.distances[6]).all()
    assert np.isnan(seen.scores[6]) and np.nanargmax(seen.scores) == 2
    assert seen.nonfinite == (6,) and len(seen.selected) == 4
    assert {2, 6} < set(seen.rejected) and len(seen.rejected) == 4
    np.testing.assert_allclose(seen.coefficients[list(seen.selected)], 0.25)
    assert (seen.coefficients[list(seen.rejected)] == 0).all()


@pytest.mark.parametrize("rule", [*RULES, Mean()], ids=ident)
def test_every_rule_tells_what_it_did(rule, rng):
    x = rng.standard_normal((9, 20)) + 0.5
    seen = rule.diagnose(x)
    np.testing.assert_allclose(seen.norms, np.linalg.norm(x, axis=1), rtol=1e-12)
    assert set(seen.selected) | set(seen.rejected) == set(range(9)) and seen.nonfinite == ()
    if seen.coefficients is not None:
        np.testing.assert_allclose(seen.coefficients @ x, rule(x), rtol=1e-9, atol=1e-12)
    else:
        assert isinstance(rule, Bulyan | PrincipalGradient | Median | TrimmedMean | MeaMed | Phocas)


def test_mean_is_a_rule(rng):
    x = rng.standard_normal((4, 6))
    seen = Mean().diagnose(x, [1, 0, 2, 1])
    assert list(seen.coefficients) == [0.25, 0, 0.5, 0.25] and seen.rejected == (1,)


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Krum(-1), InvalidInputError, "f: expected an integer >= 0"),
        (lambda: Krum(1.0), DTypeError, "f: expected an integer"),
        (lambda: Krum(1, "flwr"), InvalidInputError, "convention: .*'flwr'"),
        (lambda: Krum(1, neighbours=0), InvalidInputError, "neighbours"),
        (lambda: Krum(1, squared="no"), DTypeError, "squared"),
        (lambda: Krum(1, neighbours=6)(TABLE), InvalidInputError, "neighbours: .*n = 6"),
        (lambda: Krum(0)(TABLE[:2]), InvalidInputError, "n - f - 2 nearest of n = 2"),
        (lambda: Krum(1)(STEPS), InvalidInputError, "with f = 1 none are left"),
        (lambda: MultiKrum(1, 0), InvalidInputError, "m: "),
        (lambda: MultiKrum(1, 7)(TABLE), InvalidInputError, "m: expected at most n = 6"),
        (lambda: Bulyan(1)(TABLE), InvalidInputError, r"n >= 4 f \+ 3"),
        (lambda: Bulyan(1, iterative="x"), InvalidInputError, "iterative"),
        (lambda: Bulyan(1, even="middle"), InvalidInputError, "even"),
        (lambda: GeometricMedian("weiszfeld"), InvalidInputError, "convention"),
        (lambda: GeometricMedian(smoothing=0), InvalidInputError, "smoothing"),
        (lambda: GeometricMedian(smoothing="relative"), InvalidInputError, "relative:1e-3"),
        (lambda: GeometricMedian(smoothing="1e-3"), InvalidInputError, "relative:1e-3"),
        (lambda: GeometricMedian(iterations=0), InvalidInputError, "iterations"),
        (lambda: GeometricMedian(tolerance=-1), InvalidInputError, "tolerance"),
        (lambda: GeometricMedian(start="median"), InvalidInputError, "start"),
        (lambda: CenteredClipping(-1.0), InvalidInputError, "radius"),
        (lambda: CenteredClipping(np.nan), InvalidInputError, "radius"),
        (lambda: CenteredClipping(1.0, 0), InvalidInputError, "iterations"),
        (lambda: SMEA(2, max_subsets=0), InvalidInputError, "max_subsets"),
        (lambda: SMEA(2, max_subsets=14)(TABLE), InvalidInputError, "15 subsets"),
        (lambda: CAF(1, "all"), InvalidInputError, "convention"),
        (lambda: NearestNeighborAverage(1, pivot=6)(TABLE), InvalidInputError, "pivot: .*6"),
        (lambda: NearestNeighborAverage(1, keep=7)(TABLE), InvalidInputError, "keep: .*n = 6"),
        (lambda: NearestNeighborAverage(1, keep=0), InvalidInputError, "keep"),
        (lambda: FlagAggregator(0), InvalidInputError, "dim"),
        (lambda: FlagAggregator(2, rescale="mean"), InvalidInputError, "rescale"),
        (lambda: FlagAggregator(2, start=np.eye(2))(TABLE), InvalidInputError, "start: "),
        (lambda: PrincipalGradient(0.0), InvalidInputError, "keep"),
        (lambda: PrincipalGradient(plain="w"), InvalidInputError, "plain"),
        (lambda: Krum(1, nonfinite="skip"), InvalidInputError, "nonfinite"),
        (lambda: Krum(1, accumulate="half"), InvalidInputError, "accumulate"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_pivot_that_was_left_out_is_an_error():
    x = TABLE.copy()
    x[3] = np.nan
    with pytest.raises(InvalidInputError, match=r"pivot: .*finite, got 3"):
        NearestNeighborAverage(1, pivot=3, nonfinite="exclude")(x)
