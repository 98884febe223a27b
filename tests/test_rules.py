"""Rules end to end: worked numbers, structures and dtypes, invariances, policies, attacks."""

from __future__ import annotations

import numpy as np
import pytest

from flcore.aggregation import (
    CAF,
    MDA,
    NNM,
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
from support import EPS, HAS_TORCH, np_dtype

ROWS3 = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
TABLE = np.array(
    [
        [1, 2, -1, 0.5],
        [1.2, 1.8, -0.9, 0.4],
        [0.9, 2.1, -1.1, 0.6],
        [1.1, 1.9, -1, 0.3],
        [0.8, 2.2, -1.2, 0.7],
        [10, -9, 8, -7],
    ]
)
SEVEN = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [0.4, 0.6], [9, -9]])
FIVE = [1, 2, -1.04, 0.5]  # mean of the first five rows of TABLE
FOUR = [1.05, 1.95, -1, 0.45]  # and of the first four


def ident(rule) -> str:
    return type(rule).__name__ + getattr(rule, "convention", "")


# Every rule, tolerating one bad client of at least seven.
RULES = [
    Krum(1),
    Krum(1, "byzfl"),
    Krum(1, "garfield"),
    MultiKrum(1),
    MultiKrum(1, convention="monna"),
    Bulyan(1),
    Bulyan(1, iterative=False),
    GeometricMedian(),
    GeometricMedian("byzfl"),
    GeometricMedian("rfa"),
    CenteredClipping(2.0),
    CenteredClipping(2.0, 3),
    MDA(1),
    SMEA(1),
    CAF(1),
    NearestNeighborAverage(1),
    FlagAggregator(2, 3),
    PrincipalGradient(),
    Median(),
    TrimmedMean(1),
    MeaMed(1),
    Phocas(1),
]
GRAM = [r for r in RULES if not isinstance(r, Median | TrimmedMean | MeaMed | Phocas)]


# ---- worked numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "rows", "want"),
    [
        (Krum(1), TABLE, TABLE[0]),
        (Krum(1, "byzfl"), TABLE, TABLE[0]),
        (Krum(1, "byzfl"), ROWS3, ROWS3[0]),  # a tie
        (MultiKrum(1, convention="byzfl"), ROWS3, [2.5, 3.5, 4.5]),
        (MultiKrum(1, convention="byzfl"), TABLE, FIVE),
        (MultiKrum(2, convention="byzfl"), TABLE, FOUR),
        (MultiKrum(1, 5), TABLE, FIVE),
        (Bulyan(1), SEVEN, [0.3, 0.3666666667]),
        (Bulyan(1, iterative=False), SEVEN, [0.3, 0.7]),
        (GeometricMedian("byzfl"), ROWS3, [3.7878876412, 4.7878876412, 5.7878876412]),
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
        (CenteredClipping(), ROWS3, [4, 5, 6]),
        (
            CenteredClipping(1.0, 3),
            TABLE,
            [1.0487776054, 1.6905379168, -0.8340756831, 0.3529082630],
        ),
        (MDA(1), ROWS3, [2.5, 3.5, 4.5]),
        (MDA(1), TABLE, FIVE),
        (NearestNeighborAverage(1, pivot=1), ROWS3, [2.5, 3.5, 4.5]),
        (NearestNeighborAverage(1), TABLE, FIVE),
        (NearestNeighborAverage(2, pivot=3), TABLE, FOUR),
        (NearestNeighborAverage(1, keep=3), [[1.0], [1.2], [0.6], [50]], [0.9333333333]),
        (NearestNeighborAverage(1), [[1.0], [1.2], [0.6], [0.9], [50]], [0.925]),
        (SMEA(1), ROWS3, [2.5, 3.5, 4.5]),
        (SMEA(1), TABLE, FIVE),
        (SMEA(2), TABLE, FOUR),
        (CAF(1), ROWS3, [4, 5, 6]),
        (CAF(1, "byzfl"), TABLE, [1.00505698, 1.99494302, -1.03406542, 0.49214880]),
        (Median(), TABLE, FOUR),
        (TrimmedMean(1), TABLE, FOUR),
        (TrimmedMean(2), TABLE, FOUR),
        (MeaMed(1), TABLE, FIVE),
        (MeaMed(2), TABLE, FOUR),
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


# ---- order of the clients ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule",
    [
        r
        for r in RULES
        if not isinstance(r, NearestNeighborAverage | MDA)
        and not (isinstance(r, Bulyan) and r.iterative)
    ]
    + [NNM(2) >> TrimmedMean(2), NNM(1) >> GeometricMedian()],
    ids=ident,
)
def test_any_order_of_the_clients_gives_the_same_bits(rule, dtype, rng):
    x = rng.standard_normal((9, 501)).astype(dtype)
    x[5] = x[2]  # one twice
    first = rule(x).tobytes()
    for _ in range(6):
        assert rule(x[rng.permutation(9)]).tobytes() == first


