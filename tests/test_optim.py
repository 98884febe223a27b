"""Projected gradients in torch: the function, the optimiser around others, sharded parameters."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import perp_grad
from flcore.optim import PerpGrad, perp_grad_

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def backward(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
    loss.backward()
    return loss


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(a, b) -> None:
    assert len(a) == len(b) and all(map(torch.equal, a, b))


# ---- perp_grad_ --------------------------------------------------------------------------------


def test_gradients_are_across_the_parameters_and_as_long_as_before():
    model = network()
    backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    perp_grad_(model.parameters())
    for p, g in zip(model.parameters(), before, strict=True):
        assert abs((p * p.grad).sum()) < 1e-6 * p.norm() * g.norm()
        torch.testing.assert_close(p.grad.norm(), g.norm())
        assert not torch.equal(p.grad, g)


@pytest.mark.parametrize("options", [{}, {"renormalize": False}, {"skip_1d": True}, {"eps": 0.5}])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_options_are_those_of_the_op(scope, options):
    model = network()
    backward(model)
    params = list(model.parameters())
    want = [p.grad.clone() for p in params]
    perp_grad(params, want, scope=scope, **options)
    perp_grad_(params, scope=scope, **options)
    assert_equal([p.grad for p in params], want)


def test_parameters_without_gradient_and_tied_ones():
    model = network()
    backward(model)
    first, *rest = model.parameters()
    want = perp_grad(first.detach().clone(), first.grad.clone())
    rest[0].grad = None
    perp_grad_([first, rest[0], first])
    assert torch.equal(first.grad, want) and rest[0].grad is None
    perp_grad_([])
    perp_grad_(rest[0])


def test_mixed_dtypes_and_channels_last():
    torch.manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(50, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.randn(50, dtype=torch.float64)),
    ]
    for p in params:
        p.grad = torch.randn_like(p)
    want = [perp_grad(p.detach().contiguous(), p.grad.clone().contiguous()) for p in params]
    perp_grad_(params)
    for p, g in zip(params, want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_gradients_that_cannot_be_projected_are_named():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    plain = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(DTypeError, match=r"params\[1\].grad: .* got sparse_coo float32; leave"):
        perp_grad_([plain, table.weight])
    turned = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    turned.grad = torch.ones_like(turned)
    with pytest.raises(DTypeError, match=r"params\[0\].grad: .* got strided complex64"):
        perp_grad_(turned)
    with pytest.raises(DTypeError, match=r"params\[1\]: expected a torch tensor, got ndarray"):
        perp_grad_([plain, np.ones(3)])
    with pytest.raises(InvalidInputError, match="scope: expected one of"):
        perp_grad_(plain, scope="layer")


# ---- PerpGrad ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_a_step_is_projection_and_base_step(base):
    wrapped, plain = network(), network()
    ours, theirs = PerpGrad(BASES[base](wrapped.parameters())), BASES[base](plain.parameters())
    for step in range(4):
        for model, optimizer in ((wrapped, ours), (plain, theirs)):
            optimizer.zero_grad()
            backward(model, step)
        perp_grad_(plain.parameters())
        ours.step()
        theirs.step()
    assert_equal(weights(wrapped), weights(plain))


def test_a_closure_is_evaluated_first():
    wrapped, plain = network(), network()
    ours, theirs = (
        PerpGrad(torch.optim.Adam(wrapped.parameters())),
        PerpGrad(torch.optim.Adam(plain.parameters())),
    )
    for step in range(3):

        def closure(step=step):
            ours.zero_grad()
            return backward(wrapped, step)

        loss = ours.step(closure)
        theirs.zero_grad()
        want = backward(plain, step)
        assert theirs.step() is None
        assert torch.equal(loss, want)
    assert_equal(weights(wrapped), weights(plain))


def test_lbfgs_sees_projected_gradients_in_every_evaluation():
    wrapped, plain = network(), network()
    ours = PerpGrad(torch.optim.LBFGS(wrapped.parameters(), max_iter=4))
    theirs = torch.optim.LBFGS(plain.parameters(), max_iter=4)
    calls = []

    def closure():
        ours.zero_grad()
        calls.append(1)
        return backward(wrapped)

    def projected():
        theirs.zero_grad()
        loss = backward(plain)
        perp_grad_(plain.parameters())
        return loss

    assert torch.equal(ours.step(closure), theirs.step(projected)) and len(calls) > 1
    assert_equal(weights(wrapped), weights(plain))


def test_state_and_groups_are_those_of_the_base_optimizer():
    model, more = network(), torch.nn.Parameter(torch.ones(3, 2))
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = PerpGrad(base)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    optimizer.add_param_group({"params": [more], "lr": 0.5})
    assert [g["lr"] for g in base.param_groups] == [0.01, 0.5]
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = network(1)
    other = PerpGrad(
        torch.optim.AdamW([{"params": fresh.parameters()}, {"params": [more]}], lr=1.0)
    )
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.01 and len(other.state) == 4
    torch.optim.AdamW([{"params": fresh.parameters()}, {"params": [more]}]).load_state_dict(saved)
    again = pickle.loads(pickle.dumps(optimizer))
    assert len(again.state) == 4 and "PerpGrad" in repr(again) and "AdamW" in repr(again)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_group_can_keep_its_gradients():
    model = network()
    first, *rest = model.parameters()
    optimizer = PerpGrad(
        torch.optim.SGD([{"params": [first], "perp_grad": False}, {"params": rest}], lr=0.1)
    )
    backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    kept, *others = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), before)]  # noqa: B905
    assert kept and not any(others)


def test_schedulers_hooks_and_grad_scaler():
    wrapped, plain = network(), network()
    ours = PerpGrad(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two changes no bit
    calls = []
    ours.register_step_post_hook(lambda *_: calls.append(1))
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(wrapped(x), x[:, :3].argmax(1))
        scaler.scale(loss).backward()
        scaler.step(ours)
        scaler.update()
        backward(plain, step)
        perp_grad_(plain.parameters())
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_equal(weights(wrapped), weights(plain))
    assert len(calls) == 3 and ours.param_groups[0]["lr"] == 0.1 * 0.5**3
    before = weights(wrapped)
    ours.zero_grad()
    scaler.scale(loss.detach() * wrapped(x).sum() * float("inf")).backward()
    scaler.step(ours)  # is left out
    assert_equal(weights(wrapped), before)


def test_plain_steps_only_lengthen_the_weights():
    model = network()
    optimizer = PerpGrad(torch.optim.SGD(model.parameters(), lr=0.05))
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        before = [p.double().square().sum() for p in model.parameters()]
        optimizer.step()
        for p, b in zip(model.parameters(), before, strict=True):
            want = b + 0.05**2 * p.grad.double().square().sum()
            torch.testing.assert_close(p.double().square().sum(), want, rtol=1e-6, atol=0)


def test_steps_compile():
    torch._dynamo.reset()
    model = network()
    backward(model)
    want = [perp_grad(p.detach(), p.grad.clone()) for p in model.parameters()]
    params = list(model.parameters())
    torch.compile(lambda: perp_grad_(params), fullgraph=True, backend="aot_eager")()
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_bad_arguments_are_named():
    with pytest.raises(DTypeError, match=r"base_optimizer: expected a torch.optim.Optimizer"):
        PerpGrad(network().parameters())
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="eps: expected"):
        PerpGrad(base, eps=-1)
    with pytest.raises(InvalidInputError, match="renormalize: expected"):
        PerpGrad(base, renormalize="yes")


# ---- shards ------------------------------------------------------------------------------------

SHAPES = ((30, 7), (1,), (5,), (2,), (400, 30), (6, 1))


def problem() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and gradients, of which the third is nearly parallel to its weights."""
    generator = torch.Generator().manual_seed(3)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w = [draw(s) for s in SHAPES]
    g = [draw(s) for s in SHAPES]
    g[4] = 0.3 * w[4] + 1e-6 * g[4]
    return w, g


