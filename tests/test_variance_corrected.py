"""Variance-corrected averaging: worked examples, its two promises, exclusions, policies, errors."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore.aggregation import VarianceCorrected
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from support import DTYPES, EPS, HAS_TORCH, np_dtype, outputs_per_level

CPU_VARIANTS = [v for v, why in _variants.available("affine", "cpu").items() if not why]

FIRST, SECOND = np.float64([[1, 2], [3, 4]]), np.float64([[4, 1], [0, 3]])
OWN = np.float64([[2, 2], [0, 0]])


def node(models, **options) -> VarianceCorrected:
    corrected = VarianceCorrected(**options)
    for model in models:
        corrected.add(model)
    return corrected


def network(rng: np.random.Generator, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A small network: weights, bias, gains and statistics of a normalisation, a counter."""
    make = lambda *shape: rng.standard_normal(shape).astype(np_dtype(dtype))  # noqa: E731
    return {
        "conv.weight": make(8, 3, 3, 3) * np_dtype(dtype).type(0.1),
        "conv.bias": make(8),
        "bn.weight": make(8),
        "bn.running_mean": make(8),
        "bn.running_var": make(8),
        "bn.num_batches_tracked": np.array(rng.integers(100)),
        "fc.weight": make(10, 72),
        "steps": rng.integers(0, 9, (2, 2)),
    }


# ---- by hand -----------------------------------------------------------------------------------

# The average is (2.5, 1.5, 1.5, 3.5), b = (2.25, 1.75, 0.75, 1.75) with mean 1.625 and variance
# 0.296875; the received models have variances 1.25 and 2.5, the own model 1.


@pytest.mark.parametrize(
    ("options", "factor", "corner"),
    [
        ({}, 2.5131234497, (3.195702, 1.939140, -0.573983, 1.939140)),
        ({"convention": "dfl_torch"}, 2.5128563183, (3.195535, 1.939107, -0.573749, 1.939107)),
        ({"target": "self"}, (1 / 0.296875) ** 0.5, None),
        ({"target": "mix"}, ((0.5 + 0.5 * 1.875) / 0.296875) ** 0.5, None),
        ({"unbiased": True}, 2.5131234497, None),  # both variances grow by 4 / 3
        ({"eps": 0.1}, (1.975 / 0.396875) ** 0.5, None),
        ({"ratio": 0.5}, 1 + 1.5131234497 / 2, None),
        ({"ratio": 0.0}, 1.0, (2.25, 1.75, 0.75, 1.75)),
    ],
)
@pytest.mark.parametrize("variant", ["cpu", "reference"])
def test_two_models_by_hand(options, factor, corner, variant):
    corrected = node([FIRST, SECOND], variant=variant, **options)
    assert corrected.count == 2
    np.testing.assert_allclose(corrected.factors(OWN), [factor], rtol=1e-9)
    result = corrected.result(OWN)
    want = 1.625 + factor * (np.float64([2.25, 1.75, 0.75, 1.75]) - 1.625)
    np.testing.assert_allclose(result.ravel(), want, rtol=0, atol=1e-6)
    if corner is not None:
        np.testing.assert_allclose(result.ravel(), corner, rtol=0, atol=1e-6)


def test_the_share_of_the_own_model():
    plain = node([FIRST, SECOND], ratio=0.0, own=0.0).result(OWN)
    np.testing.assert_array_equal(plain, [[2.5, 1.5], [1.5, 3.5]])
    np.testing.assert_array_equal(node([FIRST, SECOND], ratio=0.0, own=1.0).result(OWN), OWN)
    only_own = node([FIRST, SECOND], own=1.0)
    np.testing.assert_allclose(only_own.factors(OWN), (1.875 / 1.0) ** 0.5)


