"""Parameters of groups with few levels: exact solvers where cuts are few, alternating least squares for the rest.

Groups are ``w (..., g)`` with weights ``h (..., g)``, >= 0; the loss is ``sum_j h_j (w_j - q_j)^2``. Each solver
returns float32 ``(..., parameters)``. With the levels given, the best code of a weight depends on the weight alone,
whatever its ``h``: the optimum is a cut of the sorted weights into runs, and running sums give the loss of any cut.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-30
_ROUNDS = 10
_STARTS = (0.75, 1.1, 1.6)
_DUAL_SHAPES = [[1.5, -0.75], [-1.5, 0.75], [1.0, -1.0], [1.0, 0.5], [-1.0, -0.5]]
"""The grid {-1, 0, 1, 2}, its mirror image, one with two zeros, and those on one side of 0."""
_CHUNK_PAIRS = 1 << 18


def two_magnitudes(w: Tensor, h: Tensor, low: float, high: float) -> Tensor:
    """``{-high, -low, low, high} a`` with one free ``a``, exact in ``O(g log g)``.

    The k largest magnitudes take the high level: ``a = A_k / B_k`` for the k with the largest ``A_k^2 / B_k``, where A
    sums ``h |w| level`` and B sums ``h level^2``. Ternary levels have ``low = 0``.
    """
    size, order = w.abs().sort(dim=-1, descending=True)
    own = h.gather(-1, order)
    a, b = _below(own * size), _below(own)
    a, b = high * a + low * (a[..., -1:] - a), high**2 * b + low**2 * (b[..., -1:] - b)
    best = (a.square() / b.clamp(min=_TINY)).argmax(-1, keepdim=True)
    return a.gather(-1, best) / b.gather(-1, best).clamp(min=_TINY)


def two_means(w: Tensor, h: Tensor) -> Tensor:
    """The two levels ``m -+ a`` as ``(a, m)``, exact in ``O(g log g)``: the best cut of the sorted weights.

    Of magnitudes, it is the best pair ``+-a_1 +- a_2``: the sign of a weight is that of its value.
    """
    w, order = w.sort(dim=-1)
    own = h.gather(-1, order)
    low_h, low_w = _below(own), _below(own * w)
    high_h, high_w = low_h[..., -1:] - low_h, low_w[..., -1:] - low_w
    gain = low_w.square() / low_h.clamp(min=_TINY) + high_w.square() / high_h.clamp(min=_TINY)
    cut = gain.argmax(-1, keepdim=True)
    low = (low_w / low_h.clamp(min=_TINY)).gather(-1, cut)
    high = (high_w / high_h.clamp(min=_TINY)).gather(-1, cut)
    low, high = (low.where(low_h.gather(-1, cut) > 0, high), high.where(high_h.gather(-1, cut) > 0, low))
    return torch.cat([(high - low) / 2, (high + low) / 2], -1)


def three_means(w: Tensor, h: Tensor) -> Tensor:
    """The evenly spaced levels ``m - a, m, m + a`` as ``(a, m)``, exact: all ``g^2`` pairs of cuts are tried."""
    w, order = w.sort(dim=-1)
    sums = torch.stack([_below(own := h.gather(-1, order)), _below(own * w)], -2).flatten(0, -3)
    step = max(1, _CHUNK_PAIRS // sums.shape[-1] ** 2)  # what stays in the cache
    return torch.cat([_of_all_pairs(part) for part in sums.split(step)]).unflatten(0, w.shape[:-1])


def _of_all_pairs(sums: Tensor) -> Tensor:
    """``(n, 2)`` from running sums ``(n, 2, g + 1)`` of ``h`` and ``h w``: the first weights are -1, those from a later
    place on +1."""
    low_h, low_w = sums.unbind(1)
    all_h, all_w = low_h[:, -1:, None], low_w[:, -1:, None]
    high_h, high_w = all_h - low_h[:, None, :], all_w - low_w[:, None, :]
    low_h, low_w = low_h[:, :, None], low_w[:, :, None]
    t, tt, wt = high_h - low_h, high_h + low_h, high_w - low_w  # sums of h t, h t^2, h w t
    det = (all_h * tt).sub_(t * t)
    up = (all_h * wt).sub_(all_w * t)
    # the loss of the mean alone, less this, is that of the best scale and mean
    gain = (up * up).div_(all_h * det)
    gain.masked_fill_((det <= 1e-6 * all_h.square()) | (up <= 0), 0).triu_()
    best = gain.flatten(1).argmax(1, keepdim=True)
    det, up, t = (x.flatten(1).gather(1, best) for x in (det, up, t))
    found = gain.flatten(1).gather(1, best) > 0  # not where all weights are one value
    a = (up / det).where(found, torch.zeros_like(up))
    return torch.cat([a, (all_w[:, 0] - a * t) / all_h[:, 0].clamp(min=_TINY)], 1)


def _below(x: Tensor) -> Tensor:
    """``(..., g + 1)``: the sums of the 0, 1, ... g first."""
    return F.pad(x.cumsum(-1), (1, 0))


def als(w: Tensor, h: Tensor, design: Tensor, *, dual: bool = False) -> Tensor:
    """Levels ``design (levels, p) @ theta``: nearest levels and least squares for theta in turns, from several starts.

    A round reads running sums of the sorted weights at the cuts between levels, so it costs next to nothing beside the
    sort.

    Args:
        dual: the levels are those of ``{0, 1} theta_1 + {0, 1} theta_2``, in either order of signs.
    """
    w, order = w.sort(dim=-1)
    h = h.gather(-1, order)
    sums = torch.stack([_below(h), _below(h * w)], -2)  # (..., 2, g + 1)
    best = best_gain = None
    for start in _starts(sums, w, h, design, dual):
        theta = start
        for _ in range(_ROUNDS):
            theta = _round(w, sums, design, theta)[0]
        gain = _round(w, sums, design, theta)[1]
        if best is None or best_gain is None:
            best, best_gain = theta, gain
        else:
            better = gain > best_gain
            best, best_gain = theta.where(better[..., None], best), gain.where(better, best_gain)
    assert best is not None
    return best


def _starts(sums: Tensor, w: Tensor, h: Tensor, design: Tensor, dual: bool) -> list[Tensor]:
    """Parameters to begin with: scales that halve from one to the next, around the mean where there is one."""
    total = sums[..., 0, -1].clamp(min=_TINY)
    with_mean = bool((design[:, -1] == 1).all())
    center = sums[..., 1, -1] / total * with_mean
    spread = (h * (w - center[..., None]).square()).sum(-1).div(total).sqrt()
    scales = design.shape[1] - with_mean
    out = []
    shapes = _DUAL_SHAPES if dual else [[0.5**p for p in range(scales)]]
    for factor, shape in itertools.product(_STARTS, shapes):
        out.append(torch.stack([spread * factor * s for s in shape] + [center] * with_mean, -1))
    return out


def _round(w: Tensor, sums: Tensor, design: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Better parameters for weights in rising order, and what the levels of ``theta`` take off the loss."""
    levels, order = (theta @ design.T).sort(-1)  # (..., n)
    cuts = torch.searchsorted(w.contiguous(), (levels[..., 1:] + levels[..., :-1]) / 2)
    cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=w.shape[-1])
    at = sums.gather(-1, cuts[..., None, :].expand(*cuts.shape[:-1], 2, cuts.shape[-1]))
    (own_h, own_w), d = at.diff(dim=-1).unbind(-2), design[order]  # of every level; (..., n, p)
    gram, right = (d * own_h[..., None]).mT @ d, d.mT @ own_w[..., None]
    gain = (2 * theta[..., None, :] @ right - theta[..., None, :] @ gram @ theta[..., None])[..., 0, 0]
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * 1e-5
    eye = torch.eye(design.shape[1], device=w.device)
    # towards what it was: a scale that no weight uses stays
    solved = torch.linalg.solve_ex(gram + (size + _TINY) * eye, right + (size + _TINY) * theta[..., None])[0]
    return solved[..., 0], gain
