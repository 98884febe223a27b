"""Preparation: descriptions of models, calibration data and masks, statistics, grids."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization.preparation import (
    ActivationGrid,
    ActivationStatistics,
    ScalingGroup,
    UniformGrid,
    awq,
    collect_statistics,
    fold_scales,
    merge_statistics,
    os_plus,
    search_scales,
)
from preparation_models import (
    PRE_NORM,
    QKV,
    WIDTH,
    PreNorm,
    batches,
    varied,
)

GRID = UniformGrid(3, 8)


# ---- grids -------------------------------------------------------------------------------------


def test_a_uniform_grid_by_hand():
    w = torch.tensor([[0.10, -0.35, 0.20, 0.05], [1, -0.5, 0.25, 0.75]])
    expected = [[0.11, -0.366667, 0.183333, 0.036667], [1, -0.5, 0.2, 0.8]]
    torch.testing.assert_close(UniformGrid(4, 4)(w), torch.tensor(expected), rtol=0, atol=1e-6)
    one_sided = torch.tensor([[1, 1.3, 1.7, 2]], dtype=torch.float64)
    assert UniformGrid(4, 4, force_zero=False)(one_sided).tolist() == [[1, 1, 1, 1]]
    expected = torch.tensor([[1.0667, 1.3333, 1.7333, 2]], dtype=torch.float64)
    torch.testing.assert_close(UniformGrid(4, 4)(one_sided), expected, rtol=0, atol=1e-4)
    symmetric = UniformGrid(4, -1, symmetric=True)(torch.tensor([[0.7, -0.32, 0.04, 0.16]]))
    torch.testing.assert_close(symmetric, torch.tensor([[0.7, -0.3, 0.0, 0.2]]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [-1, 0, 5, 8, 21, 64])
def test_a_grid_is_idempotent_and_off_by_half_a_step(group, symmetric):
    w = torch.randn(6, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = UniformGrid(4, group, symmetric)
    rounded = grid(w)
    torch.testing.assert_close(grid(rounded), rounded)
    span = w.abs().max() * 2
    assert float((rounded - w).abs().max()) <= 0.5 * float(span) / 14
    assert (grid(torch.zeros(3, 21)) == 0).all() and grid(torch.empty(0, 21)).shape == (0, 21)
    constant = torch.full((2, 21), -3.0)
    torch.testing.assert_close(grid(constant), constant)


def test_groups_of_a_grid_are_apart():
    w = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    parts = [UniformGrid(3, -1)(part) for part in w.split(8, 1)]
    torch.testing.assert_close(UniformGrid(3, 8)(w), torch.cat(parts, 1))


def test_activation_grids():
    x = torch.tensor([[[1.27, -0.5, 0.004], [12.7, 0.04, 0.06]]])
    rows = torch.tensor([[[1.27, -0.5, 0.0], [12.7, 0.0, 0.1]]])
    torch.testing.assert_close(ActivationGrid(8, "token")(x), rows)
    tensor = torch.tensor([[[1.3, -0.5, 0.0], [12.7, 0.0, 0.1]]])
    torch.testing.assert_close(ActivationGrid(8, "tensor")(x), tensor)
    blocks = torch.tensor([[[1.27, -0.5, 0.004], [12.7, 0.0, 0.06]]])
    torch.testing.assert_close(ActivationGrid(8, 2)(x), blocks)
    given = ActivationGrid(8, "tensor")(x, -0.5, 1.27)
    torch.testing.assert_close(given[0, 1], torch.tensor([1.27, 0.04, 0.06]))
    asymmetric = ActivationGrid(2, "token", symmetric=False)(torch.tensor([[3.0, 1.2, 1.6]]))
    torch.testing.assert_close(asymmetric, torch.tensor([[3.0, 1.0, 2.0]]))  # 0 is in the range
    half = ActivationGrid(8)(x.half())
    assert half.dtype == torch.float16


@pytest.mark.parametrize(
    "make",
    [
        lambda: UniformGrid(1),
        lambda: UniformGrid(17),
        lambda: UniformGrid(4, -2),
        lambda: ActivationGrid(8, "row"),
        lambda: ActivationGrid(8, 0),
        lambda: ActivationGrid(4.0),
    ],
)
def test_bad_grids(make):
    with pytest.raises(InvalidInputError, match="expected"):
        make()


# ---- statistics --------------------------------------------------------------------------------


def test_statistics_by_hand():
    x = torch.tensor([[20, 0.5, -0.5, 1], [-16, 1, 0.5, -1]])
    found = ActivationStatistics.of(x)
    assert found.mean_abs.tolist() == [18, 0.75, 0.5, 1] and found.count == 2
    assert found.minimum.tolist() == [-16, 0.5, -0.5, -1]
    assert found.maximum.tolist() == [20, 1, 0.5, 1]
    assert found.centre.tolist() == [2, 0.75, 0, 0]


def test_merged_statistics_are_those_of_pooled_data():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 6, generator=generator) for n in (5, 1, 300)]
    of = [{"fc": ActivationStatistics.of(x)} for x in parts]
    pooled = ActivationStatistics.of(torch.cat(parts))
    for order in (of, of[::-1]):
        merged = merge_statistics(order)["fc"]
        assert merged.count == 306
        assert torch.equal(merged.minimum, pooled.minimum)
        assert torch.equal(merged.maximum, pooled.maximum)
        torch.testing.assert_close(merged.mean_abs, pooled.mean_abs, rtol=1e-14, atol=0)
    empty = ActivationStatistics.empty(6)
    assert torch.equal(empty.merge(pooled).sum_abs, pooled.sum_abs)


def test_sums_of_whole_numbers_are_exact_in_any_order():
    x = torch.randint(-(2**20), 2**20, (500, 3), generator=torch.Generator().manual_seed(0)).float()
    one = ActivationStatistics.of(x)
    other = ActivationStatistics.of(x[200:]).merge(ActivationStatistics.of(x[:200]))
    assert torch.equal(one.sum_abs, other.sum_abs)
    assert one.sum_abs.tolist() == x.long().abs().sum(0).tolist()


def test_statistics_travel_as_tensors():
    found = ActivationStatistics.of(torch.randn(7, 3))
    back = ActivationStatistics.from_state_dict(pickle.loads(pickle.dumps(found.state_dict())))
    assert torch.equal(back.sum_abs, found.sum_abs) and back.count == 7
    state = found.state_dict()
    for change, words in (
        ({"sum_abs": torch.ones(4)}, "three vectors of one length"),
        ({"sum_abs": -state["sum_abs"]}, "sums >= 0"),
        ({"minimum": state["maximum"] + 1}, "maxima >= minima"),
        ({"count": -1}, "a count >= 0"),
        ({"maximum": torch.full((3,), float("nan"))}, "finite"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            ActivationStatistics.from_state_dict({**state, **change})
    with pytest.raises(InvalidInputError, match="minimum missing"):
        ActivationStatistics.from_state_dict({k: v for k, v in state.items() if k != "minimum"})


def test_bad_statistics():
    found = ActivationStatistics.of(torch.ones(2, 3))
    with pytest.raises(InvalidInputError, match="expected 3 channels, got 4"):
        found.merge(ActivationStatistics.empty(4))
    with pytest.raises(DTypeError, match="expected ActivationStatistics"):
        found.merge(3)
    with pytest.raises(InvalidInputError, match="expected 3 channels, got 2"):
        found.update(torch.ones(5, 2))
    with pytest.raises(InvalidInputError, match="not finite"):
        found.update(torch.tensor([[1.0, 2, float("inf")]]))
    with pytest.raises(InvalidInputError, match="is everything masked"):
        _ = ActivationStatistics.of(torch.ones(2, 3), torch.zeros(2)).mean_abs
    with pytest.raises(InvalidInputError, match="one value a token"):
        found.update(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(InvalidInputError, match="names differ"):
        merge_statistics([{"a": found}, {"b": found}])
    with pytest.raises(InvalidInputError, match="at least one"):
        merge_statistics([])


# ---- calibration data --------------------------------------------------------------------------


def padded(data, value):
    """Return keyword batches whose last three tokens of row 1 are padding of `value`."""
    kept = []
    for x in data:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        mask[1, -3:] = False
        x = torch.where(mask[..., None], x, torch.full_like(x, value))
        kept.append({"x": x, "attention_mask": mask})
    return kept


def test_padding_does_not_count():
    model = varied(PreNorm())
    results = []
    for value in (0.0, 1e6):
        data = padded(batches(), value)
        # (norms make padding of one value small, so the masked input itself is looked at, too)
        stats = collect_statistics(model, PRE_NORM, data)
        scales = search_scales(model, PRE_NORM, data, GRID)
        migrations = os_plus(copy.deepcopy(model), PRE_NORM, data, GRID, steps=4, progress=False)
        results.append((stats, scales, migrations.migrations))
    (stats_a, scales_a, moved_a), (stats_b, scales_b, moved_b) = results
    assert stats_a["fc1"].count == 3 * 37
    for name in stats_a:
        torch.testing.assert_close(stats_a[name].mean_abs, stats_b[name].mean_abs)
    for a, b in zip(scales_a, scales_b, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
    for a, b in zip(moved_a, moved_b, strict=True):
        assert a.after == pytest.approx(b.after, rel=1e-4)
        torch.testing.assert_close(a.shift, b.shift)


def test_extreme_padding_reaches_statistics_without_a_mask():
    linear = nn.Sequential(nn.Identity(), nn.Linear(WIDTH, 4))
    group = [ScalingGroup("0", "1")]
    data = [(item["x"],) for item in padded(batches(), 1e6)]
    masks = iter([item["attention_mask"] for item in padded(batches(), 1e6)])
    assert collect_statistics(linear, group, data)["1"].maximum.max() == 1e6
    found = collect_statistics(linear, group, data, mask=lambda batch: next(masks))
    assert found["1"].maximum.max() < 10 and found["1"].count == 3 * 37


def test_kinds_of_batches_and_generators():
    model, data = varied(PreNorm()), batches()
    groups = PRE_NORM[2:3]
    found = [
        collect_statistics(model, groups, kind)["fc1"].sum_abs
        for kind in (
            data,
            iter(data),
            [(x,) for x in data],
            [[x, None] for x in data],
            ({"x": x} for x in data),
        )
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    one = collect_statistics(model, groups, data[0])["fc1"]
    assert one.count == 40  # a single tensor is one batch
    by_hand = collect_statistics(model, groups, [0, 1, 2], forward=lambda m, i: m(data[i]))
    assert torch.equal(by_hand["fc1"].sum_abs, found[0])


def test_progress_is_told_to_a_function():
    model, data = varied(PreNorm()), batches()
    for method, options in ((awq, {}), (os_plus, {"steps": 3})):
        told = []
        copied = copy.deepcopy(model)
        method(copied, PRE_NORM, data, GRID, progress=lambda *a, t=told: t.append(a), **options)
        done = [a[0] for a in told]
        assert done == list(range(1, told[-1][1] + 1)) and told[0][2] == "calibration"


def test_calibration_that_cannot_be_used():
    model = varied(PreNorm())
    for call in (collect_statistics, search_scales):
        with pytest.raises(InvalidInputError, match="batches: expected at least one"):
            call(model, PRE_NORM, [])
        with pytest.raises(DTypeError, match="batches: expected an iterable"):
            call(model, PRE_NORM, 3)
    masked = padded(batches(), 0.0)
    for batch in masked:
        batch["attention_mask"][:] = False
    with pytest.raises(InvalidInputError, match="no token reached"):
        collect_statistics(model, PRE_NORM[2:3], masked)
    with pytest.raises(InvalidInputError, match="no token reached 'fc1'"):
        search_scales(model, PRE_NORM[2:3], masked, GRID)

    class Idle(PreNorm):
        def forward(self, x):
            return self.attn(self.norm1(x))

    with pytest.raises(InvalidInputError, match="'fc1' was not run"):
        search_scales(Idle(), PRE_NORM[2:3], batches(), GRID)


# ---- descriptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, error, words",
    [
        (ScalingGroup("norm9", "fc1"), InvalidInputError, r"groups\[0\].previous: .*'norm9'"),
        (ScalingGroup("norm2", "fc9"), InvalidInputError, r"groups\[0\].linears: .*'fc9'"),
        (ScalingGroup("norm2", "act"), DTypeError, "to be a torch.nn.Linear, got GELU"),
        (ScalingGroup("norm2", ("fc1", "fc2")), InvalidInputError, "'fc2' reads 48 channels"),
        (ScalingGroup("norm2", "fc2"), InvalidInputError, r"weight of shape \(24,\), expected"),
        (ScalingGroup("norm2", "fc2", fold="norm"), InvalidInputError, "of shape"),
        (ScalingGroup("fc2", "fc2"), InvalidInputError, "has 24 outputs for 48 channels"),
        (ScalingGroup("norm2", "fc1", inspect="attn"), InvalidInputError, "does not hold 'fc1'"),
        (ScalingGroup("norm2", "fc1", inspect=3), DTypeError, "a name or a callable"),
        (ScalingGroup("norm2", "fc1", residual="x"), InvalidInputError, "residual"),
        ("norm2", DTypeError, r"groups\[0\]: expected a ScalingGroup"),
    ],
)
def test_bad_groups(group, error, words):
    with pytest.raises(error, match=words):
        collect_statistics(PreNorm(), [group], batches())


def test_groups_that_share_modules_are_refused():
    with pytest.raises(InvalidInputError, match=r"'fc1' is also in groups\[0\]"):
        fold_scales(PreNorm(), [ScalingGroup("norm2", "fc1"), ScalingGroup("attn", "fc1")], [])
    with pytest.raises(InvalidInputError, match="list them in one group"):
        groups = [ScalingGroup("norm1", QKV[:1]), ScalingGroup("norm1", QKV[1:])]
        fold_scales(PreNorm(), groups, [])
    with pytest.raises(InvalidInputError, match="expected at least one"):
        fold_scales(PreNorm(), [], [])
    with pytest.raises(DTypeError, match=r"model: expected a torch.nn.Module"):
        fold_scales(3, PRE_NORM, [])
    with pytest.raises(InvalidInputError, match="at least one name"):
        ScalingGroup("norm1", ())
    with pytest.raises(InvalidInputError, match="fold: expected one of"):
        ScalingGroup("norm1", "fc1", fold="add")
