"""AWQ: the worked example, scale search, clipping, and what both do to the output error."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import DTypeError, InvalidInputError
from flcore.quantization import Scheme
from flcore.quantization.preparation import (
    ScalingGroup,
    UniformGrid,
    awq,
    awq_scale,
    clip_linear,
    clip_search,
    collect_statistics,
    gram,
    gram_loss,
    merge_searches,
    merge_statistics,
    search_scales,
    simulated,
)
from preparation_models import LLAMA, PRE_NORM, PRE_NORM_JOINT, Llama, PreNorm, batches, varied

W = [[0.10, 0.9, -0.7, 0.4]]
X = [[20, 0.5, -0.5, 1], [-16, 1, 0.5, -1]]
LOSSES = [3.1108418, 2.9980571, 1.4077133, 0.5262853, 0.1126488, 0.0004703, 0.0759086]
THREE = UniformGrid(3, 4)


def one_linear(weight=W, dtype=torch.float64):
    """Return a linear with nothing in front of it, and its group."""
    weight = torch.tensor(weight, dtype=dtype)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    linear.weight.data = weight
    model = torch.nn.Sequential(torch.nn.Identity(), linear)
    return model, [ScalingGroup("0", "1")]


# ---- the worked example ------------------------------------------------------------------------


@pytest.mark.parametrize("inspect", [None, "1", lambda outputs, mask: outputs[0]])
def test_losses_of_the_worked_example(inspect):
    model, _ = one_linear()
    x = torch.tensor(X, dtype=torch.float64)
    assert model(x).flatten().tolist() == pytest.approx([3.2, -1.45])
    found = search_scales(model, [ScalingGroup("0", "1", inspect=inspect)], [x], THREE)[0]
    assert found.mean_abs.tolist() == [18, 0.75, 0.5, 1]
    assert found.losses[:7] == pytest.approx(LOSSES, abs=6e-8)
    assert found.losses[10] == pytest.approx(0.0629338, abs=6e-8)
    assert found.losses[15] == pytest.approx(0.0010089, abs=6e-8)
    assert len(found.losses) == 20 and found.exponent == 0.25
    assert found.scale.tolist() == pytest.approx([1.565085, 0.707107, 0.638943, 0.759836], abs=6e-7)
    s = found.scale
    weight = torch.tensor(W, dtype=torch.float64)
    rounded = THREE(weight * s) / s
    expected = [0.0989135, 0.8757265, -0.726863, 0.4074777]
    assert rounded.flatten().tolist() == pytest.approx(expected, abs=6e-8)
    plain = [0, 0.914286, -0.685714, 0.457143]
    assert THREE(weight).flatten().tolist() == pytest.approx(plain, abs=6e-7)


def test_the_worked_example_by_a_scheme():
    model, groups = one_linear(dtype=torch.float32)
    scheme = Scheme.of("awq", bits=3, group=-1, scale_dtype="float32")
    found = search_scales(model, groups, [torch.tensor(X)], scheme)[0]
    assert found.losses[:7] == pytest.approx(LOSSES, rel=1e-3, abs=1e-6)
    assert found.exponent == 0.25


def test_clipping_of_the_worked_example():
    weight = torch.tensor([[1, 0.3, -0.26, 0.14]], dtype=torch.float64)
    x = torch.tensor([[0.1, 2, 1, -1.5], [-0.05, 1, -2, 1]], dtype=torch.float64)
    errors = []
    for step in range(8):
        limit = 1 - step / 20
        delta = THREE(weight.clamp(-limit, limit)) - weight
        errors.append(gram_loss(delta, gram(x), 2))
    expected = [0.0130, 0.034602, 0.023817, 0.015408, 0.009375, 0.005717, 0.004435, 0.005528]
    assert errors == pytest.approx(expected, abs=6e-7)
    found = clip_search(weight, x, THREE)
    assert float(found.limit) == pytest.approx(0.70) and float(found.share) == pytest.approx(0.7)
    assert (found.before, found.after) == pytest.approx((0.0130, 0.004435), abs=6e-7)
    linear = torch.nn.Linear(4, 1, dtype=torch.float64)
    linear.weight.data = weight
    clip_linear(linear, x, THREE)
    assert linear.weight.tolist() == [pytest.approx([0.7, 0.3, -0.26, 0.14])]
    rounded = THREE(linear.weight.detach()).flatten().tolist()
    assert rounded == pytest.approx([0.685714, 0.274286, -0.274286, 0.137143], abs=6e-7)


# ---- scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.05, 0.5, 0.95])
def test_scales_are_normalised_and_do_not_depend_on_the_unit_of_x(exponent):
    mean = torch.tensor([18, 0.75, 0.5, 1, 3.3])
    scale = awq_scale(mean, exponent)
    assert float(scale.max() * scale.min()) == pytest.approx(1, rel=1e-12)
    torch.testing.assert_close(awq_scale(mean * 1000, exponent), scale, rtol=1e-7, atol=0)
    if exponent == 0:
        assert scale.tolist() == [1] * 5


def test_small_statistics_stop_at_the_floor():
    scale = awq_scale(torch.tensor([0.0, 1e-9, 1.0, 100.0]), 0.5)
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert float(scale[3] / scale[0]) == pytest.approx(10 / 1e-4)
    assert awq_scale(torch.zeros(3), 0.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("groups", [PRE_NORM, PRE_NORM_JOINT], ids=["module", "joint"])
def test_the_first_loss_is_plain_rounding_and_the_best_is_not_above_it(groups):
    model, data = varied(PreNorm()), batches()
    grid = UniformGrid(3, 8)
    for search in search_scales(model, groups, data, grid, progress=False):
        assert min(search.losses) == search.losses[search.best] <= search.losses[0]
        assert search.best == search.losses.index(min(search.losses))
    # module: the whole attention, by hand
    found = search_scales(model, PRE_NORM[:1], data, grid)[0]
    with torch.no_grad():
        want = [model.attn(model.norm1(x)) for x in data]
        with simulated(model, PRE_NORM[0].linears, grid):
            got = [model.attn(model.norm1(x)) for x in data]
    loss = float((torch.cat(got) - torch.cat(want)).square().mean())
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)


def test_a_very_fine_grid_has_no_loss_whatever_the_scale():
    model, data = varied(PreNorm()), batches()
    coarse = search_scales(model, PRE_NORM, data, UniformGrid(3, 8))
    for search, other in zip(
        search_scales(model, PRE_NORM, data, UniformGrid(16, 8)), coarse, strict=True
    ):
        assert max(search.losses) < 1e-6 * other.losses[0]


@pytest.mark.parametrize("tokens", [30, 400], ids=["direct", "gram"])
def test_gram_loss_is_the_loss_of_a_forward(tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 48, generator=generator) * torch.rand(48, generator=generator) * 9
    linear = torch.nn.Linear(48, 20)
    model = torch.nn.Sequential(torch.nn.Identity(), linear)
    grid = UniformGrid(4, 16)
    by_gram = search_scales(model, [ScalingGroup("0", "1")], [x], grid)[0]
    by_forward = search_scales(model, [ScalingGroup("0", "1", inspect="1")], [x], grid)[0]
    assert by_gram.losses == pytest.approx(by_forward.losses, rel=1e-5)
    delta = grid(linear.weight.detach()) - linear.weight.detach()
    loss = float((x @ delta.T).square().mean())
    assert gram_loss(delta, gram(x), tokens) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "copies", "constant"])
def test_gram_loss_of_channels_that_depend_on_each_other(kind):
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    if kind == "zeros":
        x[:, 3:9] = 0
    elif kind == "copies":
        x[:, 16:] = x[:, :16]
    else:
        x = x[:1].repeat(200, 1) * 7
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(32, 20))
    grid = UniformGrid(4, 16)
    by_gram = search_scales(model, [ScalingGroup("0", "1")], [x], grid)[0]
    by_forward = search_scales(model, [ScalingGroup("0", "1", inspect="1")], [x], grid)[0]
    assert by_gram.losses == pytest.approx(by_forward.losses, rel=1e-5)
    nothing = search_scales(model, [ScalingGroup("0", "1")], [0 * x], grid)[0]
    assert max(nothing.losses) == 0


def test_searching_leaves_the_model_alone():
    model, data = varied(PreNorm()).train(), batches()
    before = copy.deepcopy(model.state_dict())
    search_scales(model, PRE_NORM, data, UniformGrid(3, 8), progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and model.attn.training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_groups_searched_together_or_apart_give_the_same():
    model, data = varied(PreNorm()), batches()
    grid = UniformGrid(3, 8)
    one, all_ = (search_scales(model, PRE_NORM, iter(data), grid, at_once=n) for n in (1, 9))
    assert [s.losses for s in one] == [s.losses for s in all_]


# ---- the whole method --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, groups", [(PreNorm, PRE_NORM), (Llama, LLAMA)], ids=["prenorm", "llama"]
)
def test_folding_leaves_the_float_function_and_lowers_the_error(make, groups):
    model, data, fresh = varied(make()), batches(), batches(seed=5)
    names = [name for group in groups for name in group.linears]
    grid = UniformGrid(3, 8)
    with torch.no_grad():
        want = [torch.cat([model(x) for x in xs]) for xs in (data, fresh)]
        with simulated(model, names, grid):
            plain = [torch.cat([model(x) for x in xs]) for xs in (data, fresh)]
    report = awq(model, groups, data, grid, clip=False, progress=False)
    with torch.no_grad():
        for xs, y in zip((data, fresh), want, strict=True):
            moved = (torch.cat([model(x) for x in xs]) - y).abs().max()
            assert float(moved) <= 1e-5 * float(y.abs().max())
        with simulated(model, names, grid):
            got = [torch.cat([model(x) for x in xs]) for xs in (data, fresh)]
    for y, before, after in zip(want, plain, got, strict=True):
        assert (after - y).square().mean() < 0.8 * (before - y).square().mean()
    assert "alpha" in str(report) and not report.clips
    assert any(float(s.exponent) > 0 for s in report.scales)


def planted(seed):
    """Return two layers whose inputs have 5 % of channels times 20, with data and held-out data."""
    generator = torch.Generator().manual_seed(seed)
    boost = torch.ones(128)
    boost[torch.randperm(128, generator=generator)[:6]] = 20
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
    )
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.weight.normal_(std=0.05)
        model[1].weight[torch.randperm(256, generator=generator)[:13]] *= 20
    held, used = (torch.randn(n, 128, generator=generator) * boost for n in (400, 600))
    return model, [used], held


def test_order_of_methods_on_planted_outliers():
    """At 3 bits: AWQ with clipping <= AWQ <= clipping <= plain rounding.

    The two in the middle are close: they are compared over all seeds.
    """
    grid, groups = UniformGrid(3, 64), [ScalingGroup("0", "1"), ScalingGroup("1", "3")]
    methods = ((20, True), (20, False), (1, True), (1, False))
    errors = torch.zeros(2, 3, len(methods))
    for seed in range(3):
        for column, (alphas, clip) in enumerate(methods):
            model, data, held = planted(seed)
            with torch.no_grad():
                want = [model(x) for x in (*data, held)]
            awq(model, groups, data, grid, clip=clip, grid=alphas, progress=False)
            with torch.no_grad(), simulated(model, ["1", "3"], grid):
                for row, (x, y) in enumerate(zip((*data, held), want, strict=True)):
                    errors[row, seed, column] = (model(x) - y).square().mean()
    for total in errors.sum(1):
        assert total.tolist() == sorted(total.tolist())
    assert (errors[..., 0] < 0.95 * errors[..., 1:].amin(2)).all()
    assert (errors[..., 1] < 0.5 * errors[..., 3]).all()


def test_queries_and_keys_are_not_clipped():
    model, data = varied(PreNorm()), batches()
    report = awq(model, PRE_NORM, data, UniformGrid(3, 8), progress=False)
    assert set(report.clips) == {"attn.v_proj", "attn.o_proj", "fc1", "fc2"}
    for clip in report.clips.values():
        assert clip.after <= clip.before and 0.55 <= float(clip.share.min()) <= 1
    assert (model.fc1.weight.abs().reshape(48, -1, 8).amax(2) <= report.clips["fc1"].limit).all()
    model = varied(PreNorm())
    report = awq(model, PRE_NORM, data, UniformGrid(3, 8), clip=lambda n: "q" in n, progress=False)
    assert set(report.clips) == {"attn.q_proj"}


def test_clipping_takes_short_groups_and_one_token():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 21, generator=generator)
    x = torch.randn(1, 21, generator=generator)
    found = clip_search(weight, x, UniformGrid(3, 8))
    assert found.limit.shape == (5, 3)
    whole = clip_search(weight[:, 16:], x[:, 16:], UniformGrid(3, -1))
    torch.testing.assert_close(found.limit[:, 2:], whole.limit)


@pytest.mark.parametrize("scheme", ["int4-asym", "int3", "nf4", UniformGrid(3, 16)])
def test_any_scheme_of_weights(scheme):
    model, data = varied(PreNorm(32)), batches(width=32)
    report = awq(model, PRE_NORM, data, scheme, progress=False)
    for search in report.scales:
        assert min(search.losses) <= search.losses[0]


# ---- several clients ---------------------------------------------------------------------------


def test_clients_find_the_scales_of_their_data_pooled():
    model, data = varied(PreNorm()), batches(count=4)
    grid = UniformGrid(3, 8)
    shares = (data[:1], data[1:])
    merged = merge_statistics([collect_statistics(model, PRE_NORM, d) for d in shares])
    pooled = collect_statistics(model, PRE_NORM, data)
    for name, statistics in pooled.items():
        torch.testing.assert_close(merged[name].mean_abs, statistics.mean_abs, rtol=1e-14, atol=0)
    found = [search_scales(model, PRE_NORM, d, grid, statistics=merged) for d in shares]
    together = search_scales(model, PRE_NORM, data, grid, statistics=merged)
    for a, b in zip(merge_searches(found), together, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5) and a.elements == b.elements
        assert a.exponent == b.exponent and torch.equal(a.scale, b.scale)
    with pytest.raises(InvalidInputError, match="statistics must be the same"):
        merge_searches([search_scales(model, PRE_NORM, d, grid) for d in shares])
    with pytest.raises(InvalidInputError, match="expected 4 groups, got 3"):
        merge_searches([found[0], found[1][:3]])
    with pytest.raises(InvalidInputError, match="at least one"):
        merge_searches([])


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"weights": 4}, DTypeError, "weights: expected a flcore.quantization.Scheme"),
        ({"weights": "int5"}, InvalidInputError, "scheme"),
        ({"grid": 0}, InvalidInputError, "grid: expected an integer of at least 1"),
        ({"at_once": 0}, InvalidInputError, "at_once"),
        ({"statistics": {}}, InvalidInputError, "statistics: expected those of 24 channels"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        search_scales(PreNorm(), PRE_NORM, batches(), **{"weights": UniformGrid(4, 8), **options})


def test_one_scale_for_a_tensor_is_not_clipped():
    model, data = varied(PreNorm()), batches()
    with pytest.raises(InvalidInputError, match="pass clip=False"):
        awq(model, PRE_NORM, data, UniformGrid(4, 0), progress=False)
    awq(model, PRE_NORM, data, UniformGrid(4, 0), clip=False, progress=False)
    with pytest.raises(InvalidInputError, match="by group or row"):
        clip_search(torch.ones(2, 4), torch.ones(3, 4), UniformGrid(4, 0))
    with pytest.raises(InvalidInputError, match=r"x: expected \[T, 4\]"):
        clip_search(torch.ones(2, 4), torch.ones(0, 4), UniformGrid(4, 4))


def test_calibration_data_that_is_not_finite():
    data = batches()
    data[1][0, 0, 0] = float("nan")
    with pytest.raises(InvalidInputError, match="not finite"):
        search_scales(varied(PreNorm()), PRE_NORM, data, UniformGrid(4, 8))
    merged = collect_statistics(varied(PreNorm()), PRE_NORM, batches())
    for group in (PRE_NORM[:1], PRE_NORM[2:3]):
        with pytest.raises(InvalidInputError, match="not finite"):
            search_scales(varied(PreNorm()), group, data, UniformGrid(4, 8), statistics=merged)
