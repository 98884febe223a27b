"""decode.cu and sparsify.cu on a machine without a GPU: compiled as C++, run thread by thread.

As in test_cuda_on_host.py: everything but the hardware, with each order of the threads between two
barriers, against the bytes of the CPU kernels.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from flcore import _arrays, _native, _variants
from flcore._state import State
from flcore.compression import Packet
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.decode import decode_add_into, decode_into
from flcore.ops.quantize import quantize
from flcore.ops.sparsify import sparsify
from host_library import shared
from support import HAS_TORCH

if not HAS_TORCH:
    pytest.skip("needs torch", allow_module_level=True)
import torch

pytestmark = pytest.mark.slow

# every codec whose coordinates decode one by one, in each of its forms; then two that do not
BUCKETS = (
    {"codec": "dense", "bits": 32, "bucket": 65536},
    {"codec": "dense", "bits": 16, "bucket": 65536, "values": "float16"},
    {"codec": "dense", "bits": 16, "bucket": 65536, "values": "bfloat16"},
    {"codec": "sign", "bits": 1, "bucket": 500},
    {"codec": "sign", "bits": 1, "bucket": 65536, "values": "bfloat16"},
    *({"codec": "uniform", "bits": b, "bucket": 60 + 7 * b} for b in range(2, 9)),
    *({"codec": "affine", "bits": b, "bucket": 1000 + b} for b in range(1, 9)),
    {"codec": "ternary", "bits": 2, "bucket": 300},
    {"codec": "ternary", "bits": 2, "form": 1, "bucket": 301},
    {"codec": "natural", "bits": 9, "bucket": 65536},
    {"codec": "natural", "bits": 8, "form": 1, "bucket": 65536},
    *(
        {"codec": "minifloat", "bits": b, "form": f, "bucket": 32}
        for f, b in ((1, 8), (2, 8), (3, 6), (4, 6), (5, 4), (6, 8), (7, 4))
    ),
    *(
        {"codec": "minifloat", "bits": b, "form": f, "bucket": 33, "values": "e8m0"}
        for f, b in ((1, 8), (2, 8), (3, 6), (4, 6), (5, 4), (6, 8))
    ),
    {"codec": "rotated", "bits": 4, "bucket": 2048},
)
SPARSE = tuple(
    {"values": values, "index": index}
    for values in ("float32", "float16", "bfloat16", "int8")
    for index in ("tile16", "bitmask", "rice", "bitpack")
)


@pytest.fixture(scope="module")
def library():
    """The module and the function that sets multiprocessors and the order of the threads."""
    return shared()


@pytest.fixture(params=["ascending", "descending"])
def variant(request, library, monkeypatch):
    """The Python variants, bound to the library."""
    module, configure = library
    descending = request.param == "descending"
    configure(2 if descending else 1, descending)
    monkeypatch.setattr(_native, "cuda", module)
    monkeypatch.setattr(_arrays, "queue", lambda device: (0, 0))
    return lambda op: getattr(importlib.import_module(f"flcore.ops._{op}_cuda"), op)


# ---- decode ------------------------------------------------------------------------------------


def packets_of(rng, numel):
    """One packet of every kind, sparse ones among the others."""
    made = []
    for i, options in enumerate((*BUCKETS, *SPARSE)):
        x = (rng.standard_normal(numel) * 10.0 ** (i % 5 - 2)).astype(np.float32)
        x[:: 5 + i] = 0
        if "codec" in options:
            made.append(quantize(x, **options))
        else:
            made.append(sparsify(x, k=int(numel * (0.3 if i % 3 else 0.02)) + 1, **options))
    order = rng.permutation(len(made))
    return [Packet.from_bytes(made[i]) for i in order]


def added(function, packets, weights, layers):
    out = [_arrays.view(x.copy()) for x in layers]
    function(packets, weights, out, True)
    return [v.array for v in out]


def assert_same(got, want, what=None):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.tobytes() == b.tobytes(), (what, i)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("numel", [1, 31, 4097, 8193, 70_001])
def test_decode_add_has_the_bits_of_the_cpu_kernel(variant, numel, dtype, rng):
    packets = packets_of(rng, numel)
    weights = list(rng.uniform(-1, 1, len(packets)))
    start = rng.standard_normal(numel).astype(dtype)
    want = start.copy()
    decode_add_into(packets, weights, [want], variant="cpu")
    assert_same(added(variant("decode"), packets, weights, [start]), [want])


def test_decode_into_layers(variant, rng):
    """Layers of either type that begin and end anywhere, some of them empty."""
    sizes = [1, 0, 17, 8192, 3, 65_536, 0, 20_000, 1]
    types = [(np.float32, np.float64)[i % 2] for i in range(len(sizes))]
    packets = packets_of(rng, sum(sizes))[::5]
    layers = [rng.standard_normal(n).astype(t) for n, t in zip(sizes, types, strict=True)]
    weights = list(rng.uniform(-1, 1, len(packets)))
    want = [x.copy() for x in layers]
    decode_add_into(packets, weights, want, variant="cpu")
    assert_same(added(variant("decode"), packets, weights, layers), want)
    for packet in packets:
        want, got = ([np.full_like(x, np.nan) for x in layers] for _ in range(2))
        decode_into(packet, want, variant="cpu")
        variant("decode")([packet], [1.0], [_arrays.view(x) for x in got], False)
        assert_same(got, want, packet.header.codec)


def test_decode_more_layers_and_packets_than_a_table_takes(variant, rng):
    numel = 700
    packets = packets_of(rng, numel)
    packets = [packets[i % len(packets)] for i in range(300)]
    weights = list(rng.uniform(-1, 1, len(packets)))
    layers = [np.zeros(n, np.float32) for n in [1] * 300 + [0, 400]]
    want = [x.copy() for x in layers]
    decode_add_into(packets, weights, want, variant="cpu")
    assert_same(added(variant("decode"), packets, weights, layers), want)


def test_decode_says_what_does_not_fit(variant, rng):
    packet = Packet.from_bytes(sparsify(np.ones(5, np.float32), k=2))
    with pytest.raises(InvalidInputError, match="holds 5 coordinates, out holds 6"):
        variant("decode")([packet], [1.0], [_arrays.view(np.zeros(6, np.float32))], True)
    with pytest.raises(InvalidInputError, match="expected one, got 2"):
        variant("decode")([packet] * 2, [1.0] * 2, [_arrays.view(np.zeros(5, np.float32))], False)
    with pytest.raises(InvalidInputError, match="expected float64 or float32, got code 3"):
        half = _arrays.view(torch.zeros(5, dtype=torch.bfloat16))
        variant("decode")([packet], [1.0], [half], True)
    variant("decode")([], [], [], True)


# ---- sparsify ----------------------------------------------------------------------------------

STATES = ("", "e", "h", "eh", "ev", "ehv")


def state_of(kept, numel, seed, *, narrow=False, spare=True, mask=False):
    """A state of random buffers, the same for the same seed."""
    rng = np.random.default_rng(seed)
    state = State(a=0.4, b=0.9, p=0.3, q=0.8, mask=mask)
    for name in kept:
        x = rng.standard_normal(numel).astype(np.float32)
        if narrow and name != "h":
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        setattr(state, name, x)
        if spare:
            state.spare[name] = np.zeros_like(x)
    return state


def compare(variant, update, make_state=State, tau=None, **options):
    """Both variants on the same update: packet, state and thresholds, which are returned."""
    left, right = make_state(), make_state()
    cuts = [None if tau is None else tau.copy() for _ in range(2)]
    want = sparsify(update, state=left, tau=cuts[0], variant="cpu", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_variants, "choose", lambda *_: variant("sparsify"))
        got = sparsify(update, state=right, tau=cuts[1], **options)
    assert got.tobytes() == want.tobytes()
    for name in ("e", "h", "v"):
        a, b = getattr(right, name), getattr(left, name)
        assert (a is None and b is None) or a.tobytes() == b.tobytes(), name
    if tau is not None:
        assert (cuts[0] == cuts[1]).all()
    return cuts[0]


UPDATES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "equal": lambda rng, n: np.full(n, -0.5),
    "few": lambda rng, n: rng.integers(0, 2, n),
    "zero": lambda rng, n: np.zeros(n),
    "same digit": lambda rng, n: rng.uniform(1, 1.0009, n),
    "subnormal": lambda rng, n: rng.standard_normal(n) * 2.0**-140,
    "spike": lambda rng, n: np.where(np.arange(n) == n // 3, 1e30, 1e-30),
    "sorted": lambda rng, n: np.arange(n) - n / 2,
}


@pytest.mark.parametrize("kind", UPDATES)
def test_sparsify_has_the_bits_of_the_cpu_kernel(variant, kind, rng):
    for numel, k in ((1, 1), (33, 32), (8193, 1), (70_001, 700), (20_000, 20_000)):
        update = UPDATES[kind](rng, numel).astype(np.float32)
        compare(variant, update, k=k)


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kept", STATES)
def test_sparsify_moves_the_state_on(variant, kept, narrow, spare, rng):
    update = [rng.standard_normal(n).astype(np.float32) for n in (3, 9000, 0, 10_001)]
    for mask in (False, True):
        compare(
            variant,
            update,
            lambda m=mask: state_of(kept, 19_004, 3, narrow=narrow, spare=spare, mask=m),
            k=500,
            round=2**33 + 5,
            seed=2**40 + 1,
            epoch=7,
            values="float16",
        )


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16", "int8"])
def test_sparsify_values_and_indices(variant, values, rng):
    update = (rng.standard_normal(140_000) * 10.0 ** rng.integers(-9, 9, 140_000)).astype(
        np.float32
    )
    update[:4] = 3.4e38, -3.4e38, 65519, 65520
    for index in ("tile16", "bitmask", "bitpack", "rice", "smallest"):
        make = lambda: state_of("eh", 140_000, 5)  # noqa: E731
        compare(variant, update / 4, make, k=3000, values=values, index=index)


def test_sparsify_layers_of_every_dtype(variant, rng):
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    sizes = (1, 8191, 40, 0, 8192, 100, 60_000, 7, 5000)
    update = [
        torch.from_numpy(rng.standard_normal(n)).to(types[i % 4]) for i, n in enumerate(sizes)
    ]
    numel = sum(sizes)
    compare(variant, update, lambda: state_of("e", numel, 1), k=1000)
    segments = np.array([0, 1, 1, 5000, 70_000, numel], np.int64)
    counts = np.array([1, 0, 4999, 10, 30], np.int64)
    tau = np.zeros(5, np.uint32)
    for spare in (False, True):
        tau = compare(
            variant,
            update,
            lambda s=spare: state_of("eh", numel, 1, spare=s),
            tau,
            k=counts,
            segments=segments,
        )
    assert (tau > 0).tolist() == [True, False, True, True, True]


def test_sparsify_carried_thresholds(variant, rng):
    update = rng.standard_normal(30_000).astype(np.float32)
    tau = np.zeros(1, np.uint32)
    for slack in (0.9, 0.0, 0.5, 0.9, 1.5, 1e9):
        noise = 0.1 * rng.standard_normal(30_000)
        make = lambda: state_of("eh", 30_000, 8)  # noqa: E731
        tau = compare(variant, (update + noise).astype(np.float32), make, tau, k=300, slack=slack)
        assert tau[0] > 0
    compare(variant, update, lambda: state_of("e", 30_000, 2), tau, k=300, rank=250)


def test_sparsify_with_a_floor(variant, rng):
    update = rng.standard_normal(30_000).astype(np.float32)
    for floor in (0.001, 1.5, 2.5, 10.0):
        for spare in (True, False):
            for rank in (0, 100):
                compare(
                    variant,
                    update,
                    lambda s=spare: state_of("v", 30_000, 4, spare=s),
                    np.zeros(1, np.uint32),
                    k=1000,
                    floor=floor,
                    rank=rank,
                )


@pytest.mark.parametrize("spare", [True, False])
def test_sparsify_leaves_the_state_alone_when_not_finite(variant, spare, rng):
    for bad in (np.nan, np.inf, 3.4e38):
        update = rng.standard_normal(20_000).astype(np.float32)
        update[15_000] = bad
        for tau in (None, np.array([0x3F000000], np.uint32)):
            state = state_of("ehv", 20_000, 9, spare=spare)
            state.a, state.q = 3.0, 2.0
            before = {n: getattr(state, n).tobytes() for n in "ehv"}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_variants, "choose", lambda *_: variant("sparsify"))
                with pytest.raises(NonFiniteError):
                    sparsify(update, k=100, state=state, tau=tau)
            assert {n: getattr(state, n).tobytes() for n in "ehv"} == before
            assert tau is None or tau[0] == 0x3F000000


def test_sparsify_of_nothing(variant):
    compare(variant, np.empty(0, np.float32), k=0)
    compare(variant, [np.empty(0, np.float32)], tau=np.zeros(1, np.uint32), k=0, index="bitmask")
