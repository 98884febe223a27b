"""Preparation: descriptions of models, calibration data and masks, statistics, folding, grids."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import qmatmul_int8
from flcore.quantization import Scheme, quantize
from flcore.quantization.preparation import (
    ActivationGrid,
    ActivationStatistics,
    Gated,
    JointAttention,
    Migrated,
    ScalingGroup,
    UniformGrid,
    awq,
    collect_statistics,
    fold_scales,
    merge_statistics,
    os_plus,
    search_scales,
    simulated,
)
from preparation_models import (
    HEADS,
    LLAMA,
    PRE_NORM,
    QKV,
    WIDTH,
    Attention,
    Llama,
    PreNorm,
    batches,
    varied,
)

GRID = UniformGrid(3, 8)


def random_scales(model, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = [model.get_submodule(g.linears[0]).in_features for g in groups]
    return [torch.rand(k, generator=generator) * 3 + 0.2 for k in widths]


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


# ---- folding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make, groups", [(PreNorm, PRE_NORM), (Llama, LLAMA)])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
def test_folding_keeps_the_float_function(make, groups, dtype, tolerance):
    model = varied(make()).to(dtype)
    x = batches()[0].to(dtype)
    with torch.no_grad():
        want = model(x)
        fold_scales(model, groups, random_scales(model, groups), batches=[x])
        assert float((model(x) - want).abs().max()) <= tolerance * float(want.abs().max())
    assert all(p.dtype == dtype for p in model.parameters())


def test_a_fold_by_hand():
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 5.0]))
        model[0].bias.copy_(torch.tensor([1.0, -2.0]))
        model[1].weight.copy_(torch.tensor([[0.5, 2.0]]))
        model[1].bias.fill_(7.0)
    scale, shift = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0])
    fold_scales(model, [ScalingGroup("0", "1")], [scale], [shift])
    assert model[0].weight.tolist() == [1.5, 1.25]
    assert model[0].bias.tolist() == [0.0, -1.25]
    assert model[1].weight.tolist() == [[1.0, 8.0]]
    assert model[1].bias.tolist() == [7 + 0.5 * 1 + 2 * 3]  # with the weight before scaling


class Fused(nn.Module):
    """Query, key and value in one linear, whose last rows feed the output projection."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.out(JointAttention(HEADS)([self.qkv(self.norm(x))]))


def test_a_fused_projection_takes_the_scale_in_its_last_rows():
    model, data = Fused(), batches()
    old = model.qkv.weight.detach().clone()
    group = [ScalingGroup("qkv", "out", shift=True)]
    scale = random_scales(model, group)[0]
    with torch.no_grad():
        want = model(data[0])
        fold_scales(model, group, [scale], [torch.arange(24.0) / 8], batches=data)
        torch.testing.assert_close(model(data[0]), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.qkv.weight[: 2 * WIDTH], old[: 2 * WIDTH])
    assert model.out.bias is not None
    # the norm has no bias yet: a shift makes one
    report = os_plus(
        model,
        [ScalingGroup("norm", "qkv", inspect=JointAttention(HEADS))],
        data,
        UniformGrid(6, -1),
        ActivationGrid(6, "tensor"),
        steps=4,
        progress=False,
    )
    assert report.migrations[0].threshold is not None and model.norm.bias is not None
    torch.testing.assert_close(model(data[0]), want, rtol=1e-4, atol=1e-5)


def test_a_norm_without_weights_gets_some():
    model = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.Linear(3, 2, bias=False))
    x = torch.randn(5, 3)
    want = model(x)
    group = [ScalingGroup("0", "1")]
    fold_scales(model, group, [torch.tensor([2.0, 3, 4])], [torch.ones(3)], batches=[x])
    assert model[0].weight.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    torch.testing.assert_close(model(x), want)


def test_where_nothing_can_take_the_scale_a_division_goes_in_front():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.fc2(nn.functional.gelu(self.fc1(x)))

    model, x = Functional(), torch.randn(30, 8)
    want = model(x)
    awq(model, [ScalingGroup(None, "fc2")], [x], GRID, clip=False, progress=False)
    assert isinstance(model.fc2, Migrated) and isinstance(model.fc2.module, nn.Linear)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert "at='input'" in repr(model.fc2)
    again = copy.deepcopy(model)
    again.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))
    torch.testing.assert_close(again(x), model(x))


def test_a_scale_passes_relu_and_is_refused_at_gelu():
    x = torch.randn(30, 8)
    for activation, passes in ((nn.ReLU, True), (nn.GELU, False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 4))
        group, scale = [ScalingGroup("0", "2")], [torch.linspace(0.5, 3, 16)]
        want = model(x)
        if passes:
            fold_scales(model, group, scale, batches=[x])
        else:
            with pytest.raises(InvalidInputError, match="does not commute"):
                fold_scales(model, group, scale, batches=[x])
        torch.testing.assert_close(model(x), want)


def test_a_missing_reader_is_found_and_undone():
    model, data = varied(PreNorm()), batches()
    before = copy.deepcopy(model.state_dict())
    groups = [ScalingGroup("norm1", QKV[:2]), ScalingGroup("act", "fc2")]
    with pytest.raises(InvalidInputError, match=r"first one: norm1 -> attn.q_proj, attn.k_proj"):
        fold_scales(model, groups, random_scales(model, groups), batches=data)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(model.act, nn.GELU)


