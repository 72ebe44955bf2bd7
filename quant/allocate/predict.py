"""What a plan will cost in quality, said before it is paid: a value and a band.

Two predictors. The damage model ``fisher`` sums to a KL by its own units; what the sum misses (errors that build on one
another, clipping at few bits) is a power law whose constants one measured run replaces. Before any pass over the
model there is the scaling law of arXiv 2411.17691, from parameters, training tokens and bits alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# KL = factor * damage ** _POWER. Of fisher the factor was fitted to uniform GPTQ at 2, 3 and 4 bits of a model with
# 135 M parameters, of measured damage to the plans of recipe auto for it (docs/results.md); the band is what other
# models and formats may need, not an error of the fit.
_FACTORS = {"fisher": 1.66, "measured": 1.2, "kl": 1.2}
_POWER = 1.07
_PRIOR_BAND = 2.0
_POINT_BAND = 1.2

# arXiv 2411.17691, eq. in the captions of its figures: nats per token of GPTQ on Pythia.
_K, _BETA, _ALPHA, _GAMMA = 0.017, 0.5251, 0.2261, 5.4967
# The law is of one grid per row. Grids per group, with a clip search, were seen to lose 3 to 6 times less.
_GROUPS = 4.5
_LAW_BAND = 3.0


@dataclass(frozen=True)
class Prediction:
    """KL to the original in nats per token, and where it will lie."""

    kl: float
    low: float
    high: float
    basis: str

    def to_json(self) -> dict[str, object]:
        return {"kl_mean": self.kl, "kl_stderr": None, "band": [self.low, self.high], "basis": self.basis}


def in_nats(damage_model: str) -> bool:
    """Whether the damages of a model add up to a KL by their own units."""
    return damage_model in _FACTORS


def predict_kl(damage: float, damage_model: str, points: Sequence[tuple[float, float]] = ()) -> Prediction:
    """KL from the summed damage of a plan.

    Args:
        damage_model: which one made it; one that is not in nats needs points.
        points: ``(damage, measured KL)`` of earlier runs on this model and text. With any, the factor of the power law
            is theirs, nearer points counting more; with two or more that differ, so is the power.
    """
    if damage <= 0:
        return Prediction(0.0, 0.0, 0.0, "no damage")
    known = [(math.log(d), math.log(kl)) for d, kl in points if d > 0 and kl > 0]
    x = math.log(damage)
    if not known:
        return _banded(math.log(_FACTORS[damage_model]) + _POWER * x, _PRIOR_BAND, "damage, not measured on this model")
    power = _power(known)
    weights = [math.exp(-abs(x - at)) for at, _ in known]
    offset = sum(w * (y - power * at) for w, (at, y) in zip(weights, known)) / sum(weights)
    return _banded(offset + power * x, _POINT_BAND, f"damage, {len(known)} measured point(s) of this model")


def _power(known: list[tuple[float, float]]) -> float:
    """Slope of the measured points, drawn towards the usual one as if that were two points a factor e apart."""
    n = len(known)
    mx, my = sum(x for x, _ in known) / n, sum(y for _, y in known) / n
    sxx, sxy = sum((x - mx) ** 2 for x, _ in known), sum((x - mx) * (y - my) for x, y in known)
    return (sxy + 0.5 * _POWER) / (sxx + 0.5)


def _banded(log_kl: float, factor: float, basis: str) -> Prediction:
    kl = math.exp(log_kl)
    return Prediction(kl, kl / factor, kl * factor, basis)


def scaling_law(parameters: float, tokens: float, bits: Iterable[tuple[float, float]]) -> float:
    """Nats per token that GPTQ costs (arXiv 2411.17691): ``sum_u (n_u / N) 0.017 D^0.5251 N^-0.2261 P_u^-5.4967``.

    Args:
        parameters: N, without embeddings.
        tokens: D, that the model was trained on.
        bits: ``(weights, bits of a code)`` of each tensor. Mixed widths average the loss, not the bits, which holds for
            tensors chosen at random: a good allocation does better.
    """
    bits = list(bits)
    total = sum(n for n, _ in bits)
    mean = sum(n * p**-_GAMMA for n, p in bits) / total
    return _K * tokens**_BETA / parameters**_ALPHA * mean


def tokens_at(loss: float, parameters: float, bits: float) -> float:
    """Inverse of :func:`scaling_law` at one width: training tokens at which the cost reaches ``loss``."""
    return (loss * parameters**_ALPHA * bits**_GAMMA / _K) ** (1 / _BETA)


def prior(parameters: float, tokens: float | None, bits: Iterable[tuple[float, float]]) -> Prediction:
    """The scaling law with its band: by how much it is off on models and quantizers other than its own.

    Mixed widths lie between their mean width (bits where they matter) and the mean of their losses (bits anywhere).
    Without ``tokens`` a model is taken to have seen 2 to 20 trillion, and the band is as much wider.
    """
    bits = list(bits)
    total = sum(n for n, _ in bits)
    mean = sum(n * p for n, p in bits) / total
    fewest, most, basis = (2e12, 2e13, "unknown") if tokens is None else (tokens, tokens, f"{tokens:.3g}")
    low = scaling_law(parameters, fewest, [(total, mean)]) / _GROUPS
    high = scaling_law(parameters, most, bits) / _GROUPS
    return Prediction(math.sqrt(low * high), low / _LAW_BAND, high * _LAW_BAND, f"scaling law, training tokens {basis}")
