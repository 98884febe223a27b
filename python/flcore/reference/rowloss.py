r"""Row losses, the definition: cross-entropies of softmax, StableMax and Taylor-softmax.

One row has logits x (V classes), a target class y or target probabilities q, and the symbols

z_k    t x_k + margin [k != y]                            t: logit scale times row scale
e_k    pi_k f(z_k) exp(-m)                                pi: prior, 1 by default; 0 masks
f      softmax exp(z) with m the largest ln pi_k + z_k;   m = 0 for the others:
       stablemax 1 + z for z >= 0, 1 / (1 - z) below      (Prieto et al., arXiv 2501.04697)
       taylor 1 + z + z^2 / 2                             (de Brebisson & Vincent, ICLR 2016)
rho    f'/f: softmax 1, stablemax 1 / (1 + |z|), taylor (1 + z) / f
R, S   sum of e_k over k != y;  R + e_y                   p_k = e_k / S,  ln S = m + log S
g_k    ln pi_k + ln f(z_k)
l      ln S - g_y as log1p(R / e_y): nothing cancels, whatever the size of the logits

Hard labels, class weights w, smoothing eps over the V' classes with pi > 0, W the sum of their w,
comp-sum member tau (Mao et al., arXiv 2304.07288), z-loss kappa:

loss   (1 - eps) w_y c(l) + (eps / V') sum_c w_c (ln S - g_c) + kappa (ln S)^2
       c(l) = l for tau = 1, else expm1((1 - tau) l) / (1 - tau);  phi = c'(l) = exp((1 - tau) l)
dx_k   t rho_k {[(1 - eps) w_y phi + eps W / V' + 2 kappa ln S] p_k - (1 - eps) w_y phi [k = y]
       - eps w_k / V'}, where for k = y the two terms in phi are -(1 - eps) w_y phi R / S

Soft targets, with u_c = w_c ((1 - eps) q_c + eps / V') and U their sum:

loss   U ln S - sum_c u_c g_c + kappa (ln S)^2            (u_c = 0 adds 0 even where g_c = -inf)
dx_k   t rho_k {(U + 2 kappa ln S) p_k - u_k}

An ignored row has loss 0 and gradient 0 and is not read. A class with z = -inf has e = 0 and
rho = 0. A NaN or an infinite S makes loss and gradient of the row NaN. In a shard of a vocabulary
only R, e_y and m of the row are formed; e_y = 0 where the target lies in another shard.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flcore import _arrays
from flcore.ops._rowloss_call import RowCall, RowLossForm, as_rows, numpy64

__all__ = ["Terms", "element_map", "gradient", "loss", "rowloss", "rowloss_targets", "terms"]

FORWARD, BOTH, BACKWARD = range(3)
BLOCK = 1 << 20  # logits at a time


def element_map(z: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return f (without the exponential of softmax, whose f is left 1), ln f and rho."""
    masked = np.isneginf(z)
    if name == "softmax":
        return np.ones_like(z), z, np.where(masked, 0.0, 1.0)
    if name == "stablemax":
        a = 1 + np.abs(z)
        return np.where(z >= 0, a, 1 / a), np.copysign(np.log1p(np.abs(z)), z), 1 / a
    f = np.where(masked, 0.0, 1 + z + z * z / 2)
    return f, np.where(masked, -np.inf, np.log(f)), np.where(masked, 0.0, (1 + z) / f)


class Terms(NamedTuple):
    """Of n rows: own [k = y] and present (n, V); e, g, rho (n, V); R, e_y, m (n,)."""

    own_class: np.ndarray
    present: np.ndarray
    e: np.ndarray
    g: np.ndarray
    rho: np.ndarray
    rest: np.ndarray
    own: np.ndarray
    shift: np.ndarray


