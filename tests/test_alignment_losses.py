"""Losses on features: worked numbers, invariances, gradients by hand, weights and vmap."""

import math

import pytest

torch = pytest.importorskip("torch")

from flcore.errors import InvalidInputError
from flcore.losses import (
    model_contrastive_loss,
    multi_kernel_mmd,
    reverse_gradient,
    supervised_contrastive_loss,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- model-contrastive ---------------------------------------------------------------------------


def test_model_contrast_of_three_vectors():
    z, towards, away = (
        torch.tensor([v], dtype=torch.float64) for v in ([1, 0], [0.6, 0.8], [0, 1])
    )
    loss = model_contrastive_loss(z, towards, away, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.6 / 0.5)), abs=1e-12)
    assert loss.item() == pytest.approx(0.2632824673, abs=1e-10)


def test_model_contrast_with_equal_models_is_log_2_and_has_no_gradient():
    z, other = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1)
    loss = model_contrastive_loss(z, other, other)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-14)
    assert z.grad.abs().max() < 1e-15


def test_model_contrast_knows_directions_only():
    z, towards, away = drawn(4, 3), drawn(4, 3, seed=1), drawn(2, 4, 3, seed=2)
    plain = model_contrastive_loss(z, towards, away)
    scaled = model_contrastive_loss(3 * z, 0.5 * towards, 7 * away)
    torch.testing.assert_close(plain, scaled, rtol=1e-13, atol=0)


def test_gradient_of_the_model_contrast_is_the_closed_form():
    """dl/ds_g = -(1 - p_0) / T, dl/ds_p = p_1 / T, d cos(z, a) / dz = (a/|a| - cos z/|z|) / |z|."""
    z, towards, away, t = (
        drawn(5, 4).requires_grad_(),
        drawn(5, 4, seed=1),
        drawn(5, 4, seed=2),
        0.3,
    )
    model_contrastive_loss(z, towards, away, temperature=t).backward()
    with torch.no_grad():

        def cosine(a):
            return torch.cosine_similarity(z, a, dim=1)[:, None]

        def slope(a):
            length = z.norm(dim=1, keepdim=True)
            return (a / a.norm(dim=1, keepdim=True) - cosine(a) * z / length) / length

        p = torch.softmax(torch.cat([cosine(towards), cosine(away)], 1) / t, 1)
        by_hand = (p[:, 1:] * slope(away) - (1 - p[:, :1]) * slope(towards)) / t / 5
    torch.testing.assert_close(z.grad, by_hand, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("count", [0, 2])
def test_model_contrast_without_any_known_model_is_exactly_0(count):
    z, towards = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    loss = model_contrastive_loss(z, towards, drawn(count, 3, 4), known=torch.zeros(count))
    loss.backward()
    assert loss.item() == 0.0 and z.grad.abs().max() == 0.0


def test_model_contrast_leaves_out_unknown_models_and_weighs_examples():
    z, towards, away = drawn(3, 4), drawn(3, 4, seed=1), drawn(2, 3, 4, seed=2)
    known, weight = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    loss = model_contrastive_loss(z, towards, away, known=known, weight=weight)
    torch.testing.assert_close(loss, model_contrastive_loss(z[:2], towards[:2], away[0, :2]))


# ---- supervised contrastive ----------------------------------------------------------------------


def test_supervised_contrast_of_two_alike_and_nothing_else_is_0():
    z = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    assert supervised_contrastive_loss(z, torch.tensor([2, 2])).item() == 0.0


def test_supervised_contrast_by_hand():
    """Rows 0 and 1 are one class at a right angle, row 2 another class along row 0; T = 1.

    Row 0: others (0, 1), positive 0: log(1 + e).  Row 1: others (0, 0): log 2.  Row 2 has none.
    """
    z = torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]], dtype=torch.float64)
    loss = supervised_contrastive_loss(z, torch.tensor([0, 0, 1]), temperature=1.0)
    assert loss.item() == pytest.approx((math.log(1 + math.e) + math.log(2)) / 3, abs=1e-12)


def test_supervised_contrast_is_the_formula():
    z, y, t = drawn(7, 3).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0, 3]), 0.2
    loss = supervised_contrastive_loss(z, y, temperature=t)
    (ours,) = torch.autograd.grad(loss, z)
    n = torch.nn.functional.normalize(z, dim=1)
    total = 0.0
    for i in range(7):
        others = [a for a in range(7) if a != i]
        bottom = torch.logsumexp(n[i] @ n[others].T / t, 0)
        positive = [p for p in others if y[p] == y[i]]
        for p in positive:
            total = total - (n[i] @ n[p] / t - bottom) / len(positive) / 7
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(ours, torch.autograd.grad(total, z)[0])


def test_supervised_contrast_does_not_see_rows_of_weight_0():
    z, y = drawn(6, 3).requires_grad_(), torch.tensor([0, 0, 1, 1, 0, 1])
    weight = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0])
    loss = supervised_contrastive_loss(z, y, weight=weight)
    (slope,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, supervised_contrastive_loss(z[:4], y[:4]))
    assert slope[4:].abs().max() == 0.0


