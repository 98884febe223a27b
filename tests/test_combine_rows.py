"""Sums by a matrix of coefficients: by hand, each line against `combine`, exactness, policies."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore import _arrays, _variants
from flcore.aggregation import Mean
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import combine, combine_rows
from support import DTYPES, HAS_TORCH, Guarded, np_dtype, outputs_per_level, unaligned

CPU_VARIANTS = [v for v, why in _variants.available("combine_rows", "cpu").items() if not why]
ACCUMULATE = ("float32", "float64", "reproducible")


def clients(rng: np.random.Generator, n: int, size: int, dtype: str) -> list[np.ndarray]:
    return [rng.standard_normal(size).astype(np_dtype(dtype)) for _ in range(n)]


def sparse(rng: np.random.Generator, m: int, n: int) -> np.ndarray:
    """About half of the coefficients are zero; the second line is."""
    a = rng.uniform(-1, 1, (m, n)) * (rng.random((m, n)) < 0.5)
    a[1:2] = 0
    return a


def run(variant: str, rows: list[np.ndarray], matrix, **options) -> list[np.ndarray]:
    """Call one variant; Triton sees torch tensors, the others NumPy arrays."""
    if variant != "triton":
        return combine_rows(rows, matrix, variant=variant, **options)
    import torch

    half = rows[0].dtype.name == "bfloat16"

    def tensor(x: np.ndarray) -> torch.Tensor:
        x = torch.from_numpy(x.view(np.int16).copy() if half else x.copy())
        return x.view(torch.bfloat16) if half else x

    results = combine_rows([tensor(r) for r in rows], matrix, variant=variant, **options)
    bits = [x.view(torch.int16).numpy().view(np_dtype("bfloat16")) for x in results if half]
    return bits if half else [x.numpy() for x in results]


def test_three_clients_by_hand():
    rows = [np.float32([1, 2]), np.float32([3, 4]), np.float32([5, 8])]
    got = combine_rows(rows, [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1, -1, 1]])
    np.testing.assert_array_equal(got, np.float32([[2, 3], [5, 8], [3, 6]]))


# ---- each line is a weighted sum of its own ----------------------------------------------------


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_lines_have_the_bits_of_single_sums(variant, dtype, accumulate, rng):
    # tails of the vectors, of the 256-value least tile and of the block; one row to two groups of 8
    shapes = ((3, 5, 1300),) if variant == "triton" else ((1, 1, 1), (3, 5, 257), (17, 17, 4099))
    for m, n, size in shapes:
        rows, matrix = clients(rng, n, size, dtype), sparse(rng, m, n)
        results = run(variant, rows, matrix, accumulate=accumulate)
        assert len(results) == m
        single = "cpu" if variant == "triton" else variant
        for line, result in zip(matrix, results, strict=True):
            want = combine(rows, line, accumulate=accumulate, variant=single)
            assert result.dtype == want.dtype and result.tobytes() == want.tobytes()


def test_the_least_tile_and_many_rows(rng):
    rows = clients(rng, 600, 1000, "float32")  # 600 rows of 256 values are more than the budget
    matrix = rng.uniform(0, 1, (2, 600))
    for line, result in zip(matrix, combine_rows(rows, matrix), strict=True):
        assert result.tobytes() == combine(rows, line).tobytes()


def test_identity_returns_the_rows_and_uniform_lines_the_mean(rng):
    rows = clients(rng, 4, 3001, "float32")
    rows[0][:2] = [-0.0, 1e-42]
    for row, result in zip(rows, combine_rows(rows, np.eye(4)), strict=True):
        assert row.tobytes() == result.tobytes()
    mean = Mean()(rows)
    for result in combine_rows(rows, np.full((2, 4), 0.25)):
        assert result.tobytes() == mean.tobytes()


LEVELS_SCRIPT = """
import hashlib, numpy as np, ml_dtypes
from flcore.ops import combine_rows
rng = np.random.default_rng(3)
a = rng.uniform(-1, 1, (5, 11)) * (rng.random((5, 11)) < 0.6)
for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
    rows = [rng.standard_normal(9001).astype(dtype) for _ in range(11)]
    for accumulate in ("float32", "float64", "reproducible"):
        out = combine_rows(rows, a, accumulate=accumulate)
        print(hashlib.sha256(b"".join(x.tobytes() for x in out)).hexdigest())
