"""Where a server step reads and writes: odd memory, aliases, structures, int8 rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from flcore.errors import NonFiniteError
from flcore.ops import Step, combine, combine_step
from flcore.ops._step import KINDS
from server_problem import flat, problem
from support import Guarded, np_dtype, unaligned

NATIVE = ("cpu", "reference")

# ---- buffers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_inputs_and_guarded_outputs(kind, rng):
    for size, model in itertools.product((1, 33, 4099), ("float32", "float64", "bfloat16")):
        case = problem(rng, size, "float16", model, kind)
        step, names = Step(kind, lr=0.1), Step(kind).states
        want = combine_step(step=step, **case, cast="float16")
        shifted = {k: unaligned(x, 1) for k, x in case.items() if k not in ("updates", "weights")}
        shifted["updates"] = [unaligned(r, 3) for r in case["updates"]]
        out = {"out": np_dtype(model), "cast": np.dtype(np.float16)}
        out |= {f"{s}_out": case[s].dtype for s in names}
        for offset in (0, 1, 3):
            guarded = {k: Guarded(size, dtype, offset) for k, dtype in out.items()}
            given = {k: g.array for k, g in guarded.items()}
            got = combine_step(step=step, weights=case["weights"], **shifted, **given)
            assert got.model is given["out"] and got.cast is given["cast"]
            assert flat(got) == flat(want)
            for g in guarded.values():
                g.check()


def test_results_may_go_where_the_inputs_are(rng):
    case = problem(rng, 5000, "float32", "float32", "adam")
    want = combine_step(step=Step("adam"), **case)
    own = {k: x.copy() for k, x in case.items() if k in ("model", "m", "v")}
    rest = {"updates": case["updates"], "weights": case["weights"], "step": Step("adam")}
    given = {"out": own["model"], "m_out": own["m"], "v_out": own["v"]}
    got = combine_step(**rest, **own, **given)
    assert got.model is own["model"] and flat(got) == flat(want)
    strided = np.zeros(10_000, np.float32)[::2]
    fresh = {k: case[k] for k in own}
    assert combine_step(**rest, **fresh, out=strided).model is strided
    np.testing.assert_array_equal(strided, want.model)


def test_read_only_and_strided_inputs(rng):
    case = problem(rng, 600, "float32", "float32", "yogi")
    want = combine_step(step=Step("yogi"), **case)
    for k in ("model", "m", "v"):
        case[k].flags.writeable = False
        spread = np.repeat(case[k], 2)[::2]
        assert flat(combine_step(step=Step("yogi"), **{**case, k: spread})) == flat(want)


def test_structures_and_mixed_precision_layers(rng):
    model = {"w": np.ones((3, 4), np.float32), "b": np.ones(4)}
    update = {"w": np.ones((3, 4), np.float16), "b": np.ones(4, np.float32)}
    got = combine_step([update, update], [1, 1], model, Step("adam", tau=1.0), cast="float16")
    for part in (got.model, got.m, got.v, got.cast):
        assert list(part) == ["w", "b"] and part["w"].shape == (3, 4)
    assert [got.m[k].dtype for k in model] == [np.float32, np.float64]
    assert [got.cast[k].dtype for k in model] == [np.float16] * 2
    assert combine_step([[]], [1], [], Step("adam")).m == []


def test_int8_updates_with_scales(rng):
    rows = [rng.integers(-128, 128, 700).astype(np.int8) for _ in range(3)]
    w, weights, scales = rng.random(700).astype(np.float32), [1.0, 2.0, -1.0], [0.1, 0.2, 0.3]
    d = combine(rows, weights, scales=scales)
    for variant in NATIVE:
        got = combine_step(rows, weights, w, Step("adam"), scales=scales, variant=variant)
        want = combine_step([d], [1.0], w, Step("adam"), variant=variant)
        np.testing.assert_allclose(got.model, want.model, rtol=1e-5)
    with pytest.raises(NonFiniteError, match=r"updates\[2\]"):
        combine_step(rows, weights, w, Step("adam"), scales=[0.1, 0.2, np.nan])
