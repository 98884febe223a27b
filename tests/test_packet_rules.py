"""Rules and ops straight from packets: the bits of the same call on decoded float32 updates."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _native, compression, ops
from flcore.aggregation import (
    ARC,
    NNM,
    Bucketing,
    CenteredClipping,
    Clipping,
    FedAdam,
    FlagAggregator,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    Phocas,
    PrincipalGradient,
    Sharded,
    TrimmedMean,
)
from flcore.compression import Packet
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError, PacketError
from flcore.ops.quantize import quantize
from flcore.ops.sparsify import sparsify
from rule_list import RULES, ident
from support import HAS_TORCH, np_dtype, outputs_per_level

BUCKETS = {
    "dense": {"bits": 32, "bucket": 65536},
    "sign": {"bits": 1, "bucket": 500},
    "uniform": {"bits": 4, "bucket": 64},
    "affine": {"bits": 8, "bucket": 1000},
    "natural": {"bits": 9, "bucket": 65536},
    "minifloat": {"bits": 8, "form": 1, "bucket": 32},
    "ternary": {"bits": 2, "bucket": 300},
    "rotated": {"bits": 4, "bucket": 2048},
}
CODECS = ["sparse", "bitmask", *BUCKETS]


def make(codec: str, values: np.ndarray) -> Packet:
    """Return a packet of `values` (d,)."""
    if codec in BUCKETS:
        return Packet(quantize(values, codec=codec, **BUCKETS[codec]))
    index = "tile16" if codec == "sparse" else "bitmask"
    return Packet(sparsify(values, k=(values.size + 1) // 2, values="float32", index=index))


def decode(packet: Packet) -> np.ndarray:
    return ops.decode.decode(packet)


def clients(n: int, numel: int, codecs: list[str] | None = None) -> list[Packet]:
    """Return packets of n clients about a common mean, every codec in turn."""
    rng = np.random.default_rng(1000 * n + numel)
    mean = rng.standard_normal(numel)
    codecs = codecs or CODECS
    return [
        make(codecs[i % len(codecs)], np.float32(mean + rng.standard_normal(numel)))
        for i in range(n)
    ]


def assert_same_bits(got, expected) -> None:
    """Equal bit by bit, but for the sign of zeros."""
    assert type(got) is type(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(got, list | tuple):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)
        return
    if not isinstance(got, np.ndarray):  # torch
        got, expected = got.double().numpy(), expected.double().numpy()
    assert got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_array_equal(got, expected)


# ---- by hand -----------------------------------------------------------------------------------


def test_by_hand():
    rows = np.float32([[1, 4], [2, 5], [3, -9], [10, 6], [-50, 7]])
    packets = [make("dense", row) for row in rows]
    np.testing.assert_array_equal(TrimmedMean(1)(packets), np.float32([2, 5]))
    np.testing.assert_array_equal(Median()(packets), np.float32([2, 5]))
    np.testing.assert_array_equal(Mean()(packets[:2], weights=[3, 1]), np.float32([1.25, 4.25]))
    signs = [make("sign", np.float32([2, -2, 2])), make("sparse", np.float32([0, 0, 8]))]
    np.testing.assert_array_equal(ops.combine(signs, [1, 0.5]), np.float32([2, -2, 6]))
    np.testing.assert_array_equal(ops.gram(signs).norms, [12, 64])


# ---- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 1025, 66_001])
@pytest.mark.parametrize("rule", RULES, ids=ident)
def test_every_rule_has_the_bits_of_decode_then_rule(rule, numel):
    packets = clients(11, numel)
    rows = [decode(p) for p in packets]
    assert_same_bits(rule(packets), rule(rows))
    found, expected = rule.diagnose(packets), rule.diagnose(rows)
    assert found.selected == expected.selected and found.nonfinite == ()
    np.testing.assert_array_equal(found.norms, expected.norms)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 32, 33, 64, 65, 129, 150])
def test_any_number_of_clients(n):
    packets = clients(n, 2500)
    rows = [decode(p) for p in packets]
    f = (n - 1) // 2 // 2
    for rule in (Mean(), Median(), TrimmedMean(f), MeaMed(f), Phocas(f), GeometricMedian()):
        assert_same_bits(rule(packets), rule(rows))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("numel", [0, 1, 15, 17, 1000, 4097, 66_001])
def test_one_codec_alone(codec, numel):
    packets = clients(5, numel, [codec])
    rows = [decode(p) for p in packets]
    for rule in (Mean(), TrimmedMean(1), Median(even="upper")):
        assert_same_bits(rule(packets), rule(rows))
    if numel:
        assert_same_bits(Krum(1)(packets), Krum(1)(rows))


ENCODED = {
    "topk": compression.TopK(ratio=0.05, values="bfloat16", index="rice"),
    "threshold": compression.Threshold(tau=1.5),
    "randk": compression.RandK(ratio=0.1),
    "rotated": compression.Rotated(4, 1024),
    "thc": compression.THC(4, block=1024),
    "sign": compression.Sign(100),
    "ternary": compression.Ternary(),
    "absmax": compression.AbsMax(4, 100),
    "uniform": compression.Uniform(3, 64),
    "affine": compression.Affine(4, 33),
    "lowrank": compression.LowRank(2),
    "sketch": compression.Sketch(columns=512, rows=5),
    "dense": compression.Dense("float16"),
    "natural": compression.Natural(),
    "fp8": compression.FP8(),
    "mx": compression.MX("e2m1"),
    "nf4": compression.NF4(),
}


def test_every_codec_is_there():
    assert {type(codec) for codec in ENCODED.values()} == set(compression.CODECS.values())


@pytest.mark.parametrize("name", ENCODED)
def test_every_codec_beside_others(name):
    rng = np.random.default_rng(7)
    updates = [np.float32(rng.standard_normal((70, 67))) for _ in range(5)]
    codec = ENCODED[name]
    packets = [
        compression.Encoder(codec, like=u, tensor_table=True).encode(u, seed=i)
        for i, u in enumerate(updates[:3])
    ]
    packets += [make("uniform", u.reshape(-1)) for u in updates[3:]]
    rows = [decode(p) for p in packets]
    for rule in (Mean(), TrimmedMean(1), Krum(1)):
        assert_same_bits(rule(packets), rule(rows))


def test_weights_and_clients_that_are_not_read():
    packets = clients(8, 3000)
    rows = [decode(p) for p in packets]
    weights = [3, 0, 1, 2, 0, 5, 1, 1]
    for rule in (Mean(), Mean(accumulate="float64"), GeometricMedian(), CenteredClipping(30.0)):
        assert_same_bits(rule(packets, weights), rule(rows, weights))
    some = [i for i, w in enumerate(weights) if w]
    assert_same_bits(
        Mean()(packets, weights), Mean()([packets[i] for i in some], [weights[i] for i in some])
    )


@pytest.mark.parametrize("accumulate", ["float32", "float64", "reproducible"])
def test_mean_in_every_accumulator(accumulate):
    packets = clients(9, 5000)
    rows = [decode(p) for p in packets]
    rule = Mean(accumulate=accumulate)
    weights = np.arange(1.0, 10)
    assert_same_bits(rule(packets, weights), rule(rows, weights))
    if accumulate == "reproducible":
        assert_same_bits(rule(packets[::-1], weights[::-1]), rule(packets, weights))


def test_preaggregators():
    packets = clients(12, 3001)
    rows = [decode(p) for p in packets]
    for rule in (
        NNM(2) >> TrimmedMean(2),
        Clipping(40.0) >> Median(),
        ARC(2) >> Krum(2),
        Clipping(40.0) >> NNM(2) >> MeaMed(2),
        Bucketing(2, seed=3) >> GeometricMedian(),
    ):
        assert_same_bits(rule(packets), rule(rows))


def test_center():
    packets = clients(7, 4000)
    rows = [decode(p) for p in packets]
    center = np.random.default_rng(5).standard_normal(4000).astype(np.float32)
    rule = CenteredClipping(20.0, 2)
    assert_same_bits(rule(packets, center=center), rule(rows, center=center))
    layers = [center[:1000].reshape(10, 100), center[1000:]]
    split = [[row[:1000].reshape(10, 100), row[1000:]] for row in rows]
    assert_same_bits(rule(packets, center=layers, like=layers), rule(split, center=layers))
    center[7] = np.nan
    with pytest.raises(NonFiniteError, match="center: NaN or infinity"):
        rule(packets, center=center)


# ---- layers ------------------------------------------------------------------------------------

SHAPES = {"a": (), "b": (7,), "none": (0, 3), "c": (61, 33), "d": (2, 5, 401), "e": (17,)}
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES.values())


def split(flat: np.ndarray) -> dict[str, np.ndarray]:
    """Cut (TOTAL,) into layers."""
    layers, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        layers[name] = flat[start : start + size].reshape(shape)
        start += size
    return layers


@pytest.mark.parametrize("kind", [dict, list, tuple])
@pytest.mark.parametrize(
    "rule",
    [
        Mean(),
        TrimmedMean(1),
        Krum(1),
        FlagAggregator(2, 3),
        PrincipalGradient(),
        NNM(1) >> Median(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_like_gives_the_layers(rule, kind):
    packets = clients(9, TOTAL)
    rows = [split(decode(p)) for p in packets]
    like = split(np.zeros(TOTAL, np.float32))
    if kind is not dict:
        rows, like = [kind(row.values()) for row in rows], kind(like.values())
    assert_same_bits(rule(packets, like=like), rule(rows))
    out = split(np.full(TOTAL, 9, np.float32))
    out = out if kind is dict else kind(out.values())
    assert rule(packets, like=like, out=out) is out
    assert_same_bits(out, rule(rows))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_like_gives_the_dtype_of_a_float32_result(dtype):
    packets = clients(6, TOTAL)
    like = {k: x.astype(np_dtype(dtype)) for k, x in split(np.zeros(TOTAL)).items()}
    for rule in (TrimmedMean(1), Krum(1), Mean(accumulate="float64")):
        expected = split(rule([decode(p) for p in packets]))
        got = rule(packets, like=like)
        for name, layer in got.items():
            assert layer.dtype == np_dtype(dtype) and layer.shape == SHAPES[name]
            if isinstance(rule, TrimmedMean):  # sums go into the dtype of the result at once
                np.testing.assert_array_equal(layer, expected[name].astype(layer.dtype))
            np.testing.assert_allclose(
                layer.astype(np.float64), expected[name], rtol=2**-7, atol=2**-20
            )


@pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
def test_like_of_torch():
    import torch

    packets = clients(6, TOTAL)
    like = {k: torch.zeros(shape, dtype=torch.float32) for k, shape in SHAPES.items()}
    for rule in (Mean(), TrimmedMean(1), Krum(1)):
        expected = split(rule([decode(p) for p in packets]))
        got = rule(packets, like=like)
        assert all(isinstance(x, torch.Tensor) for x in got.values())
        for name, layer in got.items():
            np.testing.assert_array_equal(layer.numpy(), expected[name])


def test_out_that_is_not_contiguous():
    packets = clients(5, 600)
    memory = np.zeros((2, 600), np.float32)
    for rule in (Mean(), Median()):
        out = memory.T[:, 1]
        assert rule(packets, out=out) is out
        np.testing.assert_array_equal(out, rule(packets))
        assert not memory[0].any()


# ---- levels and threads ------------------------------------------------------------------------

SCRIPT = """
import sys, zlib
sys.path.insert(0, "tests")
import numpy as np
from flcore import _native, compression, ops
from flcore.aggregation import FedAdam, Krum, Mean, Median, TrimmedMean
from test_packet_rules import clients
_native.set_num_threads(2)
packets = clients(20, 70_001)
for rule in (Mean(), Mean(accumulate="reproducible"), Median(), TrimmedMean(3), Krum(3)):
    print(zlib.crc32((rule(packets) + 0).tobytes()))
