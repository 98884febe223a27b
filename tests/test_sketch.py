"""Count sketches: the table and the top-k of the reference, statistics, and packets."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore.compression import (
    CODECS,
    EF14,
    Encoder,
    Packet,
    PacketError,
    Sketch,
    TopK,
    decode,
    decode_add,
    sum_sketches,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from flcore.ops import sketch as ops
from flcore.reference import decode as reference_decode
from flcore.reference import rng as reference_rng
from flcore.reference import sketch as reference
from flcore.reference import streams, wire, wire_writer
from support import np_dtype, outputs_per_level, unaligned

VARIANTS = ("reference", "cpu")
SEED = 2**40 + 5
# coordinates, rows, columns: around the block of 1024, the tile of 65,536, one to eight parts
CASES = [(1, 1, 1), (5, 3, 7), (1023, 5, 50), (1025, 1, 300), (70_001, 5, 300), (65_537, 3, 9000)]
CASES += [(20_000, 7, 100), (4096, 9, 33)]


# ---- worked example and definition ---------------------------------------------------------------


def test_worked_example():
    """With given hashes: tables and estimates by the formulas of the sketch."""
    h = np.array([[0, 1, 2, 3, 0, 1], [1, 3, 0, 2, 2, 0], [2, 0, 1, 1, 3, 2]])
    s = np.array([[1, -1, 1, 1, -1, 1], [1, 1, -1, 1, 1, -1], [-1, 1, 1, -1, 1, 1]])
    v = np.array([10, 0, 0, -4, 1, 0])
    table = np.zeros((3, 4), int)
    for i in range(3):
        np.add.at(table[i], h[i], s[i] * v)
    assert table.tolist() == [[9, 0, 0, -4], [0, 10, -3, 0], [0, 4, -10, 1]]
    estimates = reference.medians((s * np.take_along_axis(table, h, 1)).astype(np.float32))
    assert estimates.tolist() == [10, 0, 0, -4, -3, 0]
    assert sorted(np.argsort(-np.abs(estimates), kind="stable")[:2].tolist()) == [0, 3]


def test_places_are_words_of_a_stream():
    column, sign = reference.places(np.arange(9), SEED, 3, 10)
    for row in range(3):
        words = reference_rng.random_bits(9, SEED, tensor=streams.SKETCH, client=row)
        assert column[row].tolist() == [int(w >> 1) * 10 >> 31 for w in words.tolist()]
        assert sign[row].tolist() == [-1.0 if w & 1 else 1.0 for w in words.tolist()]


@pytest.mark.parametrize("columns", [3, 1000, 2**32 - 1])
def test_places_are_even_and_independent(columns):
    n = 60_000
    column, sign = reference.places(np.arange(n), 1, 3, columns)
    assert column.min() >= 0 and column.max() < columns
    assert abs(sign.mean()) < 0.02
    shares = np.bincount((column[0] * 3 // columns).astype(int), minlength=3) / n
    np.testing.assert_allclose(shares, 1 / 3, atol=0.01)
    same = [np.mean(column[0] == column[1]), np.mean(column[0][1:] == column[0][:-1])]
    np.testing.assert_allclose(same, 1 / columns, atol=0.01)
    assert (
        abs((sign[0] * sign[1]).mean()) < 0.02 and abs((sign[0][1:] * sign[0][:-1]).mean()) < 0.02
    )


# ---- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(("numel", "rows", "columns"), CASES)
def test_equals_the_reference(numel, rows, columns, rng):
    x = (rng.standard_normal(numel) ** 5).astype(np.float32)
    results = []
    for variant in VARIANTS:
        options = {"seed": SEED, "variant": variant}
        cells = ops.sketch(x, rows=rows, columns=columns, **options)
        found = [cells.copy(), ops.estimate(cells, numel, **options)]
        found.append(ops.estimate(cells, numel // 2, begin=numel // 3, **options))
        for k in {0, 1, numel // 50, numel - 1, numel}:
            found += ops.sketch_top_k(cells, numel, k, **options)
        ops.sketch_scatter(cells, found[3], found[4], **options)
        found.append(cells.copy())
        ops.sketch_scatter(cells, found[-3], None, **options)
        found.append(cells)
        results.append([a.tobytes() for a in found])
    assert results[0] == results[1]


def test_cells_of_one_value_have_its_bits(rng):
    """Columns so many that nothing collides: a table of signed values, exact estimates."""
    x = rng.standard_normal(40).astype(np.float32)
    cells = ops.sketch(x, rows=3, columns=2**20, seed=1)
    assert ops.estimate(cells, 40, seed=1).tobytes() == x.tobytes()
    np.testing.assert_allclose(ops.l2_estimate(cells), np.linalg.norm(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_layers_and_memory(dtype, rng):
    x = rng.standard_normal(5001).astype(np_dtype(dtype))
    want = ops.sketch(x.astype(np.float32), rows=3, columns=99, variant="reference").tobytes()
    strided = np.repeat(x, 2)[::2]
    read_only = x.copy()
    read_only.flags.writeable = False
    layers = [unaligned(x[:17]), x[17:17], x[17:2000].reshape(3, 661), x[2000:]]
    for other in (x, unaligned(x), strided, read_only, layers, dict(enumerate(layers))):
        assert ops.sketch(other, rows=3, columns=99).tobytes() == want
    torch = pytest.importorskip("torch")
    if dtype != "bfloat16":
        assert ops.sketch(torch.from_numpy(x), rows=3, columns=99).tobytes() == want


DIGESTS = """
import hashlib, numpy as np, flcore
from flcore.ops import sketch as ops
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel, rows, columns in ((300_001, 5, 4000), (200_000, 3, 100_000), (140_000, 1, 7)):
    for dtype in (np.float64, np.float32, np.float16):
        x, once = rng.standard_normal(numel).astype(dtype), set()
        for threads in (1, 2, 3):
            flcore.set_num_threads(threads)
            cells = ops.sketch(x, rows=rows, columns=columns, seed=9)
            found = [cells.copy(), ops.estimate(cells, numel, seed=9)]
            found += ops.sketch_top_k(cells, numel, numel // 70, seed=9)
            ops.sketch_scatter(cells, found[2], found[3], seed=9)
            once.add(hashlib.sha256(b"".join(a.tobytes() for a in [*found, cells])).hexdigest())
        assert len(once) == 1
        digest.update(once.pop().encode())
print(digest.hexdigest())
"""


def test_levels_and_threads_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


@pytest.mark.parametrize("kind", ["zeros", "equal", "two values"])
def test_top_k_takes_ties_in_order(kind):
    cells = np.zeros((3, 50), np.float32)
    if kind != "zeros":
        cells[...] = 2.0
    if kind == "two values":
        cells[:, ::3] = 4.0
    for k in (1, 60_000, 70_000):
        ours = ops.sketch_top_k(cells, 140_000, k)
        want = ops.sketch_top_k(cells, 140_000, k, variant="reference")
        assert all(a.tobytes() == b.tobytes() for a, b in zip(ours, want, strict=True))
        assert ours[0].size == k and (np.diff(ours[0]) > 0).all()


# ---- statistics ----------------------------------------------------------------------------------


def test_linear(rng):
    v, w = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    options = {"rows": 5, "columns": 40, "seed": 3}
    both = ops.sketch(2 * v - 3 * w, **options)
    np.testing.assert_allclose(
        both, 2 * ops.sketch(v, **options) - 3 * ops.sketch(w, **options), atol=1e-4
    )


def test_row_estimates_are_unbiased_and_medians_bounded(rng):
    v = rng.standard_normal(400)
    norm = np.linalg.norm(v)
    rows = np.array([ops.estimate(ops.sketch(v, rows=1, columns=50, seed=s), 400, seed=s)
                     for s in range(300)])  # fmt: skip
    deviation = norm / np.sqrt(50)  # of one estimate
    assert np.abs(rows.mean(axis=0) - v).max() < 4.5 * deviation / np.sqrt(300)
    np.testing.assert_allclose(rows.std(axis=0).mean(), deviation, rtol=0.1)
    medians = ops.estimate(ops.sketch(v, rows=9, columns=50, seed=1), 400, seed=1)
    assert np.abs(medians - v).max() < 3 * deviation
    assert np.abs(medians - v).std() < 0.6 * rows.std()


# ---- packets -------------------------------------------------------------------------------------


def test_packets_decode_to_estimates(rng):
    g = [rng.standard_normal((50, 40)).astype(np.float32), rng.standard_normal(7)]
    packet = Encoder(Sketch(columns=90, rows=3, seed=11), like=g).encode(g, round=4, seed=77)
    header, body = wire.parse(bytes(packet))
    assert (header.codec, header.form, header.tile, header.seed) == ("sketch", 3, 90, 11)
    assert header.source_dtype == "float64" and packet.nbytes == 128 + 4 * 270
    cells = ops.sketch(g, rows=3, columns=90, seed=11)
    assert body.table.tobytes() == cells.tobytes()
    want = ops.estimate(cells, 2007, seed=11)
    assert decode(packet).tobytes() == want.tobytes()
    assert reference_decode.dense(header, body).tobytes() == want.tobytes()
    out = [np.ones(1000, np.float64), np.ones(1007, np.float32)]
    decode_add([packet, Encoder(TopK(k=5), like=g).encode(g), packet], [2.0, 1.0, -2.0], out)
    dense = decode(Encoder(TopK(k=5), like=g).encode(g))
    np.testing.assert_allclose(np.concatenate(out), 1 + dense, atol=1e-5)


def test_sketches_of_many_clients_are_summed(rng):
    codec = Sketch(columns=60, rows=5)
    updates = [rng.standard_normal(900).astype(np.float32) for _ in range(6)]
    packets = [Encoder(codec, like=x, client=i).encode(x, seed=i) for i, x in enumerate(updates)]
    weights = rng.standard_normal(6)
    total = sum_sketches([*packets[:3], *map(bytes, packets[3:])], weights)
    want = ops.sketch(np.tensordot(weights, updates, 1), rows=5, columns=60)
    np.testing.assert_allclose(total, want, atol=1e-4)
    assert (
        sum_sketches(packets[:1]).tobytes() == ops.sketch(updates[0], rows=5, columns=60).tobytes()
    )
    other = Encoder(Sketch(columns=60, rows=5, seed=1), like=updates[0]).encode(updates[0])
    with pytest.raises(InvalidInputError, match=r"packets\[1\]: expected seed 0, got 1"):
        sum_sketches([packets[0], other])
    with pytest.raises(InvalidInputError, match=r"packets\[0\]: expected codec sketch, got sparse"):
        sum_sketches([Encoder(TopK(k=1), like=updates[0]).encode(updates[0])])
    with pytest.raises(InvalidInputError, match="at least one"):
        sum_sketches([])


def packet_with(cells=None, **fields) -> bytes:
    settings = {"numel": 30, "values": "float32", "form": 3, "bits": 32, "tile": 8, "seed": 1}
    body = np.ones(24, "<f4").tobytes() if cells is None else cells
    return wire_writer.frame([(5, 4, body)], codec="sketch", **(settings | fields))


LIES = {
    "too few rows": {"form": 0},
    "even rows": {"form": 2},
    "too many rows": {"form": 11},
    "no columns": {"tile": 0},
    "columns for another table": {"tile": 9},
    "bits": {"bits": 16},
    "dtype": {"values": "bfloat16"},
    "short table": {"cells": bytes(92)},
    "NaN": {"cells": bytes(92) + b"\0\0\xc0\x7f"},
    "infinity": {"cells": b"\0\0\x80\xff" + bytes(92)},
    "too many coordinates": {"numel": 2**34 + 1},
}


@pytest.mark.parametrize("lie", LIES)
def test_both_readers_refuse(lie):
    limits = flcore.compression.Limits(max_numel=2**40)
    assert wire.parse(packet_with())[1].table.shape == (3, 8)
    assert Packet.from_bytes(packet_with()).header.tile == 8
    data = packet_with(**LIES[lie])
    with pytest.raises(PacketError):
        wire.parse(data, limits)
    with pytest.raises(PacketError):
        Packet.from_bytes(data, limits)


def test_codec_settings(rng):
    codec = Sketch(columns=20, rows=3, seed=7)
    assert Sketch.from_dict(codec.to_dict()) == codec and CODECS["sketch"] is Sketch
    for options, match in (
        ({"columns": 0}, "columns: expected 1 <= columns"),
        ({"columns": 2**32}, "columns"),
        ({"columns": 8, "rows": 4}, "rows: expected 1, 3, 5, 7 or 9, got 4"),
        ({"columns": 8, "rows": 11}, "rows"),
        ({"columns": 8, "seed": -1}, "seed"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            Sketch(**options)
    x = rng.standard_normal(1000)
    with pytest.raises(InvalidInputError, match="more than twice the 1000 coordinates"):
        Encoder(Sketch(columns=600), like=x)
    with pytest.raises(InvalidInputError, match="feedback: expected None with Sketch"):
        Encoder(codec, EF14(), like=x).encode(x)
    x[500] = np.inf
    with pytest.raises(NonFiniteError, match=r"update.*inf"):
        Encoder(codec, like=x).encode(x)
    with pytest.raises(NonFiniteError, match="overflows float32"):
        ops.sketch(np.full(1000, 3e38), rows=1, columns=2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda c: ops.estimate(c.astype(float), 3), DTypeError, "cells: expected a float32"),
        (lambda c: ops.estimate(c[:, ::2], 3), InvalidInputError, "cells: expected a contiguous"),
        (lambda c: ops.estimate(c[:2], 3), InvalidInputError, "rows"),
        (lambda c: ops.estimate(c, 3, begin=-1), InvalidInputError, "begin"),
        (lambda c: ops.sketch_top_k(c, 3, 4), InvalidInputError, "k: expected"),
        (lambda c: ops.sketch_top_k(c * np.nan, 3, 2), NonFiniteError, "cells"),
        (lambda c: ops.sketch_scatter(c, np.array([-1]), None), InvalidInputError, "index"),
        (lambda c: ops.sketch_scatter(c, np.array([1]), np.ones(2)), InvalidInputError, "values"),
        (lambda c: ops.sketch(np.ones(3), rows=3, columns=4, out=c), InvalidInputError, "out"),
        (lambda c: ops.sketch(np.ones(3), rows=3, columns=8, seed=1.5), InvalidInputError, "seed"),
        (lambda c: ops.sketch(np.ones(3, int), rows=3, columns=8), DTypeError, "update.*int64"),
    ],
)
def test_mistakes_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(np.ones((3, 8), np.float32))