def terms(
    x: np.ndarray,
    labels: np.ndarray | None,
    form: RowLossForm,
    log_prior: np.ndarray | None,
    t: np.ndarray,
    shift: np.ndarray | None = None,
) -> Terms:
    """Everything both loss and gradient need; `labels` (n,) count from the first class of x."""
    columns = np.arange(x.shape[1])
    own_class = np.zeros(x.shape, bool) if labels is None else labels[:, None] == columns
    prior = np.zeros(x.shape[1]) if log_prior is None else log_prior
    z = t[:, None] * x + np.where(own_class | (labels is None), 0.0, form.margin)
    f, log_f, rho = element_map(z, form.map)
    g = log_f + prior
    if form.map == "softmax":
        if shift is None:
            shift = g.max(axis=1)
        e = np.exp(g - shift[:, None])
    else:
        shift = np.zeros(len(x))
        e = np.exp(prior) * f
    rest = np.where(own_class, 0.0, e).sum(axis=1)
    own = np.where(own_class, e, 0.0).sum(axis=1)
    present = np.broadcast_to(prior > -np.inf, x.shape)
    return Terms(own_class, present, e, g, rho, rest, own, shift)


def _plain_loss(found: Terms) -> np.ndarray:
    """Return l of every row: log1p(R / e_y), or ln S - g_y where e_y is too small to divide by."""
    with np.errstate(over="ignore"):
        ratio = found.rest / found.own
    log_sum = np.log(found.rest + found.own)
    g_y = np.where(found.own_class, found.g, 0.0).sum(axis=1)
    return np.where(np.isfinite(ratio), np.log1p(ratio), (found.shift - g_y) + log_sum)


def _weights(
    found: Terms, soft: np.ndarray | None, w: np.ndarray, form: RowLossForm
) -> tuple[np.ndarray, np.ndarray]:
    """Weights u (n, V) of ln S - g_c outside the comp-sum term, and w_y (n,)."""
    eps, count = form.label_smoothing, found.present.sum(axis=1, keepdims=True)
    spread = np.where(found.present, eps / count, 0.0)
    if soft is not None:
        return w * ((1 - eps) * soft + spread), np.zeros(len(soft))
    if form.shard:  # takes no weights, and the target may lie in another shard
        return w * spread, np.ones(len(found.own))
    return w * spread, np.where(found.own_class, w, 0.0).sum(axis=1)


def loss(found: Terms, soft: np.ndarray | None, w: np.ndarray, form: RowLossForm) -> np.ndarray:
    """Loss of every row (n,)."""
    u, w_y = _weights(found, soft, w, form)
    total = found.rest + found.own
    log_sum = found.shift + np.log(total)
    result = np.where(u != 0, u * (log_sum[:, None] - found.g), 0.0).sum(axis=1)
    result += form.z_loss * log_sum**2 if form.z_loss else 0.0
    if soft is None and form.label_smoothing < 1:
        own = _plain_loss(found)
        if form.tau != 1:
            own = np.expm1((1 - form.tau) * own) / (1 - form.tau)
        result += (1 - form.label_smoothing) * w_y * own
    return np.where(np.isfinite(total) & (total > 0), result, np.nan)


def gradient(
    found: Terms, soft: np.ndarray | None, w: np.ndarray, form: RowLossForm, t: np.ndarray
) -> np.ndarray:
    """Gradient of the loss of every row in its logits (n, V)."""
    u, w_y = _weights(found, soft, w, form)
    total = found.rest + found.own
    slope = u.sum(axis=1)
    if form.z_loss:
        slope = slope + 2 * form.z_loss * (found.shift + np.log(total))
    phi = np.ones(len(total))
    if form.tau != 1:
        phi = np.exp((1 - form.tau) * _plain_loss(found))
    hard = (1 - form.label_smoothing) * w_y * phi
    p = found.e / total[:, None]
    others = np.where(found.own_class, -(found.rest / total)[:, None], p)
    result = t[:, None] * found.rho * (hard[:, None] * others + slope[:, None] * p - u)
    fine = np.isfinite(total) & (total > 0)
    return np.where(fine[:, None], result, np.nan)


# ---- variants ----------------------------------------------------------------------------------


