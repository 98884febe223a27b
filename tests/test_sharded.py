"""Rules over coordinate shards in processes of torch.distributed: the bits of one process.

Each group of processes is started once and runs all scenarios: ``python tests/test_sharded.py
<folder>`` imports torch and forks them.
"""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import flcore
from flcore.aggregation import (
    ARC,
    CAF,
    MDA,
    NNM,
    SHARD_CHUNK,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clipping,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    Median,
    MultiKrum,
    PrincipalGradient,
    Sharded,
    TrimmedMean,
    gather,
    shard,
    shard_bounds,
)
from flcore.errors import DTypeError, InvalidInputError, NonFiniteError
from support import HAS_TORCH

WORLDS = (2, 4)
N, BAD = 9, 3
WEIGHTS = [3, 1, 4, 1, 5, 0, 2, 6, 5.5]

RULES = {
    "median": Median(),
    "trimmed mean": TrimmedMean(f=2),
    "meamed": MeaMed(f=2),
    "krum": Krum(f=2),
    "multi-krum": MultiKrum(f=2),
    "bulyan": Bulyan(f=1),
    "geometric median": GeometricMedian(),
    "centred clipping": CenteredClipping(radius=20.0, iterations=3),
    "mda": MDA(f=2),
    "caf": CAF(f=2),
    "nnm, trimmed mean": NNM(f=2) >> TrimmedMean(f=2),
    "arc, geometric median": ARC(f=2) >> GeometricMedian(),
    "clipping, mean": Clipping(40.0) >> Mean(),
    "bucketing, median": Bucketing(2, seed=3) >> Median(),
    "mean": Mean(),
    "mean, reproducible": Mean(accumulate="reproducible"),
}
WEIGHTED = ("mean", "mean, reproducible", "geometric median", "clipping, mean")


# ---- data, the same in every process -------------------------------------------------------------


def clients(dtype=np.float32, *, seed: int = 1, scale: float = 1.0, far: float = 1.0) -> list[dict]:
    """N updates of 52,301 floating values in three layers, four chunks, around an offset."""
    rng = np.random.default_rng(seed)
    center = {"w": (150, 300), "b": (300,), "c": (7, 1000), "d": (1,)}
    updates = []
    for i in range(N):
        size = far if i == N - 1 else 1.0
        update = {
            k: ((1 + size * rng.standard_normal(s) / 4) * scale).astype(dtype)
            for k, s in center.items()
        }
        updates.append({**update, "steps": np.array([10 * i, 3], np.int64)})
    return updates


def with_nan() -> list[dict]:
    updates = clients()
    updates[BAD]["c"][6, 999] = np.nan  # in the last shard only
    return updates


def raw(update) -> dict[str, bytes]:
    if not isinstance(update, dict):
        return {"": np.asarray(update).tobytes()}
    return {k: np.asarray(v).tobytes() for k, v in update.items()}


# ---- what the processes do -----------------------------------------------------------------------


def cut(updates: list, rank: int, world: int, **options) -> list:
    return [shard(u, rank, world, **options) for u in updates]


def whole(rule, updates, rank, world, weights=None, per_layer=False, **options):
    """Aggregate of the shards, put together."""
    mine = cut(updates, rank, world, per_layer=per_layer)
    return raw(gather(Sharded(rule)(mine, weights, **options), like=updates[0]))


def run_rules(rank: int, world: int) -> dict:
    found = {name: whole(rule, clients(), rank, world) for name, rule in RULES.items()}
    for name in WEIGHTED:
        found[f"{name}, weights"] = whole(RULES[name], clients(), rank, world, WEIGHTS)
    return found


def run_center(rank: int, world: int) -> dict:
    center = clients(seed=2)[0]
    rule = CenteredClipping(radius=5.0)
    return whole(rule, clients(), rank, world, center=shard(center, rank, world))


