"""Scores of whole decoder blocks from one pass of the original model: how much they turn, how evenly they spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.calibration.collect import HIDDEN_LIMIT_BYTES, model_inputs
from fewbits.calibration.hidden import HiddenStates
from fewbits.calibration.survey import Survey
from fewbits.quant.errors import CalibrationError

_SINK = 20.0
_PROJECTED = 64
_CLUSTERS = 100
_RESERVOIR = 20_000
_SEEDS = 3
_ITERATIONS = 20


@dataclass(frozen=True)
class BlockScore:
    """Of one decoder block.

    Attributes:
        cosine: mean over tokens of the cosine between the hidden state that enters and the one that leaves.
        entropy: of the clusters that its outputs fall into, bits: mean over seeds.
    """

    cosine: float
    entropy: float = 0.0


def block_scores(job: Survey, *, entropy: bool = False) -> dict[int, BlockScore]:
    """One pass over the calibration rows, first tokens and massive ones (attention sinks) left out.

    Raises:
        CalibrationError: no text.
    """
    if job.text is None:
        raise CalibrationError("allocate.damage: scores of blocks need calibration text; give some")
    streamed = job.streamed
    with streamed.outer():
        hidden, calls = streamed.first_inputs(model_inputs(job.text))
    states = HiddenStates(hidden, HIDDEN_LIMIT_BYTES, None)
    out = {}
    total = len(streamed.block_modules)
    for block in streamed.blocks():
        cosines, outputs = [], []
        for i in range(len(states)):
            before = states[i]
            states[i] = after = block.run(before, calls[i][block.index])
            x, y = _counted(before, after)
            cosines.append(torch.nn.functional.cosine_similarity(x, y, dim=-1))
            if entropy:
                outputs.append(y)
        cosine = float(torch.cat(cosines).mean())
        spread = cluster_entropy(torch.cat(outputs), seed=job.seed)[0] if entropy else 0.0
        out[block.index] = BlockScore(cosine, spread)
        job.progress("Scoring blocks", block.index + 1, total)
    return out


def _counted(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states ``(tokens, d)`` in float32, without first tokens and sinks."""
    x, y = (t[:, 1:].reshape(-1, t.shape[-1]).float() for t in (before, after))
    norms = y.norm(dim=-1)
    keep = norms <= _SINK * norms.median()
    return x[keep], y[keep]


def cluster_entropy(outputs: Tensor, *, seed: int = 0, clusters: int = _CLUSTERS) -> tuple[float, float]:
    """``(mean, deviation over seeds)`` of the entropy of k-means cluster sizes, bits, at most ``log2(clusters)``.

    Channels are standardized and projected to 64 dimensions by a fixed Gaussian matrix (distances survive that to some
    10 %); the paper clusters raw outputs.
    """
    draw = torch.Generator().manual_seed(seed)
    if len(outputs) > _RESERVOIR:
        outputs = outputs[torch.randperm(len(outputs), generator=draw)[:_RESERVOIR]]
    outputs = (outputs - outputs.mean(0)) / outputs.std(0).clamp(min=1e-12)
    if outputs.shape[1] > _PROJECTED:
        outputs = outputs @ torch.randn(outputs.shape[1], _PROJECTED, generator=draw) / math.sqrt(_PROJECTED)
    values = torch.tensor([_entropy(outputs, clusters, draw) for _ in range(_SEEDS)], dtype=torch.float64)
    return float(values.mean()), float(values.std())


def _entropy(points: Tensor, clusters: int, draw: torch.Generator) -> float:
    clusters = min(clusters, len(points))
    centers = points[torch.randperm(len(points), generator=draw)[:clusters]]
    for _ in range(_ITERATIONS):
        nearest = (centers.square().sum(1) - 2 * points @ centers.T).argmin(1)
        counts = torch.bincount(nearest, minlength=clusters)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
    share = torch.bincount(nearest, minlength=clusters).double() / len(points)
    share = share[share > 0]
    return float(-(share * share.log2()).sum())