def test_preparing_twice_is_possible():
    model, data = varied(PreNorm()), batches()
    with torch.no_grad():
        want = model(data[0])
        for _ in range(2):
            awq(model, PRE_NORM, data, GRID, clip=False, progress=False)
            os_plus(model, PRE_NORM, data, GRID, steps=3, progress=False)
        assert float((model(data[0]) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize(
    "scales, shifts, words",
    [
        ([torch.ones(24)], None, "expected 2 .one a group., got 1"),
        ([torch.ones(24), torch.ones(23)], None, r"scales\[1\]: expected 24 finite numbers"),
        ([torch.ones(24), torch.zeros(24)], None, r"scales\[1\]: expected numbers above 0"),
        ([torch.ones(24), torch.full((24,), torch.nan)], None, "finite"),
        ([torch.ones(24)] * 2, [None, torch.ones(3)], r"shifts\[1\]: expected 24"),
        ([torch.ones(24)] * 2, [torch.ones(24), None], "'norm1' .RMSNorm. has no bias"),
    ],
)
def test_bad_scales_and_shifts(scales, shifts, words):
    model = Llama()
    before = copy.deepcopy(model.state_dict())
    groups = [ScalingGroup("norm1", QKV), ScalingGroup("attn.v_proj", "attn.o_proj")]
    with pytest.raises(InvalidInputError, match=words):
        fold_scales(model, groups, scales, shifts)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ---- functions that linears have together, simulation ------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_joint_attention_is_that_of_the_module(masked):
    attention, x = Attention().eval(), batches()[0]
    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[2, 6:] = False
    outputs = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    found = JointAttention(HEADS)(outputs, mask if masked else None)
    want = attention(x, mask if masked else None)
    kept = mask if masked else torch.ones_like(mask)
    torch.testing.assert_close(attention.o_proj(found)[kept], want[kept])
    fused = JointAttention(HEADS)([torch.cat(outputs, -1)], mask if masked else None)
    torch.testing.assert_close(fused, found)


def test_joint_attention_with_fewer_key_heads_and_a_causal_mask():
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    found = JointAttention(4, 2, causal=True)([q, k, v])
    for head in range(4):
        cols, kv = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        weights = q[..., cols] @ k[..., kv].transpose(1, 2) / 3**0.5
        weights = weights.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        torch.testing.assert_close(found[..., cols], weights @ v[..., kv])
    with pytest.raises(InvalidInputError, match="kv_heads: expected a divisor of heads"):
        JointAttention(4, 3)
    with pytest.raises(InvalidInputError, match="query, key, value"):
        JointAttention(4)([q, k])


def test_gated_products():
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    want = nn.functional.silu(gate) * up
    torch.testing.assert_close(Gated()([gate, up]), want)
    torch.testing.assert_close(Gated()([torch.cat([gate, up], -1)]), want)
    torch.testing.assert_close(Gated(torch.relu)([gate, up]), torch.relu(gate) * up)


def test_simulation_lasts_as_long_as_the_block():
    model, x = varied(PreNorm()), batches()[0]
    names = [name for group in PRE_NORM for name in group.linears]
    with torch.no_grad():
        want = model(x)
        with simulated(model, names, UniformGrid(2, 8), ActivationGrid(4)):
            assert not torch.allclose(model(x), want)
        assert torch.equal(model(x), want)
        by_hand = copy.deepcopy(model.fc1)
        by_hand.weight.copy_(GRID(model.fc1.weight))
        with simulated(model, ["fc1"], GRID, ActivationGrid(6, "token")):
            torch.testing.assert_close(model.fc1(x), by_hand(ActivationGrid(6, "token")(x)))
        ranges = collect_statistics(model, PRE_NORM, [x])
        grid = ActivationGrid(6, "tensor")
        with simulated(model, names, GRID, grid):
            by_names = model(x)  # each range is that of the tensor that comes, rounded before
        with simulated(model, PRE_NORM, GRID, grid, ranges):
            by_groups = model(x)  # ranges of the float model
        size = float(want.abs().max())
        assert 0 < float((by_groups - by_names).abs().max()) < 0.2 * size
        assert not torch.allclose(by_groups, want)
        with pytest.raises(InvalidInputError, match="statistics: none for 'fc1'"):
            with simulated(model, ["fc1"], None, ActivationGrid(6, "tensor"), {}):
                pass
        with pytest.raises(DTypeError, match="to be a torch"):
            with simulated(model, ["act"], GRID):
                pass


@pytest.mark.parametrize("name, group, block", [("int4-asym", 64, 64), ("int8", -1, 0)])
def test_simulation_is_what_the_integer_kernel_computes(name, group, block):
    linear = nn.Linear(128, 96)
    x = torch.randn(40, 128) * torch.linspace(0.1, 5, 128)
    scheme = Scheme.of(name, group=group)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    model = nn.Sequential(linear)
    with torch.no_grad(), simulated(model, ["0"], scheme, ActivationGrid(8, block or "token")):
        want = model(x)
    got = qmatmul_int8(x, quantize(weight, scheme), bias, act_block=block)
    # (a value on the border of two codes may go either way: a step of one of 128 inputs)
    assert float((got - want).abs().max()) < 5e-3 * float(want.abs().max())
    assert float((got - want).abs().median()) < 1e-5