def run_dtypes(rank: int, world: int) -> dict:
    import torch

    found = {}
    for name in ("float64", "float16", "bfloat16"):
        updates = [torch.from_numpy(u["w"]).to(getattr(torch, name)) for u in clients()]
        got = Sharded(MultiKrum(f=2))(cut(updates, rank, world))
        assert got.dtype == updates[0].dtype
        found[name] = gather(got, like=updates[0]).view(torch.uint8).numpy().tobytes()
    return found


def run_ranges(rank: int, world: int) -> dict:
    """Squares below float32, a client that is far out, values with huge squares on one rank."""
    low, far = clients(scale=1e-22), clients(far=1e9)
    one = clients()
    one[1]["w"][0, 0] = 1e25
    return {
        "low": whole(GeometricMedian(), low, rank, world),
        "far": whole(GeometricMedian(), far, rank, world),
        "one": whole(MultiKrum(f=2), one, rank, world),
    }


def run_layers(rank: int, world: int) -> dict:
    rule = PrincipalGradient(plain=["b"])
    updates = clients()
    by_name = [{k: v for j, (k, v) in enumerate(u.items()) if j % world == rank} for u in updates]
    own = Sharded(rule)(by_name)
    return {
        "aligned": whole(rule, updates, rank, world, per_layer=True),
        "not aligned": whole(rule, updates, rank, world),
        "whole layers": raw(own),
    }


def run_other_cuts(rank: int, world: int) -> dict:
    """Uneven cuts at chunks, and cuts within them, of a flat array."""
    updates = [np.concatenate([u[k].ravel() for k in ("w", "b", "c")]) for u in clients()]
    end = len(updates[0])
    uneven = {
        2: [0, 3 * SHARD_CHUNK, end],
        4: [0, 0, SHARD_CHUNK, 3 * SHARD_CHUNK, end],
    }[world]
    odd = [0, *(1000 * r + 1 for r in range(1, world)), end]
    parts = {}
    for name, bounds in (("uneven", uneven), ("odd", odd)):
        mine = [u[bounds[rank] : bounds[rank + 1]] for u in updates]
        parts[name] = gather(Sharded(GeometricMedian())(mine)).tobytes()
    return parts


def run_small(rank: int, world: int) -> dict:
    """Less than a chunk: all shards but one are empty, and some ranks hold no layer at all."""
    updates = [[u["d"], u["b"]] for u in clients()]
    mine = cut(updates, rank, world)
    named = [{"b": u["b"]} if rank == 1 else {} for u in clients()]
    return {
        "pieces": [sum(x.size for x in u) for u in mine],
        "trimmed mean": raw(gather(Sharded(TrimmedMean(f=2))(mine), like=updates[0])[1]),
        "krum": raw(gather(Sharded(Krum(f=2))(mine), like=updates[0])[1]),
        "named": raw(Sharded(Krum(f=2))(named)),
    }


def run_out(rank: int, world: int) -> list:
    mine = cut(clients(), rank, world)
    out = {k: np.full_like(v, 7) for k, v in mine[0].items()}
    assert Sharded(Krum(f=2))(mine, out=out) is out
    bad = cut(with_nan(), rank, world)
    kept = {k: v.copy() for k, v in out.items()}
    for rule in (Median(), Krum(f=2), Mean()):
        with pytest.raises(NonFiniteError):
            Sharded(rule)(bad, out=out)
    same = all((out[k] == kept[k]).all() for k in out)
    return [raw(gather(out, like=clients()[0])), same]


def run_diagnose(rank: int, world: int) -> list:
    rules = (Krum(f=2), Median(), Mean(), NNM(f=2) >> TrimmedMean(f=2))
    return [Sharded(rule).diagnose(cut(with_nan(), rank, world)) for rule in rules]