"""


def test_instruction_sets_give_identical_bits():
    printed = outputs_per_level(LEVELS_SCRIPT)
    assert len(set(printed.values())) == 1, printed.keys()


def test_thread_counts_give_identical_bits(rng):
    rows, matrix = clients(rng, 8, 60_001, "float32"), rng.uniform(0, 1, (3, 8))
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.add(b"".join(x.tobytes() for x in combine_rows(rows, matrix)))
    assert len(results) == 1


# ---- memory and structure ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_rows_and_guarded_output(dtype, rng):
    for size in (0, 1, 33, 4099):
        rows, matrix = clients(rng, 3, size, dtype), sparse(rng, 4, 3)
        want = combine_rows(rows, matrix)
        for offset in (0, 1, 3):
            out = [Guarded(size, np_dtype(dtype), offset) for _ in range(4)]
            shifted = [unaligned(r, 1 + offset) for r in rows]
            given = [g.array for g in out]
            got = combine_rows(shifted, matrix, out=given, nonfinite="propagate")
            for guarded, result, right in zip(out, got, want, strict=True):
                guarded.check()
                assert result is guarded.array and result.tobytes() == right.tobytes()


@pytest.mark.parametrize("policy", ["raise", "propagate"])
def test_rows_can_be_mixed_in_place(policy, rng):
    rows, matrix = clients(rng, 5, 5000, "float32"), rng.uniform(0, 1, (5, 5))
    want = combine_rows(rows, matrix)
    own = [r.copy() for r in rows]
    assert combine_rows(own, matrix, out=own, nonfinite=policy)[2] is own[2]
    stacked = np.stack(rows)
    combine_rows(stacked, matrix, out=list(stacked), nonfinite=policy)
    for mixed in (own, stacked):
        assert b"".join(x.tobytes() for x in mixed) == b"".join(x.tobytes() for x in want)
    strided = [np.zeros(10_000, np.float32)[::2] for _ in range(5)]
    combine_rows(rows, matrix, out=strided, nonfinite=policy)
    np.testing.assert_array_equal(strided, want)


def test_overlap_is_seen_where_it_is():
    x = np.zeros(100, np.float32)
    view = _arrays.view
    assert _arrays.overlap([view(x[:10])], [view(x[9:20])])
    assert not _arrays.overlap([view(x[:10])], [view(x[10:20]), view(x[30:])])
    assert _arrays.overlap([view(x[40:41])], [view(x[:5]), view(x[20:60])])
    assert not _arrays.overlap([view(x[:0])], [view(x)]) and not _arrays.overlap([], [view(x)])


def test_structures_come_back_as_they_went_in(rng):
    make = lambda: {"w": rng.standard_normal((3, 4)).astype(np.float16), "b": rng.random(5)}  # noqa: E731
    updates = [make(), make()]
    first, second = combine_rows(updates, [[0, 1], [0.5, 0.5]])
    assert list(first) == ["w", "b"] and first["w"].shape == (3, 4)
    for key, x in updates[1].items():
        assert first[key].dtype == x.dtype and first[key].tobytes() == x.tobytes()
    np.testing.assert_array_equal(second["b"], combine(updates, [0.5, 0.5])["b"])
    assert combine_rows([[]], [[1]]) == [[]]


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_tensors_go_in_and_come_out(rng):
    import torch

    rows = clients(rng, 3, 500, "float32")
    matrix = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    (got,) = combine_rows([torch.from_numpy(r) for r in rows], matrix)
    assert got.numpy().tobytes() == combine_rows(rows, matrix)[0].tobytes()


# ---- non-finite values -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_non_finite_policies(variant, rng):
    rows = clients(rng, 4, 300, "float32")
    rows[2][7] = np.nan
    matrix = [[0.5, 0.5, 0, 0], [0, 0.25, 0.5, 0.25]]
    with pytest.raises(NonFiniteError, match=r"updates\[2\]") as caught:
        run(variant, rows, matrix)
    assert caught.value.clients == (2,)
    clean = combine(rows, [0.5, 0.5, 0, 0])
    left = run(variant, rows, matrix, nonfinite="exclude")
    np.testing.assert_allclose(left[0], clean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(left[1], combine(rows, [0, 0.25, 0, 0.25]), rtol=1e-6, atol=1e-7)
    through = run(variant, rows, matrix, nonfinite="propagate")
    assert np.isfinite(through[0]).all() and np.isnan(through[1][7])
    unread = run(variant, rows, [[1, 0, 0, 0], [0, 1, 0, 1]])  # the column of the bad one is zero
    np.testing.assert_array_equal(unread[0], rows[0])


def test_a_line_that_loses_all_its_clients_raises(rng):
    rows = clients(rng, 3, 50, "float32")
    rows[1][0] = np.inf
    out = [np.full(50, 7, np.float32) for _ in range(2)]
    with pytest.raises(NonFiniteError, match="no client is left for line 1") as caught:
        combine_rows(rows, [[1, 1, 0], [0, 1, 0]], out=out, nonfinite="exclude")
    assert caught.value.clients == (1,) and (np.array(out) == 7).all()


def test_overflow_of_finite_inputs_is_named():
    rows = [np.float32([3e38]), np.float32([3e38])]
    with pytest.raises(NonFiniteError, match="finite but their sum overflows"):
        combine_rows(rows, [[1, 1]])
    with pytest.raises(InvalidInputError, match=r"2\^46"):
        combine_rows(rows, [[1, 1]], accumulate="reproducible")


# ---- bad input ---------------------------------------------------------------------------------

ONE = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("updates", "matrix", "options", "error", "message"),
    [
        ([ONE, ONE], [1, 1], {}, InvalidInputError, r"matrix: expected shape \(m, 2\).*\(2,\)"),
        ([ONE, ONE], [[1, 1, 1]], {}, InvalidInputError, r"matrix: expected shape \(m, 2\)"),
        ([ONE, ONE], np.zeros((0, 2)), {}, InvalidInputError, r"matrix: expected shape \(m, 2\)"),
        ([ONE, ONE], [[1, np.nan]], {}, InvalidInputError, r"matrix\[0, 1\]: .* finite"),
        ([ONE], [["x"]], {}, InvalidInputError, "matrix: expected"),
        ([ONE], [[1]], {"out": ONE}, InvalidInputError, "out: expected a list of 1"),
        ([ONE], [[1]], {"out": [ONE, ONE]}, InvalidInputError, "got 2 of them"),
        ([ONE], [[1]], {"out": [ONE[:3]]}, InvalidInputError, r"out\[0\].*\(4,\)"),
        ([ONE], [[1]], {"out": [np.ones(4)]}, DTypeError, r"out\[0\].*float32"),
        ([ONE], [[1]], {"accumulate": "float16"}, InvalidInputError, "accumulate"),
        ([ONE], [[1]], {"nonfinite": "ignore"}, InvalidInputError, "nonfinite"),
        ([ONE.astype(np.int8)], [[1]], {}, DTypeError, r"updates\[0\].*int8"),
        ([ONE], [[1]], {"variant": "cuda"}, VariantUnavailableError, "no cuda variant"),
    ],
)
def test_bad_input_is_named(updates, matrix, options, error, message):
    with pytest.raises(error, match=message):
        combine_rows(updates, matrix, **options)


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_the_cpu_kernel(dtype, accumulate, rng):
    import torch

    rows = [torch.randn(70_001, dtype=torch.float64).to(getattr(torch, dtype)) for _ in range(9)]
    matrix = sparse(rng, 5, 9)
    want = combine_rows(rows, matrix, accumulate=accumulate)
    got = combine_rows([r.cuda() for r in rows], matrix, accumulate=accumulate)
    for a, b in zip(want, got, strict=True):
        assert b.is_cuda and torch.equal(a, b.cpu())