# ---- promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0.0, 0.3])
@pytest.mark.parametrize("target", ["others", "self", "mix"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_mean_stays_and_the_variance_is_the_target(dtype, target, own, rng):
    models = [(rng.standard_normal((60, 70)) * s + 5).astype(dtype) for s in (0.1, 0.2, 0.7)]
    mine = (rng.standard_normal((60, 70)) * 0.4 - 2).astype(dtype)
    result = node(models, own=own, target=target).result(mine).astype(np.float64)
    blend = own * mine.astype(np.float64) + (1 - own) * np.mean(models, axis=0, dtype=np.float64)
    others, mine_alone = np.mean([m.var(dtype=np.float64) for m in models]), mine.var()
    want = {"others": others, "self": mine_alone, "mix": own * mine_alone + (1 - own) * others}
    eps = EPS[dtype]
    np.testing.assert_allclose(result.mean(), blend.mean(), rtol=4 * eps)
    np.testing.assert_allclose(result.var(), want[target], rtol=40 * eps)


def test_averages_of_independent_networks_keep_their_variance():
    rng = np.random.default_rng(2404)
    for k, expected in ((2, 0.502), (4, 0.248), (8, 0.125)):
        models = [rng.normal(0, 0.1, (100, 1000)).astype(np.float32) for _ in range(k)]
        before = np.mean([m.var(dtype=np.float64) for m in models])
        plain = node(models, own=0.0, ratio=0.0).result(models[0])
        kept = node(models, own=0.0)
        assert plain.var(dtype=np.float64) / before == pytest.approx(expected, abs=0.004)
        assert kept.result(models[0]).var(dtype=np.float64) / before == pytest.approx(1, abs=1e-6)
        assert kept.factors(models[0])[0] == pytest.approx(k**0.5, rel=0.01)


def test_models_of_one_start_are_hardly_scaled(rng):
    start = rng.normal(0, 0.1, (100, 100))
    models = [(start + rng.normal(0, 0.01, start.shape)).astype(np.float32) for _ in range(10)]
    factor = node(models).factors(models[0])[0]
    assert 1 < factor < 1.01


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_one_received_model_comes_out_and_equal_models_stay(variant, rng):
    model, other = (rng.standard_normal((9, 5)).astype(np.float32) + 3 for _ in range(2))
    if variant == "triton":
        torch = pytest.importorskip("torch")
        model, other = torch.from_numpy(model), torch.from_numpy(other)
    one = node([model], own=0.0, variant=variant).result(other)
    np.testing.assert_allclose(np.asarray(one), np.asarray(model), rtol=3e-7)
    same = node([model] * 3, own=0.5, variant=variant).result(model)
    np.testing.assert_allclose(np.asarray(same), np.asarray(model), rtol=3e-7)


# ---- what is not rescaled ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["cpu", "reference"])
def test_statistics_and_counters_are_kept_and_vectors_only_averaged(variant, rng):
    models, mine = [network(rng) for _ in range(3)], network(rng)
    corrected = node(models, variant=variant)
    result, factors = corrected.result(mine), dict(zip(mine, corrected.factors(mine), strict=True))
    assert list(result) == list(mine)
    for name in mine:
        x = result[name]
        assert x.dtype == mine[name].dtype and x.shape == mine[name].shape
        if any(part in name for part in ("running", "num_batches", "steps")):
            assert x.tobytes() == mine[name].tobytes() and x is not mine[name]
            assert factors[name] == 1
            continue
        blend = 0.5 * mine[name] + 0.5 * np.mean([m[name] for m in models], axis=0)
        if x.ndim < 2:
            np.testing.assert_allclose(x, blend, rtol=1e-6, atol=1e-6)
            assert factors[name] == 1
        else:
            want = np.mean([m[name].var(dtype=np.float64) for m in models])
            np.testing.assert_allclose(x.var(dtype=np.float64), want, rtol=1e-5)
            assert factors[name] > 1.2


def test_exclusions_follow_the_options(rng):
    models, mine = [network(rng) for _ in range(3)], network(rng)
    for convention, wide in (("dfl2", False), ("dfl_torch", True)):
        preset = VarianceCorrected(convention=convention)
        assert (preset.include_1d, preset.unbiased) == (wide, wide)
        assert preset.eps == (1e-4 if wide else 0)
        factors = dict(zip(mine, node(models, convention=convention).factors(mine), strict=True))
        assert (factors["conv.bias"] > 1.1) == wide and factors["bn.running_mean"] == 1
    every = node(models, include_1d=True, keep=()).factors(mine)
    changed = dict(zip(mine, every != 1, strict=True))
    assert not changed.pop("bn.num_batches_tracked") and not changed.pop("steps")
    assert all(changed.values())
    assert VarianceCorrected(convention="dfl_torch", eps=0.5).eps == 0.5


def test_layers_without_variance_are_not_scaled():
    layers = [np.zeros((3, 4), np.float32), np.full((5, 2), 3.5), np.ones((1, 1)), np.ones((0, 2))]
    for options in ({}, {"unbiased": True}, {"convention": "dfl_torch"}, {"eps": 1e-4}):
        corrected = node([layers, layers], **options)
        np.testing.assert_array_equal(corrected.factors(layers), 1)
        for x, y in zip(layers, corrected.result(layers), strict=True):
            np.testing.assert_array_equal(y, x)
    single = node([np.float64([[4]]), np.float64([[2]])])
    np.testing.assert_array_equal(single.result(np.float64([[1]])), [[2]])
    # biases that start as zeros, received from nodes that have moved
    moved = node([np.float64([[0, 1]])] * 2, own=1.0)
    np.testing.assert_array_equal(moved.result(np.zeros((1, 2))), [[0, 0]])


# ---- variants, bits, kinds ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_agree(dtype, rng):
    models, mine = [network(rng, dtype) for _ in range(2)], network(rng, dtype)
    want = node(models, target="mix", variant="reference").result(mine)
    got = node(models, target="mix", variant="cpu").result(mine)
    for name in mine:
        a, b = (v[name].astype(np.float64) for v in (got, want))
        np.testing.assert_allclose(a, b, rtol=3 * EPS[dtype], atol=EPS[dtype])


BITS = """
import hashlib, numpy as np, flcore
from flcore.aggregation import VarianceCorrected
rng = np.random.default_rng(3)
models = [[rng.standard_normal((30, 7)), rng.standard_normal((400, 500)).astype(np.float32),
           rng.standard_normal((40, 41)).astype(np.float16)] for _ in range(4)]
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    for nonfinite in ("raise", "propagate"):
        node = VarianceCorrected(target="mix", nonfinite=nonfinite)
        for m in models[:3]:
            node.add(m)
        result = b"".join(x.tobytes() for x in node.result(models[3]))
        print(hashlib.sha256(result).hexdigest())
"""


def test_bits_do_not_depend_on_level_threads_or_policy():
    printed = outputs_per_level(BITS)
    assert len(set("".join(printed.values()).split())) == 1


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_torch_models_come_back_as_torch_models(variant, rng):
    import torch

    def tensors():
        weight = torch.from_numpy(rng.standard_normal((12, 30))).float()
        return {"w": weight.requires_grad_(), "half": weight.detach().half(), "n": torch.tensor(3)}

    models, mine = [tensors() for _ in range(2)], tensors()
    arrays = [{k: v.detach().numpy() for k, v in m.items()} for m in (*models, mine)]
    result = node(models, variant=variant).result(mine)
    want = node(arrays[:2], variant=variant if variant != "triton" else None).result(arrays[2])
    for name, x in result.items():
        assert x.dtype == mine[name].dtype and not x.requires_grad
        np.testing.assert_array_equal(x.numpy(), want[name])


@pytest.mark.gpu
def test_gpu_gives_the_bits_of_the_cpu(rng):
    import torch

    layers = [[torch.from_numpy(rng.standard_normal((300, 200))).float()] for _ in range(4)]
    there = [[x.cuda() for x in model] for model in layers]
    want = node(layers[:3], target="mix").result(layers[3])
    got = node(there[:3], target="mix").result(there[3])
    assert torch.equal(got[0].cpu(), want[0])


def test_models_can_be_dropped_and_the_accumulator_starts_again(rng):
    corrected = VarianceCorrected(include_1d=True)
    model = rng.standard_normal(50).astype(np.float32)
    corrected.add(model)
    model[:] = np.nan  # not looked at again
    first = corrected.result(np.zeros(50, np.float32))
    assert np.isfinite(first).all() and corrected.nbytes == 200
    again = corrected.result(np.zeros(50, np.float32))
    np.testing.assert_array_equal(first, again)  # result changes nothing
    other = rng.standard_normal(50).astype(np.float32)
    corrected.reset().add(other)
    assert corrected.count == 1
    np.testing.assert_array_equal(
        corrected.result(other), node([other], include_1d=True).result(other)
    )


@pytest.mark.parametrize("policy", ["raise", "propagate"])
def test_the_result_may_go_into_the_own_model(policy, rng):
    models, mine = [network(rng) for _ in range(2)], network(rng)
    corrected = node(models, nonfinite=policy)
    want = corrected.result(mine)
    strided = {
        k: np.repeat(np.zeros_like(v), 2).reshape(*v.shape, 2)[..., 0] for k, v in mine.items()
    }
    kept = dict(mine)
    assert corrected.result(mine, out=strided) is strided
    assert corrected.result(mine, out=mine) is mine
    for name, x in mine.items():
        assert x is kept[name]
        np.testing.assert_array_equal(x, want[name])
        np.testing.assert_array_equal(strided[name], want[name])


# ---- non-finite values -------------------------------------------------------------------------


def test_bad_models_are_refused_left_out_or_let_through():
    bad = FIRST.copy()
    bad[1, 1] = np.inf
    strict = node([FIRST])
    with pytest.raises(NonFiniteError, match=r"model 1.*not added") as caught:
        strict.add(bad)
    assert caught.value.clients == (1,) and strict.count == 1
    lenient = node([FIRST, bad, SECOND], nonfinite="exclude")
    assert (lenient.count, lenient.excluded) == (2, 1)
    for corrected in (strict.add(SECOND), lenient):
        np.testing.assert_array_equal(corrected.result(OWN), node([FIRST, SECOND]).result(OWN))
    through = node([FIRST, bad], nonfinite="propagate").result(OWN)
    assert np.isnan(through).all()  # a layer without a variance has no factor


def test_a_bad_own_model_is_named_and_out_is_untouched():
    mine, out = {"w": OWN.copy()}, {"w": np.full((2, 2), 7.0)}
    mine["w"][0, 0] = np.nan
    for target in ("others", "self"):
        with pytest.raises(NonFiniteError, match=r"own\['w'\]"):
            node([{"w": FIRST}], target=target).result(mine, out=out)
    assert (out["w"] == 7).all()
    # not read without a share
    assert np.isfinite(node([{"w": FIRST}], own=0.0).result(mine)["w"]).all()


def test_overflow_is_named():
    big = np.float32([[3e38, -3e38]])
    with pytest.raises(NonFiniteError, match="overflows"):
        node([big]).add(big)
    signs = np.float16([[1, -1, 1, -1], [1, 1, -1, -1]]) * np.float16(6e4)
    half = node([signs[:1], signs[1:]], own=0.0)  # the average (6e4, 0, 0, -6e4) grows by sqrt(2)
    with pytest.raises(NonFiniteError, match="overflows the dtype"):
        half.result(signs[:1])


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VarianceCorrected(own=1.5), InvalidInputError, "own"),
        (lambda: VarianceCorrected(ratio=1.01), InvalidInputError, "ratio"),
        (lambda: VarianceCorrected(eps=-1), InvalidInputError, "eps"),
        (lambda: VarianceCorrected(target="all"), InvalidInputError, "target.*others"),
        (lambda: VarianceCorrected(convention="paper"), InvalidInputError, "convention.*dfl2"),
        (lambda: VarianceCorrected(nonfinite="skip"), InvalidInputError, "nonfinite"),
        (lambda: VarianceCorrected().result(OWN), InvalidInputError, "no model was added"),
        (lambda: node([FIRST]).reset().result(OWN), InvalidInputError, "no model was added"),
        (lambda: node([FIRST[0]]), InvalidInputError, "include_1d"),
        (lambda: node([FIRST, OWN[:1]]), InvalidInputError, r"model.*\(2, 2\)"),
        (lambda: node([FIRST, FIRST.astype("f4")]), DTypeError, "model.*float64"),
        (lambda: node([FIRST]).result([OWN]), DTypeError, "own"),
        (lambda: node([FIRST]).result(OWN.astype("f4")), DTypeError, "own.*float64"),
        (lambda: node([FIRST]).result(OWN, out=OWN[:1].copy()), InvalidInputError, "out"),
        (lambda: node([FIRST.astype(complex)]), DTypeError, "complex"),
        (lambda: node([FIRST], variant="fpga"), InvalidInputError, "variant"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
