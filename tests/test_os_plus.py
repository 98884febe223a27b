"""OS+: the worked example, the threshold search, and what it does to the output error."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import InvalidInputError
from flcore.quantization.preparation import (
    ActivationGrid,
    ActivationStatistics,
    ScalingGroup,
    UniformGrid,
    collect_statistics,
    fold_scales,
    merge_statistics,
    migration_scale,
    os_plus,
    search_migrations,
    simulated,
    thresholds,
)
from preparation_models import (
    LLAMA,
    POST_NORM,
    PRE_NORM,
    PRE_NORM_JOINT,
    Llama,
    PostNorm,
    PreNorm,
    batches,
    varied,
)

X = [[10, -3, 0.5, 0.2], [8, -1, -0.5, 0.4], [9, -2, 0.1, -0.6]]
W = [[0.3, -0.2, 0.5, 0.1], [-0.1, 0.4, 0.2, -0.3]]
B = [0.1, -0.2]
FOUR = UniformGrid(4, 0, symmetric=True)
FOUR_X = ActivationGrid(4, "tensor")
SIX, SIX_X = UniformGrid(6, -1), ActivationGrid(6, "tensor")
EIGHT, EIGHT_X = UniformGrid(8, 0, symmetric=True), ActivationGrid(8, "tensor")


def worked():
    """Return the linear of the worked example, its group and its input."""
    linear = torch.nn.Linear(4, 2, dtype=torch.float64)
    linear.weight.data = torch.tensor(W, dtype=torch.float64)
    linear.bias.data = torch.tensor(B, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Identity(), linear)
    return model, [ScalingGroup("0", "1")], torch.tensor(X, dtype=torch.float64)


# ---- the worked example ------------------------------------------------------------------------


def test_shift_and_scales_of_the_worked_example():
    model, groups, x = worked()
    found = ActivationStatistics.of(x)
    z = found.centre
    assert z.tolist() == pytest.approx([9, -2, 0, -0.1])
    low, high = found.minimum - z, found.maximum - z
    assert float(low.min()) == -1 and float(high.max()) == 1
    assert float(x.min()) == -3 and float(x.max()) == 10
    assert migration_scale(low, high, 0.75).tolist() == pytest.approx([4 / 3, 4 / 3, 1, 1])
    assert migration_scale(low, high, 0.5).tolist() == pytest.approx([2, 2, 1, 1])
    want = model(x)
    fold_scales(model, groups, [torch.ones(4)], [z])
    assert model[1].bias.tolist() == pytest.approx([3.19, -1.87])
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inspect", [None, "1", lambda outputs, mask: outputs[0]])
def test_errors_of_the_worked_example(inspect):
    model, _, x = worked()
    groups = [ScalingGroup("0", "1", inspect=inspect)]
    found = search_migrations(model, groups, [x], FOUR, FOUR_X, lower=0.5, steps=5)[0]
    assert found.before == pytest.approx(0.189672, abs=6e-7)
    assert found.shifted == pytest.approx(0.0021435, abs=6e-8)
    by_threshold = {round(t, 6): loss for t, loss in found.losses}
    assert list(by_threshold) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert by_threshold[0.6] == pytest.approx(0.00044064, abs=6e-9)
    assert by_threshold[0.5] == pytest.approx(0.00055392, abs=6e-9)
    assert found.threshold == pytest.approx(0.6)  # inside the range: the grid is needed
    assert found.after == by_threshold[0.6]
    assert found.scale.tolist() == pytest.approx([1 / 0.6, 1 / 0.6, 1, 1])


def test_the_quantised_error_after_folding_is_the_one_searched():
    model, groups, x = worked()
    want = model(x)
    # (t = 0.6 puts a value on the border of two codes, which rounding decides)
    report = os_plus(model, groups, [x], FOUR, FOUR_X, lower=0.5, steps=1)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), simulated(model, ["1"], FOUR, FOUR_X):
        error = float((model(x) - want).square().sum(1).mean())
    assert error == pytest.approx(0.00055392, abs=6e-9)
    assert "t 0.5" in str(report)


# ---- thresholds and scales ---------------------------------------------------------------------


def test_thresholds_go_from_the_largest_value_to_the_lower_bound():
    few = thresholds(10.0, 1.0)
    assert len(few) == 101 and few[0] == 10.0 and few[-1] == pytest.approx(1.0)
    assert few[1] == pytest.approx(10 - 9 / 100)
    assert len(thresholds(100.0, 1.0)) == 201  # floor(100 / 0.5) steps
    assert thresholds(0.7, 1.0) == [0.7]


def test_channels_shrink_exactly_to_the_threshold_and_no_others():
    x = 5 * torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = ActivationStatistics.of(x)
    centred = x - stats.centre
    low, high = stats.minimum - stats.centre, stats.maximum - stats.centre
    reach = centred.abs().amax(0)
    assert (migration_scale(low, high, float(reach.max())) == 1).all()
    for t in (2.0, 6.0, float(reach.median())):
        scale = migration_scale(low, high, t)
        torch.testing.assert_close((centred / scale).abs().amax(0), reach.clamp(max=t))
    # without a shift the larger side counts
    assert migration_scale(torch.tensor([-8.0]), torch.tensor([2.0]), 4.0).tolist() == [2.0]


# ---- equivalence -------------------------------------------------------------------------------


CASES = [
    pytest.param(PreNorm, PRE_NORM, id="prenorm"),
    pytest.param(PreNorm, PRE_NORM_JOINT, id="joint"),
    pytest.param(Llama, LLAMA, id="llama"),
    pytest.param(PostNorm, POST_NORM, id="postnorm"),
]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("make, groups", CASES)
def test_the_float_function_stays(make, groups, dtype, tolerance):
    model = varied(make()).to(dtype)
    data, fresh = ([x.to(dtype) for x in batches(seed)] for seed in (1, 2))
    with torch.no_grad():
        want = [model(x) for x in fresh]
        report = os_plus(model, groups, data, SIX, SIX_X, steps=12, progress=False)
        for x, y in zip(fresh, want, strict=True):
            assert float((model(x) - y).abs().max()) <= tolerance * float(y.abs().max())
    assert any(m.threshold is not None for m in report.migrations)
    for m in report.migrations:
        assert m.after <= m.before


def test_norms_without_bias_are_scaled_only():
    model, data = varied(Llama()), batches()
    for m in search_migrations(model, LLAMA, data, SIX, SIX_X, steps=5, progress=False):
        assert (m.shift == 0).all()
    with pytest.raises(InvalidInputError, match="has no bias that could take up"):
        search_migrations(model, [ScalingGroup("norm1", "attn.q_proj", shift=True)], data)


def test_the_skip_path_of_a_post_norm_block_gets_the_restored_tensor():
    model, data = varied(PostNorm()), batches()
    with torch.no_grad():
        h = model.norm(data[0] + model.attn(data[0]))
        os_plus(model, POST_NORM, data, SIX, SIX_X, steps=12, progress=False)
        moved = model.norm(data[0] + model.attn(data[0]))
        assert float((moved - h).abs().max()) > 1  # the norm's own output is another
        torch.testing.assert_close(model.skip(moved), h, rtol=1e-4, atol=1e-4)
    # and without it the fold is refused, nothing is left behind
    model = varied(PostNorm())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidInputError, match="a reader that is not listed"):
        os_plus(model, [ScalingGroup("norm", "fc1")], data, SIX, SIX_X, steps=3, progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---- errors go down ----------------------------------------------------------------------------


def asymmetric(seed, channels=64):
    """Return a norm and two linears, outliers of one sign in 5 % of the channels, and inputs."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    norm = torch.nn.LayerNorm(channels)
    model = torch.nn.Sequential(norm, torch.nn.Linear(channels, 32))
    with torch.no_grad():
        model[1].weight.normal_(std=0.1)
        for j in torch.randperm(channels, generator=generator)[:3].tolist():
            norm.weight[j] *= 4
            norm.bias[j] += 40 if j % 2 else -60
            model[1].weight[:, j] /= 4
            model[1].bias -= model[1].weight[:, j] * norm.bias[j]
    return model, [torch.randn(256, channels, generator=generator) for _ in range(2)]


