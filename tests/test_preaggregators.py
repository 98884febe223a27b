"""NNM, Bucketing, Clipping, ARC: worked numbers, and chains against rows that were written out."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    ARC,
    CAF,
    MDA,
    NNM,
    SMEA,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clipping,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborAverage,
    Phocas,
    Pipeline,
    PrincipalGradient,
    TrimmedMean,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from tables import STEPS, TABLE


def rows_of(before, x: np.ndarray, n: int | None = None) -> np.ndarray:
    """Rows that a pre-aggregator makes of `x`, one rule a row: the mean of row i alone."""
    picks = [NearestNeighborAverage(pivot=i, keep=1) for i in range(n or len(x))]
    return np.array([(before >> pick)(x) for pick in picks])


# ---- worked numbers ----------------------------------------------------------------------------


def test_nearest_neighbour_mixing_by_hand():
    np.testing.assert_allclose(
        rows_of(NNM(1), STEPS), [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5], [5.5, 6.5, 7.5]], rtol=1e-15
    )
    want = np.tile([1, 2, -1.04, 0.5], (6, 1))
    want[5] = [2.84, -0.24, 0.8, -1.04]
    np.testing.assert_allclose(rows_of(NNM(1), TABLE), want, rtol=1e-14)
    np.testing.assert_allclose(rows_of(NNM(0), TABLE), np.tile(TABLE.mean(axis=0), (6, 1)))


def test_clipping_by_hand():
    want = [
        [0.53452248, 1.06904497, 1.60356745],
        [0.91168461, 1.13960576, 1.36752692],
        [1.00514142, 1.14873305, 1.29232469],
    ]
    np.testing.assert_allclose(rows_of(Clipping(2.0), STEPS), want, atol=5e-9)
    got = rows_of(Clipping(2.0), TABLE)
    np.testing.assert_allclose(got[0], [0.8, 1.6, -0.8, 0.4], rtol=1e-12)
    np.testing.assert_allclose(
        got[5], [1.1664236870, -1.0497813183, 0.9331389496, -0.8164965809], atol=5e-11
    )


def test_adaptive_clipping_by_hand():
    got = rows_of(ARC(1), STEPS)
    np.testing.assert_allclose(got[2], [4.41004009, 5.04004582, 5.67005155], atol=5e-9)
    assert (got[:2] == STEPS[:2]).all()
    got = rows_of(ARC(1), TABLE)
    np.testing.assert_allclose(
        got[5], [1.5875793408, -1.4288214067, 1.2700634726, -1.1113055385], atol=5e-11
    )
    assert (got[:5] == TABLE[:5]).all()
    got = rows_of(ARC(2), TABLE)
    np.testing.assert_allclose(
        got[4:],
        [
            [0.7658007197, 2.1059519791, -1.1487010795, 0.6700756297],
            [1.5197117521, -1.3677405769, 1.2157694017, -1.0637982265],
        ],
        atol=5e-11,
    )
    assert (rows_of(ARC(0), TABLE) == TABLE).all()


def test_a_chain_of_three_by_hand():
    rule = Clipping(2.0) >> NNM(1) >> TrimmedMean(1)
    np.testing.assert_allclose(rule(STEPS), [0.95841302, 1.14416941, 1.3299258], atol=5e-9)


# ---- folded equals written out -----------------------------------------------------------------


def nnm(x: np.ndarray, f: int) -> np.ndarray:
    d = ((x[:, None] - x[None, :]) ** 2).sum(axis=2)
    return np.array([x[np.argsort(row, kind="stable")[: len(x) - f]].mean(axis=0) for row in d])


def clip(x: np.ndarray, c: float) -> np.ndarray:
    return x * np.minimum(1, c / np.linalg.norm(x, axis=1))[:, None]


def arc(x: np.ndarray, f: int) -> np.ndarray:
    n = len(x)
    norms = np.linalg.norm(x, axis=1)
    return clip(x, np.sort(norms)[n - 2 * f * (n - f) // n - 1])


def buckets(x: np.ndarray, s: int, order: list[int]) -> np.ndarray:
    return np.array([x[order[i : i + s]].mean(axis=0) for i in range(0, len(x), s)])


ORDER = [4, 10, 0, 2, 8, 6, 1, 9, 3, 7, 5]
CHAINS = {
    "nnm": (NNM(2), lambda x: nnm(x, 2)),
    "clipping": (Clipping(7.0), lambda x: clip(x, 7.0)),
    "arc": (ARC(2), lambda x: arc(x, 2)),
    "bucketing": (Bucketing(2, permutation=ORDER), lambda x: buckets(x, 2, ORDER)),
    "clipping-nnm": (Clipping(7.0) >> NNM(2), lambda x: nnm(clip(x, 7.0), 2)),
    "arc-nnm": (ARC(2) >> NNM(2), lambda x: nnm(arc(x, 2), 2)),
    "nnm-arc": (NNM(2) >> ARC(3), lambda x: arc(nnm(x, 2), 3)),
    "nnm-nnm": (NNM(3) >> NNM(1), lambda x: nnm(nnm(x, 3), 1)),
    "bucketing-nnm": (
        Bucketing(2, permutation=ORDER) >> NNM(1),
        lambda x: nnm(buckets(x, 2, ORDER), 1),
    ),
    "nnm-bucketing-clipping": (
        NNM(1) >> Bucketing(2, permutation=ORDER) >> Clipping(6.8),
        lambda x: clip(buckets(nnm(x, 1), 2, ORDER), 6.8),
    ),
}
RULES = [
    Krum(1),
    Krum(1, "byzfl"),
    MultiKrum(1),
    GeometricMedian("byzfl"),
    GeometricMedian(),
    CenteredClipping(1.0, 3),
    MDA(1),
    SMEA(1),
    CAF(1),
    NearestNeighborAverage(1, 2),
    FlagAggregator(2, 2),
    PrincipalGradient(),
    Mean(),
    Median(),
    TrimmedMean(1),
    MeaMed(1),
    Phocas(1),
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_a_folded_chain_equals_the_chain_written_out(chain, rule, rng):
    before, written = CHAINS[chain]
    x = rng.standard_normal((11, 50)) * rng.uniform(0.7, 1.3, (11, 1)) + 0.2
    want = rule(written(x))
    # where most mixed rows are equal, they are the median, at a distance of zero: its square is
    # rounding, 1e-16, and so the distance 1e-8
    loose = isinstance(rule, GeometricMedian) and rule.convention == "converged"
    np.testing.assert_allclose((before >> rule)(x), want, atol=1e-7 if loose else 1e-11)


@pytest.mark.parametrize("rule", [Krum(2), GeometricMedian("byzfl")], ids=["Krum", "GM"])
def test_mixing_before_a_rule_is_exact_to_rounding(rule, rng):
    x = rng.standard_normal((7, 50))
    want = rule(nnm(x, 2))
    assert np.abs((NNM(2) >> rule)(x) - want).max() <= 1e-15 * np.abs(want).max() * 4


def test_bulyan_after_mixing(rng):
    x = rng.standard_normal((11, 40))
    want = Bulyan(2)(nnm(x, 2))
    np.testing.assert_allclose((NNM(2) >> Bulyan(2))(x), want, rtol=1e-9, atol=1e-12)


def test_offsets_cost_no_digits_in_a_chain(rng):
    x = 10 + 1e-2 * rng.standard_normal((9, 100))
    got = (NNM(2) >> Krum(2)).diagnose(x).scores
    np.testing.assert_allclose(got, Krum(2).diagnose(nnm(x, 2)).scores, rtol=1e-9)


# ---- properties --------------------------------------------------------------------------------


def test_clipping_is_idempotent_and_bounds_norms(rng):
    x = rng.standard_normal((6, 30)) * 10.0 ** rng.integers(-3, 4, (6, 1))
    once = rows_of(Clipping(2.0), x)
    assert (np.linalg.norm(once, axis=1) <= 2 * (1 + 1e-12)).all()
    np.testing.assert_allclose(rows_of(Clipping(2.0), once), once, rtol=1e-12)
    np.testing.assert_allclose(rows_of(Clipping(2.0) >> Clipping(2.0), x), once, rtol=1e-12)


def test_adaptive_clipping_stops_at_a_norm_of_the_set(rng):
    x = rng.standard_normal((10, 30)) * rng.uniform(1, 50, (10, 1))
    norms = np.sort(np.linalg.norm(x, axis=1))
    for f, clipped in ((0, 0), (1, 1), (2, 3), (3, 4), (5, 5), (10, 0)):
        got = np.linalg.norm(rows_of(ARC(f), x), axis=1)
        np.testing.assert_allclose(got.max(), norms[9 - clipped], rtol=1e-12)


def test_bucketing_permutes_averages_and_keeps_the_mean(rng):
    x = rng.standard_normal((6, 20))
    one = rows_of(Bucketing(1, seed=5), x)
    assert sorted(map(tuple, one)) == sorted(map(tuple, x)) and (one != x).any()
    np.testing.assert_allclose(rows_of(Bucketing(6), x, 1), x.mean(axis=0)[None], rtol=1e-12)
    for s in (2, 3):
        got = rows_of(Bucketing(s, seed=9), x, 6 // s)
        np.testing.assert_allclose(got.mean(axis=0), x.mean(axis=0), rtol=1e-12)
    last = rows_of(Bucketing(4, permutation=range(6)), x, 2)
    np.testing.assert_allclose(last[1], x[4:].mean(axis=0), rtol=1e-12)


def test_buckets_follow_the_seed_and_nothing_else():
    """The permutation of the random stream named by the seed; the same on every machine."""
    x = np.arange(8.0)[:, None]
    orders = {seed: rows_of(Bucketing(1, seed), x)[:, 0].astype(int).tolist() for seed in range(4)}
    assert len(set(map(tuple, orders.values()))) == 4
    assert orders[0] == [4, 5, 0, 7, 3, 1, 6, 2]
    again = rows_of(Bucketing(1, 0), x + 100)[:, 0] - 100
    assert again.astype(int).tolist() == orders[0]
    firsts = [rows_of(Bucketing(4, seed), x, 1)[0, 0] for seed in range(200)]
    assert abs(np.mean(firsts) - 3.5) < 0.3  # standard error 0.09


def test_left_out_clients_are_passed_over_by_buckets():
    x = np.array([[1.0], [np.nan], [3.0], [5.0], [7.0]])
    order = [1, 4, 0, 3, 2]
    rule = Bucketing(2, permutation=order) >> Median(nonfinite="exclude")
    np.testing.assert_array_equal(rule(x), [4.0])  # (7 + 1) / 2 and (5 + 3) / 2
    with pytest.raises(NonFiniteError, match=r"updates\[1\]"):
        (Bucketing(2, permutation=order) >> Krum(0))(x)


def test_equal_and_zero_updates_pass_every_pre_aggregator():
    zeros = np.zeros((6, 3))
    for before in (NNM(2), Clipping(1.0), ARC(2), Bucketing(2)):
        for x in (zeros, zeros + np.array([3.0, 4.0, 0.0])):
            want = clip(x[:1], 1.0) if isinstance(before, Clipping) and x.any() else x[:1]
            for rule in (Mean(), Median(), Krum(0), GeometricMedian()):
                np.testing.assert_allclose((before >> rule)(x), want[0], rtol=1e-12)


def test_one_client_passes_every_pre_aggregator():
    x = np.array([[3.0, 4.0]])
    for before in (NNM(0), Clipping(9.0), ARC(1), Bucketing(2)):
        np.testing.assert_array_equal((before >> Mean())(x), x[0])


def test_far_clients_do_not_spoil_the_distances_of_clipped_rows(rng):
    """A client at 1e12 times the norm of the others; float32, whose distances to it say nothing."""
    for far in (1e6, 1e12, 1e30):
        x = rng.standard_normal((8, 300)).astype(np.float32)
        x[5] *= np.float32(far)
        small = clip(x.astype(np.float64), 3.0)
        got = (Clipping(3.0) >> Krum(1)).diagnose(x).scores
        np.testing.assert_allclose(got, Krum(1).diagnose(small).scores, rtol=1e-4)


def test_updates_are_never_written_to(rng):
    x = rng.standard_normal((6, 8))
    x.flags.writeable = False
    (Clipping(0.1) >> ARC(2) >> NNM(1) >> Median())(x)


# ---- chaining ----------------------------------------------------------------------------------


def test_chains_may_be_built_from_either_end(rng):
    x = rng.standard_normal((9, 10))
    a, b, c, rule = Clipping(2.0), ARC(2), NNM(1), Krum(1)
    want = (a >> b >> c >> rule)(x)
    for pipeline in (a >> (b >> (c >> rule)), (a >> b) >> (c >> rule), a >> (b >> c) >> rule):
        assert pipeline == Pipeline((a, b, c), rule)
        assert (pipeline(x) == want).all()
    for wrong in (lambda: a >> 3, lambda: rule >> a, lambda: (a >> b) >> "x"):
        with pytest.raises(TypeError):
            wrong()


def test_weights_survive_scaling_and_not_mixing(rng):
    x = rng.standard_normal((5, 10))
    q = np.array([1, 2, 0, 4, 5.0])
    got = (Clipping(2.0) >> Mean())(x, q)
    np.testing.assert_allclose(got, (q / q.sum()) @ clip(x, 2.0), rtol=1e-12)
    got = (ARC(1) >> GeometricMedian("rfa"))(x[q > 0], q[q > 0])
    np.testing.assert_allclose(
        got, GeometricMedian("rfa")(arc(x[q > 0], 1), q[q > 0]), rtol=1e-9, atol=1e-12
    )
    for before in (NNM(1), Bucketing(2)):
        with pytest.raises(InvalidInputError, match=r"weights: .* mixes clients"):
            (before >> Mean())(x, q)


def test_integer_layers_are_mixed_and_not_clipped():
    updates = [
        {"w": np.float32([3, 4]), "steps": np.array([10])},
        {"w": np.float32([300, 400]), "steps": np.array([40])},
    ]
    got = (Clipping(5.0) >> Mean())(updates)
    np.testing.assert_allclose(got["w"], [3, 4])
    assert got["steps"][0] == 10  # (1 * 10 + 0.01 * 40) / 1.01: as much as they count
    assert (NNM(0) >> Median())(updates)["steps"][0] == 25
    assert (Bucketing(2) >> Mean(integers="max"))(updates)["steps"][0] == 40
    assert (Bucketing(1) >> Mean(integers="sum"))(updates)["steps"][0] == 50


def test_diagnosis_of_a_chain_names_clients_or_buckets(rng):
    x = rng.standard_normal((9, 20))
    x[4] += 50
    x[7] = np.nan
    seen = (NNM(2) >> Krum(2)).diagnose(x)
    assert seen.nonfinite == (7,) and np.isnan(seen.scores[7]) and len(seen.selected) == 1
    used = np.flatnonzero(seen.coefficients)
    assert len(used) == 7 and 4 not in used and 7 not in used
    seen = (Bucketing(2, permutation=range(9)) >> Krum(1)).diagnose(x)
    assert seen.scores.shape == (4,) and len(seen.coefficients) == 9
    assert set(seen.selected) | set(seen.rejected) == {0, 1, 2, 3}
    assert np.count_nonzero(seen.coefficients) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: (NNM(5) >> Mean())(x), InvalidInputError, "NNM needs f < n"),
        (lambda x: (ARC(6) >> Mean())(x), InvalidInputError, "ARC needs f <= n"),
        (lambda x: (Bucketing(3) >> Krum(1, "byzfl"))(x), InvalidInputError, "2 f < n"),
        (lambda x: (Bucketing(3) >> TrimmedMean(1))(x), InvalidInputError, "2 f < n"),
        (lambda x: NNM(-1), InvalidInputError, "f: .*>= 0"),
        (lambda x: NNM(1.5), DTypeError, "f: expected an integer"),
        (lambda x: Bucketing(0), InvalidInputError, "s: "),
        (lambda x: Bucketing(2, seed=-1), InvalidInputError, "seed: "),
        (lambda x: Bucketing(2, permutation=[0, 0, 1]), InvalidInputError, "permutation: "),
        (
            lambda x: (Bucketing(2, permutation=[0, 1]) >> Mean())(x),
            InvalidInputError,
            "permutation: .*got 2",
        ),
        (lambda x: Clipping(0.0), InvalidInputError, "c: "),
        (lambda x: Clipping(np.nan), InvalidInputError, "c: "),
        (
            lambda x: (Clipping(1.0) >> CenteredClipping())(x, center=x[0]),
            InvalidInputError,
            "center: Clipping works about zero",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(np.eye(5))
