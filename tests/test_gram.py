"""Norms, distances and products: by hand, against the reference, exactness, offsets, policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flcore
from flcore import _arrays, _native, _variants
from flcore.errors import InvalidInputError, NonFiniteError, VariantUnavailableError
from flcore.ops import gram
from flcore.ops.gram import exact_sums, finish
from flcore.reference.gram import KINDS
from support import DTYPES, HAS_TORCH, SIZES, np_dtype, outputs_per_level, unaligned

VARIANTS = [v for v, why in _variants.available("gram", "cpu").items() if not why]
COUNTS = (1, 2, 3, 4, 5, 8, 13, 16, 33)


def clients(rng: np.random.Generator, n: int, size: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal((n, size)).astype(np_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_rows_by_hand(variant, dtype):
    x = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]]).astype(np_dtype(dtype))
    found = gram(x, variant=variant)
    np.testing.assert_array_equal(found.norms, [14, 77, 194])
    np.testing.assert_array_equal(found.distances, [[0, 27, 108], [27, 0, 27], [108, 27, 0]])
    products = gram(x, "products", variant=variant).products
    np.testing.assert_array_equal(products, [[14, 32, 50], [32, 77, 122], [50, 122, 194]])


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_matches_the_reference(dtype, kind, precision, rng):
    for n in COUNTS:
        for size in (1, 15, 1023, 1024, 1025, 3001):
            x = clients(rng, n, size, dtype)
            got = getattr(gram(x, kind, precision=precision), kind)
            want = getattr(gram(x, kind, variant="reference"), kind)
            scale = np.abs(want) if kind != "products" else np.abs(want).max()
            tolerance = 3e-7 if precision == "auto" and dtype != "float64" else 1e-13
            assert (np.abs(got - want) <= tolerance * scale).all(), (n, size)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, rng):
    x = clients(rng, 6, size)
    for kind in KINDS:
        got, want = gram(x, kind), gram(x, kind, variant="reference")
        np.testing.assert_allclose(
            getattr(got, kind), getattr(want, kind), rtol=1e-6, atol=1e-6 * size
        )


@pytest.mark.parametrize("offset", [0, 1, 10])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_common_offset_costs_no_digits(dtype, offset, rng):
    x = (offset + 1e-2 * rng.standard_normal((6, 100_000))).astype(dtype)
    got, want = gram(x).distances, gram(x, variant="reference").distances
    apart = ~np.eye(6, dtype=bool)
    assert np.abs(got / np.where(apart, want, 1) - 1)[apart].max() < 1e-7
    single = x.astype(np.float32)  # what the tempting form gives, so that the test can fail
    norms = (single * single).sum(axis=1)
    naive = norms[:, None] + norms[None, :] - 2 * single @ single.T
    if offset == 10 and dtype == "float32":
        assert np.abs(naive / np.where(apart, want, 1) - 1)[apart].max() > 1e-3


def test_segments_are_layers(rng):
    sizes = (3, 0, 2000, 17)
    x = [[clients(rng, 1, s, d)[0] for s, d in zip(sizes, DTYPES, strict=True)] for _ in range(5)]
    whole, parts = gram(x), gram(x, per_layer=True)
    assert parts.distances.shape == (4, 5, 5) and parts.norms.shape == (4, 5)
    np.testing.assert_allclose(parts.distances.sum(axis=0), whole.distances, rtol=1e-12)
    for j in range(4):
        alone = gram([[row[j]] for row in x], variant="reference")
        np.testing.assert_allclose(parts.distances[j], alone.distances, rtol=1e-12)


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_torch_gives_the_bits_of_numpy(rng):
    import torch

    x = clients(rng, 7, 5000)
    got = gram([torch.from_numpy(r) for r in x]).distances
    assert got.tobytes() == gram(x).distances.tobytes()


# ---- exactness ---------------------------------------------------------------------------------


def test_same_bits_at_every_level_and_thread_count():
    script = """
import hashlib, numpy as np, flcore
from flcore.ops import gram
rng, digest = np.random.default_rng(1), hashlib.sha256()
for n, size in ((1, 5), (3, 3000), (9, 1024), (18, 1500)):
    for dtype in (np.float32, np.float64, np.float16):
        x = rng.standard_normal((n, size)).astype(dtype)
        for kind in ("norms", "distances", "products"):
            digest.update(getattr(gram(x, kind), kind).tobytes())
x = rng.standard_normal((4, 70_001)).astype(np.float32) * np.float32(1e-3)
for threads in (1, 2, 3):
    flcore.set_num_threads(threads)
    digest.update(gram(x).distances.tobytes())
