"""Packets on a GPU: decode_add and top-k have the bits of the CPU kernels."""

from __future__ import annotations

import numpy as np
import pytest

from flcore import _variants
from flcore._state import State
from flcore.compression import Packet
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.decode import decode_add_into, decode_into
from flcore.ops.quantize import quantize
from flcore.ops.sparsify import sparsify

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

DEVICE = "cuda"
KINDS = (
    {"values": "float32"},
    {"values": "bfloat16", "index": "bitmask"},
    {"values": "int8", "index": "rice"},
    {"codec": "sign", "bits": 1, "bucket": 500},
    {"codec": "uniform", "bits": 3, "bucket": 65},
    {"codec": "affine", "bits": 8, "bucket": 1000},
    {"codec": "dense", "bits": 16, "bucket": 65536, "values": "float16"},
    {"codec": "natural", "bits": 9, "bucket": 65536},
    {"codec": "minifloat", "bits": 8, "form": 1, "bucket": 32},
    {"codec": "minifloat", "bits": 4, "form": 7, "bucket": 64},
    {"codec": "ternary", "bits": 2, "form": 1, "bucket": 301},
    {"codec": "rotated", "bits": 4, "bucket": 2048},
)


@pytest.fixture(params=["cuda"])
def variant(request) -> str:
    for op in ("decode", "sparsify"):
        if why := _variants.available(op, DEVICE)[request.param]:
            pytest.skip(why)
    return request.param