@pytest.mark.parametrize(
    "rule", [GeometricMedian(), GeometricMedian("rfa"), CenteredClipping(9.0, 2), MultiKrum(1)]
)
def test_weighted_clients_may_come_in_any_order_too(rule, rng):
    x = rng.standard_normal((8, 300)).astype(np.float32)
    x[6] = x[1]  # the same update with another weight
    q = rng.integers(1, 100, 8).astype(float)
    first = rule(x, q).tobytes()
    for _ in range(6):
        p = rng.permutation(8)
        assert rule(x[p], q[p]).tobytes() == first


def test_diameter_ties_follow_the_order_of_the_call(rng):
    x = rng.standard_normal((9, 30))
    choices = {MDA(3).diagnose(x[np.roll(np.arange(9), k)]).selected for k in range(9)}
    assert len(choices) > 1
    pairs = ((x[:, None] - x) ** 2).sum(axis=2)
    spans = set()
    for k in range(9):
        rows = np.roll(np.arange(9), k)
        kept = rows[list(MDA(3).diagnose(x[rows]).selected)]
        spans.add(float(pairs[np.ix_(kept, kept)].max()))
    assert len(spans) == 1


@pytest.mark.parametrize("rule", [NearestNeighborAverage(2, pivot=3), Krum(1), MDA(2)], ids=ident)
def test_selection_moves_with_the_clients(rule, rng):
    x = rng.standard_normal((9, 20))
    x[[1, 7]] += 30
    p = rng.permutation(9)
    if isinstance(rule, NearestNeighborAverage):
        moved = NearestNeighborAverage(2, pivot=int(np.flatnonzero(p == 3)[0]))
    else:
        moved = rule
    assert {p[i] for i in moved.diagnose(x[p]).selected} == set(rule.diagnose(x).selected)


# ---- equivariance ------------------------------------------------------------------------------