print(digest.hexdigest())
"""
    assert len(set(outputs_per_level(script).values())) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_order_threads_and_layers_do_not_change_a_bit(kind, rng):
    n, size = 13, 40_007
    x = clients(rng, n, size)
    want = getattr(gram(x, kind), kind)
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        assert getattr(gram(x, kind), kind).tobytes() == want.tobytes()
    cuts = [0, 5, 5, 1029, 20_000, size]
    layers = [[unaligned(r[a:b]) for a, b in itertools.pairwise(cuts)] for r in x]
    assert getattr(gram(layers, kind), kind).tobytes() == want.tobytes()
    order = rng.permutation(n)
    moved = want[order] if kind == "norms" else want[np.ix_(order, order)]
    assert getattr(gram(x[order], kind), kind).tobytes() == moved.tobytes()


@pytest.mark.parametrize("wide", [False, True])
def test_parts_of_the_coordinates_add_up_to_the_same_bits(wide, rng):
    x = clients(rng, 5, 50_000)
    views = lambda rows: [[_arrays.view(r)] for r in rows]  # noqa: E731

    def sums(rows):
        viewed = views(rows)
        return exact_sums(viewed, layers=viewed[0], kind="distances", wide=wide, segments=[[0]])

    cut = 16 * _native.core.GRAM_TILE * 2
    parts = sums(np.ascontiguousarray(x[:, cut:])) + sums(np.ascontiguousarray(x[:, :cut]))
    whole = finish(sums(x), 5, "distances", wide)
    assert finish(parts, 5, "distances", wide).tobytes() == whole.tobytes()


def test_exact_sums_round_once(rng):
    """Against Python's exact rational arithmetic, over the whole range of float64."""
    from fractions import Fraction

    x = rng.standard_normal((2, 40)) * 2.0 ** rng.integers(-250, 250, (2, 40))
    for j in range(0, 40, 8):
        a, b = x[:, j : j + 1]
        got = gram([a, b], "products").products[0, 1]
        assert got == float(Fraction(float(a[0])) * Fraction(float(b[0])))


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e-12])
def test_float32_out_of_range_switches_to_float64(scale, rng):
    x = (clients(rng, 5, 2000, "float64") * scale).astype(np.float32)
    got, want = gram(x), gram(x, variant="reference")
    np.testing.assert_allclose(got.distances, want.distances, rtol=1e-6)
    assert got.precision == ("float32" if scale == 1e-12 else "float64")
    if scale == 1e25:
        assert not np.isfinite(gram(x, precision="float32").distances[0, 1])


def test_identical_and_zero_rows():
    for x in (np.zeros((4, 3000), np.float32), np.full((4, 3000), 0.1, np.float32)):
        np.testing.assert_array_equal(gram(x).distances, np.zeros((4, 4)))


def test_read_only_and_strided_inputs(rng):
    base = rng.standard_normal((4, 40, 30)).astype(np.float32)
    want = gram([b[::2, ::3].copy() for b in base]).distances
    base.flags.writeable = False
    np.testing.assert_array_equal(gram([b[::2, ::3] for b in base]).distances, want)


# ---- non-finite values ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_policies(value, variant, rng):
    x = clients(rng, 5, 3000)
    x[3, 2999] = value
    for kind in KINDS:
        with pytest.raises(NonFiniteError, match=r"updates\[3\]") as caught:
            gram(x, kind, variant=variant)
        assert caught.value.clients == (3,)
        found = gram(x, kind, nonfinite="exclude", variant=variant)
        assert found.nonfinite == (3,) and found.norms[3] == np.inf
        good = [0, 1, 2, 4]
        alone = gram(x[good], kind, variant=variant)
        assert found.norms[good].tobytes() == alone.norms.tobytes()
        if kind == "distances":
            assert (found.distances[3, good] == np.inf).all() and found.distances[3, 3] == 0
            assert found.distances[np.ix_(good, good)].tobytes() == alone.distances.tobytes()
        assert not np.isfinite(gram(x, kind, nonfinite="propagate", variant=variant).norms[3])


def test_large_finite_rows_are_not_taken_for_infinite():
    x = np.full((3, 5), 1e38, np.float32)
    x[0] = 1
    found = gram(x)
    assert found.nonfinite == () and np.isfinite(found.distances).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "cosine"}, InvalidInputError, "kind: expected one of"),
        ({"precision": "half"}, InvalidInputError, "precision"),
        ({"nonfinite": "ignore"}, InvalidInputError, "nonfinite"),
        ({"variant": "cuda"}, VariantUnavailableError, "gram"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        gram(np.ones((2, 3), np.float32), **options)