def measured(model, want, xs, weights, activations, stats):
    with torch.no_grad(), simulated(model, ["1"], weights, activations, stats):
        return float((torch.cat([model(x) for x in xs]) - want).square().sum(1).mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "weights, activations", [(EIGHT, EIGHT_X), (SIX, SIX_X)], ids=["W8A8", "W6A6"]
)
def test_order_of_methods_on_asymmetric_outliers(seed, weights, activations):
    """OS+ <= shift alone <= plain; OS+ <= s = sqrt(max |X| / max |W|) as in SmoothQuant."""
    group = [ScalingGroup("0", "1")]
    errors = []
    for method in ("os+", "shift", "plain", "smooth"):
        model, data = asymmetric(seed)
        with torch.no_grad():
            want = torch.cat([model(x) for x in data])
        stats = collect_statistics(model, group, data)["1"]
        if method == "os+":
            os_plus(model, group, data, weights, activations, progress=False)
        elif method == "shift":
            fold_scales(model, group, [torch.ones(64)], [stats.centre], batches=data)
        elif method == "smooth":
            reach = torch.maximum(stats.maximum, -stats.minimum)
            scale = (reach / model[1].weight.detach().abs().amax(0)).sqrt()
            fold_scales(model, group, [scale], batches=data)
        ranges = collect_statistics(model, group, data)
        errors.append(measured(model, want, data, weights, activations, ranges))
    assert errors[0] <= errors[1] < 0.5 * errors[2]
    assert errors[0] < 0.5 * errors[3]


