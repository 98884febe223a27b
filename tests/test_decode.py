"""Adding packets into accumulators: against the reference, in any cut, on any level."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore.compression import Packet, decode, decode_add
from flcore.errors import DTypeError, InvalidInputError, PacketError
from flcore.ops.decode import decode_add_into, decode_into
from flcore.ops.quantize import quantize
from flcore.ops.sparsify import sparsify
from support import Guarded, np_dtype, outputs_per_level, unaligned

SIZES = (1, 15, 16, 17, 63, 65, 4095, 4096, 4097, 65_535, 65_536, 65_537, 131_073)


def packets_of(rng, numel, count=3, share=0.05):
    """Packets of different value types and index codings, all for `numel` coordinates."""
    made = []
    for i in range(count):
        data = sparsify(
            rng.standard_normal(numel).astype(np.float32),
            k=max(1, int(share * (i + 1) * numel)),
            values=("float32", "float16", "bfloat16")[i % 3],
            index=("tile16", "bitmask")[i % 2],
        )
        made.append(Packet.from_bytes(data))
    return made


# ---- worked example ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["reference", "cpu"])
def test_worked_example(variant):
    p = Packet.from_bytes(sparsify(np.array([4, -3, 2, 1], np.float32), k=2))
    q = Packet.from_bytes(sparsify(np.array([0, 1, 8, 0], np.float32), k=2, index="bitmask"))
    out = np.array([1, 1, 1, 1], np.float32)
    decode_add_into([p, q], [0.5, 2], [out], variant=variant)
    assert out.tolist() == [3, 1.5, 17, 1]
    decode_into(p, [out], variant=variant)
    assert out.tolist() == [4, -3, 0, 0]


# ---- packets of every codec in one list --------------------------------------------------------

MIX = [
    {"codec": "sign", "bits": 1},
    {"codec": "uniform", "bits": 8},
    {"codec": "uniform", "bits": 4},
    {"codec": "uniform", "bits": 3},
    {"codec": "affine", "bits": 2, "values": "bfloat16"},
    {"codec": "affine", "bits": 7},
    {"codec": "ternary", "bits": 2},
    {"codec": "ternary", "bits": 2, "form": 1},
    {"codec": "dense", "bits": 16, "values": "bfloat16"},
    {"codec": "natural", "bits": 9},
    {"codec": "minifloat", "bits": 8, "form": 1},
    {"codec": "rotated", "bits": 2},
]


def mixed(rng, numel, bucket):
    """One packet of every codec of buckets, sparse ones between them."""
    made = packets_of(rng, numel, count=2)
    for i, options in enumerate(MIX):
        cut = 256 if options["codec"] == "rotated" else bucket
        g = rng.standard_normal(numel).astype(np.float32)
        made.insert(i, Packet.from_bytes(quantize(g, bucket=cut, round=i, **options)))
    return made


@pytest.mark.parametrize(
    ("numel", "bucket"),
    [(n, b) for n in (1, 7, 100, 4095, 4097, 9001) for b in (2, 24, 500, 501, 65_536)]
    + [(66_001, 501), (66_001, 65_536)],
)
def test_any_mix_of_codecs(numel, bucket, rng):
    """Into one layer, into many, in float32 and float64: the bits of the reference."""
    packets = mixed(rng, numel, bucket)
    weights = rng.standard_normal(len(packets)).tolist()
    small = min(numel // 2, 30)
    for sizes in ([numel], [numel // 3, 0, numel - numel // 3], [1] * small + [numel - small]):
        kinds = [np.float32, np.float64] if len(sizes) == 3 else [np.float32]
        start = [rng.standard_normal(n).astype(kinds[i % len(kinds)]) for i, n in enumerate(sizes)]
        ours, want = [x.copy() for x in start], [x.copy() for x in start]
        decode_add_into(packets, weights, ours, variant="cpu")
        decode_add_into(packets, weights, want, variant="reference")
        assert [x.tobytes() for x in ours] == [x.tobytes() for x in want]
    for packet in packets:
        decode_into(packet, ours, variant="cpu")
        decode_into(packet, want, variant="reference")
        assert [x.tobytes() for x in ours] == [x.tobytes() for x in want], packet.header


GROUPS = [
    {"codec": "sign", "bits": 1},
    {"codec": "uniform", "bits": 8},
    {"codec": "affine", "bits": 8, "values": "bfloat16"},
    {"codec": "uniform", "bits": 4},
    {"codec": "affine", "bits": 4},
    {"codec": "uniform", "bits": 5},
    {"codec": "ternary", "bits": 2, "form": 1},
]


@pytest.mark.parametrize("bucket", [13, 500, 65_536])
@pytest.mark.parametrize("options", GROUPS, ids=lambda o: f"{o['codec']}{o['bits']}")
def test_many_packets_of_one_layout(options, bucket, rng):
    """Eight, four and one at a visit, broken by one of another bucket: as the reference."""
    numel = 40_013
    buckets = [bucket] * 14
    buckets.insert(9, bucket // 2)
    packets = []
    for cut in buckets:
        g = rng.standard_normal(numel).astype(np.float32)
        packets.append(Packet.from_bytes(quantize(g, bucket=cut, **options)))
    weights = rng.standard_normal(len(packets)).tolist()
    for sizes in ([numel], [5, 0, 4097, 1, 30_000, numel - 34_103]):
        for kinds in ([np.float32], [np.float32, np.float64]):
            guards = [Guarded(n, np.dtype(kinds[i % len(kinds)]), i) for i, n in enumerate(sizes)]
            for guard in guards:
                guard.array[:] = rng.standard_normal(guard.array.size)
            want = [g.array.copy() for g in guards]
            decode_add_into(packets, weights, [g.array for g in guards], variant="cpu")
            decode_add_into(packets, weights, want, variant="reference")
            for guard, expected in zip(guards, want, strict=True):
                guard.check()
                assert guard.array.tobytes() == expected.tobytes()


def test_mixes_do_not_depend_on_threads(rng):
    packets = mixed(rng, 150_000, 500)
    weights = rng.standard_normal(len(packets)).tolist()
    before, results = flcore.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            flcore.set_num_threads(threads)
            out = np.ones(150_000, np.float32)
            decode_add_into(packets, weights, [out])
            results.append(out.tobytes())
    finally:
        flcore.set_num_threads(before)
    assert results[0] == results[1] == results[2]


# ---- against the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_reference(numel, dtype, rng):
    packets, weights = packets_of(rng, numel), [0.3, -1.7, 1e-3]
    start = rng.standard_normal(numel).astype(dtype)
    ours, want = start.copy(), start.copy()
    decode_add_into(packets, weights, [ours], variant="cpu")
    decode_add_into(packets, weights, [want], variant="reference")
    assert ours.tobytes() == want.tobytes()
    assert numel < 100 or not np.array_equal(ours, start)
    for packet in packets:
        decode_into(packet, [ours], variant="cpu")
        decode_into(packet, [want], variant="reference")
        assert ours.tobytes() == want.tobytes()


def test_layers_of_the_accumulator(rng):
    """Layers of either dtype, at odd addresses, with nothing written beside them."""
    sizes = [1, 0, 17, 65_536, 3, 0, 70_000, 1]
    packets, weights = packets_of(rng, sum(sizes)), [1.0, 0.5, -0.25]
    guards = [Guarded(n, np.dtype((np.float32, np.float64)[i % 2]), i) for i, n in enumerate(sizes)]
    want = [np.zeros(n, g.array.dtype) for n, g in zip(sizes, guards, strict=True)]
    for guard in guards:
        guard.array[:] = 0
    decode_add_into(packets, weights, [g.array for g in guards])
    decode_add_into(packets, weights, want, variant="reference")
    for guard, expected in zip(guards, want, strict=True):
        guard.check()
        assert guard.array.tobytes() == expected.tobytes()
    for guard in guards:
        guard.array[:] = np.nan
    decode_into(packets[1], [g.array for g in guards])
    flat = decode(packets[1])
    for guard in guards:
        guard.check()
    assert np.array_equal(np.concatenate([g.array.astype(np.float32) for g in guards]), flat)


def test_sum_equals_dense_sum_bitwise(rng):
    """The same float32 operations as on dense vectors."""
    packets = packets_of(rng, 70_000, count=2)
    for w1, w2 in ((0.25, 3.0), (1 / 3, -0.1)):
        got = decode_add(packets, [w1, w2], np.zeros(70_000, np.float32))
        dense = [np.float32(w) * decode(p) for p, w in zip(packets, (w1, w2), strict=True)]
        assert np.array_equal(got, dense[0] + dense[1])


def test_order_of_packets_is_kept(rng):
    """Float32 addition does not commute over three terms; list order decides."""
    packets = [
        Packet.from_bytes(sparsify(np.full(40, x, np.float32), k=40)) for x in (1e8, -1e8, 1.0)
    ]
    first = decode_add(packets, [1, 1, 1], np.zeros(40, np.float32))
    last = decode_add(packets[::-1], [1, 1, 1], np.zeros(40, np.float32))
    assert first.tolist() == [1.0] * 40 and last.tolist() == [0.0] * 40


def test_weight_zero_is_not_read():
    huge = Packet.from_bytes(sparsify(np.array([3e38, 1], np.float32), k=2))
    out = np.array([-0.0, np.inf], np.float32)
    decode_add([huge], [0.0], out)
    assert np.signbit(out[0]) and out[1] == np.inf


def test_nothing_to_add(rng):
    out = rng.standard_normal(20).astype(np.float32)
    before = out.copy()
    decode_add([], [], out)
    empty = Packet.from_bytes(sparsify(np.empty(0, np.float32), k=0))
    assert decode(empty).shape == (0,)
    decode_add([empty], [1.0], np.empty(0, np.float32))
    assert np.array_equal(out, before)


# ---- kinds of accumulators ---------------------------------------------------------------------


def test_numpy_and_torch_structures(rng):
    torch = pytest.importorskip("torch")
    g = rng.standard_normal((6, 50)).astype(np.float32)
    packet = Packet.from_bytes(sparsify(g, k=30))
    flat = decode(packet)
    out = {"a": torch.zeros(2, 50), "b": torch.zeros(200, dtype=torch.float64)}
    assert decode_add([packet], [2.0], out) is out
    got = torch.cat([out["a"].reshape(-1).double(), out["b"]]).numpy()
    assert np.array_equal(got, 2.0 * flat)
    transposed = np.zeros((50, 6), np.float32).T
    decode_add([bytes(packet)], [1.0], transposed)
    assert np.array_equal(transposed, flat.reshape(6, 50))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_decode_into_a_structure(dtype, rng):
    torch = pytest.importorskip("torch")
    g = rng.standard_normal(300).astype(np.float32)
    packet = Packet.from_bytes(sparsify(g, k=30))
    flat = decode(packet)
    like = {"x": np.empty((10, 10), np_dtype(dtype)), "y": np.empty(200, np_dtype(dtype))}
    for out in (decode(packet, like=like), decode(packet, out=like)):
        assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
            "x": ((10, 10), np_dtype(dtype)),
            "y": ((200,), np_dtype(dtype)),
        }
        got = np.concatenate([out["x"].reshape(-1), out["y"]])
        assert np.array_equal(got, flat.astype(np_dtype(dtype)))
    tensor = decode(packet, like=[torch.empty(300, dtype=getattr(torch, dtype))])
    assert isinstance(tensor, list) and np.array_equal(
        tensor[0].double().numpy(), flat.astype(np_dtype(dtype)).astype(np.float64)
    )


# ---- the same bits everywhere ------------------------------------------------------------------

DIGESTS = """
import hashlib, numpy as np
from flcore.compression import Packet, decode, decode_add
from flcore.ops.quantize import quantize
from flcore.ops.sparsify import sparsify
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for numel in (17, 4097, 200_001):
    packets = [
        Packet.from_bytes(sparsify(rng.standard_normal(numel), k=numel // 9, values=v, index=i))
        for v in ("float32", "float16", "bfloat16") for i in ("tile16", "bitmask")
    ]
    for dtype in (np.float32, np.float64):
        out = rng.standard_normal(numel).astype(dtype)
        digest.update(decode_add(packets, np.linspace(-1, 1, 6), out).tobytes())
    digest.update(b"".join(decode(p).tobytes() for p in packets))
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes(rng):
    packets = packets_of(rng, 300_000, count=4)
    results = set()
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        out = decode_add(packets, [0.1, 0.2, 0.3, 0.4], np.ones(300_000, np.float32))
        results.add(out.tobytes() + decode(packets[1]).tobytes())
    assert len(results) == 1


# ---- errors: nothing is written ----------------------------------------------------------------


def test_all_packets_are_checked_before_anything_is_written(rng):
    good = bytes(packets_of(rng, 100)[0])
    bad = bytearray(good)
    bad[-1] ^= 1
    out = rng.standard_normal(100).astype(np.float32)
    before = out.tobytes()
    other = Packet.from_bytes(sparsify(np.ones(99, np.float32), k=1))
    for packets, weights, error, match in (
        ([good, bytes(bad)], [1, 1], PacketError, "checksum"),
        ([good, good[:-1]], [1, 1], PacketError, "the header says"),
        ([good, other], [1, 1], InvalidInputError, r"packets\[1\]: holds 99 coordinates"),
        ([good, good], [1], InvalidInputError, "weights: expected 2 values"),
        ([good, good], [1, np.nan], InvalidInputError, r"weights\[1\]: expected a finite number"),
        ([good, 3], [1, 1], DTypeError, r"packets\[1\]: expected a Packet or its bytes, got int"),
        (good, [1], DTypeError, "write \\[packet\\]"),
    ):
        with pytest.raises(error, match=match):
            decode_add(packets, weights, out)
        assert out.tobytes() == before


@pytest.mark.parametrize(
    ("out", "error", "match"),
    [
        (np.zeros(99, np.float32), InvalidInputError, "holds 100 coordinates, out holds 99"),
        (np.zeros(100, np.float16), DTypeError, "expected float32 or float64, got float16"),
        (np.zeros(100, np.int32), DTypeError, "expected float32 or float64, got int32"),
        ([1.0] * 100, DTypeError, "expected a NumPy array or a torch tensor, got float"),
    ],
)
def test_accumulators_that_do_not_fit(out, error, match, rng):
    with pytest.raises(error, match=match):
        decode_add(packets_of(rng, 100), [1, 1, 1], out)


def test_read_only_accumulators(rng):
    packet = packets_of(rng, 100)[0]
    out = np.zeros(100, np.float32)
    out.flags.writeable = False
    for call in (
        lambda: decode_add([packet], [1], out),
        lambda: decode_add([packet], [1], [out[:50], out[50:]]),
        lambda: decode(packet, out=out),
    ):
        with pytest.raises(InvalidInputError, match="read-only"):
            call()
    with pytest.raises(InvalidInputError, match="got both"):
        decode(packet, out=np.zeros(100), like=np.zeros(100))
    shifted = unaligned(np.zeros(100, np.float32))
    assert np.array_equal(decode(packet, out=shifted), decode(packet))
