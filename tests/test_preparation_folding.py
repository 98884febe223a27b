"""Preparation: scales folded into what precedes, functions of several linears, simulation."""

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
    Gated,
    JointAttention,
    Migrated,
    ScalingGroup,
    UniformGrid,
    awq,
    collect_statistics,
    fold_scales,
    os_plus,
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