def run_exclude(rank: int, world: int) -> dict:
    found = {}
    for name, rule in (
        ("median", Median(nonfinite="exclude")),
        ("trimmed mean", TrimmedMean(f=2, nonfinite="exclude")),
        ("meamed", MeaMed(f=2, nonfinite="exclude")),
        ("krum", Krum(f=2, nonfinite="exclude")),
        ("bulyan", Bulyan(f=1, nonfinite="exclude")),
        ("nnm", NNM(f=2) >> MeaMed(f=2, nonfinite="exclude")),
        ("bucketing", Bucketing(2, seed=3) >> Median(nonfinite="exclude")),
        ("mean", Mean(nonfinite="exclude")),
        ("median, propagate", Median(nonfinite="propagate")),
        ("mean, propagate", Mean(nonfinite="propagate")),
    ):
        found[name] = whole(rule, with_nan(), rank, world)
    weights = [*WEIGHTS[:BAD], 0, *WEIGHTS[BAD + 1 :]]  # then it is not read
    found["mean, weight 0"] = whole(Mean(), with_nan(), rank, world, weights)
    found["mean, weights"] = whole(Mean(nonfinite="exclude"), with_nan(), rank, world, WEIGHTS)
    return found


def failure(call) -> tuple:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "clients", ())
    return ("nothing",)


def run_failures(rank: int, world: int) -> dict:
    """Mistakes and errors on one rank; every process must come out of each of them."""
    good, bad, last = cut(clients(), rank, world), cut(with_nan(), rank, world), rank == world - 1
    everything = clients()
    for u in everything:
        u["c"][...] = np.inf
    found = {
        name: failure(lambda rule=rule: Sharded(rule)(bad))
        for name, rule in RULES.items()
        if name not in ("mean, reproducible", "caf")
    }
    found["nobody left"] = failure(
        lambda: Sharded(Median(nonfinite="exclude"))(cut(everything, rank, world))
    )
    found["f"] = failure(lambda: Sharded(Krum(f=5))(good))
    wrong = [{**u, "b": u["b"].astype(np.int32)} for u in good]
    found["dtype"] = failure(lambda: Sharded(Median())([*good[:-1], (wrong if last else good)[-1]]))
    found["count"] = failure(lambda: Sharded(Median())(good[:-1] if last else good))
    found["weights"] = failure(lambda: Sharded(Mean())(good, WEIGHTS if last else [1] * N))
    found["rule"] = failure(lambda: Sharded(Krum(f=2) if last else Krum(f=1))(good))
    found["center"] = failure(
        lambda: Sharded(CenteredClipping())(good, center=good[0] if last else None)
    )
    frozen = {k: v.copy() for k, v in good[0].items()}
    for x in frozen.values():
        x.setflags(write=not last)
    found["out"] = failure(lambda: Sharded(Median())(good, out=frozen))
    found["variant"] = failure(lambda: Sharded(Krum(f=2))(good, variant="cuda" if last else "cpu"))
    large = [{**u, "c": u["c"] * np.float32(1e20 if last else 1)} for u in good]
    found["range"] = failure(lambda: Sharded(Mean(accumulate="reproducible"))(large))

    from flcore.aggregation import _sharded

    kernel = _sharded.exact_sums

    def broken(*args, **options):
        raise MemoryError("no memory left")

    if last:
        _sharded.exact_sums = broken
    found["kernel"] = failure(lambda: Sharded(Krum(f=2))(good))
    _sharded.exact_sums = kernel
    found["gather"] = failure(lambda: gather(good[0], like={} if last else clients()[0]))
    found["shapes"] = failure(lambda: gather(good[0], like={**clients()[0], "d": np.zeros(2)}))
    found["alive"] = whole(Krum(f=2), clients(), rank, world)
    return found


def run_reference(rank: int, world: int) -> bytes:
    """A variant without exact sums."""
    updates = [u["b"] for u in clients()]
    mine = [u[rank * 60 : (rank + 1) * 60 if rank < world - 1 else None] for u in updates]
    return gather(Sharded(GeometricMedian())(mine, variant="reference")).tobytes()


