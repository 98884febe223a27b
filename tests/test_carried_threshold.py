"""One pass with a guess of the threshold: the same bytes as two passes, whatever the guess."""

from __future__ import annotations

import numpy as np
import pytest

import flcore
from flcore._state import State
from flcore.compression import DGC, EF14, EF21, EControl, Encoder, Packet, Threshold, TopK, decode
from flcore.errors import InvalidInputError, NonFiniteError
from flcore.ops.sparsify import sparsify
from flcore.ops.threshold import sample_threshold
from flcore.reference import sparsify as reference
from support import np_dtype, outputs_per_level, unaligned

SLACKS = (0.0, 0.5, 0.9, 1.5)
# two tiles and a bit, which is more than is selected in cache
NUMEL = 2 * 65_536 + 1234


def state_of(names, numel, *, spare, dtype="float32", **factors):
    rng = np.random.default_rng(3)
    wide = np.float32 if dtype == "float32" else np.uint16
    buffers = {n: np.zeros(numel, np.float32 if n == "h" else wide) for n in names}
    if "h" in buffers:
        buffers["h"][:] = rng.standard_normal(numel)
    spares = {n: np.full_like(x, 9) for n, x in buffers.items() if n != "h"} if spare else {}
    return State(**buffers, **factors, spare=spares)


def drifting(rounds, numel):
    """Laplace vectors that change a little from round to round, and by a lot at the end."""
    rng = np.random.default_rng(5)
    x = rng.laplace(size=numel)
    for t in range(rounds):
        x = 0.9 * x + 0.3 * rng.laplace(size=numel)
        yield (x * (100 if t == rounds - 2 else 1)).astype(np.float32)


def run(names, *, spare=True, slack=0.9, variant="cpu", k=2000, rounds=5, **factors):
    state = state_of(names, NUMEL, spare=spare, **factors)
    tau = np.zeros(1, np.uint32)
    result = []
    for t, g in enumerate(drifting(rounds, NUMEL)):
        packet = sparsify(g, k=k, state=state, tau=tau, slack=slack, variant=variant, round=t)
        kept = {name: x.tobytes() for name, x in state.buffers().items()}
        result.append((packet.tobytes(), tau.tobytes(), kept))
    return result


