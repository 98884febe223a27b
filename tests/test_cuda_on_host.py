"""select.cu and gram.cu on a machine without a GPU: the kernels compiled as C++, thread by thread.

tests/cuda_on_host stands in for the CUDA runtime. What runs here is everything but the hardware:
the Python variant, the binding, the launcher and the threads of the kernel, with each order of the
threads between two barriers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from flcore import _arrays, _native
from flcore.errors import InvalidInputError
from flcore.ops.select import MEDIANS, parse_mix
from flcore.reference import gram as gram_reference
from flcore.reference.select import OPS
from host_library import shared
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.slow
TYPES = {name: getattr(torch, name) for name in _arrays.DTYPE_CODES}
# all networks in registers, then columns of shared memory: runs of 32 whole and cut short
COUNTS = (*range(1, 34), 40, 63, 64, 65, 80, 97, 128, 129, 200)


@pytest.fixture(scope="module")
def library() -> tuple[ModuleType, Callable[[int, bool], None]]:
    """The module and the function that sets multiprocessors and the order of the threads."""
    return shared()


@pytest.fixture(params=["ascending", "descending"])
def ops(request, library, monkeypatch) -> tuple[ModuleType, ModuleType]:
    """The Python variants of select and gram, bound to the library."""
    module, configure = library
    descending = request.param == "descending"
    configure(2 if descending else 1, descending)
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_arrays, "queue", lambda device: (0, 0))
    return tuple(importlib.import_module(f"flcore.ops._{op}_cuda") for op in ("select", "gram"))


def views(rows):
    return [[_arrays.view(x) for x in row] for row in rows]


def clients(rng, n, sizes, dtypes=tuple(TYPES), ties=False):
    """n rows of layers of all dtypes; `ties` draws from few values."""
    rows = []
    for _ in range(n):
        row = [rng.standard_normal(size) for size in sizes]
        if ties:
            row = [np.round(2 * x) / 2 for x in row]
        rows.append(
            [torch.from_numpy(x).to(TYPES[dtypes[j % len(dtypes)]]) for j, x in enumerate(row)]
        )
    return rows


# ---- select ------------------------------------------------------------------------------------


def run(function, rows, out=None, *, median="average", f=0, keep=1, mix=None, propagate=False, op):
    layers = [torch.full_like(x, 7) for x in rows[0]] if out is None else out
    seen = views(rows)
    flags = function(
        seen,
        layers=seen[0],
        op=op,
        median=median,
        f=f,
        keep=keep,
        mix=mix,
        propagate=propagate,
        out=[_arrays.view(x) for x in layers],
    )
    return flags, layers


def assert_same(got, want, what=None):
    """The same bits; any NaN is as good as another."""
    for a, b in zip(got, want, strict=True):
        nan = a.isnan()
        assert torch.equal(nan, b.isnan()), what
        assert torch.equal(a[~nan].view(torch.uint8), b[~nan].view(torch.uint8)), what


def cpu_select():
    if not hasattr(_native.core, "select"):
        pytest.skip("this build has no select on the CPU")
    from flcore.ops import select as module  # noqa: F401  (the function of that name hides it)

    return sys.modules["flcore.ops.select"]._select_cpu


@pytest.mark.parametrize("ties", [False, True])
def test_select_has_the_bits_of_the_cpu_kernel(ops, ties, rng):
    for n in COUNTS:
        sizes = (7, 301, 33, 1030) if n in (3, 16, 17, 32) else (5, 67, 9, 140)
        rows = clients(rng, n, sizes, ties=ties)
        f, keep = int(rng.integers(0, (n + 1) // 2)), int(rng.integers(1, n + 1))
        for op in OPS:
            for median in MEDIANS:
                options = {"op": op, "median": median, "f": f, "keep": keep}
                flags, got = run(ops[0].select, rows, **options)
                assert flags == 0
                assert_same(got, run(cpu_select(), rows, **options)[1], (n, options))


def test_select_of_mixed_rows(ops, rng):
    for n, m in ((3, 2), (10, 10), (20, 17), (7, 40), (50, 33)):
        matrix = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.5)
        matrix[0] = 0
        matrix[:, 1] = 0  # a row nobody reads
        rows = clients(rng, n, (9, 150, 33, 70))
        for layer in rows[1]:
            layer[3] = float("nan")
        for op in OPS:
            options = {"op": op, "f": (m - 1) // 2, "keep": (m + 1) // 2}
            options["mix"] = parse_mix(matrix, n)
            flags, got = run(ops[0].select, rows, **options)
            assert flags == 0
            assert_same(got, run(cpu_select(), rows, **options)[1], (n, m, op))
    nothing = parse_mix(np.zeros((2, 3)), 3)
    assert_same(run(ops[0].select, rows[:3], op="median", mix=nothing)[1][1:2], [torch.zeros(150)])


def test_select_at_every_alignment_and_inside_guards(ops, rng):
    for n in (3, 12, 30, 35):  # four, two, one coordinate a thread; columns
        for offset in (0, 1, 2, 3):
            rows = [[x[offset:] for x in row] for row in clients(rng, n, (20, 1045, 600, 601))]
            guarded = [torch.full((len(x) + 64,), 7, dtype=x.dtype) for x in rows[0]]
            out = [g[32 + offset : 32 + offset + len(x)] for g, x in zip(guarded, rows[0])]  # noqa: B905
            run(ops[0].select, rows, out, op="trimmed_mean", f=1)
            assert_same(out, run(cpu_select(), rows, op="trimmed_mean", f=1)[1], (n, offset))
            for g, x in zip(guarded, out, strict=True):
                assert (g[: 32 + offset] == 7).all() and (g[32 + offset + len(x) :] == 7).all()


@pytest.mark.parametrize("n", [5, 40])
def test_select_where_out_is_an_input(ops, n, rng):
    rows = clients(rng, n, (100, 3000))
    want = run(cpu_select(), rows, op="near_median", keep=3)[1]
    assert_same(run(ops[0].select, rows, rows[1], op="near_median", keep=3)[1], want)


@pytest.mark.parametrize("n", [4, 60])
def test_select_of_more_layers_than_one_launch_takes(ops, n, rng):
    rows = clients(rng, n, [int(k) for k in rng.integers(0, 4, 300)])
    assert_same(run(ops[0].select, rows, op="median")[1], run(cpu_select(), rows, op="median")[1])


@pytest.mark.parametrize("n", [5, 30, 40])
def test_select_of_non_finite_values(ops, n, rng):
    for dtype in TYPES:
        for op in OPS:
            rows = clients(rng, n, (50,), (dtype,))
            rows[1][0][[3, 7]] = float("inf")
            rows[2][0][[3, 8]] = -float("inf")
            assert run(ops[0].select, rows, op=op, f=1, keep=n - 1)[0] == 1
            rows[0][0][[0, 3, 49]] = float("nan")
            options = {"op": op, "f": 1, "keep": n - 1, "propagate": True}
            flags, got = run(ops[0].select, rows, **options)
            assert flags == 0 and got[0][[0, 3, 49]].isnan().all()
            assert_same(got, run(cpu_select(), rows, **options)[1], (dtype, op))


def test_select_of_many_rows_takes_fewer_threads_a_block(ops, rng):
    rows = clients(rng, 1024, (3, 40), ("float64", "float32"))
    assert_same(
        run(ops[0].select, rows, op="trimmed_mean", f=100)[1],
        run(cpu_select(), rows, op="trimmed_mean", f=100)[1],
    )
    with pytest.raises(InvalidInputError, match="at most 1024 client rows"):
        run(ops[0].select, [*rows, rows[0]], op="median")


# ---- gram --------------------------------------------------------------------------------------


def compare(function, rows, wide, segments=None, offset=0.0):
    seen = views(rows)
    segments = segments or [list(range(len(rows[0])))]
    options = {"layers": seen[0], "wide": wide, "segments": segments}
    for kind in gram_reference.KINDS:
        got = function(seen, kind=kind, **options)
        want = gram_reference.gram(seen, kind=kind, **options)
        assert got.shape == want.shape and got.dtype == np.float64
        size = np.abs(want) if kind == "distances" else np.abs(want).max() + 1e-300
        # 64 terms in float32, each rounded three times, and everything else in float64
        tolerance = 1e-13 if wide else 3e-7
        assert (np.abs(got - want) <= tolerance * size).all(), (len(rows), kind)


def test_gram_matches_the_reference(ops, rng):
    # every number of row blocks of four, several blocks of 32, tiles cut short
    for n in (1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 21, 25, 29, 32, 33, 70):
        rows = clients(rng, n, (2100, 1, 0, 130), ("float32", "float16", "bfloat16", "float32"))
        compare(ops[1].gram, rows, False)
        if n in (3, 16, 32, 33):
            compare(ops[1].gram, rows, True, [[0], [1], [2], [3]])
            compare(ops[1].gram, clients(rng, n, (700, 300)), True, [[1], [0]])


def test_gram_of_rows_that_share_an_offset(ops, rng):
    rows = [[x + 10] for x in torch.from_numpy(rng.normal(0, 1e-2, (9, 3000))).float()]
    compare(ops[1].gram, rows, False)
    seen = views(rows[:2] + rows[:1])
    found = ops[1].gram(seen, layers=seen[0], kind="distances", wide=False, segments=[[0]])
    assert found[0, 0, 2] == 0 and found[0, 0, 0] > 0  # the diagonal holds norms


def test_gram_of_more_layers_and_segments_than_one_launch_takes(ops, rng):
    rows = clients(rng, 10, [int(k) for k in rng.integers(0, 4, 300)], ("float32", "bfloat16"))
    segments = [[j] for j in range(300)] + [[]] * 110
    seen = views(rows)
    options = {"layers": seen[0], "kind": "distances", "segments": segments}
    want = gram_reference.gram(seen, wide=True, **options)
    np.testing.assert_allclose(ops[1].gram(seen, wide=True, **options), want, rtol=1e-13)
    compare(ops[1].gram, rows, False, [list(range(290)), [], list(range(290, 300))])


def test_gram_of_units_of_several_tiles_is_the_same_in_any_order(library, monkeypatch, rng):
    module, configure = library
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_arrays, "queue", lambda device: (0, 0))
    from flcore.ops._gram_cuda import gram

    seen = views([[torch.from_numpy(rng.standard_normal(300_000)).float()] for _ in range(17)])
    options = {"layers": seen[0], "kind": "distances", "segments": [[0]]}
    found = []
    for multiprocessors, descending in ((1, False), (7, True)):
        configure(multiprocessors, descending)
        found.append(gram(seen, wide=True, **options))
    # 128 columns a tile, two tiles a unit
    assert module.gram_workspace(17, [0, 300_000], [1], 1, True) == 1172 * 153
    assert (found[0] == found[1]).all()
    want = gram_reference.gram(seen, wide=True, **options)
    np.testing.assert_allclose(found[0], want, rtol=1e-13)


def test_gram_lets_non_finite_values_through(ops, rng):
    rows = clients(rng, 5, (1000,), ("float32",))
    rows[2][0][999] = float("nan")
    rows[3][0][5] = float("inf")
    seen = views(rows)
    for kind in gram_reference.KINDS:
        options = {"layers": seen[0], "kind": kind, "wide": False, "segments": [[0]]}
        got, want = ops[1].gram(seen, **options), gram_reference.gram(seen, **options)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-4)


def test_gram_names_what_does_not_fit(ops, rng):
    rows = views(clients(rng, 2, (5,), ("float64",)))
    with pytest.raises(InvalidInputError, match="float64 layers need float64 sums"):
        ops[1].gram(rows, layers=rows[0], kind="norms", wide=False, segments=[[0]])
    with pytest.raises(InvalidInputError, match="whole layers"):
        _native.cuda.gram([0, 0], 1, [0, 4, 8], [1, 1], 0, False, [0, 6, 8], 0, 0, 0, 0)
    with pytest.raises(InvalidInputError, match="at most 3996 client rows"):
        _native.cuda.gram([0] * 3997, 3997, [0, 4], [1], 0, False, [0, 4], 0, 0, 0, 0)