FIXED_AT_ZERO = (CenteredClipping, FlagAggregator, PrincipalGradient)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_common_offset_moves_the_result_with_it(rule, rng):
    if isinstance(rule, FIXED_AT_ZERO) or rule == GeometricMedian("byzfl"):
        pytest.skip("works about the zero vector")
    x = rng.standard_normal((9, 60))
    shift = 5 * rng.standard_normal(60)
    np.testing.assert_allclose(rule(x + shift), rule(x) + shift, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_a_rotation_rotates_the_result(rule, rng):
    if isinstance(rule, Bulyan):
        pytest.skip("works by coordinate")
    x = rng.standard_normal((9, 40)) + 0.3
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    np.testing.assert_allclose(rule(x @ q), rule(x) @ q, atol=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_a_scale_scales_the_result(rule, rng):
    x = rng.standard_normal((9, 40)) + 0.3
    if isinstance(rule, FlagAggregator):  # has no scale at all
        lengths = rng.uniform(0.1, 10, (9, 1))
        np.testing.assert_allclose(rule(lengths * x), rule(x), atol=1e-9)
    elif isinstance(rule, CenteredClipping):
        scaled = CenteredClipping(8 * rule.radius, rule.iterations)
        np.testing.assert_allclose(scaled(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)
    elif rule in (GeometricMedian("byzfl"), GeometricMedian("rfa")):
        scaled = GeometricMedian(rule.convention, smoothing=8 * rule._option("smoothing"))
        np.testing.assert_allclose(scaled(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_allclose(rule(8 * x), 8 * rule(x), rtol=1e-9, atol=1e-12)


# ---- non-finite updates ------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_a_broken_client_under_the_three_policies(rule, poison, rng):
    x = rng.standard_normal((8, 30)).astype(np.float32)
    x[5, 17] = poison
    with pytest.raises(NonFiniteError, match=r"updates\[5\]") as caught:
        rule(x)
    assert caught.value.clients == (5,)
    rest = np.delete(x, 5, axis=0)
    fields = {k: v for k, v in vars(rule).items() if k != "nonfinite"}
    fewer = {**fields, "f": 0} if "f" in fields else fields
    want = type(rule)(**fewer)(rest)
    for policy in ("exclude", "propagate"):  # the broken one counts as one of the f bad ones
        lenient = type(rule)(**fields, nonfinite=policy)
        np.testing.assert_allclose(lenient(x), want, rtol=1e-6, atol=1e-7)
    assert rule.diagnose(x).nonfinite == (5,)


def test_more_broken_clients_than_expected_leave_f_at_zero(rng):
    x = rng.standard_normal((9, 10))
    x[[0, 3, 4]] = np.nan
    good = np.delete(x, [0, 3, 4], axis=0)
    np.testing.assert_allclose(MDA(1, nonfinite="exclude")(x), good.mean(axis=0), rtol=1e-12)
    assert Krum(1, nonfinite="exclude").diagnose(x).nonfinite == (0, 3, 4)
    x[:] = np.nan
    for rule in (Krum(1, nonfinite="exclude"), GeometricMedian(nonfinite="propagate")):
        with pytest.raises(NonFiniteError, match="no client is left"):
            rule(x)
    seen = Krum(1).diagnose(x)
    assert seen.selected == () and seen.rejected == tuple(range(9)) == seen.nonfinite
    assert np.isinf(seen.norms).all()


def test_squares_beyond_float64_leave_a_client_out(rng):
    x = rng.standard_normal((7, 10))
    x[2] = 1e200
    with pytest.raises(NonFiniteError, match=r"updates\[2\].*overflow"):
        Krum(1)(x)
    got = MultiKrum(1, nonfinite="exclude").diagnose(x)
    assert 2 in got.rejected and got.nonfinite == (2,)


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_values_near_the_end_of_float32_are_finite(rule, rng):
    x = rng.standard_normal((8, 30)).astype(np.float32)
    x[3] = 3e38
    x[3, ::2] = -3e38
    got = rule(x)
    assert np.isfinite(got).all()
    four_steps = getattr(rule, "convention", None) == "rfa"  # from a mean at 4e37: not arrived
    if not isinstance(rule, PrincipalGradient) and not four_steps:  # the former is not robust
        assert np.abs(got).max() < 20


# ---- weights -----------------------------------------------------------------------------------


def test_weights_average_the_selected_and_never_select(rng):
    x = rng.standard_normal((8, 20))
    q = np.array([1, 5, 2, 0, 3, 4, 1, 2.0])
    present = np.flatnonzero(q)
    seen = MultiKrum(1, 4).diagnose(x[present])
    rows = present[list(seen.selected)]
    np.testing.assert_allclose(MultiKrum(1, 4)(x, q), q[rows] @ x[rows] / q[rows].sum())
    np.testing.assert_array_equal(Krum(1)(x, q), Krum(1)(x[present]))


def test_weights_of_centres_are_example_counts(rng):
    x = rng.standard_normal((5, 20))
    q = np.array([1, 2, 3, 1, 2])
    repeated = np.repeat(x, q, axis=0)
    for rule in (
        GeometricMedian("byzfl"),
        GeometricMedian("rfa"),
        GeometricMedian(smoothing=1e-3),
        CenteredClipping(3.0),
        CenteredClipping(3.0, 4),
    ):
        # steps end when the sum of distances, flat about its least, gains 1e-12 of itself
        loose = isinstance(rule, GeometricMedian) and rule.convention == "converged"
        np.testing.assert_allclose(rule(x, q), rule(repeated), atol=2e-5 if loose else 1e-9)


def test_a_client_without_weight_is_not_read(rng):
    x = rng.standard_normal((5, 8))
    x[3] = np.nan
    for rule in (GeometricMedian(), CenteredClipping(), MultiKrum(0, convention="flower")):
        q = np.array([1.0, 1, 1, 0, 1])
        np.testing.assert_allclose(rule(x, q), rule(np.delete(x, 3, axis=0)), rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        Bulyan(1),
        MDA(1),
        SMEA(1),
        CAF(1),
        NearestNeighborAverage(1),
        FlagAggregator(),
        PrincipalGradient(),
        Median(),
        TrimmedMean(1),
    ],
    ids=ident,
)
def test_rules_without_a_weighted_form_say_so(rule):
    with pytest.raises(InvalidInputError, match=r"weights: .* has no weighted form"):
        rule(TABLE, [1] * 6)


# ---- small and degenerate sets -----------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=ident)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_updates_come_out_as_they_are(rule, value):
    x = np.full((9, 5), value)
    want = x[0]
    if isinstance(rule, FlagAggregator):
        want = 9 / 2 * x[0] / (np.linalg.norm(x[0]) or 1)
    if isinstance(rule, CenteredClipping) and value:
        want = x[0] * min(1, rule.iterations * 2 / np.linalg.norm(x[0]))
    np.testing.assert_allclose(rule(x), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "rule",
    [
        GeometricMedian(),
        GeometricMedian("byzfl"),
        GeometricMedian("rfa"),
        CenteredClipping(),
        CenteredClipping(9.0, 3),
        MultiKrum(0, convention="flower"),
        MDA(0),
        SMEA(0),
        CAF(0),
        NearestNeighborAverage(0),
        FlagAggregator(rescale="mean-norm"),
        PrincipalGradient(),
        Median(),
        TrimmedMean(0),
    ],
    ids=ident,
)
def test_a_single_client_comes_out(rule):
    np.testing.assert_allclose(rule([np.array([1.0, -2.0])]), [1, -2], rtol=1e-12)


def test_two_clients(rng):
    x = rng.standard_normal((2, 6))
    for rule in (MDA(0), CAF(0), GeometricMedian(), GeometricMedian("rfa"), Median()):
        np.testing.assert_allclose(rule(x), x.mean(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(Krum(0, "byzfl")(x), x[0])  # a tie


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize(
    "rule",
    [Krum, MultiKrum, MDA, SMEA, CAF, NearestNeighborAverage, TrimmedMean, MeaMed, Phocas],
)
def test_half_of_the_clients_bad_is_an_error(rule, n):
    with pytest.raises(InvalidInputError, match=f"2 f < n, got f = {n // 2} and n = {n}"):
        rule(n // 2)(np.eye(n))


@pytest.mark.parametrize("rule", GRAM, ids=ident)
def test_hundred_clients_of_which_45_are_bad(rule):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((100, 40)).astype(np.float32)
    x[rng.permutation(100)[:45]] += 50
    fields = {k: v for k, v in vars(rule).items() if k != "f"}
    if "f" not in vars(rule):
        got = rule(x)
    elif isinstance(rule, Bulyan):
        with pytest.raises(InvalidInputError, match=r"4 f \+ 3"):
            Bulyan(45)(x)
        got = Bulyan(24)(x)
        assert np.isfinite(got).all()
        return
    elif isinstance(rule, SMEA):
        with pytest.raises(InvalidInputError, match="subsets"):
            SMEA(45)(x)
        return
    elif isinstance(rule, NearestNeighborAverage):
        pivot = int(np.flatnonzero(x.mean(axis=1) < 25)[0])
        got = NearestNeighborAverage(45, pivot)(x)
    else:
        got = type(rule)(f=45, **fields)(x)
    assert np.isfinite(got).all()
    if isinstance(rule, Krum | MultiKrum | MDA | CAF | NearestNeighborAverage):
        assert np.abs(got).max() < 5
    if rule == GeometricMedian():
        assert np.abs(got).max() < 12  # pulled, not carried off


# ---- attacks -----------------------------------------------------------------------------------


def test_krum_never_chooses_the_outlier_of_a_crowd_far_from_zero():
    """Rows at 10 with a spread of 0.01, one client three times as far out: 1,000 draws."""
    rng = np.random.default_rng(0)
    for trial in range(1000):
        x = 1e-2 * rng.standard_normal((8, 24))
        attacker = trial % 8
        x[attacker] *= 3
        x = (x + 10).astype(np.float32)
        assert Krum(1).diagnose(x).selected != (attacker,)


@pytest.mark.parametrize("value", [1e6, 1e38, -3e38])
def test_bad_clients_are_not_in_the_selection(value, rng):
    x = rng.standard_normal((12, 30)).astype(np.float32)
    bad = [1, 4, 9]
    x[bad] = np.float32(value) * (1 + rng.random((3, 30), dtype=np.float32) / 8)
    x = np.clip(x, -3.4e38, 3.4e38)
    for rule in (Krum(3), MultiKrum(3), MultiKrum(3, convention="byzfl"), MDA(3), SMEA(3), CAF(3)):
        seen = rule.diagnose(x)
        assert not set(bad) & set(seen.selected)
        assert (seen.coefficients[bad] == 0).all()
    assert not set(bad) & set(NearestNeighborAverage(3).diagnose(x).selected)
    x = np.vstack([x, rng.standard_normal((3, 30)).astype(np.float32)])
    assert not set(bad) & set(Bulyan(3).diagnose(x).selected)


@pytest.mark.parametrize("far", [1e3, 1e6, 1e9, 1e20, 1e36])
@pytest.mark.parametrize(
    "rule", [GeometricMedian(), GeometricMedian("byzfl"), GeometricMedian("rfa")], ids=ident
)
def test_far_clients_move_the_geometric_median_by_a_bounded_amount(rule, far, rng):
    clean = rng.standard_normal((11, 200)).astype(np.float32)
    x = clean.copy()
    x[:4] = far * x[:4]
    distance = np.linalg.norm(rule(x).astype(np.float64) - clean[4:].mean(axis=0))
    if rule.convention == "rfa" and far > 1e3:
        assert distance < 40 * far  # four steps from a mean at 0.3 far: has not arrived
    else:
        assert distance < 30


def weiszfeld(x, nu, steps):
    z = np.zeros(x.shape[1])
    for _ in range(steps):
        b = 1 / np.maximum(nu, np.linalg.norm(x - z, axis=1))
        z = (b / b.sum()) @ x
    return z


@pytest.mark.parametrize("far", [1.0, 1e4, 1e8, 1e16, 1e34])
def test_iterates_are_exact_whatever_a_client_sends(far, rng):
    x = rng.standard_normal((9, 400))
    x[[2, 7]] *= far
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    got = GeometricMedian("byzfl", iterations=6, accumulate="float64")(x)
    np.testing.assert_allclose(got, weiszfeld(wide, 0.1, 6), rtol=1e-4, atol=2e-5)
    v = np.zeros(400)
    for _ in range(3):
        r = np.minimum(1, 15 / np.linalg.norm(wide - v, axis=1))
        v = v + (r[:, None] * (wide - v)).mean(axis=0)
    np.testing.assert_allclose(CenteredClipping(15.0, 3)(x), v, rtol=1e-4, atol=2e-5)


def test_one_client_moves_a_clipped_centre_by_two_radii_over_n(rng):
    x = rng.standard_normal((10, 30))
    for value in (0.0, 1e3, 1e100, -1e100):
        changed = x.copy()
        changed[4] = value
        rule = CenteredClipping(0.5)
        assert np.linalg.norm(rule(changed) - rule(x)) <= 2 * 0.5 / 10 * (1 + 1e-9)


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
        (lambda: Krum(1)(ROWS3), InvalidInputError, "with f = 1 none are left"),
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


# ---- the reference library, where it is installed ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("Krum", ("f",), lambda f: Krum(f, "byzfl")),
        ("MultiKrum", ("f",), lambda f: MultiKrum(f, convention="byzfl")),
        ("GeometricMedian", (), lambda f: GeometricMedian("byzfl")),
        ("CenteredClipping", (), lambda f: CenteredClipping(3.0, 2)),
        ("MDA", ("f",), MDA),
        ("MoNNA", ("f",), lambda f: NearestNeighborAverage(f, pivot=1)),
        ("Median", (), lambda f: Median()),
        ("TrMean", ("f",), TrimmedMean),
        ("Meamed", ("f",), MeaMed),
    ],
)
def test_equal_to_byzfl(name, options, rule):
    from flcore.bench.byzfl_peer import byzfl_aggregators

    library, reason = byzfl_aggregators()
    if library is None:
        pytest.skip(f"ByzFL is {reason}")
    more = {"MoNNA": {"idx": 1}, "CenteredClipping": {"tau": 3.0, "L": 2}}.get(name, {})
    for n, f in ((3, 1), (5, 2), (8, 3), (10, 2), (16, 2), (26, 1)):
        for d in (1, 3, 17, 400):
            x = np.random.default_rng([n, d]).standard_normal((n, d))
            theirs = getattr(library, name)(**{o: f for o in options}, **more)(x)
            np.testing.assert_allclose(rule(f)(x), theirs, rtol=1e-9, atol=1e-12)
            single = rule(f)(x.astype(np.float32))
            np.testing.assert_allclose(single, theirs, rtol=1e-4, atol=1e-5)
