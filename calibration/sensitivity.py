"""How much each format would hurt each tensor: the damage models, all behind :func:`measure`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fewbits.calibration.blockscores import block_scores
from fewbits.calibration.curvature import CURVATURE_ROWS, output_curvature
from fewbits.calibration.feedback import (
    column_shares,
    conditional_curvature,
    feedback_damage,
    rounded,
    sample_rows,
)
from fewbits.calibration.meter import KLMeter
from fewbits.calibration.survey import Losses, Survey
from fewbits.quant.targets import as_matrix, find_targets, read_weight
from fewbits.quant.types import Layout, nominal_bits

GRADIENT_ROWS = 8
"""Calibration rows that gradients are taken over: changes numbers by their noise."""

MEASURED_ROWS, MEASURED_LENGTH = 3, 256
"""Rows, and tokens of each, that the KL of one tensor is measured on."""

MOST_OFF = 4.0
"""Largest factor by which one measurement corrects a tensor: beyond it, it is noise."""

ANCHOR = 1 / 16
"""Each tensor is measured where it hurts most and where it hurts about this much less: some two bits apart."""


def fisher(job: Survey) -> Losses:
    """Error feedback's loss weighted by the curvature of the output: nats per token."""
    known = {n: {e: job.findings.get("fisher", n, f) for e, f in own.items()} for n, own in job.menu.items()}
    if all(d is not None for own in known.values() for d in own.values()):
        return known  # type: ignore[return-value]
    model = job.dense_model(job.streamed.dtype)  # mean squares: rounding of the gradients averages out
    targets = [t for t in find_targets(model) if t.name in job.menu]
    curvature = output_curvature(model, targets, job.rows(CURVATURE_ROWS), seed=job.seed, progress=job.progress)
    del model
    losses = _feedback(job, curvature)
    for name, own in losses.items():
        for entry, damage in own.items():
            job.findings.add("fisher", name, job.menu[name][entry], damage)
    return losses


def measured(job: Survey) -> Losses:
    """``fisher``, with each tensor scaled to the KL that it alone costs, measured at two entries of its menu.

    What the curvature misses (errors that add up over tokens, inputs and gradients that are large together) belongs to
    the tensor and changes slowly with the width: in between, the logarithm of the factor is interpolated.
    """
    losses = fisher(job)
    anchors = {}
    for name, own in losses.items():
        worst = max(own, key=own.__getitem__)
        goal = max(own[worst], 1e-30) * ANCHOR
        _, other = min((abs(math.log(max(d, 1e-30) / goal)), e) for e, d in own.items())
        anchors[name] = list(dict.fromkeys((worst, other)))
    factors: dict[str, list[tuple[float, float]]] = {}
    for name, entry, found in measured_alone(job, anchors):
        foreseen = max(losses[name][entry], 1e-30)
        factor = min(max(found / foreseen, 1 / MOST_OFF), MOST_OFF)
        factors.setdefault(name, []).append((math.log(foreseen), math.log(factor)))
    return {name: {e: d * _between(factors[name], d) for e, d in own.items()} for name, own in losses.items()}


def _between(known: list[tuple[float, float]], damage: float) -> float:
    """The factor at a damage, from ``(log damage, log factor)`` of one or two others; constant beyond them."""
    xs, ys = zip(*sorted(known))
    return math.exp(float(np.interp(math.log(max(damage, 1e-30)), xs, ys)))


def hessian(job: Survey) -> Losses:
    """Error feedback's loss, every output alike: the sum of squared output errors of each layer by itself."""
    return _feedback(job, None)


def _feedback(job: Survey, curvature: dict[str, Tensor] | None) -> Losses:
    out: Losses = {}
    tokens = 1 if job.text is None else job.text.n_tokens
    for block, stats in job.blocks():
        for name in stats.keys() & job.menu.keys():
            share = stats[name].n_tokens / tokens if curvature is None else 1.0  # of the tokens an expert sees
            c = None if curvature is None else curvature[name]
            damage = feedback_damage(block.weights[name], stats[name], list(job.menu[name].values()), c)
            out[name] = dict(zip(job.menu[name], (share * d for d in damage)))
    return out