def packets_of(rng, numel: int, count: int) -> list[Packet]:
    made = []
    for i in range(count):
        options = KINDS[i % len(KINDS)]
        x = rng.standard_normal(numel).astype(np.float32)
        if "codec" in options:
            made.append(quantize(x, variant="cpu", **options))
        else:
            made.append(sparsify(x, k=max(1, numel // (3 + 30 * (i % 4))), **options))
    return [Packet.from_bytes(x) for x in made]


def assert_same_bits(got: torch.Tensor, want: np.ndarray, what=None) -> None:
    assert got.cpu().numpy().tobytes() == want.tobytes(), what


# ---- decode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_decode_add_has_the_bits_of_the_cpu_kernel(variant, dtype, rng):
    for numel, count in ((1, 12), (8191, 13), (65_537, 300), (1_500_001, 24)):
        packets, weights = packets_of(rng, numel, count), list(rng.uniform(-1, 1, count))
        want = rng.standard_normal(numel).astype(dtype)
        got = torch.from_numpy(want).to(DEVICE)
        decode_add_into(packets, weights, [want], variant="cpu")
        decode_add_into(packets, weights, [got], variant=variant)
        assert_same_bits(got, want, (numel, count))


def test_small_calls_of_decode(variant, rng):
    """Few values through every path; what compute-sanitizer runs."""
    sizes = (1, 3000, 0, 7000, 5)
    packets, weights = packets_of(rng, sum(sizes), 12), list(rng.uniform(-1, 1, 12))
    types = (np.float32, np.float64)
    want = [rng.standard_normal(n).astype(types[i % 2]) for i, n in enumerate(sizes)]
    got = [torch.from_numpy(x).to(DEVICE) for x in want]
    decode_add_into(packets, weights, want, variant="cpu")
    decode_add_into(packets, weights, got, variant=variant)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    decode_into(packets[1], got, variant=variant)
    decode_into(packets[1], want, variant="cpu")
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def test_layers_are_on_one_device(variant, rng):
    packets = packets_of(rng, 20, 1)
    with pytest.raises(InvalidInputError, match="one device"):
        decode_add_into(packets, [1.0], [torch.zeros(10), torch.zeros(10, device=DEVICE)])


# ---- sparsify ----------------------------------------------------------------------------------


def states(kept: str, numel: int, narrow: bool, spare: bool) -> tuple[State, State]:
    """The same random state in NumPy arrays and on the device."""
    rng = np.random.default_rng(3)
    both = State(a=0.4, b=0.9, p=0.3, q=0.8), State(a=0.4, b=0.9, p=0.3, q=0.8)
    for name in kept:
        x = torch.from_numpy(rng.standard_normal(numel).astype(np.float32))
        x = x.bfloat16() if narrow and name != "h" else x
        there = x.to(DEVICE)
        here = (
            x.view(torch.int16).numpy().view(np.uint16) if x.itemsize == 2 else x.numpy()
        ).copy()
        for state, array in zip(both, (here, there), strict=True):
            setattr(state, name, array)
        if spare:
            both[0].spare[name], both[1].spare[name] = np.empty_like(here), torch.empty_like(there)
    return both


def assert_same_state(there: State, here: State) -> None:
    for name, x in here.buffers().items():
        y = getattr(there, name).cpu()
        y = y.view(torch.int16) if y.dtype == torch.bfloat16 else y
        assert y.numpy().tobytes() == x.tobytes(), name


def compare(variant, update, kept="", narrow=False, spare=True, tau=None, **options) -> None:
    numel = sum(x.numel() for x in update)
    here, there = states(kept, numel, narrow, spare)
    cuts = [None if tau is None else tau.copy() for _ in range(2)]
    want = sparsify(update, state=here, tau=cuts[0], variant="cpu", **options)
    on_gpu = [x.to(DEVICE) for x in update]
    got = sparsify(on_gpu, state=there, tau=cuts[1], variant=variant, **options)
    assert got.tobytes() == want.tobytes()
    assert_same_state(there, here)
    if tau is not None:
        assert (cuts[0] == cuts[1]).all()
        tau[:] = cuts[0]


def gradient(rng, *sizes: int) -> list[torch.Tensor]:
    types = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    made = [torch.from_numpy(rng.standard_normal(n)) for n in sizes]
    return [x.to(types[i % 4]) for i, x in enumerate(made)]


@pytest.mark.parametrize("kept", ["", "e", "eh", "ehv"])
def test_top_k_has_the_bits_of_the_cpu_kernel(variant, kept, rng):
    for sizes, k in (((1,), 1), ((70_001,), 700), ((3, 0, 1_000_000, 9000), 12_345)):
        for narrow in (False, True):
            for spare in (False, True):
                update = gradient(rng, *sizes)
                compare(
                    variant, update, kept, narrow, spare, k=k, round=2, seed=3, values="float16"
                )


def test_small_calls_of_top_k(variant, rng):
    """Few values through every path; what compute-sanitizer runs."""
    update, tau = gradient(rng, 5, 0, 20_000, 3000), np.zeros(1, np.uint32)
    for _ in range(2):  # without thresholds, and with those of the last call
        compare(variant, update, "eh", tau=tau, k=100)
    compare(variant, update, "ev", narrow=True, spare=False, k=23_005, values="int8")
    update[0][0] = float("nan")
    with pytest.raises(NonFiniteError):
        sparsify([x.to(DEVICE) for x in update], k=5, variant=variant)


def test_top_k_of_hard_updates(variant, rng):
    """Ties, keys that share their leading digits, segments, floors, carried thresholds."""
    n = 300_000
    equal, near = torch.full((n,), -0.5), torch.from_numpy(rng.uniform(1, 1.0009, n)).float()
    for update in (equal, near, torch.zeros(n)):
        compare(variant, [update], "e", k=3000, values="bfloat16", index="bitmask")
    update = gradient(rng, n)
    starts = np.array([0, 10, 10, 100_000, n], np.int64)
    tau = np.zeros(4, np.uint32)
    for _ in range(2):
        compare(
            variant, update, "e", tau=tau, k=np.array([3, 0, 99, 5000], np.int64), segments=starts
        )
    for floor in (0.5, 3.0, 50.0):
        compare(variant, update, "v", tau=np.zeros(1, np.uint32), k=2000, floor=floor, rank=100)
    tau = np.array([0x3F800000], np.uint32)
    for slack in (0.9, 0.0, 1.5):
        compare(variant, update, "eh", tau=tau, k=3000, slack=slack, index="rice")