def rowloss(call: RowCall, mode: int) -> None:
    """Compute the module's formulas in float64; see `flcore.ops.rowloss`."""
    form = call.form
    x = as_rows(call.x, call).reshape(call.rows, call.classes)
    labels = None if call.labels is None else _integers(call.labels) - form.label_offset
    valid = _valid(call, labels)
    t = form.logit_scale * _or(numpy64(call.row_scale), np.ones(call.rows))
    w = _or(numpy64(call.weight), np.ones(call.classes))
    prior = numpy64(call.prior)
    with np.errstate(all="ignore"):
        log_prior = prior if prior is None or form.map == "softmax" else np.log(prior)
        outputs = [np.zeros(call.rows) for _ in range(4)]
        grad = np.zeros((call.rows, call.classes)) if mode else None
        step = max(1, BLOCK // max(1, call.classes))
        for start in range(0, call.rows, step):
            i = start + np.flatnonzero(valid[start : start + step])
            if not len(i):
                continue
            soft = None if call.soft is None else numpy64(call.soft[_index(call.soft, i)])
            y = None if labels is None else labels[i]
            given = _rows(call.shift, i) if mode == BACKWARD and form.map == "softmax" else None
            found = terms(_float64(x, i), y, form, log_prior, t[i], given)
            if mode == BACKWARD:
                found = found._replace(rest=_rows(call.rest, i), own=_rows(call.own, i))
            if soft is not None:
                found = found._replace(rest=found.rest + found.own, own=np.zeros(len(i)))
            if mode != BACKWARD:
                if not form.shard:
                    outputs[0][i] = loss(found, soft, w, form)
                for out, value in zip(outputs[1:], found[-3:], strict=True):
                    out[i] = value
            if grad is not None:
                scale = call.grad_scale * _or(numpy64(call.scale_tensor), np.ones(1))
                upstream = _or(numpy64(call.upstream), np.ones(call.rows))[i] * scale
                grad[i] = upstream[:, None] * gradient(found, soft, w, form, t[i])
        if mode != BACKWARD:
            for target, value in zip((call.loss, call.rest, call.own, call.shift), outputs):  # noqa: B905
                if target is not None:
                    _arrays.assign(target, value)
        if grad is not None:
            _assign_rows(call, grad)


def _or(x: np.ndarray | None, default: np.ndarray) -> np.ndarray:
    return default if x is None else x


def _integers(x: np.ndarray) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray) else x.detach().cpu().numpy()).astype(np.int64)


def _index(x: np.ndarray, i: np.ndarray) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return i
    import torch

    return torch.from_numpy(i).to(x.device)


def _float64(x: np.ndarray, i: np.ndarray) -> np.ndarray:
    return _arrays.to_float64(x[_index(x, i)]).reshape(len(i), -1)


def _rows(x: np.ndarray, i: np.ndarray) -> np.ndarray:
    return _arrays.to_float64(x)[i]


def _valid(call: RowCall, labels: np.ndarray | None) -> np.ndarray:
    if call.valid is not None:
        return _integers(call.valid) != 0
    if labels is None:
        return np.ones(call.rows, bool)
    return labels + call.form.label_offset != call.form.ignore_index


def _assign_rows(call: RowCall, grad: np.ndarray) -> None:
    target = as_rows(call.grad, call, gradient=True)
    _arrays.assign(target, grad.reshape(target.shape))


def rowloss_targets(
    labels: np.ndarray,
    valid: np.ndarray | None,
    form: RowLossForm,
    classes: int,
    weight: np.ndarray | None,
    prior: np.ndarray | None,
) -> tuple[int, float, int]:
    """Return rows that count, sum of their w_y, first row with a label that cannot be (or -1)."""
    y = _integers(labels)
    keep = y != form.ignore_index if valid is None else _integers(valid) != 0
    k = y - form.label_offset
    inside = (k >= 0) & (k < classes)
    bad = keep & ~inside
    safe = np.where(inside, k, 0)
    if prior is not None and classes:
        masked = -np.inf if form.map == "softmax" else 0.0
        bad |= keep & inside & (numpy64(prior)[safe] == masked)  # type: ignore[index]
    w = np.ones(max(1, classes)) if weight is None else _or(numpy64(weight), np.ones(0))
    good = keep & inside
    first = int(np.flatnonzero(bad)[0]) if bad.any() else -1
    return int(keep.sum()), float(w[safe[good]].sum()), first