def test_supervised_contrast_of_one_row_alone_is_0_with_a_finite_gradient():
    z = drawn(1, 3).requires_grad_()
    loss = supervised_contrastive_loss(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0.0 and z.grad.abs().max() == 0.0


# ---- discrepancy ---------------------------------------------------------------------------------

S = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
T = torch.tensor([[0.0, 1.0], [2.0, 2.0]], dtype=torch.float64)


def test_mmd_of_two_pairs_of_points():
    """Squared distances 1, 1, 8, 2, 5, 5: the base bandwidth is 44 / 12 / 4 = 0.91666..."""
    s = 44 / 12 / 4

    def k(d):
        return sum(math.exp(-d / (s * 2**q)) for q in range(5))

    by_hand = (2 * k(0) + 2 * k(1) + 2 * k(0) + 2 * k(5) - 2 * (k(1) + k(8) + k(2) + k(5))) / 4
    assert multi_kernel_mmd(S, T).item() == pytest.approx(by_hand, abs=1e-12)
    assert multi_kernel_mmd(S, T).item() == pytest.approx(3.1483146584, abs=1e-10)


def test_mmd_is_symmetric_from_0_and_0_for_equal_samples():
    for seed in range(5):
        s, t = drawn(8, 3, seed=seed), drawn(8, 3, seed=seed + 50)
        torch.testing.assert_close(multi_kernel_mmd(s, t), multi_kernel_mmd(t, s))
        assert multi_kernel_mmd(s, t) > 0
        assert abs(multi_kernel_mmd(s, s)) < 1e-14
    same = torch.ones(4, 2, requires_grad=True)  # even the bandwidth is 0
    loss = multi_kernel_mmd(same, same)
    loss.backward()
    assert loss.item() == 0.0 and same.grad.abs().max() == 0.0


def test_mmd_does_not_see_translation_rotation_or_scale_of_both():
    s, t = drawn(6, 2), drawn(6, 2, seed=1)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    moved = [3.0 * z @ turn + torch.tensor([5.0, -1.0], dtype=torch.float64) for z in (s, t)]
    torch.testing.assert_close(multi_kernel_mmd(*moved), multi_kernel_mmd(s, t), rtol=1e-12, atol=0)


def test_bandwidth_is_constant_in_the_gradient():
    s = S.clone().requires_grad_()
    multi_kernel_mmd(s, T).backward()
    base = 44 / 12 / 4

    def fixed(z):
        both = torch.cat([z, T])
        d = (both[:, None] - both[None]).square().sum(2)
        k = sum(torch.exp(-d / (base * 2**q)) for q in range(5))
        return (k[:2, :2] + k[2:, 2:] - k[:2, 2:] - k[2:, :2]).mean()

    z = S.clone().requires_grad_()
    fixed(z).backward()
    torch.testing.assert_close(s.grad, z.grad, rtol=1e-12, atol=1e-14)


# ---- reversal ------------------------------------------------------------------------------------


def test_reversal_gives_the_input_and_minus_a_times_the_gradient():
    x, upstream = drawn(3, 2).float().requires_grad_(), drawn(3, 2, seed=1).float()
    out = reverse_gradient(x, 0.3)
    assert torch.equal(out, x)
    out.backward(upstream)
    assert torch.equal(x.grad, -torch.tensor(0.3) * upstream)


def test_reversal_of_strength_0_stops_the_gradient():
    x = torch.ones(3, requires_grad=True)
    reverse_gradient(x, torch.tensor(0.0)).sum().backward()
    assert x.grad.abs().max() == 0.0


# ---- all -----------------------------------------------------------------------------------------


def test_all_run_under_vmap_as_one_by_one():
    z, other, y = drawn(3, 4, 5), drawn(3, 4, 5, seed=1), torch.tensor([[0, 1, 0, 1]] * 3)
    a = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    losses = {
        "model": lambda z, o, y, a: model_contrastive_loss(z, o, -o),
        "labels": lambda z, o, y, a: supervised_contrastive_loss(z, y),
        "mmd": lambda z, o, y, a: multi_kernel_mmd(z, o),
        "reversal": lambda z, o, y, a: (reverse_gradient(z, a) * o).sum(),
    }
    for name, loss in losses.items():
        together = torch.func.vmap(torch.func.grad(loss))(z, other, y, a)
        alone = torch.stack(
            [torch.func.grad(loss)(*row) for row in zip(z, other, y, a, strict=True)]
        )
        torch.testing.assert_close(together, alone, msg=name)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidInputError, match=r"away \(k, n, F\), got .*\(4, 3\)"):
        model_contrastive_loss(drawn(4, 3), drawn(4, 3), drawn(2, 4, 2))
    with pytest.raises(InvalidInputError, match=r"temperature: .* got 0"):
        model_contrastive_loss(drawn(4, 3), drawn(4, 3), drawn(4, 3), temperature=0)
    with pytest.raises(InvalidInputError, match="labels"):
        supervised_contrastive_loss(drawn(4, 3), torch.zeros(3))
    with pytest.raises(InvalidInputError, match="one shape"):
        multi_kernel_mmd(drawn(4, 3), drawn(3, 3))
    with pytest.raises(InvalidInputError, match="kernels from 1"):
        multi_kernel_mmd(S, T, kernels=0)
    with pytest.raises(InvalidInputError, match="strength: expected one number"):
        reverse_gradient(drawn(2), drawn(2))