def part(x: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows of a rank: three of four for the first; of single rows all."""
    if len(x) == 1:
        return x  # replicated
    cut = 3 * len(x) // 4
    return x[:cut] if rank == 0 else x[cut:]


def work(rank: int, folder: str) -> None:
    """One of two processes, each with its rows of every parameter."""
    import torch.distributed as dist

    place = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    group = dist.group.WORLD
    results = {}
    for scope in ("tensor", "global"):
        for renormalize in (True, False):
            w, g = problem()
            params = [torch.nn.Parameter(part(x, rank).clone()) for x in w]
            for p, x in zip(params, g, strict=True):
                p.grad = part(x, rank).clone()
            if rank == 0:
                params[2].grad = None  # counts as zeros
            options = {"scope": scope, "renormalize": renormalize}
            if renormalize:
                optimizer = torch.optim.SGD(params, lr=0.0)
                PerpGrad(optimizer, process_group=group, **options).step()
            else:
                perp_grad_(params, process_group=group, **options)
            results[scope, renormalize] = [p.grad for p in params]
    if dist.is_available() and hasattr(dist, "tensor"):
        results["dtensor"] = sharded_by_torch(group)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def sharded_by_torch(group) -> list[torch.Tensor]:
    """DTensors over both processes."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    w, g = problem()
    params = [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in w]
    for p, x in zip(params, g, strict=True):
        p.grad = distribute_tensor(x, mesh, [Shard(0)])
    try:
        perp_grad_(params)
        raise AssertionError("a DTensor without its group was accepted")
    except InvalidInputError as error:
        assert "process_group=param.device_mesh.get_group()" in str(error)
    perp_grad_(params, process_group=group)
    return [p.grad.full_tensor() for p in params]


def test_shards_in_two_processes_give_the_projection_of_the_whole(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed with gloo is missing")
    command = [sys.executable, __file__]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)]) for r in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    for scope in ("tensor", "global"):
        for renormalize in (True, False):
            w, g = problem()
            g[2][: 3 * len(g[2]) // 4] = 0
            if scope == "global":  # replicated ones are counted by each process
                w.append(w[1])
                g.append(g[1].clone())
            perp_grad(w, g, scope=scope, renormalize=renormalize)
            found = zip(first[scope, renormalize], second[scope, renormalize], strict=True)
            for i, (a, b) in enumerate(found):
                if i == 2:
                    assert a is None
                    torch.testing.assert_close(b, part(g[i], 1))
                elif SHAPES[i][0] == 1:
                    torch.testing.assert_close(a, g[i])
                    torch.testing.assert_close(b, g[i])
                elif i == 3 and scope == "tensor":  # one element a process
                    assert_equal([torch.cat([a, b])], [problem()[1][3]])
                else:
                    torch.testing.assert_close(torch.cat([a, b]), g[i], rtol=1e-7, atol=1e-9)
    if "dtensor" in first:
        w, g = problem()
        perp_grad(w, g)
        g[3] = problem()[1][3]
        for a, b in zip(first["dtensor"], g, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    work(int(sys.argv[1]), sys.argv[2])
