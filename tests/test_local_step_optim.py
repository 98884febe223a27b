"""Local steps in one's own torch loop: against torch's own operations, and bit-exact restores."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flcore.errors import DTypeError, InvalidInputError
from flcore.ops import local_step
from flcore.optim import local_step_, sam_perturb_
from support import ROOT


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def loss_of(model: torch.nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))


def values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_feddyn_is_its_penalty_in_torch():
    """Penalty by autograd, clipping, weight decay and SGD against one call."""
    lam, clip, lr, decay = 0.1, 0.5, 0.1, 1e-3
    plain, ours = network(), network()
    w = values(plain)
    h = [torch.randn_like(v) for v in w]
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr, weight_decay=decay + lam)
    q = [lam * (a - b) for a, b in zip(h, w, strict=True)]
    for step in range(5):
        optimizer.zero_grad()
        flat = torch.nn.utils.parameters_to_vector(plain.parameters())
        loss_of(plain, step).backward()
        (flat @ torch.nn.utils.parameters_to_vector(q)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        optimizer.step()
        ours.zero_grad()
        loss_of(ours, step).backward()
        before = [p.grad.clone() for p in ours.parameters()]
        local_step_(ours.parameters(), q, lr=lr, decay=decay + lam, clip=clip)
        assert all(map(torch.equal, before, [p.grad for p in ours.parameters()]))
    torch.testing.assert_close(values(ours), values(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(values(ours)[0], w[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_torch(nesterov):
    plain, ours = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    optimizer = torch.optim.SGD(plain.parameters(), weight_decay=0.01, **options)
    buffers = [torch.full_like(p, torch.nan) for p in ours.parameters()]
    for step in range(4):
        for model in (plain, ours):
            model.zero_grad()
            loss_of(model, step).backward()
        optimizer.step()
        local_step_(ours.parameters(), buffers=buffers, decay=0.01, first=step == 0, **options)
    torch.testing.assert_close(values(ours), values(plain), rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay_and_count_for_nothing():
    first, frozen, last = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    first.grad, last.grad = torch.full((3,), 2.0), torch.full((3,), -1.0)
    q = [torch.zeros(3), torch.full((3,), torch.nan), torch.zeros(3)]
    local_step_([first, frozen, last], q, lr=0.1, clip=1.0)
    want = [torch.ones(3), torch.ones(3)]
    local_step(want, [first.grad, last.grad], lr=0.1, clip=1.0)
    assert torch.equal(first.detach(), want[0]) and torch.equal(last.detach(), want[1])
    assert (frozen == 1).all()
    local_step_([], lr=0.1, clip=1.0)
    local_step_(frozen, lr=0.1)


def test_a_perturbation_is_restored_to_the_bit():
    model = network()
    before = values(model)
    loss_of(model).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with sam_perturb_(model.parameters(), 0.05):
        moved = values(model)
        for a, b, g in zip(moved, before, grads, strict=True):
            torch.testing.assert_close(a, b + 0.05 / norm * g)
        loss_of(model).backward()
    assert all(map(torch.equal, values(model), before))
    with pytest.raises(ZeroDivisionError), sam_perturb_(model.parameters(), 0.05):
        raise ZeroDivisionError
    assert all(map(torch.equal, values(model), before))
    moved = sam_perturb_(model.parameters(), 0.05)
    moved.restore()
    local_step_(model.parameters(), lr=0.1)
    after = values(model)
    moved.restore()  # nothing is left to restore
    assert all(map(torch.equal, values(model), after))
    assert not any(map(torch.equal, after, before))


def test_channels_last_and_half_parameters():
    torch.manual_seed(0)
    weight = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last).weight
    weight.grad = torch.randn(5, 3, 3, 3)
    want = weight.detach() - 0.1 * weight.grad
    half = torch.nn.Parameter(torch.randn(9, dtype=torch.bfloat16))
    half.grad = torch.randn(9, dtype=torch.bfloat16)
    before = half.detach().clone()
    with sam_perturb_([weight, half], 0.5):
        assert not torch.equal(half.detach(), before)
    assert torch.equal(half.detach(), before)
    local_step_([weight, half], lr=0.1)
    torch.testing.assert_close(weight.detach(), want)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bad_input_is_named():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    for call, error, message in (
        (lambda: local_step_([weight, np.ones(3)], lr=0.1), DTypeError, r"params\[1\]: expected a"),
        (lambda: local_step_([table.weight], lr=0.1), DTypeError, r"params\[0\].grad: .* sparse"),
        (lambda: sam_perturb_([table.weight], 0.1), DTypeError, r"params\[0\].grad: .* sparse"),
        (lambda: local_step_(weight, [], lr=0.1), InvalidInputError, "q: expected 1 tensors"),
        (lambda: local_step_(weight, lr="0.1"), InvalidInputError, "lr: expected a finite"),
        (lambda: local_step_(weight, lr=0.1, momentum=0.9), InvalidInputError, "buffers: momentum"),
        (
            lambda: local_step_(weight, weight, lr=0.1),
            InvalidInputError,
            "params: it shares memory",
        ),
        (
            lambda: local_step_([torch.ones(2), weight], [torch.ones(2)] * 2, lr=0.1),
            InvalidInputError,
            r"q\[1\]: expected shape \(3,\)",
        ),
        (
            lambda: local_step_([weight, weight], lr=0.1),
            InvalidInputError,
            "params: two tensors share",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    assert (weight == 1).all()


def test_compiled_without_a_break():
    torch._dynamo.reset()
    model, other = network(), network()
    for m in (model, other):
        loss_of(m).backward()
    q = [torch.ones_like(p) for p in model.parameters()]
    params = list(model.parameters())
    torch.compile(
        lambda: local_step_(params, q, lr=0.1, clip=1.0), fullgraph=True, backend="aot_eager"
    )()
    local_step_(other.parameters(), q, lr=0.1, clip=1.0)
    assert all(map(torch.equal, values(model), values(other)))


def test_import_does_not_import_torch():
    code = "import sys, flcore.optim; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.strip() == "False"


def test_page_on_local_steps_runs():
    text, names = (ROOT / "docs" / "local-step.md").read_text(), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(compile(block, "docs/local-step.md", "exec"), names)
    assert all(map(torch.equal, names["h"], names["update"]))  # h began at 0
    m = names["server"].beta2 * names["update"][0]
    torch.testing.assert_close(names["new"].m[0], m)
    assert names["out"].shape == (5, 4810)