print(zlib.crc32(ops.gram(packets).distances.tobytes()))
model = np.zeros(70_001, np.float32)
print(zlib.crc32((FedAdam(lr=0.1).step(model, packets) + 0).tobytes()))
"""


def test_same_bits_at_every_level():
    printed = outputs_per_level(SCRIPT)
    assert len(set(printed.values())) == 1


def test_same_bits_for_any_number_of_threads():
    packets = clients(9, 140_000)
    model = np.zeros(140_000, np.float32)
    results = []
    for threads in (1, 2, 5):
        with _native.num_threads(threads):
            results.append([rule(packets) for rule in (Mean(), TrimmedMean(2), Krum(2))])
            results[-1].append(FedAdam(lr=0.1).step(model, packets))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# ---- errors ------------------------------------------------------------------------------------


def test_bytes_are_checked_and_used():
    packets = clients(5, 900)
    sent = [bytes(p) for p in packets[:4]] + [packets[4]]
    assert_same_bits(TrimmedMean(1)(sent), TrimmedMean(1)(packets))
    broken = bytearray(sent[2])
    broken[-1] ^= 1
    with pytest.raises(PacketError):
        TrimmedMean(1)([*sent[:2], bytes(broken)])


def test_errors_name_the_argument():
    packets = clients(4, 100)
    for call in (Mean(), Median(), Krum(1), ops.select, ops.gram):
        with pytest.raises(InvalidInputError, match=r"updates\[4\]: holds 90 coordinates"):
            call([*packets, *clients(1, 90)])
        with pytest.raises(DTypeError, match=r"updates\[4\]: expected a packet like the others"):
            call([*packets, np.zeros(100, np.float32)])
        with pytest.raises(InvalidInputError, match="updates: expected at least one"):
            call([])
        with pytest.raises(DTypeError, match="updates: expected a list of updates"):
            call(packets[0])
        with pytest.raises(InvalidInputError, match="like: holds 99 values"):
            call(packets, like=np.zeros(99))
        with pytest.raises(DTypeError, match=r"like\[1\]: expected float64.*got int64"):
            call(packets, like=[np.zeros(50), np.zeros(50, np.int64)])
        with pytest.raises(InvalidInputError, match="like: goes with packets"):
            call([np.zeros(100)] * 4, like=np.zeros(100))
    with pytest.raises(InvalidInputError, match="scales: packets have their own"):
        ops.combine(packets, [1] * 4, scales=[1] * 4)
    with pytest.raises(InvalidInputError, match="weights: expected 4 values"):
        ops.combine(packets, [1] * 3)
    with pytest.raises(InvalidInputError, match="out: expected shape"):
        Mean()(packets, out=np.zeros(99, np.float32))
    with pytest.raises(DTypeError, match="out: expected dtype float32"):
        Median()(packets, out=np.zeros(100))
    frozen = np.zeros(100, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(InvalidInputError, match="out: the array is read-only"):
        Median()(packets, out=frozen)


def test_shards_are_not_packets(tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        with pytest.raises(DTypeError, match="updates: expected shards of updates, got packets"):
            Sharded(Median())(clients(3, 10))
    finally:
        dist.destroy_process_group()