def run_group(rank: int, world: int):
    """A part of the processes, whose ranks are not those of the world."""
    import torch.distributed as dist

    group = dist.new_group([world - 2, world - 1])
    if rank < world - 2:
        return failure(lambda: Sharded(Median(), group)(clients()))[:2]
    own = rank - (world - 2)
    piece = Sharded(Krum(f=2), group)(cut(clients(), own, 2))
    return raw(gather(piece, like=clients()[0], group=group))


SCENARIOS = {k.removeprefix("run_"): v for k, v in list(globals().items()) if k[:4] == "run_"}


def work(rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    flcore.set_num_threads(1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    found = {name: run(rank, world) for name, run in SCENARIOS.items()}
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the processes of all groups left what they found."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch.distributed with gloo is missing")
    folder = tmp_path_factory.mktemp("group")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def group(request, folder) -> list[dict]:
    """What each process of a group found, by rank."""
    places = [folder / str(request.param) / f"{rank}.pickle" for rank in range(request.param)]
    return [pickle.loads(place.read_bytes()) for place in places]


def same_everywhere(group: list[dict], scenario: str):
    """Result of a scenario that all processes must agree on."""
    first = group[0][scenario]
    for found in group[1:]:
        assert found[scenario] == first
    return first


def test_every_rule_has_the_bits_of_one_process(group):
    found = same_everywhere(group, "rules")
    for name, rule in RULES.items():
        assert found[name] == raw(rule(clients())), name
    for name in WEIGHTED:
        assert found[f"{name}, weights"] == raw(RULES[name](clients(), WEIGHTS)), name


def test_the_centre_is_cut_like_the_updates(group):
    want = CenteredClipping(radius=5.0)(clients(), center=clients(seed=2)[0])
    assert same_everywhere(group, "center") == raw(want)


def test_every_dtype_has_the_bits_of_one_process(group):
    torch = pytest.importorskip("torch")
    found = same_everywhere(group, "dtypes")
    for name in ("float64", "float16", "bfloat16"):
        updates = [torch.from_numpy(u["w"]).to(getattr(torch, name)) for u in clients()]
        want = MultiKrum(f=2)(updates).view(torch.uint8).numpy().tobytes()
        assert found[name] == want, name


def test_one_rank_out_of_range_makes_all_read_again(group):
    found = same_everywhere(group, "ranges")
    one = clients()
    one[1]["w"][0, 0] = 1e25
    assert found["low"] == raw(GeometricMedian()(clients(scale=1e-22)))
    assert found["far"] == raw(GeometricMedian()(clients(far=1e9)))
    assert found["one"] == raw(MultiKrum(f=2)(one))


def test_rules_by_layer(group):
    want = PrincipalGradient(plain=["b"])(clients())
    found = [g["layers"] for g in group]
    together: dict = {}
    for f in found:
        assert f["aligned"] == raw(want)
        for k, bits in f["not aligned"].items():
            got = np.frombuffer(bits, want[k].dtype).reshape(want[k].shape)
            np.testing.assert_allclose(got, want[k], rtol=1e-4, atol=1e-6)
        together |= f["whole layers"]
    assert together == raw(want)


def test_the_place_of_a_cut_matters_and_not_the_number_of_processes(group):
    found = same_everywhere(group, "other_cuts")
    updates = [np.concatenate([u[k].ravel() for k in ("w", "b", "c")]) for u in clients()]
    want = GeometricMedian()(updates)
    assert found["uneven"] == want.tobytes()
    odd = np.frombuffer(found["odd"], np.float32)
    np.testing.assert_allclose(odd, want, rtol=1e-6)


def test_shards_may_be_empty(group):
    found = [g["small"] for g in group]
    assert [f["pieces"][0] for f in found] == [0] * (len(group) - 1) + [301]
    updates = [[u["d"], u["b"]] for u in clients()]
    for f in found:
        assert f["trimmed mean"] == raw(TrimmedMean(f=2)(updates)[1])
        assert f["krum"] == raw(Krum(f=2)(updates)[1])
    assert [f["named"] for f in found] == [
        raw(Krum(f=2)([{"b": u["b"]} for u in clients()])) if r == 1 else {}
        for r in range(len(group))
    ]


def test_out_is_written_only_when_all_succeed(group):
    found, untouched = same_everywhere(group, "out")
    assert found == raw(Krum(f=2)(clients())) and untouched


def test_diagnoses_agree_with_one_process(group):
    rules = (Krum(f=2), Median(), Mean(), NNM(f=2) >> TrimmedMean(f=2))
    for rank in group:
        for rule, got in zip(rules, rank["diagnose"], strict=True):
            want = rule.diagnose(with_nan())
            assert got.nonfinite == want.nonfinite == (BAD,)
            assert (got.selected, got.rejected) == (want.selected, want.rejected)
            for name in ("norms", "distances", "scores", "coefficients"):
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_a_nan_on_one_rank_leaves_the_client_out_everywhere(group):
    found = same_everywhere(group, "exclude")
    others = [u for i, u in enumerate(with_nan()) if i != BAD]
    weights = [w for i, w in enumerate(WEIGHTS) if i != BAD]
    assert found["median"] == raw(Median()(others))
    assert found["trimmed mean"] == raw(TrimmedMean(f=1)(others))  # it was one of the bad
    assert found["meamed"] == raw(MeaMed(f=1)(others))
    assert found["krum"] == raw(Krum(f=2, nonfinite="exclude")(with_nan()))
    assert found["bulyan"] == raw(Bulyan(f=1, nonfinite="exclude")(with_nan()))
    assert found["nnm"] == raw((NNM(f=2) >> MeaMed(f=2, nonfinite="exclude"))(with_nan()))
    bucketing = Bucketing(2, seed=3) >> Median(nonfinite="exclude")
    assert found["bucketing"] == raw(bucketing(with_nan()))
    assert found["mean"] == raw(Mean()(others))
    assert found["mean, weights"] == raw(Mean()(others, weights))
    assert found["mean, weight 0"] == raw(Mean()(others, weights))
    for name, rule in (("median", Median), ("mean", Mean)):
        want = rule(nonfinite="propagate")(with_nan())
        assert np.isnan(want["c"]).any()
        assert found[f"{name}, propagate"] == raw(want)


def test_a_nan_on_one_rank_raises_on_all_and_names_the_client(group):
    names = [n for n in RULES if n not in ("mean, reproducible", "caf")]
    for rank in group:
        for name in names:
            kind, message, who = rank["failures"][name]
            assert (kind, who) == ("NonFiniteError", (BAD,)), name
            assert message.startswith(f"updates[{BAD}]: NaN or infinity found"), name
        kind, message, who = rank["failures"]["nobody left"]
        assert kind == "NonFiniteError" and "no client is left" in message
        assert who == tuple(range(N))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("f", "InvalidInputError", "f: expected 2 f < n, got f = 5 and n = 9"),
        ("dtype", "DTypeError", "updates[8]['b']: expected dtype float32"),
        ("count", "InvalidInputError", "updates, their number: expected the same on every rank"),
        ("weights", "InvalidInputError", "weights that are not 0"),
        ("rule", "InvalidInputError", "rule: expected the same"),
        ("center", "InvalidInputError", "center"),
        ("out", "InvalidInputError", "out['w']: the array is read-only"),
        ("variant", "VariantUnavailableError", "cuda"),
        ("range", "InvalidInputError", "reproducible sums need |weight * value| < 2^46"),
        ("kernel", None, "no memory left"),
        ("gather", "InvalidInputError", "like: expected the layers of the shard"),
        ("shapes", "InvalidInputError", "like['d']: expected 1 values like the shards together"),
    ],
)
def test_an_error_on_one_rank_raises_on_all(group, name, kind, words):
    found = [g["failures"][name] for g in group]
    own = {"dtype", "out", "variant", "range", "kernel", "gather"}
    for rank, (got, message, _) in enumerate(found):
        last = rank == len(group) - 1
        if kind is None:
            assert got == ("MemoryError" if last else "RuntimeError")
        else:
            assert got == kind
        assert words in message
        assert message.startswith(f"rank {len(group) - 1}: ") == (name in own and not last)
    assert [g["failures"]["alive"] for g in group] == [raw(Krum(f=2)(clients()))] * len(group)