def baq(job: Survey) -> Losses:
    """BAQ's closed form (arXiv 2506.05664): ``sum_j D_j sum_i range_i^2 2^-2b / 24``, at a high rate."""
    out: Losses = {}
    for block, stats in job.blocks():
        for name in stats.keys() & job.menu.keys():
            w = block.weights[name].float()
            spread = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)).square().sum()
            c = float(conditional_curvature(stats[name])[0].sum() * spread) / 24
            out[name] = {e: c * 4.0 ** -_width(layout) for e, layout in job.menu[name].items()}
    return out


def baq_within(job: Survey) -> Losses:
    """BAQ as its paper allocates: ``baq`` with every matrix scaled so that all get the same mean width.

    At the optimum each group has ``c_group 2^-2b`` in proportion to its weights; dividing by the geometric mean of a
    matrix's own groups leaves only what sets them apart from one another.
    """
    out: Losses = {}
    for block, stats in job.blocks():
        for name in stats.keys() & job.menu.keys():
            shares = column_shares(stats[name], job.recipe.allocate.column_group)
            mean = math.exp(sum(math.log(max(s, 1e-30)) for s in shares) / len(shares))
            c = block.weights[name].numel() / len(shares) / mean
            out[name] = {e: c * 4.0 ** -_width(layout) for e, layout in job.menu[name].items()}
    return out


def _width(layout: Layout) -> float:
    """Bits of codes for each weight of an entry of a menu, whatever its groups are."""
    return sum(nominal_bits(fmt) * n for fmt, n in layout.runs) / layout.columns


def weights(job: Survey) -> Losses:
    """Squared error of round to nearest against the weights alone, relative to each tensor's power: no data is used."""
    out: Losses = {}
    for block in job.streamed.blocks():
        for target in block.targets:
            if target.name in job.menu:
                whole = block.weights[target.name].float()
                mixed = any(layout.rotated for layout in job.menu[target.name].values())  # its rows cannot be sampled
                w = whole if mixed else sample_rows(whole)
                power = float(w.square().sum().clamp(min=1e-30))
                out[target.name] = {
                    e: target.shape[0] * target.shape[1] * float((w - rounded(w, None, own)).square().sum()) / power
                    for e, own in job.menu[target.name].items()
                }
    return out


def lim(job: Survey) -> Losses:
    """Layer input modification (arXiv 2406.17415): a block matters more the more it turns the hidden state."""
    return _by_block(job, {i: 1 - s.cosine for i, s in block_scores(job).items()})


def zd(job: Survey) -> Losses:
    """Z-score distribution (arXiv 2406.17415): a block matters more the fewer of its weights exceed one deviation."""
    tails: dict[int, tuple[float, int]] = {}
    for block in job.streamed.blocks():
        for target in block.targets:
            if target.name in job.menu:
                w = block.weights[target.name].float()
                above = int(((w - w.mean()) > w.std()).sum())  # each matrix has a deviation of its own
                share, n = tails.get(block.index, (0.0, 0))
                tails[block.index] = share + above, n + w.numel()
    return _by_block(job, {i: -above / n for i, (above, n) in tails.items()})


def entropy(job: Survey) -> Losses:
    """Activation entropy (LUQ, arXiv 2509.23729): a block matters more the more evenly its outputs fill clusters."""
    return _by_block(job, {i: s.entropy for i, s in block_scores(job, entropy=True).items()})


def _by_block(job: Survey, importance: Mapping[int, float]) -> Losses:
    """Damage that makes the solver lower the least important blocks first.

    The papers only order the blocks. Ranks, not scores, enter: any rising function of the score gives one order, and
    with two widths and blocks of one size the exact solution is then the prefix of the papers.
    """
    rank = {i: r + 1 for r, (i, _) in enumerate(sorted(importance.items(), key=lambda kv: (kv[1], kv[0])))}
    out: Losses = {}
    for name, entries in job.menu.items():
        index = job.streamed.block_index(name)
        assert index is not None
        n, k = job.streamed.targets[name].shape
        out[name] = {e: rank[index] * n * k * 4.0 ** -_width(layout) for e, layout in entries.items()}
    return out