@pytest.mark.parametrize("scope", ["token", "tensor", 8])
def test_quantised_output_error_is_lower(scope):
    grid, fresh = ActivationGrid(8, scope), batches(seed=9)
    names = [name for group in PRE_NORM for name in group.linears]
    weights = UniformGrid(8, -1, symmetric=True)
    model = varied(PreNorm())
    with torch.no_grad():
        want = [model(x) for x in fresh]
        with simulated(model, names, weights, grid):
            before = [model(x) for x in fresh]
        os_plus(model, PRE_NORM, batches(), weights, grid, steps=30, progress=False)
        with simulated(model, names, weights, grid):
            after = [model(x) for x in fresh]
    errors = [
        sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
        for got in (before, after)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_nothing_is_done_where_nothing_gets_better():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    torch.nn.init.zeros_(model[1].weight)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = search_migrations(model, [ScalingGroup("0", "1")], [x], EIGHT, EIGHT_X)[0]
    assert found.threshold is None and (found.scale == 1).all() and (found.shift == 0).all()
    assert found.after == found.before


def test_a_constant_channel_is_shifted_away():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 2))
    x = torch.tensor([[5.0, -2, 7]]).repeat(4, 1)
    want = model(x)
    os_plus(model, [ScalingGroup("0", "1")], [x], EIGHT, EIGHT_X, progress=False)
    assert model[0](x).abs().max() == 0
    torch.testing.assert_close(model(x), want)


def test_centres_without_the_outermost_tokens():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2))
    x = torch.randn(101, 2, generator=torch.Generator().manual_seed(0)) + 30
    x[0] = 1000
    found = [
        search_migrations(
            model,
            [ScalingGroup("0", "1")],
            [x],
            UniformGrid(16, -1),
            ActivationGrid(6),
            outside=share,
            steps=4,
        )[0]
        for share in (0.0, 0.02)
    ]
    assert found[0].threshold is None  # a centre beyond 500, for the sake of one token
    assert found[1].threshold is not None and (found[1].shift - 30).abs().max() < 0.5


# ---- several clients, options ------------------------------------------------------------------


def test_merged_ranges_give_the_migration_of_the_data_pooled():
    model, data = varied(PreNorm()), batches(count=4)
    parts = [collect_statistics(model, PRE_NORM, d) for d in (data[:1], data[1:])]
    merged, pooled = merge_statistics(parts), collect_statistics(model, PRE_NORM, data)
    for name in pooled:
        assert torch.equal(merged[name].minimum, pooled[name].minimum)
        assert torch.equal(merged[name].maximum, pooled[name].maximum)
    options = {"steps": 5, "progress": False}
    a, b = (
        search_migrations(model, PRE_NORM, data, SIX, SIX_X, statistics=s, **options)
        for s in (merged, None)
    )
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.shift, y.shift) and x.losses == y.losses


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lower": 0.0}, "lower: expected a number above 0"),
        ({"outside": 0.5}, "outside: expected 0 <= outside < 0.5"),
        ({"outside": 0.1, "statistics": {}}, "merged statistics have no quantiles"),
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"statistics": {}}, "statistics: expected those of 24 channels"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InvalidInputError, match=words):
        search_migrations(varied(PreNorm()), PRE_NORM, batches(), SIX, SIX_X, **options)
