"""Predictions: KL foreseen for ten budgets from runs at two others, and KL measured, on the model of ``protocol.py``.

    FEWBITS_DATA=... python -m benchmarks.prediction

As ``fewbits sweep`` does it: recipe auto without rivals, one calibration, KL on the held-out rows of calibration text.
"""

from __future__ import annotations

import fewbits
from benchmarks import allocation, protocol
from fewbits.quant.allocate.run import prepare_planner
from fewbits.quant.recipe import Budget

POINTS = [2.5, 3.5]
HELD_OUT = [2.2, 2.35, 2.65, 2.8, 3.0, 3.2, 3.75, 4.0, 4.4, 5.0]


def main() -> None:
    protocol.parser(__doc__).parse_args()
    source, stats = protocol.real_model(), protocol.RESULTS / "stats"
    recipe = allocation.recipe("auto", {"allocate.formats": allocation.MENUS["auto"], "allocate.rivals": []})
    planner, _ = prepare_planner(source, recipe, None, stats, None, None, 0, None)
    rows: list[dict[str, object]] = []
    points: list[tuple[float, float]] = []
    for bpw in POINTS + HELD_OUT:
        plan = planner.plan(Budget(bpw=bpw), points[: len(POINTS)])
        out = protocol.RESULTS / "checkpoints" / "prediction"
        made = fewbits.quantize(source, out, recipe=plan.recipe, force=True, stats=stats)
        assert made.measured is not None and plan.predicted is not None
        points.append((plan.damage, made.measured["kl_mean"]))
        rows.append({"budget": bpw, "bits_per_weight": made.bits_per_weight, "damage": plan.damage, "seed": 0,
                     "point": bpw in POINTS, "predicted": plan.predicted.to_json(), "measured": made.measured})
        print(f"{bpw}: foreseen {plan.predicted.kl:.4f} ({plan.predicted.low:.4f} to {plan.predicted.high:.4f}), "
              f"measured {made.measured['kl_mean']:.4f}", flush=True)
        protocol.save("prediction", rows)


if __name__ == "__main__":
    main()