def gradient(job: Survey) -> Losses:
    """Gradient scores: ``sum |dL/dW . (W - Q)|`` with the whole model rounded to that option, a backward pass each.

    L is the cross entropy of the text, as in AutoScheme (auto-round).
    """
    model = job.dense_model()
    model.requires_grad_(False)
    targets = {t.name: t for t in find_targets(model) if t.name in job.menu}
    original = {n: read_weight(model, t).clone() for n, t in targets.items()}
    rows = job.rows(GRADIENT_ROWS)
    out: Losses = {n: {} for n in job.menu}
    entries = list(dict.fromkeys(e for own in job.menu.values() for e in own))
    for i, entry in enumerate(entries):
        params = {}
        for name, target in targets.items():
            if entry in job.menu[name]:
                read_weight(model, target).copy_(rounded(original[name].float(), None, job.menu[name][entry]))
            module = model.get_submodule(target.module_path)
            params[name] = getattr(module, target.param_name).requires_grad_(True)
        for row in rows:
            ids = row[None].to(model.device)
            with torch.enable_grad():
                (model(ids, labels=ids, use_cache=False).loss / len(rows)).backward()
        for name, target in targets.items():
            if entry in job.menu[name]:
                step = original[name] - read_weight(model, target)
                slope = params[name].grad
                out[name][entry] = 0.0 if slope is None else float((as_matrix(slope, target) * step).abs().sum())
            read_weight(model, target).copy_(original[name])
        for p in params.values():
            p.grad = None
        job.progress("Gradients", i + 1, len(entries))
    return out


def kl(job: Survey) -> Losses:
    """KL measured with one tensor quantized at a time: the truth for each, at a forward pass for every option."""
    out: Losses = {name: {} for name in job.menu}
    for name, entry, found in measured_alone(job, job.menu):
        out[name][entry] = max(found, 0.0)
    return out


def _single_meter(job: Survey) -> KLMeter:
    """KL on the few rows that single tensors are measured on."""
    return KLMeter(job.dense_model(), [row[:MEASURED_LENGTH] for row in job.rows(CURVATURE_ROWS)[-MEASURED_ROWS:]])


def measured_alone(job: Survey, wanted: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, float]]:
    """``(tensor, entry, KL)`` for each wanted entry of each tensor, quantized alone. What is known is not measured."""
    todo: dict[str, list[str]] = {}
    for name, entries in wanted.items():
        for entry in entries:
            known = job.findings.get("alone", name, job.layout(name, entry))
            if known is None:
                todo.setdefault(name, []).append(entry)
            else:
                yield name, entry, known
    if not todo:
        return
    meter, total = _single_meter(job), sum(map(len, todo.values()))
    for done, (name, entry, made) in enumerate(job.quantized(todo), 1):
        found = meter.measure({name: made.dequantize()})
        job.findings.add("alone", name, job.layout(name, entry), found)
        yield name, entry, found
        job.progress("Measuring", done, total)


DAMAGE: dict[str, Callable[[Survey], Losses]] = {
    "measured": measured, "fisher": fisher, "hessian": hessian, "baq": baq, "baq-within": baq_within,
    "weights": weights, "lim": lim, "zd": zd, "entropy": entropy, "gradient": gradient, "kl": kl,
}


WEIGHTS_ONLY = ("weights", "zd")
"""Damage models that need no text."""


def measure(job: Survey, damage: str) -> Losses:
    """What every entry of the menu does to every tensor, by the damage model of this name.

    Embedding and head are few and unlike all else: each of their entries is measured.
    """
    losses = DAMAGE[damage](job)
    if job.ends:
        losses |= {n: {} for n in job.ends}
        for name, entry, found in measured_alone(job, job.ends):
            losses[name][entry] = max(found, 0.0)
    return losses