def test_variants_without_exact_sums_agree_to_rounding(group):
    want = GeometricMedian()([u["b"] for u in clients()], variant="reference")
    got = np.frombuffer(same_everywhere(group, "reference"), np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_group_may_be_a_part_of_the_processes(group):
    for rank, found in enumerate(group):
        if rank < len(group) - 2:
            assert found["group"] == ("InvalidInputError", "group: this process is not a member")
        else:
            assert found["group"] == raw(Krum(f=2)(clients()))


# ---- without processes ---------------------------------------------------------------------------


def test_shards_are_cut_at_chunks():
    c = SHARD_CHUNK
    assert shard_bounds(10 * c, 3) == [0, 3 * c, 6 * c, 10 * c]
    assert shard_bounds(10 * c + 1, 2) == [0, 5 * c, 10 * c + 1]
    assert shard_bounds(5, 3) == [0, 0, 0, 5]
    assert shard_bounds(0, 2) == [0, 0, 0]
    assert shard_bounds([], 2) == [0, 0, 0]
    assert shard_bounds([c + 1, 7, 3 * c], 3) == [0, c + 1, 2 * c + 8, 4 * c + 8]
    for sizes in ([1, 2, 3], [0, 5 * c + 3, 0, 9], [100 * c]):
        for world in (1, 2, 7):
            bounds = shard_bounds(sizes, world)
            assert bounds[0] == 0 and bounds[-1] == sum(sizes) and len(bounds) == world + 1
            assert bounds == sorted(bounds)


@pytest.mark.parametrize("per_layer", [False, True])
def test_pieces_make_the_update_again(per_layer):
    update = clients()[0]
    for world in (1, 2, 3, 5):
        pieces = [shard(update, r, world, per_layer=per_layer) for r in range(world)]
        for k, x in update.items():
            if k == "steps":
                assert all(p[k] is x for p in pieces)
                continue
            np.testing.assert_array_equal(np.concatenate([p[k] for p in pieces]), x.ravel())
            assert all(np.shares_memory(p[k], x) for p in pieces if p[k].size)
    assert type(shard([update["w"]], 0, 2)) is list
    assert shard(update["w"], 1, 2).ndim == 1


def test_what_cannot_be_cut_or_shared_is_refused():
    for bad in (-1, 2, 0.5):
        with pytest.raises(InvalidInputError, match="rank"):
            shard(np.zeros(3), bad, 2)
    with pytest.raises(InvalidInputError, match="world_size"):
        shard_bounds(3, 0)
    with pytest.raises(InvalidInputError, match="numel"):
        shard_bounds(-3, 1)
    with pytest.raises(DTypeError, match="rule"):
        Sharded(np.mean)
    if HAS_TORCH:
        with pytest.raises(InvalidInputError, match="not initialised"):
            Sharded(Median())(clients())


def main(folder: Path) -> int:
    import torch.distributed  # noqa: F401  # once, before the processes are forked

    context = multiprocessing.get_context("fork")
    for world in WORLDS:
        place = folder / str(world)
        place.mkdir()
        ranks = [context.Process(target=work, args=(r, world, place)) for r in range(world)]
        for p in ranks:
            p.start()
        for p in ranks:
            p.join(60)
            p.kill()
            p.join()
        if any(p.exitcode for p in ranks):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