FAMILIES = {
    "none": ("", {}),
    "ef14": ("e", {"a": 0.9, "b": 0.9}),
    "ef21": ("h", {}),
    "ef21 momentum": ("hv", {"p": 0.5, "q": 0.5}),
    "econtrol": ("eh", {"a": 0.01, "b": 1.0}),
    "dgc": ("ev", {"p": 0.9, "mask": True}),
    "all": ("ehv", {"a": 0.3, "b": 0.8, "p": 0.7, "q": 0.2, "mask": True}),
    "ef14 bfloat16": ("e", {"dtype": "bfloat16"}),
    "dgc bfloat16": ("ev", {"p": 0.9, "mask": True, "dtype": "bfloat16"}),
    "all bfloat16": ("ehv", {"a": 0.3, "b": 0.8, "p": 0.7, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_reference(family):
    names, factors = FAMILIES[family]
    want = run(names, variant="reference", **factors)
    assert run(names, **factors) == want, "one pass"
    assert run(names, spare=False, **factors) == want, "in place"


@pytest.mark.parametrize("family", ["econtrol", "none", "dgc"])
def test_the_guess_does_not_change_a_bit(family):
    """0: everything is a candidate, too many; 1.5: too few; both fall back to the histograms."""
    names, factors = FAMILIES[family]
    want = run(names, spare=bool(names == ""), slack=0.0, **factors)
    for slack in SLACKS:
        assert run(names, slack=slack, **factors) == want, slack


def test_thresholds_that_mislead(rng):
    """Any carried key, right or absurd, gives the same packet; the right one comes back."""
    g = rng.standard_normal(NUMEL).astype(np.float32)
    want = sparsify(g, k=500)
    last = reference.keys(g)[reference.select(g, 500)].min()
    for guess in (0, 1, 0x3F800000, last, last + 1, 0x7F7FFFFF, 0x7F800000, 0xFFFFFFFF):
        tau = np.array([guess], np.uint32)
        assert sparsify(g, k=500, tau=tau).tobytes() == want.tobytes(), hex(guess)
        assert tau[0] == last


@pytest.mark.parametrize("name", ["zero", "equal", "few", "rising", "spike", "subnormal", "near"])
def test_adversarial_values_with_a_guess(name):
    d = NUMEL
    x = {
        "zero": np.zeros(d),
        "equal": np.full(d, -1.5),
        "few": np.arange(d) % 3,
        "rising": np.arange(d),
        "spike": np.eye(1, d, 70_000)[0],
        "subnormal": np.arange(d, dtype=np.uint32).view(np.float32),
        "near": np.linspace(1, 1.0009, d),
    }[name].astype(np.float32)
    for k in (1, d // 100, d // 3, d - 1, d):
        kept = reference.select(x, k)
        state = state_of("e", d, spare=True, a=0.0, b=0.0)
        tau = np.zeros(1, np.uint32)
        for _ in range(2):
            packet = sparsify(x, k=k, state=state, tau=tau)
            assert Packet.from_bytes(packet).body().indices.tolist() == kept.tolist(), k
            assert tau[0] == reference.keys(x[kept]).min()


def test_not_finite_with_a_guess_leaves_everything(rng):
    g = rng.standard_normal(NUMEL).astype(np.float32)
    state = state_of("eh", NUMEL, spare=True, a=0.1)
    tau = np.zeros(1, np.uint32)
    sparsify(g, k=500, state=state, tau=tau)
    before = {name: x.copy() for name, x in state.buffers().items()}
    guess = tau.copy()
    for at in (0, 100_000, NUMEL - 1):
        bad = g.copy()
        bad[at] = np.nan
        with pytest.raises(NonFiniteError, match=f"flat position {at}; nothing was encoded"):
            sparsify(bad, k=500, state=state, tau=tau)
        assert np.array_equal(tau, guess)
        assert all(np.array_equal(x, before[name]) for name, x in state.buffers().items())


def test_one_pass_writes_as_it_reads(rng):
    """Only then has a value at the end that is not finite been found after spares were written."""
    g = rng.standard_normal(NUMEL).astype(np.float32)
    g[-1] = np.inf
    last = int(reference.keys(np.float32(2.0).reshape(1))[0])
    for guess in (last, 0):
        state = state_of("e", NUMEL, spare=True)
        tau = np.array([guess], np.uint32)
        with pytest.raises(NonFiniteError):
            sparsify(g, k=9000, state=state, tau=tau)
        assert (state.spare["e"] != 9).any()
    state = state_of("e", NUMEL, spare=False)
    with pytest.raises(NonFiniteError):
        sparsify(g, k=9000, state=state)
    assert not state.e.any()


DIGESTS = """
import hashlib, numpy as np
from flcore._state import State
from flcore.ops.sparsify import sparsify
from flcore.ops.threshold import sample_threshold
digest = hashlib.sha256()
for names, wide in (("eh", np.float32), ("ev", np.uint16)):
    rng = np.random.default_rng(5)
    d = 300_001
    buffers = {n: np.zeros(d, np.float32 if n == "h" else wide) for n in names}
    spare = {n: np.zeros_like(x) for n, x in buffers.items() if n != "h"}
    state = State(**buffers, a=0.02, p=0.9, mask=True, spare=spare)
    tau = np.zeros(1, np.uint32)
    for t in range(4):
        g = rng.standard_normal(d).astype("f4" if t % 2 else "f8")
        digest.update(np.float32(sample_threshold(g, ratio=0.02, state=state, phase=t)).tobytes())
        digest.update(sparsify(g, k=3000, state=state, tau=tau, round=t).tobytes())
        digest.update(b"".join(x.tobytes() for x in state.buffers().values()) + tau.tobytes())
print(digest.hexdigest())
"""


def test_instruction_set_levels_give_identical_bytes():
    printed = outputs_per_level(DIGESTS)
    assert len(set(printed.values())) == 1, printed


def test_thread_counts_give_identical_bytes():
    results = []
    for threads in (1, 2, 3):
        flcore.set_num_threads(threads)
        results.append(run("ehv", a=0.3, p=0.5, mask=True))
    assert results[0] == results[1] == results[2]


# ---- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [None, EF14(), EF21(), EF21(momentum=0.5), EControl(), DGC()])
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_carried_and_restored_encoders_agree(feedback, scope):
    """A threshold comes with the state: an encoder that was saved goes on bit for bit."""
    sizes = (150_000, 3, 90_000)
    layers = [np.split(g[: sum(sizes)], np.cumsum(sizes)[:-1]) for g in drifting(5, 250_000)]
    encoder = Encoder(TopK(ratio=0.01, scope=scope), feedback, like=layers[0])
    for update in layers[:2]:
        encoder.encode(update)
    restored = Encoder(TopK(ratio=0.01, scope=scope), feedback, like=layers[0])
    restored.load_state_dict(encoder.state_dict())
    for update in layers[2:]:
        last = bytes(encoder.encode(update))
        assert last == bytes(restored.encode(update))
    in_place = Encoder(TopK(ratio=0.01, scope=scope), feedback, like=layers[0], in_place=True)
    for update in layers:
        packet = in_place.encode(update)
    assert bytes(packet) == last
    ours, theirs = encoder.state_dict(), in_place.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ---- the threshold codec ------------------------------------------------------------------------


def sent(packet):
    body = packet.body()
    return body.indices, body.values


@pytest.mark.parametrize("numel", [1, 17, 5000, 65_537, NUMEL])
@pytest.mark.parametrize("in_place", [False, True])
def test_fixed_threshold_keeps_what_reaches_it(numel, in_place, rng):
    g = rng.standard_normal(numel).astype(np.float32)
    g[0] = -1.5
    encoder = Encoder(Threshold(tau=1.5), EF14(), like=g, in_place=in_place)
    whole = g.copy()
    for _ in range(3):
        index, values = sent(encoder.encode(g))
        want = np.flatnonzero(np.abs(whole) >= np.float32(1.5))
        assert np.array_equal(index, want) and np.array_equal(values, whole[want])
        whole[want] = 0
        assert np.array_equal(encoder.e, whole)
        whole += g


def test_too_many_entries_are_cut_to_the_largest(rng):
    """Exact top-k of the capacity: no index is favoured, equal ones go to the smaller index."""
    for d in (300, NUMEL):
        g = rng.standard_normal(d).astype(np.float32)
        capacity = -(-d // 10)
        for values in (g, np.ones(d, np.float32)):
            index, _ = sent(Encoder(Threshold(tau=0.25, max_ratio=0.1), like=g).encode(values))
            assert index.tolist() == reference.select(values, capacity).tolist()
    nothing = Encoder(Threshold(tau=9.0), like=g).encode(g)
    assert nothing.body().indices.size == 0 and not decode(nothing).any()
    everything = Encoder(Threshold(tau=0), like=g).encode(g)
    assert everything.body().indices.size == g.size


@pytest.mark.parametrize("estimate", ["carried", "sampled"])
def test_estimated_thresholds_hold_the_ratio_on_average(estimate):
    codec = Threshold(ratio=0.02, max_ratio=0.05, estimate=estimate)
    encoder = Encoder(codec, like=np.zeros(NUMEL, np.float32))
    counts = []
    rng = np.random.default_rng(0)
    for t in range(12):
        g = rng.laplace(size=NUMEL).astype(np.float32)
        counts.append(sent(encoder.encode(g, round=t))[0].size / NUMEL)
    assert abs(np.mean(counts) - 0.02) < 0.0015 and max(np.abs(np.array(counts) - 0.02)) < 0.006


def test_carried_threshold_is_the_one_that_held_the_ratio(rng):
    g = rng.standard_normal(NUMEL).astype(np.float32)
    encoder = Encoder(Threshold(ratio=0.01, max_ratio=0.02), like=g)
    target = -(-NUMEL // 100)
    encoder.encode(g)
    known = encoder.state_dict()["codec.threshold.tau"][0]
    exact = np.sort(reference.keys(g))[-target]
    assert known in (0, exact)  # 0: the sample's was too high
    while not known:
        encoder.encode(g, round=encoder.epoch)
        known = encoder.state_dict()["codec.threshold.tau"][0]
    assert sent(encoder.encode(g))[0].size == target


def test_ratio_of_an_update_that_is_not_finite(rng):
    g = rng.standard_normal(5000).astype(np.float32)
    g[:] = np.nan
    with pytest.raises(NonFiniteError, match="got nan at flat position 0"):
        Encoder(Threshold(ratio=0.1), like=g).encode(g)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "expected either tau or ratio"),
        ({"tau": 1.0, "ratio": 0.1}, "expected either tau or ratio"),
        ({"tau": -1.0}, "tau: expected a finite float32 >= 0"),
        ({"tau": 1e39}, "tau: expected a finite float32 >= 0"),
        ({"ratio": 0.0}, "ratio: expected 0 < ratio <= 1"),
        ({"ratio": 0.1, "max_ratio": 0.05}, "max_ratio: expected 0.1 to 1"),
        ({"ratio": 0.1, "estimate": "fitted"}, "estimate: expected one of carried, sampled"),
        ({"ratio": 0.1, "values": "float64"}, "values: expected one of"),
        ({"ratio": 0.1, "index": "huffman"}, "index: expected one of"),
    ],
)
def test_settings_that_cannot_be(options, match):
    with pytest.raises(InvalidInputError, match=match):
        Threshold(**options)


def test_settings_as_plain_values():
    codec = Threshold(ratio=0.07)
    assert Threshold.from_dict(codec.to_dict()) == codec and codec.count(100) == 7
    assert codec.entries([(100,)]) == 10 and Threshold(tau=1.0).entries([(10, 10)]) == 100
    assert codec.eta(100) == 0.07
    with pytest.raises(InvalidInputError, match='eta: "auto" needs the share'):
        Threshold(tau=1.0).eta(100)


# ---- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [1, 31, 33, 5000, NUMEL])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 1.0])
def test_samples_equal_the_reference(numel, ratio, rng):
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        g = unaligned(rng.standard_normal(numel).astype(np_dtype(dtype)))
        state = state_of("ehv", numel, spare=False, a=0.5, p=0.5)
        for phase in (0, 1, 7):
            ours, want = (
                sample_threshold(g, ratio=ratio, state=state, phase=phase, variant=v)
                for v in ("cpu", "reference")
            )
            assert ours == want
    cut = [g[: numel // 3], g[numel // 3 :]]
    assert sample_threshold(cut, ratio=ratio, state=state, phase=7) == ours


def test_samples_are_near_the_quantile(rng):
    x = rng.standard_normal(1_000_000).astype(np.float32)
    for ratio in (0.001, 0.01, 0.1):
        reached = [
            np.mean(np.abs(x) >= sample_threshold(x, ratio=ratio, phase=p)) for p in range(5)
        ]
        assert np.abs(np.array(reached) / ratio - 1).max() < 0.2
        assert abs(np.mean(reached) / ratio - 1) < 0.08
    assert sample_threshold(np.empty(0, np.float32), ratio=0.5) == 0
    for options in ({"ratio": 0.0}, {"ratio": 1.1}, {"ratio": 0.5, "phase": -1}):
        with pytest.raises(InvalidInputError, match="expected"):
            sample_threshold(x, **options)
